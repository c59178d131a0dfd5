"""Batches of equal query tiles with gathered keys: what the halo and the partition backend have in common."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .dense import attend_block, compute_dtype, splits_scores
from .finite import contained
from .heads import Heads, group_rows, heads_first, heads_last, in_order

CHUNK_BYTES = 1 << 23  # gathered keys, values and scores of one step and pair of threads: stays near the cache


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
        out [B, Nq, H, D] in q.dtype (a transposed view) and lse fp32 [B, Nq, H] or None.
    """
    batch, tokens, count, dim = q.shape
    factor = dim**-0.5 if scale is None else scale
    rows = group_rows(groups, len(works), batch, count)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
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
    """Results [heads, S, ...] collected by token: written in place, or joined once at the end where gradients flow."""

    def __init__(self, empty: Tensor, grad: bool) -> None:
        self.empty, self.grad = empty, grad
        self.indices: list[Tensor] = []
        self.parts: list[Tensor] = []

    def put(self, index: Tensor, part: Tensor) -> None:
        if self.grad:
            self.indices.append(index)
            self.parts.append(part)
        else:
            self.empty.index_copy_(1, index, part)

    def result(self) -> Tensor:
        if not self.parts:
            return self.empty
        return self.empty.index_copy(1, torch.cat(self.indices), torch.cat(self.parts, dim=1))


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
    if heads.bias is not None:
        scores += 4 * queries * keys
    return 2 * keys * heads.q.shape[2] * heads.q.element_size() + scores


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
