"""Text: the policy of text and register tokens in joint attention."""

from dataclasses import dataclass

import numpy as np

from gensparse.layout import Boxes, Coords, Layout
from gensparse.patterns.base import FULL, NO_DATA, NONE, Bools, Columns, Data, Pattern, Relation, Rule, Span, empty_span


@dataclass(frozen=True)
class Text(Pattern):
    """Text and register queries see every own token, and everybody sees text and registers.

    Pooled keys are not covered (in CLEAR only picture tokens see them), and padding neither sees nor is seen.
    """

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        return _TextRule(layout)


class _TextRule(Rule):
    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        kinds = [segment.kind for segment in layout.segments]
        word = np.array([kind in ("text", "register") for kind in kinds])
        own = np.array([kind != "pad" for kind in kinds])
        self._table = (word[:, None] | word[None, :]) & own[:, None] & own[None, :]

    def allowed(self, q: Coords, k: Coords, group: int = 0) -> Bools:
        return self._table[q.segment, k.segment]

    def tile_relation(self, q: Boxes, k: Boxes, group: int = 0) -> Relation:
        filled = np.all(q.hi > q.lo, axis=-1) & np.all(k.hi > k.lo, axis=-1)
        return np.where(filled & self._table[q.segment, k.segment], FULL, NONE)

    def signature(self, q: Boxes, k: Boxes, group: int = 0) -> Columns:
        return [self.tile_relation(q, k, group).astype(np.int64)]

    def key_box(self, q: Boxes, segment: int, group: int = 0) -> Span:
        lo, hi = empty_span(q)
        seen = np.all(q.hi > q.lo, axis=-1) & self._table[q.segment, segment]
        return lo, np.where(seen[..., None], self.layout.segments[segment].shape, hi)
