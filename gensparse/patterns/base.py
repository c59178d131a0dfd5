"""What a pattern is: a frozen value that says which key a query may see, and the rule it becomes on a layout.

A Pattern holds no tensors and no grid. `bind(layout)` gives a Rule, which answers in vectorised integer arithmetic for
single tokens (`allowed`), for boxes of tokens (`tile_relation`, `key_box`) and for whole segments (`partition`).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gensparse.errors import ConfigError, PlanTooLargeError
from gensparse.layout import Boxes, Coords, Grid, Ints, Layout, Segment, segment_coords

if TYPE_CHECKING:
    from PIL.Image import Image

NONE, PARTIAL, FULL = np.int8(0), np.int8(1), np.int8(2)

RUNS = "runs"  # see Rule.tiles

DENSE_MASK_LIMIT = 1 << 28  # entries; one byte each
_CHUNK = 1 << 22  # entries evaluated at once while a dense mask is filled

Bools = NDArray[np.bool_]
Relation = NDArray[np.int8]
Span = tuple[Ints, Ints]
Columns = list[Ints]
Data = Mapping[str, NDArray[Any]]

NO_DATA: Data = MappingProxyType({})


@dataclass(frozen=True)
class Source:
    """Extra keys appended after a layout's own tokens, and how they are made.

    Args:
        segment: the keys as a segment (kind, length, grid); its name is the name of the source, unique in a rule.
        of: index of the layout segment the keys are pooled from; None when the caller always passes the tensors.
        cells: tokens per cell on each axis (F, H, W).
        weights: "mean" of the cell, "learned" weights per position in the cell, or "given" (k, v) tensors.
        bias: added to the logits of all its keys; "log_count" adds ln(tokens in the cell) to each, "log_share" the
            same less ln(tokens in a whole cell).
        shift: tokens before the first whole cell on each axis.
    """

    segment: Segment
    of: int | None = None
    cells: Grid = (1, 1, 1)
    weights: str = "given"
    bias: float | str = 0.0
    shift: Grid = (0, 0, 0)

    @property
    def name(self) -> str:
        return self.segment.name


class Pattern(ABC):
    """A frozen, hashable, printable description of which key a query may see. Combine with | and &."""

    @abstractmethod
    def bind(self, layout: Layout, data: Data = NO_DATA) -> "Rule":
        """The pattern on one layout, with the arrays (masks, groups) it names.

        Raises:
            ConfigError: a setting that does not fit the grid, or an array that is missing or of another shape.
        """

    def clamped(self, grid: Grid) -> "Pattern":
        """The same pattern with every window shortened to what `grid` (F, H, W) can hold."""
        return self

    def key(self) -> str:
        """A text that is equal exactly for equal patterns; plans are cached by it."""
        return repr(self)

    def dense_mask(self, layout: Layout, data: Data = NO_DATA) -> Bools:
        """Allowed pairs as bool [G, Nq, Nk]; for tests and small sizes.

        Raises:
            PlanTooLargeError: more than `DENSE_MASK_LIMIT` entries.
        """
        return self.bind(layout, data).dense_mask()

    def draw(
        self,
        layout: Layout,
        query: int | tuple[int, ...],
        *,
        group: int = 0,
        scale: int = 8,
        data: Mapping[str, Any] | None = None,
    ) -> "Image":
        """A picture of the keys one query sees: the target, below it the other segments, then the extra keys.

        Args:
            layout: what every token is.
            query: a position on the target, (H, W) or (F, H, W), or the number of a token of the sequence.
            group: which pattern of the menu.
            scale: pixels of a token.
            data: arrays that the pattern names.

        Raises:
            ConfigError: a query outside the layout, a group or scale out of range, or a picture of too many pixels.
        """
        from gensparse.patterns.draw import draw_pattern

        return draw_pattern(self, layout, query, group=group, scale=scale, data=data)

    def __or__(self, other: "Pattern") -> "Pattern":
        return Union(_parts(Union, self, other)) if isinstance(other, Pattern) else NotImplemented

    def __and__(self, other: "Pattern") -> "Pattern":
        return Intersection(_parts(Intersection, self, other)) if isinstance(other, Pattern) else NotImplemented


class Rule(ABC):
    """A pattern bound to a layout. Every method broadcasts over the leading axes of its arguments.

    Queries are own tokens of the layout; keys lie in `key_segments`, the layout's segments followed by the sources.
    """

    groups: int = 1

    def __init__(self, layout: Layout, sources: Sequence[Source] = ()) -> None:
        self.layout = layout
        self.sources = tuple(sources)

    @property
    def key_segments(self) -> tuple[Segment, ...]:
        return self.layout.segments + tuple(source.segment for source in self.sources)

    def key_coords(self) -> Coords:
        """Coordinates of all keys: own tokens in the order of the sequence, then the sources."""
        own = self.layout.coords()
        extra = segment_coords([source.segment for source in self.sources])
        number = extra.segment + len(self.layout.segments)
        return Coords(np.concatenate([own.segment, number]), np.concatenate([own.position, extra.position]))

    @abstractmethod
    def allowed(self, q: Coords, k: Coords, group: int = 0) -> Bools:
        """Whether each query may see each key."""

    @abstractmethod
    def tile_relation(self, q: Boxes, k: Boxes, group: int = 0) -> Relation:
        """NONE, PARTIAL or FULL for the pairs of two boxes; never NONE or FULL wrongly, NONE for empty boxes."""

    @abstractmethod
    def key_box(self, q: Boxes, segment: int, group: int = 0) -> Span:
        """lo, hi [..., 3] of a box in key segment `segment` around all keys of the queries; empty where hi <= lo."""

    def dense_mask(self) -> Bools:
        """Allowed pairs as bool [G, Nq, Nk], see `Pattern.dense_mask`."""
        queries, keys = self.layout.coords(), self.key_coords()
        shape = (self.groups, len(queries.segment), len(keys.segment))
        if np.prod(shape, dtype=np.int64) > DENSE_MASK_LIMIT:
            raise PlanTooLargeError(
                f"A dense mask of shape {shape} is over the limit of {DENSE_MASK_LIMIT} entries; use build_plan for it."
            )
        mask = np.empty(shape, np.bool_)
        step = max(1, _CHUNK // max(1, shape[2]))
        for group in range(self.groups):
            for start in range(0, shape[1], step):
                rows = slice(start, start + step)
                part = Coords(queries.segment[rows, None], queries.position[rows, None])
                mask[group, rows] = self.allowed(part, keys, group)
        return mask

    def signature(self, q: Boxes, k: Boxes, group: int = 0) -> Columns | None:
        """Integer columns [n] of pairs of boxes [n]: pairs with equal token counts, steps and columns have equal masks.

        It lets a plan evaluate one mask per kind of pair instead of one per pair; None costs time, never correctness.
        """
        return None

    def with_sources(self, sources: Sequence[Source]) -> "Rule":
        """The rule over `sources`, its own among them. Nobody sees the keys of the others, unless the rule only hides
        (masks, isolation) and treats them like any key it says nothing about."""
        return self if self.sources == tuple(sources) else Rehomed(self, sources)

    def tile_step(self, segment: int) -> Grid:
        """Step per axis between the tokens of a good tile (dilated and grid patterns); (1, 1, 1) otherwise."""
        return (1, 1, 1)

    def tiles(self, segment: int, size: int) -> Grid | str | None:
        """Shape of a good tile of `size` tokens of the target, where the rule has tiles of its own.

        RUNS: runs of tokens in raster order, for which a plan takes the rule's linear form. None: a plan searches.
        """
        return None

    def linear(self) -> "Rule | None":
        """The rule on the layout with every segment as one run (`patterns.linear.flat`), if it has a direct form."""
        return None

    def partition(self, segment: int, group: int = 0) -> Ints | None:
        """Class of every token when the rule is an equivalence relation inside own segment `segment`, else None."""
        return None


class Rehomed(Rule):
    """A rule whose sources are renumbered into a longer list of sources."""

    def __init__(self, rule: Rule, sources: Sequence[Source]) -> None:
        super().__init__(rule.layout, sources)
        self.rule, self.groups = rule, rule.groups
        own = len(rule.layout.segments)
        known = {source: own + i for i, source in enumerate(rule.sources)}
        extra = [known.get(source, -1) for source in sources]
        self._local = np.array([*range(own), *extra], np.int64)

    def allowed(self, q: Coords, k: Coords, group: int = 0) -> Bools:
        local = self._local[k.segment]
        return self.rule.allowed(q, k._replace(segment=np.maximum(local, 0)), group) & (local >= 0)

    def tile_relation(self, q: Boxes, k: Boxes, group: int = 0) -> Relation:
        local = self._local[k.segment]
        relation = self.rule.tile_relation(q, k._replace(segment=np.maximum(local, 0)), group)
        return np.where(local >= 0, relation, NONE)

    def key_box(self, q: Boxes, segment: int, group: int = 0) -> Span:
        local = int(self._local[segment])
        return self.rule.key_box(q, local, group) if local >= 0 else empty_span(q)

    def signature(self, q: Boxes, k: Boxes, group: int = 0) -> Columns | None:
        local = self._local[k.segment]
        columns = self.rule.signature(q, k._replace(segment=local), group)
        return columns if columns is None or self.sources == self.rule.sources else [*columns, np.minimum(local, 0)]

    def with_sources(self, sources: Sequence[Source]) -> Rule:
        return self.rule.with_sources(sources)

    def tile_step(self, segment: int) -> Grid:
        local = int(self._local[segment])
        return self.rule.tile_step(local) if local >= 0 else (1, 1, 1)

    def tiles(self, segment: int, size: int) -> Grid | str | None:
        local = int(self._local[segment])
        return self.rule.tiles(local, size) if local >= 0 else None

    def partition(self, segment: int, group: int = 0) -> Ints | None:
        return self.rule.partition(segment, group)


class _Combined(Rule):
    """Several rules over one layout with their sources joined; equal sources are shared."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        sources = tuple(dict.fromkeys(source for rule in rules for source in rule.sources))
        _require_distinct_names(sources)
        super().__init__(rules[0].layout, sources)
        self.rules = tuple(rule.with_sources(sources) for rule in rules)

    def with_sources(self, sources: Sequence[Source]) -> Rule:
        return self if self.sources == tuple(sources) else type(self)([r.with_sources(sources) for r in self.rules])

    def tile_step(self, segment: int) -> Grid:
        steps = {rule.tile_step(segment) for rule in self.rules} - {(1, 1, 1)}
        return steps.pop() if len(steps) == 1 else (1, 1, 1)

    def tiles(self, segment: int, size: int) -> Grid | str | None:
        """What the parts agree on; runs win, since boxes are ragged on a mask of runs."""
        found = {rule.tiles(segment, size) for rule in self.rules} - {None}
        return RUNS if RUNS in found else found.pop() if len(found) == 1 else None


