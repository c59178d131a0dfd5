"""Proxy: one averaged key stands for every other window, without training (after PT-DiT, Wang et al. 2409.04005)."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

from gensparse import patterns
from gensparse.layout import Layout
from gensparse.methods.base import START, At, Method, Place
from gensparse.methods.checks import flag
from gensparse.patterns import Pattern, Text

_SHIFTED = "shifted"


@dataclass(frozen=True)
class Proxy(Method):
    """Picture tokens see text and their window exactly, every other window as one averaged key; text sees everything.

    The mean of a window's keys and values, taken after norms and rotary embedding, stands for its tokens with the
    logarithm of their number, all in one softmax. It is equal to dense attention where keys and values are equal inside
    windows. Our training-free form of what PT-DiT trains; its own blocks and weights are in gensparse.methods.ptdit.

    Args:
        window: tokens per axis, one value or (H, W) or (F, H, W), None for the whole axis; ragged windows at the end of
            an axis are allowed. 4 for a start, 8 only above 2K.
        alternate: every other layer has its windows shifted by half of one, against seams.

    Raises:
        ConfigError: window is not made of positive integers, or alternate is not a flag.
    """

    name: ClassVar[str] = "proxy"
    paper: ClassVar[str] = (
        'after Wang et al.: "Qihoo-T2X / PT-DiT", arXiv 2409.04005, ICLR 2025; the training-free form is ours'
    )
    licence: ClassVar[str] = (
        "the authors' repository has no code; their model file in MindSpeed-MM is Apache-2.0; no weights are used"
    )
    use: ClassVar[str] = (
        "Models without weights of their own that must keep a view of the whole picture: windows for detail, "
        "averages for the rest."
    )

    window: int | tuple[int | None, ...] | None = 4
    alternate: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", patterns.Proxy(self.window).window)
        flag(self.name, "alternate", self.alternate)

    def kind(self, place: Place) -> Hashable:
        return _SHIFTED if self.alternate and place.layer % 2 else None

    def pattern(self, layout: Layout, at: At = START) -> Pattern:
        shift = _half(self.window) if at.kind == _SHIFTED else 0
        return (patterns.Proxy(self.window, shift) | Text()).clamped(layout.grid)


def _half(window: int | tuple[int | None, ...] | None) -> int | tuple[int, ...]:
    """Half a window, rounded down; an axis of one window is not shifted."""
    if isinstance(window, tuple):
        return tuple((size or 0) // 2 for size in window)
    return (window or 0) // 2
