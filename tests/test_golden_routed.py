"""Keys chosen at run time against published vectors: golden folder psa, biformer and routing of hybrids."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_files import GoldenError, golden_params, load

from gensparse.attention import sparse_attention
from gensparse.kernels import reference, route
from gensparse.layout import Layout
from gensparse.patterns import Clusters, PyramidBlocks, TopRegions
from gensparse.patterns.curve import gilbert
from gensparse.plan import RouteContext, build_plan

PATHS = ("oracle", "plan_loop", "auto")
MODES = {"topk": "topk", "thresholdbound": "threshold"}


def close(got: torch.Tensor, expected: np.ndarray) -> None:
    assert got.shape == expected.shape
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-5)


def tensors(arrays: dict, names: str = "qkv") -> list[torch.Tensor]:
    """[B, S, H, D] of arrays [B, H, S, D]."""
    return [torch.from_numpy(arrays[name]).transpose(1, 2) for name in names]


def linear(arrays: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    weight, bias = (torch.from_numpy(arrays[f"w.{name}.{part}"]) for part in ("weight", "bias"))
    return torch.nn.functional.linear(x, weight, bias)


def pyramid(arrays: dict, **settings) -> PyramidBlocks:
    """The method with the blocks of a file; shares are stored in fp32, and written with few digits."""
    if "level_end" in arrays:
        assert arrays["level_keys"].tolist() == [*route.LEVELS, 0]
        np.testing.assert_array_equal(arrays["level_start"][1:], arrays["level_end"][:-1])
        settings["ends"] = tuple(float(f"{end:.6g}") for end in arrays["level_end"][:-1])
        settings["mode"] = MODES[str(arrays["mode"])]
    block = int(arrays["block_n"])
    tile = int(arrays.get("tile_n", min(block, 32)))
    return PyramidBlocks(block, int(arrays.get("block_m", 128)), order="sequence", tile=tile, **settings)


def check_levels(arrays: dict) -> None:
    pattern, importance = pyramid(arrays), torch.from_numpy(arrays["importance"])
    levels = route.pyramid_levels(importance, pattern.ends, pattern.mode, pattern.align)
    np.testing.assert_array_equal(levels.numpy(), arrays["levels"])
    assert levels.dtype == torch.int32
    share = np.where(arrays["levels"] > 0, 1 / np.maximum(arrays["levels"], 1), 0).mean()
    assert share == pytest.approx(float(arrays["density"]), abs=1e-6)


def check_importance(arrays: dict) -> None:
    q, k = tensors(arrays, "qk")
    sizes = (int(arrays["block_m"]), int(arrays["block_n"]))
    offsets = tuple(torch.from_numpy(arrays[f"sample_{name}"]) for name in "qk")
    close(route.block_importance(q, k, torch.arange(q.shape[1]), sizes, offsets), arrays["importance"])


def check_caps(arrays: dict) -> None:
    (k,) = tensors(arrays, "k")
    caps = route.similarity_caps(k, torch.arange(k.shape[1]), int(arrays["block_n"]), arrays["thresholds"].tolist())
    np.testing.assert_array_equal(caps.numpy(), arrays["caps"])


def check_pyramid_outputs(arrays: dict, path: str) -> None:
    q, k, v = tensors(arrays)
    layout = Layout.joint((1, 1, q.shape[1]))
    plan = build_plan(pyramid(arrays, pad="replicate"), layout)
    choice = plan.choice(torch.from_numpy(arrays["levels"]))
    if path == "oracle":
        out = pyramid_oracle(q, k, v, arrays["levels"], int(arrays["block_m"]), int(arrays["block_n"]))
        mask = plan.dense_mask(choice)
        keys, values, bias = plan.extend(k, v, None)
        close(reference.attend(q, keys, values, mask, key_bias=bias)[0].transpose(1, 2), arrays["out"])
    else:
        out = sparse_attention(q, k, v, plan, ctx=choice, backend=None if path == "auto" else path)
    close(out.transpose(1, 2), arrays["out"])
    share = np.where(arrays["levels"] > 0, 1 / np.maximum(arrays["levels"], 1), 0).mean()
    if q.shape[1] % int(arrays["block_m"]) == 0:
        assert plan.stats(choice)["density"] == pytest.approx(share)


def pyramid_oracle(q, k, v, levels: np.ndarray, rows: int, block: int) -> torch.Tensor:
    """The definition, block by block: keys and values of every chosen block at its level, one softmax."""
    length = q.shape[1]
    short = -length % block
    filled = [torch.cat([x, x[:, -1:].expand(-1, short, -1, -1)], 1) for x in (k, v)]
    out = torch.empty_like(q)
    for b, h, i in np.ndindex(levels.shape[:3]):
        keys, values, bias = [], [], []
        for j, level in enumerate(levels[b, h, i]):
            if level:
                part = slice(j * block, (j + 1) * block if level > 1 else min((j + 1) * block, length))
                own = [x[b, part, h].unflatten(0, (-1, int(level))).mean(1) for x in filled]
                keys.append(own[0])
                values.append(own[1])
                bias.append(torch.full((len(own[0]),), float(np.log(level))))
        queries = q[b, i * rows : (i + 1) * rows, h]
        logits = queries @ torch.cat(keys).T * q.shape[-1] ** -0.5 + torch.cat(bias)
        out[b, i * rows : (i + 1) * rows, h] = logits.softmax(-1) @ torch.cat(values)
    return out


def check_gilbert(arrays: dict) -> None:
    grid = tuple(int(arrays[name]) for name in ("depth", "height", "width"))
    np.testing.assert_array_equal(gilbert(grid), arrays["order"])


def check_biformer(arrays: dict, path: str) -> None:
    params = json.loads(str(arrays["params"]))
    layout = Layout.image(params["H"], params["W"])
    x = torch.from_numpy(arrays["x"]).flatten(1, 2)
    q, k, v = linear(arrays, "qkv.qkv", x).unflatten(-1, (3, params["heads"], -1)).unbind(2)
    plan = build_plan(TopRegions((params["n_win"],) * 2, params["topk"], own=False), layout)
    choice = plan.select(q, k)
    np.testing.assert_array_equal(choice.index[:, 0].numpy(), arrays["route_index"])
    if path == "oracle":
        out = reference.attend(q, k, v, plan.dense_mask(choice))[0]
    else:
        out = sparse_attention(q, k, v, plan, backend=None if path == "auto" else path)
    close(linear(arrays, "wo", out.flatten(2)).unflatten(1, (params["H"], params["W"])), arrays["y"])
    assert plan.stats(choice)["density"] == pytest.approx(params["topk"] / params["n_win"] ** 2)


def check_routing(arrays: dict, path: str) -> None:
    params = json.loads(str(arrays["params"]))
    q, k, v = tensors(arrays)
    pattern = Clusters(params["clusters"], params["wsz"])
    plan = build_plan(pattern, Layout.joint((1, 1, params["n"])))
    ctx = RouteContext(centroids=torch.from_numpy(arrays["means"]))
    choice = plan.select(q, k, ctx)
    for name, index in zip(("q_index", "k_index"), choice, strict=True):
        np.testing.assert_array_equal(index.numpy(), arrays[name])
    if path == "oracle":  # every cluster alone, by a mask
        total, count = torch.zeros_like(q), torch.zeros_like(q[..., :1])
        for c in range(params["clusters"]):
            own = plan.dense_mask(route.Clustering(*(x[:, :, c : c + 1] for x in choice)))
            total += reference.attend(q, k, v, own)[0]
            count += own.any(-1).transpose(1, 2)[..., None]
        out = total / (count + pattern.eps)
    else:
        out = sparse_attention(q, k, v, plan, ctx=ctx, backend=None if path == "auto" else path)
    close(out.transpose(1, 2), arrays["out"])


def check(file: Path, path: str) -> None:
    kind, arrays = load(file)
    match file.parent.name, kind:
        case "psa", "attention":
            check_pyramid_outputs(arrays, path)
        case "psa", "levels":
            check_levels(arrays)
        case "psa", "importance":
            check_importance(arrays)
        case "psa", "caps":
            check_caps(arrays)
        case "psa", "gilbert":
            check_gilbert(arrays)
        case "hybrids", "biformer":
            check_biformer(arrays, path)
        case "hybrids", "routing":
            check_routing(arrays, path)
        case _:
            raise GoldenError(f"{file}: no check for kind {kind}")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "file", [*golden_params("psa", kinds=("attention",)), *golden_params("hybrids", kinds=("biformer", "routing"))]
)
def test_published_outputs(file, path):
    check(file, path)


@pytest.mark.parametrize("file", golden_params("psa", kinds=("levels", "importance", "caps", "gilbert")))
def test_published_choices(file):
    check(file, "oracle")
