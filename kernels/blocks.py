"""Batches of equal query tiles with gathered keys: what the halo and the partition backend have in common."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .dense import attend_block, compute_dtype, splits_scores
from .finite import contained
from .heads import Heads, bias_of_heads, group_rows, heads_first, heads_last, in_order

CHUNK_BYTES = 1 << 22  # gathered keys, values and scores of one step and pair of threads: stays near the cache
PIECE_QUERIES = 32  # of fewer than 192 queries torch's fused CPU kernel multiplies so many at a time
_PIECES_FROM = 0.95  # share of the keys above which it does not pay to attend a tile piece by piece


class Tiles(Protocol):
    """Query tiles of equal shape that share one mask."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Number of tiles, queries per tile, keys per tile."""

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Token indices of the queries [n, tq] and of the keys [n, tk] of some tiles."""

    def bias(self) -> tuple[Tensor | None, bool]:
        """Additive fp32 mask [tq, tk] (None when every key is visible), and whether it hides all keys of a query."""

    def to(self, device: torch.device) -> "Tiles":
        """The same tiles with their tensors on `device`."""


class DenseRows:
    """Queries that see whole runs of keys (text in joint attention): one dense call without a gather.

    Args:
        queries: (first, last + 1) query token.
        keys: runs (first, last + 1) of key tokens.
    """

    def __init__(self, queries: tuple[int, int], keys: Sequence[tuple[int, int]]) -> None:
        self.queries, self.keys = queries, tuple(keys)

    def attend_sample(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        """out [queries, H, D] from the tensors [S, H, D] and the bias [H, Nk] of one sample."""
        keys, values = (_runs(x, self.keys, 0) for x in (k, v))
        added = None if bias is None else _runs(bias, self.keys, 1)[:, None, None]
        tensors = (x.transpose(0, 1)[:, None] for x in (q[slice(*self.queries)], keys, values))
        return attend_block(*tensors, added, scale, lse=False, may_hide=True)[0][:, 0].transpose(0, 1)

    def attend(self, heads: Heads, scale: float, lse: bool) -> tuple[Tensor, Tensor | None]:
        """out [B*H, queries, D] and lse [B*H, queries]."""
        k, v = (_runs(x, self.keys, 1) for x in (heads.k, heads.v))
        bias = None if heads.bias is None else _runs(heads.bias, self.keys, 1)[:, None, None]
        q = heads.q[:, slice(*self.queries)]
        out, total = attend_block(q[:, None], k[:, None], v[:, None], bias, scale, lse=lse, may_hide=True)
        return out[:, 0], total[:, 0] if lse else None


class Work:
    """Everything one pattern of a menu asks for: classes of tiles, and rows that are dense."""

    def __init__(self, tiles: Sequence[Tiles], dense: Sequence[DenseRows]) -> None:
        self.tiles, self.dense = tuple(tiles), tuple(dense)

    @property
    def queries(self) -> int:
        """Queries that have a result; none has two."""
        tiled = sum(number * queries for number, queries, _ in (tiles.sizes for tiles in self.tiles))
        return tiled + sum(stop - start for start, stop in (rows.queries for rows in self.dense))

    def to(self, device: torch.device) -> "Work":
        """The same work with its tensors on `device`."""
        return Work([tiles.to(device) for tiles in self.tiles], self.dense)


def attend_works(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    works: Sequence[Work],
    *,
    groups: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Run every work of a menu on its heads; queries that no work names give 0 and -inf.

    Returns:
        out [B, Nq, H, D] in q.dtype (a transposed view where heads are gathered apart) and lse fp32 [B, Nq, H] or None.
    """
    batch, tokens, count, dim = q.shape
    factor = dim**-0.5 if scale is None else scale
    rows = group_rows(groups, len(works), batch, count)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        if rows[0] is None and k.shape[2] == count and not splits_scores(q, 1, return_lse):
            bias = None if key_bias is None else bias_of_heads(q, key_bias)
            return _attend_samples(q, k, v, bias, works[0], factor), None
        heads = heads_first(q, k, v, key_bias)
        parts = [
            _attend_heads(block, work, tokens, factor, return_lse)
            for work, own in zip(works, rows, strict=True)
            if own is None or len(own)  # an entry of the menu that no head uses
            for block in _head_blocks(heads.take(own), work, return_lse)
        ]
        out = in_order([out for out, _ in parts], rows)
        return heads_last(out, batch), heads_last(
            in_order([lse for _, lse in parts], rows), batch
        ) if return_lse else None

    dtype = compute_dtype(q)
    out, lse = contained(run, q.to(dtype), k.to(dtype), v.to(dtype))
    return out.to(q.dtype), lse


