"""Radial attention: published settings by model, warm-up, limits, and small settings against dense masks."""

from typing import Any

import numpy as np
import pytest
import torch
from families.family_checks import check_small_window_equals_masked_dense, masked_output, output, sites_of
from one_layer import attend
from torch import nn

import gensparse
from gensparse.errors import ConfigError, LayoutMismatchError
from gensparse.families import hunyuan_video, mochi, skyreels, wan
from gensparse.kernels import reference
from gensparse.layout import Layout
from gensparse.methods import START, Dense, Radial, Subject
from gensparse.patterns import Pattern
from gensparse.patterns import Radial as RadialPattern
from gensparse.testing.tiny import tiny_call, tiny_denoiser, tiny_inputs, tiny_pipeline

SMALL = Radial(decay=0.3, block=16, dense_steps=0, dense_layers=0)


def dense_mask(method: Radial, layout: Layout) -> np.ndarray:
    pattern = method.pattern(layout)
    assert isinstance(pattern, Pattern)
    return pattern.dense_mask(layout)


@pytest.mark.parametrize(
    ("family", "denoisers", "expected"),
    [
        (wan.FAMILY.name, 1, Radial(0.2, 128, True, 0.24, 1)),
        (wan.FAMILY.name, 2, Radial(0.8, 64, True, 0.275, 1)),
        (skyreels.FAMILY.name, 1, Radial(0.2, 128, True, 0.24, 1)),
        (hunyuan_video.FAMILY.name, 1, Radial(0.95, 128, False, 0.24, 0)),
        (mochi.FAMILY.name, 1, Radial(1.0, 128, True, 0.24, 0)),
    ],
)
def test_settings_that_are_left_out_are_those_published_for_the_model(
    family: str, denoisers: int, expected: Radial
) -> None:
    subject = Subject(family, nn.Linear(1, 1), denoisers=denoisers)
    assert Radial().resolved(subject) == expected
    given = Radial(0.7, 32, False, 3, 4)
    assert given.resolved(subject) == given
    assert Radial().resolved(subject).resolved(subject) == expected


@pytest.mark.parametrize(
    ("name", "steps", "first"),
    [
        ("wan2.1-t2v-14b", 50, 12),
        ("wan2.1-t2v-14b-fusionx", 8, 2),
        ("wan2.1-t2v-14b-lightx2v", 4, 1),
        ("wan2.2-t2v-a14b", 40, 11),
        ("hunyuan_video", 50, 12),
    ],
)
def test_the_share_of_the_defaults_is_the_published_number_of_steps(name: str, steps: int, first: int) -> None:
    preset = Radial.preset(name)
    families = {"wan2.1": (wan, 1), "wan2.2": (wan, 2), "hunyua": (hunyuan_video, 1)}
    family, denoisers = families[name[:6]]
    own = Radial().resolved(Subject(family.FAMILY.name, nn.Linear(1, 1), denoisers=denoisers))
    layout = Layout.video(4, 5, 6)
    for method in (preset, own):
        kinds = [isinstance(method.pattern(layout, START._replace(step=i, steps=steps)), Dense) for i in range(steps)]
        assert kinds == [True] * first + [False] * (steps - first)
    assert (preset.decay, preset.block, preset.sink) == (own.decay, own.block, own.sink)


def test_a_run_of_unknown_length_counts_as_fifty_steps() -> None:
    layout = Layout.video(4, 5, 6)
    for step, dense in ((11, True), (12, False)):
        assert isinstance(Radial().pattern(layout, START._replace(step=step)), Dense) is dense


@pytest.mark.parametrize("grid", [(5, 4, 6), (7, 3, 5), (6, 1, 11)])
def test_small_bands_equal_a_dense_masked_model_of_wan(grid: tuple[int, int, int]) -> None:
    model, inputs = tiny_denoiser("wan"), tiny_inputs("wan", grid)
    check_small_window_equals_masked_dense(model, inputs, {"self": Layout.joint(grid)}, SMALL)


def test_small_bands_equal_a_dense_masked_model_of_hunyuan_whose_text_is_padded() -> None:
    model, inputs = tiny_denoiser("hunyuan_video"), tiny_inputs("hunyuan_video", (5, 3, 4), text=7)
    layout = Layout.video(5, 3, 4, text=7)
    check_small_window_equals_masked_dense(model, inputs, {"joint": layout}, SMALL)


