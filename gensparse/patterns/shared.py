"""Rules by membership: a query sees a key when both belong to one of the same sets.

Who sees which segment, masks of keys and queries, isolated subjects and regions are all of this form. The rule knows
every token by its class (tokens with equal memberships) and every box by the classes inside it, so that boxes relate by
a few bit operations, whatever the masks look like.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gensparse.layout import Boxes, Coords, Ints, Layout, Segment
from gensparse.patterns.base import FULL, NONE, PARTIAL, Bools, Columns, Relation, Rule, Source, Span
from gensparse.patterns.box_words import BoxWords, Words
from gensparse.patterns.codes import combine
from gensparse.patterns.linear import flat

_MOST_CLASSES = 1024  # classes of one segment that `partition` compares
_WORD = 64


class Share(NamedTuple):
    """One set: its queries, bool [own tokens], and its keys, bool [own tokens, then those of sources]."""

    queries: Bools
    keys: Bools


class SharedRule(Rule):
    """A pair is allowed when some share holds both its query and its key.

    Args:
        shares: the sets; none of them hides everything.
        filters: whether every set holds the keys of sources that the rule does not know; for patterns that only hide
            some keys and are used with `&`.
    """

    def __init__(
        self, layout: Layout, shares: Sequence[Share], sources: Sequence[Source] = (), *, filters: bool = False
    ) -> None:
        super().__init__(layout, sources)
        self._shares, self._filters = tuple(shares), filters
        keys = self.key_segments
        total = sum(segment.length for segment in keys)
        q_class, q_sets = _classes([share.queries for share in shares], layout.tokens)
        k_class, k_sets = _classes([share.keys for share in shares], total)
        table = (q_sets.astype(np.float32) @ k_sets.astype(np.float32).T) > 0
        table, q_class = _merged(table, q_class)
        columns, k_class = _merged(np.ascontiguousarray(table.T), k_class)
        self._table = np.ascontiguousarray(columns.T)
        self._q, self._k = _Tokens(layout.segments, q_class), _Tokens(keys, k_class)
        own = _packed(np.eye(self._table.shape[1], dtype=bool))
        self._reach = self._q.words(_packed(self._table))
        self._miss = self._q.words(_packed(~self._table))
        self._present = self._k.words(own)
        self._bounds = [self._k.bounds(number) for number in range(len(keys))]

    def with_sources(self, sources: Sequence[Source]) -> Rule:
        if not self._filters or self.sources == tuple(sources):
            return super().with_sources(sources)
        extra = np.ones(sum(source.segment.length for source in sources), bool)
        shares = [Share(queries, np.concatenate([keys[: self.layout.tokens], extra])) for queries, keys in self._shares]
        return SharedRule(self.layout, shares, sources, filters=True)

    def allowed(self, q: Coords, k: Coords, group: int = 0) -> Bools:
        return self._table[self._q.at(q), self._k.at(k)]

    def tile_relation(self, q: Boxes, k: Boxes, group: int = 0) -> Relation:
        q, q_some = self._q.clip(q)
        k, k_some = self._k.clip(k)
        present = self._k.over(self._present, k)
        some = ((self._q.over(self._reach, q) & present) != 0).any(axis=-1)
        every = ((self._q.over(self._miss, q) & present) == 0).all(axis=-1)
        return np.where(some & q_some & k_some, np.where(every, FULL, PARTIAL), NONE)

    def key_box(self, q: Boxes, segment: int, group: int = 0) -> Span:
        q, filled = self._q.clip(q)
        reach = self._q.over(self._reach, q)
        lo = np.full((*filled.shape, 3), np.iinfo(np.int64).max)
        hi = np.zeros_like(lo)
        for number, first, last in zip(*self._bounds[segment], strict=True):
            seen = filled & ((reach[..., number // _WORD] >> np.uint64(number % _WORD) & np.uint64(1)) != 0)
            lo = np.where(seen[..., None], np.minimum(lo, first), lo)
            hi = np.where(seen[..., None], np.maximum(hi, last), hi)
        return np.where(hi > lo, lo, 0), hi

    def signature(self, q: Boxes, k: Boxes, group: int = 0) -> Columns:
        """The relation, and for partial pairs which patterns of classes both boxes hold."""
        known = np.asarray(k.segment) >= 0
        inside = k._replace(segment=np.maximum(k.segment, 0))
        relation = np.where(known, self.tile_relation(q, inside), NONE)
        partial = np.flatnonzero(relation == PARTIAL)
        columns = [relation.astype(np.int64)]
        for tokens, box in ((self._q, q), (self._k, inside)):
            column = np.full(len(relation), -1)
            column[partial] = tokens.identify(_take(box, partial, len(relation)))
            columns.append(column)
        return columns

    def linear(self) -> Rule:
        return SharedRule(flat(self.layout), self._shares, self.sources, filters=self._filters)

    def partition(self, segment: int, group: int = 0) -> Ints | None:
        q, k = self._q.of(segment), self._k.of(segment)
        _, first, index = np.unique(combine([q, k]), return_index=True, return_inverse=True)
        if len(first) > _MOST_CLASSES:
            return None
        sees = self._table[np.ix_(q[first], k[first])]
        label = np.unique(sees, axis=0, return_inverse=True)[1].reshape(-1)
        return label[index.reshape(-1)] if ((label[:, None] == label) == sees).all() else None


class _Tokens:
    """The class of every token of consecutive segments."""

    def __init__(self, segments: Sequence[Segment], classes: Ints) -> None:
        lengths = [segment.length for segment in segments]
        self._shape = np.array([segment.shape for segment in segments])
        self._start = np.cumsum([0, *lengths])
        self._classes = classes

    def of(self, segment: int) -> Ints:
        """Classes of the tokens of one segment."""
        return self._classes[self._start[segment] : self._start[segment + 1]]

    def at(self, coords: Coords) -> Ints:
        """Classes at coordinates; positions beyond the grid count as its edge."""
        return self._classes[self._index(np.asarray(coords.segment), coords.position)]

    def words(self, words: Words) -> list[BoxWords]:
        """For every segment the words [classes, n] of its tokens' classes, over boxes."""
        return [
            BoxWords(words[self.of(number)].reshape(*shape, -1)) for number, shape in enumerate(self._shape.tolist())
        ]

    def bounds(self, segment: int) -> tuple[list[int], Ints, Ints]:
        """The classes of a segment and the bounding box lo, hi [classes, 3] of each."""
        numbers, index = np.unique(self.of(segment), return_inverse=True)
        position = np.indices(self._shape[segment]).reshape(3, -1).T
        lo = np.full((len(numbers), 3), np.iinfo(np.int64).max)
        hi = np.zeros((len(numbers), 3), np.int64)
        np.minimum.at(lo, index.reshape(-1), position)
        np.maximum.at(hi, index.reshape(-1), position + 1)
        return numbers.tolist(), lo, hi

    def clip(self, box: Boxes) -> tuple[Boxes, Bools]:
        """The box cut to its grid (one token where nothing is left), and whether it holds tokens at all."""
        hi = np.minimum(box.hi, self._shape[box.segment])
        filled = np.all(hi > box.lo, axis=-1)
        lo = np.where(filled[..., None], box.lo, 0)
        return Boxes(box.segment, lo, np.where(filled[..., None], hi, 1), box.step), filled

    def over(self, tables: Sequence[BoxWords], box: Boxes) -> Words:
        """Words [..., n] of clipped boxes, whose steps are ignored: a stepped box counts as all it spans."""
        shape = np.shape(box.lo)[:-1]
        segment = np.broadcast_to(box.segment, shape).reshape(-1)
        lo, hi = box.lo.reshape(-1, 3), box.hi.reshape(-1, 3)
        width = tables[0].width
        numbers = np.unique(segment)
        if len(numbers) == 1:
            return tables[numbers[0]].over(lo, hi).reshape(*shape, width)
        found = np.empty((len(segment), width), np.uint64)
        for number in numbers:
            own = np.flatnonzero(segment == number)
            found[own] = tables[number].over(lo[own], hi[own])
        return found.reshape(*shape, width)

    def identify(self, box: Boxes) -> Ints:
        """A number per box [n]: boxes of equal token counts with equal numbers hold the same classes token by token."""
        if not len(box.lo):
            return np.zeros(0, np.int64)
        box, _ = self.clip(box)
        step = np.broadcast_to(box.step, box.lo.shape)
        count = -(-(box.hi - box.lo) // step)
        code = combine([box.segment, *box.lo.T, *count.T, *step.T])
        _, first, index = np.unique(code, return_index=True, return_inverse=True)
        number = np.empty(len(first), np.int64)
        shape = combine([*count[first].T])
        for kind in np.unique(shape):
            own = np.flatnonzero(shape == kind)
            boxes = first[own]
            number[own] = self._contents(box.segment[boxes], box.lo[boxes], step[boxes], count[boxes[0]])
        return number[index.reshape(-1)]

    def _contents(self, segment: Ints, lo: Ints, step: Ints, count: Ints) -> Ints:
        """Equal numbers for boxes of `count` tokens per axis that hold the same classes."""
        offset = np.indices(count).reshape(3, -1).T
        held = self._classes[self._index(segment[:, None], lo[:, None] + step[:, None] * offset)]
        rows = np.ascontiguousarray(held)
        return np.unique(rows.view(f"V{rows.strides[0]}").reshape(-1), return_inverse=True)[1].reshape(-1)

    def _index(self, segment: Ints, position: Ints) -> Ints:
        shape = self._shape[segment]
        frame, row, column = (np.minimum(position[..., n], shape[..., n] - 1) for n in range(3))
        return self._start[segment] + (frame * shape[..., 1] + row) * shape[..., 2] + column


def _classes(members: Sequence[Bools], count: int) -> tuple[Ints, Bools]:
    """Class [count] of every token, and the memberships [classes, sets] of every class."""
    if not members:
        return np.zeros(count, np.int64), np.zeros((1, 0), bool)
    code = combine([member.astype(np.int64) for member in members])
    _, first, index = np.unique(code, return_index=True, return_inverse=True)
    return index.reshape(-1), np.stack([member[first] for member in members], axis=1)


def _merged(table: Bools, classes: Ints) -> tuple[Bools, Ints]:
    """The distinct rows of a table, and the classes renumbered to them."""
    rows, index = np.unique(table, axis=0, return_inverse=True)
    return rows, index.reshape(-1)[classes]


def _packed(rows: Bools) -> Words:
    """Bits [n, m] as words [n, ceil(m / 64)], bit j % 64 of word j // 64."""
    short = -rows.shape[1] % _WORD
    bits = np.pad(rows, ((0, 0), (0, short)))
    return np.packbits(bits, axis=1, bitorder="little").view("<u8").astype(np.uint64)


def _take(box: Boxes, index: Ints, count: int) -> Boxes:
    """Some of `count` boxes given as [count] or as one for all."""
    segment = np.broadcast_to(box.segment, (count,))[index]
    lo, hi, step = (np.broadcast_to(edge, (count, 3))[index] for edge in (box.lo, box.hi, box.step))
    return Boxes(segment, lo, hi, step)