class _MenuRule(_Combined):
    """One rule per group."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        super().__init__(rules)
        self.groups = len(rules)

    def allowed(self, q: Coords, k: Coords, group: int = 0) -> Bools:
        return self.rules[group].allowed(q, k)

    def tile_relation(self, q: Boxes, k: Boxes, group: int = 0) -> Relation:
        return self.rules[group].tile_relation(q, k)

    def key_box(self, q: Boxes, segment: int, group: int = 0) -> Span:
        return self.rules[group].key_box(q, segment)

    def signature(self, q: Boxes, k: Boxes, group: int = 0) -> Columns | None:
        return self.rules[group].signature(q, k)

    def partition(self, segment: int, group: int = 0) -> Ints | None:
        return self.rules[group].partition(segment)


class _JoinedRule(_Combined):
    """Rules joined by OR or AND; a part with one group serves every group."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        super().__init__(rules)
        menus = {rule.groups for rule in rules} - {1}
        if len(menus) > 1:
            raise ConfigError(
                f"Patterns with {' and '.join(map(str, sorted(menus)))} groups are combined; give every PerHead as "
                "many entries as the others."
            )
        self.groups = max(rule.groups for rule in rules)

    def signature(self, q: Boxes, k: Boxes, group: int = 0) -> Columns | None:
        parts = [rule.signature(q, k, g) for rule, g in self._each(group)]
        return None if any(part is None for part in parts) else [column for part in parts for column in part]

    def _each(self, group: int) -> list[tuple[Rule, int]]:
        return [(rule, group if rule.groups > 1 else 0) for rule in self.rules]