def test_the_first_layers_stay_dense_double_blocks_before_single_ones() -> None:
    model, inputs = tiny_denoiser("hunyuan_video"), tiny_inputs("hunyuan_video", (5, 3, 4), text=7)
    names = list(sites_of(model))
    assert names == ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"]
    method = Radial(decay=0.3, block=16, dense_steps=0, dense_layers=1)
    masked = masked_output(model, inputs, {"joint": Layout.video(5, 3, 4, text=7)}, SMALL, names=names[1:])
    handle = gensparse.apply(model, method, strict=True)
    torch.testing.assert_close(output(model, inputs), masked, atol=1e-5, rtol=0)
    assert handle.report()["dense"] == {"radial: the first layers stay dense": 1}


def test_wan_keeps_its_first_layer_dense_unless_told_otherwise() -> None:
    model, inputs = tiny_denoiser("wan"), tiny_inputs("wan", (5, 4, 6))
    for layers, counts in ((None, (1, 1)), (0, (2, 0)), (2, (0, 2))):
        handle = gensparse.apply(model, Radial(dense_steps=0, dense_layers=layers), strict=True)
        output(model, inputs)
        report = handle.report()
        assert (report["sparse"], sum(report["dense"].values())) == counts


def test_steps_are_counted_by_their_timesteps() -> None:
    model, inputs = tiny_denoiser("wan"), tiny_inputs("wan", (3, 4, 5))
    handle = gensparse.apply(model, Radial(dense_steps=2, dense_layers=0))
    for time in (900.0, 900.0, 700.0, 500.0, 500.0):
        output(model, {**inputs, "timestep": torch.full((2,), time)})
    assert handle.report()["calls"] == {"sparse": 4, "dense": {"radial: the first steps stay dense": 6}}


def test_two_denoisers_that_take_turns_count_the_steps_of_one_run() -> None:
    pipe = tiny_pipeline("wan22")
    pipe.set_progress_bar_config(disable=True)
    for steps, dense in ((1, 1), (2, 2), (0.5, 1)):
        handle = gensparse.apply(pipe, Radial(dense_steps=steps, dense_layers=0), strict=True)
        with torch.no_grad():
            pipe(**tiny_call("wan22"), generator=torch.Generator().manual_seed(0))
        calls = handle.report()["calls"]
        layers, halves = 2, 2
        assert sum(calls["dense"].values()) == dense * layers * halves
        assert calls["sparse"] == (2 - dense) * layers * halves


@pytest.mark.parametrize("text", [0, 9])
def test_two_frames_of_128_tokens_are_dense(text: int) -> None:
    layout = Layout.video(2, 8, 16, text=text)
    for method in (Radial(dense_steps=0), Radial(decay=0.01, block=64, sink=False, dense_steps=0)):
        assert dense_mask(method, layout).all()
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, layout.tokens, 2, 8, generator=generator) for _ in range(3))
    expected = reference.attend(q, k, v, torch.ones(1, layout.tokens, layout.tokens, dtype=torch.bool))[0]
    torch.testing.assert_close(attend(Radial(dense_steps=0), layout, q, k, v), expected, atol=1e-5, rtol=0)


def test_one_frame_is_a_reason_to_stay_dense_and_strict_raises() -> None:
    model, inputs = tiny_denoiser("flux"), tiny_inputs("flux", (1, 6, 7), text=5)
    dense = output(model, inputs)
    handle = gensparse.apply(model, Radial())
    assert torch.equal(output(model, inputs), dense)
    assert handle.report()["dense"] == {"radial thins out pairs of frames, and this call has one frame": 2}
    gensparse.apply(model, Radial(), strict=True)
    with pytest.raises(LayoutMismatchError, match="one frame"):
        output(model, inputs)


def test_options_reach_the_pattern() -> None:
    layout = Layout.video(6, 9, 7, text=4)
    for rule, near in (("fixed", "full"), ("upstream", "full"), ("fixed", "half")):
        method = Radial(0.4, 32, False, 0, 0, rule, near)
        assert method.pattern(layout) == RadialPattern(0.4, 32, False, rule, near)
    text_first = Layout.video(6, 9, 7, text=4, text_first=True)
    mask = dense_mask(Radial(0.4, 32, dense_steps=0), text_first)[0]
    assert mask[:4].all()
    assert mask[:, :4].all()
    with pytest.raises(ConfigError, match="rule='fixed'"):
        dense_mask(Radial(0.4, 32, rule="upstream", dense_steps=0), text_first)


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("decay", [0, -1.0, True, "1", float("nan")]),
        ("block", [0, 1.5, True, "8"]),
        ("sink", [1, "true"]),
        ("dense_steps", [-1, 1.0, True, "2", float("nan"), -0.1]),
        ("dense_layers", [-1, 0.5, True]),
        ("rule", ["best", None]),
        ("near_window", ["quarter", 2]),
    ],
)
def test_bad_settings_are_refused_with_name_and_value(setting: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=rf"{setting}={value!r}"):
            Radial(**{setting: value})
