"""Forward kernel: every plan, one program per piece of a query tile's list and head.

Keys are visited in two loops, full tiles without any mask code, then partial tiles with a row of the atlas. A hidden
pair has weight 0, and 0 x NaN is NaN: a program whose sums come out non-finite although its weights are finite runs
again with broken values removed and only the rows that see them spoilt. Clean inputs pay one test per program for it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import Pieces
from ..plan_loop import TileLists
from .inputs import Inputs
from .launch import launch, on_device
from .loaders import is_finite, load_full_rows, load_group, load_rows, load_seen, store_rows
from .merge import merge
from .tune import Config

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
PIECE = tl.constexpr(5)  # numbers per piece: tile, first entry, first partial entry, end, slot


@triton.jit
def _visit(
    b_acc,
    b_m,
    b_l,
    b_q,
    first,
    end,
    p_k,
    p_v,
    p_bias,
    p_k_rows,
    p_key_tile,
    p_mask_id,
    p_atlas,
    o_i,
    factor,
    stride_ks,
    stride_kd,
    stride_vs,
    stride_vd,
    stride_bias,
    MASKED: tl.constexpr,
    SAFE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the list entries first..end to the running sums (b_acc, b_m, b_l)."""
    STEPS: tl.constexpr = TILE_N // BN
    for step in tl.range(first * STEPS, end * STEPS, num_stages=1 if SAFE else STAGES):
        entry = step // STEPS  # a power of two
        o_j = (step % STEPS) * BN + tl.arange(0, BN)
        o_key = tl.load(p_k_rows + tl.load(p_key_tile + entry) * TILE_N + o_j)
        if MASKED:
            m_key = o_key >= 0
            b_k = load_rows(p_k, o_key, m_key, stride_ks, stride_kd, D, BD, UPCAST)
        else:
            b_k = load_full_rows(p_k, o_key, stride_ks, stride_kd, D, BD, UPCAST)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
        if MASKED:
            b_v = load_rows(p_v, o_key, m_key, stride_vs, stride_vd, D, BD, UPCAST)
        else:
            b_v = load_full_rows(p_v, o_key, stride_vs, stride_vd, D, BD, UPCAST)
        if SAFE:
            m_v = is_finite(b_v)
            broken = tl.max(tl.where(m_v, 0, 1), 1)
            b_v = tl.where(m_v, b_v, 0.0)
            b_s = tl.where((broken > 0)[None, :], float("nan"), b_s)
        if HAS_BIAS:
            if MASKED:
                b_bias = tl.load(p_bias + o_key.to(tl.int64) * stride_bias, mask=m_key, other=0.0)
            else:
                b_bias = tl.load(p_bias + o_key.to(tl.int64) * stride_bias)
            b_s = b_s * factor + (b_bias * LOG2E)[None, :]
            b_s = tl.where((b_bias == float("-inf"))[None, :], float("-inf"), b_s)
        elif MASKED:
            b_s = b_s * factor
        if MASKED:
            mask = tl.load(p_mask_id + entry)
            b_s = tl.where(load_seen(p_atlas, mask, o_i, o_j, TILE_M, TILE_N), b_s, float("-inf"))
        if MASKED or HAS_BIAS:
            b_new = tl.maximum(b_m, tl.max(b_s, 1))
            b_ref = tl.where(b_new == float("-inf"), 0.0, b_new)  # -inf - -inf is NaN
            b_p = tl.exp2(b_s - b_ref[:, None])
        else:  # factor >= 0, so it commutes with max, and the product fuses with the difference
            b_new = tl.maximum(b_m, tl.max(b_s, 1) * factor)
            b_ref = b_new
            b_p = tl.exp2(b_s * factor - b_ref[:, None])
        b_scale = tl.exp2(b_m - b_ref)
        b_l = b_l * b_scale + tl.sum(b_p, 1)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_scale[:, None], input_precision=PRECISION)
        b_m = b_new
    return b_acc, b_m, b_l


