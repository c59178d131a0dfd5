"""Reposition: a reference's subject moved and scaled onto the box of its place (IR-Diffusion 2411.19261)."""

from typing import NamedTuple

import torch
from torch import Tensor

from gensparse.errors import ConfigError


class Move(NamedTuple):
    """Which token of the reference stands at which place of the new picture.

    Args:
        source: int64 [M], tokens of the reference, with repetition where it grows.
        place: int64 [M], tokens of the new picture, ascending.
    """

    source: Tensor
    place: Tensor

    def of(self, x: Tensor) -> Tensor:
        """Tokens [N, ...] of the reference at their places, zeros elsewhere, [N, ...]."""
        moved = torch.zeros_like(x)
        moved[self.place.to(x.device)] = x[self.source.to(x.device)]
        return moved


def reposition(source: Tensor, target: Tensor) -> Move:
    """Where the tokens of a subject go when its box is resized (nearest) onto the box of its place.

    Args:
        source: bool [rows, columns], the subject in its reference.
        target: bool [rows, columns], its place in the new picture, on the same grid.

    Empty masks move nothing: then the reference stays as it is, with its own mask.

    Raises:
        ConfigError: masks of different grids.
    """
    if source.shape != target.shape or source.dim() != 2:
        raise ConfigError(
            f"Masks of {tuple(source.shape)} and {tuple(target.shape)} are on different grids; pass both on one."
        )
    source, target = source.bool().cpu(), target.bool().cpu()
    here = source.flatten().nonzero()[:, 0]
    if not len(here) or not bool(target.any()):
        return Move(here, here)
    rows, columns = (
        _places(source.any(dim=1 - axis).nonzero()[:, 0], target.any(dim=1 - axis).nonzero()[:, 0]) for axis in (0, 1)
    )
    width = source.shape[1]
    from_ = (rows[0][:, None] * width + columns[0]).flatten()
    to = (rows[1][:, None] * width + columns[1]).flatten()
    kept = source.flatten()[from_]
    return Move(from_[kept], to[kept])


def _places(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Along one axis: the place in the reference's box of every place in the new box, and that place."""
    first, size = int(source[0]), int(source[-1] - source[0]) + 1
    start, length = int(target[0]), int(target[-1] - target[0]) + 1
    step = torch.arange(length)
    return first + step * size // length, start + step
