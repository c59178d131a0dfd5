"""Separable rules: one 1-D rule per grid axis, joined by AND.

Every 1-D rule has the same form. The tokens of the axis are ranked (identity, rolled, or sorted by dilation group), and
query i sees the keys whose rank lies in an interval: lo[rank i] <= rank j < hi[rank i], with lo and hi non-decreasing.
That covers NATTEN's windows, strides, dilations and causality, blocks with and without wrap, halos, grids and long
distance, and it makes the relation of two boxes exact from a few comparisons.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from gensparse.layout import Boxes, Grid, Ints, Layout
from gensparse.patterns.base import Bools, Columns, Span
from gensparse.patterns.codes import combine
from gensparse.patterns.target import TargetRule


class Axis:
    """The 1-D rule of one axis.

    Args:
        lo, hi: [L] first and last + 1 rank seen by the query of each rank; never empty, both non-decreasing.
        rank: [L] rank of every token, or None for the identity.
        step: distance between the tokens of a good tile.
    """

    def __init__(self, lo: Ints, hi: Ints, rank: Ints | None = None, step: int = 1) -> None:
        self.lo, self.hi, self.step = lo, hi, step
        self.length = len(lo)
        self.ordered = rank is None
        self.rank = np.arange(self.length) if rank is None else rank

    @property
    def whole(self) -> bool:
        """Every query sees every key."""
        return bool(self.lo[-1] == 0 and self.hi[0] == self.length)

    def pairs(self, q: Ints, k: Ints) -> Bools:
        """Allowed pairs of coordinates."""
        own, other = self.rank[q], self.rank[k]
        return (self.lo[own] <= other) & (other < self.hi[own])

    def meets(self, q: tuple[Ints, Ints, Ints], k: tuple[Ints, Ints, Ints]) -> tuple[Bools, Bools]:
        """(some, every) pair allowed between token ranges (start, stop, step), broadcast against each other."""
        q_runs, q_index = self._runs(*q)
        k_runs, k_index = self._runs(*k)
        some = np.zeros((len(q_runs), len(k_runs)), np.bool_)
        every = np.ones_like(some)
        for i in range(q_runs.shape[1]):
            for j in range(k_runs.shape[1]):
                one, both = self._runs_meet(q_runs[:, i, None], k_runs[None, :, j])
                some |= one
                every &= both
        return some[q_index, k_index], every[q_index, k_index]

    def span(self, start: Ints, stop: Ints) -> Span:
        """First and last + 1 coordinate of the keys seen from the tokens start..stop-1."""
        if self.ordered:
            return self.lo[start], self.hi[stop - 1]
        nearest, farthest = self._reach
        return range_reduce(np.minimum, nearest, start, stop), range_reduce(np.maximum, farthest, start, stop) + 1

    def classes(self) -> Ints | None:
        """Class of every token if the rule is an equivalence relation, else None."""
        ranks = np.arange(self.length)
        same = (self.lo[self.lo] == self.lo) & (self.hi[self.lo] == self.hi) & (self.hi[self.hi - 1] == self.hi)
        own = (self.lo <= ranks) & (ranks < self.hi) & (self.lo[self.hi - 1] == self.lo)
        return self.lo[self.rank] if np.all(same & own) else None

    @cached_property
    def _reach(self) -> Span:
        """First and last coordinate among the keys of every token."""
        coordinate = np.argsort(self.rank)
        nearest = range_reduce(np.minimum, coordinate, self.lo, self.hi)
        farthest = range_reduce(np.maximum, coordinate, self.lo, self.hi)
        return nearest[self.rank], farthest[self.rank]

    def _runs(self, start: Ints, stop: Ints, step: Ints) -> tuple[Ints, Ints]:
        """The distinct token ranges as runs of consecutive ranks [U, R, 2] (unused: empty), and the index of each."""
        start, stop, step = np.broadcast_arrays(start, stop, np.minimum(step, self.length))
        code = (start * (self.length + 1) + stop) * (self.length + 1) + step
        distinct, index = np.unique(code, return_inverse=True)
        first, last = np.divmod(distinct // (self.length + 1), self.length + 1)
        stride = distinct % (self.length + 1)
        index = index.reshape(code.shape)
        if self.ordered and np.all(stride == 1):
            return np.stack([first, last], -1)[:, None], index
        runs = [_consecutive(np.sort(self.rank[a:b:s])) for a, b, s in zip(first, last, stride, strict=True)]
        table = np.zeros((len(runs), max(map(len, runs), default=0), 2), np.int64)
        for row, run in zip(table, runs, strict=True):
            row[: len(run)] = run
        return table, index

    def _runs_meet(self, q: Ints, k: Ints) -> tuple[Bools, Bools]:
        (q_lo, q_hi), (k_lo, k_hi) = np.moveaxis(q, -1, 0), np.moveaxis(k, -1, 0)
        used = (q_lo < q_hi) & (k_lo < k_hi)
        # the last query whose interval starts before the keys end has the farthest end of all such queries
        last = np.minimum(q_hi, np.searchsorted(self.lo, k_hi)) - 1
        some = used & (last >= q_lo) & (self.hi[last] > k_lo)
        every = ~used | ((self.lo[q_hi - 1] <= k_lo) & (self.hi[np.minimum(q_lo, self.length - 1)] >= k_hi))
        return some, every


class RingAxis(Axis):
    """Keys at most `radius` tokens away on a closed axis, whose last token is next to its first.

    The keys of a token are no interval of any ranking, so this axis answers by distances instead.
    """

    def __init__(self, length: int, radius: int) -> None:
        super().__init__(np.zeros(length, np.int64), np.full(length, length))
        self.radius = radius

    @property
    def whole(self) -> bool:
        return 2 * self.radius + 1 >= self.length

    def pairs(self, q: Ints, k: Ints) -> Bools:
        return (k - q + self.radius) % self.length <= 2 * self.radius

    def meets(self, q: tuple[Ints, Ints, Ints], k: tuple[Ints, Ints, Ints]) -> tuple[Bools, Bools]:
        if np.all(q[2] == 1) and np.all(k[2] == 1):  # distances are all integers from low to high
            low, high = k[0] - (q[1] - 1), k[1] - 1 - q[0]
            turns = [turn * self.length for turn in (-1, 0, 1)]
            some = [(low <= turn + self.radius) & (high >= turn - self.radius) for turn in turns]
            every = [(low >= turn - self.radius) & (high <= turn + self.radius) for turn in turns]
            return np.logical_or.reduce(some), np.logical_or.reduce(every)
        q_codes, k_codes = (combine(list(np.stack(np.broadcast_arrays(*side), -1).reshape(-1, 3).T)) for side in (q, k))
        shape = [np.broadcast_shapes(*map(np.shape, side)) for side in (q, k)]
        q_first, q_index = np.unique(q_codes, return_index=True, return_inverse=True)[1:]
        k_first, k_index = np.unique(k_codes, return_index=True, return_inverse=True)[1:]
        ranges = [
            [np.arange(*(np.broadcast_to(edge, form).reshape(-1)[i] for edge in side)) for i in first]
            for side, form, first in ((q, shape[0], q_first), (k, shape[1], k_first))
        ]
        table = np.array([[_meet(self.pairs(a[:, None], b)) for b in ranges[1]] for a in ranges[0]])
        found = table[q_index.reshape(shape[0]), k_index.reshape(shape[1])]
        return found[..., 0], found[..., 1]

    def span(self, start: Ints, stop: Ints) -> Span:
        lo, hi = start - self.radius, stop + self.radius
        around = (lo < 0) | (hi > self.length) | self.whole
        return np.where(around, 0, lo), np.where(around, self.length, hi)

    def classes(self) -> Ints | None:
        return np.zeros(self.length, np.int64) if self.whole else None


class SeparableRule(TargetRule):
    """Three 1-D rules on the target's grid; a key is visible when all three agree."""

    def __init__(self, layout: Layout, axes: Sequence[Axis]) -> None:
        super().__init__(layout)
        self.axes = tuple(axes)

    def _pairs(self, q: Ints, k: Ints) -> Bools:
        seen = np.ones(np.broadcast_shapes(q.shape, k.shape)[:-1], np.bool_)
        for number, axis in enumerate(self.axes):
            if not axis.whole:
                seen &= axis.pairs(q[..., number], k[..., number])
        return seen

    def _meets(self, q: Boxes, k: Boxes) -> tuple[Bools, Bools]:
        some, every = np.True_, np.True_
        for number, axis in enumerate(self.axes):
            if not axis.whole:
                one, both = axis.meets(_range(q, number), _range(k, number))
                some, every = some & one, every & both
        return some, every

    def _span(self, q: Boxes) -> Span:
        spans = [axis.span(q.lo[..., n], q.hi[..., n]) for n, axis in enumerate(self.axes)]
        return np.stack([lo for lo, _ in spans], -1), np.stack([hi for _, hi in spans], -1)

    def signature(self, q: Boxes, k: Boxes, group: int = 0) -> Columns:
        inside = (q.segment == self.target) & (k.segment == self.target)
        columns = [inside.astype(np.int64)]
        for number, axis in enumerate(self.axes):
            column = np.zeros(len(inside), np.int64)
            if not axis.whole:
                column[inside] = _axis_masks(axis, _ranges(q, number)[inside], _ranges(k, number)[inside])
            columns.append(column)
        return columns

    def tile_step(self, segment: int) -> Grid:
        if segment != self.target:
            return (1, 1, 1)
        frames, rows, columns = (axis.step for axis in self.axes)
        return frames, rows, columns

    def partition(self, segment: int, group: int = 0) -> Ints | None:
        classes = [axis.classes() for axis in self.axes]
        if segment != self.target or any(labels is None for labels in classes):
            return None
        combined = np.zeros((1, 1, 1), np.int64)
        for number, labels in enumerate(classes):
            distinct, index = np.unique(labels, return_inverse=True)
            shape = [1, 1, 1]
            shape[number] = len(index)
            combined = combined * len(distinct) + index.reshape(shape)
        return combined.reshape(-1)