@triton.jit(do_not_specialize=["heads", "repeat", "n_pieces", "n_slots", "factor"])
def forward_kernel(
    p_q,
    p_k,
    p_v,
    p_bias,
    p_groups,
    p_out,
    p_lse,
    p_part_out,
    p_part_lse,
    p_q_rows,
    p_k_rows,
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
    """Grid (n_pieces * TILE_M / BM, B * H).

    q [B, Nq, H, D], k and v [B, Nk, H / repeat, D], bias fp32 [B, H, Nk], out like q, lse fp32 [B, Nq, H]; parts of
    split lists: fp32 [B * H, n_slots, TILE_M, D] and [B * H, n_slots, TILE_M]. `factor` = |scale| * log2(e).
    """
    SPLIT: tl.constexpr = TILE_M // BM
    index = tl.program_id(0)
    row = tl.program_id(1)
    batch = (row // heads).to(tl.int64)
    head = (row % heads).to(tl.int64)
    group = load_group(p_groups, batch, head, stride_gb, stride_gh, HAS_GROUPS)
    p_piece = p_pieces + (group * n_pieces + index // SPLIT) * PIECE
    tile = tl.load(p_piece)
    if tile < 0:  # menus are padded to the pattern with the most pieces
        return
    first = tl.load(p_piece + 1)
    middle = tl.load(p_piece + 2)
    end = tl.load(p_piece + 3)
    slot = tl.load(p_piece + 4)

    o_i = (index % SPLIT) * BM + tl.arange(0, BM)
    o_query = tl.load(p_q_rows + tile * TILE_M + o_i)
    m_query = o_query >= 0
    b_q = load_rows(p_q + batch * stride_qb + head * stride_qh, o_query, m_query, stride_qs, stride_qd, D, BD, UPCAST)
    if NEGATE:
        b_q = -b_q
    p_k += batch * stride_kb + (head // repeat) * stride_kh
    p_v += batch * stride_vb + (head // repeat) * stride_vh
    p_bias += batch * stride_bias_b + head * stride_bias_h

    b_acc = tl.zeros([BM, BD], tl.float32)
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_acc, b_m, b_l = _visit(
        b_acc, b_m, b_l, b_q, first, middle, p_k, p_v, p_bias, p_k_rows, p_key_tile, p_mask_id, p_atlas, o_i, factor,
        stride_ks, stride_kd, stride_vs, stride_vd, stride_bias,
        False, False, HAS_BIAS, D, BD, TILE_M, TILE_N, BN, STAGES, UPCAST, PRECISION,
    )  # fmt: skip
    b_acc, b_m, b_l = _visit(
        b_acc, b_m, b_l, b_q, middle, end, p_k, p_v, p_bias, p_k_rows, p_key_tile, p_mask_id, p_atlas, o_i, factor,
        stride_ks, stride_kd, stride_vs, stride_vd, stride_bias,
        True, False, HAS_BIAS, D, BD, TILE_M, TILE_N, BN, STAGES, UPCAST, PRECISION,
    )  # fmt: skip
    spoilt = tl.where(is_finite(b_l)[:, None], tl.where(is_finite(b_acc), 0, 1), 0)
    if tl.max(spoilt) > 0:
        b_acc = tl.zeros([BM, BD], tl.float32)
        b_m = tl.full([BM], float("-inf"), tl.float32)
        b_l = tl.zeros([BM], tl.float32)
        b_acc, b_m, b_l = _visit(
            b_acc, b_m, b_l, b_q, first, middle, p_k, p_v, p_bias, p_k_rows, p_key_tile, p_mask_id, p_atlas, o_i,
            factor, stride_ks, stride_kd, stride_vs, stride_vd, stride_bias,
            False, True, HAS_BIAS, D, BD, TILE_M, TILE_N, BN, STAGES, UPCAST, PRECISION,
        )  # fmt: skip
        b_acc, b_m, b_l = _visit(
            b_acc, b_m, b_l, b_q, middle, end, p_k, p_v, p_bias, p_k_rows, p_key_tile, p_mask_id, p_atlas, o_i,
            factor, stride_ks, stride_kd, stride_vs, stride_vd, stride_bias,
            True, True, HAS_BIAS, D, BD, TILE_M, TILE_N, BN, STAGES, UPCAST, PRECISION,
        )  # fmt: skip

    m_none = b_l == 0.0  # no key, or none that is not hidden
    b_l = tl.where(m_none, 1.0, b_l)
    b_out = b_acc / b_l[:, None]
    b_lse = tl.where(m_none, float("-inf"), (b_m + tl.log2(b_l)) * LN2)
    if slot < 0:
        store_rows(p_out + batch * stride_ob + head * stride_oh, o_query, m_query, stride_os, 1, b_out, D, BD)
        p_total = p_lse + batch * stride_lb + head * stride_lh + o_query.to(tl.int64) * stride_ls
        tl.store(p_total, b_lse, mask=m_query)
    else:
        o_part = (row.to(tl.int64) * n_slots + slot) * TILE_M + o_i
        store_rows(p_part_out, o_part, m_query, D, 1, b_out, D, BD)
        tl.store(p_part_lse + o_part, b_lse, mask=m_query)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: TileLists,
    pieces: Pieces,
    *,
    groups: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention by tile lists.

    Args:
        q, k, v: [B, S, H, D], any strides, fp16, bf16 or fp32; k and v may have fewer heads and extra keys at the end.
        lists, pieces: the plan's tensors, on the device of q.
        groups: integer [B|1, H|1] picking one of the G lists for every head; not needed when G = 1.
        key_bias: [B|1, H|1, Nk] added to the logits (natural units), -inf hides a key.
        scale: factor of the logits, 1/sqrt(D) by default.

    Returns:
        out [B, Nq, H, D] in q.dtype and lse fp32 [B, Nq, H], both contiguous. Rows without a key give 0 and -inf. A
        non-finite key or value reaches only the rows that see it.

    Raises:
        BackendError: the kernel does not compile or does not fit, with a smaller config either.
    """
    with on_device(q):
        inputs = Inputs.of(q, k, v, lists, groups, key_bias, scale)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        tile = inputs.tile_m
        part_out, part_lse = inputs.parts(pieces, tile, q.shape[-1]), inputs.parts(pieces, tile)

        def run(config: Config) -> None:
            grid = (pieces.pieces.shape[1] * (tile // config.BM), inputs.rows)
            if 0 in grid:
                return
            forward_kernel[grid](
                q, k, v, inputs.bias, inputs.groups, out, lse, part_out, part_lse,
                lists.q_rows, lists.k_rows, lists.key_tile, lists.mask_id, lists.atlas, pieces.pieces,
                inputs.factor, inputs.heads, inputs.repeat, pieces.pieces.shape[1], pieces.slots,
                *q.stride(), *k.stride(), *v.stride(), *out.stride()[:3], *lse.stride(), *inputs.bias_strides,
                *inputs.group_strides, **inputs.flags, NEGATE=inputs.negate, **inputs.shape, **inputs.blocks(config),
            )  # fmt: skip

        launch(inputs.case("forward"), run)
        merge(part_out, part_lse, out, lse, lists, pieces, inputs)
    return out, lse
