"""Forward kernel whose key tiles come as boxes of the raster, by tensor descriptor (TMA); other tiles come by rows.

The lists are in the order of `Boxes`, so every loop has one way to load and no branch. A slot outside the grid reads 0,
as it does by rows. What is computed, and the repair of broken values, is that of the forward kernel.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..lists import Boxes
from . import installed
from .loaders import is_finite, load_group, load_rows
from .tune import BOX_DIMS, Config
from .visit import add_keys, visit_rows, write

OLDEST = (3, 4)  # Triton release with tensor descriptors made by the host
ALIGNED = 16  # bytes, of addresses and strides
_DTYPES = (torch.float16, torch.bfloat16)
BOX_PIECE = tl.constexpr(7)  # numbers per piece: tile, first entry, four ends of loops, slot


def why_not(k: Tensor, v: Tensor, boxes: Boxes | None, config: Config, arch: str) -> str | None:
    """Why keys and values cannot come as boxes, or None.

    Args:
        k, v: [B, S, Hk, D].
        boxes: of the plan, None where it has none or was moved to the GPU before a config asked for them.
        config: of the launch.
        arch: as `arch_of` names it; "cpu" in the interpreter.
    """
    tokens, dim = k.shape[1], k.shape[3]
    if boxes is None:
        return "the plan brings no boxes."
    if arch != "cpu" and (not arch.startswith("sm_") or int(arch.removeprefix("sm_")) < 90):
        return f"this GPU is {arch} and only sm_90 (Hopper) and newer load boxes."
    found = installed()
    if found is None or found < OLDEST:
        return f"this Triton is older than {'.'.join(map(str, OLDEST))}, the first with tensor descriptors."
    if dim not in BOX_DIMS:
        return f"the head dimension is {dim} and boxes are loaded for {BOX_DIMS[0]} and {BOX_DIMS[1]}."
    if k.dtype not in _DTYPES and arch != "cpu":
        return f"the dtype is {k.dtype} and boxes are loaded for float16 and bfloat16."
    slots = boxes.shape[0] * boxes.shape[1] * boxes.shape[2]
    if slots > config.BN:
        return f"a box has {slots} keys and the config computes {config.BN} at once."
    if tokens < boxes.start + boxes.grid[0] * boxes.grid[1] * boxes.grid[2]:
        return f"the grid ends after the last of {tokens} keys."
    for name, x in (("k", k), ("v", v)):
        reason = _strides_refused(x)
        if reason is not None:
            return f"{name} {reason}"
    return None


def _strides_refused(x: Tensor) -> str | None:
    strides = x.stride()
    size = x.element_size()
    if strides[3] != 1:
        return f"has strides {strides} and the last must be 1."
    used = [stride for stride, length in zip(strides[:3], x.shape[:3], strict=True) if length > 1]
    if x.data_ptr() % ALIGNED or any(stride * size % ALIGNED for stride in used):
        return f"has strides {strides} of {size} bytes and its rows must begin at multiples of {ALIGNED} bytes."
    if any(stride <= 0 for stride in used):
        return f"has strides {strides} and none may be 0."
    if _axes(x) is None:
        return f"has strides {strides}, in which heads follow neither each other nor the batch."
    return None


class _Axes(NamedTuple):
    """Two axes of a descriptor around the grid's three: batch, or batch and head; head and D, or D.

    Args:
        outer, inner: length of both; the last is contiguous.
        stride: of the outer axis.
        per_batch, per_head, per_inner: the outer index is batch * per_batch + head * per_head, the inner one head *
            per_inner.
    """

    outer: int
    inner: int
    stride: int
    per_batch: int
    per_head: int
    per_inner: int


def _axes(x: Tensor) -> _Axes | None:
    """A descriptor has at most five axes, so the head joins its neighbour in memory."""
    batch, _, heads, dim = x.shape
    s_batch, _, s_head, _ = x.stride()
    if heads == 1 or s_head == dim:
        return _Axes(batch, heads * dim, s_batch, 1, 0, dim)
    if batch == 1 or s_batch == heads * s_head:
        return _Axes(batch * heads, dim, s_head, heads, 1, 0)
    return None


class BoxLoader(NamedTuple):
    """What the kernel needs to load boxes: descriptors of keys and values, and the factors of their indices."""

    descriptors: tuple[Any, Any]
    steps: tuple[int, ...]

    @classmethod
    def of(cls, k: Tensor, v: Tensor, boxes: Boxes) -> "BoxLoader":
        (d_k, k_steps), (d_v, v_steps) = (_descriptor(x, boxes) for x in (k, v))
        return cls((d_k, d_v), (*k_steps, *v_steps))


def _descriptor(x: Tensor, boxes: Boxes) -> tuple[Any, tuple[int, int, int]]:
    """Descriptor of the grid's tokens [outer, F, H, W, inner] and the factors of its indices."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    axes = _axes(x)
    assert axes is not None, "why_not answers for others"
    dim = x.shape[3]
    _, height, width = boxes.grid
    row = x.stride(1)
    shape = [axes.outer, *boxes.grid, axes.inner]
    strides = [axes.stride, height * width * row, width * row, row, 1]
    # a stride that is never stepped may be anything in memory, but a descriptor wants it aligned
    strides = [stride if length > 1 else dim for stride, length in zip(strides[:4], shape[:4], strict=True)] + [1]
    made = TensorDescriptor(x[:, boxes.start :], shape, strides, [1, *boxes.shape, dim])
    return made, (axes.per_batch, axes.per_head, axes.per_inner)


