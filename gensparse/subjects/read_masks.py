"""Masks from what users have: files, pictures, arrays, boxes, polygons, painted pictures. All become bool [H, W]."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gensparse.errors import ConfigError

MAX_PIXELS = 150_000_000
"""Larger mask files are refused before they are decoded."""

_KINDS = "a file, a picture, an array or tensor [height, width] of bools, 0..1 or 0..255"


def read_mask(source: Any) -> Tensor:
    """A mask as bool [H, W]; True is the subject.

    A pixel counts from half of the range up, so that the noise of JPEG and soft edges do no harm. A picture with a
    transparency that varies is painted: what is not transparent counts. Of other pictures the brightness counts.

    Args:
        source: a file, a PIL picture, or an array or tensor [H, W], [H, W, 1|3|4] or [1|3|4, H, W], of bools, of
            numbers 0..1 or 0..255. Integers that are all 0 and 1 count as bools.

    Raises:
        ConfigError: anything else, no pixel, too many, or numbers beyond 0..255.
    """
    if isinstance(source, str | Path):
        return _of_file(Path(source))
    if hasattr(source, "getbands"):
        return _of_picture(source)
    if isinstance(source, Tensor):
        source = source.detach().cpu()
        source = (source.float() if source.is_floating_point() else source).numpy()
    if not isinstance(source, np.ndarray):
        raise ConfigError(f"A mask of type {type(source).__name__} is not known; pass {_KINDS}.")
    return _of_array(source)


def box_mask(box: Sequence[float], size: tuple[int, int]) -> Tensor:
    """A box as bool [H, W]: pixels whose centre is inside.

    Args:
        box: (left, top, right, bottom): shares of the picture where all are at most 1, else pixels.
        size: (height, width) in pixels.

    Raises:
        ConfigError: a box that is not four finite numbers with left < right and top < bottom, or a size below 1.
    """
    corners = _numbers("box", box, 4)
    height, width = _size(size)
    left, top, right, bottom = corners
    if not (left < right and top < bottom):
        raise ConfigError(
            f"box={tuple(box)!r} is empty; pass (left, top, right, bottom) with left < right, top < bottom."
        )
    if max(corners) <= 1:
        left, top, right, bottom = left * width, top * height, right * width, bottom * height
    x, y = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    return ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))


def polygon_mask(points: Sequence[Sequence[float]], size: tuple[int, int]) -> Tensor:
    """A polygon as bool [H, W]: pixels whose centre is inside, by the even-odd rule.

    Args:
        points: corners (x, y), at least three: shares of the picture where all numbers are at most 1, else pixels.
        size: (height, width) in pixels.

    Raises:
        ConfigError: fewer corners, corners that are not two finite numbers, or a size below 1.
    """
    height, width = _size(size)
    if isinstance(points, str) or len(points) < 3:
        raise ConfigError(f"polygon={points!r} has fewer than three corners; pass [(x, y), (x, y), (x, y), ...].")
    corners = torch.tensor([_numbers("polygon corner", point, 2) for point in points], dtype=torch.float64)
    if float(corners.max()) <= 1:
        corners = corners * torch.tensor([width, height])
    x = torch.arange(width, dtype=torch.float64) + 0.5
    y = (torch.arange(height, dtype=torch.float64) + 0.5)[:, None]
    inside = torch.zeros(height, width, dtype=torch.bool)
    for (x0, y0), (x1, y1) in zip(corners.tolist(), corners.roll(-1, 0).tolist(), strict=True):
        if y0 == y1:
            continue
        crossing = x0 + (y - y0) * (x1 - x0) / (y1 - y0)
        inside ^= ((y0 <= y) != (y1 <= y)) & (x < crossing)
    return inside


def _of_file(path: Path) -> Tensor:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ConfigError(
                    f"{path.name} has {picture.width} x {picture.height} pixels; pass a mask of at most {MAX_PIXELS}."
                )
            return _of_picture(picture)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path.name} cannot be read as a mask ({error}); pass a PNG or JPEG file.") from error


def _of_picture(picture: Any) -> Tensor:
    from PIL import ImageOps

    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    bands = picture.getbands()
    if "A" in bands:
        alpha = np.asarray(picture.getchannel("A"))
        if alpha.min() != alpha.max():
            return torch.from_numpy(alpha.astype(np.float32) >= 127.5)
    if picture.mode in ("I;16", "I;16B", "I"):
        return torch.from_numpy(np.asarray(picture).astype(np.float64) >= 32767.5)
    return torch.from_numpy(np.asarray(picture.convert("L")).astype(np.float32) >= 127.5)


def _of_array(array: np.ndarray) -> Tensor:
    array = _plane(array)
    if array.dtype == np.bool_:
        return torch.from_numpy(array.copy())
    if not np.issubdtype(array.dtype, np.number) or not np.isfinite(array).all() or array.min() < 0:
        raise ConfigError(f"A mask of dtype {array.dtype} with other values than 0..255 is not known; pass {_KINDS}.")
    high = float(array.max())
    if high > 255:
        raise ConfigError(f"A mask with values up to {high:g} is not known; pass {_KINDS}.")
    return torch.from_numpy(np.ascontiguousarray(array >= (0.5 if high <= 1 else 127.5)))


def _plane(array: np.ndarray) -> np.ndarray:
    """[H, W] of an array with or without channels: their transparency where it varies, else their mean."""
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, 2)
    if array.ndim == 3 and array.shape[2] in (1, 3, 4):
        painted = array.shape[2] == 4 and array[..., 3].min() != array[..., 3].max()
        colours = array[..., :3]
        flat = colours.any(axis=2) if array.dtype == np.bool_ else colours.mean(axis=2)
        array = array[..., 3] if painted else flat
    if array.ndim != 2 or not array.size:
        raise ConfigError(f"A mask of shape {array.shape} is not known; pass {_KINDS}.")
    return array


def _numbers(what: str, values: Any, count: int) -> list[float]:
    try:
        numbers = [] if isinstance(values, str) else [float(value) for value in values]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != count or not all(math.isfinite(number) for number in numbers):
        raise ConfigError(f"{what}={values!r} is not allowed; pass {count} finite numbers.")
    return numbers


def _size(size: Any) -> tuple[int, int]:
    sides = tuple(size) if isinstance(size, list | tuple) else ()
    if len(sides) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sides):
        raise ConfigError(f"size={size!r} is not allowed; pass (height, width) in pixels.")
    return sides[0], sides[1]
