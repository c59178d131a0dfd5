"""Published vectors through applied methods: folders clear, msw_msa, natten, and the windows of freeswim and hybrids.

Folders with masks alone (scale_dit, classic_windows) are compared with the masks of what the methods compute.

Queries, keys and values of a file are the input of a diffusers attention module whose projections only pick them, the
method is put on it with `gensparse.apply`, and what the module gives is compared with the file.
"""

import json
import shutil
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_files import GoldenError, folder_files, golden_params, golden_root, load, unpack_mask
from one_layer import attend
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from gensparse.layout import Layout, Segment
from gensparse.methods import (
    START,
    Clear,
    DoubleWindow,
    FreeSwimWindow,
    LongDistance,
    Method,
    MswMsa,
    Neighborhood,
    ScaleDiT,
)
from gensparse.methods.long_distance import LONG, SHORT
from gensparse.patterns.anchors import ANCHORS
from gensparse.testing.window_order import window_first

FOLDERS = ("clear", "msw_msa", "natten", "freeswim", "hybrids", "classic_windows", "scale_dit")
BLOCK = "down_blocks.0"
NATIVE = 64**2  # picture tokens of FLUX at the size of its training, in the published scale


def close(got: Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-5)


def heads_last(arrays: dict) -> list[Tensor]:
    """q, k, v of [B, heads, S, D] files as [B, S, H, D]."""
    return [torch.from_numpy(arrays[name]).transpose(1, 2) for name in "qkv"]


def check_clear(arrays: dict, folder: Path) -> None:
    """Learned pooling weights come out of a file with the published names, as for a real model."""
    layout = Layout.image(int(arrays["height"]), int(arrays["width"]), text=int(arrays["text_length"]))
    tensors, name = heads_last(arrays), "single_transformer_blocks.0.attn"
    radius, factor = int(arrays["window_size"]), int(arrays["down_factor"])
    # the training length of the published scale holds 512 text tokens, whatever the file has
    native = NATIVE + 512 - layout.tokens + int(np.prod(layout.grid))
    settings = {"radius": radius, "down_factor": factor, "proportional": bool(arrays["proportional"])}
    if factor > 1:
        heads, dim = tensors[0].shape[2:]
        width = heads * dim
        parts = torch.eye(3 * width).split(width)
        weights = {f"{name}.{part}.weight": x for part, x in zip(("to_q", "to_k", "to_v"), parts, strict=True)}
        weights |= {f"{name}.to_out.0.weight": torch.eye(width), f"{name}.to_out.0.bias": torch.zeros(width)}
        pool = torch.from_numpy(arrays["spatial_weight"])
        weights[f"{name}.processor.spatial_weight"] = pool.reshape(1, 1, 1, factor, 1, factor, 1)
        file = folder / f"clear_local_{radius}_down_{factor}.safetensors"
        save_file({key: x.contiguous() for key, x in weights.items()}, file)
        settings["weights"] = str(file)
    method = Clear(**settings)
    base = tensors[0].shape[-1] ** -0.5
    assert base * method.logit_gain(layout, native) == pytest.approx(float(arrays["scale"]), rel=1e-9)
    close(attend(method, layout, *tensors, name=name, native=native).transpose(1, 2), arrays["out"])


def check_msw(arrays: dict, resized: bool) -> None:
    """Files with odd sides hold what the authors make of them: features resized to even sides and back."""
    grid = height, width = int(arrays["height"]), int(arrays["width"])
    even = (height + height % 2, width + width % 2) if resized else grid
    index, heads = int(arrays["shift_index"]), int(arrays["heads"])
    method = next(m for m in map(msw, count()) if m.index(START._replace(kind=0)) == index)
    tensors = [resize(torch.from_numpy(arrays[x]), grid, even).unflatten(-1, (heads, -1)) for x in "qkv"]
    out = attend(method, Layout.image(*even), *tensors, name=f"{BLOCK}.attentions.0.transformer_blocks.0.attn1")
    close(resize(out.flatten(2), even, grid), arrays["out"])


