"""CLEAR: circular windows, optionally with pooled keys of the whole picture (Liu, Tan, Wang 2412.16112)."""

import math
from dataclasses import dataclass
from typing import ClassVar

from gensparse.errors import ConfigError
from gensparse.layout import Layout
from gensparse.methods.base import START, At, Method
from gensparse.methods.checks import flag, whole
from gensparse.patterns import Disc, Pattern, Pooled, Text


@dataclass(frozen=True)
class Clear(Method):
    """Picture tokens see text and the disc d^2 < radius^2 around them; text sees everything.

    The published results use layers distilled for one radius and factor. Without those weights this is a training-free
    window, and what it changes grows as the radius shrinks.

    Args:
        radius: of the disc, in tokens; 8, 16 and 32 were published.
        down_factor: with f > 1, picture tokens also see the picture pooled over f x f tokens (mean of the cell,
            where the distilled weights started); 4 was published. Pooled keys grow with the square of the picture.
        proportional: raise the logits by sqrt(ln(m S) / ln(S of the training size)), S tokens of the sequence, m = 10
            with pooled keys and else 1, as the authors do above the training size.

    Raises:
        ConfigError: radius or down_factor is not a positive integer, proportional is not a flag.
    """

    name: ClassVar[str] = "clear"

    radius: int = 16
    down_factor: int = 1
    proportional: bool = False

    def __post_init__(self) -> None:
        whole(self.name, "radius", self.radius)
        whole(self.name, "down_factor", self.down_factor)
        flag(self.name, "proportional", self.proportional)

    def pattern(self, layout: Layout, at: At = START) -> Pattern:
        local = Disc(self.radius) | Text()
        if self.down_factor == 1:
            return local
        return (local | Pooled(cells=self.down_factor, weights="mean")).clamped(layout.grid)

    def logit_gain(self, layout: Layout, native_tokens: int | None) -> float:
        if not self.proportional:
            return 1.0
        if native_tokens is None:
            raise ConfigError(
                "clear proportional=True needs the model's training size, which only its scheduler knows; apply it to "
                "the pipeline instead of the bare model."
            )
        picture = math.prod(layout.grid)
        base = layout.tokens - picture + native_tokens
        factor = 1 if self.down_factor == 1 else 10
        return math.sqrt(math.log(factor * layout.tokens) / math.log(base))
