"""Anchors: a window of the picture, and a small version of it as global guide (Scale-DiT, Zhang and Tai 2510.16325)."""

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from gensparse.errors import ConfigError
from gensparse.layout import Boxes, Coords, Ints, Layout, Segment, segment_coords
from gensparse.patterns.base import (
    FULL,
    NO_DATA,
    NONE,
    PARTIAL,
    Bools,
    Columns,
    Data,
    Pattern,
    Relation,
    Rule,
    Source,
    Span,
    empty_span,
)
from gensparse.patterns.blockmask import BlockMaskRule
from gensparse.patterns.box import Box
from gensparse.patterns.checks import choice, per_axis, whole_number

ANCHORS = "anchors"
"""Name of the key source of anchors that are not in the layout."""

_WORDS = ("text", "register")
_LOW = 2  # rows and columns on each side of an anchor that it sees
_PAIRS = 1 << 22  # pairs of boxes related at once
_ANCHOR_WINDOW = 4  # tokens per side of the windows that order the anchors


@dataclass(frozen=True)
class Anchors(Pattern):
    """Target tokens see a box around themselves, all text, and the anchors of their own low-resolution window.

    The layout holds text, the target and one reference: the anchors, a clean low-resolution version of the picture.
    With `low` it holds no reference and the anchors are a key source: since they see themselves alone, their keys and
    values can come from an earlier call, `sources={"anchors": (k, v)}`.

    Text sees text and the target, and the anchors if `text_sees_anchors`. Target tokens see text, |dy| <= rows / 2 and
    |dx| <= columns / 2 of the target (clipped at borders), and the anchors of the windows named by `neighbours`.
    Anchors see |dy|, |dx| <= 2 of the anchors and nothing else, so they can be computed once for all steps.

    A window has window / scale anchors per axis, scale being the whole number of target tokens per anchor.

    Args:
        window: target tokens per axis, one value or (H, W).
        neighbours: "faithful": the windows whose number in raster order differs by at most 1, as the published weights
            were trained; at the end of a row that is the start of the next one, and windows above or below are not
            seen. "3x3": the windows around the own one.
        text_sees_anchors: whether text queries see the anchors.
        closure: (query block, key block), 128 and 64 in the authors' kernel: the sequence is ordered window by window
            (anchors in windows of 4 x 4) and cut into such blocks, and a pair of blocks with any visible pair is
            visible wholly. None: the table exactly.
        low: (H, W) of anchors that are a key source; None where they are the layout's reference.

    Raises:
        ConfigError: values of the wrong type or range, or (when bound) a layout without exactly one reference (with
            `low`: with any), with more than one frame, or with anchors on a larger grid than the target's.
    """

    window: int | tuple[int, int] = 16
    neighbours: str = "faithful"
    text_sees_anchors: bool = False
    closure: tuple[int, int] | None = None
    low: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", _pair("Anchors window", self.window))
        choice("Anchors neighbours", self.neighbours, ("faithful", "3x3"))
        choice("Anchors text_sees_anchors", self.text_sees_anchors, (False, True))
        if self.closure is not None:
            object.__setattr__(self, "closure", _blocks("Anchors", self.closure))
        if self.low is not None:
            low = _pair("Anchors low", self.low)
            object.__setattr__(self, "low", low if isinstance(low, tuple) else (low, low))

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        references = [i for i, segment in enumerate(layout.segments) if segment.kind == "reference"]
        if len(references) != (self.low is None):
            fix = (
                "add it with Layout.joint(..., references=[(1, rows, columns)])"
                if self.low is None
                else "with low=, the low-resolution picture is a key source and the layout holds none"
            )
            raise ConfigError(
                f"Anchors needs {'one reference segment' if self.low is None else 'no reference segments'}, but the "
                f"layout has {len(references)}; {fix}."
            )
        sources = () if self.low is None else (Source(_low_segment(self.low)),)
        place = references[0] if references else len(layout.segments)
        target, low = layout.grid, (sources[0].segment if sources else layout.segments[place]).shape
        if target[0] > 1 or low[0] > 1 or low[1] > target[1] or low[2] > target[2]:
            raise ConfigError(
                f"Anchors got a target grid {target} and anchors {low}; pass pictures (one frame), the anchors no "
                "larger than the target on any axis."
            )
        window = (self.window, self.window) if isinstance(self.window, int) else self.window
        faithful = self.neighbours == "faithful"
        rule = _AnchorsRule(layout, sources, place, window, faithful, self.text_sees_anchors)
        return rule if self.closure is None else _closed(rule, window, self.closure)


