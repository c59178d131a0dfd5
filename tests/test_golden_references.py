"""Published reference attention and regional masks through every CPU path.

Folders freecustom, magicface, consistory, storydiffusion, ir-diffusion, shared-attention, regional-prompting: the parts
that are attention over segments.
"""

import os
import shutil
import subprocess
import sys
from math import isqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_files import GoldenError, folder_files, golden_params, golden_root, load
from torch import Tensor

from gensparse.attention import explain, sparse_attention
from gensparse.kernels import reference
from gensparse.layout import Layout, Segment
from gensparse.patterns import Blocks, Isolation, Pattern, PerHead, Policy, Reference, References, Regions
from gensparse.plan import build_plan
from gensparse.subjects.masks import last_wins, to_grid
from gensparse.subjects.regions import couple_weights, region_sum
from gensparse.subjects.style import adain, style_keys

PATHS = ("reference", "plan_loop", "auto")
OWN = Policy((("target", "target"),))
ITSELF = Policy((("reference", "itself"),))

CHECKED = {
    "freecustom": ("mrsa",),
    "magicface": ("attention",),
    "consistory": ("sdsa",),
    "storydiffusion": ("attention",),
    "ir-diffusion": ("attention",),  # its mca_* arrays are cross-attention to another item's text
    "shared-attention": ("stylealigned", "masactrl", "tokenflow"),
    "regional-prompting": ("flux_mask", "unet_couple"),
}
# Known files that hold no attention over segments: what is computed from attention maps or features, norms shared
# between items, losses on maps, and sums of whole model calls.
OTHERS = {
    "magicface": ("segmentation",),
    "consistory": ("feature_injection", "subject_mask"),
    "shared-attention": ("groupnorm",),
    "regional-prompting": ("multidiffusion", "boxdiff"),
}


class Path3:
    """One of the three ways from q, k, v to the output: the oracle with its dense mask, or the plan on a backend."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, q, k, v, pattern: Pattern, layout: Layout, data=None, sources=None, groups=None, key_bias=None):
        """out [B, N, H, D]."""
        data, sources = data or {}, sources or {}
        if self.name == "reference":
            return self._oracle(q, k, v, pattern, layout, data, sources, groups, key_bias)
        plan = build_plan(pattern, layout, data=data)
        backend = None if self.name == "auto" else self.name
        assert backend is None or explain(plan, q)[backend] is None
        options = {"sources": sources or None, "groups": groups, "key_bias": key_bias, "backend": backend}
        return sparse_attention(q, k, v, plan, **options)

    def _oracle(self, q, k, v, pattern, layout, data, sources, groups, key_bias) -> Tensor:
        found = pattern.bind(layout, data).sources
        assert {source.name for source in found} == set(sources)
        bias = q.new_zeros(1, 1, layout.tokens) if key_bias is None else key_bias
        for source in found:
            more = sources[source.name]
            k, v = torch.cat([k, more[0]], 1), torch.cat([v, more[1]], 1)
            bias = torch.cat([bias, bias.new_full((1, 1, source.segment.length), source.bias)], -1)
        allowed = torch.from_numpy(pattern.dense_mask(layout, data))
        return reference.attend(q, k, v, allowed, groups=groups, key_bias=bias)[0]


def close(got: Tensor, expected: np.ndarray, atol: float = 1e-5) -> None:
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=atol)


def tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array)


def menu(*entries: int) -> Tensor:
    """The same entry of the menu for all heads of a sample."""
    return torch.tensor(entries)[:, None]


def qkv(arrays: dict) -> list[Tensor]:
    """[items, N, H, D] from [items, H, N, D]."""
    return [tensor(arrays[name]).transpose(1, 2) for name in "qkv"]


def projected(arrays: dict, hidden: str = "hidden", prefix: str = "") -> list[Tensor]:
    """q, k, v [items, N, H, D] of a layer's input."""
    x, heads = tensor(arrays[hidden]), int(arrays["heads"])
    return [(x @ tensor(arrays[f"{prefix}w_{name}"]).T).unflatten(-1, (heads, -1)) for name in "qkv"]


def output(out: Tensor, arrays: dict, prefix: str = "") -> Tensor:
    """After the output projection, [items, N, C]."""
    return out.flatten(2) @ tensor(arrays[f"{prefix}w_o"]).T + tensor(arrays[f"{prefix}b_o"])


