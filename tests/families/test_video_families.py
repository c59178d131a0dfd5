"""Wan, SkyReels V2, HunyuanVideo, CogVideoX, Mochi, LTX, Kandinsky 5 and Cosmos made sparse."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from diffusers import (
    ConsisIDTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoFramepackTransformer3DModel,
    LTX2VideoTransformer3DModel,
)
from families.family_checks import (
    WHOLE,
    check_positional_call_has_the_same_layout,
    check_remove_restores_bits,
    check_report,
    check_small_window_equals_masked_dense,
    check_whole_window_equals_dense,
    layouts_of,
    output,
    query_change,
    sites_of,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gensparse
from gensparse.errors import ConfigError, LayoutMismatchError
from gensparse.families import (
    FAMILIES,
    Family,
    TensorMemo,
    cogvideox,
    cosmos,
    family_of,
    hunyuan_framepack,
    hunyuan_video,
    hunyuan_video15,
    kandinsky5,
    ltx,
    mochi,
    skyreels,
    wan,
)
from gensparse.layout import Layout, Segment
from gensparse.methods import Clear, Dense, Method, Neighborhood, SlidingWindow
from gensparse.methods.base import START, At, Loaded
from gensparse.patterns import Box, Pattern, PerHead, Text
from gensparse.processors.operators import Operator, OperatorCall
from gensparse.testing.tiny import PIPELINES, VIDEOS, tiny_call, tiny_denoiser, tiny_inputs, tiny_pipeline, with_noise
from gensparse.testing.tiny.parts import WIDTH, normal, seeded, text_mask

Grid = tuple[int, int, int]
GRIDS = [(3, 5, 7), (1, 7, 1), (2, 1, 5)]
SMALL = SlidingWindow(radius=1)
TEXT, SHORT = 5, 3
"""Text tokens, and how many of them are not padding in the second sample."""


def alone(grid: Grid) -> dict[str, Any]:
    return {"self": Layout((Segment("target", grid[0] * grid[1] * grid[2], grid),))}


def text_last(grid: Grid, text: int = TEXT) -> dict[str, Any]:
    return {"joint": Layout.video(*grid, text=text, text_first=False)}


def text_first(grid: Grid) -> dict[str, Any]:
    return {"joint": Layout.video(*grid, text=TEXT, text_first=True)}


def without_padding(grid: Grid) -> dict[str, Any]:
    return {"joint": tuple(Layout.video(*grid, text=words, text_first=False) for words in (TEXT, SHORT))}


@dataclass(frozen=True)
class Case:
    """A tiny model, its arguments for a grid, and what its tokens then are, written down without the family."""

    model: Callable[[], nn.Module]
    inputs: Callable[[Grid], dict[str, Any]]
    layouts: Callable[[Grid], Mapping[str, Any]]
    sites: int = 2
    cells: str = "BCFHW"


def tiny(name: str, layouts: Callable[[Grid], Mapping[str, Any]], **more: Any) -> Case:
    return Case(partial(tiny_denoiser, name), partial(tiny_inputs, name, text=TEXT), layouts, **more)


def consisid() -> nn.Module:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "num_layers": 2}
    widths = {"time_embed_dim": 16, "text_embed_dim": WIDTH, "max_text_seq_length": TEXT}
    grid = {"sample_width": 10, "sample_height": 8, "sample_frames": 9, "use_rotary_positional_embeddings": True}
    with seeded(0):
        return with_noise(ConsisIDTransformer3DModel(**sizes, **widths, **grid)).eval()


def ltx2() -> nn.Module:
    video = {"in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 16}
    sound = {"audio_in_channels": 8, "audio_out_channels": 8, "audio_num_attention_heads": 2}
    widths = {"cross_attention_dim": 32, "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16}
    with seeded(0):
        model = LTX2VideoTransformer3DModel(**video, **sound, **widths, num_layers=2, caption_channels=WIDTH)
        return with_noise(model).eval()


def ltx2_inputs(grid: Grid) -> dict[str, Any]:
    frames, height, width = grid
    draw = normal(0)
    return {
        "hidden_states": draw(2, frames * height * width, 8),
        "audio_hidden_states": draw(2, 6, 8),
        "encoder_hidden_states": draw(2, TEXT, WIDTH),
        "audio_encoder_hidden_states": draw(2, TEXT, WIDTH),
        "timestep": torch.full((2,), 500.0),
        "encoder_attention_mask": text_mask(TEXT, 2, (TEXT, SHORT)),
        "audio_encoder_attention_mask": text_mask(TEXT, 2, (TEXT, SHORT)),
        "num_frames": frames,
        "height": height,
        "width": width,
        "audio_num_frames": 6,
    }


CASES = {
    "wan": tiny("wan", alone),
    "wan_i2v": tiny("wan_i2v", alone),
    "wan_vace": tiny("wan_vace", alone, sites=3),
    "skyreels": tiny("skyreels", alone),
    "hunyuan_video": tiny("hunyuan_video", text_last),
    # besides the text there are 4 tokens of quoted words and 3 of an image
    "hunyuan_video15": tiny("hunyuan_video15", partial(text_last, text=TEXT + 4 + 3)),
    "cogvideox": tiny("cogvideox", text_first, cells="BFCHW"),
    "consisid": Case(consisid, partial(tiny_inputs, "cogvideox", text=TEXT), text_first, cells="BFCHW"),
    "mochi": tiny("mochi", without_padding),
    "ltx": tiny("ltx", alone, cells="BNC"),
    "ltx2": Case(ltx2, ltx2_inputs, alone, cells="BNC"),
    "kandinsky5": tiny("kandinsky5", alone, cells="BFHWC"),
    "cosmos": tiny("cosmos", alone),
}


@cache
def model_of(name: str) -> nn.Module:
    return CASES[name].model()


@pytest.mark.parametrize("name", CASES)
def test_sites_are_the_attention_of_video_tokens_and_nothing_else(name: str) -> None:
    model, case = model_of(name), CASES[name]
    sites = sites_of(model)
    assert len(sites) == case.sites
    assert set(sites.values()) == set(case.layouts((1, 1, 1)))
    assert not [site for site in sites if "attn2" in site or "refiner" in site or "text" in site or "audio" in site]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "x".join(map(str, grid)))
@pytest.mark.parametrize("name", CASES)
def test_layout_is_the_grid_and_the_text(name: str, grid: Grid) -> None:
    case = CASES[name]
    assert layouts_of(model_of(name), case.inputs(grid)) == case.layouts(grid)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "x".join(map(str, grid)))
@pytest.mark.parametrize("name", CASES)
def test_window_over_the_grid_equals_dense(name: str, grid: Grid) -> None:
    methods = WHOLE if grid == GRIDS[0] else WHOLE[-1:]
    check_whole_window_equals_dense(model_of(name), CASES[name].inputs(grid), methods)


@pytest.mark.parametrize("method", [SMALL, Neighborhood(window=(2, 3, 3))], ids=lambda method: method.name)
@pytest.mark.parametrize("name", CASES)
def test_small_window_equals_a_dense_masked_model(name: str, method: Method) -> None:
    case = CASES[name]
    check_small_window_equals_masked_dense(model_of(name), case.inputs((3, 5, 7)), case.layouts((3, 5, 7)), method)


def with_changed_cell(case: Case, latents: torch.Tensor, grid: Grid, token: Grid) -> torch.Tensor:
    """Latents with other values in the cells of one token."""
    if case.cells == "BNC":
        changed = latents.clone().unflatten(1, grid)
        changed[:, token[0], token[1], token[2]] += 1.0
        return changed.flatten(1, 3)
    axes = [case.cells.index(axis) for axis in "FHW"]
    changed = latents.clone()
    view = changed
    for axis, place, count in zip(axes, token, grid, strict=True):
        cells = latents.shape[axis] // count
        view = view.narrow(axis, place * cells, cells)
    view += 1.0
    return changed


@pytest.mark.parametrize("token", [(0, 0, 0), (1, 3, 2), (2, 4, 6)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_cell_of_the_latents_is_the_token_that_the_layout_says(name: str, token: Grid) -> None:
    grid, case = (3, 5, 7), CASES[name]
    inputs = case.inputs(grid)
    other = {"hidden_states": with_changed_cell(case, inputs["hidden_states"], grid, token)}
    model = model_of(name)
    change = query_change(model, next(iter(sites_of(model))), inputs, other)[0]
    layout = next(iter(case.layouts(grid).values()))
    layout = layout[0] if isinstance(layout, tuple) else layout
    coords = layout.coords()
    (place,) = (
        index
        for index in range(layout.tokens)
        if coords.segment[index] == layout.target and tuple(coords.position[index]) == token
    )
    assert change[place] > 1e-4
    change[place] = 0
    assert change.max() < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_remove_restores_bits_and_leaves_no_trace(name: str) -> None:
    check_remove_restores_bits(model_of(name), CASES[name].inputs((3, 5, 7)), SMALL)


@pytest.mark.parametrize("name", CASES)
def test_positional_calls_have_the_same_layout(name: str) -> None:
    check_positional_call_has_the_same_layout(model_of(name), CASES[name].inputs((3, 5, 7)), SMALL)


REQUIRED = {
    "hunyuan_video": ["hidden_states", "encoder_hidden_states"],
    "hunyuan_video15": ["hidden_states", "encoder_hidden_states", "encoder_hidden_states_2", "image_embeds"],
    "cogvideox": ["hidden_states", "encoder_hidden_states"],
    "mochi": ["hidden_states", "encoder_hidden_states", "encoder_attention_mask"],
    "ltx": ["hidden_states", "num_frames", "height", "width"],
    **{name: ["hidden_states"] for name in ("wan", "skyreels", "kandinsky5", "cosmos")},
}


def read(name: str, arguments: Mapping[str, Any]) -> Any:
    model = model_of(name)
    return family_of(model).read_layouts(model, arguments, TensorMemo())


@pytest.mark.parametrize(("name", "missing"), [(name, one) for name, all_ in REQUIRED.items() for one in all_])
def test_a_call_without_what_the_layout_needs_is_refused(name: str, missing: str) -> None:
    arguments = CASES[name].inputs((2, 3, 4))
    for absent in ({**arguments, missing: None}, {key: arguments[key] for key in arguments if key != missing}):
        with pytest.raises(LayoutMismatchError, match=missing):
            read(name, absent)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.cells != "BNC"])
def test_latents_that_are_no_clip_are_refused(name: str) -> None:
    arguments = CASES[name].inputs((2, 3, 4))
    width = CASES[name].cells.index("W")
    for latents in (arguments["hidden_states"][0], arguments["hidden_states"].narrow(width, 0, 0)):
        with pytest.raises(LayoutMismatchError, match=r"latents|whole token"):
            read(name, {**arguments, "hidden_states": latents})


@pytest.mark.parametrize("change", [{"num_frames": 3}, {"height": 4}, {"width": 3, "height": 3}])
@pytest.mark.parametrize("name", ["ltx", "ltx2"])
def test_packed_tokens_of_another_number_than_their_grid_are_refused(name: str, change: dict[str, int]) -> None:
    with pytest.raises(LayoutMismatchError, match="24, 8"):
        read(name, {**CASES[name].inputs((2, 3, 4)), **change})


def test_a_call_that_fits_no_layout_runs_dense_with_the_reason() -> None:
    model, inputs = model_of("ltx"), CASES["ltx"].inputs((2, 3, 4))
    # the model takes coordinates for the grid it would compute, and then does not look at the sizes
    coordinates = torch.rand(2, 3, 24, generator=torch.Generator().manual_seed(0))
    inputs = {**inputs, "video_coords": coordinates}
    dense = output(model, inputs)
    with gensparse.applied(model, SMALL) as handle:
        assert torch.equal(output(model, inputs), dense)
        (reason,) = handle.report()["dense"]
        assert handle.report()["sparse"] == 0
    with gensparse.applied(model, SMALL, strict=True), pytest.raises(LayoutMismatchError, match="LTX"):
        output(model, inputs)
    assert "differ between samples" in reason


def coordinates(grid: Grid, *, start: float = 0.0, ends: bool = False) -> torch.Tensor:
    """[2, 3, N] times, rows and columns in seconds and pixels as LTX has them, or [2, 3, N, 2] as LTX-2 has them."""
    axes = [start + torch.arange(grid[0]) * 0.32, torch.arange(grid[1]) * 32.0, torch.arange(grid[2]) * 32.0]
    table = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1).expand(2, -1, -1)
    return torch.stack([table, table + 1], dim=-1) if ends else table


@pytest.mark.parametrize("grid", [(3, 5, 7), (1, 1, 1), (1, 4, 1), (4, 1, 1), (2, 1, 5), (2, 3, 1)])
@pytest.mark.parametrize("ends", [False, True])
def test_ltx_reads_the_grid_from_coordinates_before_the_sizes(grid: Grid, ends: bool) -> None:
    tokens = torch.empty(2, grid[0] * grid[1] * grid[2], 8)
    arguments = {"hidden_states": tokens, "num_frames": 1, "height": 1, "width": 1}
    layouts = read("ltx", {**arguments, "video_coords": coordinates(grid, ends=ends)})
    assert layouts == alone(grid)


def test_ltx_with_coordinates_runs_sparse() -> None:
    model, grid = model_of("ltx"), (3, 4, 5)
    inputs = {**CASES["ltx"].inputs(grid), "video_coords": coordinates(grid)}
    del inputs["num_frames"], inputs["height"], inputs["width"]
    check_whole_window_equals_dense(model, inputs, WHOLE[-1:])
    check_small_window_equals_masked_dense(model, inputs, alone(grid), SMALL)


CONDITION, CLIP = coordinates((1, 2, 4), start=2.0), coordinates((3, 2, 4))


@pytest.mark.parametrize("order", ["before", "after", "both"])
def test_ltx_conditions_beside_the_clip_are_references(order: str) -> None:
    early = coordinates((1, 2, 4), start=0.3)
    whole = torch.cat({"before": [CONDITION, CLIP], "after": [CLIP, early], "both": [CONDITION, CLIP, early]}[order], 2)
    layouts = read("ltx", {"hidden_states": torch.empty(2, whole.shape[2], 8), "video_coords": whole})
    reference, target = Segment("reference", 8, (1, 2, 4)), Segment("target", 24, (3, 2, 4))
    segments = {"before": (reference, target), "after": (target, reference), "both": (reference, target, reference)}
    assert layouts == {"self": Layout(segments[order])}


def test_ltx_with_a_condition_before_the_clip_runs_sparse() -> None:
    model, grid = model_of("ltx"), (4, 2, 4)
    inputs = {**CASES["ltx"].inputs(grid), "video_coords": torch.cat([CONDITION, CLIP], dim=2)}
    layout = Layout((Segment("reference", 8, (1, 2, 4)), Segment("target", 24, (3, 2, 4))))
    check_whole_window_equals_dense(model, inputs, WHOLE[-1:])
    check_small_window_equals_masked_dense(model, inputs, {"self": layout}, SMALL)


@pytest.mark.parametrize("spoil", ["two clips", "negative", "shuffled", "columns first", "torn", "another size"])
def test_ltx_coordinates_that_are_not_one_clip_are_refused(spoil: str) -> None:
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    spoiled = {
        "two clips": torch.cat([CLIP, coordinates((2, 2, 4))], dim=2),
        "negative": torch.cat([CLIP, coordinates((1, 2, 4), start=-0.3)], dim=2),
        "shuffled": CLIP[:, :, order],
        "columns first": CLIP.unflatten(2, (3, 2, 4)).transpose(3, 4).flatten(2),
        "torn": CLIP[:, :, :-3],
        "another size": torch.cat([CLIP, coordinates((1, 2, 3), start=0.1)], dim=2),
    }[spoil]
    with pytest.raises(LayoutMismatchError, match=r"runs of frames|not frames of|rectangle"):
        read("ltx", {"hidden_states": torch.empty(2, spoiled.shape[2], 8), "video_coords": spoiled})


def test_a_mask_of_token_pairs_in_ltx2_runs_dense_with_the_reason() -> None:
    model, inputs = model_of("ltx2"), CASES["ltx2"].inputs((2, 3, 4))
    mask = torch.rand(2, 24, 24, generator=torch.Generator().manual_seed(0)) > 0.3
    inputs["video_self_attention_mask"] = mask.float()
    dense = output(model, inputs)
    with gensparse.applied(model, SMALL) as handle:
        assert torch.equal(output(model, inputs), dense)
        assert handle.report()["dense"] == {"the attention mask differs from query to query": 2}


@pytest.mark.parametrize("lengths", [(5, 5), (5, 1), (1, 4)])
@pytest.mark.parametrize("name", ["hunyuan_video", "hunyuan_video15", "mochi"])
def test_texts_of_any_two_lengths(name: str, lengths: tuple[int, int]) -> None:
    grid, case = (2, 3, 4), CASES[name]
    inputs, layouts = tiny_inputs(name, grid, text=TEXT, lengths=lengths), dict(case.layouts(grid))
    if name == "mochi":
        layouts = {"joint": tuple(Layout.video(*grid, text=words) for words in lengths)}
    model = model_of(name)
    assert layouts_of(model, inputs) == layouts
    check_whole_window_equals_dense(model, inputs, WHOLE[-1:])
    check_small_window_equals_masked_dense(model, inputs, layouts, SMALL)


def test_mochi_refuses_a_mask_that_does_not_fit_its_text() -> None:
    arguments = CASES["mochi"].inputs((2, 3, 4))
    for mask in (torch.ones(2, 4), torch.ones(1, 5), torch.ones(5)):
        with pytest.raises(LayoutMismatchError, match="text mask"):
            read("mochi", {**arguments, "encoder_attention_mask": mask})


class Counted(torch.Tensor):
    """A tensor that counts how often its values are brought to the host."""

    reads = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__int__, torch.Tensor.numpy):
            Counted.reads += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def test_masks_are_read_once_per_run() -> None:
    mask = text_mask(TEXT, 2, (5, 3)).as_subclass(Counted)
    arguments, memo, model = CASES["mochi"].inputs((2, 3, 4)), TensorMemo(), model_of("mochi")
    arguments["encoder_attention_mask"] = mask
    Counted.reads = 0
    for _ in range(4):
        assert family_of(model).read_layouts(model, arguments, memo) == without_padding((2, 3, 4))
    assert Counted.reads == 1


def test_kandinsky_refuses_its_own_sparse_attention() -> None:
    arguments = {**CASES["kandinsky5"].inputs((2, 8, 8)), "sparse_params": {"to_fractal": True}}
    with pytest.raises(LayoutMismatchError, match="own sparse attention"):
        read("kandinsky5", arguments)


def test_wan_takes_a_timestep_for_every_token() -> None:
    grid, model = (3, 4, 5), model_of("wan")
    inputs = CASES["wan"].inputs(grid)
    handle = gensparse.apply(model, SMALL, strict=True, dense_steps=1)
    try:
        for step in (900.0, 900.0, 600.0, 300.0):
            # the first frame is given, so its tokens have no noise
            timestep = torch.full((2, 60), step)
            timestep[:, :20] = 0.0
            output(model, {**inputs, "timestep": timestep})
        assert handle.report()["calls"] == {"sparse": 4, "dense": {"dense step": 4}}
    finally:
        handle.remove()


@cache
def causal() -> nn.Module:
    return tiny_denoiser("skyreels", num_frame_per_block=2)


def causal_mask(grid: Grid, block: int) -> torch.Tensor:
    """bool [N, N]: keys in the frames up to the last one of the query's block; made pair by pair."""
    plane = grid[1] * grid[2]
    tokens = grid[0] * plane
    return torch.tensor(
        [[(k // plane) // block <= (q // plane) // block for k in range(tokens)] for q in range(tokens)]
    )


@pytest.mark.parametrize(("grid", "block"), [((4, 2, 3), 2), ((6, 1, 2), 3), ((5, 2, 2), 5), ((3, 2, 2), 1)])
def test_causal_blocks_of_frames_are_the_ones_of_the_model(grid: Grid, block: int) -> None:
    model, layout = SimpleNamespace(config={"num_frame_per_block": block}), Layout.video(*grid)
    own = skyreels.own_mask(model, layout)
    expected = causal_mask(grid, block)
    if block == 1:
        # the model has no mask then
        assert own is None
    else:
        assert own is not None
        assert torch.equal(torch.from_numpy(own.dense_mask(layout))[0], expected)


def test_causal_model_stays_causal_inside_the_window() -> None:
    model, grid = causal(), (4, 3, 5)
    inputs = tiny_inputs("skyreels", grid, text=TEXT)
    check_whole_window_equals_dense(model, inputs)
    check_small_window_equals_masked_dense(model, inputs, alone(grid), SMALL)
    check_remove_restores_bits(model, inputs, SMALL)


class Own(Operator):
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: OperatorCall) -> torch.Tensor:
        raise AssertionError("an operator does not know the mask of the model")

    def key(self) -> str:
        return "own"


@dataclass(frozen=True)
class Operated(Method):
    name: ClassVar[str] = "operated"

    def pattern(self, layout: Layout, at: At = START) -> Operator:
        return Own()


@pytest.mark.parametrize(
    ("method", "reason"), [(Operated(), "the mask that the model has"), (Clear(radius=2, down_factor=2), "pooled keys")]
)
def test_what_cannot_keep_to_the_causal_mask_runs_dense_with_the_reason(method: Method, reason: str) -> None:
    model, inputs = causal(), tiny_inputs("skyreels", (4, 2, 4), text=TEXT)
    dense = output(model, inputs)
    with gensparse.applied(model, method) as handle:
        assert torch.equal(output(model, inputs), dense)
        (given,) = handle.report()["dense"]
    assert reason in given
    with gensparse.applied(model, method, strict=True), pytest.raises(LayoutMismatchError, match=reason):
        output(model, inputs)


def test_frames_that_causal_blocks_do_not_divide_are_refused() -> None:
    model = causal()
    arguments = tiny_inputs("skyreels", (3, 2, 2), text=TEXT)
    with pytest.raises(LayoutMismatchError, match="blocks of 2 frames"):
        skyreels.read_layouts(model, arguments, TensorMemo())


def test_diffusion_forcing_counts_the_noisiest_frame() -> None:
    model, inputs = causal(), tiny_inputs("skyreels", (4, 2, 3), text=TEXT)
    inputs["enable_diffusion_forcing"] = True
    handle = gensparse.apply(model, SMALL, strict=True, dense_steps=2)
    try:
        # two blocks of frames, the second two steps behind the first
        for first, second in ((999, 999), (800, 999), (600, 999), (400, 800), (200, 600), (0, 400)):
            timestep = torch.tensor([[first, first, second, second]] * 2)
            output(model, {**inputs, "timestep": timestep})
        assert handle.report()["calls"] == {"sparse": 4, "dense": {"dense step": 8}}
    finally:
        handle.remove()


@pytest.mark.parametrize("image", [False, True])
def test_hunyuan_video15_with_and_without_an_image(image: bool) -> None:
    model, grid = model_of("hunyuan_video15"), (2, 3, 5)
    inputs = tiny_inputs("hunyuan_video15", grid, text=TEXT, image=image)
    check_whole_window_equals_dense(model, inputs, WHOLE[-1:])
    check_small_window_equals_masked_dense(model, inputs, CASES["hunyuan_video15"].layouts(grid), SMALL)


class _Pairs(TorchDispatchMode):
    """Notes tensors with two axes of `tokens` entries."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.found: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and sum(side == self.tokens for side in tensor.shape) > 1:
                self.found.append(tensor.shape)
        return out


@pytest.mark.parametrize("settings", [{}, {"dense_layers": [0, 1]}], ids=["sparse", "dense layers"])
def test_hunyuan_video15_makes_no_mask_of_token_pairs(settings: dict[str, Any]) -> None:
    model, grid = model_of("hunyuan_video15"), (4, 11, 13)
    inputs = tiny_inputs("hunyuan_video15", grid, text=TEXT, batch=1)
    with _Pairs(572 + 12) as plain:
        expected = output(model, inputs)
    # the mask of the first layer and of the second
    assert len(plain.found) >= 2
    with gensparse.applied(model, SlidingWindow(radius=2), **settings) as handle:
        with _Pairs(572 + 12) as sparse:
            out = output(model, inputs)
        assert not sparse.found
        assert sum(handle.report()["calls"]["dense"].values()) == len(settings.get("dense_layers", ()))
    if settings:
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


@cache
def framepack() -> nn.Module:
    heads = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "num_single_layers": 1}
    sizes = {"in_channels": 4, "out_channels": 4, "num_refiner_layers": 1, "rope_axes_dim": (4, 6, 6)}
    texts = {"text_embed_dim": WIDTH, "pooled_projection_dim": WIDTH, "has_image_proj": True, "image_proj_dim": WIDTH}
    with seeded(0):
        model = HunyuanVideoFramepackTransformer3DModel(**heads, **sizes, **texts, has_clean_x_embedder=True)
        return with_noise(model).eval()


def framepack_inputs(batch: int = 1, rows: int = 6, columns: int = 10) -> dict[str, Any]:
    """A section of 3 latent frames; 5 frames of history at 4 times, 3 at 2 times coarser scale, 2 clean ones."""
    draw = normal(0)
    clip = partial(draw, batch, 4)
    return {
        "hidden_states": clip(3, rows, columns),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": draw(batch, TEXT, WIDTH),
        "encoder_attention_mask": text_mask(TEXT, batch, (SHORT, TEXT)[:batch]),
        "pooled_projections": draw(batch, WIDTH),
        "image_embeds": draw(batch, 2, WIDTH),
        "indices_latents": torch.arange(11, 14),
        "guidance": torch.full((batch,), 6000.0),
        "latents_clean": clip(2, rows, columns),
        "indices_latents_clean": torch.tensor([0, 10]),
        "latents_history_2x": clip(3, rows, columns),
        "indices_latents_history_2x": torch.arange(7, 10),
        "latents_history_4x": clip(5, rows, columns),
        "indices_latents_history_4x": torch.arange(2, 7),
    }


def framepack_layout(words: int) -> Layout:
    coarse = Segment("reference", 2 * 1 * 2, (2, 1, 2), "4x")
    half = Segment("reference", 2 * 2 * 3, (2, 2, 3), "2x")
    clean = Segment("reference", 2 * 3 * 5, (2, 3, 5), "clean")
    return Layout((coarse, half, clean, *Layout.video(3, 3, 5, text=words).segments))


FRAMEPACK_WORDS = {1: 2 + SHORT, 2: 2 + TEXT}
"""Batch -> image and text tokens: a single sample has its padding cut off."""


@pytest.mark.parametrize(("batch", "words"), FRAMEPACK_WORDS.items())
def test_framepack_layout_is_history_clean_frames_section_and_text(batch: int, words: int) -> None:
    assert layouts_of(framepack(), framepack_inputs(batch)) == {"joint": framepack_layout(words)}


@pytest.mark.parametrize(
    ("argument", "segment"),
    [("latents_history_4x", 0), ("latents_history_2x", 1), ("latents_clean", 2), ("hidden_states", 3)],
)
def test_every_part_of_framepack_stands_where_the_layout_says(argument: str, segment: int) -> None:
    model, inputs, layout = framepack(), framepack_inputs(), framepack_layout(2 + SHORT)
    change = query_change(model, "transformer_blocks.0.attn", inputs, {argument: inputs[argument] + 1.0})[0]
    assert len(change) == layout.tokens
    own = slice(layout.starts[segment], layout.starts[segment] + layout.segments[segment].length)
    assert (change[own] > 1e-5).all()
    change[own] = 0
    assert change.max() < 1e-6


@pytest.mark.parametrize(("batch", "words"), FRAMEPACK_WORDS.items())
def test_framepack_sees_history_and_clean_frames_wholly(batch: int, words: int) -> None:
    model, inputs = framepack(), framepack_inputs(batch)
    check_whole_window_equals_dense(model, inputs, WHOLE[-1:])
    check_small_window_equals_masked_dense(model, inputs, {"joint": framepack_layout(words)}, SMALL)
    check_remove_restores_bits(model, inputs, SMALL)


def test_framepack_without_some_of_its_history() -> None:
    model, inputs = framepack(), framepack_inputs()
    layout = framepack_layout(2 + SHORT)
    without = {**inputs, "latents_history_4x": None}
    assert family_of(model).read_layouts(model, without, TensorMemo()) == {"joint": Layout(layout.segments[1:])}
    with pytest.raises(LayoutMismatchError, match="history latents"):
        family_of(model).read_layouts(model, {**inputs, "latents_history_2x": torch.empty(4, 3, 6, 10)}, TensorMemo())


@dataclass(frozen=True)
class ByHead(Method):
    """The window for the first head, everything for the others; notes how many heads it is asked for."""

    name: ClassVar[str] = "by_head"

    def pattern(self, layout: Layout, at: At = START) -> Pattern:
        local = (Box(1) | Text()).clamped(layout.grid)
        return PerHead((local, (Box(1000) | Text()).clamped(layout.grid)))

    def heads(self, at: At, heads: int) -> tuple[int, ...] | None:
        assert heads == 2
        return (0, 1)


@pytest.mark.parametrize("name", ["kandinsky5", "wan", "mochi"])
def test_heads_of_a_family_can_differ(name: str) -> None:
    model, inputs = model_of(name), CASES[name].inputs((3, 5, 7))
    outputs = [output(model, inputs)]
    for method in (SMALL, ByHead()):
        with gensparse.applied(model, method, strict=True) as handle:
            outputs.append(output(model, inputs))
            check_report(handle.report(), CASES[name].sites)
    assert all((outputs[2] - other).abs().max() > 1e-4 for other in outputs[:2])


PUBLISHED = [
    # published size in pixels and frames, family, and (F, H, W) tokens and text of its sequence
    (wan.FAMILY, (480, 832), {"frames": 81}, (21, 30, 52), 0),
    (wan.FAMILY, (480, 832), {"frames": 80}, (21, 30, 52), 0),
    (wan.FAMILY, (704, 1280), {"frames": 121, "vae_scale": 16}, (31, 22, 40), 0),
    (skyreels.FAMILY, (544, 960), {"frames": 97}, (25, 34, 60), 0),
    (hunyuan_video.FAMILY, (720, 1280), {"frames": 129, "n_text": 256}, (33, 45, 80), 256),
    (hunyuan_video15.FAMILY, (480, 848), {"frames": 121}, (31, 30, 53), 1985),
    (cogvideox.FAMILY, (480, 720), {"frames": 49}, (13, 30, 45), 226),
    (cogvideox.FAMILY, (768, 1360), {"frames": 81, "patch_time": 2, "n_text": 224}, (11, 48, 85), 224),
    (mochi.FAMILY, (480, 848), {"frames": 85, "n_text": 97}, (15, 30, 53), 97),
    (ltx.FAMILY, (512, 704), {"frames": 161}, (21, 16, 22), 0),
    (kandinsky5.FAMILY, (512, 768), {"frames": 121}, (31, 32, 48), 0),
    (kandinsky5.FAMILY, (1024, 1024), {}, (1, 64, 64), 0),
    (cosmos.FAMILY, (704, 1280), {"frames": 121}, (16, 44, 80), 0),
]


@pytest.mark.parametrize(("family", "size", "options", "grid", "text"), PUBLISHED)
def test_layout_for_published_sizes(family: Family, size: Any, options: Any, grid: Grid, text: int) -> None:
    layout = family.layout_for(*size, **options)
    assert layout.grid == grid
    assert layout.tokens == grid[0] * grid[1] * grid[2] + text


def test_layout_for_a_section_of_framepack() -> None:
    layout = hunyuan_framepack.layout_for(48, 80, frames=9, history=(5, 3, 2), n_text=2 + SHORT)
    assert layout == framepack_layout(2 + SHORT)
    whole = hunyuan_framepack.layout_for(640, 608, n_text=300)
    assert [segment.shape for segment in whole.segments[:4]] == [(4, 10, 10), (1, 20, 19), (2, 40, 38), (9, 40, 38)]
    no_history = hunyuan_framepack.layout_for(48, 80, frames=9, history=(0, 0, 0), n_text=4)
    assert no_history == Layout.video(3, 3, 5, text=4)


@pytest.mark.parametrize("family", [wan, skyreels, hunyuan_video, cogvideox, mochi, ltx, kandinsky5, cosmos], ids=str)
def test_layout_for_less_than_a_token_or_a_frame_is_refused(family: Any) -> None:
    text = {"n_text": 5}
    for frames in (0, -1, 2.5, True):
        with pytest.raises(ConfigError, match="frames"):
            family.FAMILY.layout_for(256, 256, frames=frames, **text)
    with pytest.raises(ConfigError, match="height=7"):
        family.FAMILY.layout_for(7, 256, frames=9, **text)


def test_native_tokens_come_from_the_config_or_the_scheduler() -> None:
    model = model_of("cogvideox")
    assert cogvideox.native_tokens(model) == cogvideox.native_tokens(SimpleNamespace(transformer=model)) == 3 * 4 * 5
    config = {**model.config, "patch_size_t": 2}
    assert cogvideox.native_tokens(SimpleNamespace(config=config)) == 2 * 4 * 5
    assert ltx.native_tokens(model_of("ltx"), {"max_image_seq_len": 4096}) == 4096


@pytest.mark.parametrize(
    "name", ["wan", "skyreels", "hunyuan_video", "hunyuan_video15", "mochi", "kandinsky5", "cosmos", "ltx"]
)
def test_native_tokens_that_no_config_tells_are_an_error(name: str) -> None:
    model = model_of(name)
    with pytest.raises(ConfigError, match="train"):
        family_of(model).native_tokens(model, {})
    with pytest.raises(ConfigError, match="training size"):
        cogvideox.native_tokens(nn.Linear(1, 1))


@pytest.mark.parametrize("name", CASES)
def test_blocks_name_what_repeats(name: str) -> None:
    import re

    model = model_of(name)
    names = [module for module, _ in model.named_modules() if re.fullmatch(family_of(model).blocks, module)]
    assert {site.split(".")[0] for site in sites_of(model)} <= {block.split(".")[0] for block in names}
    for site in sites_of(model):
        assert any(site.startswith(f"{block}.") for block in names)


def test_every_video_class_is_registered() -> None:
    assert {type(model_of(name)).__name__ for name in CASES} | {type(framepack()).__name__} <= FAMILIES.keys()


# pipelines


class _StopError(Exception):
    pass


def first_call(pipe: Any, **call: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The denoiser of a pipeline and the arguments of its first call."""
    seen: dict[str, Any] = {}

    def stop(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)
        raise _StopError

    hook = pipe.transformer.register_forward_pre_hook(stop, with_kwargs=True)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(_StopError):
        pipe(**call, generator=torch.Generator().manual_seed(0))
    hook.remove()
    return pipe.transformer, seen


PIXELS = {
    # layout_for's names for the sizes of the tiny pipelines, and their text tokens
    "wan": {},
    "wan_i2v": {},
    "wan_vace": {},
    "wan22": {},
    "skyreels": {},
    "hunyuan_video": {"n_text": 16},
    "hunyuan_video15": {"vae_scale": 4, "vae_time": 2, "n_text": 24 + 16 + 3},
    "cogvideox": {"n_text": 16},
    "mochi": {},
    "ltx": {"vae_scale": 8},
    "kandinsky5": {},
}


@cache
def pipeline_of(name: str) -> Any:
    return tiny_pipeline(name)


@pytest.mark.parametrize("name", PIXELS)
def test_layout_for_is_what_the_pipeline_makes(name: str) -> None:
    call = tiny_call(name)
    model, arguments = first_call(pipeline_of(name), **call)
    (layouts,) = layouts_of(model, arguments).values()
    options = PIXELS[name]
    if name == "mochi":
        assert isinstance(layouts, tuple)
        words = [int(count) for count in arguments["encoder_attention_mask"].sum(dim=1)]
        expected = [mochi.layout_for(call["height"], call["width"], frames=call["num_frames"], n_text=n) for n in words]
        assert list(layouts) == expected
    else:
        layout_for = family_of(model).layout_for
        assert layouts == layout_for(call["height"], call["width"], frames=call["num_frames"], **options)


def test_all_tiny_video_pipelines_are_tested() -> None:
    assert PIXELS.keys() == VIDEOS.keys() & PIPELINES


def frames(pipe: Any, name: str, **more: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(**{**tiny_call(name), **more}, generator=torch.Generator().manual_seed(0)).frames


# denoiser calls of a step, with guidance where the pipeline calls the denoiser for each half
CALLS = {"hunyuan_video": 1, "cogvideox": 1, "mochi": 1, "ltx": 1}


@pytest.mark.parametrize("name", PIXELS)
def test_pipeline_runs_sparse_counts_its_steps_and_is_restored(name: str) -> None:
    pipe = pipeline_of(name)
    dense = frames(pipe, name)
    sites, calls = (3 if name == "wan_vace" else 2), CALLS.get(name, 2)
    models = 2 if name == "wan22" else 1
    handle = gensparse.apply(pipe, SMALL, strict=True, dense_steps=1)
    for runs in (1, 2):
        assert not torch.equal(frames(pipe, name), dense)
        assert handle.report()["calls"] == {
            "sparse": runs * calls * sites,
            "dense": {"dense step": runs * calls * sites},
        }
    assert handle.report()["sparse"] + sum(handle.report()["dense"].values()) == sites * models
    handle.remove()
    assert torch.equal(frames(pipe, name), dense)


def test_both_denoisers_of_wan22_are_sparse_and_count_the_steps_of_one_run() -> None:
    pipe = pipeline_of("wan22")
    dense = frames(pipe, "wan22", num_inference_steps=4)
    parts = (pipe.transformer, pipe.transformer_2)
    handle = gensparse.apply(pipe, SMALL, strict=True)
    assert not torch.equal(frames(pipe, "wan22", num_inference_steps=4), dense)
    check_report(handle.report(), 4, calls=4)
    turns = []
    for part in parts:
        part.register_forward_pre_hook(lambda module, _args: turns.append(module is parts[0]))
    for first in range(5):
        turns.clear()
        handle = gensparse.apply(pipe, SMALL, strict=True, dense_steps=first)
        out = frames(pipe, "wan22", num_inference_steps=4)
        calls = handle.report()["calls"]
        assert calls["sparse"] == 4 * (4 - first)
        assert calls["dense"] == ({"dense step": 4 * first} if first else {})
        assert torch.equal(out, dense) is (first == 4)
        # both take part, so a step of each is not its own first one
        assert set(turns) == {True, False}
    gensparse.remove(pipe)
    assert torch.equal(frames(pipe, "wan22", num_inference_steps=4), dense)


class _Nothing(Loaded):
    def undo(self) -> None:
        pass


@dataclass(frozen=True)
class Picky(Method):
    """A method whose weights fit one model only."""

    name: ClassVar[str] = "picky"

    fits: Any = None

    def pattern(self, layout: Layout, at: At = START) -> Pattern | Dense:
        return SMALL.pattern(layout, at)

    def load(self, subject: Any, places: Any) -> Loaded:
        if subject.model is not self.fits:
            raise ConfigError("the weights do not fit this model")
        return _Nothing()


@pytest.mark.parametrize("before", [None, SMALL])
def test_two_denoisers_never_become_half_sparse(before: Method | None) -> None:
    pipe = pipeline_of("wan22")
    dense = frames(pipe, "wan22")
    handle = None if before is None else gensparse.apply(pipe, before, strict=True)
    expected = frames(pipe, "wan22")
    with pytest.raises(ConfigError, match="do not fit"):
        gensparse.apply(pipe, Picky(fits=pipe.transformer))
    assert torch.equal(frames(pipe, "wan22"), expected)
    assert handle is None or handle.active
    gensparse.remove(pipe)
    assert torch.equal(frames(pipe, "wan22"), dense)


def test_steps_that_half_precision_merges_are_counted_apart() -> None:
    pipe = deepcopy(pipeline_of("kandinsky5")).to(torch.bfloat16)
    for name, module in pipe.transformer.named_modules():
        if name.endswith(("time_embeddings", "modulation")):
            module.float()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1000.0)
    seen = []
    pipe.transformer.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(float(kwargs["timestep"][0])), with_kwargs=True
    )
    handle = gensparse.apply(pipe, SMALL, strict=True, dense_steps=2)
    frames(pipe, "kandinsky5", num_inference_steps=4)
    assert len(set(seen)) < 4
    assert handle.report()["calls"] == {"sparse": 2 * 2 * 2, "dense": {"dense step": 2 * 2 * 2}}
