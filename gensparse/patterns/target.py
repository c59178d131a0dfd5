"""Rules that relate target tokens to target tokens and say nothing about any other segment."""

from abc import abstractmethod

import numpy as np

from gensparse.layout import Boxes, Coords, Grid, Ints, Layout
from gensparse.patterns.base import FULL, NONE, PARTIAL, Bools, Relation, Rule, Span


class TargetRule(Rule):
    """Base of the geometric rules: subclasses see positions and boxes on the target's grid only."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.target = layout.target
        self.grid: Grid = layout.grid
        self._last = np.array(self.grid, np.int64) - 1

    @abstractmethod
    def _pairs(self, q: Ints, k: Ints) -> Bools:
        """Allowed pairs of positions [..., 3]."""

    @abstractmethod
    def _meets(self, q: Boxes, k: Boxes) -> tuple[Bools, Bools]:
        """(some pair is allowed, every pair is allowed) for non-empty boxes inside the grid."""

    @abstractmethod
    def _span(self, q: Boxes) -> Span:
        """Bounding box of the keys of every query box."""

    def allowed(self, q: Coords, k: Coords, group: int = 0) -> Bools:
        inside = (q.segment == self.target) & (k.segment == self.target)
        return inside & self._pairs(np.minimum(q.position, self._last), np.minimum(k.position, self._last))

    def tile_relation(self, q: Boxes, k: Boxes, group: int = 0) -> Relation:
        (q, q_own), (k, k_own) = self._clip(q), self._clip(k)
        some, every = self._meets(q, k)
        return np.where(some & q_own & k_own, np.where(every, FULL, PARTIAL), NONE)

    def key_box(self, q: Boxes, segment: int, group: int = 0) -> Span:
        q, own = self._clip(q)
        lo, hi = self._span(q)
        seen = own[..., None] & np.bool_(segment == self.target)
        return np.where(seen, lo, 0), np.where(seen, hi, 0)

    def _clip(self, box: Boxes) -> tuple[Boxes, Bools]:
        """The box cut to the grid (one token where nothing is left), and whether it holds target tokens at all."""
        hi = np.minimum(box.hi, self._last + 1)
        own = (box.segment == self.target) & np.all(hi > box.lo, axis=-1)
        lo = np.where(own[..., None], box.lo, 0)
        return Boxes(box.segment, lo, np.where(own[..., None], hi, 1), box.step), own
