"""Published vectors of the methods for several subjects, through applied methods.

Folders freecustom, magicface, ir-diffusion, consistory, storydiffusion, shared-attention, every file: attention through
a diffusers attention module that `gensparse.apply` changed, once with the plans of the method and once with their dense
masks; maps, masks, features and norms through the functions and hooks that the methods use.
"""

import shutil
from collections.abc import Callable
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_files import GoldenError, folder_files, golden_params, golden_root, load
from one_block import SITE, OneBlock, layer, one_block_family, picking, run
from torch import Tensor, nn

import gensparse
from gensparse import Concept, Subjects
from gensparse.attach import Handle
from gensparse.kernels import reference
from gensparse.methods import (
    ConsiStory,
    FreeCustom,
    IsolationReposition,
    MagicFace,
    MasaCtrl,
    Method,
    StoryDiffusion,
    StyleAligned,
    TokenFlow,
)
from gensparse.methods.consistory_run import ConsiStoryRun
from gensparse.methods.magicface_run import Segments
from gensparse.methods.subject_views import StoryRun
from gensparse.processors import shared
from gensparse.subjects.masks import to_grid, token_mask
from gensparse.subjects.reposition import reposition
from gensparse.subjects.segmentation import balanced, foreground_maps, guidance_rate, segment, spread_maps
from gensparse.subjects.similarity import OWN, inject, nearest_tokens, smoothed, subject_masks

FOLDERS = ("freecustom", "magicface", "ir-diffusion", "consistory", "storydiffusion", "shared-attention")
PATHS = ("plan", "dense_mask")

Arrays = dict[str, np.ndarray]
Patch = pytest.MonkeyPatch


# ------------------------------------------------------------------------------------------------------------- helpers
def close(got: Tensor, expected: np.ndarray, atol: float = 1e-5) -> None:
    np.testing.assert_allclose(got.detach().numpy(), expected, rtol=0, atol=atol)


def tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def by_dense_mask(q: Tensor, k: Tensor, v: Tensor, plan: Any, **options: Any) -> Tensor:
    """`sparse_attention` as the oracle computes it, from the dense mask of the plan's pattern."""
    bias = options.get("key_bias")
    bias = q.new_zeros(1, 1, plan.keys) if bias is None else bias
    for source in plan.sources:
        more = options["sources"][source.name]
        k, v = torch.cat([k, more[0]], 1), torch.cat([v, more[1]], 1)
    allowed = torch.from_numpy(plan.pattern.dense_mask(plan.layout, plan.data))
    return reference.attend(q, k, v, allowed, scale=options.get("scale"), key_bias=bias)[0]


class Layer:
    """A model of one attention layer with a method on it."""

    def __init__(
        self,
        method: Method,
        own: nn.Module | None = None,
        cross: nn.Module | None = None,
        *,
        subjects: Subjects | None = None,
    ) -> None:
        self.model = OneBlock(own, cross).eval()
        self.handle: Handle = gensparse.apply(self.model, method, strict=True, subjects=subjects)

    @property
    def loaded(self) -> Any:
        return self.handle._attachments[0].loaded

    def __call__(self, sample: Tensor, grid: tuple[int, int], step: int = 0, **more: Any) -> Tensor:
        return run(self.model, sample, grid, step, **more)


def picked(arrays: Arrays, method: Method, order: list[int], **settings: Any) -> tuple[Layer, Tensor]:
    """A layer for files with q, k and v [items, heads, N, D], and its input, the items of a half in another order."""
    q, k, v = (tensor(arrays[name]).transpose(1, 2).flatten(2) for name in "qkv")
    heads, dim = arrays["q"].shape[1], arrays["q"].shape[3]
    sample = ordered(torch.cat([q, k, v], -1), order)
    return Layer(method, picking(heads, dim), **settings), sample


def ordered(x: Tensor, order: list[int]) -> Tensor:
    """The items of both halves in another order."""
    return x.unflatten(0, (2, -1))[:, order].flatten(0, 1)


