"""The test kit of pattern authors: proves a pattern on every backend that runs on this machine.

Everything is compared with one thing, the dense mask that `Rule.allowed` spells out token by token. So write `allowed`
as your definition reads, and let this find what is wrong with the fast answers.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch

from gensparse.attention import BACKENDS, ON_REQUEST, explain, sparse_attention
from gensparse.errors import ConfigError
from gensparse.layout import Boxes, Layout, Segment
from gensparse.patterns.base import FULL, NO_DATA, NONE, PARTIAL, Data, Pattern, Rule
from gensparse.patterns.codes import combine
from gensparse.plan import Plan, build_plan
from gensparse.plan.tiles import SegmentTiles

GRIDS = ((1, 1, 1), (1, 1, 13), (1, 7, 1), (1, 7, 11), (1, 8, 12), (3, 1, 5), (2, 5, 7), (5, 3, 4))
TILES = ((1, 2, 2), (1, 1, 5), (1, 3, 4), (2, 2, 3))  # small tiles, so that small grids have many of them
PAIRS = 3000  # pairs of tiles whose signatures are compared at once

# Relative error (rms) of an output against fp64. In bf16 rounding the weights and the output costs up to 2^-8.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

DataOf = Mapping[str, Any] | Callable[[Layout], Mapping[str, Any]]
Mask = np.ndarray


class PatternDefectError(AssertionError):
    """A pattern breaks its contract; the message says which part, where and how."""


def default_layouts() -> list[Layout]:
    """Awkward small layouts: one-token axes, primes, 1-D to 3-D, alone, among other segments, and interleaved."""
    found = []
    for grid in GRIDS:
        target = Segment("target", grid[0] * grid[1] * grid[2], grid)
        mixed = (Segment("text", 3), target, Segment("register", 1), Segment("reference", 6, (1, 2, 3)))
        found += [Layout((target,)), Layout((*mixed, Segment("pad", 2)))]
    return [*found, Layout.ulysses(Layout.image(7, 11, text=5), 3)]


def check_pattern(
    pattern: Pattern,
    layouts: Iterable[Layout] | None = None,
    data: DataOf | None = None,
    backends: Sequence[str] | None = None,
) -> None:
    """Prove a pattern, or raise with one sentence that names what is wrong.

    Checked on every layout: equal values have equal keys and masks; relations of boxes are never NONE or FULL wrongly;
    key boxes hold every visible key; pairs of tiles with equal signatures have equal masks; partitions say what the
    mask says; plans hold exactly the pairs of the mask, at two tile sizes; every backend equals attention in fp64 under
    the mask, in fp32 and bf16, and gives 0 and -inf to queries without a key.

    Args:
        pattern: the pattern; windows are clamped to every layout first.
        layouts: what to prove it on; by default `default_layouts()`, of which those it does not fit are left out.
        data: arrays that the pattern names, or a function that makes them for a layout.
        backends: names that must run; by default all that run the plan on this machine unasked.

    Raises:
        PatternDefectError: (an AssertionError) what is wrong, and where.
        ConfigError: the pattern does not fit a layout that was passed, or fits none of the default ones.
        BackendError: a backend named in `backends` cannot run the pattern here.
    """
    proved = 0
    for layout in default_layouts() if layouts is None else layouts:
        try:
            fitting = pattern.clamped(layout.grid)
            arrays = data(layout) if callable(data) else data or NO_DATA
            rule = fitting.bind(layout, {name: np.asarray(array) for name, array in arrays.items()})
        except ConfigError:
            if layouts is None:
                continue
            raise
        check_rule(rule, fitting)
        for tiles in ({}, {"q_tile": 32, "k_tile": 32}):
            plan = build_plan(fitting, layout, data=arrays, **tiles)
            check_plan(plan, rule.dense_mask())
        check_backends(build_plan(fitting, layout, data=arrays), backends)
        _check_value(fitting, layout, arrays)
        proved += 1
    if not proved:
        raise ConfigError(f"{pattern!r} fits none of the default layouts; pass layouts=[...] that it fits.")


def check_rule(rule: Rule, pattern: object = "the rule", seed: int = 0) -> None:
    """Relations, key boxes, signatures and partitions of a rule against its dense mask.

    Raises:
        PatternDefectError: what is wrong, and where.
    """
    rng = np.random.default_rng(seed)
    where = f"{pattern!r} on grid {rule.layout.grid}"
    mask = _segment_order_mask(rule)
    for group in range(rule.groups):
        _check_relations(rule, mask[group], group, where, rng)
        _check_key_boxes(rule, mask[group], group, where, rng)
        _check_signatures(rule, mask[group], group, where, rng)
        _check_partitions(rule, mask[group], group, where)


def check_plan(plan: Plan, mask: Mask) -> None:
    """The tile lists of a plan hold exactly the pairs of a mask, bool [G, Nq, Nk].

    Raises:
        PatternDefectError: what is wrong, and where.
    """
    where = f"{plan.pattern!r} on grid {plan.layout.grid}"
    held = spelled_mask(plan)
    if not np.array_equal(held, mask):
        group, q, k = np.argwhere(held != mask)[0]
        word = "lists a pair that the mask hides" if held[group, q, k] else "lacks a pair that the mask allows"
        raise PatternDefectError(
            f"{where}: the plan (tiles {plan.q_tile}, {plan.k_tile}) {word}: query {q}, key {k}, group {group}; look "
            "at tile_relation, key_box and signature."
        )
    if plan.useful != tuple(mask.sum(axis=(1, 2))):
        raise PatternDefectError(f"{where}: the plan counts {plan.useful} pairs, the mask {mask.sum(axis=(1, 2))}.")


def spelled_mask(plan: Plan) -> Mask:
    """The mask that the tile lists of a plan spell out, bool [G, Nq, Nk].

    Raises:
        PatternDefectError: a pair listed twice, or a full tile after a partial one.
    """
    q_rows, k_rows, row_ptr, key_tile, mask_id, atlas = (x.cpu().numpy() for x in plan.lists)
    bits = (atlas[..., None] >> np.arange(32)) & 1
    bits = bits.reshape(*atlas.shape[:2], k_rows.shape[1]).astype(bool)
    count = np.zeros((plan.groups, plan.tokens, plan.keys), np.int64)
    for group, tile in product(range(plan.groups), range(len(q_rows))):
        entries = np.arange(row_ptr[group, tile], row_ptr[group, tile + 1])
        if np.any(np.diff((mask_id[entries] >= 0).astype(int)) < 0):
            raise PatternDefectError(f"{plan.pattern!r}: query tile {tile} lists a full key tile after a partial one.")
        for entry in entries:
            keys = k_rows[key_tile[entry]]
            block = bits[mask_id[entry]] if mask_id[entry] >= 0 else np.ones((q_rows.shape[1], len(keys)), bool)
            i, j = np.nonzero(block & (q_rows[tile] >= 0)[:, None] & (keys >= 0))
            np.add.at(count[group], (q_rows[tile][i], keys[j]), 1)
    if count.max(initial=0) > 1:
        raise PatternDefectError(f"{plan.pattern!r}: the plan lists a pair {count.max()} times.")
    return count > 0


def check_backends(plan: Plan, backends: Sequence[str] | None = None, seed: int = 0) -> None:
    """Every backend that runs a plan here against fp64 attention under its dense mask.

    Raises:
        PatternDefectError: the backend, the dtype and the error.
        BackendError: a backend named in `backends` cannot run the plan.
    """
    for device, dtype in product(_devices(), LIMITS):
        tensors, settings = _inputs(plan, device, seed)
        exact = [x.to(dtype).double() for x in tensors]
        extra = {name: tuple(x.to(dtype) for x in pair) for name, pair in settings["sources"].items()}
        doubled = {name: tuple(x.double() for x in pair) for name, pair in extra.items()}
        groups = settings["groups"]
        want = sparse_attention(
            *exact, plan, backend="reference", return_lse=True, groups=groups, sources=doubled or None
        )
        lowered = [x.to(dtype) for x in tensors]
        answers = explain(plan.to(device), lowered[0])
        able = [name for name in BACKENDS if answers[name] is None and name not in ON_REQUEST]
        names = able if backends is None else backends
        for name in names:
            got = sparse_attention(*lowered, plan, backend=name, return_lse=True, groups=groups, sources=extra or None)
            _compare(f"{plan.pattern!r} on grid {plan.layout.grid}: {name} in {dtype} on {device}", got, want, dtype)


def _compare(where: str, got: Sequence[torch.Tensor], want: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
    (out, lse), (want_out, want_lse) = got, want
    empty = torch.isneginf(want_lse)
    if not torch.equal(torch.isneginf(lse), empty) or bool((out[empty] != 0).any()):
        raise PatternDefectError(
            f"{where}: queries without a key must give 0 and a log-sum-exp of -inf, and no others."
        )
    for name, mine, theirs in (("output", out, want_out), ("log-sum-exp", lse[~empty], want_lse[~empty])):
        error, size = (
            x.double().square().mean().sqrt() if x.numel() else 0.0 for x in (mine.double() - theirs, theirs)
        )
        if not error <= LIMITS[dtype] * max(size, 1.0 if name == "log-sum-exp" else 0.0):
            raise PatternDefectError(f"{where}: the {name} is off by {float(error):.1e} of {float(size):.1e} (rms).")


def _inputs(plan: Plan, device: str, seed: int) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """q, k, v, one tensor pair per source, and heads that use every entry of the menu."""
    heads = max(2, plan.groups)
    generator = torch.Generator().manual_seed(seed)

    def random(tokens: int) -> torch.Tensor:
        return torch.randn(1, tokens, heads, 32, generator=generator).to(device)

    sources = {source.name: (random(source.segment.length), random(source.segment.length)) for source in plan.sources}
    groups = torch.arange(heads, device=device)[None] if plan.groups > 1 else None
    return [random(plan.tokens) for _ in range(3)], {"sources": sources, "groups": groups}


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _check_value(pattern: Pattern, layout: Layout, arrays: Mapping[str, Any]) -> None:
    """A pattern is a value: hashable, with a key of its own, and it binds to the same mask every time."""
    try:
        hash(pattern)
    except TypeError as error:
        raise PatternDefectError(f"{pattern!r} is not hashable ({error}); make it a frozen dataclass.") from error
    data: Data = {name: np.asarray(array) for name, array in arrays.items()}
    if pattern.key() != pattern.key() or not np.array_equal(
        pattern.dense_mask(layout, data), pattern.dense_mask(layout, data)
    ):
        raise PatternDefectError(f"{pattern!r} is not a value: its key or its mask changes from call to call.")


def _segment_order_mask(rule: Rule) -> Mask:
    """The dense mask with own tokens in segment order, bool [G, Nq, Nk]."""
    mask, places = rule.dense_mask(), rule.layout.places()
    if places is None:
        return mask
    keys = np.concatenate([places, np.arange(len(places), mask.shape[2])])
    return mask[:, places][:, :, keys]


def _check_relations(rule: Rule, mask: Mask, group: int, where: str, rng: np.random.Generator) -> None:
    q, k = _random_boxes(rng, rule.layout.segments, 24), _random_boxes(rng, rule.key_segments, 28)
    rows, columns = _members(q, rule.layout.segments), _members(k, rule.key_segments)
    said = rule.tile_relation(_each(q, (slice(None), None)), _each(k, (None, slice(None))), group)
    if said.shape != (len(rows), len(columns)):
        raise PatternDefectError(f"{where}: tile_relation of [24, 1] and [1, 28] boxes has shape {said.shape}.")
    for i, j in product(range(len(rows)), range(len(columns))):
        block = mask[np.ix_(rows[i], columns[j])]
        if not block.size:
            if said[i, j] != NONE:
                raise PatternDefectError(f"{where}: tile_relation must be NONE for an empty box.")
            continue
        true = FULL if block.all() else PARTIAL if block.any() else NONE
        if said[i, j] != true and said[i, j] != PARTIAL:
            word = "FULL" if said[i, j] == FULL else "NONE" if said[i, j] == NONE else repr(said[i, j])
            raise PatternDefectError(
                f"{where}: tile_relation says {word} for queries {_named(q, i)} and keys {_named(k, j)} of group "
                f"{group}, but {int(block.sum())} of {block.size} pairs are allowed."
            )


def _check_key_boxes(rule: Rule, mask: Mask, group: int, where: str, rng: np.random.Generator) -> None:
    boxes = _random_boxes(rng, rule.layout.segments, 24)
    start = 0
    for number, segment in enumerate(rule.key_segments):
        edges = rule.key_box(boxes, number, group)
        lo, hi = (np.broadcast_to(edge, (len(boxes.segment), 3)) for edge in edges)
        for i, rows in enumerate(_members(boxes, rule.layout.segments)):
            seen = np.flatnonzero(mask[rows, start : start + segment.length].any(axis=0))
            position = np.stack(np.unravel_index(seen, segment.shape), -1)
            outside = np.flatnonzero(~np.all((position >= lo[i]) & (position < hi[i]), axis=-1))
            if len(outside):
                raise PatternDefectError(
                    f"{where}: key_box of queries {_named(boxes, i)} in segment {number}, group {group}, is "
                    f"{lo[i].tolist()}..{hi[i].tolist()} and misses the visible key {position[outside[0]].tolist()}."
                )
        start += segment.length


def _check_signatures(rule: Rule, mask: Mask, group: int, where: str, rng: np.random.Generator) -> None:
    """Pairs of tiles that a plan would give one mask have one."""
    q_starts, k_starts = (_starts(segments) for segments in (rule.layout.segments, rule.key_segments))
    for (i, own), (j, other), shape in product(enumerate(rule.layout.segments), enumerate(rule.key_segments), TILES):
        q = SegmentTiles.cut(i, q_starts[i], own.shape, shape, rule.tile_step(i))
        k = SegmentTiles.cut(j, k_starts[j], other.shape, shape, rule.tile_step(j))
        pairs = np.stack([x.reshape(-1) for x in np.meshgrid(np.arange(len(q)), np.arange(len(k)))])
        if pairs.shape[1] > PAIRS:
            pairs = pairs[:, rng.choice(pairs.shape[1], PAIRS, replace=False)]
        q_boxes, k_boxes = _each(q.boxes, pairs[0]), _each(k.boxes, pairs[1])
        related = np.flatnonzero(rule.tile_relation(q_boxes, k_boxes, group) != NONE)
        if not len(related):
            continue
        pairs = pairs[:, related]
        columns = rule.signature(_each(q.boxes, pairs[0]), _each(k.boxes, pairs[1]), group)
        if columns is None:
            continue
        code = combine([*q.count[pairs[0]].T, *k.count[pairs[1]].T, *columns])
        rows, keys = q.rows(shape[0] * shape[1] * shape[2]), k.rows(shape[0] * shape[1] * shape[2])
        blocks = mask[rows[pairs[0]][:, :, None], keys[pairs[1]][:, None]]
        blocks &= (rows[pairs[0]] >= 0)[:, :, None] & (keys[pairs[1]] >= 0)[:, None]
        _, first, index = np.unique(code, return_index=True, return_inverse=True)
        wrong = np.flatnonzero((blocks != blocks[first[index.reshape(-1)]]).any(axis=(1, 2)))
        if len(wrong):
            one, two = first[index.reshape(-1)[wrong[0]]], wrong[0]
            text = " and ".join(
                f"queries {_named(q.boxes, pairs[0][x])} with keys {_named(k.boxes, pairs[1][x])}" for x in (one, two)
            )
            raise PatternDefectError(f"{where}: signature is equal for {text}, group {group}, but their masks differ.")


def _check_partitions(rule: Rule, mask: Mask, group: int, where: str) -> None:
    for number, (start, segment) in enumerate(zip(rule.layout.starts, rule.layout.segments, strict=True)):
        labels = rule.partition(number, group)
        own = slice(start, start + segment.length)
        if labels is not None and not np.array_equal(labels[:, None] == labels, mask[own, own]):
            raise PatternDefectError(
                f"{where}: partition of segment {number}, group {group}, differs from the mask; return None where the "
                "rule is no equivalence relation."
            )


def _random_boxes(rng: np.random.Generator, segments: Sequence[Segment], count: int) -> Boxes:
    """Boxes inside the segments: small ones with steps, some of a whole segment, some of one token, one empty."""
    number = rng.integers(0, len(segments), count)
    shape = np.array([segments[i].shape for i in number])
    lo = rng.integers(0, shape)
    hi = np.minimum(lo + rng.integers(1, 6, (count, 3)), shape)
    kind = rng.random((count, 1))
    lo, hi = np.where(kind < 0.2, 0, lo), np.where(kind < 0.2, shape, hi)
    hi = np.where(kind > 0.9, lo + 1, hi)
    hi[0] = lo[0]
    return Boxes(number, lo, hi, np.where(kind < 0.6, 1, rng.integers(1, 4, (count, 3))))


def _members(boxes: Boxes, segments: Sequence[Segment]) -> list[np.ndarray]:
    """Tokens of every box in segment order."""
    starts = _starts(segments)
    steps = np.broadcast_to(boxes.step, boxes.lo.shape)
    found = []
    for number, lo, hi, step in zip(boxes.segment, boxes.lo, boxes.hi, steps, strict=True):
        axes = np.meshgrid(*(np.arange(*axis) for axis in zip(lo, hi, step, strict=True)), indexing="ij")
        found.append(starts[number] + np.ravel_multi_index(axes, segments[number].shape).reshape(-1))
    return found


def _starts(segments: Sequence[Segment]) -> list[int]:
    return np.cumsum([0, *(segment.length for segment in segments)]).tolist()


def _each(boxes: Boxes, index: Any) -> Boxes:
    step = np.broadcast_to(boxes.step, boxes.lo.shape)
    return Boxes(boxes.segment[index], boxes.lo[index], boxes.hi[index], step[index])


def _named(boxes: Boxes, index: int) -> str:
    """A box in words."""
    step = np.broadcast_to(boxes.step, boxes.lo.shape)[index].tolist()
    text = f"{boxes.lo[index].tolist()}..{boxes.hi[index].tolist()} of segment {int(boxes.segment[index])}"
    return text if step == [1, 1, 1] else f"{text} in steps {step}"
