"""Published masks and outputs of geometric patterns: golden folders radial, freeswim, scale_dit, hybrids (windows)."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_files import GoldenError, folder_files, golden_params, golden_root, load, unpack_mask

from gensparse.attention import sparse_attention
from gensparse.kernels import reference
from gensparse.layout import Layout
from gensparse.patterns import Anchors, Box, InwardWindow, Pattern, Radial, double_windows
from gensparse.plan import Plan, build_plan
from gensparse.testing.window_order import window_first, window_hilbert

FOLDERS = ("radial", "freeswim", "scale_dit")
PATHS = ("reference", "plan_loop", "auto")
SINK = {"wan": True, "hunyuan": False}
RULES = {"fixed": "fixed", "wan": "upstream", "hunyuan": "upstream", "attn": "upstream"}  # by the start of the name
DENSE_TOKENS = 8192  # larger masks are compared by blocks alone


def attend(path, tensors, pattern: Pattern, layout: Layout, scale=None, groups=None):
    """The output of the oracle under the dense mask, of the plan loop, or of the backend of choice."""
    if path == "reference":
        allowed = torch.from_numpy(pattern.dense_mask(layout))
        return reference.attend(*tensors, allowed, scale=scale, groups=groups)[0]
    backend = None if path == "auto" else path
    return sparse_attention(*tensors, build_plan(pattern, layout), scale=scale, groups=groups, backend=backend)


def close(got: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-5)


def radial_case(file: Path, arrays: dict) -> tuple[Radial, Layout]:
    start = file.name.split("_")[0]
    if start not in RULES or str(arrays["model"]) not in SINK:
        raise GoldenError(f"{file}: name starts with none of {', '.join(RULES)}, or model {arrays['model']} is unknown")
    pattern = Radial(float(arrays["decay"]), int(arrays["block"]), sink=SINK[str(arrays["model"])], rule=RULES[start])
    frames, tokens = int(arrays["frames"]), int(arrays["tokens_per_frame"])
    height = max(n for n in range(1, math.isqrt(tokens) + 1) if tokens % n == 0)
    return pattern, Layout.video(frames, height, tokens // height, text=int(arrays.get("text_tokens", 0)))


def listed_blocks(plan: Plan, block: int) -> np.ndarray:
    """Block mask of a plan whose tiles lie inside blocks or among text."""
    q_rows, k_rows, pointer, key_tile = (x.numpy() for x in plan.lists[:4])
    count = -(-plan.tokens // block)
    mask = np.zeros((count, count), bool)
    queries, keys = np.repeat(np.arange(len(q_rows)), np.diff(pointer[0])), key_tile
    for q in (q_rows[:, 0], q_rows.max(axis=1)):
        for k in (k_rows[:, 0], k_rows.max(axis=1)):
            mask[q[queries] // block, k[keys] // block] = True
    return mask


def check_radial(file: Path, arrays: dict) -> None:
    pattern, layout = radial_case(file, arrays)
    block, expected = pattern.block, arrays["block_mask"]
    assert expected.mean() == pytest.approx(float(arrays.get("density", expected.mean())), abs=1e-7)
    tile = next((n for n in (256, 128, 64, 32) if block % n == 0), None)
    if tile is None and layout.tokens > DENSE_TOKENS:
        raise GoldenError(f"{file}: block {block} is no multiple of a tile")
    edges = np.minimum(np.arange(len(expected) + 1) * block, layout.tokens)
    pairs = np.diff(edges) @ expected @ np.diff(edges)
    cut = slice(0, len(expected))  # the upstream rule has no block for the last tokens that fill none
    if tile is not None:
        plan = build_plan(pattern, layout, q_tile=tile, k_tile=tile)
        np.testing.assert_array_equal(listed_blocks(plan, block)[cut, cut], expected)
        assert plan.useful == (pairs,)
    if layout.grid[1] * layout.grid[2] % block == 0 and layout.tokens % block == 0:  # both rules are the same there
        for rule in ("fixed", "upstream"):
            np.testing.assert_array_equal(replace(pattern, rule=rule).bind(layout).mask, expected)
    if layout.tokens <= DENSE_TOKENS:
        mask = pattern.dense_mask(layout)[0]
        whole = expected.repeat(np.diff(edges), axis=0).repeat(np.diff(edges), axis=1)
        np.testing.assert_array_equal(mask[: edges[-1], : edges[-1]], whole)
        assert mask.sum() == pairs


def freeswim_case(arrays: dict) -> tuple[Layout, InwardWindow, Box]:
    frames, height, width = (int(arrays[name]) for name in ("frames", "height", "width"))
    half = int(arrays["d_h"]), int(arrays["d_w"])
    return Layout.video(frames, height, width), InwardWindow(half), Box((frames, *half))


def check_freeswim(arrays: dict) -> None:
    layout, inward, plain = freeswim_case(arrays)
    np.testing.assert_array_equal(inward.dense_mask(layout)[0], arrays["mask_inward"])
    np.testing.assert_array_equal(plain.dense_mask(layout)[0], arrays["mask_plain"])


def check_schedule(arrays: dict) -> None:
    from diffusers import UniPCMultistepScheduler

    steps, strength = int(arrays["num_inference_steps"]), round(float(arrays["strength"]), 6)
    scheduler = UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=float(arrays["flow_shift"])
    )
    scheduler.set_timesteps(steps)
    first = steps - int(steps * strength)
    np.testing.assert_array_equal(scheduler.timesteps[first:].numpy(), arrays["timesteps"])
    np.testing.assert_allclose(scheduler.sigmas[first:].numpy(), arrays["sigmas"], rtol=1e-6)


def scale_case(arrays: dict) -> tuple[Anchors, Layout, np.ndarray]:
    """Pattern, layout, and the place in the sequence of the token at every place of the file's order."""
    (height, width), (rows, columns) = arrays["hr_hw"].tolist(), arrays["lr_hw"].tolist()
    text, tokens = int(arrays["text_length"]), height * width
    layout = Layout.joint((1, height, width), text=text, references=[(1, rows, columns)])
    order = np.concatenate([np.arange(text), text + arrays["hr_perm"], text + tokens + arrays["lr_perm"]])
    return Anchors(tuple(arrays["window"].tolist())), layout, order if arrays["permuted"] else np.arange(layout.tokens)


