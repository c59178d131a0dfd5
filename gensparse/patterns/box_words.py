"""Bitwise OR over boxes of a grid, in constant time per box."""

from itertools import product

import numpy as np
from numpy.typing import NDArray

from gensparse.layout import Ints

Words = NDArray[np.uint64]


class BoxWords:
    """The OR of the words of all tokens in a box.

    Two overlapping blocks of a power-of-two length cover any run of an axis, so that tables of the OR over such blocks,
    made on first use, answer for every box.

    Args:
        words: [F, H, W, n], n words per token.
    """

    def __init__(self, words: Words) -> None:
        self.width = words.shape[-1]
        flat = words.reshape(-1, self.width)
        self._same = flat[0] if (flat == flat[0]).all() else None
        self._log = np.array([0, *(n.bit_length() - 1 for n in range(1, max(words.shape[:3]) + 1))])
        self._tables = {(0, 0, 0): words}

    def over(self, lo: Ints, hi: Ints) -> Words:
        """Words [m, n] of boxes lo..hi [m, 3] that lie in the grid and are not empty."""
        if self._same is not None:
            return np.broadcast_to(self._same, (len(lo), self.width))
        level = self._log[hi - lo]
        code = (level[:, 0] << 12) + (level[:, 1] << 6) + level[:, 2]
        kinds = np.flatnonzero(np.bincount(code))
        if len(kinds) == 1:
            return self._corners(lo, hi, int(kinds[0]))
        found = np.empty((len(lo), self.width), np.uint64)
        for kind in kinds.tolist():
            own = np.flatnonzero(code == kind)
            found[own] = self._corners(lo[own], hi[own], kind)
        return found

    def _corners(self, lo: Ints, hi: Ints, kind: int) -> Words:
        """Boxes of one level per axis: the blocks at both ends of every axis."""
        levels = (kind >> 12, kind >> 6 & 63, kind & 63)
        table = self._table(levels)
        ends = [(lo[:, n], hi[:, n] - (1 << level)) if level else (lo[:, n],) for n, level in enumerate(levels)]
        return np.bitwise_or.reduce([table[corner] for corner in product(*ends)])

    def _table(self, levels: tuple[int, int, int]) -> Words:
        """[F', H', W', n]: OR over the block of 2^level tokens per axis that starts at a token."""
        if levels not in self._tables:
            axis = int(np.argmax(levels))
            half = self._table(tuple(level - (n == axis) for n, level in enumerate(levels)))
            step = 1 << (levels[axis] - 1)
            count = half.shape[axis] - step
            first, second = (np.take(half, np.arange(start, start + count), axis) for start in (0, step))
            self._tables[levels] = first | second
        return self._tables[levels]