@dataclass(frozen=True)
class AnchorStream(Pattern):
    """What anchors see where they are alone: |dy|, |dx| <= 2 of the target. Other segments neither see nor are seen.

    Args:
        closure: as for `Anchors`, with blocks that are cut from the first anchor on. In the sequence of all three that
            is the same wherever the tokens before the anchors fill whole blocks, as at all published sizes; elsewhere a
            block would hold picture tokens too and show the anchors what those see.

    Raises:
        ConfigError: closure is no pair of positive integers, or (when bound) a layout of more than one frame.
    """

    closure: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.closure is not None:
            object.__setattr__(self, "closure", _blocks("AnchorStream", self.closure))

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        grid = layout.grid
        if grid[0] > 1:
            raise ConfigError(f"AnchorStream got a target grid {grid}; pass a picture (one frame).")
        rule = Box((1, _LOW, _LOW)).bind(layout)
        if self.closure is None:
            return rule
        side = (_ANCHOR_WINDOW, _ANCHOR_WINDOW)
        rank = np.full(layout.tokens, -1)
        start, length = layout.starts[layout.target], layout.segments[layout.target].length
        rank[start : start + length] = window_places(grid[1:], side)
        return closed(rule, rank, length, self.closure, side)


class _AnchorsRule(Rule):
    """The table, by kind of segment: 0 nothing, 1 words, 2 the target, 3 the anchors."""

    def __init__(
        self,
        layout: Layout,
        sources: tuple[Source, ...],
        low: int,
        window: tuple[int, int],
        faithful: bool,
        text_sees_anchors: bool,
    ) -> None:
        super().__init__(layout, sources)
        self.low, self._faithful = low, faithful
        kinds, segments = {"target": 2, **dict.fromkeys(_WORDS, 1)}, self.key_segments
        self._kind = np.array([3 if i == low else kinds.get(s.kind, 0) for i, s in enumerate(segments)])
        self._shapes = np.array([segment.shape for segment in segments], np.int64)
        self._open = np.zeros((4, 4), np.bool_)
        self._open[1, 1:3] = self._open[2, 1] = True
        self._open[1, 3] = text_sees_anchors
        self._reach = np.array([0, window[0] // 2, window[1] // 2])
        own, small = layout.grid[1:], segments[low].shape[1:]
        self._scale = np.array([n // m for n, m in zip(own, small, strict=True)])  # at least 1
        self._size = np.maximum(np.array(window) // self._scale, 1)
        self._last = (np.array(small) - 1) // self._size
        self._per_row = int(self._last[1]) + 1

    def allowed(self, q: Coords, k: Coords, group: int = 0) -> Bools:
        own, other = self._kind[q.segment], self._kind[k.segment]
        apart = np.abs(q.position - k.position)
        seen = self._open[own, other] | ((own == 2) & (other == 2) & np.all(apart <= self._reach, axis=-1))
        seen = seen | ((own == 3) & (other == 3) & np.all(apart <= _LOW, axis=-1))
        cross = (own == 2) & (other == 3)
        if not cross.any():
            return seen
        q_window, k_window = self._q_windows(q.position[..., 1:]), k.position[..., 1:] // self._size
        if self._faithful:
            per_row = np.array([self._per_row, 1])
            near = np.abs((q_window * per_row).sum(-1) - (k_window * per_row).sum(-1)) <= 1
        else:
            near = np.all(np.abs(q_window - k_window) <= 1, axis=-1)
        return seen | (cross & near)

    def tile_relation(self, q: Boxes, k: Boxes, group: int = 0) -> Relation:
        (q, q_own), (k, k_own) = self._clip(q), self._clip(k)
        kinds = self._kind[q.segment], self._kind[k.segment]
        near_low = np.array([0, _LOW, _LOW])
        some = every = self._open[kinds]
        for pair, meets in (
            ((2, 2), lambda: _boxes_meet(q, k, self._reach)),
            ((3, 3), lambda: _boxes_meet(q, k, near_low)),
            ((2, 3), lambda: self._windows_meet(q, k)),
        ):
            here = (kinds[0] == pair[0]) & (kinds[1] == pair[1])
            if here.any():
                one, both = meets()
                some, every = np.where(here, one, some), np.where(here, both, every)
        return np.where(some & q_own & k_own, np.where(every, FULL, PARTIAL), NONE)

    def key_box(self, q: Boxes, segment: int, group: int = 0) -> Span:
        q, own = self._clip(q)
        kind, other = self._kind[q.segment][..., None], int(self._kind[segment])
        shape = self._shapes[segment]
        lo, hi = empty_span(q)
        hi = np.where(self._open[kind, other], shape, hi)
        if other in (2, 3):
            reach = self._reach if other == 2 else np.array([0, _LOW, _LOW])
            near = np.maximum(q.lo - reach, 0), np.minimum(q.hi + reach, shape)
            lo, hi = (np.where(kind == other, edge, old) for edge, old in zip(near, (lo, hi), strict=True))
        if other == 3:
            seen = self._seen_windows(q)
            lo, hi = (np.where(kind == 2, edge, old) for edge, old in zip(seen, (lo, hi), strict=True))
        return np.where(own[..., None], lo, 0), np.where(own[..., None], hi, 0)

    def signature(self, q: Boxes, k: Boxes, group: int = 0) -> Columns:
        kinds = self._kind[q.segment], self._kind[k.segment]
        columns = [4 * kinds[0] + kinds[1]]
        same, cross = (kinds[0] == kinds[1]) & (kinds[0] > 1), (kinds[0] == 2) & (kinds[1] == 3)
        first = self._q_windows(q.lo[:, 1:])
        cell = self._scale * self._size
        for n in range(2):
            lo = q.lo[:, n + 1], k.lo[:, n + 1]
            # the last window also holds the tokens beyond its anchors: there places have no period
            last = self._q_windows(q.hi[:, 1:] - 1)[:, n] == self._last[n]
            place = np.where(last, lo[0] + cell[n], lo[0] % cell[n])
            shift = np.where(cross, first[:, n] - lo[1] // self._size[n], 0)
            columns += [np.where(same, lo[1] - lo[0], shift), np.where(cross, place, 0)]
            columns.append(np.where(cross, lo[1] % self._size[n], 0))
        return columns

    def _clip(self, box: Boxes) -> tuple[Boxes, Bools]:
        """The box cut to its segment (one token where nothing is left), and whether anything is left."""
        hi = np.minimum(box.hi, self._shapes[box.segment])
        own = np.all(hi > box.lo, axis=-1)
        lo = np.where(own[..., None], box.lo, 0)
        step = np.asarray(box.step)
        hi = np.where(own[..., None], lo + (hi - 1 - lo) // step * step + 1, 1)
        return Boxes(box.segment, lo, hi, box.step), own

    def _q_windows(self, position: Ints) -> Ints:
        """Window (row, column) of target positions [..., 2]."""
        return np.minimum(position // self._scale // self._size, self._last)

    def _windows_meet(self, q: Boxes, k: Boxes) -> tuple[Bools, Bools]:
        q_lo, q_hi = self._q_windows(q.lo[..., 1:]), self._q_windows(q.hi[..., 1:] - 1)
        k_lo, k_hi = k.lo[..., 1:] // self._size, (k.hi[..., 1:] - 1) // self._size
        low, high = q_lo - k_hi, q_hi - k_lo  # differences of window rows and columns
        if not self._faithful:
            return np.all((low <= 1) & (high >= -1), axis=-1), np.all((low >= -1) & (high <= 1), axis=-1)
        per_row = np.array([self._per_row, 1])
        every = ((low * per_row).sum(-1) >= -1) & ((high * per_row).sum(-1) <= 1)
        some = np.False_
        for rows, number in product((-1, 0, 1), (-1, 0, 1)):  # numbers differ by `number` over `rows` rows
            columns = number - rows * self._per_row
            here = (low[..., 0] <= rows) & (rows <= high[..., 0]) & (low[..., 1] <= columns) & (columns <= high[..., 1])
            some = some | here
        return some, every

    def _seen_windows(self, q: Boxes) -> Span:
        """Box of anchors around the windows that target boxes see."""
        lo, hi = self._q_windows(q.lo[..., 1:]), self._q_windows(q.hi[..., 1:] - 1)
        if self._faithful:
            per_row = np.array([self._per_row, 1])
            first = np.maximum((lo * per_row).sum(-1) - 1, 0)
            last = np.minimum((hi * per_row).sum(-1) + 1, (self._last[0] + 1) * self._per_row - 1)
            rows = first // self._per_row, last // self._per_row
            single = rows[0] == rows[1]
            lo = np.stack([rows[0], np.where(single, first % self._per_row, 0)], -1)
            hi = np.stack([rows[1], np.where(single, last % self._per_row, self._last[1])], -1)
        else:
            lo, hi = np.maximum(lo - 1, 0), np.minimum(hi + 1, self._last)
        zero = np.zeros_like(lo[..., :1])
        shape = self._shapes[self.low]
        ends = np.minimum((hi + 1) * self._size, shape[1:])
        return np.concatenate([zero, lo * self._size], -1), np.concatenate([zero + 1, ends], -1)


def _boxes_meet(q: Boxes, k: Boxes, reach: Ints) -> tuple[Bools, Bools]:
    """Whether some, and whether every, pair of tokens is at most `reach` apart on every axis."""
    low, high = k.lo - (q.hi - 1), k.hi - 1 - q.lo
    return np.all((low <= reach) & (high >= -reach), axis=-1), np.all((low >= -reach) & (high <= reach), axis=-1)


def _closed(rule: _AnchorsRule, window: tuple[int, int], blocks: tuple[int, int]) -> Rule:
    """The rule on whole blocks of the sequence ordered window by window, of which a source is the end."""
    layout, segments = rule.layout, rule.key_segments
    sides = {layout.target: window, rule.low: (_ANCHOR_WINDOW, _ANCHOR_WINDOW)}
    starts = np.cumsum([0, *(segment.length for segment in segments)])
    rank, total = np.full(starts[-1], -1), 0
    for number, (start, segment) in enumerate(zip(starts[:-1], segments, strict=True)):
        if rule._kind[number]:
            place = window_places(segment.shape[1:], sides[number]) if number in sides else np.arange(segment.length)
            rank[start : start + segment.length] = total + place
            total += segment.length
    return closed(rule, rank, total, blocks, window)


def closed(rule: Rule, rank: Ints, total: int, blocks: tuple[int, int], window: tuple[int, int]) -> Rule:
    """A rule on whole blocks: a pair of blocks with any visible pair is visible wholly.

    Args:
        rank: place of every token, and key of a source, in the order that is cut into blocks; -1 for none.
        total: tokens with a place.
        window: that the order walks through.
    """
    q, k = (_covers(rule, rank, total, size) for size in blocks)
    mask = np.zeros((-(-total // blocks[0]), -(-total // blocks[1])), np.bool_)
    step = max(1, _PAIRS // len(k[0]))
    for first in range(0, len(q[0]), step):
        part = slice(first, first + step)
        boxes = Boxes(q[1].segment[part, None], q[1].lo[part, None], q[1].hi[part, None])
        seen = rule.tile_relation(boxes, k[1]) != NONE
        i, j = np.nonzero(seen)
        mask[q[0][part][i], k[0][j]] = True
    return BlockMaskRule(rule.layout, rank, blocks, mask, window, rule.sources)


def _covers(rule: Rule, rank: Ints, total: int, size: int) -> tuple[Ints, Boxes]:
    """Boxes that together hold exactly the tokens of all blocks, and the block of every box.

    A block is a run of the order, so inside a window it is a part of a row, whole rows, and a part of a row.
    """
    coords = segment_coords(rule.key_segments)
    order = np.argsort(rank, kind="stable")[len(rank) - total :]
    segment, position = coords.segment[order], coords.position[order]
    block = np.arange(total) // size
    next_row = (position[1:, 1] != position[:-1, 1]) | (position[1:, 2] != position[:-1, 2] + 1)
    starts = np.flatnonzero(np.concatenate([[True], next_row | (np.diff(segment) != 0) | (np.diff(block) != 0)]))
    ends = np.append(starts[1:], total)
    lo, hi = position[starts], position[ends - 1] + 1
    # pieces of consecutive rows with equal columns join into one box
    same = (segment[starts[1:]] == segment[starts[:-1]]) & (block[starts[1:]] == block[starts[:-1]])
    below = (lo[1:, 1] == hi[:-1, 1]) & (lo[1:, 2] == lo[:-1, 2]) & (hi[1:, 2] == hi[:-1, 2])
    first = np.flatnonzero(np.concatenate([[True], ~(same & below)]))
    last = np.append(first[1:], len(starts)) - 1
    return block[starts[first]], Boxes(segment[starts[first]], lo[first], hi[last])


def window_places(shape: tuple[int, int], window: tuple[int, int]) -> Ints:
    """Place of every raster token [H * W] when a grid is walked window by window, raster order inside each."""
    row, column = np.divmod(np.arange(shape[0] * shape[1]), shape[1])
    order = np.lexsort((column, row, column // window[1], row // window[0]))
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    return places


def _low_segment(grid: tuple[int, int]) -> Segment:
    return Segment("reference", grid[0] * grid[1], (1, *grid), ANCHORS)


def _pair(what: str, value: Any) -> int | tuple[int, int]:
    number = per_axis(what, value)
    if isinstance(number, tuple) and len(number) != 2:
        raise ConfigError(f"{what}={value!r} is not allowed; pass one integer or (H, W).")
    return number


def _blocks(what: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ConfigError(f"{what} closure={value!r} is not allowed; pass (query block, key block) or None.")
    query, key = (whole_number(f"{what} closure", entry, unit="tokens") for entry in value)
    return query, key
