"""Methods that take turns."""

import json
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import gensparse
from gensparse.errors import ConfigError
from gensparse.layout import Layout
from gensparse.methods import (
    PSA,
    START,
    At,
    Clear,
    Dense,
    Loaded,
    Method,
    Neighborhood,
    Place,
    Schedule,
    SlidingWindow,
    as_method,
    parse_method,
)
from gensparse.methods.describe import method_text
from gensparse.patterns import Box, Pattern, PerHead, Text
from gensparse.testing.tiny import tiny_denoiser, tiny_flux_pipeline, tiny_inputs

EXAMPLES = [
    Schedule(),
    Schedule(((0, "dense"), (2, Clear(radius=8, down_factor=4)), (7, "neighborhood:window=7,causal=true"))),
    Schedule(((0.0, Neighborhood(window=(None, 3, 5), stride=(1, 3, 1))), (0.5, PSA()), (0.9, "dense"))),
    Schedule(((0, "dense"), (1, Schedule(((0, "dense"), (3, SlidingWindow())))))),
]


@pytest.mark.parametrize("method", EXAMPLES[:3], ids=repr)
def test_text_round_trip(method: Method) -> None:
    assert parse_method(method_text(json.loads(json.dumps(method.to_dict())))) == method


@pytest.mark.parametrize("method", EXAMPLES, ids=repr)
def test_dict_round_trip(method: Method) -> None:
    data = json.loads(json.dumps(method.to_dict()))
    assert Method.from_dict(data) == Schedule.from_dict(data) == as_method(data) == method
    assert hash(Method.from_dict(data)) == hash(method)


