"""Double window: half of the heads in windows, half in windows shifted by half of one (StyleSwin, 2112.10762)."""

from dataclasses import dataclass
from typing import ClassVar

from gensparse.layout import Layout
from gensparse.methods.base import START, At, Method
from gensparse.methods.checks import whole
from gensparse.methods.pictures import over_pictures
from gensparse.patterns import Pattern, double_windows


@dataclass(frozen=True)
class DoubleWindow(Method):
    """Picture tokens see text and their window; the second half of the heads has windows shifted by half of one.

    The seams of one half lie inside the windows of the other, so no alternation over layers is needed. Where the
    shorter side of the picture is not longer than the window, the window is that side and nothing is shifted. Frames of
    a video stay apart. StyleSwin's trained position bias is not part of it.

    References of the target's grid are seen through the same windows, others wholly (see `methods.pictures`).

    Args:
        window: tokens per side.

    Raises:
        ConfigError: window is not a positive integer.
    """

    name: ClassVar[str] = "double_window"
    paper: ClassVar[str] = (
        "StyleSwin: Transformer-Based GAN for High-Resolution Image Generation (Zhang et al.), arXiv 2112.10762"
    )
    licence: ClassVar[str] = "code MIT; no weights used"
    use: ClassVar[str] = "experiments with windows whose seams must not show"
    edits: ClassVar[bool] = True

    window: int = 8

    def __post_init__(self) -> None:
        whole(self.name, "window", self.window)

    def pattern(self, layout: Layout, at: At = START) -> Pattern:
        return over_pictures(double_windows(self.window, layout.grid), layout)

    def heads(self, at: At, heads: int) -> tuple[int, ...]:
        return tuple(int(head >= heads // 2) for head in range(heads))
