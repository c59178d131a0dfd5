"""FLUX.1 Kontext, Chroma, FLUX.2, QwenImage, Lumina2 and Z-Image made sparse."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import QwenImageControlNetModel, QwenImageTransformer2DModel, ZImageTransformer2DModel
from families.family_checks import (
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
from torch import Tensor, nn

import gensparse
from gensparse.errors import ConfigError, LayoutMismatchError
from gensparse.families import FAMILIES, TensorMemo, chroma, family_of, flux, flux2, lumina2, qwenimage, zimage
from gensparse.layout import Layout, Segment
from gensparse.methods import Clear, SlidingWindow
from gensparse.testing.tiny import tiny_call, tiny_denoiser, tiny_inputs, tiny_pipeline, with_noise
from gensparse.testing.tiny.parts import WIDTH, normal, seeded

GRIDS = [(7, 5), (1, 11), (13, 3)]
SMALL = SlidingWindow(radius=1)
TEXT = 5
LENGTHS = (5, 3)

Layouts = Mapping[str, Layout | Sequence[Layout]]


@dataclass(frozen=True)
class Case:
    """A tiny model, its arguments for a grid, and what its tokens then are, written down without the family."""

    model: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, Any]]
    layouts: Callable[[int, int], Layouts]
    sites: int


def picture(kind: str, rows: int, columns: int, name: str = "") -> Segment:
    return Segment(kind, rows * columns, (1, rows, columns), name)


def text_first(rows: int, columns: int, *references: tuple[int, int], text: int = TEXT) -> Layout:
    extra = [picture("reference", *size, f"reference{number}") for number, size in enumerate(references)]
    return Layout((Segment("text", text), picture("target", rows, columns), *extra))


def filled(*segments: Segment) -> list[Segment]:
    """Z-Image: every segment filled up to a multiple of 32."""
    found = []
    for segment in segments:
        found += [segment, Segment("register", -segment.length % 32)] if segment.length % 32 else [segment]
    return found


def picture_first(rows: int, columns: int, *lengths: int) -> Layouts:
    own = picture("target", rows, columns)
    each = tuple(Layout(tuple(filled(own, Segment("text", length)))) for length in lengths)
    return {"joint": each if len(set(lengths)) > 1 else each[0], "image": Layout(tuple(filled(own)))}


def tiny(name: str, **options: Any) -> dict[str, Any]:
    return {
        "model": partial(tiny_denoiser, name),
        "inputs": lambda rows, columns: tiny_inputs(name, (1, rows, columns), text=TEXT, **options),
    }


def edited(name: str, option: str) -> dict[str, Any]:
    """With a reference of the target's grid and one of another."""

    def inputs(rows: int, columns: int) -> dict[str, Any]:
        return tiny_inputs(name, (1, rows, columns), text=TEXT, **{option: ((rows, columns), (3, 4))})

    return {
        "model": partial(tiny_denoiser, name),
        "inputs": inputs,
        "layouts": lambda h, w: {"joint": text_first(h, w, (h, w), (3, 4))},
    }


def kontext_inputs(rows: int, columns: int) -> dict[str, Any]:
    return tiny_inputs("flux_kontext", (1, rows, columns), text=TEXT, reference=(rows, columns))


def added(rows: int, columns: int) -> dict[str, Any]:
    """Chroma's mask as its pipelines make it: numbers."""
    inputs = tiny_inputs("chroma", (1, rows, columns), text=TEXT, lengths=LENGTHS)
    return {**inputs, "attention_mask": inputs["attention_mask"].float()}


QWEN = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "axes_dims_rope": (8, 4, 4),
}


def layered() -> QwenImageTransformer2DModel:
    with seeded(0):
        model = QwenImageTransformer2DModel(**QWEN, use_layer3d_rope=True, use_additional_t_cond=True)
        return with_noise(model).eval()


def layered_inputs(rows: int, columns: int) -> dict[str, Any]:
    """Two layers and the picture they come from."""
    inputs = tiny_inputs("qwenimage", (1, rows, columns), text=TEXT, references=((rows, columns),) * 2)
    return {**inputs, "additional_t_cond": torch.zeros(2, dtype=torch.long)}