def halves(x: Tensor) -> Tensor:
    return x.unflatten(0, (2, -1))


def numpy_masks(prefix: str, masks: Tensor) -> dict[str, np.ndarray]:
    return {f"{prefix}{number}": mask.numpy() for number, mask in enumerate(masks)}


def check_freecustom(arrays: dict, attend: Path3) -> None:
    grid = tuple(arrays["grid"].tolist())
    masks = to_grid(tensor(arrays["ref_masks"]), grid)
    weights = arrays["mask_weights"].tolist()
    bias = masks.flatten(1) * tensor(arrays["mask_weights"])[:, None]
    close(bias, arrays["layer_bias"], 0)
    kept = numpy_masks("keys", bias != 0)  # a weight of 0 blocks its reference in the published code
    fidelity = float(arrays["style_fidelity"])
    out = shared_with_references(arrays, attend, grid, weights, kept)
    mixed = (1 - fidelity) * out["shared"][0] + fidelity * out["plain"][0]
    expected = halves(tensor(arrays["out"])).numpy()
    close(mixed.flatten(-2), expected[0, 0])
    close(out["shared"][1].flatten(-2), expected[1, 0])
    close(out["references"].flatten(-2), expected[:, 1:])


def check_magicface(arrays: dict, attend: Path3) -> None:
    grid = tuple(arrays["grid"].tolist())
    regions = to_grid(tensor(arrays["semantic_map"][arrays["ref_index"]]), grid)
    np.testing.assert_array_equal(regions, arrays["region_mask"])
    kept = numpy_masks("keys", to_grid(tensor(arrays["ref_masks"]), grid).flatten(1))
    seen = numpy_masks("region", last_wins(regions).flatten(1)) if arrays["step"] > arrays["inject_step"] else {}
    out = shared_with_references(arrays, attend, grid, arrays["mask_weights"].tolist(), kept | seen)
    expected = halves(tensor(arrays["out"])).numpy()
    close(out["plain"][0].flatten(-2), expected[0, 0])
    close(out["shared"][1].flatten(-2), expected[1, 0])
    close(out["references"].flatten(-2), expected[:, 1:])


def shared_with_references(arrays: dict, attend: Path3, grid, weights: list[float], data: dict) -> dict[str, Tensor]:
    """Outputs of the target with and without references [halves, N, H, D], and of the references.

    References come as sources, and once more as segments of one sequence, where a key bias gives the same since they
    see nothing but themselves.
    """
    q, k, v = (halves(x) for x in qkv(arrays))
    count = len(weights)
    regions = [f"region{i}" if f"region{i}" in data else "" for i in range(count)]
    entries = [Reference(f"ref{i}", grid, bias=weights[i], keys=f"keys{i}", queries=regions[i]) for i in range(count)]
    pattern = PerHead((OWN, OWN | References(entries)))
    sources = {f"ref{i}": (k[:, i + 1], v[:, i + 1]) for i in range(count)}
    own = [x[:, 0] for x in (q, k, v)]
    picture = Layout.image(*grid)
    each = attend(*own, pattern, picture, data, sources, menu(0, 1))
    both = attend(*own, pattern, picture, data, sources, menu(1, 1))
    torch.testing.assert_close(both[1], each[1], rtol=0, atol=1e-6)

    joint = Layout.joint((1, *grid), references=[(1, *grid)] * count)
    segments = [Reference(f"reference{i}", keys=f"keys{i}", queries=regions[i]) for i in range(count)]
    tokens = grid[0] * grid[1]
    bias = torch.repeat_interleave(torch.tensor([0.0, *weights]), tokens)[None, None]
    sequence = [x.flatten(1, 2) for x in (q, k, v)]
    pattern = PerHead((OWN | ITSELF, OWN | ITSELF | References(segments)))
    joined = attend(*sequence, pattern, joint, data, groups=menu(0, 1), key_bias=bias).unflatten(1, (-1, tokens))
    torch.testing.assert_close(joined[:, 0], each, rtol=0, atol=1e-5)
    plain = attend(*own, OWN, picture)
    torch.testing.assert_close(each[0], plain[0], rtol=0, atol=1e-6)
    return {"plain": plain, "shared": both, "references": joined[:, 1:]}


