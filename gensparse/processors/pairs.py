"""A mask that a model makes by multiplying a mask over tokens with itself, without the matrix of all pairs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gensparse.processors.masks import key_bias

NO_MASK = -1


@dataclass(frozen=True, eq=False)
class ProductMask:
    """Mask m_i * m_j between tokens i and j of one sequence.

    Args:
        tokens: m [B, N]. Bools: True * True is visible, nothing else. Numbers 0 and 1: the product is added to the
            logits, so a query of 1 prefers keys of 1 and a query of 0 has no preference.
        trivial: all m are 1, so that the mask changes nothing.
    """

    tokens: Tensor
    trivial: bool = False

    @property
    def added(self) -> bool:
        """Whether queries of 0 attend like the others, but without preference."""
        return self.tokens.is_floating_point() and not self.trivial

    def whole(self) -> Tensor:
        """[B, 1, N, N], as the model would have made it."""
        return self.tokens[:, None, None, :] * self.tokens[:, None, :, None]

    def bias(self) -> Tensor | None:
        """Bias [B, 1, N] of the keys for the queries whose m is 1."""
        return None if self.trivial else key_bias(self.tokens[:, None, None, :])

    def joined(self, ones: Tensor, zeros: Tensor | None) -> Tensor:
        """Results [B, N, H, D]: `ones` for queries whose m is 1, `zeros` (or 0) for the others."""
        if self.trivial:
            return ones
        valid = self.tokens[:, :, None, None] != 0
        return ones * valid if zeros is None else ones.where(valid, zeros)


def last_zero(tokens: Tensor) -> int:
    """Number of first tokens among which all zeros of a mask m [B, N] are; `NO_MASK` where it is no such mask.

    Waits for the device.
    """
    if tokens.dim() != 2 or not (tokens.is_floating_point() or tokens.dtype is torch.bool):
        return NO_MASK
    zero = tokens == 0
    if not bool((zero | (tokens == 1)).all()):
        return NO_MASK
    places = zero.any(dim=0).nonzero()
    return int(places.max()) + 1 if len(places) else 0