def whole(length: int) -> Axis:
    """Every token of the axis."""
    return blocks(length, length)


def own(length: int) -> Axis:
    """Only the same coordinate."""
    return blocks(length, 1)


def blocks(length: int, window: int, shift: int = 0, wrap: bool = False) -> Axis:
    """Windows of `window` tokens starting at `shift`; wrap rolls the axis instead of leaving a ragged first window."""
    token = np.arange(length)
    if wrap and shift:
        start = token // window * window
        return Axis(start, np.minimum(start + window, length), (token - shift) % length)
    start = (token - shift) // window * window + shift
    return Axis(np.maximum(start, 0), np.minimum(start + window, length))


def band(length: int, radius: int) -> Axis:
    """Keys at most `radius` tokens away, clipped at the borders."""
    token, reach = np.arange(length), min(radius, length)
    return Axis(np.maximum(token - reach, 0), np.minimum(token + reach + 1, length))


def ring(length: int, radius: int) -> Axis:
    """Keys at most `radius` tokens away, counted around the end of the axis."""
    return RingAxis(length, min(radius, length))


def inward(length: int, radius: int) -> Axis:
    """A window of 2 * radius + 1 tokens around the query that moves inwards at the borders and keeps its size."""
    return neighborhood(length, min(2 * min(radius, length) + 1, length), 1, 1, False)


