"""DemoFusion: windows and dilated views of one latent, mixed by cosine weights (Du et al., arXiv 2311.16973).

The weights depend on f = (1 + cos(pi (T - t) / T)) / 2, which is 1 at the noisiest timestep and 0 at the clean picture.
Statistics are taken per sample, so that pictures of a batch do not know of each other (published for one picture).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from gensparse.highres.stages import round_size

SCALES = (3.0, 1.0, 1.0)
"""Exponents of f in the three weights, as published."""


class Weights(NamedTuple):
    """Of one step: of the noised guide, of the dilated views, and how wide these are blurred before."""

    skip: float
    dilated: float
    blur: float


def cosine_factor(t: float, steps: int = 1000) -> float:
    """f at timestep t of `steps` training steps."""
    return 0.5 * (1 + math.cos(math.pi * (steps - t) / steps))


def weights(t: float, scales: Sequence[float] = SCALES, steps: int = 1000) -> Weights:
    """c1 = f^3, c2 = f and c3 = 0.99 f + 0.01 for the published exponents."""
    f = cosine_factor(t, steps)
    return Weights(f ** scales[0], f ** scales[1], 0.99 * f ** scales[2] + 0.01)


def mixed(x: torch.Tensor, other: torch.Tensor, weight: float) -> torch.Tensor:
    """(1 - weight) x + weight other: the skip residual (other = the noised guide), and local and dilated views."""
    return (1 - weight) * x + weight * other


# --- blur
def gaussian_taps(size: int, sigma: float, device: torch.device | str | None = None) -> torch.Tensor:
    """Normalised Gaussian of `size` taps about their middle, float32 [size]."""
    x = torch.arange(size, dtype=torch.float32, device=device) - (size - 1) / 2
    taps = torch.exp(-(x**2) / (2 * sigma**2))
    return taps / taps.sum()


def gaussian_kernel(size: int, sigma: float) -> torch.Tensor:
    """The same in two dimensions, float32 [size, size]."""
    taps = gaussian_taps(size, sigma)
    return taps[:, None] * taps


def gaussian_blur(x: torch.Tensor, size: int, sigma: float) -> torch.Tensor:
    """x [B, C, H, W] convolved with `gaussian_kernel` in every channel, zeros beyond the borders; odd sizes."""
    taps = gaussian_taps(size, sigma, x.device).to(x.dtype)
    planes = x.reshape(-1, 1, *x.shape[-2:])
    planes = F.conv2d(planes, taps.view(1, 1, -1, 1), padding=(size // 2, 0))
    return F.conv2d(planes, taps.view(1, 1, 1, -1), padding=(0, size // 2)).reshape(x.shape)


# --- statistics
class Moments(NamedTuple):
    """Mean and (unbiased) standard deviation of every sample, [B, 1, 1, 1]."""

    mean: torch.Tensor
    std: torch.Tensor


def moments(x: torch.Tensor) -> Moments:
    """Of x [B, C, H, W], over all elements of a sample."""
    std, mean = torch.std_mean(x, dim=(1, 2, 3), keepdim=True)
    return Moments(mean, std)


def with_moments(x: torch.Tensor, wanted: Moments) -> torch.Tensor:
    """x shifted and scaled so that its samples have these moments: those of the native picture, the anchor."""
    own = moments(x)
    return (x - own.mean) / own.std * wanted.std + wanted.mean


def blurred(x: torch.Tensor, scale: int, blur: float, sigma: float = 1.0) -> torch.Tensor:
    """x [B, C, H, W] for dilated views of step `scale`: blurred over 2 scale - 1 cells, its moments kept.

    Args:
        blur: `Weights.blur` of the step; it narrows the Gaussian of `sigma` cells.
    """
    return with_moments(gaussian_blur(x, 2 * scale - 1, sigma * blur), moments(x))


# --- phases
class Phase(NamedTuple):
    """One size in pixels, and the step of its dilated views."""

    height: int
    width: int
    dilation: int


def phases(height: int, width: int, native: int, *, multiple: int = 8) -> list[Phase]:
    """The sizes 1, 2, ..., S times the native one, the last (height, width).

    As published the longer side grows by `native` pixels, the side of training. Other targets get round(longer side /
    native) phases of equal growth, so a first picture is between 2/3 and 3/2 of the native side.
    """
    last = max(1, math.floor(max(height, width) / native + 0.5))
    between = [
        Phase(round_size(height * s / last, multiple), round_size(width * s / last, multiple), s)
        for s in range(1, last)
    ]
    return [*between, Phase(height, width, last)]