def qwen_control_net() -> QwenImageControlNetModel:
    with seeded(0):
        return with_noise(QwenImageControlNetModel(**QWEN)).eval()


def qwen_control_net_inputs(rows: int, columns: int) -> dict[str, Any]:
    inputs = tiny_inputs("qwenimage", (1, rows, columns), text=TEXT, lengths=LENGTHS)
    shapes = [sample[0] for sample in inputs["img_shapes"]]  # its pipelines pass no list around the only picture
    return {**inputs, "img_shapes": shapes, "controlnet_cond": normal(1)(2, rows * columns, 16)}


def omni() -> ZImageTransformer2DModel:
    with seeded(0):
        model = ZImageTransformer2DModel(
            all_patch_size=(2,),
            all_f_patch_size=(1,),
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=WIDTH,
            siglip_feat_dim=8,
            axes_dims=[8, 4, 4],
            axes_lens=[256, 64, 64],
        )
        return with_noise(model).eval()


def omni_inputs(rows: int, columns: int) -> dict[str, Any]:
    """One sample with a reference of the target's grid, one with a reference of another."""
    draw = normal(0)
    target, other = (4, 1, 2 * rows, 2 * columns), (4, 1, 6, 8)
    return {
        "x": [[draw(*target), draw(*target)], [draw(*other), draw(*target)]],
        "t": torch.full((2,), 0.5),
        "cap_feats": [[draw(3, WIDTH), draw(2, WIDTH)], [draw(5, WIDTH), draw(1, WIDTH)]],
        "siglip_feats": [[draw(2, 3, 8), None], [draw(2, 2, 8), None]],
        "image_noise_mask": [[0, 1], [0, 1]],
    }


def omni_layouts(rows: int, columns: int) -> Layouts:
    own = picture("target", rows, columns)
    references = [picture("reference", rows, columns, "reference0"), picture("reference", 3, 4, "reference0")]
    pictures = [filled(reference, own) for reference in references]
    texts = [filled(*(Segment("text", length) for length in lengths)) for lengths in ((3, 2), (5, 1))]
    features = [[*filled(Segment("register", length)), Segment("register", 32)] for length in (6, 4)]
    joint = [[*text, *pair, *more] for text, pair, more in zip(texts, pictures, features, strict=True)]
    return {"joint": tuple(Layout(tuple(x)) for x in joint), "image": tuple(Layout(tuple(x)) for x in pictures)}


def joint(rows: int, columns: int) -> Layouts:
    return {"joint": text_first(rows, columns)}


def ragged(rows: int, columns: int) -> Layouts:
    each = tuple(text_first(rows, columns, text=length) for length in LENGTHS)
    return {"joint": each, "image": Layout((picture("target", rows, columns),))}


