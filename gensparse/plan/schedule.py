"""How the GPU kernels divide the work of a plan: lists cut into pieces, and the same lists seen from the key tiles."""

from collections.abc import Sequence
from math import prod

import numpy as np
import torch

from gensparse.kernels.lists import Boxes, Pieces, TileLists, Turned
from gensparse.layout import Ints
from gensparse.plan.tiles import SegmentTiles

LONG = 4  # a list this many times longer than the mean is cut into pieces of at most that length
SHORT = 16  # entries below which a cut costs more than it spreads


def cut_pieces(row_ptr: torch.Tensor, mask_id: torch.Tensor, *, most: int | None = None) -> Pieces:
    """Pieces of all lists, the longest first, so that no program starts late with much to do.

    Args:
        row_ptr: int32 [G, n + 1], first entry of every list.
        mask_id: int32 [nnz], -1 for full tiles, which come first in every list.
        most: entries of a piece; by default `LONG` times the mean of a group, at least `SHORT`.

    Returns:
        The pieces, on the device of `row_ptr`. Every list has at least one, also an empty one, which writes the zeros.
    """
    pointers = row_ptr.cpu().numpy().astype(np.int64)
    partial = np.concatenate([[0], np.cumsum(mask_id.cpu().numpy() >= 0)])
    groups = [_cut_group(pointer, partial, most) for pointer in pointers]
    slots = max(int(pieces[:, 4].max(initial=-1)) + 1 for pieces, _ in groups)
    columns = (_padded([group[part] for group in groups]).to(row_ptr.device) for part in range(2))
    return Pieces(*columns, slots)


def turn(lists: TileLists) -> Turned:
    """The transposed lists: per key tile the query tiles that visit it, those that see all of it first."""
    pointers, key_tile, mask_id = (x.cpu().numpy().astype(np.int64) for x in lists[2:5])
    n_kt = len(lists.k_rows)
    order = np.empty(len(key_tile), np.int64)
    query_tile = np.empty(len(key_tile), np.int64)
    col_ptr = np.empty((len(pointers), n_kt + 1), np.int64)
    for group, pointer in enumerate(pointers):
        own = slice(pointer[0], pointer[-1])
        queries = np.repeat(np.arange(len(pointer) - 1), np.diff(pointer))
        inside = np.lexsort((queries, mask_id[own] >= 0, key_tile[own]))
        order[own] = inside + pointer[0]
        query_tile[own] = queries[inside]
        col_ptr[group] = pointer[0] + np.concatenate([[0], np.cumsum(np.bincount(key_tile[own], minlength=n_kt))])
    ends, tiles, masks = (_int32(x).to(lists.row_ptr.device) for x in (col_ptr, query_tile, mask_id[order]))
    return Turned(ends, tiles, masks)


def why_no_boxes(tiles: SegmentTiles, slots: int, *, interleaved: bool) -> str | None:
    """Why key tiles cannot be loaded as boxes by a tensor descriptor, or None.

    Args:
        tiles: key tiles of the target.
        slots: of a key tile.
        interleaved: whether the sequence has the order of `Layout.ulysses`.
    """
    steps = tuple(axis.step for axis in tiles.axes)
    if interleaved:
        return "the sequence is interleaved, so neighbours on the grid are no neighbours in memory."
    if steps != (1, 1, 1):
        return f"key tiles take every step-th token with steps {steps} and boxes hold all."
    if prod(tiles.shape) != slots or any(size & (size - 1) for size in tiles.shape):
        return f"key tiles are {tiles.shape} and boxes need powers of two whose product is {slots}."
    return None


def box_lists(lists: TileLists, pieces: Pieces, key_tiles: Sequence[SegmentTiles], target: int) -> Boxes:
    """The lists with boxes of the target first among the full and among the partial tiles, cut like `pieces`.

    Args:
        key_tiles: key tiles of all segments, in order.
        target: index of the segment whose tiles are boxes; `why_no_boxes` says whether they are.
    """
    own = key_tiles[target]
    first = sum(len(tiles) for tiles in key_tiles[:target])
    corners = np.zeros((len(lists.k_rows), 3), np.int64)
    corners[first : first + len(own)] = own.boxes.lo
    pointers, key_tile, mask_id = (x.cpu().numpy().astype(np.int64) for x in lists[2:5])
    elsewhere = (key_tile < first) | (key_tile >= first + len(own))
    kind = 2 * (mask_id >= 0) + elsewhere
    starts = np.concatenate([pointer[:-1] for pointer in pointers])
    counts = np.concatenate([np.diff(pointer) for pointer in pointers])
    order = np.lexsort((kind, np.repeat(starts, counts)))  # empty lists repeat no start
    table = pieces.pieces.cpu().numpy().astype(np.int64)
    entries = np.maximum(table[..., 1:4], 0)  # of the filling, nothing
    below = [np.concatenate([[0], np.cumsum(kind[order] < limit)]) for limit in (1, 2, 3)]
    bounds = [entries[..., 0] + count[entries[..., 2]] - count[entries[..., 0]] for count in below]
    bounds = np.where(table[..., :1] < 0, -1, np.stack(bounds, -1))
    cut = np.concatenate([table[..., :2], bounds, table[..., 3:]], -1)
    columns = (_int32(x).to(lists.row_ptr.device) for x in (corners, key_tile[order], mask_id[order], cut))
    return Boxes(*columns, own.start, own.grid, own.shape)


def _cut_group(pointer: Ints, partial: Ints, most: int | None) -> tuple[Ints, Ints]:
    """Pieces [n, 5] and joins [m, 3] of one group."""
    count = np.diff(pointer)
    limit = most or max(SHORT, int(np.ceil(LONG * count.mean())))
    parts = np.maximum(1, -(-count // limit))
    tile = np.repeat(np.arange(len(count)), parts)
    start = np.cumsum(parts) - parts
    number = np.arange(len(tile)) - start[tile]
    first = pointer[tile] + count[tile] * number // parts[tile]
    end = pointer[tile] + count[tile] * (number + 1) // parts[tile]
    full_end = pointer[1:] - (partial[pointer[1:]] - partial[pointer[:-1]])
    middle = np.clip(full_end[tile], first, end)
    split = parts > 1
    slot_start = np.cumsum(np.where(split, parts, 0)) - np.where(split, parts, 0)
    slot = np.where(split[tile], slot_start[tile] + number, -1)
    order = np.argsort(first - end, kind="stable")
    pieces = np.stack([tile, first, middle, end, slot], axis=1)[order]
    cut = np.flatnonzero(split)
    return pieces, np.stack([cut, slot_start[cut], slot_start[cut] + parts[cut]], axis=1)


def _padded(tables: list[Ints]) -> torch.Tensor:
    """Tables [n, c] of all groups as int32 [G, longest, c], filled up with -1."""
    longest = max(len(table) for table in tables)
    return _int32(np.stack([np.pad(x, ((0, longest - len(x)), (0, 0)), constant_values=-1) for x in tables]))


def _int32(x: Ints) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, np.int32))