def check_consistory(arrays: dict, attend: Path3) -> None:
    q, k, v = projected(arrays)
    if "vanilla_query" in arrays:
        blend = float(arrays["blend"])
        q = blend * tensor(arrays["vanilla_query"]).unflatten(-1, q.shape[2:]) + (1 - blend) * q
    mapping = arrays["extended_mapping"].astype(bool)
    images, tokens = arrays["subject_mask"].shape
    data = {f"subject{j}": arrays["subject_mask"][j] for j in range(images)}
    entries = [Reference(f"image{j}", length=tokens, keys=f"subject{j}") for j in range(images)]
    out = every_image(q, k, v, attend, mapping, lambda i, j: entries[j], Layout((Segment("target", tokens),)), data)
    close(output(out, arrays), arrays["out"])


def every_image(q, k, v, attend: Path3, mapping: np.ndarray, entry, layout: Layout, data: dict) -> Tensor:
    """Every image of both halves as a sample that sees itself and the images its row of `mapping` names."""
    images = len(mapping)
    others = [[entry(i, j) for j in range(images) if j != i and mapping[i, j]] for i in range(images)]
    used = {reference.name: j for row in others for reference in row for j in [int(reference.name[5:])]}
    pattern = PerHead(tuple(OWN | References(row) if row else OWN for row in others))
    sources = {name: tuple(halves(x)[:, j].repeat_interleave(images, 0) for x in (k, v)) for name, j in used.items()}
    return attend(q, k, v, pattern, layout, data, sources, menu(*range(images), *range(images)))