class UnionRule(_JoinedRule):
    def allowed(self, q: Coords, k: Coords, group: int = 0) -> Bools:
        return np.logical_or.reduce([rule.allowed(q, k, g) for rule, g in self._each(group)])

    def tile_relation(self, q: Boxes, k: Boxes, group: int = 0) -> Relation:
        return np.maximum.reduce([rule.tile_relation(q, k, g) for rule, g in self._each(group)])

    def key_box(self, q: Boxes, segment: int, group: int = 0) -> Span:
        spans = [rule.key_box(q, segment, g) for rule, g in self._each(group)]
        far = max(self.key_segments[segment].shape)
        filled = [np.all(hi > lo, axis=-1, keepdims=True) for lo, hi in spans]
        lows = [np.where(some, lo, far) for some, (lo, _) in zip(filled, spans, strict=True)]
        highs = [np.where(some, hi, 0) for some, (_, hi) in zip(filled, spans, strict=True)]
        return np.where(np.logical_or.reduce(filled), np.minimum.reduce(lows), 0), np.maximum.reduce(highs)

    def partition(self, segment: int, group: int = 0) -> Ints | None:
        whole = whole_segment(self.layout, segment)
        relations = [(rule.tile_relation(whole, whole, g), rule, g) for rule, g in self._each(group)]
        if any(relation == FULL for relation, _, _ in relations):
            return np.zeros(self.layout.segments[segment].length, np.int64)
        active = [(rule, g) for relation, rule, g in relations if relation != NONE]
        return active[0][0].partition(segment, active[0][1]) if len(active) == 1 else None


