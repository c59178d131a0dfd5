"""Keys chosen at run time, as tensor functions: scores of blocks, the choice, and its tile lists.

Everything has fixed shapes and stays on the device of its arguments; nothing waits for the device, nothing draws from a
global random generator, and no gradient flows through a choice.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from .lists import TileLists

STEP_BYTES = 1 << 26  # sampled scores that are held at once, 64 MiB
LEVELS = (1, 2, 4, 8)  # tokens per pooled key in PSA
_SLACK = 1e-6  # thresholds are compared with this much room (PSA)
_FIRST_LEVEL = 0.06  # least share of blocks at full resolution in threshold mode (PSA)


class Choice(NamedTuple):
    """Which units (regions, blocks at a level) every query block sees.

    Args:
        index: int32 [B, H|1, query blocks, capacity] unit numbers, each once; entries from `counts` on mean nothing.
        counts: int32 [B, H|1, query blocks] used entries.
    """

    index: Tensor
    counts: Tensor


class Units(NamedTuple):
    """The tables that turn a choice into tile lists; int32 tensors, built once per plan.

    A unit is a set of keys: some full tiles, and a rest of fewer keys than a tile. Rests of the units of one list are
    packed into full tiles.

    Args:
        q_rows: [n_qt, BM] tiles of the query blocks, then tiles with fixed lists; every query has a slot.
        tile_block: [n] query block of the first n tiles.
        k_rows: [n_kt, BN] key tiles that never change.
        first, full: [U] first key tile and number of full key tiles of every unit.
        rest: [U] keys beyond them, `rest_rows` [U, BN] those keys, -1 for none.
        always: [A] units that every query block sees besides its choice.
        fixed_ptr: [n_qt - n + 1] first entry of every fixed list; fixed_tile, fixed_mask: [m] their entries.
        atlas: [BN - 1, BM, BN // 32], row c - 1 shows the first c keys of a tile.
        blocks: query blocks; most_full, most_rest: the largest entries of `full` and `rest`.
    """

    q_rows: Tensor
    tile_block: Tensor
    k_rows: Tensor
    first: Tensor
    full: Tensor
    rest: Tensor
    rest_rows: Tensor
    always: Tensor
    fixed_ptr: Tensor
    fixed_tile: Tensor
    fixed_mask: Tensor
    atlas: Tensor
    blocks: int
    most_full: int
    most_rest: int

    def to(self, device: torch.device) -> "Units":
        """The same tables on `device`."""
        return Units(*(x.to(device) if isinstance(x, Tensor) else x for x in self))

    def longest(self, capacity: int) -> tuple[int, int]:
        """(full tiles, tiles of packed rests) that a list can have at most when `capacity` units are chosen."""
        units = capacity + len(self.always)
        return units * self.most_full, -(-units * self.most_rest // self.k_rows.shape[1])

    def bytes_per_group(self, capacity: int) -> int:
        """About what `tile_lists` needs for one batch entry and head."""
        full, loose = self.longest(capacity)
        packed = 36 * loose * self.k_rows.shape[1]
        return self.blocks * (40 * (full + loose) + packed) + 24 * len(self.tile_block) * (full + loose)


def tile_lists(units: Units, index: Tensor, counts: Tensor) -> TileLists:
    """The tile lists of a choice, one per batch entry and head.

    Args:
        index, counts: [G, query blocks, capacity] and [G, query blocks], as in `Choice`.

    Returns:
        Lists for kernels, with groups 0..G-1. Sizes depend on the capacity alone, so nothing waits for the device:
        row_ptr says how much of key_tile and mask_id is used. In every list the full tiles come first; at most the last
        one has a mask. Packed rests are key tiles of their own, `k_rows` grows by them.

    Cost: 4 bytes per place of a packed key and 8 per place of a listed tile, for the largest choice that every query
    block may make (`Units.longest`), and meanwhile nine and five times that.
    """
    groups, blocks, _ = index.shape
    slots = units.k_rows.shape[1]
    full_most, loose_most = units.longest(index.shape[2])
    index, live = _with_always(units, index, counts)
    full, rest = (torch.where(live, x[index], 0).cumsum(-1) for x in (units.full, units.rest))
    n_full, n_rest = (
        x[..., -1] if x.shape[-1] else x.new_zeros(groups, blocks) for x in (full, rest)
    )  # [G, query blocks]
    tiles = _expand(full, index, full_most)
    tiles = units.first[tiles.unit] + tiles.offset if full_most else index.new_zeros(groups, blocks, 0)
    packed = _expand(rest, index, loose_most * slots)
    used = torch.arange(loose_most * slots, device=index.device) < n_rest[..., None]
    loose = torch.where(used, units.rest_rows[packed.unit, packed.offset.clamp(0, slots - 1)], -1)
    length = n_full + (n_rest + slots - 1) // slots

    number = torch.arange(full_most + loose_most, device=index.device)
    first_loose = len(units.k_rows) + loose_most * torch.arange(groups * blocks, device=index.device)
    entry = (first_loose.view(groups, blocks) - n_full)[..., None] + number
    if full_most:
        entry = torch.where(number < n_full[..., None], pad(tiles, (0, loose_most)), entry)
    ragged = (n_rest % slots > 0)[..., None] & (number == length[..., None] - 1)
    mask = torch.where(ragged, (n_rest % slots)[..., None] - 1, -1)
    return _compact(units, loose.view(-1, slots), entry, mask, length)


def block_importance(
    q: Tensor,
    k: Tensor,
    order: Tensor,
    blocks: tuple[int, int],
    offsets: tuple[Tensor, Tensor],
    scale: float | None = None,
) -> Tensor:
    """How much a block of queries needs a block of keys, from a sample of both (PSA, Li et al. 2512.04025).

    Args:
        q, k: [B, S, H, D]; k may have fewer heads.
        order: int [L], the tokens in the order in which they are cut into blocks; the last one fills up both last
            blocks.
        blocks: tokens per query block and per key block.
        offsets: int [B, H, n] of sampled tokens inside a query block and inside a key block, the same for all blocks.
        scale: factor of the logits, 1/sqrt(D) by default.

    Returns:
        fp32 [B, H, query blocks, key blocks], rows sum to 1: the largest exp(logit - row maximum) over the sampled
        pairs of two blocks. Products are rounded to the dtype of q.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    sampled_q = _sample(q, order, blocks[0], offsets[0])  # [B, H, nq, sq, D]
    sampled_k = _sample(_repeated(k, q.shape[2]), order, blocks[1], offsets[1])
    count, keys = sampled_q.shape[2], sampled_k.flatten(2, 3).transpose(2, 3)
    each = 4 * sampled_q.shape[:2].numel() * sampled_q.shape[3] * keys.shape[3]
    parts = []
    for queries in sampled_q.split(max(1, min(count, STEP_BYTES // max(each, 1))), dim=2):
        scores = ((factor * queries).flatten(2, 3) @ keys).float()
        best = scores.unflatten(3, (-1, sampled_k.shape[3])).amax(4).unflatten(2, queries.shape[2:4])
        parts.append(torch.exp(best - best.amax(4, keepdim=True)).amax(3))
    importance = torch.cat(parts, dim=2)
    return importance / importance.sum(-1, keepdim=True)


def pyramid_levels(importance: Tensor, ends: Sequence[float], mode: str, align: Sequence[int]) -> Tensor:
    """Level of every block of keys for every block of queries (PSA).

    Args:
        importance: [..., key blocks].
        ends: where the segments of levels 1, 2, 4 and 8 end, rising shares of all blocks (mode "topk") or of all
            importance ("threshold"); what is left is level 0.
        align: a segment of each level is rounded to a multiple of this many blocks, up where there are enough.

    Returns:
        int32, like importance, of 0 (unseen), 1, 2, 4 and 8.
    """
    ordered, index = torch.sort(importance, dim=-1, descending=True, stable=True)
    blocks = importance.shape[-1]
    if mode == "topk":
        limits = [torch.full_like(index[..., :1], end) for end in topk_ends(blocks, ends, align)]
    else:
        share = ordered.cumsum(-1) / ordered.sum(-1, keepdim=True)
        limits = _threshold_ends(share, ends, align)
    place = torch.arange(blocks, device=importance.device)
    level = torch.zeros_like(index, dtype=torch.int32)
    previous = torch.zeros_like(index[..., :1])
    for value, end in zip(LEVELS, limits, strict=True):
        level = torch.where((place >= previous) & (place < end), value, level)
        previous = end
    return torch.zeros_like(level).scatter_(-1, index, level)


def topk_ends(blocks: int, ends: Sequence[float], align: Sequence[int]) -> list[int]:
    """Last + 1 place of levels 1, 2, 4 and 8 among `blocks` sorted ones in mode "topk"."""
    found, previous = [], 0
    for share, unit in zip(ends, align, strict=True):
        length = max(int(blocks * share) - previous, 0)
        if unit > 1 and length:
            length = -(-length // unit) * unit
            if previous + length >= blocks:
                length = (blocks - previous) // unit * unit
        previous = min(previous + length, blocks)
        found.append(previous)
    return found


def similarity_caps(k: Tensor, order: Tensor, block: int, thresholds: Sequence[float]) -> Tensor:
    """Coarsest level that the keys of a block bear (PSA): neighbours must be similar to be averaged.

    Args:
        k: [B, S, H, D].
        order: int [L], the tokens in the order in which they are cut into blocks of `block`.
        thresholds: mean cosine similarity above which levels 2, 4 and 8 are allowed, of tokens 1, 3 and 7 apart that
            start the runs of 2, 4 and 8. A last block counts the pairs it has; without one the level is not allowed.

    Returns:
        int32 [B, H, blocks] of 1, 2, 4 and 8.
    """
    length = len(order)
    blocks = -(-length // block)
    unit = normalize(k.index_select(1, order).float(), dim=-1).transpose(1, 2)
    unit = pad(unit, (0, 0, 0, blocks * block - length)).unflatten(2, (blocks, block))  # [B, H, blocks, block, D]
    place = torch.arange(blocks * block, device=k.device).view(blocks, block)
    caps = torch.ones(unit.shape[:3], dtype=torch.int32, device=k.device)
    for level, threshold in zip(LEVELS[1:], thresholds, strict=True):
        similar = (unit[..., ::level, :] * unit[..., level - 1 :: level, :]).sum(-1)
        pairs = (place[:, level - 1 :: level] < length).sum(-1)
        mean = similar.sum(-1) / pairs.clamp_min(1)
        caps = torch.where((mean > threshold) & (pairs > 0), level, caps)
    return caps


def settle_levels(
    levels: Tensor, importance: Tensor, caps: Tensor | None = None, exact: Tensor | None = None
) -> Tensor:
    """Levels [B, H, nq, nk] after caps [B, H, nk], blocks that must be exact (bool [nk]), and with no row empty."""
    if caps is not None:
        levels = torch.minimum(levels, caps[:, :, None].to(levels.dtype))
    if exact is not None:
        levels = torch.where(exact, 1, levels)
    best = importance.argmax(-1, keepdim=True)
    first = torch.where((levels > 0).any(-1, keepdim=True), levels.gather(-1, best), 1)
    return levels.scatter(-1, best, first.to(levels.dtype))


def pack_levels(levels: Tensor, capacity: int) -> Choice:
    """Levels [B, H, nq, nk] as a choice of units: unit l * nk + n is key block n at level 2^l."""
    blocks = levels.shape[-1]
    unit = sum((levels == value) * (number * blocks) for number, value in enumerate(LEVELS))
    unit = unit + torch.arange(blocks, device=levels.device)
    first = torch.argsort((levels == 0).to(torch.int8), dim=-1, stable=True)[..., :capacity]
    return Choice(unit.gather(-1, first).int(), (levels > 0).sum(-1, dtype=torch.int32))


def region_scores(q: Tensor, k: Tensor, rows: Tensor, per_head: bool) -> Tensor:
    """Affinity of regions (BiFormer, Zhu et al. 2303.08810): the product of their mean queries and keys.

    Args:
        q, k: [B, S, H, D]; k may have fewer heads.
        rows: int [R, n] tokens of every region, -1 for none.
        per_head: one table per head instead of one over all channels.

    Returns:
        fp32 [B, H or 1, R, R].
    """
    mean_q, mean_k = (_region_means(x, rows) for x in (q, _repeated(k, q.shape[2])))  # [B, R, H, D]
    if per_head:
        return torch.einsum("brhd,bshd->bhrs", mean_q, mean_k)
    return torch.einsum("brhd,bshd->brs", mean_q, mean_k)[:, None]


def top_regions(scores: Tensor, count: int, own: bool) -> Choice:
    """The `count` best regions of every region, ascending; `own` forces the region itself in."""
    if own:
        scores = scores + torch.diag(scores.new_full((scores.shape[-1],), float("inf")))
    index = scores.topk(count, dim=-1).indices.sort(dim=-1).values.int()
    return Choice(index, torch.full_like(index[..., 0], count))


def draw(rows: Tensor, of: int, count: int, seed: Sequence[int]) -> Tensor:
    """`count` distinct numbers below `of`, ascending, int64 [n, count], for every row number in `rows` int64 [n].

    Drawn by a counter-based generator from the row and the numbers in `seed`: equal on every device and for every other
    set of rows, and no other draw changes.
    """
    state = 0
    for number in seed:
        for word in (number & 0xFFFFFFFF, (number >> 32) & 0xFFFFFFFF):
            state = _mix(state ^ _mix(word + 0x1234567))
    row = _mix(_mix((rows + 1) & 0xFFFFFFFF) ^ state)
    key = _mix(row[:, None] ^ _mix(torch.arange(of, device=rows.device) + 0x51ED27))
    return key.argsort(dim=-1, stable=True)[:, :count].sort(dim=-1).values


def head_rows(batch: int, heads: int, first_head: int, device: torch.device) -> Tensor:
    """Row numbers [B * H] for `draw`: equal for the same head wherever it is computed."""
    head = first_head + torch.arange(heads, device=device)
    return (torch.arange(batch, device=device)[:, None] * 65536 + head).reshape(-1)


class Clustering(NamedTuple):
    """Tokens of every cluster, ascending: int32 [B, H, clusters, size] each. Tokens may be in several or in none."""

    q_index: Tensor
    k_index: Tensor


def cluster_tokens(q: Tensor, k: Tensor, means: Tensor, size: int) -> Clustering:
    """The `size` queries and keys most similar to each centroid (Routing Transformer, Roy et al. 2003.05997).

    Args:
        q, k: [B, S, H, D] alike.
        means: [H, clusters, D] or [B, H, clusters, D] centroids.
    """
    found = []
    for x in (q, k):
        similar = normalize(x.float(), dim=-1).transpose(1, 2) @ means.float().transpose(-1, -2)  # [B, H, S, clusters]
        found.append(similar.topk(size, dim=2).indices.transpose(2, 3).sort(dim=-1).values.int())
    return Clustering(*found)


def fit_centroids(x: Tensor, clusters: int, seed: Sequence[int], first_head: int = 0, rounds: int = 10) -> Tensor:
    """Unit centroids [B, H, clusters, D] of tokens x [B, S, H, D] by k-means on the sphere, from drawn tokens."""
    points = normalize(x.float(), dim=-1).transpose(1, 2)
    batch, heads, tokens, _ = points.shape
    rows = head_rows(batch, heads, first_head, x.device)
    start = draw(rows, tokens, clusters, seed).view(batch, heads, clusters, 1)
    means = points.gather(2, start.expand(-1, -1, -1, points.shape[3]))
    for _ in range(rounds):
        nearest = (points @ means.transpose(2, 3)).argmax(-1)
        member = torch.nn.functional.one_hot(nearest, clusters).to(points.dtype)
        sums = member.transpose(2, 3) @ points
        filled = member.sum(2)[..., None] > 0
        means = normalize(torch.where(filled, sums, means), dim=-1)
    return means


def _mix(x: Any) -> Any:
    """A bijection of 32-bit words (an int, or int64 tensor), held in 64 bits so that no product overflows."""
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)


class _Places(NamedTuple):
    """For every place of a packed list: its unit, and how many places of that unit come before it."""

    unit: Tensor
    offset: Tensor


def _expand(ends: Tensor, index: Tensor, places: int) -> _Places:
    """Places 0..places-1 of lists in which unit `index[..., i]` fills the places up to `ends[..., i]`."""
    number = torch.arange(places, device=ends.device).expand(*ends.shape[:-1], places).contiguous()
    at = torch.searchsorted(ends.contiguous(), number, right=True).clamp_max(ends.shape[-1] - 1)
    start = torch.where(at > 0, ends.gather(-1, (at - 1).clamp_min(0)), 0)
    return _Places(index.gather(-1, at), number - start)


def _with_always(units: Units, index: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen units and those every block sees, and which entries count."""
    live = torch.arange(index.shape[2], device=index.device) < counts[..., None]
    index = torch.where(live, index, 0).long()
    always = units.always.long().expand(*index.shape[:2], -1)
    return torch.cat([always, index], -1), torch.cat([torch.ones_like(always, dtype=torch.bool), live], -1)


def _compact(units: Units, loose: Tensor, entry: Tensor, mask: Tensor, length: Tensor) -> TileLists:
    """Lists [G, query blocks, most] of the given lengths, one per query tile, without gaps."""
    groups = len(entry)
    block = units.tile_block.long()
    fixed = units.fixed_ptr.diff().expand(groups, -1)
    ends = pad(torch.cat([length[:, block], fixed], 1).reshape(-1).cumsum(0), (1, 0))
    row_ptr = torch.cat([ends[:-1].view(groups, -1), ends[len(units.q_rows) :: len(units.q_rows), None]], 1)
    entry, mask = entry[:, block], mask[:, block]  # [G, routed tiles, most]
    most = entry.shape[2]
    number = torch.arange(most, device=entry.device)
    total = groups * (entry.shape[1] * most + len(units.fixed_tile))
    place = torch.where(number < length[:, block][..., None], row_ptr[:, : len(block), None] + number, total)
    fixed_place = row_ptr[:, len(block), None] + torch.arange(len(units.fixed_tile), device=entry.device)
    places = torch.cat([place.reshape(-1), fixed_place.reshape(-1)])
    columns = []
    for chosen, fixed, empty in ((entry, units.fixed_tile, 0), (mask, units.fixed_mask, -1)):
        values = torch.cat([chosen.reshape(-1), fixed.long().expand(groups, -1).reshape(-1)]).int()
        column = torch.full((total + 1,), empty, dtype=torch.int32, device=entry.device)
        columns.append(column.scatter_(0, places, values)[:total])
    k_rows = torch.cat([units.k_rows, loose.int()])
    return TileLists(units.q_rows, k_rows, row_ptr.int(), *columns, units.atlas)


def _threshold_ends(share: Tensor, ends: Sequence[float], align: Sequence[int]) -> list[Tensor]:
    """Last + 1 place of levels 1, 2, 4 and 8 where the sorted cumulative `share` passes each end."""
    blocks = share.shape[-1]
    previous = torch.zeros_like(share[..., :1], dtype=torch.int64)
    found = []
    for number, (limit, unit) in enumerate(zip(ends, align, strict=True)):
        below = (share <= limit + _SLACK).sum(-1, keepdim=True)
        end = torch.where(below > 0, below + 1, previous)
        if unit > 1:
            length = (end - previous).clamp_min(0)
            end = previous + (length + unit - 1) // unit * unit
            end = torch.where(end >= blocks, previous + (blocks - previous) // unit * unit, end)
        else:
            end = torch.minimum(torch.maximum(end, previous), torch.full_like(end, blocks))
            if number == 0:
                end = end.clamp_min(min(blocks, int(_FIRST_LEVEL * blocks) + 1))
        previous = end
        found.append(end)
    return found


def _sample(x: Tensor, order: Tensor, block: int, offsets: Tensor) -> Tensor:
    """Tokens at `offsets` [B, H, n] of every block of x [B, S, H, D]: [B, H, blocks, n, D]."""
    blocks = -(-len(order) // block)
    place = (block * torch.arange(blocks, device=x.device))[:, None] + offsets[:, :, None]
    token = order.long()[place.clamp_max(len(order) - 1)].flatten(2)
    picked = x.transpose(1, 2).gather(2, token[..., None].expand(-1, -1, -1, x.shape[3]))
    return picked.unflatten(2, (blocks, -1))


def _region_means(x: Tensor, rows: Tensor) -> Tensor:
    """fp32 means [B, R, H, D] over the tokens of every region."""
    valid = rows >= 0
    picked = x.index_select(1, rows.clamp_min(0).reshape(-1).long()).unflatten(1, rows.shape).float()
    return picked.masked_fill(~valid[..., None, None], 0.0).sum(2) / valid.sum(1)[:, None, None]


def _repeated(k: Tensor, heads: int) -> Tensor:
    repeat = heads // k.shape[2]
    return k if repeat == 1 else k.repeat_interleave(repeat, dim=2)
