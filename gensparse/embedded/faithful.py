"""What upscaling made of a picture, in numbers: is it still that picture, and are its edges where they really are?

Scenes can be rendered at any size, so the true large picture is known. Every measure here fails on its planted defect
(`gensparse.embedded.defects`: blur, a shift, another tone).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from gensparse.embedded.reader import Picture, as_image
from gensparse.errors import ConfigError
from gensparse.highres.faithful import area_mean

Array = np.ndarray

MEAN_LIMIT = 2.0  # levels of 255: mean difference between the picture shrunk by area and the one it was made from
GAIN_LIMIT = 3.0  # dB: error near edges, below bicubic's
EDGE_LEVEL = 12.0  # levels per pixel: steeper places of the true picture are its edges
_STRIP = 512  # rows at a time


@dataclass(frozen=True)
class Faithfulness:
    """How a picture compares with the one it was made from, and with the true one.

    Args:
        mean, p999: difference in levels of 255 between the input and the result shrunk to its size by area means, over
            all pixels and channels: the mean, and the value that 99.9% stay below.
        psnr, bicubic: dB near the edges of the true picture, of the result and of a bicubic enlargement of the input.
    """

    mean: float
    p999: float
    psnr: float
    bicubic: float

    @property
    def gain(self) -> float:
        """dB near edges over bicubic."""
        return self.psnr - self.bicubic

    @property
    def kept(self) -> bool:
        """Whether it is still the input's picture, and better than an enlargement that knows nothing."""
        return self.mean <= MEAN_LIMIT and self.gain >= GAIN_LIMIT


def faithfulness(picture: Picture, source: Picture, truth: Picture) -> Faithfulness:
    """Measure an upscaled picture.

    Args:
        source: what it was made from; truth: the same scene as it really looks at the picture's size.

    Raises:
        ConfigError: another size than the truth's, one smaller than the source's, or a truth without edges.
    """
    result, small, true = (np.asarray(as_image(item)) for item in (picture, source, truth))
    if result.shape != true.shape or result.shape[0] < small.shape[0] or result.shape[1] < small.shape[1]:
        raise ConfigError(
            f"Pictures of {_size(result)}, made from {_size(small)}, and in truth {_size(true)} are given; the first "
            "and the last must have one size, which is at least that of the second."
        )
    mean, p999 = area_error(result, small)
    size = (result.shape[1], result.shape[0])
    bicubic = np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC))
    band = edge_band(true, max(1, round(result.shape[0] / small.shape[0])))
    if not band.any():
        raise ConfigError("The true picture has no edge; measure a scene with a subject.")
    return Faithfulness(mean, p999, band_psnr(result, true, band), band_psnr(bicubic, true, band))


def area_error(picture: Array, source: Array) -> tuple[float, float]:
    """Mean and 99.9 percentile of |shrunk picture - source|, in levels, every channel of every pixel counting once."""
    error = np.abs(area_mean(picture, source.shape[:2]) - source)
    return float(error.mean()), float(np.quantile(error, 0.999))


def edge_band(truth: Array, reach: int) -> Array:
    """bool [H, W]: at most `reach` rows and columns from an edge of the true picture."""
    steep = np.zeros(truth.shape[:2], bool)
    for top in range(0, len(truth), _STRIP):
        rows = truth[max(top - 1, 0) : top + _STRIP + 1].astype(np.int16)
        down = np.zeros(rows.shape[:2], np.int16)
        down[1:-1] = np.abs(rows[2:] - rows[:-2]).max(2)
        across = np.zeros_like(down)
        across[:, 1:-1] = np.abs(rows[:, 2:] - rows[:, :-2]).max(2)
        own = slice(top - max(top - 1, 0), top - max(top - 1, 0) + _STRIP)
        steep[top : top + _STRIP] = np.maximum(down, across)[own] >= 2 * EDGE_LEVEL
    for axis in (0, 1):
        steep = _grown(steep, reach, axis)
    return steep


def band_psnr(picture: Array, truth: Array, band: Array) -> float:
    """dB over the pixels of a band; infinity for equal ones."""
    total = 0.0
    for top in range(0, len(truth), _STRIP):
        rows = slice(top, top + _STRIP)
        difference = picture[rows].astype(np.float32) - truth[rows]
        total += float((difference**2)[band[rows]].sum(dtype=np.float64))
    error = total / (3 * int(band.sum()))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def _grown(mask: Array, reach: int, axis: int) -> Array:
    """The mask, true as well up to `reach` entries along an axis away."""
    counts = torch.from_numpy(mask).int().cumsum(axis)
    length = mask.shape[axis]
    last = torch.arange(length)
    upto = counts.index_select(axis, (last + reach).clamp(max=length - 1))
    before = counts.index_select(axis, (last - reach - 1).clamp(min=0))
    before.index_fill_(axis, last[: reach + 1], 0)
    return (upto > before).numpy()


def _size(picture: Array) -> str:
    return f"{picture.shape[1]}x{picture.shape[0]}"
