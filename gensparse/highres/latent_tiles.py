"""Overlapping full-size tiles with normalised feather weights."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch

from gensparse.errors import ConfigError


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Starts of tiles of exactly `tile` (or one of `length`, if shorter) that cover `length`; the last ends there.

    A thin remainder tile would set the border's tone with the statistics of a strip; so the last tile moves back.
    """
    if tile < 1 or not 0 <= overlap < tile:
        raise ConfigError(f"Tiles of {tile} with an overlap of {overlap} are given; the overlap must be 0..tile-1.")
    if tile >= length:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(k * (length - tile) / (count - 1)) for k in range(count)]


def feather(tile: int, before: int, behind: int) -> torch.Tensor:
    """Weights [tile] that rise over `before` and fall over `behind` entries and are 1 between; never 0.

    They rise as sin^2: a tile is worst at its border, and there a straight ramp would already show it.
    """
    rise = (torch.arange(tile) + 1) / (before + 1)
    fall = (tile - torch.arange(tile)) / (behind + 1)
    return torch.sin(torch.minimum(rise, fall).clamp(max=1.0) * (torch.pi / 2)) ** 2


def axis_weights(starts: list[int], size: int, length: int) -> list[torch.Tensor]:
    """Weights [size] of every tile of one axis; over all tiles they sum to 1 at every entry of `length`."""
    gaps = [max(0, a + size - b) for a, b in pairwise(starts)]
    weights = [feather(size, *pair) for pair in zip([0, *gaps], [*gaps, 0], strict=True)]
    total = torch.zeros(length)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + size] += weight
    return [w / total[s : s + size] for s, w in zip(starts, weights, strict=True)]


def blend_rows(
    read: Callable[[slice, slice], torch.Tensor],
    shape: tuple[int, int],
    tile: int,
    overlap: int,
    *,
    in_scale: int = 1,
    out_scale: int = 1,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Blend the tiles that `read(rows, columns)` makes of an input plane and yield finished row strips.

    Args:
        read: gives the result [..., h, w] for a tile of the input plane.
        shape, tile, overlap: in cells (latent pixels); a cell is `in_scale` input and `out_scale` output pixels wide.

    Yields:
        (first output row, strip float32 [..., rows, W] on the CPU) from top to bottom; only one row of tiles is alive.
    """
    starts = [tile_starts(n, tile, overlap) for n in shape]
    sizes = [min(tile, n) for n in shape]
    weights = [
        axis_weights([s * out_scale for s in axis], size * out_scale, n * out_scale)
        for axis, size, n in zip(starts, sizes, shape, strict=True)
    ]
    carried: torch.Tensor | None = None
    for k, (top, row_weight) in enumerate(zip(starts[0], weights[0], strict=True)):
        rows = slice(top * in_scale, (top + sizes[0]) * in_scale)
        band: torch.Tensor | None = None
        for left, col_weight in zip(starts[1], weights[1], strict=True):
            part = read(rows, slice(left * in_scale, (left + sizes[1]) * in_scale)).to("cpu", torch.float32)
            if band is None:
                band = part.new_zeros(*part.shape[:-1], shape[1] * out_scale)
            weight = row_weight[:, None] * col_weight
            band[..., left * out_scale : (left + sizes[1]) * out_scale].addcmul_(part, weight)
        assert band is not None
        if carried is not None:
            band[..., : carried.shape[-2], :] += carried
        following = starts[0][k + 1] if k + 1 < len(starts[0]) else shape[0]
        done = (following - top) * out_scale
        carried = band[..., done:, :].clone()
        yield top * out_scale, band[..., :done, :]