def _attend_samples(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, work: Work, scale: float) -> Tensor:
    """out [B, S, H, D] of a work that all heads share, where blocks run fused.

    Tokens are gathered with all their heads at once: no copy in another order, and rows H times as long to fetch.
    """
    out = []
    for sample in range(len(q)):
        own = (q[sample].contiguous(), k[sample].contiguous(), v[sample].contiguous())
        grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*own, bias))
        empty = own[0].new_zeros if work.queries < len(own[0]) else own[0].new_empty
        rows = Rows(empty(own[0].shape), grad, dim=0)
        for index, part in _sample_steps(*own, None if bias is None else bias[sample], work, scale):
            rows.put(index, part)
        out.append(rows.result())
    return torch.stack(out) if len(out) > 1 else out[0][None]


def _sample_steps(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, work: Work, scale: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Token indices [n] and outputs [n, H, D] of one sample [S, H, D], a few tiles at a time."""
    heads = q.shape[1]
    for tiles in work.tiles:
        (mask, _), number = tiles.bias(), tiles.sizes[0]
        mask = None if mask is None else mask.to(q.dtype)
        parts = _pieces(mask)
        step = max(1, _budget() // (heads * _gathered_bytes(q, tiles, bias is not None)))
        for start in range(0, number, step):
            q_rows, k_rows = tiles.rows(start, min(start + step, number))
            blocks = [
                x.index_select(0, rows.reshape(-1)).view(*rows.shape, heads, -1).transpose(1, 2)
                for x, rows in ((q, q_rows), (k, k_rows), (v, k_rows))
            ]
            added = mask
            if bias is not None:
                own = bias.index_select(1, k_rows.reshape(-1)).view(heads, *k_rows.shape).transpose(0, 1)[:, :, None]
                added = own if mask is None else own + mask
            for queries, keys in parts:
                seen = None if added is None else added[..., queries if added.shape[-2] > 1 else slice(None), keys]
                own_q, own_k, own_v = blocks[0][:, :, queries], blocks[1][:, :, keys], blocks[2][:, :, keys]
                out, _ = attend_block(own_q, own_k, own_v, seen, scale, lse=False, may_hide=True)
                yield q_rows[:, queries].reshape(-1), out.transpose(1, 2).flatten(0, 1)
    for rows in work.dense:
        yield torch.arange(*rows.queries, device=q.device), rows.attend_sample(q, k, v, bias, scale)


def _pieces(mask: Tensor | None) -> list[tuple[slice, slice]]:
    """Runs of a tile's queries, each with the run of keys outside of which they see nothing.

    The upper rows of a tile do not reach the last rows of its box of keys: a disc of radius 8 on tiles of 8 x 8 loses a
    sixth of its pairs. One piece where that saves too little.
    """
    whole = [(slice(None), slice(None))]
    if mask is None or mask.device.type != "cpu" or len(mask) <= PIECE_QUERIES:
        return whole
    parts, pairs = [], 0
    for start in range(0, len(mask), PIECE_QUERIES):
        rows = mask[start : start + PIECE_QUERIES]
        seen = torch.isfinite(rows).any(dim=0).nonzero()
        first, last = (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, 1)
        parts.append((slice(start, start + len(rows)), slice(first, last)))
        pairs += len(rows) * (last - first)
    return parts if pairs < _PIECES_FROM * mask.numel() else whole


def _attend_heads(heads: Heads, work: Work, tokens: int, scale: float, lse: bool) -> tuple[Tensor, Tensor | None]:
    """out [heads, tokens, D] and lse [heads, tokens] of one work."""
    count, _, dim = heads.q.shape
    wide = torch.promote_types(heads.q.dtype, torch.float32)
    out = Rows(heads.q.new_zeros(count, tokens, dim), wants_grad(heads))
    total = Rows(heads.q.new_full((count, tokens), float("-inf"), dtype=wide), wants_grad(heads)) if lse else None
    for index, part, part_lse in _steps(heads, work, scale, lse):
        out.put(index, part)
        if total is not None:
            total.put(index, part_lse)
    return out.result(), total.result() if total is not None else None


def _steps(heads: Heads, work: Work, scale: float, lse: bool) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Token indices [n], outputs [heads, n, D] and lse [heads, n], a few tiles at a time."""
    for tiles in work.tiles:
        number = tiles.sizes[0]
        (bias, hides), step = tiles.bias(), _tiles_per_step(heads, tiles, lse)
        hides = hides or heads.bias is not None
        for start in range(0, number, step):
            q_rows, k_rows = tiles.rows(start, min(start + step, number))
            q, k, v = (_gather(x, rows) for x, rows in ((heads.q, q_rows), (heads.k, k_rows), (heads.v, k_rows)))
            added = _with_key_bias(bias, heads.bias, k_rows)
            out, total = attend_block(q, k, v, added, scale, lse=lse, may_hide=hides)
            yield q_rows.reshape(-1), out.reshape(len(out), q_rows.numel(), -1), total.flatten(1) if lse else None
    for rows in work.dense:
        index = torch.arange(*rows.queries, device=heads.q.device)
        yield index, *rows.attend(heads, scale, lse)


class Rows:
    """Results collected along axis `dim` of tokens: written in place, or joined at the end where gradients flow."""

    def __init__(self, empty: Tensor, grad: bool, dim: int = 1) -> None:
        self.empty, self.grad, self.dim = empty, grad, dim
        self.indices: list[Tensor] = []
        self.parts: list[Tensor] = []

    def put(self, index: Tensor, part: Tensor) -> None:
        if self.grad:
            self.indices.append(index)
            self.parts.append(part)
        else:
            self.empty.index_copy_(self.dim, index, part)

    def result(self) -> Tensor:
        if not self.parts:
            return self.empty
        return self.empty.index_copy(self.dim, torch.cat(self.indices), torch.cat(self.parts, dim=self.dim))


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """[heads, S, D] at token indices [n, t] -> [heads, n, t, D]."""
    return x.index_select(1, rows.reshape(-1)).view(x.shape[0], *rows.shape, x.shape[2])


def _with_key_bias(bias: Tensor | None, key_bias: Tensor | None, rows: Tensor) -> Tensor | None:
    if key_bias is None:
        return bias
    own = key_bias.index_select(1, rows.reshape(-1)).view(-1, rows.shape[0], 1, rows.shape[1])
    return own if bias is None else own + bias


def _runs(x: Tensor, runs: Sequence[tuple[int, int]], dim: int) -> Tensor:
    parts = [x.narrow(dim, start, stop - start) for start, stop in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _tile_bytes(heads: Heads, tiles: Tiles, lse: bool) -> int:
    """Bytes one tile of one head brings in: keys, values, and scores where they are kept."""
    _, queries, keys = tiles.sizes
    scores = 6 * queries * keys if splits_scores(heads.q, keys, lse) else 0
    return _gathered_bytes(heads.q, tiles, heads.bias is not None) + scores


def _gathered_bytes(q: Tensor, tiles: Tiles, bias: bool) -> int:
    """Bytes of the keys, values and key bias of one tile and head."""
    _, queries, keys = tiles.sizes
    return 2 * keys * q.shape[2] * q.element_size() + (4 * queries * keys if bias else 0)


def _budget() -> int:
    return CHUNK_BYTES * max(1, torch.get_num_threads() // 2)


def _tiles_per_step(heads: Heads, tiles: Tiles, lse: bool) -> int:
    return max(1, _budget() // (len(heads.q) * _tile_bytes(heads, tiles, lse)))


def _head_blocks(heads: Heads, work: Work, lse: bool) -> list[Heads]:
    """Heads that one step can hold."""
    largest = max((_tile_bytes(heads, tiles, lse) for tiles in work.tiles), default=0)
    size = max(1, _budget() // largest) if largest else len(heads.q)
    return (
        [heads]
        if size >= len(heads.q)
        else [heads.take(slice(start, start + size)) for start in range(0, len(heads.q), size)]
    )


def wants_grad(heads: Heads) -> bool:
    """Whether a gradient will be asked of these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in heads)
