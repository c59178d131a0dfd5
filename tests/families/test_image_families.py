"""UNets, PixArt, HunyuanDiT, Stable Diffusion 3, AuraFlow, CogView, HunyuanImage and HiDream made sparse."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    HunyuanDiT2DModel,
    HunyuanImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3ControlNetModel,
    UNet2DConditionModel,
    UNetMotionModel,
)
from diffusers.models.controlnets.controlnet_hunyuan import HunyuanDiT2DControlNetModel
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from families.family_checks import (
    check_positional_call_has_the_same_layout,
    check_remove_restores_bits,
    check_report,
    check_small_window_equals_masked_dense,
    check_whole_window_equals_dense,
    layouts_of,
    masked_output,
    output,
    query_change,
    sites_of,
)
from torch import nn

import gensparse
from gensparse.errors import ConfigError, LayoutMismatchError
from gensparse.families import (
    Family,
    auraflow,
    cogview4,
    family_of,
    hidream,
    hunyuandit,
    hunyuanimage,
    pixart,
    sd3,
    unet,
)
from gensparse.layout import Layout, Segment
from gensparse.methods import Clear, SlidingWindow
from gensparse.testing.tiny import tiny_call, tiny_denoiser, tiny_inputs, tiny_pipeline, with_noise
from gensparse.testing.tiny.parts import normal, seeded

GRIDS = [(7, 5), (1, 11), (13, 3)]
SMALL = SlidingWindow(radius=1)
TEXT = 5

Layouts = Mapping[str, Layout]


@dataclass(frozen=True)
class Case:
    """A tiny model, its arguments for a grid, and what its tokens then are, written down without the family."""

    model: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, Any]]
    layouts: Callable[[int, int], Layouts]
    sites: int


def levels(rows: int, columns: int, count: int = 3, first: int = 0) -> Layouts:
    """Layouts of a UNet whose level `first` has rows x columns tokens."""
    grids = [(rows, columns)]
    for _ in range(first, count - 1):
        grids.append(tuple((axis + 1) // 2 for axis in grids[-1]))
    return {f"level{first + index}": Layout.image(*grid) for index, grid in enumerate(grids)}


def of_picture(role: str, rows: int, columns: int) -> Layouts:
    return {role: Layout((Segment("target", rows * columns, (1, rows, columns)),))}


def joint(before: int, rows: int, columns: int, after: int, *, registers: int = 0) -> Layouts:
    parts = [Segment("register", registers)] if registers else []
    parts += [Segment("text", before)] if before else []
    parts.append(Segment("target", rows * columns, (1, rows, columns)))
    parts += [Segment("text", after)] if after else []
    return {"joint": Layout(tuple(parts))}


def padded(rows: int, columns: int, places: int = 256, text: int = 3 * TEXT) -> Layout:
    """HiDream: the picture, padding up to its places unless it is square, text."""
    picture = Segment("target", rows * columns, (1, rows, columns))
    padding = 0 if rows == columns else places - rows * columns
    register = [Segment("register", padding, name="padding")] if padding else []
    return Layout((picture, *register, Segment("text", text)))


def sdxl_inputs(rows: int, columns: int) -> dict[str, Any]:
    """An odd number of latent rows, so that the first level with attention has been rounded up."""
    arguments = tiny_inputs("sdxl", (1, rows, columns))
    return {**arguments, "sample": arguments["sample"][:, :, : 2 * rows - 1]}


def control_net() -> ControlNetModel:
    with seeded(0):
        model = ControlNetModel(
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            attention_head_dim=2,
            cross_attention_dim=32,
            norm_num_groups=4,
            conditioning_embedding_out_channels=(4, 8),
        )
        return with_noise(model).eval()


def control_net_inputs(rows: int, columns: int) -> dict[str, Any]:
    arguments = tiny_inputs("sd15", (1, rows, columns))
    return {**arguments, "controlnet_cond": normal(1)(2, 3, 2 * rows, 2 * columns)}


def motion_unet() -> UNetMotionModel:
    with seeded(0):
        model = UNetMotionModel(
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion"),
            up_block_types=("CrossAttnUpBlockMotion", "CrossAttnUpBlockMotion"),
            cross_attention_dim=32,
            num_attention_heads=2,
            motion_num_attention_heads=2,
            norm_num_groups=4,
        )
        return with_noise(model).eval()


def motion_inputs(rows: int, columns: int) -> dict[str, Any]:
    draw = normal(0)
    return {
        "sample": draw(2, 4, 3, rows, columns),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": draw(2 * 3, TEXT, 32),  # for every frame
    }


def sd3_control_net(text: bool) -> SD3ControlNetModel:
    """With text, or as for Stable Diffusion 3.5 large: no text, and the picture comes as tokens."""
    with seeded(0):
        model = SD3ControlNetModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=64 if text else None,
            caption_projection_dim=32,
            pooled_projection_dim=64,
            out_channels=4,
            pos_embed_max_size=32,
            use_pos_embed=text,
        )
        return with_noise(model).eval()


def sd3_control_net_inputs(text: bool, rows: int, columns: int) -> dict[str, Any]:
    arguments = {**tiny_inputs("sd3", (1, rows, columns)), "controlnet_cond": normal(1)(2, 4, 2 * rows, 2 * columns)}
    if not text:
        del arguments["encoder_hidden_states"]
        arguments["hidden_states"] = normal(2)(2, rows * columns, 32)
    return arguments


HUNYUAN_DIT = {
    "patch_size": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "in_channels": 4,
    "hidden_size": 24,
    "cross_attention_dim": 32,
    "cross_attention_dim_t5": 32,
    "pooled_projection_dim": 16,
    "text_len": TEXT,
    "text_len_t5": TEXT,
    "sample_size": 16,
}


def hunyuan_dit(control: bool) -> nn.Module:
    with seeded(0):
        if control:
            return with_noise(HunyuanDiT2DControlNetModel(**HUNYUAN_DIT, transformer_num_layers=4)).eval()
        return with_noise(HunyuanDiT2DModel(**HUNYUAN_DIT, num_layers=2)).eval()


def hunyuan_dit_inputs(control: bool, rows: int, columns: int) -> dict[str, Any]:
    draw = normal(0)
    grid = (rows, columns)
    arguments = {
        "hidden_states": draw(2, 4, 2 * rows, 2 * columns),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_hidden_states": draw(2, TEXT, 32),
        "text_embedding_mask": torch.ones(2, TEXT),
        "encoder_hidden_states_t5": draw(2, TEXT, 32),
        "text_embedding_mask_t5": torch.ones(2, TEXT),
        "image_meta_size": draw(2, 6),
        "style": torch.zeros(2, dtype=torch.long),
        "image_rotary_emb": get_2d_rotary_pos_embed(8, ((0, 0), grid), grid, output_type="pt"),
    }
    return {**arguments, "controlnet_cond": draw(2, 4, 2 * rows, 2 * columns)} if control else arguments


def hunyuan_image_refiner() -> HunyuanImageTransformer2DModel:
    """The refiner's kind: latents with a frame axis."""
    with seeded(0):
        model = HunyuanImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=(1, 1, 1),
            text_embed_dim=32,
            rope_axes_dim=(4, 6, 6),
        )
        return with_noise(model).eval()


