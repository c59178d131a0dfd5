"""Where an object goes: its tokens in its own picture, and the same tokens at its place in another picture."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gensparse.errors import ConfigError
from gensparse.subjects.masks import to_grid

Box = tuple[float, float, float, float]
"""top, left, bottom, right; the last two are not inside."""


class Placed(NamedTuple):
    """An object on a grid, in its own picture and at its place in the new one.

    Args:
        source, target: numbers of its tokens there and here, int64 [M] in the same order; those that would lie outside
            of the new picture are in neither.
        box: rows and columns top, left, bottom, right of its box here, cut at the borders.
    """

    source: Tensor
    target: Tensor
    box: tuple[int, int, int, int]

    def pasted(self, onto: Tensor, what: Tensor) -> Tensor:
        """A copy of pictures `onto` [..., rows, columns] with the object of `what` in its place."""
        flat = onto.flatten(-2).clone()
        flat[..., self.target.to(flat.device)] = what.flatten(-2)[..., self.source.to(what.device)].to(flat)
        return flat.view_as(onto)

    def taken(self, onto: Tensor, what: Tensor) -> Tensor:
        """The way back: a copy of pictures `onto` of the object with what is in its place in `what`."""
        return self._replace(source=self.target, target=self.source).pasted(onto, what)

    def inside(self, like: Tensor) -> Tensor:
        """bool [rows, columns] of `like` [..., rows, columns]: where the box is."""
        found = torch.zeros(like.shape[-2:], dtype=torch.bool, device=like.device)
        top, left, bottom, right = self.box
        found[top:bottom, left:right] = True
        return found


def mask_box(mask: Tensor) -> Box:
    """The box of what a mask [H, W] keeps, in its pixels.

    Raises:
        ConfigError: a mask that keeps nothing.
    """
    rows, columns = (mask.bool().any(axis).nonzero()[:, 0] for axis in (1, 0))
    if not len(rows):
        raise ConfigError("The mask of an object keeps nothing; paint the object white.")
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def centre_of(region: Tensor) -> tuple[float, float]:
    """(row, column) of the middle of a region [H, W], in shares of its height and width.

    Raises:
        ConfigError: a region without a pixel.
    """
    top, left, bottom, right = mask_box(region)
    return (top + bottom) / 2 / region.shape[0], (left + right) / 2 / region.shape[1]


def placed(mask: Tensor, box: Box, centre: tuple[float, float], grid: tuple[int, int]) -> Placed:
    """Tokens of an object on a grid of (rows, columns), as PrimeComposer (2403.05053) moves them.

    A box from y to y' of H pixels has the rows floor(y * rows / H) to floor(y' * rows / H), without the last; with n of
    them it begins at row floor(centre * rows) - ceil(n / 2) of the new picture. Columns alike. What lies beyond the
    borders is left out.

    Args:
        mask: bool [H, W], the object in its own picture.
        box: of the object, in pixels of the mask; nothing outside of it counts.
        centre: (row, column) of its place, in shares of the new picture.
    """
    first = [math.floor(edge * n / side) for edge, n, side in zip(box[:2], grid, mask.shape, strict=True)]
    last = [math.floor(edge * n / side) for edge, n, side in zip(box[2:], grid, mask.shape, strict=True)]
    size = [max(0, b - a) for a, b in zip(first, last, strict=True)]
    start = [math.floor(share * n) - math.ceil(m / 2) for share, n, m in zip(centre, grid, size, strict=True)]
    rows, columns = to_grid(mask.bool(), grid).nonzero().unbind(1)
    there = [x + (b - a) for x, a, b in zip((rows, columns), first, start, strict=True)]
    kept = torch.ones_like(rows, dtype=torch.bool)
    for own, new, a, m, n in zip((rows, columns), there, first, size, grid, strict=True):
        kept &= (own >= a) & (own < a + m) & (new >= 0) & (new < n)
    source, target = rows * grid[1] + columns, there[0] * grid[1] + there[1]
    (top, bottom), (left, right) = (
        (min(max(b, 0), n), min(max(b + m, 0), n)) for b, m, n in zip(start, size, grid, strict=True)
    )
    return Placed(source[kept], target[kept], (top, left, bottom, right))