CASES = {
    "kontext": Case(**tiny("flux_kontext"), layouts=lambda h, w: {"joint": text_first(h, w, (3, 4))}, sites=2),
    "kontext_aligned": Case(
        partial(tiny_denoiser, "flux_kontext"),
        kontext_inputs,
        lambda h, w: {"joint": text_first(h, w, (h, w))},
        sites=2,
    ),
    "chroma": Case(**tiny("chroma"), layouts=joint, sites=2),
    "chroma_hidden": Case(**tiny("chroma", lengths=LENGTHS), layouts=joint, sites=2),
    "chroma_added": Case(partial(tiny_denoiser, "chroma"), added, joint, sites=2),
    "flux2": Case(**tiny("flux2"), layouts=joint, sites=2),
    "flux2_edit": Case(**edited("flux2", "references"), sites=2),
    "qwenimage": Case(**tiny("qwenimage"), layouts=joint, sites=2),
    "qwenimage_ragged": Case(**tiny("qwenimage", lengths=LENGTHS), layouts=joint, sites=2),
    "qwenimage_edit": Case(**edited("qwenimage", "references"), sites=2),
    "qwenimage_layered": Case(layered, layered_inputs, lambda h, w: {"joint": text_first(h, w, *[(h, w)] * 2)}, 2),
    "qwenimage_control_net": Case(qwen_control_net, qwen_control_net_inputs, joint, sites=2),
    "lumina2": Case(**tiny("lumina2"), layouts=lambda h, w: {**ragged(h, w), **joint(h, w)}, sites=3),
    "lumina2_ragged": Case(**tiny("lumina2", lengths=LENGTHS), layouts=ragged, sites=3),
    "zimage": Case(**tiny("zimage"), layouts=lambda h, w: picture_first(h, w, TEXT), sites=3),
    "zimage_ragged": Case(**tiny("zimage", lengths=(5, 40)), layouts=lambda h, w: picture_first(h, w, 5, 40), sites=3),
    "zimage_omni": Case(omni, omni_inputs, omni_layouts, sites=3),
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


@by_case
def test_dense_layers_are_the_models_own(name: str) -> None:
    model, inputs = denoiser(name), CASES[name].inputs(5, 7)
    dense = output(model, inputs)
    with gensparse.applied(model, SMALL, strict=True, dense_layers=range(CASES[name].sites)):
        assert torch.equal(output(model, inputs), dense)


def layout_of_first_site(name: str, rows: int, columns: int) -> Layout:
    found = CASES[name].layouts(rows, columns)[next(iter(sites_of(denoiser(name)).values()))]
    return found if isinstance(found, Layout) else found[0]


def changed_tokens(name: str, inputs: Mapping[str, Any], others: Mapping[str, Any], site: str = "") -> list[int]:
    """Tokens of the first sample whose queries differ at a site of the model, its first one by default."""
    site = site or next(iter(sites_of(denoiser(name))))
    return query_change(denoiser(name), site, inputs, others)[0].nonzero().flatten().tolist()


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("kontext", "chroma", "flux2", "qwen"))])
def test_a_picture_token_is_where_the_layout_says(name: str) -> None:
    rows, columns, row, column = 7, 5, 4, 3
    inputs, layout = CASES[name].inputs(rows, columns), layout_of_first_site(name, rows, columns)
    first = 0
    for number, segment in enumerate(layout.segments[1:], 1):
        here = min(row, segment.shape[1] - 1) * segment.shape[2] + min(column, segment.shape[2] - 1)
        tokens = inputs["hidden_states"].clone()
        tokens[:, first + here] += 1
        assert changed_tokens(name, inputs, {"hidden_states": tokens}) == [layout.starts[number] + here]
        first += segment.length


