"""Patterns whose keys are chosen at run time from the queries and keys themselves.

A routed pattern is a frozen value like every other, but what it shows depends on the tensors: `bind` gives the units
among which a call may choose (regions, blocks at a resolution), and a choice says which units each block of queries
sees. The tensor functions that choose are in `gensparse.kernels.route`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np

from gensparse.errors import ConfigError, PlanTooLargeError
from gensparse.layout import Grid, Ints, Layout
from gensparse.patterns.base import DENSE_MASK_LIMIT, Bools
from gensparse.patterns.checks import PerAxis, choice, per_axis, spread, whole_number, windows
from gensparse.patterns.curve import gilbert

LEVELS = (1, 2, 4, 8)  # tokens per key


class Chosen(Protocol):
    """Which units every block of queries sees: arrays or CPU tensors.

    index [B, H|1, query blocks, capacity] unit numbers, of which the first counts [B, H|1, query blocks] are used.
    """

    index: Any
    counts: Any


class ChosenClusters(Protocol):
    """Tokens of every cluster: q_index and k_index [B, H, clusters, size], arrays or CPU tensors."""

    q_index: Any
    k_index: Any


@dataclass(frozen=True, eq=False)
class Cut:
    """A routed pattern on a layout: what may be chosen. Tokens and keys are places of the sequence, -1 for none.

    Args:
        queries: [query blocks, most] tokens that share a choice.
        units: [U, most] keys of every unit; from `tokens` on they are pooled ones.
        shared: keys that every block of queries sees besides its choice.
        fixed: (queries, keys) of tokens for which nothing is chosen; every token is here or in `queries`.
        tokens: own tokens of the layout.
        order: [L] the tokens in the order in which runs of them are pooled.
        runs: tokens per pooled key of every pool, pools one after the other behind the own tokens.
        lengths: keys of every pool.
    """

    queries: Ints
    units: Ints
    shared: Ints
    fixed: tuple[tuple[Ints, Ints], ...]
    tokens: int
    order: Ints
    runs: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()

    @property
    def keys(self) -> int:
        """Own tokens and pooled keys."""
        return self.tokens + sum(self.lengths)


class RoutedPattern(ABC):
    """A frozen, hashable, printable description of how keys are chosen at run time."""

    def key(self) -> str:
        """A text that is equal exactly for equal patterns; plans are cached by it."""
        return repr(self)

    def clamped(self, grid: Grid) -> "RoutedPattern":
        """The same pattern with its blocks cut to what `grid` (F, H, W) can hold."""
        return self

    @abstractmethod
    def dense_mask(self, layout: Layout, chosen: Any) -> Bools:
        """The pairs that a choice allows, bool [B, H|1, Nq, Nk] with pooled keys after the own tokens; for tests.

        Raises:
            PlanTooLargeError: more than `DENSE_MASK_LIMIT` entries.
        """


class BlockPattern(RoutedPattern):
    """Routed patterns in which a block of queries chooses among units of keys, in one softmax."""

    @abstractmethod
    def cut(self, layout: Layout) -> Cut:
        """What may be chosen on a layout.

        Raises:
            ConfigError: a setting that does not fit the grid.
        """

    def dense_mask(self, layout: Layout, chosen: Chosen) -> Bools:
        cut = self.cut(layout)
        index, counts = np.asarray(chosen.index), np.asarray(chosen.counts)
        mask = _empty_mask((*index.shape[:2], cut.tokens, cut.keys))
        for number, queries in enumerate(cut.queries):
            rows = queries[queries >= 0]
            for one in np.ndindex(index.shape[:2]):
                units = index[one][number][: counts[one][number]]
                keys = cut.units[units]
                seen = np.concatenate([keys[keys >= 0], cut.shared])
                mask[one][np.ix_(rows, seen)] = True
        for rows, keys in cut.fixed:
            mask[:, :, rows[:, None], keys] = True
        return mask


@dataclass(frozen=True)
class TopRegions(BlockPattern):
    """Tokens of a region see all tokens of the regions that suit it best (BiFormer, Zhu et al. 2303.08810).

    Regions are ranked by the product of mean query and mean key. Text and registers are seen by all and see all own
    tokens. Without the trained depth-wise branch of the paper; the scale of the call is used.

    Args:
        regions: regions per axis of the target, one value (every axis longer than one token) or (H, W) or (F, H, W).
            Axes that they do not divide are cut into parts that differ by one token.
        top: regions seen by each region.
        own: always see the own region, as one of `top` (the paper does not; a pretrained model needs it).
        per_head: every head chooses for itself instead of all together.

    Raises:
        ConfigError: values of the wrong type or range, or (when bound) more regions than tokens on an axis, or more
            seen regions than there are.
    """

    regions: PerAxis = 7
    top: int = 4
    own: bool = True
    per_head: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "regions", per_axis("TopRegions regions", self.regions, unit="regions"))
        object.__setattr__(self, "top", whole_number("TopRegions top", self.top, unit="regions"))
        choice("TopRegions own", self.own, (False, True))
        choice("TopRegions per_head", self.per_head, (False, True))

    def cut(self, layout: Layout) -> Cut:
        parts = windows("TopRegions regions", self.regions, layout.grid)
        if self.top > prod(parts):
            raise ConfigError(
                f"TopRegions top={self.top} is more than the {prod(parts)} regions of grid {layout.grid}; pass at most "
                "that many."
            )
        labels = np.zeros((1, 1, 1), np.int64)
        for number, (length, count) in enumerate(zip(layout.grid, parts, strict=True)):
            shape = [1, 1, 1]
            shape[number] = length
            labels = labels * count + (np.arange(length) * count // length).reshape(shape)
        place = _places(layout)
        target = _segment(layout, layout.target)
        regions = _grouped(labels.reshape(-1), place[target])
        word = [s.kind in ("text", "register") for s in layout.segments]
        words = _joined(layout, place, [i for i, is_word in enumerate(word) if is_word])
        own = _joined(layout, place, [i for i, s in enumerate(layout.segments) if s.kind != "pad"])
        fixed = [
            (place[_segment(layout, i)], own if word[i] else words if s.kind != "pad" else words[:0])
            for i, s in enumerate(layout.segments)
            if i != layout.target
        ]
        return Cut(regions, regions, words, tuple(fixed), layout.tokens, place[target])

    def clamped(self, grid: Grid) -> "TopRegions":
        regions = tuple(map(min, spread("TopRegions regions", self.regions, grid), grid))
        return TopRegions(regions, min(self.top, prod(regions)), self.own, self.per_head)


@dataclass(frozen=True)
class PyramidBlocks(BlockPattern):
    """Blocks of keys at full, 2, 4 or 8 times coarser resolution, or left out (PSA, Li et al. 2512.04025).

    The sequence is cut into blocks; the more a block of queries needs a block of keys, judged from a sample, the finer
    it sees it. All resolutions are keys of one softmax: means of runs of tokens with the logarithm of their number.

    Args:
        block: tokens per key block, a multiple of `tile` and of 8.
        query_block: tokens per query block, from 1.
        ends: where levels 1, 2, 4 and 8 end, rising shares from 0 to 1: of the key blocks (mode "topk") or of all
            importance ("threshold"). Blocks beyond are left out.
        mode: "topk" or "threshold".
        caps: None, or how similar neighbours must be to be averaged at level 2, 4 and 8 (the authors: .7, .65, .6).
        order: "gilbert" runs along a space-filling curve through the target, other tokens follow it; "sequence" keeps
            the order of the sequence.
        pad: "mean" averages the tokens that exist and adds ln(their number); "replicate" fills the last block with its
            last token, as the authors do, and adds ln(level).
        tile: a segment of a level is rounded to whole tiles of this many pooled keys (part of the method).

    Blocks that hold text or registers are seen at level 1 by all, wherever they are (the authors protect the last ones
    even when text comes first). A query block without any key sees its best block at level 1. Padding neither sees nor
    is seen. Sampled offsets come from (seed, layer, step) and no global generator.

    Raises:
        ConfigError: values of the wrong type or range.
    """

    block: int = 64
    query_block: int = 128
    ends: tuple[float, float, float, float] = (0.1, 0.15, 0.15, 0.35)
    mode: str = "topk"
    caps: tuple[float, float, float] | None = None
    order: str = "gilbert"
    pad: str = "mean"
    tile: int = 32

    def __post_init__(self) -> None:
        for name in ("block", "query_block", "tile"):
            object.__setattr__(self, name, whole_number(f"PyramidBlocks {name}", getattr(self, name), unit="tokens"))
        if self.block % self.tile or self.block % LEVELS[-1]:
            raise ConfigError(
                f"PyramidBlocks block={self.block} is not allowed; pass a multiple of tile={self.tile} and of "
                f"{LEVELS[-1]}."
            )
        ends = _numbers("PyramidBlocks ends", self.ends, len(LEVELS))
        if any(b < a for a, b in zip((0.0, *ends), (*ends, 1.0), strict=True)):
            raise ConfigError(f"PyramidBlocks ends={self.ends!r} is not allowed; pass rising shares from 0 to 1.")
        object.__setattr__(self, "ends", ends)
        choice("PyramidBlocks mode", self.mode, ("topk", "threshold"))
        if self.caps is not None:
            object.__setattr__(self, "caps", _numbers("PyramidBlocks caps", self.caps, len(LEVELS) - 1))
        choice("PyramidBlocks order", self.order, ("gilbert", "sequence"))
        choice("PyramidBlocks pad", self.pad, ("mean", "replicate"))

    @property
    def align(self) -> tuple[int, ...]:
        """Blocks of each level that fill a tile."""
        return tuple(-(-level // (self.block // self.tile)) for level in LEVELS)

    def cut(self, layout: Layout) -> Cut:
        order, padding = self._order(layout)
        blocks = -(-len(order) // self.block)
        filled = blocks * self.block
        units, lengths, first = [_table(order, self.block)], [], layout.tokens
        for level in LEVELS[1:]:
            length = filled // level if self.pad == "replicate" else -(-len(order) // level)
            units.append(_table(first + np.arange(length), self.block // level))
            lengths.append(length)
            first += length
        width = self.block
        table = [np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=-1) for x in units]
        none = np.zeros(0, np.int64)
        fixed = ((padding, none),) if len(padding) else ()
        queries = _table(order, self.query_block)
        units = np.concatenate(table)
        return Cut(queries, units, none, fixed, layout.tokens, order, LEVELS[1:], tuple(lengths))

    def exact_blocks(self, layout: Layout) -> Bools:
        """Key blocks [nk] that hold text or registers."""
        word = np.zeros(layout.tokens, np.bool_)
        words = [i for i, s in enumerate(layout.segments) if s.kind in ("text", "register")]
        word[_joined(layout, _places(layout), words)] = True
        table = _table(self._order(layout)[0], self.block)
        return np.any(word[table] & (table >= 0), axis=1)

    def _order(self, layout: Layout) -> tuple[Ints, Ints]:
        """Places of the tokens in the order of the blocks, and those of padding."""
        place = _places(layout)
        pads = [i for i, s in enumerate(layout.segments) if s.kind == "pad"]
        others = [i for i, s in enumerate(layout.segments) if s.kind not in ("pad", "target")]
        if self.order == "gilbert":
            curve = place[_segment(layout, layout.target)][gilbert(layout.grid)]
            return np.concatenate([curve, _joined(layout, place, others)]), _joined(layout, place, pads)
        return np.sort(_joined(layout, place, [*others, layout.target])), _joined(layout, place, pads)


@dataclass(frozen=True)
class Clusters(RoutedPattern):
    """Softmax inside clusters of similar tokens (Routing Transformer, Roy et al. 2003.05997); kept for the record.

    Every centroid takes its `size` most similar queries and its `size` most similar keys; a token's outputs over its
    clusters are averaged, and a token in no cluster gives 0. On random tokens a third are in none: for a pretrained
    model use other patterns.

    Args:
        clusters: centroids per head.
        size: queries, and keys, per cluster.
        eps: added to the number of clusters of a token before the division (1e-5 in the public code).

    Raises:
        ConfigError: values of the wrong type or range, or (when bound) more tokens per cluster than there are.
    """

    clusters: int
    size: int
    eps: float = 1e-5

    def __post_init__(self) -> None:
        object.__setattr__(self, "clusters", whole_number("Clusters clusters", self.clusters))
        object.__setattr__(self, "size", whole_number("Clusters size", self.size, unit="tokens"))
        if not isinstance(self.eps, int | float) or isinstance(self.eps, bool) or not 0 <= self.eps < 1:
            raise ConfigError(f"Clusters eps={self.eps!r} is not allowed; pass a number from 0, below 1.")

    def check(self, layout: Layout) -> None:
        """ConfigError when the layout holds padding, or fewer tokens than a cluster or than there are centroids."""
        if any(segment.kind == "pad" for segment in layout.segments):
            raise ConfigError("Clusters cannot leave padding out; pass a layout without it.")
        if max(self.size, self.clusters) > layout.tokens:
            raise ConfigError(
                f"Clusters clusters={self.clusters}, size={self.size} is more than the {layout.tokens} tokens of the "
                "layout; pass at most that many."
            )

    def clamped(self, grid: Grid) -> "Clusters":
        return Clusters(min(self.clusters, prod(grid)), min(self.size, prod(grid)), self.eps)

    def dense_mask(self, layout: Layout, chosen: ChosenClusters) -> Bools:
        """Pairs that share a cluster. The output is a mean over clusters, not one softmax over these pairs."""
        self.check(layout)
        q_index, k_index = np.asarray(chosen.q_index), np.asarray(chosen.k_index)
        mask = _empty_mask((*q_index.shape[:2], layout.tokens, layout.tokens))
        for one in np.ndindex(q_index.shape[:3]):
            mask[one[:2]][np.ix_(q_index[one], k_index[one])] = True
        return mask


def _places(layout: Layout) -> Ints:
    """Place in the sequence of every token in segment order."""
    places = layout.places()
    return np.arange(layout.tokens) if places is None else places


def _segment(layout: Layout, number: int) -> slice:
    return slice(layout.starts[number], layout.starts[number] + layout.segments[number].length)


def _joined(layout: Layout, place: Ints, numbers: Sequence[int]) -> Ints:
    return np.concatenate([np.zeros(0, np.int64), *(place[_segment(layout, number)] for number in numbers)])


def _grouped(labels: Ints, values: Ints) -> Ints:
    """Values [n] by label as [labels, most], filled up with -1."""
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    column = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.full((len(counts), counts.max()), -1, np.int64)
    table[labels[order], column] = values[order]
    return table


def _table(values: Ints, width: int) -> Ints:
    """Values in rows of `width`, the last one filled up with -1."""
    return np.pad(values, (0, -len(values) % width), constant_values=-1).reshape(-1, width)


def _empty_mask(shape: tuple[int, ...]) -> Bools:
    if prod(shape) > DENSE_MASK_LIMIT:
        raise PlanTooLargeError(
            f"A dense mask of shape {shape} is over the limit of {DENSE_MASK_LIMIT} entries; use build_plan for it."
        )
    return np.zeros(shape, np.bool_)


def _numbers(what: str, value: Any, count: int) -> tuple[float, ...]:
    entries = tuple(value) if isinstance(value, list | tuple) else ()
    plain = all(isinstance(entry, int | float) and not isinstance(entry, bool) for entry in entries)
    if len(entries) != count or not plain:
        raise ConfigError(f"{what}={value!r} is not allowed; pass {count} numbers.")
    return tuple(map(float, entries))
