"""Published parts of methods for regions and adapters that are no attention: losses, layouts, words, spans, fusions.

Folders autostudio, structured-diffusion, lpa, disendiff and regional-prompting.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_files import GoldenError, folder_files, golden_params, load
from torch import Tensor

from gensparse.methods import LPA, Place
from gensparse.subjects.boxdiff import box_loss, box_losses, box_tokens, token_maps
from gensparse.subjects.calibration import blur_kernel, calibration_loss, token_mask
from gensparse.subjects.drawer import guided_start, layout_weights
from gensparse.subjects.multidiffusion import fused, views_of
from gensparse.subjects.phrases import (
    found_in,
    lowest_phrases,
    normalised,
    phrases_of_tree,
    piece_offsets,
    token_span,
)
from gensparse.subjects.words import content_words, style_words, tokens_of

CHECKED = {
    "autostudio": ("layout", "latent_blend"),
    "structured-diffusion": ("spans",),
    "lpa": ("parse", "schedule"),
    "disendiff": ("loss",),
    "regional-prompting": ("boxdiff", "multidiffusion"),
}
OTHERS = {
    "autostudio": ("parallel_attention",),
    "structured-diffusion": ("attention",),
    "lpa": ("attention",),
    "regional-prompting": ("flux_mask", "unet_couple"),
}


def tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def close(got: Tensor, expected: Any, atol: float = 1e-5) -> None:
    torch.testing.assert_close(got, torch.as_tensor(np.asarray(expected)).to(got.dtype), atol=atol, rtol=0)


def check_layout(arrays: dict[str, Any]) -> None:
    size, fuse = tuple(arrays["image_size"].tolist()), tuple(arrays["fuse_scale"].tolist())
    weights = layout_weights(arrays["boxes_xywh"].tolist(), size, fuse)
    close(weights, arrays["expected"])
    torch.testing.assert_close(weights[0].sum(0), torch.ones(size))


def check_blend(arrays: dict[str, Any]) -> None:
    latents, mask, active = tensor(arrays["latents"]), tensor(arrays["mask"]), int(arrays["steps_active"])
    for step, (noised, expected) in enumerate(zip(arrays["guide_noised"], arrays["expected_per_step"], strict=True)):
        close(guided_start(latents, tensor(noised), mask) if step < active else latents, expected)


def check_spans(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        text = normalised(row["prompt"])
        assert text == row["normalised"]
        phrases = phrases_of_tree(row["constituency"])
        assert phrases == row["phrases"]
        offsets = piece_offsets(text, row["bpe_tokens"])
        spans = dict(zip(phrases, (token_span(offsets, place) for place in found_in(text, phrases)), strict=True))
        assert [list(span or ()) for span in spans.values()] == row["token_spans"]
        assert [[phrase, list(spans[phrase] or ())] for phrase in lowest_phrases(row["constituency"])] == row["lowest"]


def check_parse(data: dict[str, Any]) -> None:
    for row in data["parse"]:
        style = style_words(row["prompt"])
        assert style == row["style"], row
        assert content_words(row["prompt"], style, row["backend"]) == row["content"], row
    differs = 0
    for row in data["token_match"]:  # known broken, as the README says: here whole words by their characters
        text, spans = "", [(0, 0)]
        for piece in row["pieces"][1:-1]:
            glue = "" if piece == "color" else " "
            start = len(text + glue)
            text += glue + piece
            spans.append((start, len(text)))
        found = tokens_of(text, row["words"], [*spans, (0, 0)])
        assert 0 not in found
        assert len(spans) not in found
        differs += found != row["indices"]
    assert differs == len(data["token_match"])


def check_schedule(data: dict[str, Any]) -> None:
    actions = {None: "none", "style": "drop_content", "content": "drop_style", "both": "both"}
    for row in data["rows"]:
        method = LPA(route=row["preset"], window=tuple(row["window"]))
        kind = method.kind(Place("cross level0", 0, 1, 8, row["layer"].removesuffix(".processor")))
        assert actions[kind] == row["action"], row
        active = [time for time in data["timesteps"] if kind is not None and method.active_at(time)]
        assert active == row["active_timesteps"], row


def check_loss(arrays: dict[str, Any]) -> None:
    maps = tensor(arrays["maps"]).requires_grad_()
    concepts = [tuple(pair) for pair in arrays["modifier_class_tokens"].tolist()]
    close(blur_kernel(len(arrays["gauss_kernel"])), arrays["gauss_kernel"])
    for (modifier, word), own, kind in zip(
        concepts, arrays["expected_modifier_masks"], arrays["expected_class_masks"], strict=True
    ):
        close(token_mask(maps, modifier).detach(), own)
        close(token_mask(maps, word, squared=True).detach(), kind)
    bind, separate = calibration_loss(maps, concepts)
    close(bind.detach(), arrays["expected_bind"])
    close(separate.detach(), arrays["expected_separate"])
    close((float(arrays["alpha"]) * (bind + separate)).detach(), arrays["expected_total"])
    bind.backward()  # binding moves the modifiers alone
    assert maps.grad is not None
    for modifier, word in concepts:
        assert maps.grad[..., word].abs().max() == 0
        assert maps.grad[..., modifier].abs().max() > 0


def check_boxdiff(arrays: dict[str, Any]) -> None:
    attention = tensor(arrays["attention"])
    grid = tuple(attention.shape[:2])
    maps = token_maps(attention, arrays["token_indices"].tolist(), smooth=bool(arrays["smooth"]))
    boxes = [box_tokens(box, grid) for box in arrays["boxes_xyxy_512"].tolist()]
    share, reach = float(arrays["P"]), int(arrays["corner_L"])
    losses = box_losses(maps, boxes, share, reach)
    close(1 - losses[0], arrays["expected_fg"])  # how much of the box is filled
    for got, name in zip(losses[1:], ("bg", "corner_x", "corner_y"), strict=True):
        close(got, arrays[f"expected_{name}"])
    loss, worst = box_loss(maps, boxes, share, reach)
    close(loss, arrays["expected_loss"])
    close(worst, arrays["expected_max_fg_loss"])


def check_multidiffusion(arrays: dict[str, Any]) -> None:
    height, width = arrays["image_size"].tolist()
    masks, views = tensor(arrays["masks"]), [tuple(view) for view in arrays["views"].tolist()]
    assert views_of((height // 8, width // 8)) == views
    denoised = tensor(arrays["denoised"]).float()
    value, count = fused(lambda view, prompt: denoised[view, prompt][None], views, masks)
    close(value, arrays["expected"])
    close(count, arrays["expected_count"])


CHECKS = {
    ("autostudio", "layout"): check_layout,
    ("autostudio", "latent_blend"): check_blend,
    ("structured-diffusion", "spans"): check_spans,
    ("lpa", "parse"): check_parse,
    ("lpa", "schedule"): check_schedule,
    ("disendiff", "loss"): check_loss,
    ("regional-prompting", "boxdiff"): check_boxdiff,
    ("regional-prompting", "multidiffusion"): check_multidiffusion,
}


@pytest.mark.parametrize(
    "file", [param for folder, kinds in CHECKED.items() for param in golden_params(folder, kinds=kinds)]
)
def test_published_parts(file: Path) -> None:
    kind, data = load(file)
    if (file.parent.name, kind) not in CHECKS:
        raise GoldenError(f"{file}: no check for kind {kind}")
    CHECKS[file.parent.name, kind](data)


def test_every_known_kind_is_checked_here_or_elsewhere() -> None:
    for folder in CHECKED:
        for file in folder_files(folder):
            kind, _ = load(file)
            assert kind in CHECKED[folder] + OTHERS.get(folder, ()), file
    assert set(CHECKS) == {(folder, kind) for folder, kinds in CHECKED.items() for kind in kinds}


@pytest.mark.parametrize("folder", CHECKED)
def test_unknown_files_and_arrays_are_errors(folder: str, tmp_path: Path) -> None:
    root = tmp_path / folder
    root.mkdir()
    victim = next(file for file in folder_files(folder) if file.suffix == ".npz")
    arrays = dict(np.load(victim))
    np.savez(root / "more.npz", **arrays, mystery=np.zeros(2))
    np.savez(root / "fewer.npz", **dict(list(arrays.items())[1:]))
    np.savez(root / "foreign.npz", mystery=np.zeros(2))
    (root / "planted.json").write_text('{"mystery": 1}')
    (root / "planted.txt").write_text("")
    for file in folder_files(folder, tmp_path):
        with pytest.raises(GoldenError):
            load(file)
