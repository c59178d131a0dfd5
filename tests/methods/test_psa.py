"""PSA: limits, the choice against dense masks, seeds, protected text, and published settings."""

from typing import Any

import pytest
import torch
from families.family_checks import output
from one_layer import attend

import gensparse
from gensparse.errors import ConfigError
from gensparse.kernels import reference
from gensparse.layout import Layout, Segment
from gensparse.methods import PSA, START, Dense
from gensparse.plan import RouteContext, RoutedPlan, build_plan
from gensparse.testing.tiny import tiny_denoiser, tiny_inputs

WHOLE = PSA(block=8, query_block=5, ends=(1, 1, 1, 1), tile=8)
SMALL = PSA(block=16, query_block=12, ends=(0.2, 0.4, 0.6, 0.8), tile=8, seed=5)


def tensors(tokens: int, heads: int = 2, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(batch, tokens, heads, 16, generator=generator) for _ in range(3)]


def plan_of(method: PSA, layout: Layout) -> RoutedPlan:
    plan = build_plan(method.pattern(layout), layout)
    assert isinstance(plan, RoutedPlan)
    return plan


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("flux", (1, 7, 5)),
        ("sd15", (1, 9, 6)),
        ("wan", (3, 4, 5)),
        ("hunyuan_video", (2, 3, 5)),
        ("cogvideox", (2, 4, 3)),
    ],
)
@pytest.mark.parametrize("order", ["sequence", "gilbert"])
def test_all_blocks_at_full_resolution_are_dense(name: str, grid: tuple[int, int, int], order: str) -> None:
    model, inputs = tiny_denoiser(name), tiny_inputs(name, grid)
    dense = output(model, inputs)
    method = PSA(block=8, query_block=5, ends=(1, 1, 1, 1), tile=8, order=order)
    handle = gensparse.apply(model, method, strict=True)
    torch.testing.assert_close(output(model, inputs), dense, atol=1e-5, rtol=0)
    assert handle.report()["dense"] == {}


@pytest.mark.parametrize(
    "layout",
    [Layout.image(7, 11), Layout.video(3, 5, 4, text=6), Layout.joint((1, 5, 13), text=3, references=[(1, 4, 3)])],
    ids=repr,
)
@pytest.mark.parametrize("changes", [{}, {"mode": "threshold", "caps": (0.1, 0.2, 0.3)}, {"order": "gilbert"}], ids=str)
def test_a_choice_is_attention_under_its_dense_mask(layout: Layout, changes: dict[str, Any]) -> None:
    method = PSA(**{"block": 16, "query_block": 12, "ends": (0.2, 0.4, 0.6, 0.8), "tile": 8, "seed": 5, **changes})
    q, k, v = tensors(layout.tokens)
    plan = plan_of(method, layout)
    choice = plan.select(q, k, RouteContext(seed=5))
    keys, values, bias = plan.extend(k, v, None)
    mask = torch.from_numpy(method.pattern(layout).dense_mask(layout, choice))
    assert mask.any(-1).all()
    assert not mask[..., : layout.tokens].all()
    expected = reference.attend(q, keys, values, mask, key_bias=bias)[0]
    torch.testing.assert_close(attend(method, layout, q, k, v), expected, atol=1e-5, rtol=0)


def test_choices_come_from_the_seed_and_no_global_generator() -> None:
    model, inputs = tiny_denoiser("flux"), tiny_inputs("flux", (1, 12, 11))
    state = torch.random.get_rng_state()
    outs = []
    for seed in (1, 1, 2):
        gensparse.apply(model, PSA(16, 12, (0.1, 0.2, 0.3, 0.4), tile=8, seed=seed), strict=True)
        outs.append(output(model, inputs))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("order", ["sequence", "gilbert"])
@pytest.mark.parametrize("place", ["first", "last", "between"])
def test_text_is_seen_exactly_wherever_it_stands(place: str, order: str) -> None:
    text, picture = Segment("text", 9), Segment("target", 96, (2, 6, 8))
    more = Segment("reference", 30, (1, 5, 6))
    segments = {"first": (text, picture), "last": (picture, text), "between": (picture, text, more)}[place]
    layout = Layout(segments)
    start = layout.starts[segments.index(text)]
    method = PSA(16, 16, (0.05, 0.1, 0.1, 0.2), tile=8, order=order)
    q, k, _ = tensors(layout.tokens)
    choice = plan_of(method, layout).select(q, k, RouteContext())
    mask = method.pattern(layout).dense_mask(layout, choice)
    assert mask[..., start : start + 9].all()
    assert not mask[..., : layout.tokens].all()


def test_first_steps_stay_dense() -> None:
    model, inputs = tiny_denoiser("wan"), tiny_inputs("wan", (3, 4, 5))
    handle = gensparse.apply(model, PSA(16, 16, tile=8, dense_steps=1))
    for time in (900.0, 700.0):
        output(model, {**inputs, "timestep": torch.full((2,), time)})
    assert handle.report()["calls"] == {"sparse": 2, "dense": {"psa: the first steps stay dense": 2}}
    layout = Layout.video(3, 4, 5)
    assert isinstance(PSA(dense_steps=0.3).pattern(layout, START._replace(step=14)), Dense)
    assert not isinstance(PSA(dense_steps=0.3).pattern(layout, START._replace(step=15)), Dense)


def test_reference_pictures_are_keys_like_others() -> None:
    model, inputs = tiny_denoiser("flux_kontext"), tiny_inputs("flux_kontext", (1, 6, 7))
    dense = output(model, inputs)
    handle = gensparse.apply(model, WHOLE, strict=True)
    torch.testing.assert_close(output(model, inputs), dense, atol=1e-5, rtol=0)
    gensparse.apply(model, SMALL, strict=True)
    assert (output(model, inputs) - dense).abs().max() > 1e-3
    assert handle.report()["dense"] == {}


def test_published_settings() -> None:
    assert PSA() == PSA(block=64, query_block=128, ends=(0.1, 0.15, 0.15, 0.35), mode="topk", order="sequence", tile=32)
    table = {name: PSA.preset(name) for name in PSA.presets}
    assert len(table) == 8
    assert all(method.query_block == 128 and method.tile == 32 for method in table.values())
    assert {name for name, method in table.items() if method.caps} == {"wan2.1-t2v-1.3b"}
    assert {name for name, method in table.items() if method.order == "sequence"} == {
        "cogvideox-5b",
        "cogvideox-5b-4step",
    }
    assert table["wan2.2-ti2v-5b"].ends == (0.6, 0.7, 0.7, 0.8)
    assert (table["wan2.2-t2v-a14b"].dense_steps, table["wan2.1-t2v-14b"].dense_steps) == (12, 15)


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("block", [0, 20, 1.5, True]),
        ("query_block", [0, "8"]),
        ("ends", [(0.5, 0.4, 0.6, 0.7), (0.1, 0.2, 0.3), (0.1, 0.2, 0.3, 1.2), 0.5]),
        ("mode", ["best"]),
        ("caps", [(0.1, 0.2), 0.5]),
        ("order", ["random"]),
        ("pad", ["zero"]),
        ("tile", [0, 48]),
        ("dense_steps", [-1, 1.5, True]),
        ("seed", [-1, 0.5]),
    ],
)
def test_bad_settings_are_refused(setting: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=setting):
            PSA(**{setting: value})