def hunyuan_image_refiner_inputs(rows: int, columns: int) -> dict[str, Any]:
    arguments = tiny_inputs("hunyuanimage", (1, rows, columns))
    return {**arguments, "hidden_states": arguments["hidden_states"][:, :, None]}


def tiny(name: str, **options: Any) -> dict[str, Any]:
    return {
        "model": partial(tiny_denoiser, name),
        "inputs": lambda rows, columns: tiny_inputs(name, (1, rows, columns), text=TEXT, **options),
    }


CASES = {
    "sd15": Case(**tiny("sd15"), layouts=levels, sites=7),
    "sdxl": Case(
        partial(tiny_denoiser, "sdxl"),
        sdxl_inputs,
        lambda h, w: {"level0": Layout.image(2 * h - 1, 2 * w), **levels(h, w, first=1)},
        sites=11,
    ),
    "control_net": Case(control_net, control_net_inputs, partial(levels, count=2), sites=3),
    "motion_unet": Case(motion_unet, motion_inputs, partial(levels, count=2), sites=7),
    "pixart": Case(**tiny("pixart", lengths=(5, 2)), layouts=partial(of_picture, "self"), sites=2),
    "hunyuan_dit": Case(
        partial(hunyuan_dit, False), partial(hunyuan_dit_inputs, False), partial(of_picture, "self"), sites=2
    ),
    "hunyuan_dit_control_net": Case(
        partial(hunyuan_dit, True), partial(hunyuan_dit_inputs, True), partial(of_picture, "self"), sites=1
    ),
    "sd3": Case(**tiny("sd3"), layouts=lambda h, w: {**joint(0, h, w, TEXT), **of_picture("image", h, w)}, sites=2),
    "sd35": Case(**tiny("sd35"), layouts=lambda h, w: {**joint(0, h, w, TEXT), **of_picture("image", h, w)}, sites=3),
    "sd3_control_net": Case(
        partial(sd3_control_net, True),
        partial(sd3_control_net_inputs, True),
        lambda h, w: {**joint(0, h, w, TEXT), **of_picture("image", h, w)},
        sites=2,
    ),
    "sd35_control_net": Case(
        partial(sd3_control_net, False), partial(sd3_control_net_inputs, False), partial(of_picture, "image"), sites=2
    ),
    "auraflow": Case(**tiny("auraflow"), layouts=lambda h, w: joint(TEXT, h, w, 0, registers=8), sites=2),
    "cogview4": Case(**tiny("cogview4"), layouts=lambda h, w: joint(TEXT, h, w, 0), sites=2),
    "cogview3plus": Case(**tiny("cogview3plus"), layouts=lambda h, w: joint(TEXT, h, w, 0), sites=2),
    "hunyuanimage": Case(
        **tiny("hunyuanimage", lengths=(5, 2), quoted=3), layouts=lambda h, w: joint(0, h, w, TEXT + 3), sites=2
    ),
    "hunyuanimage_refiner": Case(
        hunyuan_image_refiner, hunyuan_image_refiner_inputs, lambda h, w: joint(0, h, w, TEXT), sites=2
    ),
    "hidream": Case(**tiny("hidream"), layouts=lambda h, w: {"joint": padded(h, w)}, sites=2),
}

