"""Layout: what every token of one attention call is.

A layout is an ordered list of segments (text, target picture, references, ...) along the sequence axis. Tokens of a
segment lie on its own grid (F, H, W) in raster order. All sizes count tokens, never pixels or latent cells.

Two orders are told apart. Segment order is one segment after the other; `starts` counts in it. Sequence order is that
of the tensors of a call. They differ only under sequence parallelism, see `Layout.ulysses`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import prod
from operator import index
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gensparse.errors import ConfigError

KINDS = ("text", "target", "reference", "register", "pad", "pooled")

Grid = tuple[int, int, int]
Ints = NDArray[np.int64]


class Coords(NamedTuple):
    """Where tokens are: segment [...] and position [..., 3] = (frame, row, column) on that segment's grid."""

    segment: Ints
    position: Ints


class Boxes(NamedTuple):
    """Boxes of tokens: segment [...], lo and hi [..., 3] (hi exclusive), and the step between tokens on each axis."""

    segment: Ints
    lo: Ints
    hi: Ints
    step: Ints | int = 1


@dataclass(frozen=True)
class Segment:
    """A run of tokens of one kind.

    Args:
        kind: one of text, target, reference, register, pad, pooled.
        length: number of tokens.
        grid: (F, H, W) whose product is `length`; None for tokens without a grid, which count as (1, 1, length).
        name: free label, shown in reports.

    Raises:
        ConfigError: unknown kind, a length or axis that is not a positive integer, or a grid that does not fit.
    """

    kind: str
    length: int
    grid: Grid | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"Segment kind={self.kind!r} is unknown; use one of {', '.join(KINDS)}.")
        object.__setattr__(self, "length", _count("Segment length", self.length))
        if self.grid is not None:
            object.__setattr__(self, "grid", _grid("Segment grid", self.grid))
            if prod(self.grid) != self.length:
                raise ConfigError(
                    f"Segment grid={self.grid} holds {prod(self.grid)} tokens but length={self.length}; "
                    "pass the product of the grid as length."
                )

    @property
    def shape(self) -> Grid:
        """The grid, or (1, 1, length) for a segment without one."""
        return self.grid or (1, 1, self.length)