def test_text_form() -> None:
    text = " schedule : 0=dense ; 0.25=clear:radius=8,down_factor=2;0.9=dense"
    assert parse_method(text) == Schedule(((0, "dense"), (0.25, Clear(8, 2)), (0.9, "dense")))
    assert parse_method("schedule") == Schedule()


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ((), "rise from 0"),
        (((1, "dense"),), "rise from 0"),
        (((0, "dense"), (0, "clear")), "rise from 0"),
        (((0, "dense"), (3, "clear"), (2, "dense")), "rise from 0"),
        (((0, "dense"), (1, "clear"), (0.5, "dense")), "rise from 0"),
        (((0, "dense"), (1.5, "clear")), "below 1.0"),
        (((0, "dense"), (-1, "clear")), "rise from 0"),
        (((False, "dense"),), "rise from 0"),
        ((("a", "dense"),), "rise from 0"),
        (((0, "dense"), (float("nan"), "clear")), "rise from 0"),
        (((0, "no_such"),), "unknown method"),
        (((0, 3),), "not a method"),
        (("dense",), "pairs"),
        ("dense", "pairs"),
    ],
)
def test_bad_phases_are_refused(phases: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Schedule(phases)


@pytest.mark.parametrize("text", ["schedule:dense", "schedule:0=", "schedule:x=dense", "schedule:preset=wan"])
def test_bad_text_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_method(text)


def test_shares_and_steps_say_when_each_phase_acts() -> None:
    layout = Layout.image(6, 6)
    method = Schedule(((0, "dense"), (0.3, Clear(2)), (0.8, SlidingWindow(1))))
    acts = [method.pattern(layout, At(step=step, steps=10)) for step in range(10)]
    assert [type(what).__name__ for what in acts[:3]] == ["Dense"] * 3
    assert acts[3:8] == [Clear(2).pattern(layout)] * 5
    assert acts[8:] == [SlidingWindow(1).pattern(layout)] * 2
    steps = Schedule(((0, Clear(2)), (4, "dense")))
    assert isinstance(steps.pattern(layout, At(step=4)), Dense)
    assert steps.pattern(layout, START) == Clear(2).pattern(layout)
    with pytest.raises(ConfigError, match=r"restart\(steps="):
        method.pattern(layout, At(step=1))


@dataclass(frozen=True)
class Menu(Method):
    """Kinds, heads and weights of its own."""

    name: ClassVar[str] = "menu"

    radius: int = 1
    loads: bool = False

    def kind(self, place: Place) -> int:
        return place.layer % 2

    def pattern(self, layout: Layout, at: At = START) -> Pattern:
        return PerHead((Box(self.radius) | Text(), Box(2) | Text()))

    def heads(self, at: At, heads: int) -> tuple[int, ...]:
        return tuple((head + at.kind) % 2 for head in range(heads))

    def load(self, subject: Any, places: Any) -> Loaded | None:
        return Marked(subject.model) if self.loads else None


class Marked(Loaded):
    """A mark on the model instead of weights."""

    def __init__(self, model: Any) -> None:
        self.model = model
        model.marks = getattr(model, "marks", 0) + 1

    def undo(self) -> None:
        self.model.marks -= 1


@torch.no_grad()
def run(model: Any, time: float) -> torch.Tensor:
    inputs = tiny_inputs("wan", (2, 5, 6))
    return model(**{**inputs, "timestep": torch.full((2,), time)}, return_dict=False)[0]


def test_each_phase_acts_as_its_method_alone_and_dense_between() -> None:
    """Clear and the menu differ in kinds, heads and weights."""
    model = tiny_denoiser("wan")
    times = [900.0, 700.0, 500.0, 300.0]
    expected = [run(model, times[0])]
    for method, time in ((Clear(2), times[1]), (Menu(), times[2])):
        with gensparse.applied(model, method, strict=True):
            expected.append(run(model, time))
    expected.append(run(model, times[3]))
    handle = gensparse.apply(model, Schedule(((0, "dense"), (1, Clear(2)), (2, Menu(loads=True)), (3, "dense"))))
    assert model.marks == 1
    for _ in range(2):
        assert all(torch.equal(run(model, time), want) for time, want in zip(times, expected, strict=True))
    assert handle.report()["calls"] == {"sparse": 8, "dense": {"dense phase": 8}}
    handle.remove()
    assert model.marks == 0


def test_weights_of_two_phases_are_refused_and_taken_off() -> None:
    model = tiny_denoiser("wan")
    with pytest.raises(ConfigError, match="Two phases"):
        gensparse.apply(model, Schedule(((0, Menu(loads=True)), (1, Menu(3, loads=True)))))
    assert model.marks == 0
    assert not model._forward_pre_hooks
    gensparse.apply(model, Schedule(((0, Menu(loads=True)), (1, "dense"), (2, Menu(loads=True)))))
    assert model.marks == 1


def test_shares_of_a_pipeline_run() -> None:
    pipe = tiny_flux_pipeline()
    pipe.set_progress_bar_config(disable=True)
    handle = gensparse.apply(pipe, "schedule:0=dense;0.5=clear:radius=3", strict=True)
    pipe("a cat", height=32, width=32, num_inference_steps=4, max_sequence_length=16, output_type="latent")
    assert handle.report()["calls"] == {"sparse": 4, "dense": {"dense phase": 4}}
    assert handle.report()["method"]["phases"][1] == [0.5, Clear(3).to_dict()]


def test_a_bare_model_is_told_its_steps() -> None:
    model = tiny_denoiser("wan")
    handle = gensparse.apply(model, "schedule:0=dense;0.5=clear:radius=2")
    run(model, 900.0)
    with pytest.raises(ConfigError, match="unknown length"):
        run(model, 500.0)
    handle.restart(steps=2)
    for time in (900.0, 500.0):
        run(model, time)
    assert handle.report()["sparse"] == 2


def test_no_phase_that_can_run_is_a_reason() -> None:
    layout = Layout.joint((1, 4, 4), references=[(1, 2, 2)])
    assert "reference" in (Schedule(((0, "dense"), (1, Menu()))).why_not(layout) or "")
    assert Schedule(((0, "dense"),)).why_not(layout) is None