@pytest.mark.parametrize("name", ["lumina2", "lumina2_ragged"])
def test_a_picture_token_of_lumina2_is_where_the_layout_says(name: str) -> None:
    rows, columns, row, column = 7, 5, 4, 3
    inputs = CASES[name].inputs(rows, columns)
    cells = inputs["hidden_states"].clone()
    cells[..., 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 1
    assert changed_tokens(name, inputs, {"hidden_states": cells}) == [row * columns + column]
    # attention in the refiner spreads the change, but captions do not see the picture before the joint layers
    changed = changed_tokens(name, inputs, {"hidden_states": cells}, "layers.0.attn")
    assert changed == list(range(TEXT, TEXT + rows * columns))


@pytest.mark.parametrize("name", ["zimage", "zimage_ragged", "zimage_omni"])
def test_the_tokens_of_zimage_are_where_the_layout_says(name: str) -> None:
    inputs, rows, columns = CASES[name].inputs(7, 5), 7, 5
    joint = CASES[name].layouts(rows, columns)["joint"]
    layout = joint if isinstance(joint, Layout) else joint[0]
    where = {"x": ("target", "reference"), "cap_feats": ("text",)}
    for argument, kinds in where.items():
        spans = [
            range(start, start + segment.length)
            for start, segment in zip(layout.starts, layout.segments, strict=True)
            if segment.kind in kinds
        ]
        expected = {token for span in spans for token in span}
        changed = set(changed_tokens(name, inputs, {argument: shifted(inputs[argument])}, "layers.0.attention"))
        # registers behind a picture or text change with it in the refiners
        assert expected <= changed
        registers = {token for token in range(layout.tokens) if kind_of(layout, token) == "register"}
        assert changed - expected <= registers


def shifted(value: Any) -> Any:
    return value + 1 if isinstance(value, Tensor) else [shifted(item) for item in value]


def kind_of(layout: Layout, token: int) -> str:
    return next(
        segment.kind
        for start, segment in zip(layout.starts, layout.segments, strict=True)
        if start <= token < start + segment.length
    )


@pytest.mark.parametrize("name", ["chroma", "flux2_edit", "qwenimage_edit", "kontext"])
def test_a_text_token_is_where_the_layout_says(name: str) -> None:
    inputs = CASES[name].inputs(7, 5)
    text = inputs["encoder_hidden_states"].clone()
    text[:, 2] += 1
    assert changed_tokens(name, inputs, {"encoder_hidden_states": text}) == [2]


NEEDED = {
    "kontext": ["img_ids", "hidden_states", "encoder_hidden_states"],
    "chroma": ["img_ids", "hidden_states", "encoder_hidden_states"],
    "flux2": ["img_ids", "hidden_states", "encoder_hidden_states"],
    "qwenimage": ["img_shapes", "hidden_states", "encoder_hidden_states"],
    "lumina2": ["hidden_states", "encoder_attention_mask"],
    "zimage": ["x", "cap_feats"],
}


@pytest.mark.parametrize(("name", "missing"), [(name, missing) for name, args in NEEDED.items() for missing in args])
def test_a_call_without_what_the_layout_needs_is_refused(name: str, missing: str) -> None:
    with pytest.raises(LayoutMismatchError, match=missing):
        layouts_of(denoiser(name), {**CASES[name].inputs(7, 5), missing: None})


@pytest.mark.parametrize("name", ["kontext", "chroma", "flux2_edit", "qwenimage_edit", "qwenimage_control_net"])
def test_picture_tokens_that_contradict_the_ids_are_refused(name: str) -> None:
    inputs = CASES[name].inputs(7, 5)
    tokens = inputs["hidden_states"]
    for wrong in (tokens[:, :-1], torch.cat([tokens, tokens[:, :3]], 1)):
        with pytest.raises(LayoutMismatchError, match=f"{wrong.shape[1]} picture tokens, but .* {tokens.shape[1]}"):
            layouts_of(denoiser(name), {**inputs, "hidden_states": wrong})


@pytest.mark.parametrize("name", ["chroma", "flux2_edit", "kontext"])
def test_ids_that_are_no_grid_are_refused_not_guessed(name: str) -> None:
    inputs = CASES[name].inputs(7, 5)
    with pytest.raises(LayoutMismatchError, match="not a rectangle"):
        layouts_of(denoiser(name), {**inputs, "img_ids": inputs["img_ids"].flip(-2)})


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([[(1, 7, 5)], [(1, 5, 7)]], "the same for all"),
        ([], "the same for all"),
        (35, "the same for all"),
        ([[]], "no list of picture shapes"),
        ([[(7, 5)]], "no list of picture shapes"),
        ([[(1, 7, 0)]], "no list of picture shapes"),
        ([[(1, 14, 10)]], "35 picture tokens, but img_shapes describe 140"),
    ],
)
def test_shapes_of_qwenimage_that_are_no_pictures_are_refused(shapes: Any, message: str) -> None:
    with pytest.raises(LayoutMismatchError, match=message):
        layouts_of(denoiser("qwenimage"), {**CASES["qwenimage"].inputs(7, 5), "img_shapes": shapes})


