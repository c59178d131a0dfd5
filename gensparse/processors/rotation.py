"""Rotary embedding of tokens that move: keys get the rotation of their new place (FLUX.1)."""

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]


def turned_to(x: Tensor, rotary: Rotary, source: Tensor, place: Tensor) -> Tensor:
    """Rotated keys [M, H, D] of the tokens `source`, as they would be at the tokens `place`.

    Args:
        rotary: cosines and sines [N, D] of the picture's tokens, for neighbouring pairs of channels.
        source, place: int64 [M].
    """
    cos, sin = (part.to(x.device).float()[:, None] for part in rotary)
    wide = x.float()
    plain = (wide * cos[source] - _turned(wide) * sin[source]) / (cos[source] ** 2 + sin[source] ** 2)
    return (plain * cos[place] + _turned(plain) * sin[place]).to(x.dtype)


def _turned(x: Tensor) -> Tensor:
    """A quarter turn of neighbouring pairs of channels: (a, b) -> (-b, a)."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([-second, first], -1).flatten(-2)