@dataclass(frozen=True)
class Layout:
    """Ordered segments of one attention call, exactly one of them the target.

    Args:
        segments: the segments in order.
        parts, streams: how the sequence is interleaved, see `ulysses`; 1 and () for plain segment order.

    Raises:
        ConfigError: no segment, something that is not a Segment, not exactly one target, or parts and streams that do
            not fit the segments.
    """

    segments: tuple[Segment, ...]
    parts: int = 1
    streams: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", tuple(self.segments))
        for segment in self.segments:
            if not isinstance(segment, Segment):
                raise ConfigError(f"Layout segments hold {segment!r}; pass Segment values.")
        targets = sum(segment.kind == "target" for segment in self.segments)
        if targets != 1:
            raise ConfigError(f"Layout has {targets} target segments; pass exactly one segment of kind 'target'.")
        object.__setattr__(self, "parts", _count("Layout parts", self.parts))
        object.__setattr__(self, "streams", tuple(_count("Layout streams", n) for n in self.streams))
        if self.streams and sum(self.streams) != len(self.segments):
            raise ConfigError(
                f"Layout streams={self.streams} join {sum(self.streams)} segments but there are {len(self.segments)}; "
                "pass how many consecutive segments each sharded tensor holds."
            )
        shortest = min(stop - start for start, stop in self._stream_ranges())
        if shortest < self.parts:
            raise ConfigError(
                f"Layout parts={self.parts} cannot cut a tensor of {shortest} tokens; pass at most as many parts as "
                "the shortest sharded tensor has tokens."
            )

    @classmethod
    def image(cls, height: int, width: int, *, text: int = 0, text_first: bool = True) -> "Layout":
        """One picture of height x width tokens with `text` text tokens before (FLUX) or after it."""
        return cls.joint((1, height, width), text=text, text_first=text_first)

    @classmethod
    def video(cls, frames: int, height: int, width: int, *, text: int = 0, text_first: bool = False) -> "Layout":
        """A clip of frames x height x width tokens with `text` text tokens after (HunyuanVideo) or before it."""
        return cls.joint((frames, height, width), text=text, text_first=text_first)

    @classmethod
    def joint(
        cls,
        grid: Grid,
        *,
        text: int = 0,
        text_first: bool = True,
        references: Iterable[Grid | Segment] = (),
    ) -> "Layout":
        """Text, target and references in one sequence; references follow the target, text comes first or last."""
        own = _grid_segment("target", grid)
        extra = [_reference(number, item) for number, item in enumerate(references)]
        length = _count("Layout text", text, low=0)
        words = [Segment("text", length)] if length else []
        return cls((*words, own, *extra) if text_first else (own, *extra, *words))

    @classmethod
    def ulysses(cls, layout: "Layout", parts: int, *, streams: Iterable[int] = ()) -> "Layout":
        """The order that Ulysses sequence parallelism gives the full sequence: text_0, image_0, text_1, image_1, ...

        Every sharded tensor is cut in `parts` chunks like torch.tensor_split (torch.chunk where the parts are equal),
        and after the all-to-all the chunks of rank 0 come first, then those of rank 1, and so on.

        Args:
            layout: the sequence of one process, before it is sharded.
            parts: ranks.
            streams: how many consecutive segments each sharded tensor holds; by default every segment is a tensor of
                its own. A picture and its references in one tensor, after the text: (1, 2).

        Raises:
            ConfigError: parts or streams that do not fit, or a tensor with fewer tokens than parts.
        """
        return replace(layout, parts=parts, streams=tuple(streams))

    @property
    def tokens(self) -> int:
        """Number of tokens of the whole sequence."""
        return sum(segment.length for segment in self.segments)

    @property
    def starts(self) -> tuple[int, ...]:
        """Index of the first token of every segment, in segment order."""
        return tuple(accumulate((segment.length for segment in self.segments[:-1]), initial=0))

    @property
    def target(self) -> int:
        """Index of the target segment."""
        return next(i for i, segment in enumerate(self.segments) if segment.kind == "target")

    @property
    def grid(self) -> Grid:
        """(F, H, W) of the target."""
        return self.segments[self.target].shape

    def coords(self) -> Coords:
        """Coordinates of all tokens in sequence order: segment [N], position [N, 3]."""
        coords, order = segment_coords(self.segments), self.order()
        return coords if order is None else Coords(coords.segment[order], coords.position[order])

    def order(self) -> Ints | None:
        """Segment-order index of the token at every place of the sequence [N]; None where both orders are equal."""
        if self.parts == 1:
            return None
        return np.concatenate([np.arange(*chunk) for chunk in self._chunks()])

    def places(self) -> Ints | None:
        """Place in the sequence of every token in segment order [N], the inverse of `order`."""
        order = self.order()
        if order is None:
            return None
        places = np.empty_like(order)
        places[order] = np.arange(len(order))
        return places

    def shares(self) -> tuple[int, ...]:
        """Tokens of every part, as each process holds them; one part without `ulysses`."""
        edges = [
            [_cut(stop - start, self.parts, part) for part in range(self.parts + 1)]
            for start, stop in self._stream_ranges()
        ]
        return tuple(sum(edge[part + 1] - edge[part] for edge in edges) for part in range(self.parts))

    def runs(self, segment: int) -> list[tuple[int, int]]:
        """Where the tokens of a segment stand: (first, last + 1) places of the sequence, in the segment's order."""
        first = self.starts[segment]
        last = first + self.segments[segment].length
        found, place = [], 0
        for start, stop in self._chunks():
            low, high = max(start, first), min(stop, last)
            if low < high:
                found.append((place + low - start, place + high - start))
            place += stop - start
        return found

    def _stream_ranges(self) -> list[tuple[int, int]]:
        """(first, last + 1) token of every sharded tensor, in segment order."""
        counts = self.streams or (1,) * len(self.segments)
        edges = (*self.starts, self.tokens)
        return [(edges[a], edges[b]) for a, b in pairwise(accumulate(counts, initial=0))]

    def _chunks(self) -> list[tuple[int, int]]:
        """(first, last + 1) token in segment order of every chunk of the sequence."""
        return [
            (start + _cut(stop - start, self.parts, part), start + _cut(stop - start, self.parts, part + 1))
            for part in range(self.parts)
            for start, stop in self._stream_ranges()
        ]


def segment_coords(segments: Sequence[Segment]) -> Coords:
    """Coordinates of the tokens of consecutive segments: segment [N], position [N, 3]."""
    lengths = np.array([segment.length for segment in segments], np.int64)
    numbers = np.repeat(np.arange(len(segments)), lengths)
    positions = [np.indices(segment.shape).reshape(3, -1).T for segment in segments]
    return Coords(numbers, np.concatenate(positions) if positions else np.zeros((0, 3), np.int64))


def _cut(length: int, parts: int, part: int) -> int:
    """First token of a part when `length` tokens are cut like torch.tensor_split: first parts take the remainder."""
    size, remainder = divmod(length, parts)
    return part * size + min(part, remainder)


def _reference(number: int, item: Grid | Segment) -> Segment:
    if not isinstance(item, Segment):
        return _grid_segment("reference", item, name=f"reference{number}")
    if item.kind != "reference":
        raise ConfigError(f"Layout references hold a segment of kind {item.kind!r}; pass kind 'reference' or a grid.")
    return item


def _grid_segment(kind: str, grid: Sequence[int], name: str = "") -> Segment:
    shape = _grid(f"Layout {kind} grid", grid)
    return Segment(kind, prod(shape), shape, name)


def _grid(what: str, value: Sequence[int]) -> Grid:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 3:
        raise ConfigError(f"{what}={value!r} is not a grid; pass three positive integers (frames, rows, columns).")
    frames, rows, columns = (_count(what, axis) for axis in value)
    return frames, rows, columns


def _count(what: str, value: int, low: int = 1) -> int:
    try:
        number = index(value)
    except TypeError:
        number = low - 1
    if isinstance(value, bool | np.bool_) or number < low:
        raise ConfigError(f"{what}={value!r} is not allowed; pass an integer of at least {low} (tokens).")
    return number
