"""Views of a latent: sliding windows with jitter, and dilated views that see the whole picture coarsely.

DemoFusion (Du et al., arXiv 2311.16973) denoises windows of the trained size and averages them where they overlap
(MultiDiffusion), and next to them every s-th row and column of the latent. FreeScale (Qiu et al., arXiv 2412.09626)
uses the same windows on tokens. Both are published for sides that are multiples of the window; here sides may have any
length: a window longer than an axis is cut to it, and the last window moves back to end with the axis.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from gensparse.errors import ConfigError

Size = tuple[int, int]
"""(rows, columns)."""


class View(NamedTuple):
    """Rows top..bottom and columns left..right of a map, half-open."""

    top: int
    bottom: int
    left: int
    right: int

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """This part of x [..., H, W]."""
        return x[..., self.top : self.bottom, self.left : self.right]


# --- windows
def axis_starts(length: int, window: int, stride: int) -> list[int]:
    """Starts of windows every `stride` cells; the last one moves back so that it ends at `length`.

    One window at 0 where the axis is not longer than it.

    Raises:
        ConfigError: no positive integers, or a stride longer than the window, which would leave gaps.
    """
    if min(length, window, stride) < 1 or stride > window:
        raise ConfigError(
            f"Windows of {window} every {stride} on an axis of {length} are given; pass positive numbers and a stride "
            "of at most the window."
        )
    if length <= window:
        return [0]
    count = -(-(length - window) // stride) + 1
    return [min(k * stride, length - window) for k in range(count)]


def windows(size: Size, window: Size, stride: Size) -> list[View]:
    """Windows that cover a map of `size`, row by row (DemoFusion's views without jitter)."""
    rows, columns = map(axis_starts, size, window, stride)
    high, wide = map(min, size, window)
    return [View(top, top + high, left, left + wide) for top in rows for left in columns]


def window_jitter(window: Size, stride: Size) -> Size:
    """Cells by which DemoFusion moves windows at most: (window - stride) // 4, at which no gap can open."""
    return (window[0] - stride[0]) // 4, (window[1] - stride[1]) // 4


def jittered(views: Sequence[View], size: Size, reach: Size, generator: torch.Generator | None) -> list[View]:
    """Every window moved by up to `reach`, as views of the map padded by `reach` on all sides (see `padded`).

    Windows at a border move outwards only, so that the border stays covered; those that touch both do not move.

    Args:
        views: of a map of `size`, unpadded.
        generator: None moves nothing; the result is still one of padded views.
    """
    moves = torch.zeros(len(views), 2, dtype=torch.int64)
    if generator is not None:
        low = torch.tensor([[-reach[a] * (view[2 * a + 1] < size[a]) for a in range(2)] for view in views])
        high = torch.tensor([[reach[a] * (view[2 * a] > 0) for a in range(2)] for view in views])
        share = torch.rand(moves.shape, generator=generator, device=generator.device, dtype=torch.float64)
        moves = low + (share.cpu() * (high - low + 1)).floor().long()
    rows, columns = (moves + torch.tensor(reach)).T.tolist()
    return [
        View(view.top + row, view.bottom + row, view.left + column, view.right + column)
        for view, row, column in zip(views, rows, columns, strict=True)
    ]


def padded(x: torch.Tensor, reach: Size) -> torch.Tensor:
    """x [..., H, W] with zeros around: `reach` rows above and below, columns left and right."""
    return F.pad(x, (reach[1], reach[1], reach[0], reach[0])) if any(reach) else x


def unpadded(x: torch.Tensor, reach: Size) -> torch.Tensor:
    """The way back from `padded`."""
    return x[..., reach[0] : x.shape[-2] - reach[0], reach[1] : x.shape[-1] - reach[1]]


def batches(views: Sequence[View], most: int) -> Iterable[list[View]]:
    """Views in batches of at most `most`, of one size each."""
    shape = lambda view: (view.bottom - view.top, view.right - view.left)  # noqa: E731
    for size in dict.fromkeys(map(shape, views)):
        alike = [view for view in views if shape(view) == size]
        for first in range(0, len(alike), most):
            yield alike[first : first + most]


def averaged(
    predict: Callable[[list[View]], torch.Tensor],
    views: Sequence[View],
    like: torch.Tensor,
    most: int = 16,
    weigh: Callable[[View], torch.Tensor] | None = None,
) -> torch.Tensor:
    """What `predict` gives for windows, averaged where they overlap; 0 where there is none.

    Args:
        predict: at most `most` views of one size -> their results one after the other, [views * B, C, h, w].
        like: [B, C, H, W], shape, dtype and device of the result.
        weigh: view -> weights [h, w] above 0 of its cells; None counts every window alike.
    """
    total = torch.zeros_like(like)
    count = like.new_zeros(1, 1, *like.shape[-2:])
    for group in batches(views, most):
        for view, part in zip(group, predict(group).split(len(like)), strict=True):
            weight = 1 if weigh is None else weigh(view).to(like)
            view.of(total).add_(part * weight)
            view.of(count).add_(weight)
    return total.div_(count.masked_fill_(count == 0, 1))


# --- dilated views
def padded_to(x: torch.Tensor, step: Size) -> torch.Tensor:
    """x [..., H, W] with zeros above and left, so that `step` divides both sides."""
    above, left = -x.shape[-2] % step[0], -x.shape[-1] % step[1]
    return F.pad(x, (left, 0, above, 0)) if above or left else x


def dilated_views(x: torch.Tensor, step: Size) -> torch.Tensor:
    """Every step-th row and column, from every start: [B, C, H, W] -> [rows * columns * B, C, H / rows, W / columns].

    Starts run row by row, the batch inside them. Both sides must be multiples of their step (see `padded_to`).
    """
    batch, channels, height, width = x.shape
    rows, columns = step
    if height % rows or width % columns:
        raise ConfigError(f"A map of {height}x{width} has no whole views of step {rows}x{columns}; pad it first.")
    split = x.reshape(batch, channels, height // rows, rows, width // columns, columns)
    return split.permute(3, 5, 0, 1, 2, 4).reshape(-1, channels, height // rows, width // columns)


def from_dilated(views: torch.Tensor, step: Size) -> torch.Tensor:
    """The way back from `dilated_views`."""
    rows, columns = step
    count, channels, height, width = views.shape
    split = views.reshape(rows, columns, count // (rows * columns), channels, height, width)
    return split.permute(2, 3, 4, 0, 5, 1).reshape(-1, channels, height * rows, width * columns)