def check_storydiffusion(arrays: dict, attend: Path3) -> None:
    height, width = (arrays["size"] // 32).tolist()
    images, tokens = int(arrays["id_length"]), height * width
    sees = arrays["key_mask"].reshape(images + 1, images + 1, tokens)
    if not all(sees[i, i].all() for i in range(images + 1)):
        raise GoldenError("an image does not see all of itself")
    data = {f"{i}_{j}": sees[i, j] for i in range(images + 1) for j in range(images)}
    layout = Layout.image(height, width)

    def entry(i: int, j: int) -> Reference:
        return Reference(f"image{j}", (height, width), keys=f"{i}_{j}")

    q, k, v = projected(arrays, "hidden_write")
    out = every_image(q, k, v, attend, np.ones((images, images), bool), entry, layout, data)
    close(output(out, arrays), arrays["out_write"])
    new = projected(arrays, "hidden_read")
    sources = {f"image{j}": (halves(k)[:, j], halves(v)[:, j]) for j in range(images)}
    pattern = OWN | References(tuple(entry(images, j) for j in range(images)))
    close(output(attend(*new, pattern, layout, data, sources), arrays), arrays["out_read"])


def check_ir_diffusion(arrays: dict, attend: Path3) -> None:
    grid = tuple(arrays["grid"].tolist())
    targets, moved = arrays["target_mask"].astype(bool), arrays["repositioned_mask"]
    if targets.sum(0).max() > 1:
        raise GoldenError("target masks overlap")
    count = len(targets)
    layout = Layout.image(*grid)
    subjects = (targets * np.arange(1, count + 1)[:, None]).sum(0)
    pattern = PerHead((OWN, OWN & Isolation("subjects")))
    items = menu(*(2 * [*count * [0], 1]))
    out = attend(*projected(arrays, "iso_hidden", "iso_"), pattern, layout, {"subjects": subjects}, groups=items)
    close(output(out, arrays, "iso_"), arrays["iso_out"])

    q, k, v = projected(arrays, "rep_hidden", "rep_")
    _, moved_k, moved_v = projected(arrays, "rep_moved_hidden", "rep_")
    bias = float(arrays["rep_ref_bias"])
    entries = tuple(Reference(f"ref{i}", grid, bias=bias, keys=f"moved{i}", queries=f"at{i}") for i in range(count))
    data = {"subjects": subjects} | {f"at{i}": targets[i] for i in range(count)}
    data |= {f"moved{i}": moved[i] for i in range(count)}
    sources = {f"ref{i}": (halves(moved_k)[:, i], halves(moved_v)[:, i]) for i in range(count)}
    own = [halves(x)[:, -1] for x in (q, k, v)]
    out = halves(attend(q, k, v, OWN, layout)).clone()
    out[:, -1] = attend(*own, (OWN & Isolation("subjects")) | References(entries), layout, data, sources)
    close(output(out.flatten(0, 1), arrays, "rep_"), arrays["rep_out"])


def check_stylealigned(arrays: dict, attend: Path3) -> None:
    q, k, v = projected(arrays)
    items, tokens = len(q) // 2, q.shape[1]
    if arrays["full_attention_share"]:
        layout = Layout((Segment("target", items * tokens),))
        out = attend(*(halves(x).flatten(1, 2) for x in (q, k, v)), OWN, layout)
        close(output(out.reshape(q.shape), arrays), arrays["out"])
        return
    flags = (arrays[f"adain_{name}"] for name in ("queries", "keys", "values"))
    q, k, v = (adain(x, items) if flag else x for x, flag in zip((q, k, v), flags, strict=True))
    layout = Layout((Segment("target", tokens),))
    if arrays["share_attention"]:
        style = Reference("style", length=tokens, bias=float(arrays["shared_score_shift"]))
        sources = {"style": (style_keys(k, items, float(arrays["shared_score_scale"])), style_keys(v, items))}
        out = attend(q, k, v, OWN | References((style,)), layout, sources=sources)
    else:
        out = attend(q, k, v, OWN, layout)
    close(output(out, arrays), arrays["out"])


def check_masactrl(arrays: dict, attend: Path3) -> None:
    """Source and target in one sequence; the target sees the source and not itself."""
    sequence = [halves(x).flip(1).flatten(1, 2) for x in qkv(arrays)]  # the target first
    tokens = sequence[0].shape[1] // 2
    grid = (1, isqrt(tokens), isqrt(tokens))
    layout = Layout.joint(grid, references=[Segment("reference", tokens, grid, "source")])
    data, sees = {}, (Reference("source"),)
    if "mask_source" in arrays:
        masks = [to_grid(tensor(arrays[f"mask_{name}"]), grid[1:]).bool().numpy() for name in ("source", "target")]
        data = {"keys1": masks[0], "keys0": ~masks[0], "queries1": masks[1], "queries0": ~masks[1]}
        sees = tuple(Reference("source", keys=f"keys{side}", queries=f"queries{side}") for side in (0, 1))
    out = attend(*sequence, References(sees) | ITSELF, layout, data).unflatten(1, (2, tokens))
    close(out.flip(1).flatten(0, 1).flatten(2), arrays["out"])


def check_tokenflow(arrays: dict, attend: Path3) -> None:
    """Source frames see themselves, frames of the other groups all frames of their group."""
    q, k, v = (x.unflatten(0, (3, -1)) for x in projected(arrays))
    if arrays["inject_source_qk"]:
        q, k = (x[:1].expand_as(x) for x in (q, k))
    frames, tokens = q.shape[1:3]
    layout = Layout.video(frames, 1, tokens)
    pattern = PerHead((Blocks((1, 1, tokens)), OWN))
    out = attend(*(x.flatten(1, 2) for x in (q, k, v)), pattern, layout, groups=menu(0, 1, 1))
    close(output(out.reshape(3 * frames, tokens, *out.shape[2:]), arrays), arrays["out"])


def check_flux_mask(arrays: dict, attend: Path3) -> None:
    height, width = arrays["image_size"].tolist()
    grid = tuple(arrays["token_grid"].tolist())
    assert grid == (height // 16, width // 16)
    y, x = np.mgrid[:height, :width]
    boxes = [(x >= x0) & (x < x1) & (y >= y0) & (y < y1) for x0, y0, x1, y1 in arrays["regions_xyxy"].tolist()]
    np.testing.assert_array_equal(np.stack(boxes), arrays["region_masks"])
    masks = to_grid(tensor(arrays["region_masks"]), grid, "nearest-exact").numpy()
    lengths = (int(arrays["text_len"]),) * len(masks)
    layout = Layout.image(*grid, text=sum(lengths))
    pattern = Regions(lengths, "regions")
    expected = arrays["expected_mask"]
    np.testing.assert_array_equal(pattern.dense_mask(layout, {"regions": masks}), expected[None])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, len(expected), 3, 8, generator=generator) for _ in range(3))
    want, _ = reference.attend(q, k, v, tensor(expected))
    close(attend(q, k, v, pattern, layout, {"regions": masks}), want.numpy())