by_case = pytest.mark.parametrize("name", CASES)
by_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "x".join(map(str, grid)))


@cache
def denoiser(name: str) -> nn.Module:
    """Every test leaves the models as they are."""
    return CASES[name].model()


@by_case
@by_grid
def test_layout_is_that_of_the_model(name: str, grid: tuple[int, int]) -> None:
    assert layouts_of(denoiser(name), CASES[name].inputs(*grid)) == CASES[name].layouts(*grid)


@by_case
@by_grid
def test_window_over_the_grid_equals_dense(name: str, grid: tuple[int, int]) -> None:
    assert len(sites_of(denoiser(name))) == CASES[name].sites
    check_whole_window_equals_dense(denoiser(name), CASES[name].inputs(*grid))


@by_case
@pytest.mark.parametrize("method", [SMALL, Clear(radius=2)], ids=lambda method: method.name)
def test_small_window_equals_the_model_with_a_dense_mask(name: str, method: Any) -> None:
    grid = (7, 5) if method is SMALL else (3, 11)
    layouts = CASES[name].layouts(*grid)
    check_small_window_equals_masked_dense(denoiser(name), CASES[name].inputs(*grid), layouts, method)


@by_case
def test_remove_restores_bits(name: str) -> None:
    check_remove_restores_bits(denoiser(name), CASES[name].inputs(7, 5), SMALL)


@by_case
def test_positional_and_keyword_calls_have_the_same_layout(name: str) -> None:
    check_positional_call_has_the_same_layout(denoiser(name), CASES[name].inputs(5, 7), SMALL)


PATCHED = [name for name in CASES if name not in ("sd15", "sdxl", "control_net", "motion_unet")]


def changed_tokens(name: str, inputs: Mapping[str, Any], others: Mapping[str, Any]) -> list[int]:
    """Tokens of the first sample whose queries differ at the first site of the model."""
    site = next(iter(sites_of(denoiser(name))))
    return query_change(denoiser(name), site, inputs, others)[0].nonzero().flatten().tolist()


@pytest.mark.parametrize("name", PATCHED)
def test_a_picture_token_is_where_the_layout_says(name: str) -> None:
    rows, columns, row, column = 7, 5, 4, 3
    inputs = CASES[name].inputs(rows, columns)
    latents = inputs["hidden_states"].clone()
    if latents.ndim == 3:
        latents[:, row * columns + column] += 1
    else:
        cells = latents.shape[-1] // columns
        latents[..., row * cells : (row + 1) * cells, column * cells : (column + 1) * cells] += 1
    layout = CASES[name].layouts(rows, columns)[next(iter(sites_of(denoiser(name)).values()))]
    expected = layout.starts[layout.target] + row * columns + column
    assert changed_tokens(name, inputs, {"hidden_states": latents}) == [expected]


