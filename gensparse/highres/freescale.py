"""FreeScale: local and global attention fused by frequency, and dilated convolutions (Qiu et al., arXiv 2412.09626).

Published for sides that are multiples of 1024 pixels, where the target's zoom S per axis is whole. Here windows follow
from the native side and the map's own shape, and whole zooms are rounded ones, which gives the same numbers there.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from gensparse.errors import ConfigError
from gensparse.highres.demofusion import gaussian_taps
from gensparse.highres.views import Size

FUSIONS = ("spatial", "reference")


# --- scale fusion
def low_pass(x: torch.Tensor, scale: int, kind: str = "spatial") -> torch.Tensor:
    """Low frequencies of tokens x [B, h, w, d]: a Gaussian of 2 scale - 1 taps, sigma 1, zeros beyond the borders.

    Args:
        scale: the zoom of the longer axis; 1 leaves x as it is.
        kind: "spatial" blurs rows and columns; "reference" also the channels, as the authors' code does.

    Raises:
        ConfigError: another kind.
    """
    if kind not in FUSIONS:
        raise ConfigError(f"FreeScale's fusion is {kind!r}; choose one of {', '.join(FUSIONS)}.")
    for axis in (1, 2) if kind == "spatial" else (1, 2, 3):
        x = _blurred(x, axis, scale)
    return x


def fused(local: torch.Tensor, whole: torch.Tensor, scale: int, kind: str = "spatial") -> torch.Tensor:
    """Low frequencies of `local`, high ones of `whole`, [B, h, w, d]; the filter is linear, so it runs once."""
    return whole + low_pass(local - whole, scale, kind)


def _blurred(x: torch.Tensor, axis: int, scale: int) -> torch.Tensor:
    reach, length = scale - 1, x.shape[axis]
    taps = gaussian_taps(2 * scale - 1, 1.0).tolist()
    out = x * taps[reach]
    for k in range(1, min(reach, length - 1) + 1):  # one shifted sum per tap: no copy of x for each
        rest = length - k
        out.narrow(axis, k, rest).add_(x.narrow(axis, 0, rest), alpha=taps[reach - k])
        out.narrow(axis, 0, rest).add_(x.narrow(axis, k, rest), alpha=taps[reach + k])
    return out


# --- windows of tokens
class TokenWindows(NamedTuple):
    """Windows on a map of tokens: their size, every how many tokens, and by how many they are moved at most."""

    window: Size
    stride: Size
    jitter: Size


def zoom(size: Size, native: int) -> int:
    """How many times longer the longer axis is than at the native size, at least 1; the kernel's `scale`."""
    return max(1, math.floor(max(size) / native + 0.5))


def token_windows(size: Size, native: int) -> TokenWindows:
    """Windows as long as the native side along the longer axis and of the map's own shape.

    Args:
        size: (rows, columns) of the map.
        native: tokens per side of the map at the training size.
    """
    longest = max(size)
    window = tuple(min(axis, max(1, math.floor(native * axis / longest + 0.5))) for axis in size)
    return windows_of((window[0], window[1]))


def windows_of(window: Size) -> TokenWindows:
    """Strides of half a window, moved by an eighth of it at most."""
    return TokenWindows(
        window, (max(1, window[0] // 2), max(1, window[1] // 2)), (window[0] // 8, window[1] // 8)
    )  # fmt: skip


def sub_grids(size: Size, native: int) -> Size:
    """Step of the dilated sub-grids on which the fast mode attends globally, per axis."""
    return tuple(max(1, math.floor(axis / native + 0.5)) for axis in size)  # type: ignore[return-value]


# --- restrained dilation
DILATED_STEPS = 35 / 50
"""Share of all steps in which convolutions are dilated; the last ones are not."""


def dilated_convs(levels: int, layers: int, mid_layers: int = 2) -> tuple[str, ...]:
    """Names of the convolutions of a UNet that are dilated: into and in its deepest level, and in the middle.

    For SDXL (3 levels, 2 layers) the published list; other UNets get the same places. None on the way up.
    """
    last = levels - 1
    blocks = [f"down_blocks.{last}.resnets.{k}" for k in range(layers)]
    blocks += [f"mid_block.resnets.{k}" for k in range(mid_layers)]
    down = [f"down_blocks.{last - 1}.downsamplers.0.conv"] if last > 0 else []
    return (*down, *(f"{block}.conv{n}" for block in blocks for n in (1, 2)))


class Dilation(NamedTuple):
    """A map [B, C, H, W] cut so that an ordinary 3 x 3 convolution of padding 1 computes a dilated one of padding d.

    The output cells o = r + d n of a residue r see the input cells stride * r + d (stride * n + k - 1): an ordinary
    convolution of the input's sub-sequence. So no weight, attribute or code of the convolution changes.

    Args:
        size: (rows, columns) of the input.
        dilation: d, also the padding.
        stride: 1 or 2.
    """

    size: Size
    dilation: int
    stride: int

    @property
    def out(self) -> Size:
        """(rows, columns) of the result: those of the ordinary convolution."""
        return (self.size[0] - 1) // self.stride + 1, (self.size[1] - 1) // self.stride + 1

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [d * d * B, C, h, w], input of the ordinary convolution."""
        rows, columns = (self._places(length, out, x.device) for length, out in zip(self.size, self.out, strict=True))
        x = F.pad(x, (0, 1, 0, 1))  # the last row and column are the zeros beyond the borders
        parts = x.index_select(-2, rows.flatten()).index_select(-1, columns.flatten())
        parts = parts.unflatten(-1, columns.shape).unflatten(-3, rows.shape)  # [B, C, d, h, d, w]
        return parts.permute(2, 4, 0, 1, 3, 5).flatten(0, 2)

    def join(self, y: torch.Tensor) -> torch.Tensor:
        """The results of the parts [d * d * B, C, h, w] -> [B, C, *out]."""
        skip = self.stride - 1
        y = y[..., skip:, skip:].unflatten(0, (self.dilation, self.dilation, -1))
        y = y.permute(2, 3, 4, 0, 5, 1).flatten(4, 5).flatten(2, 3)
        return y[..., : self.out[0], : self.out[1]]

    def _places(self, length: int, out: int, device: torch.device) -> torch.Tensor:
        """Input cell at every place of every part, int64 [d, n]; `length` stands for a zero.

        With stride 2 a part begins two cells early, because its own left border need not be the map's.
        """
        d, stride = self.dilation, self.stride
        lead = stride * (stride - 1)
        count = stride * (-(-out // d) - 1) + 1 + lead + (stride - 1)
        start = stride * torch.arange(d, device=device)[:, None]
        place = start + d * (torch.arange(count, device=device) - lead)
        return torch.where((place >= 0) & (place < length), place, length)


# --- cascade
RESTART = {"sdxl": 0.3, "sdxl-turbo": 0.5}
"""Share of the steps that larger sizes leave out."""


def restart_step(steps: int, share: float = 0.3) -> int:
    """First step of a larger size: int(share * steps)."""
    return int(share * steps)