def back(x: Tensor, order: list[int]) -> Tensor:
    return ordered(x, [order.index(n) for n in range(len(order))])


def references_first(arrays: Arrays) -> list[int]:
    """From files whose first item is the generated picture."""
    count = len(arrays["ref_masks"])
    return [*range(1, count + 1), 0]


# -------------------------------------------------------------------------------------------------------------- checks
def check_mrsa(arrays: Arrays, patch: Patch) -> None:
    grid, order = tuple(arrays["grid"].tolist()), references_first(arrays)
    weights = tuple(float(w) for w in arrays["mask_weights"])
    masks = tensor(arrays["ref_masks"] * (arrays["mask_weights"] != 0)[:, None, None].astype(np.uint8))
    layers = to_grid(masks, grid).flatten(1) * tensor(arrays["mask_weights"])[:, None]
    close(layers, arrays["layer_bias"], 0)
    method = FreeCustom(weights=weights, style_fidelity=float(arrays["style_fidelity"]), layers="all", halves=2)
    subjects = Subjects([Concept(f"concept{n}", mask=mask) for n, mask in enumerate(masks)])
    model, sample = picked(arrays, method, order, subjects=subjects)
    close(back(model(sample, grid), order), arrays["out"])
    assert model.handle.report()["calls"] == {"sparse": 1, "dense": {}}
    check_bank(arrays, method, subjects, order, grid)


def check_bank(arrays: Arrays, method: Method, subjects: Subjects, order: list[int], grid: tuple[int, int]) -> None:
    """References written by a run of their own, then read by the generated picture alone, give the same."""
    model, sample = picked(arrays, method, order, subjects=subjects)
    halves = sample.unflatten(0, (2, -1))
    with model.handle.writing(keep_on="cpu"):
        alone = model(halves[:, :-1].flatten(0, 1), grid)
    expected = tensor(arrays["out"]).unflatten(0, (2, -1))
    close(alone.unflatten(0, (2, -1)), expected[:, 1:].numpy())
    close(model(halves[:, -1], grid), expected[:, 0].numpy())


def check_magicface(arrays: Arrays, patch: Patch) -> None:
    grid, order = tuple(arrays["grid"].tolist()), references_first(arrays)
    step, last = int(arrays["step"]), int(arrays["inject_step"])
    weights = tuple(float(w) for w in arrays["mask_weights"])
    subjects = Subjects(
        [
            Concept(f"concept{n}", mask=mask, tokens=[int(word)])
            for n, (mask, word) in enumerate(zip(arrays["ref_masks"], arrays["ref_index"], strict=True))
        ]
    )
    method = MagicFace(weights=weights, inject_step=last, layers="all", halves=2)
    model, sample = picked(arrays, method, order, subjects=subjects)
    for earlier in range(step):
        model(sample, grid, earlier)
    found = tensor(arrays["semantic_map"]).bool()
    regions = [to_grid(found[word], grid) for word in arrays["ref_index"].tolist()]
    np.testing.assert_array_equal(torch.stack(regions), arrays["region_mask"].astype(bool))
    model.loaded._segments = Segments(found[None], torch.ones_like(found[:1]))
    close(back(model(sample, grid, step), order), arrays["out"])
    assert model.loaded.method.regional(gensparse.methods.At(step=step)) == (step > last)


