"""Published outputs through every CPU path: folders natten, clear, msw_msa; plan bits: classic_windows."""

from pathlib import Path

import numpy as np
import pytest
import torch
from golden_files import GoldenError, golden_params, load, unpack_mask
from patterns.test_golden_masks import classic_case, clear_case, natten_case
from test_plan import listed_mask, lowered_mask

from gensparse.attention import explain, sparse_attention
from gensparse.kernels import reference
from gensparse.kernels.merge import merge_lse
from gensparse.kernels.pool import pool_keys
from gensparse.layout import Layout
from gensparse.patterns import MSW, Pattern, Text
from gensparse.plan import build_plan

PATHS = ("reference", "plan_loop", "auto")


def attend(path, tensors, pattern: Pattern, layout: Layout, scale=None, weights=None):
    """out and lse by the oracle with its dense mask, by the plan loop, or by the backend of choice."""
    plan = build_plan(pattern, layout)
    sources = {source.name: weights for source in plan.sources}
    if path != "reference":
        backend = None if path == "auto" else path
        assert backend is None or explain(plan, tensors[0])[backend] is None
        return sparse_attention(*tensors, plan, scale=scale, sources=sources or None, backend=backend, return_lse=True)
    q, k, v = tensors
    start, target = layout.starts[layout.target], layout.segments[layout.target]
    for source in plan.sources:
        own = (x[:, start : start + target.length] for x in (k, v))
        pooled = [pool_keys(x, target.shape, source.cells, weights) for x in own]
        k, v = torch.cat([k, pooled[0]], 1), torch.cat([v, pooled[1]], 1)
    return reference.attend(q, k, v, torch.from_numpy(pattern.dense_mask(layout)), scale=scale)


def close(got, expected) -> None:
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-5)


def check_natten(arrays: dict, path: str) -> None:
    pattern, layout = natten_case(arrays)
    batch, heads, dim = arrays["q"].shape[0], *arrays["q"].shape[-2:]
    q, k, v = (torch.from_numpy(arrays[name]).reshape(batch, -1, heads, dim) for name in "qkv")
    tokens = q.shape[1]
    if "add_k" in arrays:  # keys that every query sees are text whose own rows nobody reads
        extra = arrays["add_k"].shape[1]
        layout = Layout.joint(layout.grid, text=extra, text_first=False)
        pattern = pattern | Text()
        q = torch.cat([q, q.new_zeros(batch, extra, heads, dim)], 1)
        k, v = (torch.cat([x, torch.from_numpy(arrays[name])], 1) for x, name in ((k, "add_k"), (v, "add_v")))
    out, lse = attend(path, (q, k, v), pattern, layout)
    close(out[:, :tokens].reshape(arrays["out"].shape), arrays["out"])
    close(lse[:, :tokens].reshape(arrays["lse"].shape), arrays["lse"])


def check_clear(arrays: dict, path: str) -> None:
    pattern, layout = clear_case(arrays)
    tensors = [torch.from_numpy(arrays[name]).transpose(1, 2) for name in "qkv"]
    weights = torch.from_numpy(arrays["spatial_weight"]) if "spatial_weight" in arrays else None
    size = int(arrays["height"]) * int(arrays["width"]) + int(arrays["text_length"])
    many = 10 if weights is not None else 1
    base = tensors[0].shape[-1] ** -0.5
    gain = np.sqrt(np.log(many * size) / np.log(64**2 + 512)) if arrays["proportional"] else 1.0
    assert float(arrays["scale"]) == pytest.approx(base * gain)
    out, _ = attend(path, tensors, pattern, layout, float(arrays["scale"]), weights)
    close(out.transpose(1, 2), arrays["out"])


def check_msw(arrays: dict, path: str) -> None:
    layout = Layout.image(int(arrays["height"]), int(arrays["width"]))
    heads = int(arrays["heads"])
    tensors = [torch.from_numpy(arrays[name]).unflatten(-1, (heads, -1)) for name in "qkv"]
    out, _ = attend(path, tensors, MSW(int(arrays["shift_index"])), layout)
    close(out.flatten(2), arrays["out"])


def check_attention(file: Path, path: str) -> None:
    kind, arrays = load(file)
    match file.parent.name, kind:
        case "natten", "attention" | "attention_extra_keys":
            check_natten(arrays, path)
        case "clear", "attention":
            check_clear(arrays, path)
        case "msw_msa", "even":
            check_msw(arrays, path)
        case _:
            raise GoldenError(f"{file}: no check for kind {kind}")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "file", golden_params("natten", "clear", "msw_msa", kinds=("attention", "attention_extra_keys", "even"))
)
def test_published_outputs(file, path):
    check_attention(file, path)


@pytest.mark.parametrize("file", golden_params("natten", kinds=("merge",)))
def test_published_merges(file):
    kind, arrays = load(file)
    if kind != "merge":
        raise GoldenError(f"{file}: no check for kind {kind}")
    outs, lses = torch.from_numpy(arrays["outs"]), torch.from_numpy(arrays["lses"])
    out, lse = merge_lse(outs, lses)
    close(out, arrays["out"])
    close(lse, arrays["lse"])
    first, total = merge_lse(outs[:2], lses[:2])
    out, lse = merge_lse(torch.stack([first, outs[2]]), torch.stack([total, lses[2]]))
    close(out, arrays["out"])
    close(lse, arrays["lse"])


@pytest.mark.parametrize("file", golden_params("classic_windows"))
def test_plan_bits_of_classic_windows(file):
    _, arrays = load(file)
    for name, bits in arrays.items():
        pattern, layout = classic_case(name)
        expected = unpack_mask(bits, layout.tokens)[None]
        plan = build_plan(pattern, layout)
        np.testing.assert_array_equal(listed_mask(plan), expected, err_msg=name)
        for works in (plan.halo(), plan.partition()):
            if works is not None:
                np.testing.assert_array_equal(lowered_mask(works, plan), expected, err_msg=name)