def check_unet_couple(arrays: dict, attend: Path3) -> None:
    grid = tuple(arrays["grid"].tolist())
    weights = couple_weights(tensor(arrays["region_masks"]), float(arrays["base_weight"]), grid)
    close(weights, arrays["expected_weights"], 1e-6)
    texts = sorted((name for name in arrays if name.startswith("region_text_")), key=lambda name: int(name[12:]))
    assert [int(name[12:]) for name in texts] == list(range(len(weights) - 1))
    heads = int(arrays["heads"])

    def project(x: Tensor, name: str) -> Tensor:
        return (x @ tensor(arrays[name]).T).unflatten(-1, (heads, -1))

    def text(name: str) -> tuple[Tensor, Tensor]:
        return project(tensor(arrays[name]), "to_k"), project(tensor(arrays[name]), "to_v")

    def cross(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Cross-attention as references that are all the queries see."""
        pattern = References((Reference("text", length=k.shape[1]),))
        unseen = torch.full_like(q, 7.0)
        return attend(q, unseen, unseen, pattern, Layout.image(*grid), sources={"text": (k, v)})

    plain, regional = halves(project(tensor(arrays["hidden"]), "to_q"))
    out = torch.cat(
        [
            cross(plain, *text("uncond")),
            region_sum(regional, [text(name) for name in ("base_text", *texts)], weights, cross),
        ]
    )
    out = out.flatten(2) @ tensor(arrays["to_out_w"]).T + tensor(arrays["to_out_b"])
    close(out, arrays["expected"], 2e-5)


CHECKS = {
    ("freecustom", "mrsa"): check_freecustom,
    ("magicface", "attention"): check_magicface,
    ("consistory", "sdsa"): check_consistory,
    ("storydiffusion", "attention"): check_storydiffusion,
    ("ir-diffusion", "attention"): check_ir_diffusion,
    ("shared-attention", "stylealigned"): check_stylealigned,
    ("shared-attention", "masactrl"): check_masactrl,
    ("shared-attention", "tokenflow"): check_tokenflow,
    ("regional-prompting", "flux_mask"): check_flux_mask,
    ("regional-prompting", "unet_couple"): check_unet_couple,
}


def checked_params() -> list:
    return [param for folder, kinds in CHECKED.items() for param in golden_params(folder, kinds=kinds)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("file", checked_params())
def test_published_outputs(file, path):
    kind, arrays = load(file)
    if (file.parent.name, kind) not in CHECKS:
        raise GoldenError(f"{file}: no check for kind {kind}")
    CHECKS[file.parent.name, kind](arrays, Path3(path))


def test_every_known_kind_is_checked_here_or_listed_as_another_matter():
    for folder in CHECKED:
        for file in folder_files(folder):
            kind, _ = load(file)
            assert kind in CHECKED[folder] + OTHERS.get(folder, ()), file
    assert set(CHECKS) == {(folder, kind) for folder, kinds in CHECKED.items() for kind in kinds}


def plant_unknown_files(root: Path) -> set[str]:
    """One fault per folder: foreign arrays, a missing or an extra array, a foreign file type."""
    np.savez(root / "freecustom" / "planted.npz", mystery=np.zeros(3))
    np.savez(root / "magicface" / "planted.npz", r2_self=np.zeros(3))
    (root / "consistory" / "planted.json").write_text("{}")
    (root / "regional-prompting" / "planted.txt").write_text("")
    names = {"freecustom-planted.npz", "magicface-planted.npz", "consistory-planted.json"}
    names.add("regional-prompting-planted.txt")
    for folder, change in (
        ("storydiffusion", lambda arrays: arrays | {"mystery": np.zeros(1)}),
        ("ir-diffusion", lambda arrays: {name: array for name, array in arrays.items() if name != "heads"}),
        ("shared-attention", lambda arrays: arrays | {"mask": np.zeros(1)}),
    ):
        victim = folder_files(folder, root)[0]
        np.savez(victim, **change(dict(np.load(victim))))
        names.add(f"{folder}-{victim.name}")
    return names


def test_unknown_files_and_arrays_fail_the_suite(tmp_path):
    for folder in CHECKED:
        path = min(folder_files(folder), key=lambda file: file.stat().st_size)
        copy = tmp_path / path.relative_to(golden_root())
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    planted = plant_unknown_files(tmp_path)
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider"),
            *("-k", "golden and auto and not suite", str(Path(__file__))),
        ],
        env=os.environ | {"GENSPARSE_GOLDEN": str(tmp_path)},
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
    )
    failed = {line.split("golden-")[1].split("]")[0] for line in run.stdout.splitlines() if line.startswith("FAILED")}
    assert run.returncode == 1
    assert failed == {f"{name}-auto" for name in planted}