def text_tokens(layout: Layout) -> list[int]:
    parts = zip(layout.starts, layout.segments, strict=True)
    return [i for start, part in parts if part.kind == "text" for i in range(start, start + part.length)]


@pytest.mark.parametrize("name", ["sd3", "sd3_control_net", "auraflow", "cogview4", "cogview3plus"])
def test_a_text_token_is_where_the_layout_says(name: str) -> None:
    inputs = CASES[name].inputs(7, 5)
    text = inputs["encoder_hidden_states"].clone()
    text[:, 2] += 1
    places = text_tokens(CASES[name].layouts(7, 5)["joint"])
    assert changed_tokens(name, inputs, {"encoder_hidden_states": text}) == [places[2]]


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("hunyuanimage", "encoder_hidden_states"),
        ("hunyuanimage", "encoder_hidden_states_2"),
        ("hidream", "encoder_hidden_states_t5"),
        ("hidream", "encoder_hidden_states_llama3"),
    ],
)
def test_text_of_several_encoders_stays_where_the_layout_says(name: str, argument: str) -> None:
    inputs = CASES[name].inputs(7, 5)
    changed = changed_tokens(name, inputs, {argument: inputs[argument] + 1})
    assert changed
    assert set(changed) <= set(text_tokens(CASES[name].layouts(7, 5)["joint"]))


@pytest.mark.parametrize("name", ["sd15", "sdxl", "control_net", "motion_unet"])
def test_every_level_of_a_unet_has_its_rows_and_columns(name: str) -> None:
    model, inputs, layouts = denoiser(name), CASES[name].inputs(13, 7), CASES[name].layouts(13, 7)
    sample = inputs["sample"].clone()
    sample[..., -1, 0] += 5  # the corner at the bottom left
    for site, role in sites_of(model).items():
        if site.startswith("down_blocks"):
            change = query_change(model, site, inputs, {"sample": sample})[0]
            _, rows, columns = layouts[role].grid
            assert len(change) == rows * columns
            row, column = divmod(int(change.argmax()), columns)
            assert row >= rows - 2
            assert column <= 1


def test_sites_of_a_unet_are_in_the_order_of_the_computation() -> None:
    model, order = denoiser("sd15"), []
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: order.append(name))
        for name in sites_of(model)
    ]
    output(model, CASES["sd15"].inputs(4, 4))
    for hook in hooks:
        hook.remove()
    assert list(sites_of(model)) == order


def test_attention_that_looks_at_the_text_is_no_site() -> None:
    with seeded(0):
        model = UNet2DConditionModel(
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            only_cross_attention=(True, False),
            attention_head_dim=2,
            cross_attention_dim=32,
            norm_num_groups=4,
        )
    # the middle takes the flag that is its own, which is off here
    assert set(sites_of(model).values()) == {"level1"}
    check_whole_window_equals_dense(with_noise(model).eval(), tiny_inputs("sd15", (1, 7, 5)))


def test_levels_of_equal_token_counts_are_told_apart() -> None:
    layouts = layouts_of(denoiser("sd15"), CASES["sd15"].inputs(2, 1))
    assert [layouts[f"level{level}"].grid for level in range(3)] == [(1, 2, 1), (1, 1, 1), (1, 1, 1)]


def stub(config: Mapping[str, Any], **attributes: Any) -> Any:
    return SimpleNamespace(config=config, **attributes)


@pytest.mark.parametrize(
    ("padding", "size", "grids"),
    [
        (1, (7, 5), [(7, 5), (4, 3), (2, 2)]),
        (1, (1, 2), [(1, 2), (1, 1), (1, 1)]),
        (0, (15, 13), [(15, 13), (7, 6), (3, 3)]),
    ],
)
def test_levels_follow_the_padding_of_the_convolution(
    padding: int, size: tuple[int, int], grids: list[tuple[int, int]]
) -> None:
    conv, down = nn.Conv2d(1, 1, 3, stride=2, padding=padding), torch.zeros(1, 1, *size)
    model = stub({"down_block_types": ["DownBlock2D"] * 3, "downsample_padding": padding})
    layouts = unet.FAMILY.read_layouts(model, {"sample": torch.zeros(1, 4, *size)}, None)
    assert [layouts[f"level{level}"].grid[1:] for level in range(3)] == grids
    for grid in grids[1:]:
        down = conv(down if padding else nn.functional.pad(down, (0, 1, 0, 1)))
        assert tuple(down.shape[-2:]) == grid


