"""Subjects by their pictures: what a pipeline for several subjects is given, fitted to the size of the new picture."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gensparse.errors import ConfigError, short
from gensparse.subjects.masks import to_grid
from gensparse.subjects.naming import check_names, check_pictures, checked_box
from gensparse.subjects.read_masks import box_mask, read_mask


@dataclass(frozen=True, eq=False)
class Reference:
    """A subject of the picture to come, and a picture that shows it, or several.

    Args:
        name: a word or words for it; where a method looks for it in the prompt, it looks for these.
        picture: a file, a PIL picture, or an array [H, W, 3] of bytes, of any size; a list for several pictures, each a
            reference of its own; None for a subject by words alone, as the methods "regional" and "consistory" take it.
        mask: where it is in that picture: (left, top, right, bottom) in shares of its width and height, or a mask, see
            `read_mask`; None for all of it that is not transparent, and where nothing is, for what methods that want a
            mask find by its name; (0, 0, 1, 1) for everything. Of several pictures a list, with one for each.
        region: where it is to be: (left, top, right, bottom) in shares of width and height, or a mask; None where the
            method finds that out or needs none.
        prompt: of its pictures, or of its region; by default the name.
        negative: what is not to be in its region, for methods that know subjects by words; by default that of the call.

    Raises:
        ConfigError: a name or prompt that is no text, a box that is empty or outside of the picture, no picture in a
            list, or another number of masks.
    """

    name: str
    picture: Any = None
    mask: Any = None
    region: Any = None
    prompt: str | None = None
    negative: str | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and self.name.strip()):
            raise ConfigError(f"Reference name={self.name!r} is not allowed; pass a name.")
        for name in ("prompt", "negative"):
            if not (getattr(self, name) is None or isinstance(getattr(self, name), str)):
                raise ConfigError(
                    f"The {name} of {self.name!r} is {short(getattr(self, name))}; pass text, or leave it out."
                )
        if isinstance(self.region, list | tuple):
            object.__setattr__(self, "region", checked_box(self.name, self.region))
        if isinstance(self.picture, list | tuple):
            self._check_list()
        elif isinstance(self.mask, list | tuple):
            object.__setattr__(self, "mask", checked_box(self.name, self.mask))
        if self.picture is not None and self.negative is not None:
            raise ConfigError(
                f"{self.name!r} has a picture and a negative prompt, which is for subjects by words; leave one out."
            )
        if self.picture is None and self.mask is not None:
            raise ConfigError(f"{self.name!r} has a mask and no picture; pass the picture it belongs to.")

    def _check_list(self) -> None:
        count = len(self.picture)
        masks = [None] * count if self.mask is None else self.mask
        if not count or any(item is None for item in self.picture):
            raise ConfigError(f"{self.name!r} has a list without a picture; pass files, or None for words alone.")
        if not isinstance(masks, list | tuple) or len(masks) != count:
            raise ConfigError(
                f"{self.name!r} has {count} pictures, and its masks are {short(self.mask)}; pass a list with a mask or "
                "None for each."
            )
        object.__setattr__(self, "picture", tuple(self.picture))
        object.__setattr__(self, "mask", tuple(masks))

    @property
    def parts(self) -> "tuple[Reference, ...]":
        """One reference per picture, all of this name."""
        if not isinstance(self.picture, tuple):
            return (self,)
        pairs = zip(self.picture, self.mask, strict=True)
        return tuple(replace(self, picture=picture, mask=mask) for picture, mask in pairs)

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
            ConfigError: a picture or mask that cannot be read, or none or several.
        """
        from PIL import Image

        if self.picture is None or isinstance(self.picture, tuple):
            raise ConfigError(f"{self.name!r} is no single picture; fit each of Reference.parts.")
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
        own = None if self.mask is None else _framed(to_grid(self._masked(_sides(picture)), inner).bool(), margins)
        if own is not None and not bool(own.any()):
            raise ConfigError(f"The mask of {self.name!r} keeps nothing; paint the subject white.")
        marked = own is not None or cut is not None
        return Fitted(pixels.permute(2, 0, 1)[None].float() / 127.5 - 1, own, area, marked)

    def _masked(self, size: tuple[int, int]) -> Tensor:
        """Its mask, bool [H, W] of any size; of a box at the (height, width) of the picture."""
        return box_mask(self.mask, size) if isinstance(self.mask, tuple) else read_mask(self.mask)


@dataclass(frozen=True, eq=False)
class Fitted:
    """A reference at the size of the new picture.

    Args:
        pixels: [1, 3, H, W] in -1..1.
        mask: bool [H, W], the subject; None where no mask was given.
        area: bool [H, W], the picture itself without repeated borders and what is transparent.
        marked: whether the subject was marked, by a mask or by transparency.
        cut: whether the mask was found by the model; it may have another size.
    """

    pixels: Tensor
    mask: Tensor | None
    area: Tensor
    marked: bool = True
    cut: bool = False

    @property
    def shown(self) -> Tensor | None:
        """What methods with masks may see: the subject, else the picture; None for everything."""
        if self.mask is not None:
            return self.mask
        return None if bool(self.area.all()) else self.area


def checked_references(subjects: Any) -> tuple[Reference, ...]:
    """Subjects as a tuple, one reference per picture: those of one subject have one name and stand side by side.

    Raises:
        ConfigError: something else than references, none or too many of them or of their pictures, or two of one name.
    """
    items = tuple(subjects) if isinstance(subjects, list | tuple) else ()
    if not items or not all(isinstance(item, Reference) for item in items):
        raise ConfigError(f"subjects={short(subjects)} is not allowed; pass a list of gensparse.Reference values.")
    check_names([item.name for item in items])
    parts = [item.parts for item in items]
    check_pictures([len(own) for own in parts])
    return tuple(part for own in parts for part in own)


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
