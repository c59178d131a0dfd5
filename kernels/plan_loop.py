"""Plan loop: the listed key tiles of every query tile, in torch.

It reads the same int32 tensors as the GPU kernels and does what they do, tile lists, bit masks and merged pieces, so it
is their oracle; and it is the generic CPU path for patterns that no other backend takes. Computed in at least fp32.
Memory beyond q, k, v and the output: heads-first copies and about 2 x `STEP_BYTES`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import Rows, wants_grad
from .dense import attend_block
from .finite import contained
from .heads import Heads, group_rows, heads_first, heads_last, in_order
from .lists import TileLists
from .merge import merge_lse
from .need import Need

STEP_BYTES = 1 << 25  # scores, gathered keys and values of one step, 32 MiB (one tile pair of all heads at least)


def why_not(need: Need) -> str | None:
    """Why the plan loop cannot serve a call: it always can."""
    return None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: TileLists,
    *,
    groups: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention by tile lists.

    Args:
        q, k, v: [B, S, H, D], any strides; k and v may have fewer heads and extra keys at the end.
        groups: integer [B|1, H|1] picking one of the G lists for every head; not needed when G = 1.
        key_bias: [B|1, H|1, Nk] added to the logits.
        scale: factor of the logits, 1/sqrt(D) by default.

    Returns:
        out [B, Nq, H, D] in q.dtype and lse fp32 [B, Nq, H]. Rows without a key give 0 and -inf.
    """
    batch, tokens, count, dim = q.shape
    factor = dim**-0.5 if scale is None else scale
    rows = group_rows(groups, len(lists.row_ptr), batch, count)
    wide = torch.promote_types(q.dtype, torch.float32)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        heads = heads_first(q, k, v, key_bias)
        parts = [_attend_group(heads.take(own), lists, group, tokens, factor) for group, own in enumerate(rows)]
        out, lse = (in_order(list(part), rows) for part in zip(*parts, strict=True))
        return heads_last(out, batch), heads_last(lse, batch)

    out, lse = contained(run, q.to(wide), k.to(wide), v.to(wide))
    return out.to(q.dtype), lse


def _attend_group(heads: Heads, lists: TileLists, group: int, tokens: int, scale: float) -> tuple[Tensor, Tensor]:
    count, _, dim = heads.q.shape
    out = Rows(heads.q.new_zeros(count, tokens, dim), wants_grad(heads))
    lse = Rows(heads.q.new_full((count, tokens), float("-inf")), wants_grad(heads))
    if count:
        for tiles, entries in _steps(lists, group, _pairs_per_step(heads, lists)):
            part, total = _attend_tiles(heads, lists, tiles, entries, scale)
            index = lists.q_rows[tiles].reshape(-1)
            valid = torch.nonzero(index >= 0).reshape(-1)
            index = index[valid].long()
            out.put(index, part.flatten(1, 2)[:, valid])
            lse.put(index, total.flatten(1)[:, valid])
    return out.result(), lse.result()