def check_scale(arrays: dict) -> None:
    pattern, layout, order = scale_case(arrays)
    assert layout.tokens == int(arrays["seq"])
    expected = unpack_mask(arrays["mask_bits"], layout.tokens)
    np.testing.assert_array_equal(pattern.dense_mask(layout)[0][np.ix_(order, order)], expected)
    sides = arrays["hr_hw"].tolist(), arrays["window"].tolist()
    np.testing.assert_array_equal(window_first(*sides), arrays["hr_perm"])
    np.testing.assert_array_equal(window_hilbert(*sides), arrays["hilbert_perm"])
    np.testing.assert_array_equal(window_first(arrays["lr_hw"].tolist(), (4, 4)), arrays["lr_perm"])


def check_closure(arrays: dict) -> None:
    """Against the mask of blocks, and against the definition on the permuted token mask."""
    height, width = (int(side) // 16 for side in arrays["image_hw"])
    text, blocks = int(arrays["text_length"]), tuple(arrays["block"].tolist())
    grids = (height, width), (height // 4, width // 4)
    layout = Layout.joint((1, *grids[0]), text=text, references=[(1, *grids[1])])
    orders = window_first(grids[0], (16, 16)), window_first(grids[1], (4, 4))
    order = np.concatenate([np.arange(text), text + orders[0], text + height * width + orders[1]])
    whole = arrays["block_mask"].repeat(blocks[0], axis=0).repeat(blocks[1], axis=1)
    closed = Anchors(16, closure=blocks).dense_mask(layout)[0][np.ix_(order, order)]
    np.testing.assert_array_equal(closed, whole)
    exact = Anchors(16).dense_mask(layout)[0][np.ix_(order, order)]
    any_pair = exact.reshape(len(whole) // blocks[0], blocks[0], -1, blocks[1]).any(axis=(1, 3))
    np.testing.assert_array_equal(any_pair, arrays["block_mask"])


def check_masks(file: Path) -> None:
    kind, arrays = load(file)
    match file.parent.name, kind:
        case "radial", _:
            check_radial(file, arrays)
        case "freeswim", "window":
            check_freeswim(arrays)
        case "freeswim", "schedule":
            check_schedule(arrays)
        case "scale_dit", "mask":
            check_scale(arrays)
        case "scale_dit", "blocks":
            check_closure(arrays)
        case "freeswim", "attention":
            pass  # no mask inside: its outputs are compared below
        case _:
            raise GoldenError(f"{file}: no check for kind {kind}")


def check_attention(file: Path, path: str) -> None:
    kind, arrays = load(file)
    tensors = [torch.from_numpy(arrays[name]).transpose(1, 2) for name in "qkv" if name in arrays]
    match file.parent.name, kind:
        case "radial", "attention":
            out = attend(path, tensors, *radial_case(file, arrays))
            close(out.transpose(1, 2), arrays["out"])
        case "freeswim", "attention":
            layout, inward, _ = freeswim_case(arrays)
            native, dim = int(arrays["base_tokens_per_frame"]), tensors[0].shape[-1]
            scale = math.sqrt(math.log(2 * native) / math.log(native) / dim)
            assert float(arrays["scale"]) == pytest.approx(scale, rel=1e-6)
            everywhere = InwardWindow(layout.grid[1:])
            for pattern, name in ((inward, "out_window"), (everywhere, "out_full")):
                close(attend(path, tensors, pattern, layout, scale).transpose(1, 2), arrays[name])
        case "hybrids", "double_attention":
            params = json.loads(str(arrays["params"]))
            layout = Layout.image(params["H"], params["W"])
            groups = (torch.arange(params["heads"]) >= params["heads"] // 2).long()[None]
            out = attend(path, tensors, double_windows(params["ws"], layout.grid), layout, groups=groups)
            close(out.transpose(1, 2), arrays["out"])
        case _:
            raise GoldenError(f"{file}: no check for kind {kind}")


@pytest.mark.parametrize("file", golden_params(*FOLDERS))
def test_masks_are_exact(file):
    check_masks(file)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "file",
    [
        *golden_params("radial", "freeswim", kinds=("attention",)),
        *golden_params("hybrids", kinds=("double_attention",)),
    ],
)
def test_published_outputs(file, path):
    check_attention(file, path)


@pytest.mark.parametrize("file", golden_params("scale_dit", kinds=("mask",)))
def test_window_first_attention_unpermuted_is_raster_attention(file):
    """The kernels need no permutation: tokens in window-first order under the file's mask give the same rows."""
    _, arrays = load(file)
    pattern, layout, order = scale_case(arrays)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, layout.tokens, 2, 16, generator=generator) for _ in range(3)]
    permuted = [x[:, order] for x in tensors]
    allowed = torch.from_numpy(unpack_mask(arrays["mask_bits"], layout.tokens))
    expected = reference.attend(*(x.double() for x in permuted), allowed)[0]
    got = attend("auto", tensors, pattern, layout)
    np.testing.assert_allclose(got[:, order].numpy(), expected.numpy(), rtol=0, atol=1e-5)


def plant_unknown_files(root: Path) -> list[str]:
    """Foreign arrays, an extra array, a foreign file type, and a name that states no rule."""
    np.savez(root / "freeswim" / "planted.npz", mystery=np.zeros(3))
    victim = folder_files("scale_dit", root)[0]
    arrays = dict(np.load(victim)) | {"mystery": np.zeros(1)}
    np.savez(victim, **arrays)
    (root / "hybrids" / "planted.json").write_text("{}")
    shutil.copyfile(folder_files("radial", root)[0], root / "radial" / "planted.npz")
    return ["freeswim-planted.npz", f"scale_dit-{victim.name}", "hybrids-planted.json", "radial-planted.npz"]


def test_unknown_files_and_arrays_fail_the_suite(tmp_path):
    for folder in (*FOLDERS, "hybrids"):  # the smallest file of each is known, and enough
        path = min(folder_files(folder), key=lambda path: path.stat().st_size)
        copy = tmp_path / path.relative_to(golden_root())
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    planted = plant_unknown_files(tmp_path)
    chosen = "golden and not suite and (masks_are_exact or published_outputs)"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", chosen, str(Path(__file__))],
        env=os.environ | {"GENSPARSE_GOLDEN": str(tmp_path)},
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
    )
    failed = {line.split("golden-")[1].split("]")[0] for line in run.stdout.splitlines() if line.startswith("FAILED")}
    assert run.returncode == 1
    ends = tuple(f"-{path}" for path in PATHS)
    files = {name.rpartition("-")[0] if name.endswith(ends) else name for name in failed}
    assert files == set(planted)
