"""Loads shared by the kernels: rows of tokens, bit masks, additive key weights."""

import triton
import triton.language as tl


@triton.jit
def load_rows(p_x, o_row, m_row, stride_s, stride_d, D: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr):
    """Head vectors [rows, BD] of tokens `o_row` [rows]; 0 where `m_row` [rows] is false and beyond D."""
    o_d = tl.arange(0, BD)
    m_x = m_row[:, None]
    if D != BD:
        m_x = m_x & (o_d < D)[None, :]
    b_x = tl.load(p_x + o_row.to(tl.int64)[:, None] * stride_s + (o_d * stride_d)[None, :], mask=m_x, other=0.0)
    if UPCAST:
        b_x = b_x.to(tl.float32)
    return b_x


@triton.jit
def load_full_rows(p_x, o_row, stride_s, stride_d, D: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr):
    """Head vectors [rows, BD] of tokens `o_row` [rows], all of which exist; 0 beyond D."""
    o_d = tl.arange(0, BD)
    p_row = p_x + o_row.to(tl.int64)[:, None] * stride_s + (o_d * stride_d)[None, :]
    b_x = tl.load(p_row, mask=(o_d < D)[None, :], other=0.0) if D != BD else tl.load(p_row)
    if UPCAST:
        b_x = b_x.to(tl.float32)
    return b_x


@triton.jit
def store_rows(p_x, o_row, m_row, stride_s, stride_d, b_x, D: tl.constexpr, BD: tl.constexpr):
    """Write head vectors b_x [rows, BD] to tokens `o_row` [rows] where `m_row` holds."""
    o_d = tl.arange(0, BD)
    m_x = m_row[:, None]
    if D != BD:
        m_x = m_x & (o_d < D)[None, :]
    p_row = p_x + o_row.to(tl.int64)[:, None] * stride_s + (o_d * stride_d)[None, :]
    tl.store(p_row, b_x.to(p_x.dtype.element_ty), mask=m_x)


@triton.jit
def load_seen(p_atlas, mask, o_i, o_j, TILE_M: tl.constexpr, TILE_N: tl.constexpr):
    """Whether query slots `o_i` [m] see key slots `o_j` [n] under row `mask` of the atlas: [m, n].

    One word per query and 32 keys is loaded and spread in registers; a load per pair would keep the memory units busy.
    """
    WORDS: tl.constexpr = TILE_N // 32
    p_row = p_atlas + mask.to(tl.int64) * (TILE_M * WORDS) + o_i * WORDS
    o_word = (o_j >> 5)[None, :]
    b_word = tl.load(p_row)[:, None]
    for word in tl.static_range(1, WORDS):
        b_word = tl.where(o_word == word, tl.load(p_row + word)[:, None], b_word)
    return ((b_word >> (o_j & 31)[None, :]) & 1) != 0


@triton.jit
def load_seen_turned(p_atlas, mask, o_i, o_j, TILE_M: tl.constexpr, TILE_N: tl.constexpr):
    """`load_seen` as [n, m]: keys by queries."""
    WORDS: tl.constexpr = TILE_N // 32
    p_row = p_atlas + mask.to(tl.int64) * (TILE_M * WORDS) + o_i * WORDS
    o_word = (o_j >> 5)[:, None]
    b_word = tl.load(p_row)[None, :]
    for word in tl.static_range(1, WORDS):
        b_word = tl.where(o_word == word, tl.load(p_row + word)[None, :], b_word)
    return ((b_word >> (o_j & 31)[:, None]) & 1) != 0


@triton.jit
def is_finite(b_x):
    """Elementwise; a comparison with NaN is false."""
    return tl.abs(b_x) < float("inf")


@triton.jit
def load_group(p_groups, batch, head, stride_b, stride_h, HAS_GROUPS: tl.constexpr):
    """Entry of the pattern menu of one head."""
    group = 0
    if HAS_GROUPS:
        group = tl.load(p_groups + batch * stride_b + head * stride_h).to(tl.int32)
    return group
