"""Policies between segments: who sees whom wholly, tokens that are hidden, subjects that are isolated."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from gensparse.errors import ConfigError
from gensparse.layout import KINDS, Boxes, Coords, Layout, Segment
from gensparse.patterns.arrays import token_mask, token_numbers
from gensparse.patterns.base import FULL, NO_DATA, NONE, Bools, Columns, Data, Pattern, Relation, Rule, Span, empty_span
from gensparse.patterns.linear import flat
from gensparse.patterns.shared import Share, SharedRule

ITSELF = "itself"


@dataclass(frozen=True)
class Text(Pattern):
    """Text and register queries see every own token, and everybody sees text and registers.

    Pooled keys are not covered (in CLEAR only picture tokens see them), and padding neither sees nor is seen.
    """

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        return _TextRule(layout)


class _TextRule(Rule):
    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        kinds = [segment.kind for segment in layout.segments]
        word = np.array([kind in ("text", "register") for kind in kinds])
        own = np.array([kind != "pad" for kind in kinds])
        self._table = (word[:, None] | word[None, :]) & own[:, None] & own[None, :]

    def allowed(self, q: Coords, k: Coords, group: int = 0) -> Bools:
        return self._table[q.segment, k.segment]

    def tile_relation(self, q: Boxes, k: Boxes, group: int = 0) -> Relation:
        filled = np.all(q.hi > q.lo, axis=-1) & np.all(k.hi > k.lo, axis=-1)
        return np.where(filled & self._table[q.segment, k.segment], FULL, NONE)

    def signature(self, q: Boxes, k: Boxes, group: int = 0) -> Columns:
        return [self.tile_relation(q, k, group).astype(np.int64)]

    def key_box(self, q: Boxes, segment: int, group: int = 0) -> Span:
        lo, hi = empty_span(q)
        seen = np.all(q.hi > q.lo, axis=-1) & self._table[q.segment, segment]
        return lo, np.where(seen[..., None], self.layout.segments[segment].shape, hi)

    def linear(self) -> Rule:
        return _TextRule(flat(self.layout))


@dataclass(frozen=True)
class Policy(Pattern):
    """Segments that see other segments wholly.

    `Policy((("target", "target"), ("reference", "itself")))`: the target sees itself, and so does every reference, but
    no reference sees another one.

    Args:
        sees: pairs (queries, keys), each the kind of a segment or its name; a kind may be absent from the layout. As
            keys also "itself": every segment of the queries sees its own tokens.

    Raises:
        ConfigError: no pairs, or (when bound) a label that is neither a kind nor the name of a segment.
    """

    sees: tuple[tuple[str, str], ...]

    def __post_init__(self) -> None:
        pairs = tuple(tuple(pair) if isinstance(pair, list | tuple) else pair for pair in self.sees)
        if not pairs or not all(_is_pair(pair) for pair in pairs):
            raise ConfigError(
                f"Policy sees={self.sees!r} is not allowed; pass pairs (queries, keys) of kinds or names of segments."
            )
        object.__setattr__(self, "sees", pairs)

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        number = segment_numbers(layout.segments)
        shares = []
        for queries, keys in self.sees:
            rows = select(f"Policy sees={self.sees!r}", layout.segments, queries)
            if keys == ITSELF:
                shares += [Share(number == row, number == row) for row in rows]
            else:
                columns = select(f"Policy sees={self.sees!r}", layout.segments, keys)
                shares.append(Share(np.isin(number, rows), np.isin(number, columns)))
        return SharedRule(layout, shares)


@dataclass(frozen=True)
class KeyMask(Pattern):
    """Hides the keys of a segment where a mask is 0, and nothing else: `pattern & KeyMask("subject")`.

    Keys of sources stay visible; `Reference` has masks of its own.

    Args:
        name: array of the data, 1 for every token that is kept.
        segment: kind or name of one segment.

    Raises:
        ConfigError: (when bound) no such array, another shape, or `segment` is not exactly one segment.
    """

    name: str
    segment: str = "target"

    def __post_init__(self) -> None:
        _texts("KeyMask", name=self.name, segment=self.segment)

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        keep = _kept(repr(self), layout, data, self.name, self.segment)
        return SharedRule(layout, [Share(np.ones(layout.tokens, bool), keep)], filters=True)


@dataclass(frozen=True)
class QueryMask(Pattern):
    """Hides every key from the queries of a segment where a mask is 0: `pattern & QueryMask("region")`.

    Args:
        name: array of the data, 1 for every query that sees what the other pattern shows.
        segment: kind or name of one segment.

    Raises:
        ConfigError: (when bound) no such array, another shape, or `segment` is not exactly one segment.
    """

    name: str
    segment: str = "target"

    def __post_init__(self) -> None:
        _texts("QueryMask", name=self.name, segment=self.segment)

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        keep = _kept(repr(self), layout, data, self.name, self.segment)
        return SharedRule(layout, [Share(keep, np.ones(layout.tokens, bool))], filters=True)


@dataclass(frozen=True)
class Isolation(Pattern):
    """Tokens of different groups do not see each other: `pattern & Isolation("subjects")` (IR-Diffusion 2411.19261).

    Two tokens of the segment are hidden from each other when both have a group and not the same one. Everything else
    stays visible, other segments and sources included.

    Args:
        groups: array of the data, the group of every token of the segment; 0 for tokens that are free.
        segment: kind or name of one segment.

    Raises:
        ConfigError: (when bound) no such array, another shape, something else than integers of at least 0, or `segment`
            is not exactly one segment.
    """

    groups: str
    segment: str = "target"

    def __post_init__(self) -> None:
        _texts("Isolation", groups=self.groups, segment=self.segment)

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        chosen = select_one(repr(self), layout.segments, self.segment)
        own = token_numbers(repr(self), self.groups, data, layout.segments[chosen])
        group = np.zeros(layout.tokens, np.int64)
        group[segment_numbers(layout.segments) == chosen] = own
        numbers = np.unique(group[group > 0])
        members = [(group == 0) | (group == number) for number in numbers] or [np.ones(layout.tokens, bool)]
        return SharedRule(layout, [Share(member, member) for member in members], filters=True)


def segment_numbers(segments: Sequence[Segment]) -> np.ndarray:
    """The number of its segment for every token."""
    return np.repeat(np.arange(len(segments)), [segment.length for segment in segments])


def select(what: str, segments: Sequence[Segment], label: str) -> list[int]:
    """Numbers of the segments of a kind or name; ConfigError for a label that is neither."""
    found = [number for number, segment in enumerate(segments) if label in (segment.kind, segment.name)]
    if not found and label not in KINDS:
        raise ConfigError(f"{what}: no segment is named {label!r}; {_names(segments)}.")
    return found


def select_one(what: str, segments: Sequence[Segment], label: str) -> int:
    """Number of the only segment of a kind or name."""
    found = select(what, segments, label)
    if len(found) != 1:
        raise ConfigError(
            f"{what}: {len(found)} segments are of kind or name {label!r}, but a mask needs one; {_names(segments)}."
        )
    return found[0]


def _names(segments: Iterable[Segment]) -> str:
    names = ", ".join(repr(segment.name) for segment in segments if segment.name) or "none"
    return f"use a name of the layout ({names}) or a kind ({', '.join(KINDS)})"


def _is_pair(pair: object) -> bool:
    return isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(label, str) and label for label in pair)


def _texts(what: str, **values: object) -> None:
    for name, value in values.items():
        if not (isinstance(value, str) and value):
            raise ConfigError(f"{what} {name}={value!r} is not allowed; pass a name.")


def _kept(what: str, layout: Layout, data: Data, name: str, label: str) -> Bools:
    """bool [own tokens]: False where the mask of one segment is 0."""
    chosen = select_one(what, layout.segments, label)
    keep = np.ones(layout.tokens, bool)
    keep[segment_numbers(layout.segments) == chosen] = token_mask(what, name, data, layout.segments[chosen])
    return keep
