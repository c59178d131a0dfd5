"""Regions: every part of the picture reads its own prompt (Regional-Prompting-FLUX 2411.02395)."""

from dataclasses import dataclass

import numpy as np

from gensparse.errors import ConfigError
from gensparse.layout import Layout, Segment
from gensparse.patterns.arrays import as_mask, lookup, token_array
from gensparse.patterns.base import NO_DATA, Bools, Data, Pattern, Rule
from gensparse.patterns.checks import whole_number
from gensparse.patterns.segments import segment_numbers
from gensparse.patterns.shared import Share, SharedRule


@dataclass(frozen=True)
class Regions(Pattern):
    """Text and target tokens see each other where they share a region.

    The text segments hold one run of tokens per region, in order. Text of a region sees itself and the target tokens
    inside; target tokens see the texts of their regions and every target token they share a region with. Regions may
    overlap. Tokens outside all regions see each other and no text, unless the last run is the background's: then they
    are a region too. Registers see and are seen by all of these; references and padding are left to other patterns.

    With windows: `Regions(...) & (Disc(16) | Text())`; rows and columns of text keep their regions and no window.

    Args:
        text: tokens of every region's text, the background's last where there is one.
        masks: array of the data, [regions, ...] with one mask of the target per region but the background.
        background: whether the last text belongs to the tokens outside all regions.

    Raises:
        ConfigError: no texts, lengths below 1, or (when bound) another number of text tokens or masks than `text` says.
    """

    text: tuple[int, ...]
    masks: str
    background: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.text, list | tuple) or not self.text:
            raise ConfigError(f"Regions text={self.text!r} is not allowed; pass the text tokens of every region.")
        object.__setattr__(self, "text", tuple(whole_number("Regions text", n, unit="tokens") for n in self.text))
        if not (isinstance(self.masks, str) and self.masks):
            raise ConfigError(f"Regions masks={self.masks!r} is not allowed; pass the name of an array in data.")
        if not isinstance(self.background, bool | np.bool_):
            raise ConfigError(f"Regions background={self.background!r} is not allowed; pass True or False.")
        object.__setattr__(self, "background", bool(self.background))

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        number = segment_numbers(layout.segments)
        kind = np.array([segment.kind for segment in layout.segments])[number]
        words = np.flatnonzero(kind == "text")
        if len(words) != sum(self.text):
            raise ConfigError(
                f"Regions text={self.text} needs {sum(self.text)} text tokens but the layout has {len(words)}; build "
                "it with the texts of all regions."
            )
        masks = self._masks(data, layout.segments[layout.target])
        outside = ~masks.any(axis=0)
        masks = np.concatenate([masks, outside[None]])  # without a background text a region of its own all the same
        runs = np.split(words, np.cumsum(self.text)[:-1])
        shares = []
        for region, mask in enumerate(masks):
            member = kind == "register"
            member[number == layout.target] = mask
            if region < len(runs):
                member[runs[region]] = True
            shares.append(Share(member, member))
        return SharedRule(layout, shares)

    def _masks(self, data: Data, target: Segment) -> Bools:
        """The regions' masks [regions, tokens of the target], without the background's."""
        given = lookup(repr(self), self.masks, data)
        count = len(self.text) - bool(self.background)
        if given.ndim < 2 or len(given) != count:
            raise ConfigError(
                f"{self!r} needs {count} masks but array {self.masks!r} has shape {given.shape}; pass one mask per text"
                f"{', none for the background' if self.background else ''}."
            )
        rows = [as_mask(repr(self), self.masks, token_array(repr(self), self.masks, mask, target)) for mask in given]
        return np.array(rows, bool).reshape(count, target.length)
