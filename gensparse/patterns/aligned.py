"""The same window on every picture of a layout: what edits need, where references share the sequence of the target."""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from gensparse.errors import ConfigError
from gensparse.layout import Boxes, Coords, Grid, Ints, Layout
from gensparse.patterns.base import FULL, NO_DATA, Bools, Columns, Data, Pattern, Relation, Rule, Span
from gensparse.patterns.linear import flat, linear

PICTURES = ("target", "reference")

Place = TypeVar("Place", Coords, Boxes)


@dataclass(frozen=True)
class Aligned(Pattern):
    """`window` between all pictures (target and references) that have the target's grid, at the same position.

    A picture of another grid has no token at the same position, so it sees every picture wholly and every picture sees
    it wholly, itself included; such pictures are references at the size their encoder wants, usually smaller than the
    target. What the window says about other segments (text) holds for the target and for references of its grid. A
    window over the whole grid is dense attention between all pictures.

    Args:
        window: a pattern of the target without pooled or other extra keys; join those outside,
            `Aligned(Disc(16)) | Pooled(4)`.

    Raises:
        ConfigError: `window` is no pattern, or (when bound) has extra keys.
    """

    window: Pattern

    def __post_init__(self) -> None:
        if not isinstance(self.window, Pattern):
            raise ConfigError(f"Aligned window={self.window!r} is not a pattern; pass one such as Disc(16).")

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        rule = self.window.bind(layout, data)
        if rule.sources:
            raise ConfigError(f"{self!r} holds extra keys; join them outside, as in Aligned(Disc(16)) | Pooled(4).")
        picture = np.array([segment.kind in PICTURES for segment in layout.segments])
        same = picture & np.array([segment.grid == layout.grid for segment in layout.segments])
        same[layout.target] = True
        return _AlignedRule(layout, rule, same, picture & ~same)

    def clamped(self, grid: Grid) -> "Aligned":
        return Aligned(self.window.clamped(grid))


class _AlignedRule(Rule):
    """
    Args:
        rule: the window on the target.
        same: which segments are pictures of the target's grid; other: which are pictures of another.
    """

    def __init__(self, layout: Layout, rule: Rule, same: Bools, other: Bools) -> None:
        super().__init__(layout)
        self.rule, self.groups = rule, rule.groups
        self._same, self._other = same, other
        self._stand_in = np.where(same, layout.target, np.arange(len(same)))
        picture = same | other
        self._whole = picture[:, None] & picture[None, :] & (other[:, None] | other[None, :])

    def allowed(self, q: Coords, k: Coords, group: int = 0) -> Bools:
        seen = self.rule.allowed(self._moved(q), self._moved(k), group)
        return seen | self._whole[q.segment, k.segment]

    def tile_relation(self, q: Boxes, k: Boxes, group: int = 0) -> Relation:
        filled = np.all(q.hi > q.lo, axis=-1) & np.all(k.hi > k.lo, axis=-1)
        relation = self.rule.tile_relation(self._moved(q), self._moved(k), group)
        return np.where(filled & self._whole[q.segment, k.segment], FULL, relation)

    def key_box(self, q: Boxes, segment: int, group: int = 0) -> Span:
        lo, hi = self.rule.key_box(self._moved(q), int(self._stand_in[segment]), group)
        whole = (np.all(q.hi > q.lo, axis=-1) & self._whole[q.segment, segment])[..., None]
        return np.where(whole, 0, lo), np.where(whole, self.layout.segments[segment].shape, hi)

    def signature(self, q: Boxes, k: Boxes, group: int = 0) -> Columns | None:
        columns = self.rule.signature(self._moved(q), self._moved(k), group)
        whole = self._whole[q.segment, k.segment]
        return None if columns is None else [whole.astype(np.int64), *(np.where(whole, 0, c) for c in columns)]

    def tile_step(self, segment: int) -> Grid:
        return self.rule.tile_step(int(self._stand_in[segment]))

    def tiles(self, segment: int, size: int) -> Grid | str | None:
        return self.rule.tiles(int(self._stand_in[segment]), size)

    def linear(self) -> Rule:
        return _AlignedRule(flat(self.layout), linear(self.rule), self._same, self._other)

    def partition(self, segment: int, group: int = 0) -> Ints | None:
        if self._other[segment]:
            return np.zeros(self.layout.segments[segment].length, np.int64)
        return self.rule.partition(int(self._stand_in[segment]), group)

    def _moved(self, place: Place) -> Place:
        """The place on the target, for pictures of its grid."""
        return place._replace(segment=self._stand_in[place.segment])
