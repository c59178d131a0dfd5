"""Pooled keys against published vectors: golden folder ptdit (attention parts) and hilo of hybrids."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_files import GoldenError, folder_files, golden_params, golden_root, load

from gensparse.attention import sparse_attention
from gensparse.kernels import reference
from gensparse.kernels.pool import cell_counts, pool_keys, proxy_tokens
from gensparse.layout import Layout
from gensparse.patterns import Blocks, HiLo, Pattern, Proxy, Text
from gensparse.plan import build_plan

PATHS = ("oracle", "plan_loop", "auto")


def attend(path: str, q, k, v, pattern: Pattern, layout: Layout, groups=None):
    """By the mask with keys pooled here, by the plan loop, or by the backend of choice."""
    plan = build_plan(pattern, layout)
    if path != "oracle":
        return sparse_attention(q, k, v, plan, groups=groups, backend=None if path == "auto" else path)
    start, target = layout.starts[layout.target], layout.segments[layout.target]
    own = slice(start, start + target.length)
    bias = [torch.zeros(layout.tokens)]
    for source in plan.sources:
        k, v = (torch.cat([x, pool_keys(x[:, own], target.shape, source.cells, None, source.shift)], 1) for x in (k, v))
        bias.append(cell_counts(target.shape, source.cells, source.shift).float().log())
    allowed = torch.from_numpy(pattern.dense_mask(layout))
    return reference.attend(q, k, v, allowed, groups=groups, key_bias=torch.cat(bias)[None, None])[0]


def linear(arrays: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    weight, bias = (torch.from_numpy(arrays[f"w.{name}.{part}"]) for part in ("weight", "bias"))
    return torch.nn.functional.linear(x, weight, bias)


def close(got: torch.Tensor, expected: np.ndarray) -> None:
    assert got.shape == expected.shape
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-5)


def cases(arrays: dict) -> list[dict]:
    """The cases c0, c1, ... of a file, without the prefix; at least one."""
    found: dict[str, dict] = {}
    for key, array in arrays.items():
        case, name = key.split("_", 1)
        found.setdefault(case, {})[name] = array
    return [found[case] for case in sorted(found)]


def axes(array: np.ndarray) -> tuple[int, int, int]:
    frames, rows, columns = array.tolist()
    return frames, rows, columns


def check_pooled_kv(arrays: dict, path: str) -> None:
    for case in cases(arrays):
        params = json.loads(str(case["params"]))
        layout = Layout.joint(tuple(params["fhw"]), text=params["text"])
        pattern = Proxy(tuple(params["win"])).clamped(layout.grid) | Text()
        q, k, v = (torch.from_numpy(case[name]).transpose(1, 2) for name in "qkv")
        close(attend(path, q, k, v, pattern, layout).transpose(1, 2), case["out"])


def check_hilo(arrays: dict, path: str) -> None:
    params = json.loads(str(arrays["params"]))
    heads, dim = params["heads"], params["dim"] // params["heads"]
    low = int(heads * params["alpha"])
    x = torch.from_numpy(arrays["x"])
    high_q, high_k, high_v = linear(arrays, "h_qkv", x).unflatten(-1, (3, heads - low, dim)).unbind(2)
    low_q = linear(arrays, "l_q", x).unflatten(-1, (low, dim))
    low_k, low_v = linear(arrays, "l_kv", x).unflatten(-1, (2, low, dim)).unbind(2)
    q, k, v = (torch.cat(pair, 2) for pair in ((high_q, low_q), (high_k, low_k), (high_v, low_v)))
    pattern = HiLo(params["ws"], heads, low)
    groups = torch.tensor([pattern.head_groups])
    out = attend(path, q, k, v, pattern, Layout.image(params["H"], params["W"]), groups)
    parts = (out[:, :, : heads - low].flatten(2), out[:, :, heads - low :].flatten(2))
    close(torch.cat([linear(arrays, "h_proj", parts[0]), linear(arrays, "l_proj", parts[1])], -1), arrays["y"])


def check_windows(arrays: dict) -> None:
    for case in cases(arrays):
        grid, window = axes(case["fhw"]), axes(case["compress_ratios"])
        layout = Layout.joint(grid)
        plain, shifted = np.zeros((2, layout.tokens, layout.tokens), bool)
        for tokens in case["window_token_index"]:
            plain[np.ix_(tokens, tokens)] = True
        for tokens, allowed in zip(case["shifted_window_token_index"], case["shifted_allowed"], strict=True):
            shifted[np.ix_(tokens, tokens)] = allowed
        shift = tuple(size // 2 for size in window)
        np.testing.assert_array_equal(Blocks(window).dense_mask(layout)[0], plain)
        np.testing.assert_array_equal(Blocks(window, shift).dense_mask(layout)[0], shifted)


def check_proxy_tokens(arrays: dict) -> None:
    for case in cases(arrays):
        x, window = torch.from_numpy(case["x"]), axes(case["compress_ratios"])
        grid, scale = tuple(x.shape[1:4]), axes(case["scale_ratio"])
        ratios = axes(case["proxy_compress_ratios"])
        assert scale == (1, window[1] // ratios[1], window[2] // ratios[2])
        for mode in ("mean", "first"):
            close(proxy_tokens(x.flatten(1, 3), grid, window, scale, mode), case[f"proxy_{mode}"])
        every = proxy_tokens(x.flatten(1, 3), grid, window, window, "first")  # one proxy per token: the windows
        close(every.reshape(case["windows"].shape), case["windows"])


def check(file: Path, path: str) -> None:
    kind, arrays = load(file)
    match file.parent.name, kind:
        case "ptdit", "pooled_kv":
            check_pooled_kv(arrays, path)
        case "ptdit", "windows":
            check_windows(arrays)
        case "ptdit", "proxy_tokens":
            check_proxy_tokens(arrays)
        case "hybrids", "hilo":
            check_hilo(arrays, path)
        case _:
            raise GoldenError(f"{file}: no check for kind {kind}")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "file", [*golden_params("ptdit", kinds=("pooled_kv",)), *golden_params("hybrids", kinds=("hilo",))]
)
def test_published_outputs(file, path):
    check(file, path)


@pytest.mark.parametrize("file", golden_params("ptdit", kinds=("windows", "proxy_tokens")))
def test_published_windows_and_proxies(file):
    check(file, "oracle")


def plant_unknown_files(root: Path) -> list[str]:
    """Foreign arrays, an extra array, a foreign file type and a case without its key grammar."""
    np.savez(root / "ptdit" / "planted.npz", c0_mystery=np.zeros(3))
    victim = next(path for path in folder_files("ptdit", root) if path.name == "windows.npz")
    np.savez(victim, **dict(np.load(victim)), mystery=np.zeros(1))
    (root / "psa" / "planted.json").write_text("{}")
    other = next(path for path in folder_files("psa", root) if path.name.startswith("gilbert"))
    np.savez(other, **dict(np.load(other)), mystery=np.zeros(1))
    return ["ptdit-planted.npz", "ptdit-windows.npz", "psa-planted.json", f"psa-{other.name}"]


def test_unknown_files_and_arrays_fail_the_suite(tmp_path):
    for path in (path for folder in ("ptdit", "psa", "hybrids") for path in folder_files(folder)):
        copy = tmp_path / path.relative_to(golden_root())
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    planted = plant_unknown_files(tmp_path)
    here = Path(__file__).resolve()
    modules = (str(here), str(here.with_name("test_golden_routed.py")))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "golden and not suite", *modules],
        env=os.environ | {"GENSPARSE_GOLDEN": str(tmp_path)},
        cwd=here.parents[1],
        capture_output=True,
        text=True,
    )
    failed = {line.split("golden-")[1].split("]")[0] for line in run.stdout.splitlines() if line.startswith("FAILED")}
    names = {name.removesuffix(f"-{path}") for name in failed for path in PATHS if name.endswith(path)}
    assert run.returncode == 1
    assert names | {name for name in failed if not name.endswith(PATHS)} == set(planted)
