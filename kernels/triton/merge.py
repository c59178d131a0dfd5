"""Kernels that join the pieces of split lists: by log-sum-exp for outputs, by addition for gradients. No atomics."""

import triton
import triton.language as tl
from torch import Tensor

from ..lists import Pieces, TileLists
from .inputs import Inputs
from .loaders import load_group, load_rows, store_rows
from .tune import padded_dim

ROWS = 16  # slots that one program joins
JOIN = tl.constexpr(3)  # numbers per join: tile, first slot, end


@triton.jit(do_not_specialize=["heads", "n_joins", "n_slots"])
def merge_kernel(
    p_part_out,
    p_part_lse,
    p_groups,
    p_out,
    p_lse,
    p_q_rows,
    p_joins,
    heads,
    n_joins,
    n_slots,
    stride_ob,
    stride_os,
    stride_oh,
    stride_lb,
    stride_ls,
    stride_lh,
    stride_gb,
    stride_gh,
    HAS_GROUPS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid (n_joins * TILE / ROWS, B * H): out and lse of query tiles from their parts."""
    SPLIT: tl.constexpr = TILE // ROWS
    index = tl.program_id(0)
    row = tl.program_id(1)
    batch = (row // heads).to(tl.int64)
    head = (row % heads).to(tl.int64)
    group = load_group(p_groups, batch, head, stride_gb, stride_gh, HAS_GROUPS)
    p_join = p_joins + (group * n_joins + index // SPLIT) * JOIN
    tile = tl.load(p_join)
    if tile < 0:
        return
    o_i = (index % SPLIT) * ROWS + tl.arange(0, ROWS)
    o_query = tl.load(p_q_rows + tile * TILE + o_i)
    m_query = o_query >= 0
    b_acc = tl.zeros([ROWS, BD], tl.float32)
    b_m = tl.full([ROWS], float("-inf"), tl.float32)
    b_l = tl.zeros([ROWS], tl.float32)
    for slot in range(tl.load(p_join + 1), tl.load(p_join + 2)):
        o_part = (row.to(tl.int64) * n_slots + slot) * TILE + o_i
        b_part = tl.load(p_part_lse + o_part, mask=m_query, other=float("-inf"))
        b_new = tl.maximum(b_m, b_part)
        b_ref = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_scale = tl.exp(b_m - b_ref)
        b_weight = tl.exp(b_part - b_ref)
        b_x = load_rows(p_part_out, o_part, m_query, D, 1, D, BD, False)
        b_acc = b_acc * b_scale[:, None] + b_x * b_weight[:, None]
        b_l = b_l * b_scale + b_weight
        b_m = b_new
    m_none = b_l == 0.0
    b_l = tl.where(m_none, 1.0, b_l)
    b_out = b_acc / b_l[:, None]
    b_lse = tl.where(m_none, float("-inf"), b_m + tl.log(b_l))
    store_rows(p_out + batch * stride_ob + head * stride_oh, o_query, m_query, stride_os, 1, b_out, D, BD)
    p_total = p_lse + batch * stride_lb + head * stride_lh + o_query.to(tl.int64) * stride_ls
    tl.store(p_total, b_lse, mask=m_query)


@triton.jit(do_not_specialize=["heads", "n_joins", "n_slots"])
def sum_kernel(
    p_parts,
    p_groups,
    p_x,
    p_rows,
    p_joins,
    heads,
    n_joins,
    n_slots,
    stride_xb,
    stride_xs,
    stride_xh,
    stride_xd,
    stride_gb,
    stride_gh,
    HAS_GROUPS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid (n_joins * TILE / ROWS, B * H): x [B, S, H, D] of split tiles, the sum of their parts [., ., TILE, D]."""
    SPLIT: tl.constexpr = TILE // ROWS
    index = tl.program_id(0)
    row = tl.program_id(1)
    batch = (row // heads).to(tl.int64)
    head = (row % heads).to(tl.int64)
    group = load_group(p_groups, batch, head, stride_gb, stride_gh, HAS_GROUPS)
    p_join = p_joins + (group * n_joins + index // SPLIT) * JOIN
    tile = tl.load(p_join)
    if tile < 0:
        return
    o_i = (index % SPLIT) * ROWS + tl.arange(0, ROWS)
    o_token = tl.load(p_rows + tile * TILE + o_i)
    m_token = o_token >= 0
    b_x = tl.zeros([ROWS, BD], tl.float32)
    for slot in range(tl.load(p_join + 1), tl.load(p_join + 2)):
        o_part = (row.to(tl.int64) * n_slots + slot) * TILE + o_i
        b_x += load_rows(p_parts, o_part, m_token, D, 1, D, BD, False)
    store_rows(p_x + batch * stride_xb + head * stride_xh, o_token, m_token, stride_xs, stride_xd, b_x, D, BD)


def merge(
    part_out: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor, lists: TileLists, pieces: Pieces, inputs: Inputs
) -> None:
    """Write the rows of `out` and `lse` whose lists were split."""
    grid = _grid(pieces, inputs.tile_m, inputs.rows)
    if 0 in grid:
        return
    merge_kernel[grid](
        part_out, part_lse, inputs.groups, out, lse, lists.q_rows, pieces.joins,
        inputs.heads, pieces.joins.shape[1], pieces.slots, *out.stride()[:3], *lse.stride(), *inputs.group_strides,
        HAS_GROUPS=inputs.has_groups, D=inputs.dim, BD=padded_dim(inputs.dim), TILE=inputs.tile_m, ROWS=ROWS,
        num_warps=4,
    )  # fmt: skip


def add(parts: Tensor, x: Tensor, rows: Tensor, pieces: Pieces, inputs: Inputs) -> None:
    """Write the rows of x [B, S, H, D] whose lists were split; parts [B * H, slots, tile, D]."""
    tile, dim = parts.shape[2:]
    grid = _grid(pieces, tile, inputs.rows)
    if 0 in grid:
        return
    sum_kernel[grid](
        parts, inputs.groups, x, rows, pieces.joins, inputs.heads, pieces.joins.shape[1], pieces.slots, *x.stride(),
        *inputs.group_strides, HAS_GROUPS=inputs.has_groups, D=dim, BD=padded_dim(dim), TILE=tile, ROWS=ROWS,
        num_warps=4,
    )  # fmt: skip


def _grid(pieces: Pieces, tile: int, rows: int) -> tuple[int, int]:
    return pieces.joins.shape[1] * (tile // ROWS), rows
