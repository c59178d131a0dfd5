"""Subjects by their pictures: what a pipeline for several subjects is given, fitted to the size of the new picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gensparse.errors import ConfigError, short
from gensparse.subjects.masks import to_grid
from gensparse.subjects.naming import check_names, checked_box
from gensparse.subjects.read_masks import box_mask, read_mask


@dataclass(frozen=True, eq=False)
class Reference:
    """A subject of the picture to come, and a picture that shows it.

    Args:
        name: a word or words for it; where a method looks for it in the prompt, it looks for these.
        picture: a file, a PIL picture, or an array [H, W, 3] of bytes, of any size.
        mask: where it is in that picture, see `read_mask`; None for all of it that is not transparent.
        region: where it is to be: (left, top, right, bottom) in shares of width and height, or a mask; None where the
            method finds that out or needs none.
        prompt: of its picture; by default the name.

    Raises:
        ConfigError: a name or prompt that is no text, or a box that is empty or outside of the picture.
    """

    name: str
    picture: Any
    mask: Any = None
    region: Any = None
    prompt: str | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and self.name.strip()):
            raise ConfigError(f"Reference name={self.name!r} is not allowed; pass a name.")
        if not (self.prompt is None or isinstance(self.prompt, str)):
            raise ConfigError(f"The prompt of {self.name!r} is {short(self.prompt)}; pass text, or leave it out.")
        if isinstance(self.region, list | tuple):
            object.__setattr__(self, "region", checked_box(self.name, self.region))

    @property
    def text(self) -> str:
        return self.prompt or self.name

    def place(self, size: tuple[int, int]) -> Tensor | None:
        """Where it is to be in a picture of (height, width) pixels, bool [H, W] of any size."""
        if isinstance(self.region, tuple):
            return box_mask(self.region, size)
        return None if self.region is None else read_mask(self.region)

    def fitted(self, size: tuple[int, int]) -> "Fitted":
        """The picture at (height, width) pixels, its sides in their ratio, borders repeated around it.

        Raises:
            ConfigError: a picture or mask that cannot be read.
        """
        from PIL import Image

        picture, cut = opened(self.picture, self.name)
        scale = min(size[0] / picture.height, size[1] / picture.width)
        inner = tuple(
            max(1, min(whole, round(side * scale))) for side, whole in zip(_sides(picture), size, strict=True)
        )
        small = np.asarray(picture.resize((inner[1], inner[0]), Image.Resampling.LANCZOS))
        margins = [
            ((whole - side) // 2, whole - side - (whole - side) // 2) for side, whole in zip(inner, size, strict=True)
        ]
        pixels = torch.from_numpy(np.pad(small, (*margins, (0, 0)), mode="edge"))
        area = _framed(torch.ones(inner, dtype=torch.bool) if cut is None else to_grid(cut, inner).bool(), margins)
        own = None if self.mask is None else _framed(to_grid(read_mask(self.mask), inner).bool(), margins)
        if own is not None and not bool(own.any()):
            raise ConfigError(f"The mask of {self.name!r} keeps nothing; paint the subject white.")
        return Fitted(pixels.permute(2, 0, 1)[None].float() / 127.5 - 1, own, area)


@dataclass(frozen=True, eq=False)
class Fitted:
    """A reference at the size of the new picture.

    Args:
        pixels: [1, 3, H, W] in -1..1.
        mask: bool [H, W], the subject; None where no mask was given.
        area: bool [H, W], the picture itself without repeated borders and what is transparent.
    """

    pixels: Tensor
    mask: Tensor | None
    area: Tensor

    @property
    def shown(self) -> Tensor | None:
        """What methods with masks may see: the subject, else the picture; None for everything."""
        if self.mask is not None:
            return self.mask
        return None if bool(self.area.all()) else self.area


def checked_references(subjects: Any) -> tuple[Reference, ...]:
    """Subjects as a tuple.

    Raises:
        ConfigError: something else than references, none or too many of them, or two of one name.
    """
    items = tuple(subjects) if isinstance(subjects, list | tuple) else ()
    if not items or not all(isinstance(item, Reference) for item in items):
        raise ConfigError(f"subjects={short(subjects)} is not allowed; pass a list of gensparse.Reference values.")
    check_names([item.name for item in items])
    return items


def opened(picture: Any, name: str) -> tuple[Any, Tensor | None]:
    """A reference picture, upright, RGB and on white, and where it is not transparent (None for everywhere).

    Raises:
        ConfigError: no file, no picture, or a value of another kind.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3:
        picture = Image.fromarray(picture)
    if isinstance(picture, str | Path):
        try:
            with Image.open(picture) as file:
                file.load()
                picture = file.copy()
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise ConfigError(
                f"the picture {Path(picture).name!r} of {name!r} cannot be read ({_reason(error)}); check its path"
            ) from error
    if not hasattr(picture, "getbands"):
        raise ConfigError(
            f"The picture of {name!r} is of type {type(picture).__name__}; pass a file, a PIL picture, or an array "
            "[H, W, 3] of bytes."
        )
    picture, cut = ImageOps.exif_transpose(picture), None
    if "A" in picture.getbands() or "transparency" in picture.info:
        layered = picture.convert("RGBA")
        low, high = layered.getchannel("A").getextrema()
        cut = read_mask(layered) if low != high else None
        ground = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(ground, layered)
    return picture.convert("RGB"), cut


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or "it is no picture"


def _sides(picture: Any) -> tuple[int, int]:
    return picture.height, picture.width


def _framed(mask: Tensor, margins: Sequence[tuple[int, int]]) -> Tensor:
    (top, bottom), (left, right) = margins
    return torch.nn.functional.pad(mask, (left, right, top, bottom))