def check_segmentation(arrays: Arrays, patch: Patch) -> None:
    size = int(arrays["latent_size"])
    words, damping = arrays["ref_index"].tolist(), int(arrays["ca_scale_x100"]) / 100
    half = (size // 2, size // 2)
    told, front = [], []
    ratios = sorted(int(name[1:].removesuffix("_self")) for name in arrays if name.endswith("_self"))
    for ratio in ratios:
        grid = (size // ratio, size // ratio)
        for own, cross in zip(tensor(arrays[f"r{ratio}_self"]), tensor(arrays[f"r{ratio}_cross"]), strict=True):
            maps = spread_maps(lambda x, own=own: own @ x, cross)
            front.append(foreground_maps(maps[:1], grid, half)[0])
            told.append(balanced(maps[1:], grid, half)[0])
    found, shown = segment(torch.stack(told).mean(0), torch.stack(front).mean(0), words, damping)
    np.testing.assert_array_equal(found, arrays["semantic_map"].astype(bool))
    np.testing.assert_array_equal(shown, arrays["foreground"].astype(bool))
    noise = (tensor(arrays[name])[0] for name in ("noise_uncond", "noise_text"))
    close(guidance_rate(*noise, found, shown, float(arrays["guidance_scale"])), arrays["rate"])


def check_ir(arrays: Arrays, patch: Patch) -> None:
    grid = tuple(arrays["grid"].tolist())
    for name in ("source_mask", "target_mask"):
        for pixels, published in zip(arrays[f"{name}_px"], arrays[name], strict=True):
            share = to_grid(tensor(pixels).float() / 255, grid, "bilinear").flatten()
            for mask in (tensor(published).bool(), token_mask(tensor(pixels), grid).flatten()):
                assert mask[share == 1].all()
                assert not mask[share == 0].any()
    masks = zip(arrays["source_mask"], arrays["target_mask"], strict=True)
    subjects = Subjects(
        [Concept(f"subject{n}", mask=a.reshape(grid), region=b.reshape(grid)) for n, (a, b) in enumerate(masks)]
    )
    moves = [
        reposition(*(tensor(mask).bool().view(grid) for mask in pair))
        for pair in zip(arrays["source_mask"], arrays["target_mask"], strict=True)
    ]
    hidden, moved = (tensor(arrays[name]).unflatten(0, (2, -1)) for name in ("rep_hidden", "rep_moved_hidden"))
    for number, move in enumerate(moves):
        for half in range(2):
            close(move.of(hidden[half, number]), moved[half, number].numpy(), 1e-6)
        np.testing.assert_array_equal(move.of(torch.ones(grid[0] * grid[1])), arrays["repositioned_mask"][number])
    np.testing.assert_array_equal(hidden[:, len(moves)], moved[:, len(moves)])

    def method(layers: str) -> IsolationReposition:
        bias, cross = float(arrays["rep_ref_bias"]), float(arrays["mca_lambda"])
        return IsolationReposition(dropout=0.0, bias=bias, cross=cross, halves=2, layers=layers)

    apart = Layer(method("isolated"), layer(arrays, "iso_"), subjects=subjects)
    close(apart(tensor(arrays["iso_hidden"]), grid), arrays["iso_out"])
    whole = Layer(method("all"), layer(arrays, "rep_"), subjects=subjects)
    close(whole(tensor(arrays["rep_hidden"]), grid), arrays["rep_out"])
    text = {"encoder_hidden_states": tensor(arrays["mca_context"])}
    both = Layer(method("all"), None, layer(arrays, "mca_"), subjects=subjects)
    close(both(tensor(arrays["mca_hidden"]), grid, **text), arrays["mca_out"])


def check_sdsa(arrays: Arrays, patch: Patch) -> None:
    mapping, masks = arrays["extended_mapping"].astype(bool), arrays["subject_mask"].astype(bool)
    images, tokens = masks.shape
    others = mapping & ~np.eye(images, dtype=bool)
    anchors = int(others.any(axis=0).sum())
    if not anchors or not (others == (np.arange(images) < anchors) & ~np.eye(images, dtype=bool)).all():
        anchors = images  # a mapping that the method itself never has
        patch.setattr(ConsiStoryRun, "sees", lambda _run, picture, anchor: bool(others[picture, anchor]))
    kept = [tensor(np.flatnonzero(mask)) for mask in masks]
    patch.setattr(ConsiStoryRun, "kept", lambda *_: kept)
    patch.setattr(ConsiStoryRun, "_masks_known", True)
    patch.setattr(ConsiStory, "share_of_plain", lambda *_: 0.0)
    subjects = Subjects(Concept("subject", tokens=[1]))
    method = ConsiStory(anchors=anchors, layers="all", halves=2, inject=0.0)
    model = Layer(method, layer(arrays), subjects=subjects)
    if "vanilla_query" in arrays:
        heads = int(arrays["heads"])
        model.loaded._queries = {SITE: tensor(arrays["vanilla_query"]).unflatten(-1, (heads, -1))}
        blend = float(arrays["blend"])
        patch.setattr(ConsiStory, "share_of_plain", lambda *_: blend)
        patch.setattr(ConsiStoryRun, "begin", type(model.loaded).__mro__[1].begin)  # without a plain call of its own
    close(model(tensor(arrays["hidden"]), (1, tokens)), arrays["out"])


def check_feature_injection(arrays: Arrays, patch: Patch) -> None:
    features, masks = tensor(arrays["features"]), tensor(arrays["subject_mask"]).bool()
    close(smoothed(features), arrays["features_smoothed"])
    side = isqrt(masks.shape[1])
    mapping = tensor(arrays["extended_mapping"]).bool()
    index, distance = nearest_tokens(smoothed(features), masks, mapping, (side, side))
    apart = ~np.eye(len(masks), dtype=bool) & arrays["extended_mapping"].astype(bool)
    np.testing.assert_array_equal(index.numpy()[apart], arrays["nn_map"][apart])
    close(distance[tensor(apart)], arrays["nn_dist"][apart])
    assert (arrays["nn_dist"][np.eye(len(masks), dtype=bool)] == OWN).all()
    out = inject(tensor(arrays["attn_out"]), index, distance, masks, float(arrays["alpha"]))
    close(out, arrays["attn_out_injected"])


def check_subject_mask(arrays: Arrays, patch: Patch) -> None:
    side = isqrt(arrays["cross_attn"].shape[2])
    sizes = [(side, side), (2 * side, 2 * side)]
    found = subject_masks(tensor(arrays["cross_attn"]), arrays["token_indices"].tolist(), (side, side), sizes)
    for mask, name in zip(found, ("mask_lo", "mask_hi"), strict=True):
        np.testing.assert_array_equal(mask, arrays[name].astype(bool))


def check_story(arrays: Arrays, patch: Patch) -> None:
    grid = tuple((arrays["size"] // 32).tolist())
    images, tokens = int(arrays["id_length"]), grid[0] * grid[1]
    sees = arrays["key_mask"].reshape(images + 1, images + 1, tokens).astype(bool)
    if not all(sees[i, i].all() for i in range(images + 1)):
        raise GoldenError("an image does not see all of itself")
    for source in range(images):
        if len({sees[i, source].tobytes() for i in range(images + 1) if i != source}) != 1:
            raise GoldenError("the images see different samples of one image")
    assert 0 < float(arrays["sa_rate"]) <= 1
    sample = [tensor(np.flatnonzero(sees[images, source])) for source in range(images)]
    patch.setattr(StoryRun, "_sample", lambda *_: sample)
    method = StoryDiffusion(rate=float(arrays["sa_rate"]), start=0, gate=1.0, late_gate=1.0, layers="all", halves=2)
    model = Layer(method, layer(arrays))
    with model.handle.writing():
        close(model(tensor(arrays["hidden_write"]), grid), arrays["out_write"])
    close(model(tensor(arrays["hidden_read"]), grid), arrays["out_read"])


def check_stylealigned(arrays: Arrays, patch: Patch) -> None:
    flags = {name: bool(arrays[f"adain_{name}"]) for name in ("queries", "keys", "values")}
    method = StyleAligned(
        **flags,
        share=bool(arrays["share_attention"]),
        full=bool(arrays["full_attention_share"]),
        scale=float(arrays["shared_score_scale"]),
        shift=float(arrays["shared_score_shift"]),
        halves=2,
    )
    hidden = tensor(arrays["hidden"])
    close(Layer(method, layer(arrays))(hidden, (1, hidden.shape[1])), arrays["out"])


def check_groupnorm(arrays: Arrays, patch: Patch) -> None:
    x = tensor(arrays["x"])
    norm = nn.GroupNorm(int(arrays["groups"]), x.shape[1], eps=float(arrays["eps"]))
    with torch.no_grad():
        norm.weight.copy_(tensor(arrays["weight"]))
        norm.bias.copy_(tensor(arrays["bias"]))
    model = OneBlock()
    model.add_module("norm", norm)
    plain = norm(x)
    handle = gensparse.apply(model, StyleAligned(group_norm=True, halves=2))
    run(model, torch.zeros(len(x), 6, 6), (2, 3))  # from which the batch is known
    close(norm(x), arrays["out"])
    handle.remove()
    assert torch.equal(norm(x), plain)


def check_masactrl(arrays: Arrays, patch: Patch) -> None:
    side = isqrt(arrays["q"].shape[2])
    masks = {}
    if "mask_source" in arrays:
        masks = {"mask": arrays["mask_source"], "region": arrays["mask_target"]}
    model, sample = picked(
        arrays, MasaCtrl(start=0, layers="all", halves=2), [0, 1], subjects=Subjects(Concept("it", **masks))
    )
    close(model(sample, (side, side)), arrays["out"])


def check_tokenflow(arrays: Arrays, patch: Patch) -> None:
    hidden = tensor(arrays["hidden"])
    inject_ = bool(arrays["inject_source_qk"])
    method = TokenFlow(source=True, inject=1 if inject_ else 0, inject_layers="all", halves=2)
    close(Layer(method, layer(arrays))(hidden, (1, hidden.shape[1])), arrays["out"])


CHECKS: dict[tuple[str, str], Callable[[Arrays, Patch], None]] = {
    ("freecustom", "mrsa"): check_mrsa,
    ("magicface", "attention"): check_magicface,
    ("magicface", "segmentation"): check_segmentation,
    ("ir-diffusion", "attention"): check_ir,
    ("consistory", "sdsa"): check_sdsa,
    ("consistory", "feature_injection"): check_feature_injection,
    ("consistory", "subject_mask"): check_subject_mask,
    ("storydiffusion", "attention"): check_story,
    ("shared-attention", "stylealigned"): check_stylealigned,
    ("shared-attention", "groupnorm"): check_groupnorm,
    ("shared-attention", "masactrl"): check_masactrl,
    ("shared-attention", "tokenflow"): check_tokenflow,
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("file", golden_params(*FOLDERS))
def test_published_outputs(file: Path, path: str, monkeypatch: Patch) -> None:
    kind, arrays = load(file)
    if (file.parent.name, kind) not in CHECKS:
        raise GoldenError(f"{file}: no check for kind {kind}")
    if path == "dense_mask":
        monkeypatch.setattr(shared, "sparse_attention", by_dense_mask)
    with one_block_family():
        CHECKS[file.parent.name, kind](arrays, monkeypatch)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_foreign_file_fails(folder: str, tmp_path: Path, monkeypatch: Patch) -> None:
    copy = tmp_path / folder
    copy.mkdir()
    shutil.copyfile(folder_files(folder)[0], copy / "known.npz")
    np.savez(copy / "planted.npz", mystery=np.zeros(3))
    monkeypatch.setenv("GENSPARSE_GOLDEN", str(tmp_path))
    assert golden_root() == tmp_path
    params = {param.values[0].name: param.values[0] for param in golden_params(folder)}
    assert set(params) == {"known.npz", "planted.npz"}
    with pytest.raises(GoldenError, match="match none"):
        test_published_outputs(params["planted.npz"], "plan", monkeypatch)
