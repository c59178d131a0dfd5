"""Forward kernel: every plan, one program per piece of a query tile's list and head.

Keys are visited in two loops, full tiles without any mask code, then partial tiles with a row of the atlas. A hidden
pair has weight 0, and 0 x NaN is NaN: a program whose sums come out non-finite although its weights are finite runs
again with broken values removed and only the rows that see them spoilt. Clean inputs pay one test per program for it.
"""

import logging
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..lists import Boxes, Pieces, TileLists
from .boxes import BoxLoader, forward_boxes_kernel, why_not
from .inputs import Inputs
from .launch import launch, on_device
from .loaders import is_finite, load_group, load_rows
from .merge import merge
from .tune import Config, arch_of
from .visit import visit_rows, write

logger = logging.getLogger("gensparse")

PIECE = tl.constexpr(5)  # numbers per piece: tile, first entry, first partial entry, end, slot


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
    b_acc, b_m, b_l = visit_rows(
        b_acc, b_m, b_l, b_q, first, middle, p_k, p_v, p_bias, p_k_rows, p_key_tile, p_mask_id, p_atlas, o_i, factor,
        stride_ks, stride_kd, stride_vs, stride_vd, stride_bias,
        False, False, HAS_BIAS, D, BD, TILE_M, TILE_N, BN, STAGES, UPCAST, PRECISION,
    )  # fmt: skip
    b_acc, b_m, b_l = visit_rows(
        b_acc, b_m, b_l, b_q, middle, end, p_k, p_v, p_bias, p_k_rows, p_key_tile, p_mask_id, p_atlas, o_i, factor,
        stride_ks, stride_kd, stride_vs, stride_vd, stride_bias,
        True, False, HAS_BIAS, D, BD, TILE_M, TILE_N, BN, STAGES, UPCAST, PRECISION,
    )  # fmt: skip
    spoilt = tl.where(is_finite(b_l)[:, None], tl.where(is_finite(b_acc), 0, 1), 0)
    if tl.max(spoilt) > 0:
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
    boxes: Boxes | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention by tile lists.

    Args:
        q, k, v: [B, S, H, D], any strides, fp16, bf16 or fp32; k and v may have fewer heads and extra keys at the end.
        lists, pieces: the plan's tensors, on the device of q.
        groups: integer [B|1, H|1] picking one of the G lists for every head; not needed when G = 1.
        key_bias: [B|1, H|1, Nk] added to the logits (natural units), -inf hides a key.
        scale: factor of the logits, 1/sqrt(D) by default.
        boxes: where a config asks for loads by descriptor; without them, or where they do not fit, keys come by rows.

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
            results = (inputs.bias, inputs.groups, out, lse, part_out, part_lse, lists.q_rows, lists.k_rows)
            numbers = (
                inputs.factor, inputs.heads, inputs.repeat, pieces.pieces.shape[1], pieces.slots,
                *q.stride(), *k.stride(), *v.stride(), *out.stride()[:3], *lse.stride(), *inputs.bias_strides,
                *inputs.group_strides,
            )  # fmt: skip
            constants = {**inputs.flags, "NEGATE": inputs.negate, **inputs.shape, **inputs.blocks(config)}
            if _takes_boxes(k, v, boxes, config):
                loader = BoxLoader.of(k, v, boxes)
                forward_boxes_kernel[grid](
                    q, k, v, *loader.descriptors, *results, boxes.corners, boxes.key_tile, boxes.mask_id, lists.atlas,
                    boxes.pieces, *numbers, *loader.steps, **constants,
                )  # fmt: skip
                return
            forward_kernel[grid](
                q, k, v, *results, lists.key_tile, lists.mask_id, lists.atlas, pieces.pieces, *numbers, **constants
            )

        launch(inputs.case("forward"), run)
        merge(part_out, part_lse, out, lse, lists, pieces, inputs)
    return out, lse


def _takes_boxes(k: Tensor, v: Tensor, boxes: Boxes | None, config: Config) -> bool:
    """Whether a launch loads boxes; where its config asks for them in vain, the log says why, once."""
    if config.loader != "boxes":
        return False
    reason = why_not(k, v, boxes, config, arch_of(k.device))
    if reason is not None:
        _announce(reason)
    return reason is None


@lru_cache(maxsize=64)
def _announce(reason: str) -> None:
    logger.info("Keys are loaded by rows; %s", reason)