@pytest.mark.parametrize(
    ("config", "size", "message"),
    [
        ({"down_block_types": ["ResnetDownsampleBlock2D", "DownBlock2D"]}, (8, 8), "ResnetDownsampleBlock2D"),
        ({"down_block_types": ["DownBlock2D"] * 3, "downsample_padding": 0}, (3, 8), "nothing left at level 2"),
    ],
)
def test_levels_that_cannot_be_known_are_refused_not_guessed(
    config: Mapping[str, Any], size: tuple[int, int], message: str
) -> None:
    with pytest.raises(LayoutMismatchError, match=message):
        unet.FAMILY.read_layouts(stub(config), {"sample": torch.zeros(1, 4, *size)}, None)


NEEDED = {
    "sd15": ["sample"],
    "pixart": ["hidden_states"],
    "hunyuan_dit": ["hidden_states"],
    "sd3": ["hidden_states", "encoder_hidden_states"],
    "sd35_control_net": ["hidden_states", "controlnet_cond"],
    "auraflow": ["hidden_states", "encoder_hidden_states"],
    "cogview4": ["hidden_states", "encoder_hidden_states"],
    "hunyuanimage": ["hidden_states", "encoder_hidden_states"],
    "hidream": ["hidden_states", "encoder_hidden_states_t5", "encoder_hidden_states_llama3"],
}


@pytest.mark.parametrize(("name", "missing"), [(name, missing) for name, args in NEEDED.items() for missing in args])
def test_a_call_without_what_the_layout_needs_is_refused(name: str, missing: str) -> None:
    inputs = {**CASES[name].inputs(7, 5), missing: None}
    with pytest.raises(LayoutMismatchError, match=missing):
        layouts_of(denoiser(name), inputs)


@pytest.mark.parametrize("name", [name for name in NEEDED if name != "sd35_control_net"])
def test_latents_that_are_no_picture_are_refused(name: str) -> None:
    inputs = CASES[name].inputs(7, 5)
    key = next(iter(NEEDED[name]))
    with pytest.raises(LayoutMismatchError, match="shape"):
        layouts_of(denoiser(name), {**inputs, key: torch.zeros(2, 35, 16)})


@pytest.mark.parametrize("name", ["pixart", "sd3", "auraflow", "cogview4", "hidream"])
def test_latents_below_one_token_are_refused(name: str) -> None:
    inputs = {**CASES[name].inputs(7, 5), "hidden_states": torch.zeros(2, 4, 1, 8)}
    with pytest.raises(LayoutMismatchError, match="no whole token"):
        layouts_of(denoiser(name), inputs)


def test_a_refiner_does_not_take_latents_without_frames() -> None:
    with pytest.raises(LayoutMismatchError, match="no picture of this model"):
        layouts_of(denoiser("hunyuanimage_refiner"), CASES["hunyuanimage"].inputs(7, 5))


def test_tokens_of_another_size_than_the_condition_are_refused() -> None:
    inputs = CASES["sd35_control_net"].inputs(7, 5)
    with pytest.raises(LayoutMismatchError, match="35 picture tokens, but its condition has 5x5"):
        layouts_of(denoiser("sd35_control_net"), {**inputs, "controlnet_cond": torch.zeros(2, 4, 10, 10)})


@pytest.mark.parametrize("name", ["sd15", "sd35", "auraflow"])
@torch.no_grad()
def test_a_site_with_other_tokens_than_the_model_is_refused(name: str) -> None:
    model = denoiser(name)
    site = next(iter(sites_of(model)))
    width = model.get_submodule(site).to_q.in_features
    with gensparse.applied(model, SMALL, strict=True):
        output(model, CASES[name].inputs(7, 5))

        def longer(_module: Any, args: Any, kwargs: Any) -> Any:
            key = next(iter(kwargs), None)
            first = args[0] if args else kwargs[key]
            first = torch.cat([first, torch.zeros(first.shape[0], 3, width)], 1)
            return ((first, *args[1:]), kwargs) if args else (args, {**kwargs, key: first})

        hook = model.get_submodule(site).register_forward_pre_hook(longer, with_kwargs=True)
        try:
            with pytest.raises(LayoutMismatchError, match=site.replace(".", r"\.")):
                output(model, CASES[name].inputs(7, 5))
        finally:
            hook.remove()


