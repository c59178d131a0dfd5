"""Neighborhood attention with stride, dilation and causal axes (Hassani et al. 2204.07143, 2209.15001, 2504.16922)."""

from dataclasses import dataclass, fields
from typing import ClassVar

from gensparse import patterns
from gensparse.layout import Layout
from gensparse.methods.base import START, At, Method
from gensparse.patterns import Pattern, Text


@dataclass(frozen=True)
class Neighborhood(Method):
    """Picture tokens see text and a window of constant size, moved inward at borders; text sees everything.

    Every setting is one value, or one per axis (H, W) or (F, H, W), in tokens. The defaults are those of generalized
    neighborhood attention for FLUX at 4096 x 4096; on smaller grids windows shrink to the grid.

    Args:
        window: keys per axis, None for the whole axis.
        stride: queries that share a window, at most the window.
        dilation: distance between the keys of a window.
        causal: keys up to the query only.

    Raises:
        ConfigError: window, stride or dilation is not a positive integer, the stride is above
            the window, or causal is not a flag.
    """

    name: ClassVar[str] = "neighborhood"

    window: int | tuple[int | None, ...] | None = (80, 80)
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False

    def __post_init__(self) -> None:
        checked = self._geometry()
        for field in fields(self):
            object.__setattr__(self, field.name, getattr(checked, field.name))

    def pattern(self, layout: Layout, at: At = START) -> Pattern:
        return (self._geometry() | Text()).clamped(layout.grid)

    def _geometry(self) -> patterns.Neighborhood:
        return patterns.Neighborhood(self.window, self.stride, self.dilation, self.causal)