def test_a_mask_of_lumina2_that_is_not_one_row_per_picture_is_refused() -> None:
    inputs = CASES["lumina2"].inputs(7, 5)
    for wrong in (inputs["encoder_attention_mask"][:1], inputs["encoder_attention_mask"][:, None]):
        with pytest.raises(LayoutMismatchError, match="one row of it for every picture"):
            layouts_of(denoiser("lumina2"), {**inputs, "encoder_attention_mask": wrong})
    with pytest.raises(LayoutMismatchError, match="no picture of this model"):
        layouts_of(denoiser("lumina2"), {**inputs, "hidden_states": torch.zeros(2, 35, 16)})


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"cap_feats": [torch.zeros(5, WIDTH)]}, "2 pictures and 1 texts"),
        ({"x": [], "cap_feats": []}, "0 pictures"),
        ({"x": [torch.zeros(4, 14, 10)] * 2}, "no whole token"),
        ({"x": [torch.zeros(4, 1, 1, 10)] * 2}, "no whole token"),
        ({"x": [[torch.zeros(4, 1, 14, 10), None]] * 2, "cap_feats": [[torch.zeros(5, WIDTH)]] * 2}, "no target"),
        ({"x": [[]] * 2, "cap_feats": [[]] * 2}, "no target"),
    ],
)
def test_calls_of_zimage_that_contradict_themselves_are_refused(others: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutMismatchError, match=message):
        layouts_of(denoiser("zimage"), {**CASES["zimage"].inputs(7, 5), **others})