def test_a_hidream_picture_with_more_tokens_than_places_is_refused() -> None:
    inputs = {**CASES["hidream"].inputs(7, 5), "hidden_states": torch.zeros(2, 4, 64, 20)}
    with pytest.raises(LayoutMismatchError, match="32x10 tokens has more than the 256 places"):
        layouts_of(denoiser("hidream"), inputs)


def packed(grids: list[tuple[int, int]], places: int = 256) -> dict[str, Any]:
    """HiDream's arguments for pictures of different sizes in one batch, as tokens with their sizes."""
    model, draw = denoiser("hidream"), normal(4)
    parts = [model.patchify(draw(1, 4, 2 * rows, 2 * columns)) for rows, columns in grids]
    tokens, masks, sizes, ids = (torch.cat(column) for column in zip(*parts, strict=True))
    inputs = tiny_inputs("hidream", (1, 2, 2), text=TEXT, batch=len(grids))
    return {**inputs, "hidden_states": tokens, "hidden_states_masks": masks, "img_sizes": sizes, "img_ids": ids}


def test_hidream_pictures_of_different_sizes_share_a_batch() -> None:
    # the model returns tokens in training only; else it joins pictures, which have to be of one size
    model, inputs = deepcopy(denoiser("hidream")).train(), packed([(7, 5), (3, 11)])
    layouts = {"joint": (padded(7, 5), padded(3, 11))}
    assert layouts_of(model, inputs) == layouts
    assert layouts_of(model, {**inputs, "img_sizes": [(7, 5), (3, 11)]}) == layouts
    assert layouts_of(model, packed([(7, 5), (7, 5)])) == {"joint": padded(7, 5)}
    with gensparse.applied(model, SlidingWindow(radius=100), strict=True):
        sparse = output(model, inputs)
    torch.testing.assert_close(sparse, output(model, inputs), atol=1e-5, rtol=0)
    check_small_window_equals_masked_dense(model, inputs, layouts, SMALL)
    with pytest.raises(LayoutMismatchError, match="img_sizes"):
        layouts_of(model, {**inputs, "img_sizes": None})


def test_a_mask_over_picture_tokens_joins_the_window() -> None:
    mask = torch.ones(2, 35)
    mask[:, 3:6] = mask[1, 7:9] = 0
    inputs = {**CASES["pixart"].inputs(7, 5), "attention_mask": mask}
    assert (output(denoiser("pixart"), inputs) - output(denoiser("pixart"), CASES["pixart"].inputs(7, 5))).any()
    check_small_window_equals_masked_dense(denoiser("pixart"), inputs, CASES["pixart"].layouts(7, 5), SMALL)


@pytest.mark.parametrize("name", ["sd3", "cogview4", "hunyuanimage", "auraflow"])
def test_text_length_may_change_between_calls(name: str) -> None:
    model = denoiser(name)
    with gensparse.applied(model, SlidingWindow(radius=100), strict=True) as handle:
        sparse = [output(model, tiny_inputs(name, (1, 7, 5), text=text)) for text in (3, 8)]
    check_report(handle.report(), CASES[name].sites, calls=2)
    for text, out in zip((3, 8), sparse, strict=True):
        torch.testing.assert_close(out, output(model, tiny_inputs(name, (1, 7, 5), text=text)), atol=1e-5, rtol=0)


