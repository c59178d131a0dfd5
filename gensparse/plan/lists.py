"""Tile lists: which key tiles every query tile visits, and the bit masks of those it sees partly.

Nothing of size Nq x Nk is ever made: candidates come from the rule's key boxes, their relation from interval
arithmetic, and masks are evaluated once per kind of tile pair.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gensparse.errors import PlanTooLargeError
from gensparse.layout import Boxes, Coords, Ints
from gensparse.patterns.base import FULL, NONE, Rule
from gensparse.patterns.codes import combine
from gensparse.plan.tiles import SegmentTiles

ENTRY_LIMIT = 1 << 25  # listed tile pairs of a pattern of the menu
ENTRY_BYTES = 8  # a key tile and a mask number
ATLAS_LIMIT = 64 << 20  # bytes of bit masks
_CANDIDATES = 1 << 22  # tile pairs tested at once
_EVALUATIONS = 1 << 21  # token pairs evaluated at once

TileSets = tuple[SegmentTiles, ...]


@dataclass(frozen=True)
class GroupLists:
    """Tile lists of one pattern of the menu.

    Args:
        counts: [n_qt] listed tiles of every query tile.
        key_tile, mask: [nnz] key tile and row of `masks` (-1: full), full tiles first inside every query tile.
        masks: uint8 [n_masks, BM, BN // 8], bit j % 8 of byte j // 8, deduplicated.
        useful: allowed pairs of tokens.
    """

    counts: Ints
    key_tile: Ints
    mask: Ints
    masks: np.ndarray
    useful: int


@dataclass(frozen=True)
class TilePairs:
    """Both sides of a plan: tiles per segment and slots per tile."""

    queries: TileSets
    keys: TileSets
    q_size: int
    k_size: int

    @property
    def key_counts(self) -> Ints:
        """Tokens of every key tile."""
        return np.concatenate([tiles.count.prod(axis=1) for tiles in self.keys])

    @property
    def query_counts(self) -> Ints:
        """Tokens of every query tile."""
        return np.concatenate([tiles.count.prod(axis=1) for tiles in self.queries])


def list_tiles(rule: Rule, group: int, pairs: TilePairs) -> GroupLists:
    """Tile lists of one group.

    Raises:
        PlanTooLargeError: more than `ENTRY_LIMIT` entries or `ATLAS_LIMIT` bytes of masks.
    """
    q, k, relation = _related(rule, group, pairs)
    whole = pairs.key_counts == pairs.k_size
    partial = np.flatnonzero((relation != FULL) | ~whole[k])
    kind, masks = _masks(rule, group, pairs, q[partial], k[partial])
    mask = np.full(len(q), -1)
    mask[partial] = kind
    seen = np.unpackbits(masks, axis=-1).sum(axis=(1, 2), dtype=np.int64)
    allowed = pairs.query_counts[q] * pairs.k_size
    allowed[partial] = seen[kind]
    mask[partial[(allowed == pairs.query_counts[q] * pairs.k_size)[partial]]] = -1
    keep = np.flatnonzero(allowed)
    order = keep[np.lexsort((mask[keep] >= 0, q[keep]))]
    used, mask_of = np.unique(mask[order], return_inverse=True)
    hidden = int(len(used) > 0 and used[0] < 0)
    counts = np.bincount(q[order], minlength=len(pairs.query_counts))
    return GroupLists(counts, k[order], mask_of.reshape(-1) - hidden, masks[used[hidden:]], int(allowed.sum()))


def count_pairs(rule: Rule, group: int, pairs: TilePairs) -> int:
    """Number of related tile pairs."""
    return sum(len(found[0]) for found in _each_related(rule, group, pairs))


def _related(rule: Rule, group: int, pairs: TilePairs) -> tuple[Ints, Ints, np.ndarray]:
    """Query tile, key tile and relation of all related pairs, by query tile."""
    parts, total = [], 0
    for part in _each_related(rule, group, pairs):
        parts.append(part)
        total += len(part[0])
        if total > ENTRY_LIMIT:
            most = _most_pairs(rule, group, pairs)
            raise PlanTooLargeError(
                f"A plan of {len(pairs.query_counts)} x {len(pairs.key_counts)} tiles would list up to {most} tile "
                f"pairs ({most * ENTRY_BYTES >> 20} MiB), the limit is {ENTRY_LIMIT} "
                f"({ENTRY_LIMIT * ENTRY_BYTES >> 20} MiB); use larger tiles, a smaller picture or dense attention."
            )
    q, k, relation = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(q, kind="stable")
    return q[order], k[order], relation[order]


def _each_related(rule: Rule, group: int, pairs: TilePairs) -> Iterator[tuple[Ints, Ints, np.ndarray]]:
    q_first = 0
    for queries in pairs.queries:
        k_first = 0
        for keys in pairs.keys:
            for q, k in _candidates(rule, group, queries, keys):
                relation = rule.tile_relation(_take(queries, q), _take(keys, k), group)
                some = np.flatnonzero(relation != NONE)
                yield q[some] + q_first, k[some] + k_first, relation[some]
            k_first += len(keys)
        q_first += len(queries)


def _candidates(rule: Rule, group: int, queries: SegmentTiles, keys: SegmentTiles) -> Iterator[tuple[Ints, Ints]]:
    """Pairs of tiles of two segments whose keys meet the key box of the queries, some query tiles at a time."""
    lo, hi = (np.broadcast_to(edge, (len(queries), 3)) for edge in rule.key_box(queries.boxes, keys.number, group))
    step = max(1, _CANDIDATES // len(keys))
    for start in range(0, len(queries), step):
        part = slice(start, start + step)
        meets = [
            (axis.lo < hi[part, n, None]) & (axis.hi > lo[part, n, None]) & (hi > lo).all(axis=1)[part, None]
            for n, axis in enumerate(keys.axes)
        ]
        near = meets[0][:, :, None, None] & meets[1][:, None, :, None] & meets[2][:, None, None, :]
        q, k = np.nonzero(near.reshape(len(near), -1))
        yield q + start, k


def _most_pairs(rule: Rule, group: int, pairs: TilePairs) -> int:
    """Number of tile pairs inside the key boxes: what a plan lists at most."""
    total = 0
    for queries in pairs.queries:
        for keys in pairs.keys:
            lo, hi = (
                np.broadcast_to(edge, (len(queries), 3)) for edge in rule.key_box(queries.boxes, keys.number, group)
            )
            counts = np.where((hi > lo).all(axis=1), 1, 0)
            for n, axis in enumerate(keys.axes):
                starts, ends = np.sort(axis.lo), np.sort(axis.hi)
                counts = counts * (np.searchsorted(starts, hi[:, n]) - np.searchsorted(ends, lo[:, n], "right"))
            total += int(counts.sum())
    return total


def _take(tiles: SegmentTiles, index: Ints) -> Boxes:
    boxes = tiles.boxes
    return Boxes(boxes.segment[index], boxes.lo[index], boxes.hi[index], boxes.step)


def _masks(rule: Rule, group: int, pairs: TilePairs, q: Ints, k: Ints) -> tuple[Ints, np.ndarray]:
    """Row of the deduplicated bit masks for every pair of tiles, and the masks."""
    empty = np.zeros((0, pairs.q_size, pairs.k_size // 8), np.uint8)
    if not len(q):
        return np.zeros(0, np.int64), empty
    split = list(_by_segment(pairs, q, k))
    kinds = [_kinds(rule, group, queries, keys, q_own, k_own) for queries, keys, _, q_own, k_own in split]
    _check_atlas(sum(len(first) for first, _ in kinds), pairs)
    kind = np.zeros(len(q), np.int64)
    found = [empty]
    number = 0
    for (queries, keys, chosen, q_own, k_own), (first, index) in zip(split, kinds, strict=True):
        found.append(_evaluate(rule, group, queries, keys, pairs, q_own[first], k_own[first]))
        kind[chosen] = index + number
        number += len(first)
    masks = np.concatenate(found)
    rows = masks.reshape(len(masks), -1)
    _, first, index = np.unique(rows.view(f"V{rows.shape[1]}").reshape(-1), return_index=True, return_inverse=True)
    return index.reshape(-1)[kind], masks[first]


def _by_segment(pairs: TilePairs, q: Ints, k: Ints) -> Iterator[tuple[SegmentTiles, SegmentTiles, Ints, Ints, Ints]]:
    """Pairs split by segments: tiles of both, positions in the list, and tile numbers inside the segments."""
    q_edges, k_edges = (np.cumsum([0, *map(len, tiles)]) for tiles in (pairs.queries, pairs.keys))
    for i, queries in enumerate(pairs.queries):
        for j, keys in enumerate(pairs.keys):
            own = (q >= q_edges[i]) & (q < q_edges[i + 1]) & (k >= k_edges[j]) & (k < k_edges[j + 1])
            chosen = np.flatnonzero(own)
            if len(chosen):
                yield queries, keys, chosen, q[chosen] - q_edges[i], k[chosen] - k_edges[j]


def _kinds(rule: Rule, group: int, queries: SegmentTiles, keys: SegmentTiles, q: Ints, k: Ints) -> tuple[Ints, Ints]:
    """First pair of every kind that may have a mask of its own, and the kind of every pair."""
    columns = rule.signature(_take(queries, q), _take(keys, k), group)
    if columns is None:
        return np.arange(len(q)), np.arange(len(q))
    counts: Sequence[Ints] = [*queries.count[q].T, *keys.count[k].T]
    _, first, index = np.unique(combine([*counts, *columns]), return_index=True, return_inverse=True)
    return first, index.reshape(-1)


def _check_atlas(masks: int, pairs: TilePairs) -> None:
    size = masks * pairs.q_size * pairs.k_size // 8
    if size > ATLAS_LIMIT:
        raise PlanTooLargeError(
            f"The pattern needs {masks} tile masks of {pairs.q_size} x {pairs.k_size} bits ({size >> 20} MiB), the "
            f"limit is {ATLAS_LIMIT >> 20} MiB; use a more regular pattern or dense attention."
        )


def _evaluate(
    rule: Rule, group: int, queries: SegmentTiles, keys: SegmentTiles, pairs: TilePairs, q: Ints, k: Ints
) -> np.ndarray:
    """Bit masks [n, BM, BN // 8] of pairs of tiles."""
    step = max(1, _EVALUATIONS // (pairs.q_size * pairs.k_size))
    parts = []
    for start in range(0, len(q), step):
        part = slice(start, start + step)
        q_position, q_valid = queries.coords(q[part], pairs.q_size)
        k_position, k_valid = keys.coords(k[part], pairs.k_size)
        seen = rule.allowed(
            Coords(np.full_like(q_valid, queries.number, np.int64)[:, :, None], q_position[:, :, None]),
            Coords(np.full_like(k_valid, keys.number, np.int64)[:, None], k_position[:, None]),
            group,
        )
        parts.append(np.packbits(seen & q_valid[:, :, None] & k_valid[:, None], axis=-1, bitorder="little"))
    return np.concatenate(parts)
