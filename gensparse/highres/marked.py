"""Enlarging a marked part of a picture: everything else is the plain enlargement, to the bit.

A mask has any size and says by its levels, 0 to 255, how much of a change is let through. Its edge is softened inward,
so that nothing outside of what is marked changes. The picture is walked in strips of rows.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from gensparse.errors import ConfigError
from gensparse.highres.faithful import STRIP_PIXELS, Frame
from gensparse.highres.resample import resize

EDGE = 2.0  # pixels of the given picture over which a change sets in
WIDEST = 64  # pixels of the result that an edge takes at most

Size = tuple[int, int]


def soft_mask(mask: np.ndarray, size: Size, source: Size) -> np.ndarray:
    """The mask at the size of the result, uint8 [H, W]: 0 keeps the plain enlargement, 255 is the model's picture.

    The edge is two pixels of the given picture wide, or one of the mask's where those are larger, and lies inside:
    levels are means of the mask over its erosions by 0, 1, ... pixels, so they are 0 where the mask is, and 255 where
    it is so all around.

    Args:
        mask: uint8 [h, w] of any size, stretched over the picture.
        size: (rows, columns) of the result; source: of the given picture.

    Raises:
        ConfigError: a mask that marks nothing.
    """
    if not mask.any():
        raise ConfigError("The mask marks nothing, it is black everywhere; paint what may change white.")
    fitted = Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.BOX)
    grain = max(max(EDGE * size[axis] / source[axis], size[axis] / mask.shape[axis]) for axis in (0, 1))
    return _softened(np.asarray(fitted), min(WIDEST, max(1, round(grain))))


def _softened(mask: np.ndarray, edge: int) -> np.ndarray:
    """Mean of the mask's erosions by squares of radius 0 to `edge`; beyond the picture it goes on."""
    out = np.empty_like(mask)
    for rows in _strips(mask.shape):
        top, bottom = max(0, rows[0] - edge), min(mask.shape[0], rows[1] + edge)
        level = torch.from_numpy(mask[top:bottom].astype(np.float32))[None]
        total = torch.zeros_like(level)
        for _ in range(edge + 1):
            total += level
            level = -F.max_pool2d(-level, 3, 1, 1)
        levels = (total[0, rows[0] - top : rows[1] - top] / (edge + 1)).round_()
        out[rows[0] : rows[1]] = levels.to(torch.uint8).numpy()
    return out


def plain_enlargement(source: np.ndarray, size: Size) -> np.ndarray:
    """The picture uint8 [h, w, C] at another size by bicubic interpolation, antialiased on the way down; uint8."""
    small = torch.from_numpy(np.array(source)).float()
    if size[0] < source.shape[0] or size[1] < source.shape[1]:
        large = resize(small.permute(2, 0, 1)[None], size)[0].permute(1, 2, 0)
        return large.round_().clamp_(0, 255).to(torch.uint8).numpy()
    out = np.empty((*size, source.shape[2]), np.uint8)
    frame = Frame((source.shape[0], source.shape[1]), size)
    for rows in _strips(size):
        part = frame.enlarged(small, rows)
        out[rows[0] : rows[1]] = part.round_().clamp_(0, 255).to(torch.uint8).numpy()
    return out


def blended(picture: np.ndarray, plain: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture where the mask lets it through, the plain one elsewhere; uint8 [H, W, C] each, and [H, W].

    Raises:
        ConfigError: arrays of different sizes.
    """
    if picture.shape != plain.shape or picture.shape[:2] != mask.shape:
        raise ConfigError(
            f"Pictures of {picture.shape} and {plain.shape} cannot be joined by a mask of {mask.shape}; give all three "
            "in one size."
        )
    out = np.empty_like(plain)
    for top, bottom in _strips(mask.shape):
        share = mask[top:bottom, :, None].astype(np.int32)
        mixed = plain[top:bottom] * (255 - share) + picture[top:bottom] * share
        out[top:bottom] = (mixed + 127) // 255
    return out


def free_cells(mask: torch.Tensor, size: Size) -> torch.Tensor:
    """Latent cells, bool [1, 1, h, w], that hold any pixel which the mask [H, W] lets change."""
    return F.adaptive_max_pool2d((mask > 0).float()[None, None], size) > 0


def _strips(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Rows (start, stop) of a picture, piece by piece."""
    step = max(1, STRIP_PIXELS // max(1, shape[1]))
    return ((top, min(top + step, shape[0])) for top in range(0, shape[0], step))
