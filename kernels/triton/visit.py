"""What the forward kernels do with keys: the running softmax, and the loop over list entries fetched by rows."""

import triton
import triton.language as tl

from .loaders import is_finite, load_full_rows, load_rows, load_seen, store_rows

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def add_keys(
    b_acc,
    b_m,
    b_l,
    b_s,
    b_v,
    o_key,
    entry,
    o_i,
    o_j,
    p_bias,
    p_mask_id,
    p_atlas,
    factor,
    stride_bias,
    MASKED: tl.constexpr,
    SAFE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add keys with products b_s [BM, BN] and values b_v [BN, BD] to the running sums; `o_key` is read for biases."""
    if SAFE:
        m_v = is_finite(b_v)
        broken = tl.max(tl.where(m_v, 0, 1), 1)
        b_v = tl.where(m_v, b_v, 0.0)
        b_s = tl.where((broken > 0)[None, :], float("nan"), b_s)
    if HAS_BIAS:
        if MASKED:
            b_bias = tl.load(p_bias + o_key.to(tl.int64) * stride_bias, mask=o_key >= 0, other=0.0)
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
    return b_acc, b_new, b_l


@triton.jit
def visit_rows(
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
        b_acc, b_m, b_l = add_keys(
            b_acc, b_m, b_l, b_s, b_v, o_key, entry, o_i, o_j, p_bias, p_mask_id, p_atlas, factor, stride_bias,
            MASKED, SAFE, HAS_BIAS, TILE_M, TILE_N, PRECISION,
        )  # fmt: skip
    return b_acc, b_m, b_l


@triton.jit
def write(
    b_acc,
    b_m,
    b_l,
    o_query,
    o_i,
    slot,
    batch,
    head,
    row,
    n_slots,
    p_out,
    p_lse,
    p_part_out,
    p_part_lse,
    stride_ob,
    stride_os,
    stride_oh,
    stride_lb,
    stride_ls,
    stride_lh,
    D: tl.constexpr,
    BD: tl.constexpr,
    TILE_M: tl.constexpr,
):
    """The result of the running sums, to the rows of the query tile or, for a piece of a list, to its slot."""
    m_query = o_query >= 0
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
