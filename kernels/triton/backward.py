"""Backward kernels: dQ over the lists of the query tiles, dK and dV over the turned lists of the key tiles.

Both recompute the weights from lse. Long lists are cut into pieces whose fp32 sums are added in a fixed order, so
gradients are the same bits every time. Rows whose result is not finite, or that see no key, pass no gradient on: their
lse is read as +inf, which makes every weight 0, and their vectors as 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..lists import Pieces, TileLists, Turned
from .forward import PIECE
from .inputs import Inputs
from .launch import launch, on_device
from .loaders import is_finite, load_full_rows, load_group, load_rows, load_seen, load_seen_turned, store_rows
from .merge import add
from .tune import Config

DELTA_ROWS = 32  # tokens that one program of the delta kernel takes; 64 spill where the head dimension is padded
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["heads", "tokens"])
def delta_kernel(
    p_out,
    p_do,
    p_lse,
    p_dlse,
    p_delta,
    p_total,
    heads,
    tokens,
    stride_ob,
    stride_os,
    stride_oh,
    stride_dob,
    stride_dos,
    stride_doh,
    stride_dod,
    stride_dlb,
    stride_dls,
    stride_dlh,
    D: tl.constexpr,
    BD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid (tokens / ROWS, B * H): delta = rowsum(dO * O) - dLSE and total = lse * log2(e), fp32 [B * H, tokens].

    Rows that pass no gradient on get total = +inf and delta = 0.
    """
    row = tl.program_id(1)
    batch = (row // heads).to(tl.int64)
    head = (row % heads).to(tl.int64)
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < tokens
    b_o = load_rows(p_out + batch * stride_ob + head * stride_oh, o_row, m_row, stride_os, 1, D, BD, True)
    p_dout = p_do + batch * stride_dob + head * stride_doh
    b_do = load_rows(p_dout, o_row, m_row, stride_dos, stride_dod, D, BD, True)
    o_long = o_row.to(tl.int64)
    b_lse = tl.load(p_lse + (batch * tokens + o_long) * heads + head, mask=m_row, other=0.0)
    p_given = p_dlse + batch * stride_dlb + head * stride_dlh
    b_delta = tl.sum(b_o * b_do, 1) - tl.load(p_given + o_long * stride_dls, mask=m_row, other=0.0)
    alive = is_finite(b_lse) & (tl.max(tl.where(is_finite(b_o), 0, 1), 1) == 0)
    o_flat = row.to(tl.int64) * tokens + o_long
    tl.store(p_delta + o_flat, tl.where(alive, b_delta, 0.0), mask=m_row)
    tl.store(p_total + o_flat, tl.where(alive, b_lse * LOG2E, float("inf")), mask=m_row)


@triton.jit
def _visit_keys(
    b_dq,
    b_q,
    b_do,
    b_total,
    b_delta,
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
    """Add dS K of the list entries first..end to b_dq; SAFE drops broken keys, which no row alive sees."""
    STEPS: tl.constexpr = TILE_N // BN
    for step in tl.range(first * STEPS, end * STEPS, num_stages=1 if SAFE else STAGES):
        entry = step // STEPS
        o_j = (step % STEPS) * BN + tl.arange(0, BN)
        o_key = tl.load(p_k_rows + tl.load(p_key_tile + entry) * TILE_N + o_j)
        if MASKED:
            m_key = o_key >= 0
            b_k = load_rows(p_k, o_key, m_key, stride_ks, stride_kd, D, BD, UPCAST)
            b_v = load_rows(p_v, o_key, m_key, stride_vs, stride_vd, D, BD, UPCAST)
        else:
            b_k = load_full_rows(p_k, o_key, stride_ks, stride_kd, D, BD, UPCAST)
            b_v = load_full_rows(p_v, o_key, stride_vs, stride_vd, D, BD, UPCAST)
        if SAFE:
            b_k = tl.where(is_finite(b_k), b_k, 0.0)
            b_v = tl.where(is_finite(b_v), b_v, 0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * factor  # [BM, BN]
        if HAS_BIAS:
            if MASKED:
                b_bias = tl.load(p_bias + o_key.to(tl.int64) * stride_bias, mask=m_key, other=0.0)
            else:
                b_bias = tl.load(p_bias + o_key.to(tl.int64) * stride_bias)
            b_s = tl.where((b_bias == float("-inf"))[None, :], float("-inf"), b_s + (b_bias * LOG2E)[None, :])
        if MASKED:
            mask = tl.load(p_mask_id + entry)
            b_s = tl.where(load_seen(p_atlas, mask, o_i, o_j, TILE_M, TILE_N), b_s, float("-inf"))
        b_p = tl.exp2(b_s - b_total[:, None])
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    return b_dq


@triton.jit(do_not_specialize=["heads", "repeat", "tokens", "n_pieces", "n_slots", "factor", "scale"])
def dq_kernel(
    p_q,
    p_k,
    p_v,
    p_bias,
    p_groups,
    p_do,
    p_delta,
    p_total,
    p_dq,
    p_part_dq,
    p_q_rows,
    p_k_rows,
    p_key_tile,
    p_mask_id,
    p_atlas,
    p_pieces,
    factor,
    scale,
    heads,
    repeat,
    tokens,
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
    stride_dob,
    stride_dos,
    stride_doh,
    stride_dod,
    stride_gqb,
    stride_gqs,
    stride_gqh,
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
    """Grid (n_pieces * TILE_M / BM, B * H), arguments as for the forward kernel; dq like out, delta and total
    fp32 [B * H, tokens], parts fp32 [B * H, n_slots, TILE_M, D].
    """
    SPLIT: tl.constexpr = TILE_M // BM
    index = tl.program_id(0)
    row = tl.program_id(1)
    batch = (row // heads).to(tl.int64)
    head = (row % heads).to(tl.int64)
    group = load_group(p_groups, batch, head, stride_gb, stride_gh, HAS_GROUPS)
    p_piece = p_pieces + (group * n_pieces + index // SPLIT) * PIECE
    tile = tl.load(p_piece)
    if tile < 0:
        return
    first = tl.load(p_piece + 1)
    middle = tl.load(p_piece + 2)
    end = tl.load(p_piece + 3)
    slot = tl.load(p_piece + 4)

    o_i = (index % SPLIT) * BM + tl.arange(0, BM)
    o_query = tl.load(p_q_rows + tile * TILE_M + o_i)
    m_query = o_query >= 0
    o_flat = row.to(tl.int64) * tokens + o_query
    b_total = tl.load(p_total + o_flat, mask=m_query, other=float("inf"))
    b_delta = tl.load(p_delta + o_flat, mask=m_query, other=0.0)
    m_alive = is_finite(b_total)
    p_q += batch * stride_qb + head * stride_qh
    b_q = load_rows(p_q, o_query, m_alive, stride_qs, stride_qd, D, BD, UPCAST)
    if NEGATE:
        b_q = -b_q
    p_do += batch * stride_dob + head * stride_doh
    b_do = load_rows(p_do, o_query, m_alive, stride_dos, stride_dod, D, BD, UPCAST)
    p_k += batch * stride_kb + (head // repeat) * stride_kh
    p_v += batch * stride_vb + (head // repeat) * stride_vh
    p_bias += batch * stride_bias_b + head * stride_bias_h

    b_dq = tl.zeros([BM, BD], tl.float32)
    b_dq = _visit_keys(
        b_dq, b_q, b_do, b_total, b_delta, first, middle, p_k, p_v, p_bias, p_k_rows, p_key_tile, p_mask_id, p_atlas,
        o_i, factor, stride_ks, stride_kd, stride_vs, stride_vd, stride_bias,
        False, False, HAS_BIAS, D, BD, TILE_M, TILE_N, BN, STAGES, UPCAST, PRECISION,
    )  # fmt: skip
    b_dq = _visit_keys(
        b_dq, b_q, b_do, b_total, b_delta, middle, end, p_k, p_v, p_bias, p_k_rows, p_key_tile, p_mask_id, p_atlas,
        o_i, factor, stride_ks, stride_kd, stride_vs, stride_vd, stride_bias,
        True, False, HAS_BIAS, D, BD, TILE_M, TILE_N, BN, STAGES, UPCAST, PRECISION,
    )  # fmt: skip
    if tl.max(tl.where(is_finite(b_dq), 0, 1)) > 0:  # 0 x NaN: see the forward kernel
        b_dq = tl.zeros([BM, BD], tl.float32)
        b_dq = _visit_keys(
            b_dq, b_q, b_do, b_total, b_delta, first, middle, p_k, p_v, p_bias, p_k_rows, p_key_tile, p_mask_id,
            p_atlas, o_i, factor, stride_ks, stride_kd, stride_vs, stride_vd, stride_bias,
            False, True, HAS_BIAS, D, BD, TILE_M, TILE_N, BN, STAGES, UPCAST, PRECISION,
        )  # fmt: skip
        b_dq = _visit_keys(
            b_dq, b_q, b_do, b_total, b_delta, middle, end, p_k, p_v, p_bias, p_k_rows, p_key_tile, p_mask_id,
            p_atlas, o_i, factor, stride_ks, stride_kd, stride_vs, stride_vd, stride_bias,
            True, True, HAS_BIAS, D, BD, TILE_M, TILE_N, BN, STAGES, UPCAST, PRECISION,
        )  # fmt: skip
    b_dq *= scale
    if slot < 0:
        store_rows(p_dq + batch * stride_gqb + head * stride_gqh, o_query, m_query, stride_gqs, 1, b_dq, D, BD)
    else:
        o_part = (row.to(tl.int64) * n_slots + slot) * TILE_M + o_i
        store_rows(p_part_dq, o_part, m_query, D, 1, b_dq, D, BD)


@triton.jit
def _visit_queries(
    b_dk,
    b_dv,
    b_dbias,
    b_k,
    b_v,
    b_bias,
    first,
    end,
    p_q,
    p_do,
    p_total,
    p_delta,
    p_q_rows,
    p_query_tile,
    p_mask_id,
    p_atlas,
    o_j,
    factor,
    stride_qs,
    stride_qd,
    stride_dos,
    stride_dod,
    MASKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    BM: tl.constexpr,
    STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what the query tiles of the turned list entries first..end give to the sums of one key tile."""
    STEPS: tl.constexpr = TILE_M // BM
    for step in tl.range(first * STEPS, end * STEPS, num_stages=STAGES):
        entry = step // STEPS
        o_i = (step % STEPS) * BM + tl.arange(0, BM)
        o_query = tl.load(p_q_rows + tl.load(p_query_tile + entry) * TILE_M + o_i)
        m_query = o_query >= 0
        b_total = tl.load(p_total + o_query, mask=m_query, other=float("inf"))
        b_delta = tl.load(p_delta + o_query, mask=m_query, other=0.0)
        m_alive = is_finite(b_total)
        b_q = load_rows(p_q, o_query, m_alive, stride_qs, stride_qd, D, BD, UPCAST)
        b_do = load_rows(p_do, o_query, m_alive, stride_dos, stride_dod, D, BD, UPCAST)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * factor  # [BN, BM]
        if HAS_BIAS:
            b_s = b_s + b_bias[:, None]
        if MASKED:
            mask = tl.load(p_mask_id + entry)
            b_s = tl.where(load_seen_turned(p_atlas, mask, o_i, o_j, TILE_M, TILE_N), b_s, float("-inf"))
        b_p = tl.exp2(b_s - b_total[None, :])
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
        if HAS_BIAS:
            b_dbias += tl.sum(b_ds, 1)
    return b_dk, b_dv, b_dbias


@triton.jit(do_not_specialize=["heads", "repeat", "tokens", "keys", "n_pieces", "n_slots", "factor", "scale"])
def dkv_kernel(
    p_q,
    p_k,
    p_v,
    p_bias,
    p_groups,
    p_do,
    p_delta,
    p_total,
    p_dk,
    p_dv,
    p_dbias,
    p_part_dk,
    p_part_dv,
    p_part_dbias,
    p_q_rows,
    p_k_rows,
    p_query_tile,
    p_mask_id,
    p_atlas,
    p_pieces,
    factor,
    scale,
    heads,
    repeat,
    tokens,
    keys,
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
    stride_dob,
    stride_dos,
    stride_doh,
    stride_dod,
    stride_gkb,
    stride_gks,
    stride_gkh,
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
    """Grid (n_pieces * TILE_N / BN, B * H): gradients of the keys of every query head.

    dk, dv [B, Nk, H, D] (the strides gk are those of both), dbias fp32 [B, H, Nk]; parts fp32 [B * H, n_slots, TILE_N,
    D], and without D for dbias.
    """
    SPLIT: tl.constexpr = TILE_N // BN
    index = tl.program_id(0)
    row = tl.program_id(1)
    batch = (row // heads).to(tl.int64)
    head = (row % heads).to(tl.int64)
    group = load_group(p_groups, batch, head, stride_gb, stride_gh, HAS_GROUPS)
    p_piece = p_pieces + (group * n_pieces + index // SPLIT) * PIECE
    tile = tl.load(p_piece)
    if tile < 0:
        return
    first = tl.load(p_piece + 1)
    middle = tl.load(p_piece + 2)
    end = tl.load(p_piece + 3)
    slot = tl.load(p_piece + 4)

    o_j = (index % SPLIT) * BN + tl.arange(0, BN)
    o_key = tl.load(p_k_rows + tile * TILE_N + o_j)
    m_key = o_key >= 0
    p_k += batch * stride_kb + (head // repeat) * stride_kh
    p_v += batch * stride_vb + (head // repeat) * stride_vh
    b_k = load_rows(p_k, o_key, m_key, stride_ks, stride_kd, D, BD, UPCAST)
    b_v = load_rows(p_v, o_key, m_key, stride_vs, stride_vd, D, BD, UPCAST)
    b_k = tl.where(is_finite(b_k), b_k, 0.0)  # no row alive sees a broken key
    b_v = tl.where(is_finite(b_v), b_v, 0.0)
    if NEGATE:
        b_k = -b_k
    b_bias = tl.zeros([BN], tl.float32)
    if HAS_BIAS:
        p_own = p_bias + batch * stride_bias_b + head * stride_bias_h + o_key.to(tl.int64) * stride_bias
        b_bias = tl.load(p_own, mask=m_key, other=0.0) * LOG2E
    p_q += batch * stride_qb + head * stride_qh
    p_do += batch * stride_dob + head * stride_doh
    p_total += row.to(tl.int64) * tokens
    p_delta += row.to(tl.int64) * tokens

    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BD], tl.float32)
    b_dbias = tl.zeros([BN], tl.float32)
    b_dk, b_dv, b_dbias = _visit_queries(
        b_dk, b_dv, b_dbias, b_k, b_v, b_bias, first, middle, p_q, p_do, p_total, p_delta, p_q_rows, p_query_tile,
        p_mask_id, p_atlas, o_j, factor, stride_qs, stride_qd, stride_dos, stride_dod,
        False, HAS_BIAS, D, BD, TILE_M, TILE_N, BM, STAGES, UPCAST, PRECISION,
    )  # fmt: skip
    b_dk, b_dv, b_dbias = _visit_queries(
        b_dk, b_dv, b_dbias, b_k, b_v, b_bias, middle, end, p_q, p_do, p_total, p_delta, p_q_rows, p_query_tile,
        p_mask_id, p_atlas, o_j, factor, stride_qs, stride_qd, stride_dos, stride_dod,
        True, HAS_BIAS, D, BD, TILE_M, TILE_N, BM, STAGES, UPCAST, PRECISION,
    )  # fmt: skip
    b_dk *= scale
    if slot < 0:
        o_first = batch * stride_gkb + head * stride_gkh
        store_rows(p_dk + o_first, o_key, m_key, stride_gks, 1, b_dk, D, BD)
        store_rows(p_dv + o_first, o_key, m_key, stride_gks, 1, b_dv, D, BD)
        if HAS_BIAS:
            tl.store(p_dbias + row.to(tl.int64) * keys + o_key, b_dbias, mask=m_key)
    else:
        o_part = (row.to(tl.int64) * n_slots + slot) * TILE_N + o_j
        store_rows(p_part_dk, o_part, m_key, D, 1, b_dk, D, BD)
        store_rows(p_part_dv, o_part, m_key, D, 1, b_dv, D, BD)
        if HAS_BIAS:
            tl.store(p_part_dbias + o_part, b_dbias, mask=m_key)


def backward(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lists: TileLists,
    pieces: Pieces,
    turned: Turned,
    turned_pieces: Pieces,
    *,
    groups: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `forward`.

    Args:
        d_out, d_lse: gradients [B, Nq, H, D] and [B, Nq, H] of the results, any strides.
        out, lse: the results, contiguous.
        turned, turned_pieces: the lists seen from the key tiles.

    Returns:
        Gradients of q, k and v in their dtypes, and of key_bias (0 where it hides), or None without one; contiguous.

    Raises:
        BackendError: a kernel does not compile or does not fit, with a smaller config either.
    """
    with on_device(q):
        inputs = Inputs.of(q, k, v, lists, groups, key_bias, scale)
        delta, total = _delta(d_out, d_lse, out, lse, inputs)
        given = (q, k, v, inputs.bias, inputs.groups, d_out, delta, total)
        dq = _dq(given, lists, pieces, inputs)
        dk, dv, d_bias = _dkv(given, lists, turned, turned_pieces, inputs)
    if inputs.repeat > 1:  # per query head so far
        dk, dv = (x.unflatten(2, (-1, inputs.repeat)).sum(3) for x in (dk, dv))
    bias = None if key_bias is None else d_bias.sum_to_size(key_bias.shape).to(key_bias.dtype)
    return dq, dk.to(k.dtype), dv.to(v.dtype), bias


def _delta(d_out: Tensor, d_lse: Tensor, out: Tensor, lse: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """delta and total fp32 [B * H, Nq]."""
    tokens = out.shape[1]
    delta = torch.empty((inputs.rows, tokens), dtype=torch.float32, device=out.device)
    total = torch.empty_like(delta)
    grid = (triton.cdiv(tokens, DELTA_ROWS), inputs.rows)
    if 0 not in grid:
        delta_kernel[grid](
            out, d_out, lse, d_lse, delta, total, inputs.heads, tokens, *out.stride()[:3], *d_out.stride(),
            *d_lse.stride(), D=inputs.dim, BD=inputs.shape["BD"], ROWS=DELTA_ROWS, num_warps=4,
        )  # fmt: skip
    return delta, total


def _dq(given: tuple[Tensor, ...], lists: TileLists, pieces: Pieces, inputs: Inputs) -> Tensor:
    q, k, v, d_out = *given[:3], given[5]
    tile, count = inputs.tile_m, pieces.pieces.shape[1]
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    part = inputs.parts(pieces, tile, inputs.dim)

    def run(config: Config) -> None:
        grid = (count * (tile // config.BM), inputs.rows)
        if 0 in grid:
            return
        dq_kernel[grid](
            *given, dq, part, lists.q_rows, lists.k_rows, lists.key_tile, lists.mask_id, lists.atlas, pieces.pieces,
            inputs.factor, inputs.scale, inputs.heads, inputs.repeat, q.shape[1], count, pieces.slots,
            *q.stride(), *k.stride(), *v.stride(), *d_out.stride(), *dq.stride()[:3], *inputs.bias_strides,
            *inputs.group_strides, **inputs.flags, NEGATE=inputs.negate, **inputs.shape, **inputs.blocks(config),
        )  # fmt: skip

    launch(inputs.case("dq"), run)
    add(part, dq, lists.q_rows, pieces, inputs)
    return dq


def _dkv(
    given: tuple[Tensor, ...], lists: TileLists, turned: Turned, pieces: Pieces, inputs: Inputs
) -> tuple[Tensor, Tensor, Tensor]:
    """dk and dv [B, Nk, H, D] of every query head, and dbias [B, H, Nk]."""
    q, k, v, d_out = *given[:3], given[5]
    tile, count = inputs.tile_n, pieces.pieces.shape[1]
    batch, keys = k.shape[:2]
    wide = k.dtype if inputs.repeat == 1 else torch.float32  # sums over query heads are rounded once
    dk, dv = (torch.empty((batch, keys, inputs.heads, inputs.dim), dtype=wide, device=k.device) for _ in range(2))
    bias_shape = (batch, inputs.heads, keys if inputs.has_bias else 0)
    d_bias = torch.empty(bias_shape, dtype=torch.float32, device=k.device)
    parts = [inputs.parts(pieces, tile, *dims) for dims in ((inputs.dim,), (inputs.dim,), (1,))]

    def run(config: Config) -> None:
        grid = (count * (tile // config.BN), inputs.rows)
        if 0 in grid:
            return
        dkv_kernel[grid](
            *given, dk, dv, d_bias, *parts, lists.q_rows, lists.k_rows, turned.query_tile, turned.mask_id, lists.atlas,
            pieces.pieces, inputs.factor, inputs.scale, inputs.heads, inputs.repeat, q.shape[1], keys, count,
            pieces.slots, *q.stride(), *k.stride(), *v.stride(), *d_out.stride(), *dk.stride()[:3],
            *inputs.bias_strides, *inputs.group_strides, **inputs.flags, NEGATE=inputs.negate, **inputs.shape,
            **inputs.blocks(config),
        )  # fmt: skip

    launch(inputs.case("dkv"), run)
    add(parts[0], dk, lists.k_rows, pieces, inputs)
    add(parts[1], dv, lists.k_rows, pieces, inputs)
    if inputs.has_bias:
        add(parts[2], d_bias.transpose(1, 2)[..., None], lists.k_rows, pieces, inputs)
    return dk, dv, d_bias