def test_a_mask_over_text_of_cogview4_runs_dense_with_the_reason() -> None:
    # the model makes a 0/1 number per pair of it and adds that to the logits
    model, inputs = denoiser("cogview4"), CASES["cogview4"].inputs(7, 5)
    inputs = {**inputs, "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])}
    dense = output(model, inputs)
    with gensparse.applied(model, SMALL) as handle:
        assert torch.equal(output(model, inputs), dense)
        assert handle.report()["dense"] == {"the attention mask differs from query to query": 2}


def test_either_attention_of_a_dual_block_can_be_sparse_alone() -> None:
    model, inputs, layouts = denoiser("sd35"), CASES["sd35"].inputs(7, 5), CASES["sd35"].layouts(7, 5)
    names = list(sites_of(model))
    assert names[:2] == ["transformer_blocks.0.attn", "transformer_blocks.0.attn2"]
    block = model.transformer_blocks[0]
    assert block.attn.processor is block.attn2.processor
    dense = output(model, inputs)
    for kept in (0, 1):
        others = [index for index in range(3) if index != kept]
        expected = masked_output(model, inputs, layouts, SMALL, names=[names[kept]])
        with gensparse.applied(model, SMALL, strict=True, dense_layers=others) as handle:
            torch.testing.assert_close(output(model, inputs), expected, atol=1e-5, rtol=0)
            assert handle.report()["calls"] == {"sparse": 1, "dense": {"dense layer": 2}}
        assert (expected - dense).abs().max() > 1e-3
        assert torch.equal(output(model, inputs), dense)


def test_steps_of_skipped_layers_are_not_counted() -> None:
    model, inputs = denoiser("sd35"), CASES["sd35"].inputs(7, 5)
    with gensparse.applied(model, SMALL, strict=True) as handle:
        output(model, {**inputs, "skip_layers": [0]})
        assert handle.report()["calls"] == {"sparse": 1, "dense": {}}


PIPELINES = {
    # name: (sizes, text tokens, other sizes of layout_for by role)
    "sd15": (unet, 0, {f"level{level}": {"level": level} for level in range(3)}),
    "sdxl": (unet, 0, {f"level{level}": {"level": level} for level in range(3)}),
    "pixart": (pixart, 0, {"self": {}}),
    "sd3": (sd3, 77 + 16, {"joint": {}, "image": {"n_text": 0}}),
    "sd35": (sd3, 77 + 16, {"joint": {}, "image": {"n_text": 0}}),
    "auraflow": (auraflow, 16, {"joint": {}}),
    "cogview4": (cogview4, 16, {"joint": {}}),
    "cogview3plus": (cogview4, 16, {"joint": {}}),
    "hunyuanimage": (hunyuanimage, 24 + 8, {"joint": {"vae_scale": 4}}),
    "hidream": (hidream, 3 * 16, {"joint": {"max_tokens": 256}}),
}


def picture(pipe: Any, call: Mapping[str, Any]) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(**call, generator=torch.Generator().manual_seed(0), output_type="latent").images


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline_calls_have_the_layout_for_its_pixels_and_its_steps_are_counted(name: str) -> None:
    family, n_text, sizes = PIPELINES[name]
    pipe = tiny_pipeline(name)
    call = {key: value for key, value in tiny_call(name).items() if key != "output_type"}
    if name not in ("hidream", "cogview4"):  # one chooses its own, the other takes multiples of 16 only
        call |= {"height": 24, "width": 40}
    model = pipe.unet if family is unet else pipe.transformer
    seen: list[Any] = []
    hook = model.register_forward_pre_hook(
        lambda model, args, kwargs: seen.append(layouts_of(model, kwargs, *args)), with_kwargs=True
    )
    dense = picture(pipe, call)
    hook.remove()
    options = {"n_text": n_text, "vae_scale": 2}
    pixels = (call["height"], call["width"])
    expected = {role: family.FAMILY.layout_for(*pixels, **{**options, **own}) for role, own in sizes.items()}
    assert all(layouts == expected for layouts in seen)
    handle = gensparse.apply(pipe, SMALL, strict=True, dense_steps=1)
    assert not torch.equal(picture(pipe, call), dense)
    calls = len(seen) // 2 * len(sites_of(model))
    assert handle.report()["calls"] == {"sparse": calls, "dense": {"dense step": calls}}
    gensparse.remove(pipe)
    assert torch.equal(picture(pipe, call), dense)


@pytest.mark.parametrize(
    ("family", "options", "grid", "tokens"),
    [
        (unet, {}, (128, 128), 16384),
        (unet, {"level": 1}, (64, 64), 4096),
        (unet, {"level": 3, "n_text": 77}, (16, 16), 256),
        (pixart, {}, (64, 64), 4096),
        (hunyuandit, {}, (64, 64), 4096),
        (sd3, {"n_text": 333}, (64, 64), 4429),
        (auraflow, {"n_text": 256}, (64, 64), 4360),
        (auraflow, {"n_text": 256, "registers": 4}, (64, 64), 4356),
        (cogview4, {"n_text": 224}, (64, 64), 4320),
        (hunyuanimage, {"n_text": 1128}, (32, 32), 2152),
        (hidream, {"n_text": 384}, (64, 64), 4480),
    ],
)
def test_layout_for_a_picture_of_1024_pixels_needs_no_weights(
    family: Any, options: Mapping[str, int], grid: tuple[int, int], tokens: int
) -> None:
    layout = family.FAMILY.layout_for(1024, 1024, **options)
    assert layout.grid == (1, *grid)
    assert layout.tokens == tokens


def test_layout_for_odd_sizes_rounds_as_the_models_do() -> None:
    assert unet.layout_for(1000, 760, level=2).grid == (1, 32, 24)  # 125 x 95 latent cells
    assert sd3.layout_for(1000, 777, n_text=0).grid == (1, 62, 48)
    assert hidream.layout_for(1360, 768, n_text=384).tokens == 4096 + 384


MODULES = (unet, pixart, hunyuandit, sd3, auraflow, cogview4, hunyuanimage, hidream)


@pytest.mark.parametrize("family", MODULES, ids=lambda family: family.FAMILY.name)
def test_layout_for_a_picture_below_one_token_is_refused(family: Any) -> None:
    with pytest.raises(ConfigError, match="height=7"):
        family.FAMILY.layout_for(7, 64, n_text=5)


@pytest.mark.parametrize("level", [-1, 1.0, True, None])
def test_levels_that_are_no_counts_are_refused(level: Any) -> None:
    with pytest.raises(ConfigError, match="level="):
        unet.layout_for(64, 64, level=level)


def test_a_hidream_size_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="128x64 tokens, but only square pictures may have more than 4096"):
        hidream.layout_for(2048, 1024, n_text=384)
    assert hidream.layout_for(2048, 2048, n_text=384).grid == (1, 128, 128)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("sd15", 16 * 16),
        ("sdxl", 16 * 16),
        ("pixart", 4 * 4),
        ("hunyuan_dit", 8 * 8),
        ("sd3", 8 * 8),
        ("auraflow", 8 * 8),
        ("cogview4", 8 * 8),
        ("cogview3plus", 8 * 8),
        ("hidream", 16 * 16),
    ],
)
def test_native_tokens_come_from_the_config(name: str, tokens: int) -> None:
    model = denoiser(name)
    native = family_of(model).native_tokens
    assert native(model) == tokens
    assert native(SimpleNamespace(transformer=model)) == tokens
    with pytest.raises(ConfigError, match="training size"):
        native(nn.Linear(1, 1))


