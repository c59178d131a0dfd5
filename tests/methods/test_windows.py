"""Windows of FreeSwim, StyleSwin, CrossFormer, HiDiffusion and Cosmos, and published neighborhoods, on tiny models."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from math import log, prod, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from families.family_checks import (
    check_remove_restores_bits,
    check_small_window_equals_masked_dense,
    check_whole_window_equals_dense,
    masked_output,
    output,
)
from torch import nn

import gensparse
from gensparse.errors import ConfigError
from gensparse.layout import Coords, Layout
from gensparse.methods import (
    START,
    CosmosSparse,
    Dense,
    DoubleWindow,
    FreeSwimWindow,
    LongDistance,
    Method,
    MswMsa,
    Neighborhood,
    Place,
)
from gensparse.methods.cosmos_sparse import BASE, DENSE, LAYERS, MENU
from gensparse.methods.long_distance import LONG, SHORT
from gensparse.methods.neighborhood import scaled
from gensparse.patterns import Blocks, Text
from gensparse.testing.tiny import tiny_denoiser, tiny_flux_pipeline, tiny_inputs, tiny_pipeline

Layouts = Mapping[str, Layout]


@cache
def model(name: str) -> nn.Module:
    return tiny_denoiser(name, **({"double_blocks": 1, "single_blocks": 2} if name == "flux" else {}))


def flux(rows: int, columns: int) -> tuple[dict[str, Any], Layouts]:
    return tiny_inputs("flux", (1, rows, columns), text=5), {"joint": Layout.image(rows, columns, text=5)}


def sdxl(rows: int, columns: int) -> tuple[dict[str, Any], Layouts]:
    """The first level with attention has rows x columns tokens, the next one half of them, rounded up."""
    small = Layout.image((rows + 1) // 2, (columns + 1) // 2)
    return tiny_inputs("sdxl", (1, rows, columns)), {"level1": Layout.image(rows, columns), "level2": small}


def wan(frames: int, rows: int, columns: int) -> tuple[dict[str, Any], Layouts]:
    return tiny_inputs("wan", (frames, rows, columns)), {"self": Layout.video(frames, rows, columns)}


CASES = {
    "flux-7x5": lambda: ("flux", *flux(7, 5)),
    "flux-1x11": lambda: ("flux", *flux(1, 11)),
    "sdxl-7x6": lambda: ("sdxl", *sdxl(7, 6)),
    "wan-3x5x4": lambda: ("wan", *wan(3, 5, 4)),
}

WHOLE = (
    FreeSwimWindow(half=100, n0=None),
    LongDistance(group=100, interval=1),
    Neighborhood(window=100, stride=50, base=1),
)

SMALL = {
    "freeswim": FreeSwimWindow(half=(1, 1), n0=None),
    "double": DoubleWindow(window=3),
    "long": LongDistance(group=2, interval=3),
    "scaled": Neighborhood(window=8, stride=4, dilation=1, base=14),
}


@pytest.mark.parametrize("case", CASES)
def test_window_over_the_grid_equals_dense(case: str) -> None:
    name, inputs, _ = CASES[case]()
    check_whole_window_equals_dense(model(name), inputs, WHOLE)


def test_double_window_over_a_square_equals_dense_and_over_a_longer_side_does_not() -> None:
    check_whole_window_equals_dense(model("flux"), flux(6, 6)[0], (DoubleWindow(window=6), DoubleWindow(window=100)))
    check_small_window_equals_masked_dense(model("flux"), *flux(5, 8), DoubleWindow(window=100))


@pytest.mark.parametrize("method", SMALL)
@pytest.mark.parametrize("case", CASES)
def test_small_window_equals_dense_attention_under_its_mask(case: str, method: str) -> None:
    name, inputs, layouts = CASES[case]()
    check_small_window_equals_masked_dense(model(name), inputs, layouts, SMALL[method])


def test_remove_restores_bits() -> None:
    for method in (DoubleWindow(window=3), LongDistance(group=2, interval=2)):
        check_remove_restores_bits(model("flux"), flux(6, 7)[0], method)


# ------------------------------------------------------------------------------------------------------- FreeSwim
def test_every_query_of_freeswim_has_equally_many_keys_in_all_frames() -> None:
    layout = Layout.video(3, 11, 8, text=2)
    mask = FreeSwimWindow(half=(2, 5)).pattern(layout).dense_mask(layout)[0]
    assert (mask[: prod(layout.grid)].sum(1) == 3 * 5 * 8 + 2).all()  # the window of 11 columns covers all 8


@pytest.mark.parametrize("native", [2, 1560, 3600])
def test_freeswim_scale_is_the_published_one_or_the_models_own(native: int) -> None:
    layout = Layout.video(2, 4, 4)
    assert FreeSwimWindow(n0=native).logit_gain(layout, None) == sqrt(log(2 * native) / log(native))
    assert FreeSwimWindow(n0=None).logit_gain(layout, 7) == 1.0


def test_freeswim_scale_reaches_the_logits() -> None:
    inputs, layouts = wan(2, 4, 5)
    gain = FreeSwimWindow(half=(1, 1), n0=20).logit_gain(layouts["self"], None)
    keys = [module for name, module in model("wan").named_modules() if name.endswith("attn1.norm_k")]
    with gensparse.applied(model("wan"), FreeSwimWindow(half=(1, 1), n0=20), strict=True):
        scaled = output(model("wan"), inputs)
    try:
        for norm in keys:  # a longer key is a larger logit
            norm.weight.data *= gain
        expected = masked_output(model("wan"), inputs, layouts, FreeSwimWindow(half=(1, 1), n0=None))
    finally:
        for norm in keys:
            norm.weight.data /= gain
    torch.testing.assert_close(scaled, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("value", [-1, 1.5, True, "3", None, (1, 2, 3), (1,), (2, -1)])
def test_bad_windows_of_freeswim_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="half"):
        FreeSwimWindow(half=value)


@pytest.mark.parametrize("value", [1, 0, -4, 2.0, True, "1560"])
def test_bad_native_sizes_of_freeswim_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=f"n0={value!r}"):
        FreeSwimWindow(n0=value)


# ----------------------------------------------------------------------------------------------------- CrossFormer
def test_crossformer_alternates_by_layer() -> None:
    method, layout = LongDistance(group=2, interval=3), Layout.image(7, 9)
    kinds = [method.kind(Place("joint", layer, 4, 2)) for layer in range(4)]
    assert kinds == [SHORT, LONG, SHORT, LONG]
    short, long = (method.pattern(layout, START._replace(kind=kind)).dense_mask(layout)[0] for kind in kinds[:2])
    assert (short == Blocks(2).dense_mask(layout)[0]).all()
    rows, columns = np.indices((7, 9)).reshape(2, -1)
    expected = np.ones_like(long)
    for axis in (rows, columns):
        expected &= np.equal.outer(axis // 6, axis // 6) & np.equal.outer(axis % 3, axis % 3)
    assert (long == expected).all()


# ------------------------------------------------------------------------------------------------------ HiDiffusion
def unet_report(method: Method, name: str, grid: tuple[int, int]) -> dict[str, Any]:
    with gensparse.applied(model(name), method, strict=True) as handle:
        output(model(name), tiny_inputs(name, (1, *grid)))
        return handle.report()


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_msw_windows_the_largest_blocks_with_attention_alone(name: str) -> None:
    report = unet_report(MswMsa(), name, (8, 6))
    first = "0" if name == "sd15" else "1"
    sites = [n for n, m in model(name).named_modules() if n.endswith("attn1")]
    largest = [n for n in sites if n.startswith((f"down_blocks.{first}.", f"up_blocks.{2 - int(first)}."))]
    assert 0 < len(largest) < len(sites)
    assert report["sparse"] == len(largest)
    assert report["dense"] == {"msw_msa leaves this block dense": len(sites) - len(largest)}
    assert report["method"]["blocks"] == f"down_blocks.{first}+up_blocks.{2 - int(first)}"


@pytest.mark.parametrize("grid", [(8, 6), (7, 5), (1, 9), (13, 2)])
@pytest.mark.parametrize("draw", ["block", "step"])
def test_msw_equals_dense_attention_under_its_masks(draw: str, grid: tuple[int, int]) -> None:
    method, (inputs, layouts) = MswMsa(draw=draw, seed=3), sdxl(*grid)
    expected = masked_output(model("sdxl"), inputs, layouts, method)
    with gensparse.applied(model("sdxl"), method, strict=True):
        torch.testing.assert_close(output(model("sdxl"), inputs), expected, atol=1e-5, rtol=0)
    assert (expected - output(model("sdxl"), inputs)).abs().max() > 1e-3


def test_msw_draws_every_roll_equally_often_and_anew_for_block_step_and_seed() -> None:
    drawn = [
        MswMsa(seed=seed).index(START._replace(kind=layer, step=step))
        for seed in range(5)
        for layer in range(10)
        for step in range(40)
    ]
    assert all(abs(count / len(drawn) - 0.25) < 0.03 for count in Counter(drawn).values())
    assert sorted(Counter(drawn)) == [0, 1, 2, 3]
    by_step = [tuple(MswMsa().index(START._replace(kind=layer, step=step)) for layer in range(10)) for step in range(9)]
    assert len(set(by_step)) == 9
    assert MswMsa().index(START._replace(kind=3, step=5)) == MswMsa().index(START._replace(kind=3, step=5))


def test_msw_draws_once_per_step_for_all_blocks_on_request() -> None:
    places = [Place("level0", layer, 5, 2, f"down_blocks.0.attentions.{layer}.x.attn1") for layer in range(5)]
    kinds = {MswMsa("down_blocks.0", draw="step").kind(place) for place in places}
    assert len(kinds) == 1
    assert len({MswMsa("down_blocks.0").kind(place) for place in places}) == 5


def test_msw_gives_the_same_picture_twice_and_leaves_the_global_stream_alone() -> None:
    pipe = tiny_pipeline("sd15")
    pipe.set_progress_bar_config(disable=True)

    def picture(seed: int) -> torch.Tensor:
        gensparse.apply(pipe, MswMsa(seed=seed), strict=True)
        call = {"height": 16, "width": 24, "num_inference_steps": 2, "output_type": "latent"}
        return pipe("a cat", generator=torch.Generator().manual_seed(0), **call).images

    state = torch.random.get_rng_state()
    first, again, other = picture(0), picture(0), picture(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("settings", "message"), [({"blocks": "down_blocks.7"}, "names down_blocks.7"), ({}, "UNet")])
def test_msw_refuses_models_without_its_blocks(settings: dict[str, Any], message: str) -> None:
    name = "sd15" if settings else "flux"
    with pytest.raises(ConfigError, match=message):
        gensparse.apply(model(name), MswMsa(**settings))
    assert not model(name)._forward_pre_hooks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": ""}, "blocks=''"),
        ({"blocks": "down_blocks"}, "blocks='down_blocks'"),
        ({"blocks": "mid_block"}, "blocks='mid_block'"),
        ({"blocks": 3}, "blocks=3"),
        ({"draw": "layer"}, "draw='layer'"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": True}, "seed=True"),
    ],
)
def test_bad_settings_of_msw_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MswMsa(**settings)


# --------------------------------------------------------------------------------------------- published settings
def seen(method: Method, layout: Layout, queries: Sequence[int]) -> np.ndarray:
    """Keys that some queries see, bool [queries, keys]."""
    tokens = layout.coords()
    own = Coords(tokens.segment[list(queries), None], tokens.position[list(queries), None])
    return method.pattern(layout).bind(layout).allowed(own, tokens)


@pytest.mark.parametrize(
    ("preset", "grid", "keys"),
    [
        ("flux.1-dev", (1, 256, 256), 80 * 80),
        ("hunyuan_video", (30, 48, 80), 18 * 24 * 24),
        ("hunyuan_video-sta", (30, 48, 80), 18 * 24 * 24),
    ],
)
def test_published_neighborhoods_have_the_published_number_of_keys(preset: str, grid: Any, keys: int) -> None:
    """About 90 and 91 percent of all pairs are left out."""
    layout = Layout.joint(grid)
    assert (seen(Neighborhood.preset(preset), layout, range(0, layout.tokens, 9973)).sum(1) == keys).all()


@pytest.mark.parametrize("grid", [(30, 48, 80), (12, 16, 24)])
def test_sta_windows_are_whole_tiles(grid: tuple[int, int, int]) -> None:
    """Every query of a tile sees the same keys, and they are whole tiles of 6 x 8 x 8 tokens."""
    layout = Layout.video(*grid)
    tiles = [n // t for n, t in zip(grid, (6, 8, 8), strict=True)]
    number = np.ravel_multi_index((layout.coords().position // (6, 8, 8)).T, tiles)
    order = np.argsort(number, kind="stable")
    for tile in (0, prod(tiles) // 2, prod(tiles) - 1):
        keys = seen(Neighborhood.preset("hunyuan_video-sta"), layout, order[tile * 384 : (tile + 1) * 384 : 97])
        assert (keys == keys[0]).all()
        assert sorted(Counter(np.bincount(number, weights=keys[0])).items())[-1] == (
            384.0,
            prod(min(3, n) for n in tiles),
        )
        assert keys[0].sum() == 384 * prod(min(3, n) for n in tiles)


def cosmos_rule(size: int, base: int, window: int, stride: int, dilation: int) -> tuple[int, int, int]:
    """The published rule for one axis, written down again."""
    scale = size / base
    k = min(max(2, round(window * scale)), size)
    return k, min(max(1, round(stride * scale)), k), min(max(1, round(dilation * scale)), size // k)


@pytest.mark.parametrize("grid", [(1, 44, 80), (5, 44, 80), (3, 30, 53), (2, 7, 200), (2, 1, 9)])
@pytest.mark.parametrize("kind", MENU)
def test_other_sizes_follow_the_rule_of_cosmos(kind: str, grid: tuple[int, int, int]) -> None:
    base = MENU[kind]
    method = Neighborhood(base.window, base.stride, base.dilation, base=BASE)
    own = scaled(MENU[kind], BASE, grid)
    assert method.pattern(Layout.video(*grid)) == (own | Text()).clamped(grid)
    spread = [(value,) * 3 if isinstance(value, int) else value for value in (base.window, base.stride, base.dilation)]
    for axis in (1, 2):
        expected = cosmos_rule(grid[axis], BASE[axis], *(setting[axis] for setting in spread))
        assert (own.window[axis], own.stride[axis], own.dilation[axis]) == expected
    assert own.window[0] is None


def test_every_layer_of_cosmos_has_one_neighborhood() -> None:
    for variant, count in (("2b", 28), ("14b", 36)):
        layers = [layer for own in LAYERS[variant].values() for layer in own]
        assert sorted(layers) == list(range(count))
        method = CosmosSparse(variant)
        kinds = [method.kind(Place("self", layer, count, 16)) for layer in range(count)]
        assert Counter(kinds) == {kind: len(own) for kind, own in LAYERS[variant].items()}
        assert set(kinds) - {DENSE} == set(MENU)
    assert isinstance(CosmosSparse().pattern(Layout.video(1, 44, 80), START._replace(kind="p98")), Dense)
    assert isinstance(CosmosSparse("14b").pattern(Layout.video(2, 44, 80), START._replace(kind=DENSE)), Dense)


def test_cosmos_layers_run_their_own_neighborhoods_and_other_depths_are_refused() -> None:
    deep = tiny_denoiser("cosmos", num_layers=28)
    inputs, layout = tiny_inputs("cosmos", (2, 6, 7), batch=1), Layout.video(2, 6, 7)
    expected = masked_output(deep, inputs, {"self": layout}, CosmosSparse())
    handle = gensparse.apply(deep, CosmosSparse(), strict=True)
    torch.testing.assert_close(output(deep, inputs), expected, atol=1e-4, rtol=1e-4)
    assert handle.report()["calls"] == {"sparse": 28, "dense": {}}
    with pytest.raises(ConfigError, match="28 attention layers, but the model has 2"):
        gensparse.apply(model("cosmos"), CosmosSparse())
    with pytest.raises(ConfigError, match="variant='7b'"):
        CosmosSparse("7b")


def test_presets_are_read_from_text() -> None:
    pipe = tiny_flux_pipeline()
    handle = gensparse.apply(pipe, "neighborhood:preset=flux.1-dev,window=3x3,stride=2x2")
    assert handle.report()["method"]["window"] == [3, 3]
    gensparse.remove(pipe)
