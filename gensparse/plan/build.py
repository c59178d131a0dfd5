"""Plans: a pattern on a layout as integer tensors, built once and shared.

The format is the one the GPU kernels read; lowered forms for the CPU backends are derived from the same rule on first
use.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from math import prod
from typing import Any, overload

import numpy as np
import torch

from gensparse.errors import ConfigError
from gensparse.kernels.blocks import Work
from gensparse.kernels.lists import Boxes, Pieces, TileLists, Turned
from gensparse.kernels.triton.tune import arch_of, uses
from gensparse.layout import Grid, Ints, Layout
from gensparse.patterns.base import RUNS, Data, Pattern, Rule, Source
from gensparse.patterns.linear import linear
from gensparse.patterns.routed import RoutedPattern
from gensparse.plan.lists import GroupLists, TilePairs, list_tiles
from gensparse.plan.lowering import NotLoweredError, lower_halo, lower_partition
from gensparse.plan.routed import ClusterPlan, RoutedPlan, build_routed
from gensparse.plan.schedule import box_lists, cut_pieces, turn, why_no_boxes
from gensparse.plan.search import tile_shapes
from gensparse.plan.tiles import SegmentTiles, cut_segments

logger = logging.getLogger("gensparse")

CACHED_PLANS = 32
Q_TILE, K_TILE = 128, 64

Tile = int | tuple[int, int, int] | None


@dataclass(frozen=True, eq=False)
class Plan:
    """Which key tiles every query tile visits. Immutable; get one from `build_plan`.

    Args:
        pattern, layout: what it was built from.
        lists: int32 tensors, see `gensparse.kernels.lists.TileLists`.
        order: int32 [n_qt], query tiles with the longest list first.
        q_tile, k_tile: shapes (F, H, W) of the tiles of the target.
        useful: allowed token pairs of every group.
        rule: the pattern bound to the layout.
        data: the arrays the pattern names.
        key_tiles: tiles of every segment of keys, in order.
        boxes: for GPU kernels that load key tiles by descriptor; None on the CPU, where the tables of the GPU ask for
            none, and where `boxes_refused` says why there are none.
        origin: the plan on the CPU that this one is a copy of, None there.
    """

    pattern: Pattern
    layout: Layout
    lists: TileLists
    order: torch.Tensor
    q_tile: Grid
    k_tile: Grid
    useful: tuple[int, ...]
    rule: Rule = field(repr=False)
    data: Data = field(default_factory=dict, repr=False)
    key_tiles: tuple[SegmentTiles, ...] = field(default=(), repr=False)
    boxes: Boxes | None = field(default=None, repr=False)
    origin: "Plan | None" = field(default=None, repr=False)

    @property
    def groups(self) -> int:
        """Patterns in the menu (PerHead), 1 for a plain pattern."""
        return self.rule.groups

    @property
    def sources(self) -> tuple[Source, ...]:
        """Extra keys after the layout's own tokens, in order."""
        return self.rule.sources

    @property
    def tokens(self) -> int:
        """Queries, which are also the keys before the sources."""
        return self.layout.tokens

    @property
    def keys(self) -> int:
        """Keys with all sources."""
        return sum(segment.length for segment in self.rule.key_segments)

    @cached_property
    def places(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(places, order), int64 [tokens] each, of an interleaved layout (see `Layout.ulysses`), None for a plain one.

        `x[:, places]` brings own tokens into segment order, `x[:, order]` brings them back.
        """
        places, order = self.layout.places(), self.layout.order()
        if places is None or order is None:
            return None
        return torch.from_numpy(places).to(self.device), torch.from_numpy(order).to(self.device)

    @cached_property
    def density(self) -> float:
        """Allowed pairs / (queries * keys), mean over the groups."""
        return sum(self.useful) / (len(self.useful) * self.tokens * self.keys)

    @cached_property
    def pieces(self) -> Pieces:
        """How GPU kernels divide the tile lists, on the device of the plan."""
        if self.origin is not None:
            return self.origin.pieces.to(self.device)
        return cut_pieces(self.lists.row_ptr, self.lists.mask_id)

    @cached_property
    def turned(self) -> Turned:
        """The tile lists seen from the key tiles, for gradients of keys."""
        return turn(self.lists) if self.origin is None else self.origin.turned.to(self.device)

    @cached_property
    def turned_pieces(self) -> Pieces:
        """How GPU kernels divide the turned lists."""
        if self.origin is not None:
            return self.origin.turned_pieces.to(self.device)
        return cut_pieces(self.turned.col_ptr, self.turned.mask_id)

    @property
    def boxes_refused(self) -> str | None:
        """Why key tiles of the target cannot be loaded as boxes, or None."""
        interleaved = self.layout.places() is not None
        tiles = self.key_tiles[self.layout.target]
        return why_no_boxes(tiles, self.lists.k_rows.shape[1], interleaved=interleaved)

    def with_boxes(self) -> "Plan":
        """The plan with `boxes`, itself where there are none."""
        if self.boxes is not None or self.boxes_refused is not None:
            return self
        source = self.origin or self
        boxes = box_lists(source.lists, source.pieces, source.key_tiles, self.layout.target).to(self.device)
        return replace(self, boxes=boxes)

    @property
    def device(self) -> torch.device:
        return self.lists.q_rows.device

    def halo(self) -> tuple[Work, ...] | None:
        """Per group, tiles with one box of keys each; None where there is no such form (see `refused`).

        Both lowered forms count tokens in segment order, see `places`.
        """
        return self._halo if isinstance(self._halo, tuple) else None

    def partition(self) -> tuple[Work, ...] | None:
        """Per group, windows that see only themselves; None where there is no such form (see `refused`)."""
        return self._partition if isinstance(self._partition, tuple) else None

    @cached_property
    def refused(self) -> dict[str, str]:
        """Lowered form -> why this plan has none."""
        forms = {"partition": self._partition, "halo": self._halo}
        return {name: form for name, form in forms.items() if isinstance(form, str)}

    @cached_property
    def dense_mask(self) -> torch.Tensor:
        """bool [G, Nq, Nk]; raises PlanTooLargeError above a limit."""
        return torch.from_numpy(self.rule.dense_mask()).to(self.device)

    def stats(self) -> dict[str, Any]:
        """What the plan costs.

        Returns:
            tokens; useful_pairs and visited_pairs (mean over groups; visited counts whole tiles); density = useful /
            (queries * keys with pooled ones); bytes of the tensors; q_tile, k_tile; flop_bound = all pairs / useful and
            tile_bound = all tile pairs / visited ones, the speed-ups over dense attention that counting allows.
        """
        lists = self.lists
        (n_qt, q_size), (n_kt, k_size) = lists.q_rows.shape, lists.k_rows.shape
        visited = len(lists.key_tile) / self.groups
        return {
            "tokens": self.tokens,
            "useful_pairs": sum(self.useful) / self.groups if self.groups > 1 else self.useful[0],
            "visited_pairs": int(visited * q_size * k_size),
            "density": self.density,
            "bytes": sum(x.numel() * x.element_size() for x in (*lists, self.order)),
            "q_tile": self.q_tile,
            "k_tile": self.k_tile,
            "flop_bound": 1 / self.density if self.density else float("inf"),
            "tile_bound": n_qt * n_kt / visited if visited else float("inf"),
        }

    def simulate(self, q_tile: Tile, k_tile: Tile) -> dict[str, Any]:
        """`stats()` of the same pattern with other tiles."""
        return build_plan(self.pattern, self.layout, data=self.data, q_tile=q_tile, k_tile=k_tile).stats()

    def to(self, device: torch.device | str) -> "Plan":
        """The plan on another device; plans moved lately are kept."""
        device = torch.device(device)
        return self if device == self.device else _moved(self, device)

    @cached_property
    def _halo(self) -> tuple[Work, ...] | str:
        lists = self.lists
        tile = lists.q_rows.shape[1] * lists.k_rows.shape[1]
        visited = (lists.row_ptr[:, -1] - lists.row_ptr[:, 0]).tolist()
        return self._lowered(lambda group: lower_halo(self.rule, group, visited[group] * tile))

    @cached_property
    def _partition(self) -> tuple[Work, ...] | str:
        return self._lowered(lambda group: lower_partition(self.rule, group))

    def _lowered(self, lower: Callable[[int], Work]) -> tuple[Work, ...] | str:
        try:
            return tuple(lower(group).to(self.device) for group in range(self.groups))
        except NotLoweredError as reason:
            return str(reason)


@overload
def build_plan(pattern: Pattern, layout: Layout, **settings: Any) -> Plan: ...


@overload
def build_plan(pattern: RoutedPattern, layout: Layout, **settings: Any) -> RoutedPlan | ClusterPlan: ...


def build_plan(
    pattern: Pattern | RoutedPattern,
    layout: Layout,
    *,
    data: Mapping[str, np.ndarray | torch.Tensor] | None = None,
    q_tile: Tile = None,
    k_tile: Tile = None,
    device: torch.device | str = "cpu",
) -> Plan | RoutedPlan | ClusterPlan:
    """The plan of a pattern on a layout, from a cache of the last `CACHED_PLANS`.

    Args:
        data: arrays that the pattern names (masks, groups); plans are told apart by their contents.
        q_tile, k_tile: tokens of a tile (a power of two from 32 to 256; the shape is then searched), or its shape
            (F, H, W) on the target. By default 128 queries and 64 keys.

    Patterns chosen at run time (`gensparse.patterns.routed`) give a `RoutedPlan` or `ClusterPlan`, whose tiles only
    have a size.

    Raises:
        ConfigError: a tile that is not allowed, or a setting of the pattern that does not fit the layout.
        PlanTooLargeError: the lists or masks pass their limits.
    """
    if isinstance(pattern, RoutedPattern):
        sizes = (("q_tile", q_tile, Q_TILE), ("k_tile", k_tile, K_TILE))
        slots = (None if size[1] is None else _tile_size(*size) for size in sizes)
        return build_routed(pattern, layout, *slots, device)
    arrays = {name: np.asarray(array) for name, array in (data or {}).items()}
    return _cached(_Request(pattern.key(), layout, _digest(arrays), q_tile, k_tile, str(device), pattern, arrays))


@dataclass(frozen=True)
class _Request:
    """What identifies a plan; patterns compare by their key."""

    key: str
    layout: Layout
    digest: str
    q_tile: Tile
    k_tile: Tile
    device: str
    pattern: Pattern = field(compare=False)
    data: Data = field(compare=False)


def _digest(data: Data) -> str:
    """Equal exactly for equal arrays under equal names; "" for none."""
    if not data:
        return ""
    state = hashlib.sha256()
    for name, array in sorted(data.items()):
        state.update(f"{name} {array.dtype} {array.shape} ".encode())
        state.update(np.ascontiguousarray(array).tobytes())
    return state.hexdigest()


@lru_cache(maxsize=CACHED_PLANS)
def _cached(request: _Request) -> Plan:
    if torch.device(request.device).type != "cpu":
        return _cached(replace(request, device="cpu")).to(request.device)
    q_size, k_size = _tile_size("q_tile", request.q_tile, Q_TILE), _tile_size("k_tile", request.k_tile, K_TILE)
    rule = request.pattern.bind(request.layout, request.data)
    listed = _natural(rule, request)
    step = listed.tile_step(listed.layout.target)
    q_shape, k_shape = _shapes(listed, request, q_size, k_size, step)
    pairs = TilePairs(
        cut_segments(listed.layout.segments, q_shape, q_size, step, listed.layout.target),
        cut_segments(listed.key_segments, k_shape, k_size, step, listed.layout.target),
        q_size,
        k_size,
    )
    groups = [list_tiles(listed, group, pairs) for group in range(listed.groups)]
    lists = _tensors(pairs, groups, rule.layout.places())
    longest = np.max([group.counts for group in groups], axis=0)
    order = torch.from_numpy(np.argsort(-longest, kind="stable").astype(np.int32))
    useful = tuple(group.useful for group in groups)
    settings = (request.pattern, request.layout, lists, order, q_shape, k_shape, useful, rule, request.data)
    return Plan(*settings, key_tiles=pairs.keys)


@lru_cache(maxsize=CACHED_PLANS)
def _moved(plan: Plan, device: torch.device) -> Plan:
    lists = TileLists(*(x.to(device) for x in plan.lists))
    moved = replace(plan, lists=lists, order=plan.order.to(device), origin=plan.origin or plan, boxes=None)
    if device.type == "cuda" and uses(arch_of(device), "boxes"):
        if moved.boxes_refused:
            logger.info("%s has key tiles that are loaded by rows; %s", plan.pattern.key(), moved.boxes_refused)
        moved = moved.with_boxes()
    if device.type == "cuda":  # made here, because compiled and captured calls cannot make them
        _ = moved.pieces, moved.turned, moved.turned_pieces
    return moved


def _natural(rule: Rule, request: _Request) -> Rule:
    """The rule as its tiles are cut: in runs of raster tokens where it asks for them and the request names no boxes."""
    boxes = isinstance(request.q_tile, tuple) or isinstance(request.k_tile, tuple)
    return rule if boxes or rule.tiles(rule.layout.target, K_TILE) != RUNS else linear(rule)


def _shapes(rule: Rule, request: _Request, q_size: int, k_size: int, step: Grid) -> tuple[Grid, Grid]:
    q_shape, k_shape = (tile if isinstance(tile, tuple) else None for tile in (request.q_tile, request.k_tile))
    if q_shape is not None and k_shape is not None:
        return q_shape, k_shape
    searched = tile_shapes(rule, q_size, k_size, step)
    return q_shape or searched[0], k_shape or searched[1]


def _tile_size(name: str, tile: Tile, default: int) -> int:
    """Slots of a tile: 32, 64, 128 or 256, enough for the shape where one is given."""
    if tile is None:
        return default
    if isinstance(tile, tuple) and len(tile) == 3 and all(type(n) is int and n > 0 for n in tile):
        slots = max(32, 1 << (prod(tile) - 1).bit_length())
    else:
        slots = tile
    if type(slots) is not int or slots not in (32, 64, 128, 256):
        raise ConfigError(
            f"build_plan {name}={tile!r} is not allowed; pass 32, 64, 128 or 256 tokens, or a shape (F, H, W) of at "
            "most 256."
        )
    return slots


def _tensors(pairs: TilePairs, groups: Sequence[GroupLists], places: Ints | None) -> TileLists:
    q_rows = _placed(np.concatenate([tiles.rows(pairs.q_size) for tiles in pairs.queries]), places)
    k_rows = _placed(np.concatenate([tiles.rows(pairs.k_size) for tiles in pairs.keys]), places)
    ends = np.cumsum([0, *(len(group.key_tile) for group in groups)])
    pointers = [np.cumsum([first, *group.counts]) for first, group in zip(ends, groups, strict=False)]
    masks, ids = _atlas(groups)
    words = np.ascontiguousarray(masks).view("<i4")
    columns = (q_rows, k_rows, np.stack(pointers), np.concatenate([group.key_tile for group in groups]), ids, words)
    return TileLists(*(torch.from_numpy(np.ascontiguousarray(x, np.int32)) for x in columns))


def _placed(rows: Ints, places: Ints | None) -> Ints:
    """Rows of own tokens as places of the sequence; empty slots (-1) and the keys of sources stay."""
    if places is None:
        return rows
    own = (rows >= 0) & (rows < len(places))
    return np.where(own, places[np.where(own, rows, 0)], rows)


def _atlas(groups: Sequence[GroupLists]) -> tuple[np.ndarray, np.ndarray]:
    """Masks of all groups, deduplicated, and the mask ids of all lists."""
    if len(groups) == 1:
        return groups[0].masks, groups[0].mask
    masks = np.concatenate([group.masks for group in groups])
    firsts = np.cumsum([0, *(len(group.masks) for group in groups)])
    ids = np.concatenate([np.where(g.mask < 0, -1, g.mask + first) for g, first in zip(groups, firsts, strict=False)])
    if not len(masks):
        return masks, ids
    rows = np.ascontiguousarray(masks.reshape(len(masks), -1))
    _, first, index = np.unique(rows.view(f"V{rows.shape[1]}").reshape(-1), return_index=True, return_inverse=True)
    return masks[first], np.where(ids < 0, -1, index.reshape(-1)[np.maximum(ids, 0)])