def test_sizes_of_training_that_are_not_square_count_both_sides() -> None:
    assert pixart.FAMILY.native_tokens(stub({"sample_size": (48, 32), "patch_size": 2})) == 24 * 16


def test_native_tokens_of_hunyuanimage_are_known_to_its_pipeline_only() -> None:
    model = denoiser("hunyuanimage")
    assert hunyuanimage.native_tokens(SimpleNamespace(transformer=model, default_sample_size=64)) == 64 * 64
    with pytest.raises(ConfigError, match="pass the pipeline"):
        hunyuanimage.native_tokens(model)


def test_native_tokens_of_a_level_shrink_with_it() -> None:
    assert [unet.FAMILY.native_at(f"level{level}", 4096) for level in range(4)] == [4096, 1024, 256, 64]
    assert unet.FAMILY.native_at("level1", None) is None
    assert sd3.FAMILY.native_at("joint", 4096) == 4096


def test_proportional_scale_uses_the_training_size_of_every_level() -> None:
    # at the training size nothing is raised, whatever the level
    model, inputs = denoiser("sd15"), CASES["sd15"].inputs(16, 16)
    with gensparse.applied(model, Clear(radius=3), strict=True):
        plain = output(model, inputs)
    with gensparse.applied(model, Clear(radius=3, proportional=True), strict=True):
        torch.testing.assert_close(output(model, inputs), plain, atol=1e-6, rtol=0)


def test_sana_is_refused_with_the_reason() -> None:
    model = tiny_denoiser("sana")
    assert isinstance(model, SanaTransformer2DModel)
    with pytest.raises(ConfigError, match=r"Sana cannot be made sparse: its self-attention is linear"):
        gensparse.apply(model, SMALL)
    assert not model._forward_pre_hooks
    with pytest.raises(ConfigError, match="linear"):
        family_of(model).layout_for(1024, 1024)


@by_case
def test_blocks_name_what_holds_the_sites(name: str) -> None:
    import re

    model = denoiser(name)
    family: Family = family_of(model)
    blocks = [module for module, _ in model.named_modules() if re.fullmatch(family.blocks, module)]
    for site in sites_of(model):
        assert any(site.startswith(f"{block}.") for block in blocks)
    for block in blocks:
        assert not any(other.startswith(f"{block}.") for other in blocks), "blocks lie inside each other"