def sliding_tiles(length: int, tile: int, window: int) -> Axis:
    """`window` tiles around the query's tile, moved inwards at the borders; the last tile may be ragged."""
    count = -(-length // tile)
    window = min(window, count)
    start = np.clip(np.arange(length) // tile - window // 2, 0, count - window)
    return Axis(start * tile, np.minimum((start + window) * tile, length))


def halo(length: int, block: int, margin: int) -> Axis:
    """The query's block and `margin` tokens on both sides, clipped at the borders."""
    start, reach = np.arange(length) // block * block, min(margin, length)
    return Axis(np.maximum(start - reach, 0), np.minimum(start + block + reach, length))


def residues(length: int, region: int, interval: int) -> Axis:
    """Tokens of the same region of `region` tokens with the same remainder by `interval`."""
    token = np.arange(length)
    label = token // region * interval + token % interval
    order = np.argsort(label, kind="stable")
    ordered = label[order]
    return Axis(
        np.searchsorted(ordered, ordered, "left"), np.searchsorted(ordered, ordered, "right"), _inverse(order), interval
    )


def neighborhood(length: int, window: int, stride: int, dilation: int, causal: bool) -> Axis:
    """NATTEN's 1-D rule: a window around the leader of the query's stride group, shifted inwards at the borders.

    Causal windows end at the query. Window and stride count tokens of one dilation group.
    """
    token = np.arange(length)
    group, inside = token % dilation, token // dilation
    size = (length - group + dilation - 1) // dilation
    leader = inside // stride * stride + (stride - 1 if causal else stride // 2)
    leader = np.minimum(leader, size - 1)
    if causal:
        start, stop = np.maximum(leader - window + 1, 0), inside + 1
    else:
        start = np.clip(leader - window // 2, 0, size - window)
        stop = start + window
    order = np.argsort(group, kind="stable")
    rank = _inverse(order)
    offset = rank - inside
    lo, hi = (offset + start)[order], (offset + stop)[order]
    return Axis(lo, hi, None if dilation == 1 else rank, dilation)


def _range(box: Boxes, axis: int) -> tuple[Ints, Ints, Ints]:
    return box.lo[..., axis], box.hi[..., axis], np.broadcast_to(box.step, box.lo.shape)[..., axis]


def _ranges(box: Boxes, axis: int) -> Ints:
    """(start, stop, step) [n, 3] of one axis."""
    return np.stack(np.broadcast_arrays(*_range(box, axis)), -1)


def _axis_masks(axis: Axis, q: Ints, k: Ints) -> Ints:
    """Number of the distinct 1-D mask of every pair of token ranges [n, 3]."""
    q_code, k_code = (combine(list(ranges.T)) for ranges in (q, k))
    _, first, index = np.unique(combine([q_code, k_code]), return_index=True, return_inverse=True)
    known: dict[bytes, int] = {}
    labels = [known.setdefault(_mask_bytes(axis, q[i], k[i]), len(known)) for i in first]
    return np.array(labels, np.int64)[index.reshape(-1)]


def _meet(pairs: Bools) -> tuple[bool, bool]:
    return bool(pairs.any()), bool(pairs.all())


def _mask_bytes(axis: Axis, q: Ints, k: Ints) -> bytes:
    return np.packbits(axis.pairs(np.arange(*q)[:, None], np.arange(*k))).tobytes()


def _inverse(order: Ints) -> Ints:
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return inverse


def _consecutive(ranks: Ints) -> Ints:
    """Sorted ranks as runs [R, 2] of consecutive numbers."""
    breaks = np.flatnonzero(np.diff(ranks) > 1) + 1
    starts, stops = np.concatenate([[0], breaks]), np.concatenate([breaks, [len(ranks)]])
    return np.stack([ranks[starts], ranks[stops - 1] + 1], -1)


def range_reduce(reduce: np.ufunc, values: Ints, start: Ints, stop: Ints) -> Ints:
    """reduce over values[start:stop] (along the first axis) for every (non-empty) range."""
    start, stop = np.broadcast_arrays(start, stop)
    edges = np.stack([start, stop], -1).reshape(-1)
    padded = np.concatenate([values, values[-1:]])
    return reduce.reduceat(padded, edges)[::2].reshape(start.shape + values.shape[1:])
