"""Disc: Euclidean neighbourhoods clipped at the borders (CLEAR, Liu et al. 2412.16112)."""

from dataclasses import dataclass

import numpy as np

from gensparse.layout import Boxes, Ints, Layout
from gensparse.patterns.base import NO_DATA, Bools, Columns, Data, Pattern, Rule, Span
from gensparse.patterns.checks import whole_number
from gensparse.patterns.target import TargetRule


@dataclass(frozen=True)
class Disc(Pattern):
    """Keys nearer than `radius` tokens: d^2 < radius^2, strict, d Euclidean over all grid axes (a ball in a video).

    Borders clip the disc. Interior sizes in a picture: 193, 793, 3205 keys for radius 8, 16, 32.

    Raises:
        ConfigError: radius is not a positive integer.
    """

    radius: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "radius", whole_number("Disc radius", self.radius, unit="tokens"))

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        return _DiscRule(layout, self.radius)


class _DiscRule(TargetRule):
    def __init__(self, layout: Layout, radius: int) -> None:
        super().__init__(layout)
        self.radius = min(radius, sum(self.grid))  # reaches everything; keeps sums of huge radii in range
        self._axes = [axis for axis, length in enumerate(self.grid) if length > 1] or [2]

    def _pairs(self, q: Ints, k: Ints) -> Bools:
        distance = sum((q[..., axis] - k[..., axis]) ** 2 for axis in self._axes)
        return distance < self.radius**2

    def _meets(self, q: Boxes, k: Boxes) -> tuple[Bools, Bools]:
        nearest, farthest = 0, 0
        for axis in self._axes:
            q_lo, q_hi = q.lo[..., axis], q.hi[..., axis] - 1
            k_lo, k_hi = k.lo[..., axis], k.hi[..., axis] - 1
            nearest = nearest + np.maximum(np.maximum(k_lo - q_hi, q_lo - k_hi), 0) ** 2
            farthest = farthest + np.maximum(k_hi - q_lo, q_hi - k_lo) ** 2
        return nearest < self.radius**2, farthest < self.radius**2

    def _span(self, q: Boxes) -> Span:
        reach = self.radius - 1
        return np.maximum(q.lo - reach, 0), np.minimum(q.hi + reach, self._last + 1)

    def signature(self, q: Boxes, k: Boxes, group: int = 0) -> Columns:
        inside = (q.segment == self.target) & (k.segment == self.target)
        return [inside.astype(np.int64), *(np.where(inside, k.lo[:, axis] - q.lo[:, axis], 0) for axis in range(3))]

    def partition(self, segment: int, group: int = 0) -> Ints | None:
        covered = segment == self.target and sum(int(last) ** 2 for last in self._last) < self.radius**2
        return np.zeros(self.layout.segments[segment].length, np.int64) if covered else None
