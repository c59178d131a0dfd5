"""Pooled keys: cells of the target averaged to extra keys, seen by geometry, in the same softmax as exact keys.

`Pooled` is one grid of cells; `Proxy`, `Pyramid`, `VaryingWindow` and `HiLo` combine such grids with exact tokens so
that no token is counted twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite

import numpy as np

from gensparse.errors import ConfigError
from gensparse.layout import Boxes, Coords, Grid, Ints, Layout, Segment
from gensparse.patterns.axes import Axis, SeparableRule
from gensparse.patterns.base import (
    FULL,
    NO_DATA,
    NONE,
    Bools,
    Columns,
    Data,
    Pattern,
    PerHead,
    Relation,
    Rule,
    Source,
    Span,
    UnionRule,
    empty_span,
)
from gensparse.patterns.blocks import Blocks
from gensparse.patterns.box import Box
from gensparse.patterns.checks import (
    PerAxis,
    PerAxisOrWhole,
    choice,
    not_above,
    per_axis,
    spread,
    whole_number,
    windows,
)

BIASES = ("none", "log_count", "log_share")


@dataclass(frozen=True)
class Pooled(Pattern):
    """One extra key per cell of the target grid, seen by target queries only; text queries do not see it.

    Args:
        cells: tokens per cell and axis, one value (every axis longer than one token) or (H, W) or (F, H, W).
        weights: "learned": keys and values are sums with a weight per position in the cell, which the caller passes
            (CLEAR, Liu et al. 2412.16112; the cells must divide the grid). "mean": plain averages, ragged cells at the
            ends allowed.
        bias: added to the logits. "none"; "log_count": ln(tokens in the cell), for pooled keys next to exact ones;
            "log_share": ln(tokens in the cell / tokens in a whole cell), which only lessens ragged cells; or a number.
        name: name of the key source; by default made of the settings above, so that equal pools are made once.
        shift: tokens before the first whole cell, less than the cell; the first cell is then ragged. Not with learned
            weights.
        exclude: which cells a query does not see: None, "own" (the cell it lies in), or a pattern (all cells with a
            token that the pattern shows it, which are then seen exactly; see `Pyramid` for windows that cut cells).

    Raises:
        ConfigError: values of the wrong type or range, or (when bound) cells longer than an axis or, with learned
            weights, cells that do not divide it; an excluded pattern with key sources or a menu.
    """

    cells: PerAxis
    weights: str = "learned"
    bias: str | float = "none"
    name: str = ""
    shift: PerAxis = 0
    exclude: str | Pattern | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "cells", per_axis("Pooled cells", self.cells))
        choice("Pooled weights", self.weights, ("learned", "mean"))
        object.__setattr__(self, "bias", _bias("Pooled bias", self.bias))
        object.__setattr__(self, "shift", per_axis("Pooled shift", self.shift, low=0))
        not_above("Pooled shift", self.shift, "cells", self.cells, strict=True)
        if not isinstance(self.name, str):
            raise ConfigError(f"Pooled name={self.name!r} is not allowed; pass a string.")
        if not isinstance(self.exclude, Pattern) and self.exclude not in (None, "own"):
            raise ConfigError(f"Pooled exclude={self.exclude!r} is not allowed; pass None, 'own' or a pattern.")

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        grid = layout.grid
        cells = windows("Pooled cells", self.cells, grid)
        shift = spread("Pooled shift", self.shift, grid, single=0)
        not_above("Pooled shift", shift, "cells", cells, strict=True)
        uneven = any(length % cell for cell, length in zip(cells, grid, strict=True))
        if self.weights == "learned" and (uneven or any(shift)):
            raise ConfigError(
                f"Pooled cells={self.cells!r} shift={self.shift!r} does not divide grid {grid}, which learned weights "
                "need; choose cells that divide it without a shift, or weights='mean'."
            )
        cut = _Cut(grid, cells, shift)
        source = _source(layout, cut, self.weights, self.bias, self.name)
        hidden = Blocks(cells, shift) if self.exclude == "own" else self.exclude
        return _CellRule(layout, source, cut, far=None if hidden is None else _near("Pooled exclude", hidden, layout))

    def clamped(self, grid: Grid) -> "Pooled":
        cells = tuple(map(min, spread("Pooled cells", self.cells, grid), grid))
        shift = _clamped_shift(spread("Pooled shift", self.shift, grid, single=0), cells, grid)
        exclude = self.exclude.clamped(grid) if isinstance(self.exclude, Pattern) else self.exclude
        return Pooled(cells, self.weights, self.bias, self.name, shift, exclude)


@dataclass(frozen=True)
class Proxy(Pattern):
    """Exact keys of the own window, one averaged key with ln(count) for every other window, in one softmax.

    The training-free form of PT-DiT's proxy tokens (Wang et al. 2409.04005): tokens of one window have nearly the same
    attention row, so one mean stands for them. Equal to dense attention where keys and values are equal inside windows.

    Args:
        window: tokens per axis, one value or (H, W) or (F, H, W); None for the whole axis. Ragged windows allowed.
        shift: where the second window starts, less than the window; alternate 0 and window // 2 over layers against
            seams.

    Raises:
        ConfigError: values of the wrong type or range, or (when bound) a window longer than its axis.
    """

    window: PerAxisOrWhole
    shift: PerAxis = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", per_axis("Proxy window", self.window, whole=True))
        object.__setattr__(self, "shift", per_axis("Proxy shift", self.shift, low=0))
        not_above("Proxy shift", self.shift, "window", self.window, strict=True)

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        window = windows("Proxy window", self.window, layout.grid)
        shift = spread("Proxy shift", self.shift, layout.grid, single=0)
        exact = Blocks(window, shift)
        pooled = Pooled(window, weights="mean", bias="log_count", shift=shift, exclude="own")
        return UnionRule([exact.bind(layout), pooled.bind(layout)])

    def clamped(self, grid: Grid) -> "Proxy":
        blocks = Blocks(self.window, self.shift).clamped(grid)
        return Proxy(blocks.window, blocks.shift)


@dataclass(frozen=True)
class Pyramid(Pattern):
    """Near tokens exactly, cells as averaged keys with ln(count), larger ones the farther; every token counts once.

    Going from the largest cells to the smallest, a cell that is near the query is split and a far one is seen as one
    key; cells of the last level are split into tokens. With one level this is the clean form of TransNeXt's aggregated
    attention (Shi 2311.17132; there near tokens count twice) and of Combiner (Ren et al. 2107.05768).

    Args:
        cells: tokens per cell and axis of every level, small to large, each one value or (H, W) or (F, H, W). Every
            level must divide the next, or the next be the whole axis.
        near: for every level, which of its cells are split: those with a token that this pattern shows the query. An
            integer r stands for Box(r).

    Raises:
        ConfigError: not one pattern per level, values of the wrong type or range, or (when bound) cells longer than an
            axis, levels that do not divide each other, or patterns with key sources or a menu.
    """

    cells: tuple[PerAxis, ...] = (2, 4, 8)
    near: tuple[Pattern | int, ...] = (4, 8, 16)

    def __post_init__(self) -> None:
        if not all(isinstance(value, list | tuple) and value for value in (self.cells, self.near)):
            raise ConfigError(
                f"Pyramid cells={self.cells!r}, near={self.near!r} is not allowed; pass a tuple with one entry per "
                "level for both."
            )
        if len(self.cells) != len(self.near):
            raise ConfigError(
                f"Pyramid has {len(self.cells)} levels of cells and {len(self.near)} of near; pass one entry per level "
                "for both."
            )
        object.__setattr__(self, "cells", tuple(per_axis("Pyramid cells", cell) for cell in self.cells))
        patterns = tuple(
            entry if isinstance(entry, Pattern) else Box(whole_number("Pyramid near", entry, unit="tokens"))
            for entry in self.near
        )
        object.__setattr__(self, "near", patterns)

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        cuts = [_Cut(layout.grid, windows("Pyramid cells", cell, layout.grid)) for cell in self.cells]
        for fine, coarse in pairwise(cuts):
            if any(b % a and b < n for a, b, n in zip(fine.cells, coarse.cells, layout.grid, strict=True)):
                raise ConfigError(
                    f"Pyramid cells={self.cells!r} do not nest on grid {layout.grid}; pass levels that divide the next."
                )
        near = [_near("Pyramid near", pattern, layout) for pattern in self.near]
        splits = list(zip(near, cuts, strict=True))
        rules = [_CellRule(layout, None, _Cut(layout.grid, (1, 1, 1)), splits)]
        for level, cut in enumerate(cuts):
            source = _source(layout, cut, "mean", "log_count")
            rules.append(_CellRule(layout, source, cut, splits[level + 1 :], near[level]))
        return UnionRule(rules)

    def clamped(self, grid: Grid) -> "Pyramid":
        """Cells cut to the axis; levels that became equal to the next larger one are left out."""
        cells = [tuple(map(min, spread("Pyramid cells", cell, grid), grid)) for cell in self.cells]
        kept = [i for i, cell in enumerate(cells) if cell not in cells[i + 1 :]]
        return Pyramid(tuple(cells[i] for i in kept), tuple(self.near[i].clamped(grid) for i in kept))


@dataclass(frozen=True)
class VaryingWindow(Pattern):
    """A window of queries sees a context `ratio` times as long per axis, averaged down to the window's size.

    The training-free form of varied-size windows (VSA, Zhang et al. 2204.08446), where learned grids sample keys: here
    cells of `ratio` tokens are averaged, and the `window` cells nearest to the centre of the query's window are seen.
    At the borders they are moved inwards, so that every query has prod(window) keys where the grid has as many cells.

    Args:
        window: queries per window and cells per context, one value or (H, W) or (F, H, W).
        ratio: tokens per cell and axis; 1 is plain windows where they divide the grid.
        bias: as for `Pooled`; "log_count" where text is seen in the same softmax.

    Raises:
        ConfigError: values of the wrong type or range, or (when bound) longer than an axis.
    """

    window: PerAxis
    ratio: PerAxis = 2
    bias: str | float = "log_share"

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", per_axis("VaryingWindow window", self.window))
        object.__setattr__(self, "ratio", per_axis("VaryingWindow ratio", self.ratio))
        object.__setattr__(self, "bias", _bias("VaryingWindow bias", self.bias))

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        window = windows("VaryingWindow window", self.window, layout.grid)
        ratio = windows("VaryingWindow ratio", self.ratio, layout.grid)
        context = SeparableRule(layout, [_context(*axis) for axis in zip(layout.grid, window, ratio, strict=True)])
        cut = _Cut(layout.grid, ratio)
        return _CellRule(layout, _source(layout, cut, "mean", self.bias), cut, [(context, cut)])

    def clamped(self, grid: Grid) -> "VaryingWindow":
        window, ratio = (
            tuple(map(min, spread(f"VaryingWindow {name}", value, grid), grid))
            for name, value in (("window", self.window), ("ratio", self.ratio))
        )
        return VaryingWindow(window, ratio, self.bias)


@dataclass(frozen=True)
class HiLo(Pattern):
    """Some heads inside windows, the others over the averaged tokens of all windows (LITv2, Pan et al. 2205.13213).

    A menu of two entries: 0 is the windows (high frequencies), 1 the averages (low). Pass
    `torch.tensor([pattern.head_groups])` as `groups` of the attention call.

    Args:
        window: tokens per window and axis, one value or (H, W) or (F, H, W); 1 is dense on the low heads.
        heads: attention heads of the model.
        low_heads: how many heads are low, the last ones (the paper: half), or which ones. The heads of a pretrained
            model differ: choose those that attend far.
        bias: of the averages, as for `Pooled`; "log_count" where text is seen in the same softmax.

    Raises:
        ConfigError: values of the wrong type or range, or (when bound) a window longer than its axis.
    """

    window: PerAxis
    heads: int
    low_heads: int | tuple[int, ...]
    bias: str | float = "log_share"

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", per_axis("HiLo window", self.window))
        object.__setattr__(self, "heads", whole_number("HiLo heads", self.heads))
        low = self.low_heads
        if isinstance(low, list | tuple):
            chosen = {whole_number("HiLo low_heads", head, low=0, high=self.heads - 1) for head in low}
            object.__setattr__(self, "low_heads", tuple(sorted(chosen)))
        else:
            object.__setattr__(self, "low_heads", whole_number("HiLo low_heads", low, low=0, high=self.heads))
        object.__setattr__(self, "bias", _bias("HiLo bias", self.bias))

    @property
    def head_groups(self) -> tuple[int, ...]:
        """Entry of the menu for every head: 0 windows, 1 averages."""
        low = self.low_heads
        chosen = low if isinstance(low, tuple) else range(self.heads - low, self.heads)
        return tuple(int(head in chosen) for head in range(self.heads))

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        averages = Pooled(self.window, weights="mean", bias=self.bias)
        return PerHead((Blocks(self.window), averages)).bind(layout, data)

    def clamped(self, grid: Grid) -> "HiLo":
        window = tuple(map(min, spread("HiLo window", self.window, grid), grid))
        return HiLo(window, self.heads, self.low_heads, self.bias)


class _Cut:
    """The target grid cut into cells; `shift` tokens lie before the first whole cell."""

    def __init__(self, grid: Grid, cells: Grid, shift: Grid = (0, 0, 0)) -> None:
        self.cells, self.shift = cells, shift
        self._grid, self._size = np.array(grid, np.int64), np.array(cells, np.int64)
        self._lead = -np.array(shift, np.int64) % self._size
        frames, height, width = (-(-(self._grid + self._lead) // self._size)).tolist()
        self.shape: Grid = (frames, height, width)

    def tokens(self, lo: Ints, hi: Ints) -> Span:
        """The box of tokens in a box of cells."""
        return np.maximum(lo * self._size - self._lead, 0), np.minimum(hi * self._size - self._lead, self._grid)

    def around(self, lo: Ints, hi: Ints) -> Span:
        """The box of cells around a box of tokens; empty boxes stay empty."""
        return (lo + self._lead) // self._size, np.where(hi > lo, (hi - 1 + self._lead) // self._size + 1, 0)


class _CellRule(Rule):
    """Cells of the target (without a source: its tokens), chosen by the cells the query is near to.

    A query is near to a cell when a rule shows it one of its tokens. It sees the keys that lie in near cells of every
    pair in `splits` and that are themselves far by the rule `far`.
    """

    def __init__(
        self,
        layout: Layout,
        source: Source | None,
        cut: _Cut,
        splits: Sequence[tuple[Rule, _Cut]] = (),
        far: Rule | None = None,
    ) -> None:
        super().__init__(layout, () if source is None else (source,))
        self._target = layout.target
        self._keys = layout.target if source is None else len(layout.segments)
        self._cut, self._splits, self._far = cut, tuple(splits), far

    def allowed(self, q: Coords, k: Coords, group: int = 0) -> Bools:
        one = Boxes(q.segment, q.position, q.position + 1)
        lo, hi = self._cut.tokens(k.position, k.position + 1)
        seen = (q.segment == self._target) & (k.segment == self._keys)
        for rule, cut in self._splits:
            seen = seen & (rule.tile_relation(one, self._box(*_whole_cells(cut, lo, hi))) != NONE)
        if self._far is not None:
            seen = seen & (self._far.tile_relation(one, self._box(lo, hi)) == NONE)
        return seen

    def tile_relation(self, q: Boxes, k: Boxes, group: int = 0) -> Relation:
        filled = np.all(q.hi > q.lo, axis=-1) & np.all(k.hi > k.lo, axis=-1)
        some = every = filled & (q.segment == self._target) & (k.segment == self._keys)
        lo, hi = self._cut.tokens(k.lo, k.hi)
        for rule, cut in self._splits:
            relation = rule.tile_relation(q, self._box(*_whole_cells(cut, lo, hi)))
            some, every = some & (relation != NONE), every & (relation == FULL)
        if self._far is not None:
            relation = self._far.tile_relation(q, self._box(lo, hi))
            some, every = some & (relation != FULL), every & (relation == NONE)
        return np.where(some, np.where(every, FULL, np.int8(1)), NONE)

    def key_box(self, q: Boxes, segment: int, group: int = 0) -> Span:
        none, _ = empty_span(q)
        seen = np.all(q.hi > q.lo, axis=-1) & (q.segment == self._target) & (segment == self._keys)
        lo, hi = none, np.where(seen[..., None], self._cut.shape, none)
        for rule, cut in self._splits:
            near = self._cut.around(*_whole_cells(cut, *rule.key_box(q, self._target)))
            lo, hi = np.maximum(lo, near[0]), np.minimum(hi, near[1])
        return np.where(seen[..., None], lo, none), hi

    def signature(self, q: Boxes, k: Boxes, group: int = 0) -> Columns | None:
        member = (q.segment == self._target) & (k.segment == self._keys)
        lo, hi = self._cut.tokens(k.lo, k.hi)
        boxes = [(rule, *_whole_cells(cut, lo, hi)) for rule, cut in self._splits]
        if self._far is not None:
            boxes.append((self._far, lo, hi))
        columns: Columns = [member.astype(np.int64), *_masked(member, hi - lo)]
        for rule, first, last in boxes:
            box = self._box(np.where(member[:, None], first, 0), np.where(member[:, None], last, 1))
            own = rule.signature(q, box)
            if own is None:
                return None
            columns += [*own, *_masked(member, lo - first), *_masked(member, last - first)]
        return columns

    def _box(self, lo: Ints, hi: Ints) -> Boxes:
        return Boxes(np.int64(self._target) + np.zeros(lo.shape[:-1], np.int64), lo, hi)


def _whole_cells(cut: _Cut, lo: Ints, hi: Ints) -> Span:
    """A box of tokens grown to whole cells."""
    return cut.tokens(*cut.around(lo, hi))


def _masked(member: Bools, columns: Ints) -> Columns:
    return [np.where(member, column, 0) for column in columns.T]


def _source(layout: Layout, cut: _Cut, weights: str, bias: str | float, name: str = "") -> Source:
    parts = ["pooled", "x".join(map(str, cut.cells)), weights]
    parts += [f"shift{'x'.join(map(str, cut.shift))}"] if any(cut.shift) else []
    parts += [] if bias == "none" else [str(bias)]
    frames, height, width = cut.shape
    segment = Segment("pooled", frames * height * width, cut.shape, name or "_".join(parts))
    return Source(segment, layout.target, cut.cells, weights, 0.0 if bias == "none" else bias, cut.shift)


def _near(what: str, pattern: Pattern, layout: Layout) -> Rule:
    rule = pattern.bind(layout)
    if rule.sources or rule.groups > 1:
        raise ConfigError(f"{what}={pattern!r} has key sources or a menu; pass a pattern of own tokens alone.")
    return rule


def _bias(what: str, value: str | float) -> str | float:
    if isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value):
        return float(value)
    choice(what, value, BIASES)
    return value


def _clamped_shift(shift: Grid, cells: Grid, grid: Grid) -> Grid:
    """No shift on an axis of one cell, and less than the cell on the others."""
    frames, rows, columns = (
        0 if cell == length else min(first, cell - 1) for first, cell, length in zip(shift, cells, grid, strict=True)
    )
    return frames, rows, columns


def _context(length: int, window: int, ratio: int) -> Axis:
    """The 1-D rule of VaryingWindow in tokens: `window` cells of `ratio` tokens around the query's window."""
    cells = -(-length // ratio)
    start = np.arange(length) // window * window
    first = (2 * start + window * (1 - ratio) + ratio) // (2 * ratio)  # centred, rounded to the nearest cell
    first = np.clip(first, 0, max(cells - window, 0))
    return Axis(first * ratio, np.minimum((first + window) * ratio, length))
