"""Lowered forms: a rule as tiles with one box of keys each (halo) or as windows (partition).

Both need the rest of the layout to be simple: every other segment sees, and is seen, wholly or not at all. A form that
does not exist answers with the reason, which explain() prints and an explicit choice of the backend raises.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np
import torch

from gensparse.kernels.blocks import DenseRows, Work
from gensparse.kernels.halo import TileClass
from gensparse.kernels.partition import Windows
from gensparse.layout import Boxes, Coords, Grid, Ints
from gensparse.patterns.base import FULL, NONE, Rule
from gensparse.patterns.codes import combine
from gensparse.plan.search import fitting, shapes_of
from gensparse.plan.tiles import SegmentTiles, raster, slot_coords

HALO_SIZES = (32, 64, 128, 256)  # queries of a tile
QUERY_OVERHEAD = 24  # queries' worth of time that fetching one key costs
MASK_LIMIT = 64 << 20  # bytes of masks
WASTE_LIMIT = 4.0  # pairs in the key boxes per pair that the tile lists visit
WINDOW_SIZES = 32  # different sizes of windows

Run = tuple[int, int]


class NotLoweredError(Exception):
    """Why a rule has no such form."""


@dataclass(frozen=True)
class Surroundings:
    """What is simple about a rule: keys the target sees wholly, and rows of other segments that are dense."""

    shared: tuple[Run, ...]
    dense: tuple[DenseRows, ...]

    @property
    def shared_index(self) -> Ints:
        return np.concatenate([np.zeros(0, np.int64), *(np.arange(*run) for run in self.shared)])


def lower_halo(rule: Rule, group: int, visited: int) -> Work:
    """Tiles of the target with one box of keys each.

    Args:
        visited: token pairs that the tile lists of the plan visit.

    Raises:
        NotLoweredError: the reason why there is no such form, or why it would be slow.
    """
    around = _surroundings(rule, group)
    dense = _dense_target(rule, group, around)
    if dense is not None:
        return dense
    tiles = _halo_tiles(rule, group)
    lo, size = _key_boxes(rule, group, tiles)
    pairs = int((tiles.count.prod(axis=1) * size.prod(axis=1)).sum())
    if pairs > WASTE_LIMIT * max(visited, 1):
        raise NotLoweredError(
            f"its boxes of keys hold {pairs / max(visited, 1):.1f} times the pairs that its tile lists visit (at most "
            f"{WASTE_LIMIT:g}); use plan_loop."
        )
    return Work(_classes(rule, group, tiles, lo, size, around.shared_index), around.dense)


def lower_partition(rule: Rule, group: int) -> Work:
    """Windows of the target.

    Raises:
        NotLoweredError: the rule is no partition of the target, or the rest of the layout is not simple.
    """
    labels = rule.partition(rule.layout.target, group)
    if labels is None:
        raise NotLoweredError("the pattern does not cut the target into windows that see only themselves; use halo.")
    around = _surroundings(rule, group)
    dense = _dense_target(rule, group, around)
    if dense is not None:
        return dense
    start = rule.layout.starts[rule.layout.target]
    order = np.argsort(labels, kind="stable") + start
    sizes = np.unique(labels, return_counts=True)[1]
    distinct = np.unique(sizes)
    if len(distinct) > WINDOW_SIZES:
        raise NotLoweredError(
            f"its windows have {len(distinct)} different sizes (at most {WINDOW_SIZES}); use plan_loop."
        )
    edges = np.cumsum(sizes) - sizes
    shared = torch.from_numpy(around.shared_index)
    windows = [
        Windows(torch.from_numpy(order[edges[sizes == size][:, None] + np.arange(size)]), shared) for size in distinct
    ]
    return Work(windows, around.dense)


def _surroundings(rule: Rule, group: int) -> Surroundings:
    lengths = [segment.length for segment in rule.key_segments]
    starts = np.cumsum([0, *lengths]).tolist()
    runs = [(start, start + length) for start, length in zip(starts, lengths, strict=False)]
    target, own = rule.layout.target, len(rule.layout.segments)
    seen = [[runs[j] for j in _seen(rule, group, i)] for i in range(own)]
    dense = [DenseRows(runs[i], _merged(seen[i])) for i in range(own) if i != target and seen[i]]
    return Surroundings(tuple(_merged(seen[target])), tuple(dense))


def _seen(rule: Rule, group: int, segment: int) -> list[int]:
    """Key segments that `segment` sees wholly; target on target is left out."""
    own = _whole(rule, segment)
    found = []
    for other in range(len(rule.key_segments)):
        if segment == other == rule.layout.target:
            continue
        relation = rule.tile_relation(own, _whole(rule, other), group)
        if relation == FULL:
            found.append(other)
        elif relation != NONE:
            raise NotLoweredError(f"segment {segment} sees only a part of key segment {other}; use plan_loop.")
    return found


def _dense_target(rule: Rule, group: int, around: Surroundings) -> Work | None:
    """The form of a target that sees all of itself, or nothing of itself; None for all others."""
    whole = _whole(rule, rule.layout.target)
    relation = rule.tile_relation(whole, whole, group)
    if relation not in (FULL, NONE):
        return None
    start = rule.layout.starts[rule.layout.target]
    own = (start, start + rule.layout.segments[rule.layout.target].length)
    keys = _merged([*around.shared, own] if relation == FULL else around.shared)
    return Work((), [*around.dense, *([DenseRows(own, keys)] if keys else [])])


def _halo_tiles(rule: Rule, group: int) -> SegmentTiles:
    """The tiling of the target with the least counted cost."""
    target, grid, start = rule.layout.target, rule.layout.grid, rule.layout.starts[rule.layout.target]
    step = rule.tile_step(target)
    shapes = [shape for size in HALO_SIZES for shape in fitting(shapes_of(size), grid)]
    step = step if step == (1, 1, 1) or _keeps_residues(rule, group, step) else (1, 1, 1)
    cuts = (SegmentTiles.cut(target, start, grid, shape, step) for shape in dict.fromkeys(shapes))
    return min(cuts, key=lambda tiles: _cost(rule, group, tiles))


def _cost(rule: Rule, group: int, tiles: SegmentTiles) -> float:
    size = _key_boxes(rule, group, tiles)[1].prod(axis=1)
    return float((size * (tiles.count.prod(axis=1) + QUERY_OVERHEAD)).sum())


def _keeps_residues(rule: Rule, group: int, step: Grid) -> bool:
    """Whether no token sees another of a different residue (modulo `step`)."""
    grid, target = rule.layout.grid, rule.layout.target
    residues = np.array(list(product(*(range(min(s, n)) for s, n in zip(step, grid, strict=True)))))
    if len(residues) > 256:
        return False
    last = residues + (np.array(grid) - 1 - residues) // step * step
    number = np.full(len(residues), target)
    boxes = Boxes(number, residues, last + 1, np.array(step))
    q = Boxes(number[:, None], residues[:, None], last[:, None] + 1, np.array(step))
    relation = rule.tile_relation(q, boxes, group)
    return bool(np.all(relation[~np.eye(len(residues), dtype=bool)] == NONE))


def _key_boxes(rule: Rule, group: int, tiles: SegmentTiles) -> tuple[Ints, Ints]:
    """First key and number of keys per axis [n, 3] of every tile, keys in steps like the queries."""
    step = tiles.boxes.step
    lo, hi = rule.key_box(tiles.boxes, rule.layout.target, group)
    lo = lo + (tiles.boxes.lo - lo) % step
    size = np.maximum(hi - lo + step - 1, 0) // step
    return lo, np.where(size.min(axis=-1, keepdims=True) > 0, size, 0)


def _classes(rule: Rule, group: int, tiles: SegmentTiles, lo: Ints, size: Ints, shared: Ints) -> list[TileClass]:
    boxes = tiles.boxes
    keys = Boxes(boxes.segment, lo, np.maximum(lo + boxes.step * (size - 1) + 1, lo), boxes.step)
    some = size.min(axis=1) > 0
    columns = rule.signature(boxes, _non_empty(keys), group)
    if columns is None:
        columns = [np.arange(len(tiles))]
    code = combine([*tiles.count.T, *size.T, *(lo - boxes.lo).T, *columns])
    _, first, index = np.unique(code, return_index=True, return_inverse=True)
    _check_masks(tiles.count[first].prod(axis=1) * size[first].prod(axis=1))
    members = np.split(np.argsort(index.reshape(-1), kind="stable"), np.cumsum(np.bincount(index.reshape(-1)))[:-1])
    return [_tile_class(rule, group, tiles, lo, size, own, shared) for own in members if some[own[0]] or len(shared)]


def _tile_class(
    rule: Rule, group: int, tiles: SegmentTiles, lo: Ints, size: Ints, own: Ints, shared: Ints
) -> TileClass:
    """One class of tiles; the first of them stands for the mask."""
    grid, step, start = tiles.grid, tiles.boxes.step, tiles.start
    one = own[0]
    q_position = _box_positions(tiles.boxes.lo[one], tiles.count[one], step)
    k_position = _box_positions(lo[one], size[one], step)
    queries = Coords(np.full((len(q_position), 1), tiles.number), q_position[:, None])
    seen = rule.allowed(queries, Coords(np.full((1, len(k_position)), tiles.number), k_position[None]), group)
    q_index, k_index = raster(q_position, grid), raster(k_position, grid)
    used = seen.any(axis=0)  # a disc leaves the corners of its tile's box unseen: a tenth of all keys
    return TileClass(
        q_start=torch.from_numpy(start + raster(tiles.boxes.lo[own], grid)),
        q_offset=torch.from_numpy(q_index - q_index[0]),
        k_start=torch.from_numpy(start + raster(lo[own], grid)),
        k_offset=torch.from_numpy((k_index - k_index[0])[used] if len(k_index) else k_index),
        shared=torch.from_numpy(shared),
        mask=None if seen[:, used].all() else torch.from_numpy(seen[:, used]),
        hides=not len(shared) and not seen.any(axis=1).all(),
    )


def _box_positions(lo: Ints, count: Ints, step: Ints) -> Ints:
    """Positions [prod(count), 3] of the tokens of one box."""
    shape = tuple(int(n) for n in count)
    return slot_coords(lo[None], count[None], step, shape, prod(shape))[0][0]


def _non_empty(boxes: Boxes) -> Boxes:
    """Empty boxes as their first token, for arithmetic that needs one."""
    return boxes._replace(hi=np.maximum(boxes.hi, boxes.lo + 1))


def _check_masks(sizes: Iterable[int]) -> None:
    total = int(sum(sizes))
    if total > MASK_LIMIT:
        raise NotLoweredError(f"its tiles need {total >> 20} MiB of masks (at most {MASK_LIMIT >> 20}); use plan_loop.")


def _whole(rule: Rule, segment: int) -> Boxes:
    shape = np.array(rule.key_segments[segment].shape)
    return Boxes(np.int64(segment), np.zeros(3, np.int64), shape)


def _merged(runs: Sequence[Run]) -> list[Run]:
    """Runs of tokens in order, adjacent ones joined."""
    joined: list[Run] = []
    for start, stop in sorted(runs):
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined
