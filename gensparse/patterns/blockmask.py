"""Rules given by a mask of blocks: runs of consecutive tokens, in some order of the sequence, see each other wholly.

The mask has one entry per pair of blocks, so it is small where a mask of tokens is not (75,600 tokens in blocks of 128:
591 x 591). Relations of boxes are exact: a prefix sum counts the visible pairs of any two runs of blocks.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import product

import numpy as np

from gensparse.layout import Boxes, Coords, Grid, Ints, Layout
from gensparse.patterns.axes import range_reduce
from gensparse.patterns.base import (
    FULL,
    NONE,
    PARTIAL,
    RUNS,
    Bools,
    Columns,
    Relation,
    Rule,
    Source,
    Span,
    empty_span,
)
from gensparse.patterns.codes import combine
from gensparse.patterns.linear import flat

_ENTRIES = 1 << 20  # of a mask that are turned into boxes at once
_FEW = 3  # blocks per side whose mask bits fit a signature


class BlockMaskRule(Rule):
    """A mask of blocks on the own tokens of a layout, and on keys of sources.

    Args:
        rank: [N, then the keys of the sources] place of every token in the order that is cut into blocks; -1: it
            neither sees nor is seen.
        blocks: tokens of a query block and of a key block.
        mask: bool [query blocks, key blocks].
        natural: RUNS when good tiles are runs of raster tokens, or the window (H, W) that the order walks through row
            by row, whose rows then make the tiles; None lets the plan search.
        sources: whose keys have a rank.
    """

    def __init__(
        self,
        layout: Layout,
        rank: Ints,
        blocks: tuple[int, int],
        mask: Bools,
        natural: str | tuple[int, int] | None = None,
        sources: Sequence[Source] = (),
    ) -> None:
        super().__init__(layout, sources)
        self.rank, self.blocks, self.mask, self.natural = rank, blocks, mask, natural
        segments = self.key_segments
        self._shapes = np.array([segment.shape for segment in segments], np.int64)
        self._starts = np.cumsum([0, *(segment.length for segment in segments[:-1])])
        own = np.split(rank, self._starts[1:])
        self._alive = np.array([int(np.count_nonzero(ranks >= 0)) for ranks in own])
        self._first = np.array([int(ranks[0]) for ranks in own])
        in_order = all(
            np.array_equal(ranks[:alive], np.arange(first, first + alive)) and (ranks[alive:] < 0).all()
            for ranks, alive, first in zip(own, self._alive, self._first, strict=True)
        )
        self._reaches: dict[int, Span] = {}
        self._straight = in_order and bool((self._shapes[:, :2] == 1).all())

    def allowed(self, q: Coords, k: Coords, group: int = 0) -> Bools:
        (q_rank, k_rank) = self._ranks(q), self._ranks(k)
        q_block, k_block = (np.maximum(r, 0) // b for r, b in zip((q_rank, k_rank), self.blocks, strict=True))
        return (q_rank >= 0) & (k_rank >= 0) & self.mask[q_block, k_block]

    def tile_relation(self, q: Boxes, k: Boxes, group: int = 0) -> Relation:
        if self._straight and _unstepped(q) and _unstepped(k):
            (q_runs, q_some, q_whole), (k_runs, k_some, k_whole) = self._straight_runs(q, 0), self._straight_runs(k, 1)
            seen, area = self._count(q_runs, k_runs)
            some, every = (seen > 0) & q_some & k_some, (seen == area) & q_whole & k_whole
            return np.where(some, np.where(every, FULL, PARTIAL), NONE)
        (q_table, q_whole, q_index), (k_table, k_whole, k_index) = self._box_runs(q, 0), self._box_runs(k, 1)
        some = np.zeros((len(q_table), len(k_table)), np.bool_)
        every = q_whole[:, None] & k_whole
        for i, j in product(range(q_table.shape[1]), range(k_table.shape[1])):
            seen, area = self._count(q_table[:, i, None], k_table[None, :, j])
            some |= seen > 0
            every &= seen == area
        relation = np.where(some, np.where(every, FULL, PARTIAL), NONE)
        return relation[q_index, k_index]

    def key_box(self, q: Boxes, segment: int, group: int = 0) -> Span:
        """Runs of raster tokens may see any part of the video: the whole segment. Windows see what is around them."""
        lo, hi = empty_span(q)
        if not isinstance(self.natural, tuple):
            seen = np.all(q.hi > q.lo, axis=-1) & (self._alive[q.segment] > 0) & bool(self._alive[segment])
            return lo, np.where(seen[..., None], self._shapes[segment], hi)
        table, _, index = self._box_runs(q, 0)
        lows, highs = self._reach(segment)
        lo, hi = np.broadcast_to(self._shapes[segment], (len(table), 3)), np.zeros((len(table), 3), np.int64)
        for run in np.moveaxis(table, 1, 0):
            some = (run[:, 1] > run[:, 0])[:, None]
            lo = np.where(some, np.minimum(lo, range_reduce(np.minimum, lows, run[:, 0], run[:, 1])), lo)
            hi = np.where(some, np.maximum(hi, range_reduce(np.maximum, highs, run[:, 0], run[:, 1])), hi)
        return np.where(hi > 0, lo, 0)[index], hi[index]

    def signature(self, q: Boxes, k: Boxes, group: int = 0) -> Columns:
        relation = self.tile_relation(q, k, group).astype(np.int64)
        single = np.where(relation == PARTIAL, np.arange(len(relation)) + len(relation), relation)
        if not (self._straight and _unstepped(q) and _unstepped(k)):
            return [single]
        columns, few = [], np.ones(len(relation), np.bool_)
        runs = []
        for side, (box, block) in enumerate(zip((q, k), self.blocks, strict=True)):
            own, _, whole = self._straight_runs(box, side)
            few &= whole & (own[..., 1] - own[..., 0] <= _FEW)
            columns.append((self._first[box.segment] + box.lo[..., 2]) % block)
            runs.append(own[..., 0])
        bits = np.zeros(len(relation), np.int64)
        for i, j in product(range(_FEW), range(_FEW)):
            rows, cols = (np.minimum(r + o, n - 1) for r, o, n in zip(runs, (i, j), self.mask.shape, strict=True))
            bits = 2 * bits + self.mask[rows, cols]
        known = few & (relation == PARTIAL)
        return [np.where(known, column, 0) for column in (*columns, bits)] + [np.where(known, PARTIAL, single)]

    def tiles(self, segment: int, size: int) -> Grid | str | None:
        if segment != self.layout.target or self.natural is None or isinstance(self.natural, str):
            return self.natural if segment == self.layout.target else None
        height, width = self.natural
        rows = size // width
        return (1, rows, width) if rows and rows * width == size and height % rows == 0 else None

    def linear(self) -> Rule:
        return BlockMaskRule(flat(self.layout), self.rank, self.blocks, self.mask, RUNS, self.sources)

    def partition(self, segment: int, group: int = 0) -> Ints | None:
        ranks = self.rank[self._starts[segment] : self._starts[segment] + self.layout.segments[segment].length]
        if (ranks < 0).any():
            return None
        q, k = (np.unique(ranks // block) for block in self.blocks)
        rows, row = np.unique(self.mask[np.ix_(q, k)], axis=0, return_inverse=True)
        q_label = row.reshape(-1)[np.searchsorted(q, ranks // self.blocks[0])]
        k_place = np.searchsorted(k, ranks // self.blocks[1])
        # an equivalence relation: every key is shown by exactly one kind of row, the kind of its own token
        shown = rows.argmax(axis=0)[k_place]
        return q_label if (rows.sum(axis=0) == 1).all() and np.array_equal(shown, q_label) else None

    def _ranks(self, tokens: Coords) -> Ints:
        shape = self._shapes[tokens.segment]
        position = np.minimum(tokens.position, shape - 1)
        index = (position[..., 0] * shape[..., 1] + position[..., 1]) * shape[..., 2] + position[..., 2]
        return self.rank[self._starts[tokens.segment] + index]

    @cached_property
    def _sums(self) -> Ints:
        """Visible pairs of blocks before every pair of edges."""
        sums = np.zeros((self.mask.shape[0] + 1, self.mask.shape[1] + 1), np.int32)
        np.cumsum(self.mask, axis=0, out=sums[1:, 1:], dtype=np.int32)
        np.cumsum(sums, axis=1, out=sums)
        return sums

    def _reach(self, segment: int) -> Span:
        """lo, hi [query blocks, 3] of the box in a segment around the tokens that every query block sees."""
        if segment not in self._reaches:
            shape, size = self._shapes[segment], self.blocks[1]
            ranks = self.rank[self._starts[segment] : self._starts[segment] + int(shape.prod())]
            tokens = np.argsort(ranks, kind="stable")[np.count_nonzero(ranks < 0) :]
            position = np.stack(np.unravel_index(tokens, tuple(shape)), -1)
            own, first = np.unique(ranks[tokens] // size, return_index=True)
            low, high = np.broadcast_to(shape, (len(self.mask), 3)), np.zeros((len(self.mask), 3), np.int64)
            if len(own):
                lo, hi = np.minimum.reduceat(position, first), np.maximum.reduceat(position, first) + 1
                step = max(1, _ENTRIES // len(own))
                parts = [self.mask[start : start + step, own, None] for start in range(0, len(self.mask), step)]
                low = np.concatenate([np.where(part, lo, shape).min(axis=1) for part in parts])
                high = np.concatenate([np.where(part, hi, 0).max(axis=1) for part in parts])
            self._reaches[segment] = low, high
        return self._reaches[segment]

    def _count(self, q: Ints, k: Ints) -> tuple[Ints, Ints]:
        """Visible and all pairs of runs of blocks [..., 2]."""
        (q_lo, q_hi), (k_lo, k_hi) = np.moveaxis(q, -1, 0), np.moveaxis(k, -1, 0)
        sums = self._sums
        seen = sums[q_hi, k_hi] - sums[q_lo, k_hi] - sums[q_hi, k_lo] + sums[q_lo, k_lo]
        return seen, (q_hi - q_lo) * (k_hi - k_lo)

    def _straight_runs(self, box: Boxes, side: int) -> tuple[Ints, Bools, Bools]:
        """Run of blocks [..., 2] of runs of tokens, whether a token of each takes part, and whether all do."""
        start, stop = box.lo[..., 2], np.minimum(box.hi[..., 2], self._shapes[box.segment, 2])
        filled = (stop > start) & np.all(box.hi[..., :2] > box.lo[..., :2], axis=-1)
        alive, first = self._alive[box.segment], self._first[box.segment]
        some = filled & (start < alive)
        edge = np.where(some, first + start, 0), np.where(some, first + np.minimum(stop, alive) - 1, 0)
        lo, last = (place // self.blocks[side] for place in edge)
        return np.stack([lo, last + 1], -1), some, filled & (stop <= alive)

    def _box_runs(self, box: Boxes, side: int) -> tuple[Ints, Bools, Ints]:
        """Runs of blocks [U, R, 2] of the distinct boxes (unused: empty), whether all tokens of each take part, and the
        index of every box."""
        segment, lo, hi, step = np.broadcast_arrays(box.segment[..., None], box.lo, box.hi, box.step)
        rows = np.concatenate([segment[..., :1], lo, hi, step], -1)
        flat_rows = rows.reshape(-1, 10)
        _, first, index = np.unique(combine(list(flat_rows.T)), return_index=True, return_inverse=True)
        found = [self._blocks_of(row, self.blocks[side]) for row in flat_rows[first]]
        table = np.zeros((len(found), max((len(runs) for runs, _ in found), default=0), 2), np.int64)
        for entry, (runs, _) in zip(table, found, strict=True):
            entry[: len(runs)] = runs
        return table, np.array([whole for _, whole in found], np.bool_), index.reshape(rows.shape[:-1])

    def _blocks_of(self, row: Ints, block: int) -> tuple[Ints, bool]:
        """Runs of blocks [R, 2] of one box (segment, lo, hi, step), and whether all of its tokens take part."""
        segment, lo, hi, step = int(row[0]), row[1:4], row[4:7], row[7:10]
        shape = self._shapes[segment]
        axes = [np.arange(a, min(b, n), s) for a, b, s, n in zip(lo, hi, step, shape, strict=True)]
        index = (axes[0][:, None, None] * shape[1] + axes[1][:, None]) * shape[2] + axes[2]
        ranks = self.rank[self._starts[segment] + index.reshape(-1)]
        some = np.unique(ranks[ranks >= 0] // block)
        if not len(some):
            return np.zeros((0, 2), np.int64), False
        breaks = np.flatnonzero(np.diff(some) > 1)
        edges = np.concatenate([[0], breaks + 1]), np.concatenate([breaks, [len(some) - 1]])
        return np.stack([some[edges[0]], some[edges[1]] + 1], -1), len(ranks) == np.count_nonzero(ranks >= 0)


def _unstepped(box: Boxes) -> bool:
    return bool(np.all(np.asarray(box.step) == 1))
