"""RAU-Net: a UNet that shrinks its deep features more in the first steps of a large picture.

From HiDiffusion (Zhang et al., arXiv 2311.17528). A UNet repeats subjects above its training size because its deepest
features then cover more cells than it knows. Two changes keep them small, each during an interval of steps: a
convolution between levels that strides 4 instead of 2 (conv-RAD, undone by conv-RAU), and an average over 2 x 2 cells
within a level (block-RAD, undone by block-RAU). No weight changes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

Size = tuple[int, int]
"""(height, width) in cells."""

_LARGE = 4  # times the training size per axis, from which steps are shared out otherwise
_FIRST = 8 / 50  # share of the steps that the convolutions take before the blocks, below that size
_FEW = 4  # steps of distilled models, as published for SDXL-Turbo
CONTROLLED = 0.6
"""Share of the steps in which a ControlNet of SDXL is used."""


# ----------------------------------------------------------------------------------------------------------- resampling
def conv_rad(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The 3 x 3 convolution of stride 2 between two levels with stride 4, padding 2 and dilation 2.

    [B, C, h, w] -> [B, C', (h - 1) // 4 + 1, (w - 1) // 4 + 1]
    """
    return F.conv2d(x, weight, bias, stride=4, padding=2, dilation=2)


def thinned(x: torch.Tensor) -> torch.Tensor:
    """Every other row and column. The ordinary convolution (stride 2, padding 1) of this is `conv_rad` of x.

    All taps of a kernel with dilation 2 and stride 4 fall on even cells, and a padding of 2 is one of 1 there.
    """
    return x[..., ::2, ::2]


def conv_rau(x: torch.Tensor, size: Size, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The way back from `conv_rad`: the nearest cells of x at `size`, then the ordinary 3 x 3 convolution."""
    return F.conv2d(F.interpolate(x, size=size, mode="nearest"), weight, bias, padding=1)


def block_rad(x: torch.Tensor) -> torch.Tensor:
    """Means of 2 x 2 cells; of the cells that exist at odd borders. [B, C, h, w] -> [B, C, ceil(h/2), ceil(w/2)]"""
    return F.avg_pool2d(x, kernel_size=2, stride=2, ceil_mode=True)


def block_rau(x: torch.Tensor, size: Size) -> torch.Tensor:
    """The way back from `block_rad`, bicubic; x itself where it has that size. Residuals are fitted by it too."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=size, mode="bicubic", align_corners=False)


def halved(size: Size) -> Size:
    """What a convolution of stride 2 and padding 1, `thinned` and `block_rad` leave of a size."""
    return -(-size[0] // 2), -(-size[1] // 2)


# ------------------------------------------------------------------------------------------------------------- schedule
class Timetable(NamedTuple):
    """Steps of a run in which the convolutions and the blocks reduce."""

    conv: range
    block: range


def thresholds(variant: str, size: Size, native: Size) -> tuple[float, float]:
    """(T1, T2), shares of the steps: the change at the shallower place ends at T1 for SD 1.5 and at T2 for SDXL.

    Args:
        size: latent cells of the picture.
        native: latent cells of the training size (`sample_size` of the UNet).
    """
    if variant == "sdxl_turbo":
        return 0.5, 0.0
    if _large(size, native):
        return 0.7, 0.3
    return (0.5 if variant == "sdxl_controlnet" else 0.4), 0.0


def timetable(variant: str, size: Size, native: Size, steps: int) -> Timetable:
    """When what is reduced in a run of `steps` steps, as published for a variant.

    Below four times the training size SDXL reduces by convolutions first and by blocks then ("aggressive"); its
    inpainting and Turbo checkpoints by blocks alone.

    Args:
        variant: sd15, sdxl, sdxl_inpaint, sdxl_controlnet or sdxl_turbo.
    """
    t1, t2 = thresholds(variant, size, native)
    if variant == "sd15":
        return Timetable(range(int(steps * t1)), range(int(steps * t2)))
    if variant in ("sdxl", "sdxl_controlnet") and not _large(size, native):
        first = int(_FIRST * steps)
        return Timetable(range(first), range(first, int(steps * t1)))
    return Timetable(range(int(steps * t2)), range(int(steps * t1)))


def variant_at(variant: str, *, steps: int, controlled: bool) -> str:
    """The variant of a run of SDXL that `timetable` knows.

    Few steps mean a distilled model, and a ControlNet has a timetable of its own.
    """
    if variant != "sdxl":
        return variant
    return "sdxl_turbo" if steps <= _FEW else "sdxl_controlnet" if controlled else variant


def _large(size: Size, native: Size) -> bool:
    return all(cells >= _LARGE * own for cells, own in zip(size, native, strict=True))


# ---------------------------------------------------------------------------------------------------------------- sizes
class Levels(NamedTuple):
    """Sizes inside a UNet: `entry` and `exit` of every level on the way down, and of its pairs of layers."""

    entry: tuple[Size, ...]
    pairs: tuple[tuple[Size, ...], ...]
    exit: tuple[Size, ...]

    @property
    def skips(self) -> tuple[Size, ...]:
        """Sizes of the tensors that the way up takes over, in their order."""
        found, last = [self.entry[0]], len(self.pairs) - 1
        for level, pairs in enumerate(self.pairs):
            found += pairs if level == last else (*pairs, self.exit[level])
        return tuple(found)


def levels(size: Size, pairs: Sequence[int], *, conv: int | None = None, block: int | None = None) -> Levels:
    """Sizes inside a UNet for a latent of `size`.

    Args:
        pairs: layers per level. Every level but the last ends in a convolution of stride 2.
        conv: level whose convolution is `conv_rad`; block: level with `block_rad` after its first pair.
    """
    entries, between, exits = [], [], []
    for level, count in enumerate(pairs):
        entries.append(size)
        size = halved(size) if level == block else size
        between.append((size,) * count)
        if level + 1 < len(pairs):
            size = halved(halved(size)) if level == conv else halved(size)
        exits.append(size)
    return Levels(tuple(entries), tuple(between), tuple(exits))


def controlled_size(size: Size, native: Size) -> Size:
    """Latent cells on which a ControlNet runs: the training size in the picture's shape, in multiples of 8.

    Pictures within the training size keep theirs.
    """
    factor = max(cells / own for cells, own in zip(size, native, strict=True))
    if factor <= 1:
        return size
    rows, columns = (max(8, int(cells // factor) // 8 * 8) for cells in size)
    return rows, columns
