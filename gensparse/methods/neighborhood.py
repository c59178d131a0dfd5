"""Neighborhood attention with stride, dilation and causal axes (Hassani et al. 2204.07143, 2209.15001, 2504.16922)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gensparse import patterns
from gensparse.layout import Grid, Layout
from gensparse.methods.base import START, At, Method
from gensparse.methods.checks import all_frames
from gensparse.methods.pictures import over_pictures
from gensparse.patterns import Pattern
from gensparse.patterns.checks import per_axis, spread


@dataclass(frozen=True)
class Neighborhood(Method):
    """Picture tokens see text and a window of constant size, moved inward at borders; text sees everything.

    Every setting is one value, or one per axis (H, W) or (F, H, W), in tokens; (H, W) on clips means all frames. The
    default window is the one of generalized neighborhood attention for FLUX at 4096 x 4096; on smaller grids windows
    shrink to the grid. With a stride equal to a tile and a window of an odd number of tiles this is sliding tile
    attention (STA, 2502.04507).

    References of the target's grid are seen through the same window, others wholly (see `methods.pictures`).

    Args:
        window: keys per axis, None for the whole axis.
        stride: queries that share a window, at most the window.
        dilation: distance between the keys of a window.
        causal: keys up to the query only.
        base: grid that the other settings are meant for; on other grids each is scaled with its axis and rounded, as
            Cosmos-Predict2 does. An axis of None is not scaled; None keeps the settings at every size.

    Raises:
        ConfigError: window, stride, dilation or base is not a positive integer, the stride is above
            the window, or causal is not a flag.
    """

    name: ClassVar[str] = "neighborhood"
    paper: ClassVar[str] = (
        "Neighborhood Attention Transformer; Generalized Neighborhood Attention (Hassani et al.), "
        "arXiv 2204.07143, 2209.15001, 2504.16922; Sliding Tile Attention (Zhang et al.), arXiv 2502.04507"
    )
    licence: ClassVar[str] = "NATTEN MIT; no weights"
    use: ClassVar[str] = "large pictures and videos without training; every query has equally many keys"
    edits: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # generalized neighborhood attention, training-free: 256 x 256 and 30 x 48 x 80 tokens
        "flux.1-dev": {"window": (80, 80), "stride": (16, 16)},
        "hunyuan_video": {"window": (18, 24, 24), "stride": (16, 8, 8)},
        # sliding tile attention: 30 x 48 x 80 tokens in tiles of 6 x 8 x 8
        "hunyuan_video-sta": {"window": (18, 24, 24), "stride": (6, 8, 8)},
    }

    window: int | tuple[int | None, ...] | None = (80, 80)
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False
    base: int | tuple[int | None, ...] | None = None

    def __post_init__(self) -> None:
        checked = self._geometry()
        for field in ("window", "stride", "dilation", "causal"):
            object.__setattr__(self, field, getattr(checked, field))
        object.__setattr__(self, "base", per_axis("neighborhood base", self.base, whole=True))

    def pattern(self, layout: Layout, at: At = START) -> Pattern:
        own, base = self._geometry(), self.base
        if layout.grid[0] > 1:
            settings = zip((own.window, own.stride, own.dilation, own.causal), (None, 1, 1, False), strict=True)
            own = patterns.Neighborhood(*(all_frames(value, whole) for value, whole in settings))
            base = all_frames(base, None)
        if base is not None:
            own = scaled(own, spread("neighborhood base", base, layout.grid, single=None), layout.grid)
        return over_pictures(own, layout).clamped(layout.grid)

    def _geometry(self) -> patterns.Neighborhood:
        return patterns.Neighborhood(self.window, self.stride, self.dilation, self.causal)


def scaled(own: patterns.Neighborhood, base: tuple[int | None, ...], grid: Grid) -> patterns.Neighborhood:
    """Windows, strides and dilations of a base grid on another one (Cosmos-Predict2).

    Each is multiplied by length / base and rounded, then kept within its limits: at least 2 keys, the stride at most
    the window, window x dilation at most the axis. An axis of None stays as it is.
    """
    settings = (own.window, own.stride, own.dilation)
    windows, strides, dilations = (
        spread(f"Neighborhood {name}", value, grid)
        for name, value in zip(("window", "stride", "dilation"), settings, strict=True)
    )
    axes = []
    for window, stride, dilation, whole, length in zip(windows, strides, dilations, base, grid, strict=True):
        if whole is not None:
            scale = length / whole  # first, as published: halves are rounded by what is left of them
            if window is not None:
                window = min(max(2, round(window * scale)), length)
            stride = min(max(1, round(stride * scale)), length if window is None else window)
            dilation = min(max(1, round(dilation * scale)), 1 if window is None else length // window)
        axes.append((window, stride, dilation))
    window, stride, dilation = zip(*axes, strict=True)
    return patterns.Neighborhood(window, stride, dilation, own.causal)