class _IntersectionRule(_JoinedRule):
    def allowed(self, q: Coords, k: Coords, group: int = 0) -> Bools:
        return np.logical_and.reduce([rule.allowed(q, k, g) for rule, g in self._each(group)])

    def tile_relation(self, q: Boxes, k: Boxes, group: int = 0) -> Relation:
        return np.minimum.reduce([rule.tile_relation(q, k, g) for rule, g in self._each(group)])

    def key_box(self, q: Boxes, segment: int, group: int = 0) -> Span:
        spans = [rule.key_box(q, segment, g) for rule, g in self._each(group)]
        return np.maximum.reduce([lo for lo, _ in spans]), np.minimum.reduce([hi for _, hi in spans])

    def partition(self, segment: int, group: int = 0) -> Ints | None:
        labels = [rule.partition(segment, g) for rule, g in self._each(group)]
        if any(label is None for label in labels):
            return None
        return np.unique(np.stack(labels), axis=1, return_inverse=True)[1].reshape(-1)


@dataclass(frozen=True, repr=False)
class Union(Pattern):
    """A key is visible when any part shows it; one softmax runs over the union. Written `a | b`."""

    parts: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", _checked("Union", self.parts))

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        return UnionRule([part.bind(layout, data) for part in self.parts])

    def clamped(self, grid: Grid) -> Pattern:
        return Union(tuple(part.clamped(grid) for part in self.parts))

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.parts))


@dataclass(frozen=True, repr=False)
class Intersection(Pattern):
    """A key is visible when every part shows it. Written `a & b`."""

    parts: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", _checked("Intersection", self.parts))

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        return _IntersectionRule([part.bind(layout, data) for part in self.parts])

    def clamped(self, grid: Grid) -> Pattern:
        return Intersection(tuple(part.clamped(grid) for part in self.parts))

    def __repr__(self) -> str:
        return " & ".join(f"({part!r})" if isinstance(part, Union) else repr(part) for part in self.parts)


@dataclass(frozen=True)
class PerHead(Pattern):
    """A menu of patterns; the `groups` tensor of an attention call picks one per head.

    Raises:
        ConfigError: an empty menu, or a menu inside a menu (when bound).
    """

    parts: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", _checked("PerHead", self.parts))

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        rules = [part.bind(layout, data) for part in self.parts]
        if any(rule.groups > 1 for rule in rules):
            raise ConfigError(f"{self!r} holds a PerHead inside a PerHead; list all entries in one PerHead.")
        return _MenuRule(rules)

    def clamped(self, grid: Grid) -> Pattern:
        return PerHead(tuple(part.clamped(grid) for part in self.parts))


def combined_of(rule: Rule) -> tuple[Rule, ...] | None:
    """The parts of a union, an intersection or a menu, None for any other rule."""
    return rule.rules if isinstance(rule, _Combined) else None


def whole_segment(layout: Layout, segment: int) -> Boxes:
    """The box of all tokens of an own segment."""
    return Boxes(np.int64(segment), np.zeros(3, np.int64), np.array(layout.segments[segment].shape, np.int64))


def empty_span(q: Boxes) -> Span:
    """An empty key box for every query box."""
    shape = np.broadcast_shapes(np.shape(q.segment), np.shape(q.lo)[:-1])
    return np.zeros((*shape, 3), np.int64), np.zeros((*shape, 3), np.int64)


def _parts(kind: type, first: Pattern, second: Pattern) -> tuple[Pattern, ...]:
    flat = [part.parts if isinstance(part, kind) else (part,) for part in (first, second)]
    return flat[0] + flat[1]


def _checked(what: str, parts: Sequence[Pattern]) -> tuple[Pattern, ...]:
    items = tuple(parts)
    if not items or not all(isinstance(part, Pattern) for part in items):
        raise ConfigError(f"{what} parts={parts!r} is not allowed; pass one or more patterns in a tuple.")
    return items


def _require_distinct_names(sources: Sequence[Source]) -> None:
    names = [source.name for source in sources]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ConfigError(f"Key sources share the name {', '.join(sorted(twice))}; give each its own name.")