def msw(seed: int) -> MswMsa:
    return MswMsa(blocks=BLOCK, seed=seed)


def resize(x: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Tokens [B, H*W, C] of a grid on another one, bicubic."""
    if grid == size:
        return x
    picture = x.transpose(1, 2).unflatten(2, grid)
    return F.interpolate(picture, size=size, mode="bicubic").flatten(2).transpose(1, 2)


def check_natten(arrays: dict) -> None:
    batch, *grid, heads, dim = arrays["q"].shape
    names = {"window": "kernel_size", "stride": "stride", "dilation": "dilation", "causal": "is_causal"}
    method = Neighborhood(**{setting: tuple(arrays[name].tolist()) for setting, name in names.items()})
    q, k, v = (torch.from_numpy(arrays[name]).reshape(batch, -1, heads, dim) for name in "qkv")
    tokens, extra = q.shape[1], arrays["add_k"].shape[1] if "add_k" in arrays else 0
    frames, rows, columns = (1,) * (3 - len(grid)) + tuple(grid)
    layout = Layout.joint((frames, rows, columns), text=extra, text_first=False)
    if extra:  # keys that every query sees are text whose own rows nobody reads
        q = torch.cat([q, q.new_zeros(batch, extra, heads, dim)], 1)
        k, v = (torch.cat([x, torch.from_numpy(arrays[name])], 1) for x, name in ((k, "add_k"), (v, "add_v")))
    close(attend(method, layout, q, k, v)[:, :tokens].reshape(arrays["out"].shape), arrays["out"])


def check_freeswim(arrays: dict) -> None:
    layout = Layout.video(*(int(arrays[name]) for name in ("frames", "height", "width")))
    half, native = (int(arrays["d_h"]), int(arrays["d_w"])), int(arrays["base_tokens_per_frame"])
    for own, out in ((half, "out_window"), (layout.grid[1:], "out_full")):
        method = FreeSwimWindow(half=own, n0=native)
        scale = method.logit_gain(layout, None) * arrays["q"].shape[-1] ** -0.5
        assert scale == pytest.approx(float(arrays["scale"]), rel=1e-6)
        close(attend(method, layout, *heads_last(arrays)).transpose(1, 2), arrays[out])


def check_double(arrays: dict) -> None:
    params = json.loads(str(arrays["params"]))
    assert arrays["q"].shape[1] == params["heads"]
    out = attend(DoubleWindow(params["ws"]), Layout.image(params["H"], params["W"]), *heads_last(arrays))
    close(out.transpose(1, 2), arrays["out"])


def check_classic(arrays: dict) -> None:
    """CrossFormer's two kinds of layer; the other masks of the folder are those of patterns, not of methods."""
    for name, bits in arrays.items():
        if not name.startswith("crossformer"):
            continue
        _, kind, *numbers, size = name.split("_")
        group, interval = (int(number[1:]) for number in (*numbers, "I1")[:2])
        height, width = map(int, size.split("x"))
        layout = Layout.image(height, width)
        method: Method = LongDistance(group, interval)
        pattern = method.pattern(layout, START._replace(kind={"sda": SHORT, "lda": LONG}[kind]))
        np.testing.assert_array_equal(pattern.dense_mask(layout)[0], unpack_mask(bits, layout.tokens), err_msg=name)


def check_scale(method: ScaleDiT, high: list[int], low: list[int], text: int, order: np.ndarray, expected: Any) -> None:
    """The rows of text and picture in a step, and those of the anchors in the call that is recorded."""
    anchors = Segment("reference", low[0] * low[1], (1, low[0], low[1]), ANCHORS)
    layout, alone = Layout.image(*high, text=text), Layout.image(*low, text=1)
    own = method.pattern(layout, START._replace(recorded=(anchors,))).dense_mask(layout)[0]
    recorded = method.recording(alone)
    assert recorded.name == ANCHORS
    small = recorded.pattern.dense_mask(alone)[0][1:, 1:]
    mask = np.zeros((layout.tokens + anchors.length,) * 2, bool)
    mask[: layout.tokens], mask[layout.tokens :, layout.tokens :] = own, small
    np.testing.assert_array_equal(mask[np.ix_(order, order)], expected)


def check_scale_table(arrays: dict) -> None:
    high, low, text = arrays["hr_hw"].tolist(), arrays["lr_hw"].tolist(), int(arrays["text_length"])
    tokens = high[0] * high[1]
    order = np.arange(int(arrays["seq"]))
    if arrays["permuted"]:
        order = np.concatenate([np.arange(text), text + arrays["hr_perm"], text + tokens + arrays["lr_perm"]])
    method = ScaleDiT(tuple(arrays["window"].tolist()), ratio=high[0] // low[0])
    check_scale(method, high, low, text, order, unpack_mask(arrays["mask_bits"], len(order)))


def check_scale_blocks(arrays: dict) -> None:
    """The authors' kernel: window 16, anchors of a quarter, 16 pixels per token."""
    high = [int(side) // 16 for side in arrays["image_hw"]]
    text, blocks = int(arrays["text_length"]), tuple(arrays["block"].tolist())
    low, tokens = [side // 4 for side in high], high[0] * high[1]
    orders = window_first(high, (16, 16)), window_first(low, (4, 4))
    order = np.concatenate([np.arange(text), text + orders[0], text + tokens + orders[1]])
    whole = arrays["block_mask"].repeat(blocks[0], axis=0).repeat(blocks[1], axis=1)
    method = ScaleDiT.preset("flux.1-dev")
    assert method.closure == blocks
    check_scale(method, high, low, text, order, whole)


def check(file: Path, folder: Path) -> None:
    kind, arrays = load(file)
    match file.parent.name, kind:
        case "clear", "attention":
            check_clear(arrays, folder)
        case "msw_msa", "even" | "odd_bicubic":
            check_msw(arrays, kind == "odd_bicubic")
        case "natten", "attention" | "attention_extra_keys":
            check_natten(arrays)
        case "freeswim", "attention":
            check_freeswim(arrays)
        case "hybrids", "double_attention":
            check_double(arrays)
        case "classic_windows", "masks":
            check_classic(arrays)
        case "scale_dit", "mask":
            check_scale_table(arrays)
        case "scale_dit", "blocks":
            check_scale_blocks(arrays)
        case _:
            raise GoldenError(f"{file}: no check for kind {kind}")


def published() -> list:
    """Parameters for every file with results, and for every file that no schema knows."""
    results = ("attention", "attention_extra_keys", "even", "odd_bicubic", "double_attention")
    return golden_params(*FOLDERS, kinds=(*results, "masks", "mask", "blocks"))


@pytest.mark.parametrize("file", published())
def test_applied_methods_give_the_published_results(file: Path, tmp_path: Path) -> None:
    check(file, tmp_path)


def failing(file: Path, folder: Path) -> bool:
    try:
        check(file, folder)
    except AssertionError:  # a GoldenError is one
        return True
    return False


def test_unknown_files_and_arrays_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, work = tmp_path / "golden", tmp_path / "work"
    work.mkdir()
    for folder in FOLDERS:  # the smallest file of each is known, and enough
        path = min(folder_files(folder), key=lambda path: path.stat().st_size)
        copy = root / path.relative_to(golden_root())
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    monkeypatch.setenv("GENSPARSE_GOLDEN", str(root))
    assert not any(failing(*param.values, work) for param in published())
    np.savez(root / "msw_msa" / "planted.npz", mystery=np.zeros(3))
    victim = folder_files("clear", root)[0]
    np.savez(victim, **dict(np.load(victim)) | {"mystery": np.zeros(1)})
    (root / "natten" / "planted.json").write_text("{}")
    failed = {param.id for param in published() if failing(*param.values, work)}
    names = ("msw_msa-planted.npz", f"clear-{victim.name}", "natten-planted.json")
    assert failed == {f"golden-{name}" for name in names}
