"""The tensors that kernels read instead of a plan: tile lists, and how their work is divided."""

from typing import NamedTuple

import torch
from torch import Tensor


class TileLists(NamedTuple):
    """The tensors of a plan; all int32.

    Args:
        q_rows: [n_qt, BM] token of every query slot, -1 for none.
        k_rows: [n_kt, BN] token of every key slot, -1 for none; extra keys count on after the own tokens.
        row_ptr: [G, n_qt + 1] first entry of every query tile in the lists below.
        key_tile: [nnz] listed key tiles, per query tile the full ones first.
        mask_id: [nnz] row of the atlas, -1 where all keys are valid and visible.
        atlas: [n_masks, BM, BN // 32]; bit j % 32 of word j // 32: key slot j is visible.
    """

    q_rows: Tensor
    k_rows: Tensor
    row_ptr: Tensor
    key_tile: Tensor
    mask_id: Tensor
    atlas: Tensor


class Pieces(NamedTuple):
    """How the lists of a plan are divided among programs.

    Args:
        pieces: int32 [G, n, 5]: tile, first entry, first partial entry, end, slot of the partial result (-1: the piece
            is the whole list). Longest first; filled up with tile -1.
        joins: int32 [G, m, 3]: tile, first slot and end of its slots, for every list that was split; filled up with -1.
        slots: slots of the group that has most.
    """

    pieces: Tensor
    joins: Tensor
    slots: int

    def to(self, device: torch.device) -> "Pieces":
        return Pieces(self.pieces.to(device), self.joins.to(device), self.slots)


class Boxes(NamedTuple):
    """The lists of a plan for kernels that load key tiles of one grid as boxes; all tensors int32.

    Inside the full tiles of a list, and inside the partial ones, boxes come first.

    Args:
        corners: [n_kt, 3] first (f, y, x) of every key tile on the grid, 0 for tiles elsewhere.
        key_tile, mask_id: [nnz] as in `TileLists`, in this order.
        pieces: [G, n, 7] `Pieces.pieces` with more bounds: tile, first entry, first full tile that is no box, first
            partial box, first partial tile that is no box, end, slot.
        start, grid: first token of the grid, and its (F, H, W).
        shape: (f, h, w) of a whole tile, powers of two whose product is the slots of a tile.
    """

    corners: Tensor
    key_tile: Tensor
    mask_id: Tensor
    pieces: Tensor
    start: int
    grid: tuple[int, int, int]
    shape: tuple[int, int, int]

    def to(self, device: torch.device) -> "Boxes":
        return Boxes(*(x.to(device) for x in self[:4]), *self[4:])


class Turned(NamedTuple):
    """The lists of a plan seen from the key tiles; all int32.

    Args:
        col_ptr: [G, n_kt + 1] first entry of every key tile in the lists below.
        query_tile: [nnz] query tiles that visit it, per key tile those that see all of it first.
        mask_id: [nnz] row of the atlas, or -1.
    """

    col_ptr: Tensor
    query_tile: Tensor
    mask_id: Tensor

    def to(self, device: torch.device) -> "Turned":
        return Turned(*(x.to(device) for x in self))


class Schedule(NamedTuple):
    """What the GPU kernels need beside the tile lists; `turned` and its pieces only for gradients, `boxes` for loads by
    descriptor."""

    pieces: Pieces
    turned: Turned | None = None
    turned_pieces: Pieces | None = None
    boxes: Boxes | None = None