@triton.jit
def visit_boxes(
    b_acc,
    b_m,
    b_l,
    b_q,
    first,
    end,
    d_k,
    d_v,
    o_k,
    o_k_d,
    o_v,
    o_v_d,
    p_bias,
    p_k_rows,
    p_key_tile,
    p_corners,
    p_mask_id,
    p_atlas,
    o_i,
    factor,
    stride_bias,
    MASKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    D: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the list entries first..end, all of them boxes, to the running sums (b_acc, b_m, b_l)."""
    o_j = tl.arange(0, TILE_N)
    for entry in tl.range(first, end, num_stages=STAGES):
        tile = tl.load(p_key_tile + entry)
        f = tl.load(p_corners + tile * 3)
        y = tl.load(p_corners + tile * 3 + 1)
        x = tl.load(p_corners + tile * 3 + 2)
        b_k = tl.reshape(d_k.load([o_k, f, y, x, o_k_d]), [TILE_N, D])
        b_v = tl.reshape(d_v.load([o_v, f, y, x, o_v_d]), [TILE_N, D])
        if UPCAST:
            b_k = b_k.to(tl.float32)
            b_v = b_v.to(tl.float32)
        o_key = o_j
        if HAS_BIAS:
            o_key = tl.load(p_k_rows + tile * TILE_N + o_j)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, TILE_N]
        b_acc, b_m, b_l = add_keys(
            b_acc, b_m, b_l, b_s, b_v, o_key, entry, o_i, o_j, p_bias, p_mask_id, p_atlas, factor, stride_bias,
            MASKED, False, HAS_BIAS, TILE_M, TILE_N, PRECISION,
        )  # fmt: skip
    return b_acc, b_m, b_l


@triton.jit(do_not_specialize=["heads", "repeat", "n_pieces", "n_slots", "factor"])
def forward_boxes_kernel(
    p_q,
    p_k,
    p_v,
    d_k,
    d_v,
    p_bias,
    p_groups,
    p_out,
    p_lse,
    p_part_out,
    p_part_lse,
    p_q_rows,
    p_k_rows,
    p_corners,
    p_key_tile,
    p_mask_id,
    p_atlas,
    p_pieces,
    factor,
    heads,
    repeat,
    n_pieces,
    n_slots,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_kd,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_vd,
    stride_ob,
    stride_os,
    stride_oh,
    stride_lb,
    stride_ls,
    stride_lh,
    stride_bias_b,
    stride_bias_h,
    stride_bias,
    stride_gb,
    stride_gh,
    box_kb,
    box_kh,
    box_kd,
    box_vb,
    box_vh,
    box_vd,
    HAS_BIAS: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    NEGATE: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid and tensors of `forward_kernel`; descriptors d_k, d_v of the grid's tokens, boxes [1, f, h, w, D] = TILE_N.

    BN = TILE_N and BD = D. Index of a head: batch * box_b + head * box_h on the first axis, head * box_d on the last.
    """
    SPLIT: tl.constexpr = TILE_M // BM
    index = tl.program_id(0)
    row = tl.program_id(1)
    batch = (row // heads).to(tl.int64)
    head = (row % heads).to(tl.int64)
    group = load_group(p_groups, batch, head, stride_gb, stride_gh, HAS_GROUPS)
    p_piece = p_pieces + (group * n_pieces + index // SPLIT) * BOX_PIECE
    tile = tl.load(p_piece)
    if tile < 0:  # menus are padded to the pattern with the most pieces
        return
    first = tl.load(p_piece + 1)
    full_rows = tl.load(p_piece + 2)
    middle = tl.load(p_piece + 3)
    partial_rows = tl.load(p_piece + 4)
    end = tl.load(p_piece + 5)
    slot = tl.load(p_piece + 6)

    o_i = (index % SPLIT) * BM + tl.arange(0, BM)
    o_query = tl.load(p_q_rows + tile * TILE_M + o_i)
    m_query = o_query >= 0
    b_q = load_rows(p_q + batch * stride_qb + head * stride_qh, o_query, m_query, stride_qs, stride_qd, D, BD, UPCAST)
    if NEGATE:
        b_q = -b_q
    key_head = (row % heads) // repeat
    o_k = (row // heads) * box_kb + key_head * box_kh
    o_v = (row // heads) * box_vb + key_head * box_vh
    o_k_d = key_head * box_kd
    o_v_d = key_head * box_vd
    p_k += batch * stride_kb + (head // repeat) * stride_kh
    p_v += batch * stride_vb + (head // repeat) * stride_vh
    p_bias += batch * stride_bias_b + head * stride_bias_h

    b_acc = tl.zeros([BM, BD], tl.float32)
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_acc, b_m, b_l = visit_boxes(
        b_acc, b_m, b_l, b_q, first, full_rows, d_k, d_v, o_k, o_k_d, o_v, o_v_d, p_bias, p_k_rows, p_key_tile,
        p_corners, p_mask_id, p_atlas, o_i, factor, stride_bias,
        False, HAS_BIAS, D, TILE_M, TILE_N, STAGES, UPCAST, PRECISION,
    )  # fmt: skip
    b_acc, b_m, b_l = visit_rows(
        b_acc, b_m, b_l, b_q, full_rows, middle, p_k, p_v, p_bias, p_k_rows, p_key_tile, p_mask_id, p_atlas, o_i,
        factor, stride_ks, stride_kd, stride_vs, stride_vd, stride_bias,
        False, False, HAS_BIAS, D, BD, TILE_M, TILE_N, BN, STAGES, UPCAST, PRECISION,
    )  # fmt: skip
    b_acc, b_m, b_l = visit_boxes(
        b_acc, b_m, b_l, b_q, middle, partial_rows, d_k, d_v, o_k, o_k_d, o_v, o_v_d, p_bias, p_k_rows, p_key_tile,
        p_corners, p_mask_id, p_atlas, o_i, factor, stride_bias,
        True, HAS_BIAS, D, TILE_M, TILE_N, STAGES, UPCAST, PRECISION,
    )  # fmt: skip
    b_acc, b_m, b_l = visit_rows(
        b_acc, b_m, b_l, b_q, partial_rows, end, p_k, p_v, p_bias, p_k_rows, p_key_tile, p_mask_id, p_atlas, o_i,
        factor, stride_ks, stride_kd, stride_vs, stride_vd, stride_bias,
        True, False, HAS_BIAS, D, BD, TILE_M, TILE_N, BN, STAGES, UPCAST, PRECISION,
    )  # fmt: skip
    spoilt = tl.where(is_finite(b_l)[:, None], tl.where(is_finite(b_acc), 0, 1), 0)
    if tl.max(spoilt) > 0:  # again by rows, whatever the tiles are
        b_acc = tl.zeros([BM, BD], tl.float32)
        b_m = tl.full([BM], float("-inf"), tl.float32)
        b_l = tl.zeros([BM], tl.float32)
        b_acc, b_m, b_l = visit_rows(
            b_acc, b_m, b_l, b_q, first, middle, p_k, p_v, p_bias, p_k_rows, p_key_tile, p_mask_id, p_atlas, o_i,
            factor, stride_ks, stride_kd, stride_vs, stride_vd, stride_bias,
            False, True, HAS_BIAS, D, BD, TILE_M, TILE_N, BN, STAGES, UPCAST, PRECISION,
        )  # fmt: skip
        b_acc, b_m, b_l = visit_rows(
            b_acc, b_m, b_l, b_q, middle, end, p_k, p_v, p_bias, p_k_rows, p_key_tile, p_mask_id, p_atlas, o_i,
            factor, stride_ks, stride_kd, stride_vs, stride_vd, stride_bias,
            True, True, HAS_BIAS, D, BD, TILE_M, TILE_N, BN, STAGES, UPCAST, PRECISION,
        )  # fmt: skip
    write(
        b_acc, b_m, b_l, o_query, o_i, slot, batch, head, row, n_slots, p_out, p_lse, p_part_out, p_part_lse,
        stride_ob, stride_os, stride_oh, stride_lb, stride_ls, stride_lh, D, BD, TILE_M,
    )  # fmt: skip
