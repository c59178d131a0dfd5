"""A background and an object at the size of the picture that they are to become (PrimeComposer, 2403.05053)."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gensparse.errors import ConfigError
from gensparse.subjects.masks import to_grid
from gensparse.subjects.placing import Placed, centre_of, mask_box, placed
from gensparse.subjects.read_masks import box_mask, read_mask
from gensparse.subjects.references import Reference, opened


@dataclass(frozen=True, eq=False)
class Composition:
    """What is to be put where.

    Args:
        background: [1, 3, H, W] in -1..1.
        object: the object in the middle of black, likewise.
        mask: bool [H, W], where it is there.
        region: bool [H, W], in the middle of which it is to be.
    """

    background: Tensor
    object: Tensor
    mask: Tensor
    region: Tensor

    def placed(self, grid: tuple[int, int]) -> Placed:
        """The object on a grid of (rows, columns)."""
        return placed(self.mask, mask_box(self.mask), centre_of(self.region), grid)

    @property
    def pasted(self) -> Tensor:
        """The background with the object in it, [1, 3, H, W]."""
        return self.placed(tuple(self.mask.shape)).pasted(self.background, self.object)


def composition(background: Reference, item: Reference, size: tuple[int, int]) -> Composition:
    """Both pictures for a new one of (height, width) pixels.

    The background fills it with its sides in their ratio, cut at its longer side. The object is cut out by its mask (or
    what is not transparent, or all of it), and made as large as the box of its region allows.

    Raises:
        ConfigError: no region, a picture or mask that cannot be read, or one that keeps nothing.
    """
    from PIL import Image, ImageOps

    region = item.place(size)
    if region is None:
        raise ConfigError(f"Nobody says where {item.name!r} is to be; give it a box.")
    if not bool(region.any()):
        raise ConfigError(f"The region of {item.name!r} is empty; give it a larger one.")
    ground, _ = opened(background.picture, background.name)
    fitted = ImageOps.fit(ground, (size[1], size[0]), Image.Resampling.LANCZOS)

    picture, cut = opened(item.picture, item.name)
    sides = picture.height, picture.width
    if item.mask is not None:
        cut = box_mask(item.mask, sides) if isinstance(item.mask, tuple) else read_mask(item.mask)
    mask = torch.ones(sides, dtype=torch.bool) if cut is None else to_grid(cut, sides).bool()
    if not bool(mask.any()):
        raise ConfigError(f"The mask of {item.name!r} keeps nothing; paint the subject white.")
    top, left, bottom, right = (int(edge) for edge in mask_box(mask))
    own = bottom - top, right - left
    box = mask_box(to_grid(region, size).bool())
    room = int(box[2] - box[0]), int(box[3] - box[1])
    scale = min(a / b for a, b in zip(room, own, strict=True))
    inner = tuple(max(1, min(whole, round(side * scale))) for side, whole in zip(own, room, strict=True))
    small = picture.resize((inner[1], inner[0]), Image.Resampling.LANCZOS, box=(left, top, right, bottom))
    start = [(whole - side) // 2 for whole, side in zip(size, inner, strict=True)]
    window = tuple(slice(a, a + n) for a, n in zip(start, inner, strict=True))
    canvas, shown = np.zeros((*size, 3), np.uint8), torch.zeros(size, dtype=torch.bool)
    canvas[window] = np.asarray(small)
    shown[window] = to_grid(mask[top:bottom, left:right], inner)
    if not bool(shown.any()):  # a thin object that no pixel of the smaller mask hits
        shown[window] = True
    return Composition(_pixels(np.asarray(fitted)), _pixels(canvas), shown, region)


def _pixels(array: np.ndarray) -> Tensor:
    """[1, 3, H, W] in -1..1."""
    return torch.from_numpy(np.array(array)).permute(2, 0, 1)[None].float() / 127.5 - 1