def test_pictures_of_zimage_may_differ_in_size() -> None:
    draw = normal(3)
    inputs = CASES["zimage_ragged"].inputs(7, 5)
    inputs["x"] = [draw(4, 1, 14, 10), draw(4, 1, 6, 22)]
    alone = tuple(Layout(tuple(filled(picture("target", *size)))) for size in ((7, 5), (3, 11)))
    layouts = layouts_of(denoiser("zimage"), inputs)
    assert layouts["image"] == alone
    assert [layout.grid for layout in layouts["joint"]] == [(1, 7, 5), (1, 3, 11)]
    model = denoiser("zimage")
    dense = all_outputs(model, inputs)
    with gensparse.applied(model, SlidingWindow(radius=100), strict=True) as handle:
        for one, other in zip(all_outputs(model, inputs), dense, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
        check_report(handle.report(), 3)


@torch.no_grad()
def all_outputs(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    return list(model(**inputs, return_dict=False)[0])


def test_a_missing_reference_of_zimage_is_a_run_of_registers() -> None:
    inputs = omni_inputs(7, 5)
    inputs["x"][0].insert(1, None)
    inputs["siglip_feats"][0][0] = None
    layouts = layouts_of(denoiser("zimage_omni"), inputs)
    alone = layouts["image"][0]
    assert [(segment.kind, segment.length) for segment in alone.segments] == [
        ("reference", 35),
        ("register", 29),
        ("register", 32),
        ("target", 35),
        ("register", 29),
    ]
    assert [segment.length for segment in layouts["joint"][0].segments[-2:]] == [32, 32]
    assert [segment.length for segment in layouts["joint"][1].segments[-3:]] == [4, 28, 32]


def test_features_are_left_out_where_the_model_leaves_them_out() -> None:
    inputs = omni_inputs(7, 5)
    with_features = layouts_of(denoiser("zimage_omni"), inputs)["joint"]
    without = layouts_of(denoiser("zimage_omni"), {**inputs, "siglip_feats": [None, None]})["joint"]
    assert [a.tokens - b.tokens for a, b in zip(with_features, without, strict=True)] == [64, 64]


@pytest.mark.parametrize("name", ["chroma", "flux2", "qwenimage", "lumina2", "zimage"])
def test_text_length_may_change_between_calls(name: str) -> None:
    model = denoiser(name)
    with gensparse.applied(model, SlidingWindow(radius=100), strict=True) as handle:
        sparse = [output(model, tiny_inputs(name, (1, 7, 5), text=text)) for text in (3, 8)]
    check_report(handle.report(), CASES[name].sites, calls=2)
    for text, out in zip((3, 8), sparse, strict=True):
        torch.testing.assert_close(out, output(model, tiny_inputs(name, (1, 7, 5), text=text)), atol=1e-5, rtol=0)


def test_an_empty_caption_leaves_the_picture_alone() -> None:
    for name, lengths in (("lumina2", (0, 3)), ("zimage", (0, 3))):
        inputs = tiny_inputs(name, (1, 7, 5), text=TEXT, lengths=lengths)
        joint = layouts_of(denoiser(name), inputs)["joint"]
        assert all(segment.kind != "text" for segment in joint[0].segments)


@pytest.mark.parametrize(("name", "argument"), [("flux2", "img_ids"), ("lumina2", "encoder_attention_mask")])
def test_what_lies_on_a_device_is_read_once_per_run(name: str, argument: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, memo = denoiser(name), CASES[name].inputs(7, 5), TensorMemo()
    read = family_of(model).read_layouts
    first = read(model, inputs, memo)

    def refuse(*_: Any) -> Any:
        raise AssertionError("read again")

    for way in ("cpu", "tolist", "numpy"):
        monkeypatch.setattr(Tensor, way, refuse)
    assert read(model, inputs, memo) == first
    with pytest.raises(AssertionError, match="read again"):
        read(model, {**inputs, argument: inputs[argument].clone()}, memo)


PIPELINES = {
    # name: text tokens of a call, from its arguments
    "flux_kontext": lambda bound: bound["encoder_hidden_states"].shape[1],
    "chroma": lambda bound: bound["encoder_hidden_states"].shape[1],
    "flux2": lambda bound: bound["encoder_hidden_states"].shape[1],
    "qwenimage": lambda bound: bound["encoder_hidden_states"].shape[1],
    "lumina2": lambda bound: int(bound["encoder_attention_mask"].sum()),
    "zimage": lambda bound: [len(text) for text in bound["cap_feats"]],
}

SCALES = {"lumina2": {"vae_scale": 8}, "flux_kontext": {"vae_scale": 2, "references": [(24, 40)]}}


def generated(pipe: Any, call: Mapping[str, Any]) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(**call, generator=torch.Generator().manual_seed(0), output_type="latent").images


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline_calls_have_the_layout_for_its_pixels_and_its_steps_are_counted(name: str) -> None:
    pipe = tiny_pipeline(name)
    call = {key: value for key, value in tiny_call(name).items() if key != "output_type"}
    model, family = pipe.transformer, family_of(pipe.transformer)
    seen: list[Any] = []

    def note(model: nn.Module, args: Any, kwargs: Any) -> None:
        names = list(kwargs) if not args else ["x", "t", "cap_feats", *kwargs]
        bound = dict(zip(names, [*args, *kwargs.values()], strict=True))
        lengths = PIPELINES[name](bound)
        options = SCALES.get(name, {"vae_scale": 2})
        each = [
            family.layout_for(call["height"], call["width"], n_text=length, **options)
            for length in (lengths if isinstance(lengths, list) else [lengths])
        ]
        seen.append((layouts_of(model, kwargs, *args)["joint"], each[0] if len(set(each)) == 1 else tuple(each)))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    dense = generated(pipe, call)
    hook.remove()
    assert seen
    assert all(read == expected for read, expected in seen)
    handle = gensparse.apply(pipe, SMALL, strict=True, dense_steps=1)
    assert not torch.equal(generated(pipe, call), dense)
    calls = len(seen) // 2 * len(sites_of(model))
    assert handle.report()["calls"] == {"sparse": calls, "dense": {"dense step": calls}}
    gensparse.remove(pipe)
    assert torch.equal(generated(pipe, call), dense)


MODULES = {
    "flux": (flux, "FLUX", {"n_text": 512}, 512 + 4096),
    "chroma": (chroma, "Chroma", {"n_text": 512}, 512 + 4096),
    "flux2": (flux2, "FLUX.2", {"n_text": 512}, 512 + 4096),
    "qwenimage": (qwenimage, "QwenImage", {"n_text": 77}, 77 + 4096),
    "lumina2": (lumina2, "Lumina2", {"n_text": 77}, 77 + 4096),
    "zimage": (zimage, "Z-Image", {"n_text": 77}, 96 + 4096),
}


@pytest.mark.parametrize("module", MODULES)
def test_layout_for_a_picture_of_1024_pixels_needs_no_weights(module: str) -> None:
    family, _, options, tokens = MODULES[module]
    layout = family.layout_for(1024, 1024, **options)
    assert layout.grid == (1, 64, 64)
    assert layout.tokens == tokens
    assert family.layout_for(1000, 777, **options).grid == (1, 62, 48)
    assert family.layout_for(32, 48, **options, vae_scale=2, patch=1).grid == (1, 16, 24)


@pytest.mark.parametrize("module", MODULES)
def test_layout_for_a_picture_below_one_token_is_refused(module: str) -> None:
    family, name, options, _ = MODULES[module]
    with pytest.raises(ConfigError, match=f"{name} height=15"):
        family.layout_for(15, 64, **options)


@pytest.mark.parametrize("module", ["flux", "flux2", "qwenimage"])
def test_layout_for_an_edit_counts_the_references(module: str) -> None:
    family, name, options, tokens = MODULES[module]
    layout = family.layout_for(1024, 1024, **options, references=[(1024, 1024), (752, 1392)])
    assert layout.tokens == tokens + 4096 + 47 * 87
    assert [segment.grid for segment in layout.segments[2:]] == [(1, 64, 64), (1, 47, 87)]
    with pytest.raises(ConfigError, match=f"{name} width=15"):
        family.layout_for(1024, 1024, **options, references=[(64, 15)])


def test_layout_for_zimage_fills_up_to_the_multiple() -> None:
    kinds = [(segment.kind, segment.length) for segment in zimage.layout_for(112, 80, n_text=40).segments]
    assert kinds == [("target", 35), ("register", 29), ("text", 40), ("register", 24)]
    assert zimage.layout_for(112, 80, n_text=0, multiple=35).tokens == 35


@pytest.mark.parametrize("module", [name for name in MODULES if name != "lumina2"])
def test_native_tokens_come_from_the_scheduler(module: str) -> None:
    native = MODULES[module][0].native_tokens
    assert native(None, {"max_image_seq_len": 256}) == 256
    pipe = SimpleNamespace(scheduler=SimpleNamespace(config={"max_image_seq_len": 8192}))
    assert native(pipe) == 8192
    with pytest.raises(ConfigError, match="max_image_seq_len"):
        native(nn.Linear(1, 1))


def test_native_tokens_of_lumina2_come_from_its_config() -> None:
    model = denoiser("lumina2")
    assert lumina2.native_tokens(model) == lumina2.native_tokens(SimpleNamespace(transformer=model)) == 8 * 8
    with pytest.raises(ConfigError, match="training size"):
        lumina2.native_tokens(nn.Linear(1, 1))


def test_only_lumina2_and_zimage_count_time_upwards() -> None:
    for module in MODULES:
        assert MODULES[module][0].FAMILY.ascending_time is (module in ("lumina2", "zimage"))
    assert zimage.FAMILY.timestep({"t": torch.tensor([0.25])}) == -0.25
    assert chroma.FAMILY.timestep({"timestep": torch.tensor([0.25])}) == 0.25


@pytest.mark.parametrize("name", ["chroma_added", "zimage_ragged"])
def test_blocks_compile_in_one_graph(name: str) -> None:
    model, inputs, graphs = CASES[name].model(), CASES[name].inputs(7, 5), []

    def backend(module: Any, _inputs: Any) -> Any:
        graphs.append(module)
        return module.forward

    gensparse.apply(model, SMALL, strict=True)
    eager = output(model, inputs)
    gensparse.compile_blocks(model, fullgraph=True, backend=backend)
    try:
        for _ in range(2):
            torch.testing.assert_close(output(model, inputs), eager, atol=1e-5, rtol=0)
            assert len(graphs) <= 3, "compiled again"
    finally:
        torch.compiler.reset()


@by_case
def test_blocks_name_what_holds_the_sites(name: str) -> None:
    model = denoiser(name)
    family = family_of(model)
    assert type(model).__name__ in FAMILIES
    blocks = [module for module, _ in model.named_modules() if re.fullmatch(family.blocks, module)]
    for site in sites_of(model):
        assert any(site.startswith(f"{block}.") for block in blocks)
    for block in blocks:
        assert not any(other.startswith(f"{block}.") for other in blocks), "blocks lie inside each other"
