"""Plans of patterns whose keys are chosen at run time: static tables, the choice, and its tile lists.

A call runs select (which units does every block of queries see), extend (pooled keys appended), lower (tile lists, one
per batch entry and head) and one attention kernel. Shapes depend on the plan alone and nothing waits for the device.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gensparse.errors import ConfigError
from gensparse.kernels import route
from gensparse.kernels.lists import Pieces, TileLists
from gensparse.kernels.pool import pool_runs
from gensparse.kernels.route import Choice, Clustering, Units
from gensparse.layout import Ints, Layout
from gensparse.patterns.routed import BlockPattern, Clusters, Cut, PyramidBlocks, RoutedPattern, TopRegions

CACHED_PLANS = 16
LIST_BYTES = 1 << 28  # tile lists that are made at once, 256 MiB (one key head at least)

_REFUSED: Mapping[str, str] = {
    "partition": "the keys are chosen at run time; use plan_loop.",
    "halo": "the keys are chosen at run time; use plan_loop.",
}


@dataclass(frozen=True, eq=False)
class RouteContext:
    """What a choice may depend on besides the queries and keys.

    Args:
        seed, layer, step: numbers that sampled offsets are drawn from; equal ones give equal choices.
        first_head: number of the first head of the call in the model, where heads are split over devices.
        centroids: [H, clusters, D] or [B, H, clusters, D] for `Clusters`; fitted to the call's tokens when None.
    """

    seed: int = 0
    layer: int = 0
    step: int = 0
    first_head: int = 0
    centroids: Tensor | None = None

    @property
    def numbers(self) -> tuple[int, int, int]:
        return self.seed, self.layer, self.step


class _RunTimePlan:
    """What calls ask of every plan, for those whose lists do not exist yet."""

    pattern: RoutedPattern
    layout: Layout
    groups = 1
    sources = ()
    boxes = None  # keys of chosen units lie anywhere
    refused: Mapping[str, str] = _REFUSED

    @cached_property
    def tokens(self) -> int:
        """Queries, which are also the keys before the pooled ones."""
        return self.layout.tokens


@dataclass(frozen=True, eq=False)
class RoutedPlan(_RunTimePlan):
    """A plan whose blocks of queries choose among units of keys; get one from `build_plan`.

    Args:
        pattern, layout: what it was built from.
        cut: what may be chosen, in numpy.
        units: the same as tables for kernels.
        order: int64 [L], the tokens in the order of the blocks.
        unit_rows: int64 [U, most] tokens of every unit of own tokens, -1 for none (regions).
        exact: bool [key blocks] that must be seen at full resolution, or None.
    """

    pattern: BlockPattern
    layout: Layout
    cut: Cut = field(repr=False)
    units: Units = field(repr=False)
    order: Tensor = field(repr=False)
    unit_rows: Tensor = field(repr=False)
    exact: Tensor | None = field(repr=False, default=None)

    @property
    def device(self) -> torch.device:
        return self.order.device

    @cached_property
    def keys(self) -> int:
        """Own tokens and pooled keys."""
        return self.cut.keys

    @cached_property
    def capacity(self) -> int:
        """Units that a block of queries may choose at most."""
        pattern = self.pattern
        if isinstance(pattern, TopRegions):
            return pattern.top
        assert isinstance(pattern, PyramidBlocks)
        blocks = -(-len(self.order) // pattern.block)
        if pattern.mode != "topk" or self.exact is None:
            return blocks
        chosen = route.topk_ends(blocks, pattern.ends, pattern.align)[-1]
        return max(1, min(blocks, chosen + int(self.cut_exact.sum())))

    @cached_property
    def cut_exact(self) -> np.ndarray:
        """`exact` in numpy."""
        assert isinstance(self.pattern, PyramidBlocks)
        return self.pattern.exact_blocks(self.layout)

    @cached_property
    def density(self) -> float:
        """The most that a choice can use of all pairs of own tokens, at most 1; `stats(choice)` says what it does."""
        size = int((self.cut.units >= 0).sum(axis=1).max(initial=0))
        return min(1.0, (self.capacity * size + len(self.cut.shared)) / self.tokens)

    def select(self, q: Tensor, k: Tensor, ctx: RouteContext | None = None) -> Choice:
        """Units for every block of queries of q, k [B, S, H, D]; no gradient flows through it."""
        ctx = ctx or RouteContext()
        pattern = self.pattern
        with torch.no_grad():
            if isinstance(pattern, TopRegions):
                scores = route.region_scores(q, k, self.unit_rows, pattern.per_head)
                return route.top_regions(scores, pattern.top, pattern.own)
            return route.pack_levels(self.levels(q, k, ctx), self.capacity)

    def levels(self, q: Tensor, k: Tensor, ctx: RouteContext) -> Tensor:
        """Level of every key block for every query block, int32 [B, H, query blocks, key blocks] (PyramidBlocks)."""
        pattern = self._pyramid()
        batch, _, heads, _ = q.shape
        sizes = (pattern.query_block, pattern.block)
        rows = route.head_rows(batch, heads, ctx.first_head, q.device)
        offsets = tuple(
            route.draw(rows, size, max(1, size // 4), (*ctx.numbers, side)).view(batch, heads, -1)
            for side, size in enumerate(sizes)
        )
        with torch.no_grad():
            importance = route.block_importance(q, k, self.order, sizes, offsets)
            levels = route.pyramid_levels(importance, pattern.ends, pattern.mode, pattern.align)
            caps = None
            if pattern.caps is not None:
                caps = route.similarity_caps(k, self.order, pattern.block, pattern.caps)
                caps = caps.repeat_interleave(heads // k.shape[2], dim=1)
            return route.settle_levels(levels, importance, caps, self.exact)

    def choice(self, levels: Tensor) -> Choice:
        """The choice that given levels [B, H|1, query blocks, key blocks] stand for (PyramidBlocks)."""
        self._pyramid()
        return route.pack_levels(levels, levels.shape[-1])

    def extend(self, k: Tensor, v: Tensor, key_bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """k, v [B, S, Hk, D] and key_bias [B|1, H|1, S] with the pooled keys of all levels appended.

        A key bias weights the tokens of a run: hidden ones (-inf) are not averaged.

        Raises:
            ConfigError: a key bias per head when there are fewer key heads.
        """
        if not self.cut.runs:
            return k, v, key_bias
        pattern = self._pyramid()
        if key_bias is not None and key_bias.shape[1] not in (1, k.shape[2]):
            raise ConfigError(
                f"key_bias for {key_bias.shape[1]} heads cannot weight the pooled keys of {k.shape[2]} key heads; pass "
                "one for all heads."
            )
        keys, values, biases = [k], [v], [self._no_bias(k) if key_bias is None else key_bias]
        for run, length in zip(self.cut.runs, self.cut.lengths, strict=True):
            options = {"total": run * length} if pattern.pad == "replicate" else {}
            if key_bias is not None:
                own = key_bias[..., self.order]
                if options:
                    own = torch.cat([own, own[..., -1:].expand(*own.shape[:-1], run * length - own.shape[-1])], -1)
                weights, bias = _run_weights(own, run)
                biases.append(bias)
            else:
                weights = None
                biases.append(self._run_bias(run, length, k))
            for column, x in ((keys, k), (values, v)):
                column.append(pool_runs(x, self.order, run, weights=weights, **options))
        return torch.cat(keys, 1), torch.cat(values, 1), torch.cat(biases, -1)

    def lower(self, choice: Choice) -> "ChosenPlan":
        """The tile lists of a choice."""
        return ChosenPlan(self, choice, route.tile_lists(self.units, *(x.flatten(0, 1) for x in choice)))

    def heads_per_step(self, batch: int, key_heads: int, heads: int, choice: Choice) -> int:
        """Key heads whose lists fit `LIST_BYTES`; all of them where heads share a choice."""
        if choice.index.shape[1] == 1:
            return key_heads
        each = batch * (heads // key_heads) * self.units.bytes_per_group(choice.index.shape[-1])
        return max(1, min(key_heads, LIST_BYTES // max(1, each)))

    def dense_mask(self, choice: Choice) -> Tensor:
        """The pairs a choice allows, bool [B, H|1, Nq, Nk] with pooled keys; raises PlanTooLargeError above a limit."""
        chosen = Choice(*(x.cpu() for x in choice))
        return torch.from_numpy(self.pattern.dense_mask(self.layout, chosen)).to(choice.index.device)

    def stats(self, choice: Choice) -> dict[str, Any]:
        """What a choice costs; it waits for the device.

        Returns:
            tokens; useful_pairs and visited_pairs (means over batch and heads; visited counts whole tiles); density =
            useful pairs / pairs of own tokens, 1 for dense attention; flop_bound = 1 / density and tile_bound = all
            pairs / visited ones, the speed-ups over dense attention that counting allows.
        """
        index, counts = (x.flatten(0, 1).cpu().numpy() for x in choice)
        live = np.arange(index.shape[-1]) < counts[..., None]
        size = (self.cut.units >= 0).sum(axis=1)
        seen = np.where(live, size[np.where(live, index, 0)], 0).sum(axis=-1) + len(self.cut.shared)
        queries = (self.cut.queries >= 0).sum(axis=1)
        useful = (seen * queries).sum() / len(index) + sum(len(q) * len(k) for q, k in self.cut.fixed)
        lists = self.lower(choice).lists
        tiles = int((lists.row_ptr[-1, -1] - lists.row_ptr[0, 0]).item()) / len(index)
        visited = tiles * lists.q_rows.shape[1] * lists.k_rows.shape[1]
        return {
            "tokens": self.tokens,
            "useful_pairs": float(useful),
            "visited_pairs": float(visited),
            "density": float(useful) / self.tokens**2,
            "flop_bound": self.tokens**2 / float(useful) if useful else float("inf"),
            "tile_bound": self.tokens**2 / visited if visited else float("inf"),
        }

    def to(self, device: torch.device | str) -> "RoutedPlan":
        """The plan on another device; plans moved lately are kept."""
        device = torch.device(device)
        return self if device == self.device else _moved(self, device)

    def _pyramid(self) -> PyramidBlocks:
        if not isinstance(self.pattern, PyramidBlocks):
            raise ConfigError(f"{self.pattern!r} has no levels; build the plan from PyramidBlocks.")
        return self.pattern

    def _no_bias(self, k: Tensor) -> Tensor:
        return torch.zeros(1, 1, self.tokens, device=k.device, dtype=torch.promote_types(k.dtype, torch.float32))

    def _run_bias(self, run: int, length: int, k: Tensor) -> Tensor:
        """ln(tokens of every run) [1, 1, length]; replicated tokens count."""
        count = torch.full((length,), run, device=k.device)
        if self._pyramid().pad == "mean":
            count = (len(self.order) - run * torch.arange(length, device=k.device)).clamp_max(run)
        return count.to(torch.promote_types(k.dtype, torch.float32)).log()[None, None]


@dataclass(frozen=True, eq=False)
class ChosenPlan(_RunTimePlan):
    """A routed plan with one choice: what a backend reads. Groups are batch entries and heads that share a list.

    Args:
        plan, choice: what it was made from.
        lists: tile lists with G = B * H (or B where heads share a choice).
    """

    plan: RoutedPlan
    choice: Choice = field(repr=False)
    lists: TileLists = field(repr=False)

    @property
    def pattern(self) -> RoutedPattern:
        return self.plan.pattern

    @property
    def layout(self) -> Layout:
        return self.plan.layout

    @property
    def group_index(self) -> Tensor:
        """Which list every batch entry and head reads, int64 [B, H|1]."""
        batch, heads = self.choice.index.shape[:2]
        return torch.arange(batch * heads, device=self.choice.index.device).view(batch, heads)

    @property
    def dense_mask(self) -> Tensor:
        """bool [G, Nq, Nk]; raises PlanTooLargeError above a limit."""
        return self.plan.dense_mask(self.choice).flatten(0, 1)

    @property
    def places(self) -> None:
        """Tables hold places of the sequence already."""
        return

    @property
    def pieces(self) -> Pieces:
        """How GPU kernels divide the lists: one piece per list, fixed ones (text) first, made on the device."""
        units, row_ptr = self.plan.units, self.lists.row_ptr
        n_qt, chosen = len(units.q_rows), len(units.tile_block)
        tiles = torch.arange(n_qt, dtype=torch.int32, device=row_ptr.device).roll(n_qt - chosen)
        first, end = row_ptr[:, tiles.long()], row_ptr[:, tiles.long() + 1]
        if not len(self.lists.mask_id):
            middle = end
        else:
            # a partial tile is the last one of its list
            last = self.lists.mask_id[(end - 1).clamp_min(0).long()]
            middle = torch.where((end > first) & (last >= 0), end - 1, end)
        columns = (tiles.expand_as(first), first, middle, end, torch.full_like(first, -1))
        pieces = torch.stack(columns, -1).int().contiguous()
        return Pieces(pieces, pieces.new_zeros(len(row_ptr), 0, 3), 0)


@dataclass(frozen=True, eq=False)
class ClusterPlan(_RunTimePlan):
    """A plan of `Clusters`: gathered clusters attend inside, and a token's outputs are averaged.

    Args:
        pattern, layout: what it was built from.
    """

    pattern: Clusters
    layout: Layout

    @property
    def keys(self) -> int:
        return self.tokens

    @property
    def density(self) -> float:
        """Pairs of tokens inside clusters / all pairs."""
        return min(1.0, self.pattern.clusters * self.pattern.size**2 / self.tokens**2)

    def select(self, q: Tensor, k: Tensor, ctx: RouteContext | None = None) -> Clustering:
        """Tokens of every cluster of q, k [B, S, H, D] alike; no gradient flows through it."""
        ctx = ctx or RouteContext()
        pattern = self.pattern
        with torch.no_grad():
            means = ctx.centroids
            if means is None:
                means = route.fit_centroids(torch.cat([q, k], 1), pattern.clusters, ctx.numbers, ctx.first_head)
            expected = (q.shape[2], pattern.clusters, q.shape[3])
            if means.shape[-3:] != expected:
                raise ConfigError(f"centroids have shape {tuple(means.shape)}; pass [H, clusters, D] = {expected}.")
            return route.cluster_tokens(q, k, means, pattern.size)

    def dense_mask(self, choice: Clustering) -> Tensor:
        """Pairs that share a cluster, bool [B, H, Nq, Nk]; raises PlanTooLargeError above a limit."""
        chosen = Clustering(*(x.cpu() for x in choice))
        return torch.from_numpy(self.pattern.dense_mask(self.layout, chosen)).to(choice.q_index.device)

    def to(self, device: torch.device | str) -> "ClusterPlan":
        """The plan itself: it holds no tensors."""
        return self


def build_routed(
    pattern: RoutedPattern, layout: Layout, q_tile: int | None, k_tile: int | None, device: torch.device | str
) -> RoutedPlan | ClusterPlan:
    """The plan of a routed pattern, from a cache of the last `CACHED_PLANS`.

    Args:
        q_tile, k_tile: slots of a tile, 32, 64, 128 or 256; by default what fits the pattern's blocks.
    """
    return _cached(pattern, layout, q_tile, k_tile).to(device)


@lru_cache(maxsize=CACHED_PLANS)
def _cached(pattern: RoutedPattern, layout: Layout, q_tile: int | None, k_tile: int | None) -> RoutedPlan | ClusterPlan:
    if isinstance(pattern, Clusters):
        pattern.check(layout)
        return ClusterPlan(pattern, layout)
    assert isinstance(pattern, BlockPattern)
    cut = pattern.cut(layout)
    order = torch.from_numpy(np.array(cut.order))
    if isinstance(pattern, PyramidBlocks):
        blocks = pattern.exact_blocks(layout)
        exact = torch.from_numpy(blocks)
        k_size = k_tile or (64 if pattern.block % 64 == 0 else 32)
    else:
        exact = None
        k_size = k_tile or 64
    most = cut.queries.shape[1]
    q_size = q_tile or next(size for size in (32, 64, 128) if size >= most or size == 128)
    units = _units(cut, q_size, k_size)
    return RoutedPlan(pattern, layout, cut, units, order, torch.from_numpy(cut.units), exact)


@lru_cache(maxsize=CACHED_PLANS)
def _moved(plan: RoutedPlan, device: torch.device) -> RoutedPlan:
    tensors = {"units": plan.units.to(device), "order": plan.order.to(device), "unit_rows": plan.unit_rows.to(device)}
    exact = None if plan.exact is None else plan.exact.to(device)
    return replace(plan, **tensors, exact=exact)


def _units(cut: Cut, q_size: int, k_size: int) -> Units:
    """The tables of `route.Units` of a cut."""
    sets = [row[row >= 0] for row in cut.units]
    always = np.zeros(0, np.int64)
    if len(cut.shared):
        always = np.array([len(sets)])
        sets.append(cut.shared)
    k_rows, first, full = [], [], []
    rest_rows = np.full((len(sets), k_size), -1, np.int64)
    for number, keys in enumerate(sets):
        whole = len(keys) // k_size
        first.append(len(k_rows))
        full.append(whole)
        k_rows += list(keys[: whole * k_size].reshape(whole, k_size))
        rest_rows[number, : len(keys) - whole * k_size] = keys[whole * k_size :]
    rest = (rest_rows >= 0).sum(axis=1)
    q_rows, block = _query_tiles(cut.queries, q_size)
    pointer, entries, masks = [0], [], []
    for queries, keys in cut.fixed:
        tiles = _tiles(keys, k_size)
        listed = np.arange(len(k_rows), len(k_rows) + len(tiles))
        k_rows += list(tiles)
        for rows in _tiles(queries, q_size):
            q_rows.append(rows)
            entries += listed.tolist()
            masks += [-1 if tile[-1] >= 0 else int((tile >= 0).sum()) - 1 for tile in tiles]
            pointer.append(len(entries))
    visible = np.arange(k_size)[None, :] <= np.arange(k_size - 1)[:, None]
    words = np.packbits(visible, axis=-1, bitorder="little").view("<i4")
    atlas = np.repeat(words[:, None], q_size, axis=1)
    tables = (
        np.stack(q_rows), block, np.array(k_rows).reshape(-1, k_size), first, full, rest, rest_rows, always, pointer,
        entries, masks, atlas,
    )  # fmt: skip
    tensors = (torch.from_numpy(np.ascontiguousarray(x, np.int32)) for x in tables)
    return Units(*tensors, blocks=len(cut.queries), most_full=max(full, default=0), most_rest=int(rest.max(initial=0)))


def _query_tiles(queries: Ints, size: int) -> tuple[list[Ints], list[int]]:
    """Tiles of `size` slots of every block of queries, and the block of each."""
    tiles, blocks = [], []
    for number, row in enumerate(queries):
        own = _tiles(row[row >= 0], size)
        tiles += list(own)
        blocks += [number] * len(own)
    return tiles, blocks


def _tiles(values: Ints, size: int) -> Ints:
    return np.pad(values, (0, -len(values) % size), constant_values=-1).reshape(-1, size)


def _run_weights(bias: Tensor, run: int) -> tuple[Tensor, Tensor]:
    """Weights [B|1, L, H|1, 1] of tokens inside their runs, and the bias [B|1, H|1, runs] of the pooled keys."""
    short = -bias.shape[-1] % run
    runs = torch.nn.functional.pad(bias, (0, short), value=float("-inf")).unflatten(-1, (-1, run))
    hidden = torch.isneginf(runs).all(-1, keepdim=True)
    total = torch.logsumexp(runs.masked_fill(hidden, 0.0), -1, keepdim=True)
    weights = torch.exp(runs.masked_fill(hidden, float("-inf")) - total).flatten(-2)[..., : bias.shape[-1]]
    return weights.transpose(-1, -2)[..., None], total.masked_fill(hidden, float("-inf"))[..., 0]
