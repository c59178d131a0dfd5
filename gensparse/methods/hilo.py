"""HiLo: some heads inside small windows, the others over averaged tokens (LITv2, Pan et al. 2205.13213)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from gensparse.errors import ConfigError
from gensparse.layout import Grid, Layout
from gensparse.methods.base import START, At, Method, Place, Subject
from gensparse.patterns import Blocks, Pattern, PerHead, Pooled, Text
from gensparse.patterns.checks import per_axis, spread, whole_number


@dataclass(frozen=True)
class HiLo(Method):
    """High heads see text and their window, low heads see text and the averages of all windows; text sees everything.

    With windows of one token all heads are low and the result is dense. The heads of a pretrained model are not
    interchangeable: those that attend far are the ones to choose as low. Without training this is rough.

    Args:
        window: tokens per axis, one value or (H, W) or (F, H, W); the paper has 2.
        alpha: share of low heads, from 0 to 1, rounded down: the last ones.
        low_heads: which heads are low, in place of alpha.

    Raises:
        ConfigError: a setting of the wrong type or range, or (when applied) a head that the model does not have.
    """

    name: ClassVar[str] = "hilo"
    paper: ClassVar[str] = (
        'Pan, Cai, Zhuang: "Fast Vision Transformers with HiLo Attention" (LITv2), arXiv 2205.13213, NeurIPS 2022'
    )
    licence: ClassVar[str] = "code Apache-2.0; no weights are used"
    use: ClassVar[str] = (
        "Experiments with heads that share the work: some see detail, some the whole picture. Rough without training."
    )

    window: int | tuple[int, ...] = 2
    alpha: float = 0.5
    low_heads: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", per_axis("hilo window", self.window))
        number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if not number or not 0 <= self.alpha <= 1:
            raise ConfigError(f"hilo alpha={self.alpha!r} is not allowed; pass a share of the heads from 0 to 1.")
        object.__setattr__(self, "alpha", float(self.alpha))
        if self.low_heads is not None:
            given = self.low_heads if isinstance(self.low_heads, list | tuple) else (self.low_heads,)
            heads = {whole_number("hilo low_heads", head, low=0) for head in given}
            object.__setattr__(self, "low_heads", tuple(sorted(heads)))

    def load(self, subject: Subject, places: Mapping[str, Place]) -> None:
        fewest = min((place.heads for place in places.values()), default=0)
        if self.low_heads and self.low_heads[-1] >= fewest:
            raise ConfigError(
                f"hilo low_heads={self.low_heads!r} names head {self.low_heads[-1]}, but "
                f"{type(subject.model).__name__} has layers of {fewest} heads; pass heads below that."
            )

    def pattern(self, layout: Layout, at: At = START) -> Pattern:
        words = any(segment.kind in ("text", "register") for segment in layout.segments)
        # next to exact keys an average counts for all its tokens; alone, only ragged ones must count less
        bias = "log_count" if words else "log_share"
        menu = PerHead((Blocks(self.window), Pooled(self.window, weights="mean", bias=bias)))
        return (menu | Text()).clamped(layout.grid)

    def heads(self, at: At, heads: int) -> tuple[int, ...]:
        if at.layout is not None and _single(self.window, at.layout.grid):
            return (1,) * heads
        first = heads - int(self.alpha * heads)
        low = range(first, heads) if self.low_heads is None else self.low_heads
        return tuple(int(head in low) for head in range(heads))


def _single(window: int | tuple[int, ...], grid: Grid) -> bool:
    """Whether windows hold one token, where the grid has more."""
    return spread("hilo window", window, grid) == (1, 1, 1)