def _attend_tiles(
    heads: Heads, lists: TileLists, tiles: Tensor, pieces: list[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """out [heads, n, BM, D] and lse [heads, n, BM] of query tiles over all pieces of their lists."""
    rows = lists.q_rows[tiles].clamp_min(0).long()
    q = heads.q.index_select(1, rows.reshape(-1)).unflatten(1, rows.shape)
    out, lse = _attend_piece(heads, lists, q, pieces[0], scale)
    for entries in pieces[1:]:
        more, total = _attend_piece(heads, lists, q, entries, scale)
        out, lse = merge_lse(torch.stack([out, more]), torch.stack([lse, total]))
    return out, lse


def _attend_piece(heads: Heads, lists: TileLists, q: Tensor, entries: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The query tiles q [heads, n, BM, D] against the list entries [n, c]."""
    rows = lists.k_rows[lists.key_tile[entries].long()].flatten(1).clamp_min(0).long()
    k, v = (x.index_select(1, rows.reshape(-1)).unflatten(1, rows.shape) for x in (heads.k, heads.v))
    bias = _additive(lists, entries, q.dtype)
    if heads.bias is not None:
        own = heads.bias.index_select(1, rows.reshape(-1)).unflatten(1, rows.shape)[:, :, None]
        bias = own if bias is None else own + bias
    return attend_block(q, k, v, bias, scale, lse=True, may_hide=True)


def _additive(lists: TileLists, entries: Tensor, dtype: torch.dtype) -> Tensor | None:
    """0 and -inf [n, BM, c * BN] from the bit masks of list entries [n, c], or None when all are full."""
    ids = lists.mask_id[entries].long()
    if bool((ids < 0).all()):
        return None
    words = lists.atlas[ids.clamp_min(0)]
    bits = (words[..., None] >> torch.arange(32, device=words.device, dtype=words.dtype)) & 1
    seen = bits.flatten(-2).bool() | (ids < 0)[:, :, None, None]
    zero = torch.zeros((), dtype=dtype, device=words.device)
    return zero.where(seen, float("-inf")).transpose(1, 2).flatten(2)


def _steps(lists: TileLists, group: int, limit: int) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Query tiles [n] with equally long lists, and their list entries in pieces [n, c] of at most `limit` in all."""
    pointer = lists.row_ptr[group].long()
    counts = pointer.diff()
    for length in torch.unique(counts).tolist():
        if length == 0:
            continue
        tiles = torch.nonzero(counts == length).reshape(-1)
        for batch in tiles.split(max(1, limit // length)):
            entries = pointer[batch][:, None] + torch.arange(length, device=pointer.device)
            yield batch, list(entries.split(limit, dim=1))


def _pairs_per_step(heads: Heads, lists: TileLists) -> int:
    """Tile pairs that fit one step: scores three times (logits, weights, mask) and gathered keys and values."""
    queries, keys = lists.q_rows.shape[1], lists.k_rows.shape[1]
    each = heads.q.element_size() * (3 * queries * keys + 2 * keys * heads.q.shape[2])
    return max(1, STEP_BYTES // (len(heads.q) * each))


def backward(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lists: TileLists,
    *,
    groups: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `attend`, by the formula that the GPU kernels use; no graph is recorded.

    Args:
        d_out, d_lse: gradients [B, Nq, H, D] and [B, Nq, H] of the results.
        out, lse: the results. Rows that are not finite, or see no key, pass no gradient on.

    Returns:
        Gradients of q, k, v in their dtypes, and of key_bias, or None without one.
    """
    batch, _, count, dim = q.shape
    factor = dim**-0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    dead = ~(torch.isfinite(lse) & torch.isfinite(out).all(-1))
    alive = [x.to(wide).masked_fill(dead[..., None], 0.0) for x in (q, d_out, out)]
    delta = (alive[1] * alive[2]).sum(-1) - d_lse.to(wide).masked_fill(dead, 0.0)
    finite = (torch.isfinite(k) & torch.isfinite(v)).all(-1, keepdim=True)  # rows alive see no other key
    clean = (x.to(wide).masked_fill(~finite, 0.0) for x in (k, v))
    heads = heads_first(alive[0], *clean, key_bias)
    given = heads_first(alive[1], delta[..., None], lse.to(wide).masked_fill(dead, float("inf"))[..., None])
    grads = Grads(*(torch.zeros_like(x) for x in heads[:3]), heads.q.new_zeros(len(heads.k), heads.k.shape[1]))
    for group, own in enumerate(group_rows(groups, len(lists.row_ptr), batch, count)):
        index = torch.arange(len(heads.q), device=q.device) if own is None else own
        part = Grads(*(x[index] for x in grads))
        _backward_group(part, heads.take(own), given.take(own), lists, group, factor)
        for x, new in zip(grads, part, strict=True):
            x[index] = new
    dq, dk, dv, d_bias = (heads_last(x, batch) for x in grads)
    repeat = count // k.shape[2]
    dk, dv = (x.unflatten(2, (-1, repeat)).sum(3) for x in (dk, dv))
    bias = None if key_bias is None else d_bias.transpose(1, 2).sum_to_size(key_bias.shape).to(key_bias.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), bias


class Grads(NamedTuple):
    """Sums of gradients, heads first: q [B*H, Nq, D], k and v [B*H, Nk, D], bias [B*H, Nk]."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor


def _backward_group(grads: Grads, heads: Heads, given: Heads, lists: TileLists, group: int, scale: float) -> None:
    """Add what one pattern of the menu gives; `given` holds d_out, delta and lse in the places of q, k and v."""
    if not len(heads.q):
        return
    for tiles, pieces in _steps(lists, group, _pairs_per_step(heads, lists)):
        slots = lists.q_rows[tiles]
        index = slots.clamp_min(0).long()
        q, d_out, delta, lse = (
            x.index_select(1, index.reshape(-1)).unflatten(1, index.shape) for x in (heads.q, *given[:3])
        )
        lse = lse.masked_fill((slots < 0)[..., None], float("inf"))  # empty slots weigh nothing
        for entries in pieces:
            keys = lists.k_rows[lists.key_tile[entries].long()].flatten(1).clamp_min(0).long()
            k, v = (x.index_select(1, keys.reshape(-1)).unflatten(1, keys.shape) for x in (heads.k, heads.v))
            scores = scale * (q @ k.transpose(-1, -2))
            if heads.bias is not None:
                scores = scores + heads.bias.index_select(1, keys.reshape(-1)).unflatten(1, keys.shape)[:, :, None]
            bias = _additive(lists, entries, q.dtype)
            weights = torch.exp((scores if bias is None else scores + bias) - lse)
            d_scores = weights * (d_out @ v.transpose(-1, -2) - delta)
            grads.q.index_add_(1, index.reshape(-1), (scale * (d_scores @ k)).flatten(1, 2))
            grads.k.index_add_(1, keys.reshape(-1), (scale * (d_scores.transpose(-1, -2) @ q)).flatten(1, 2))
            grads.v.index_add_(1, keys.reshape(-1), (weights.transpose(-1, -2) @ d_out).flatten(1, 2))
            grads.bias.index_add_(1, keys.reshape(-1), d_scores.sum(2).flatten(1))
