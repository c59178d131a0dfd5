"""Halo: every process attends with all heads over a strip of rows of the picture, and fetches the rows around it.

For patterns that look at a neighbourhood this moves far less than `ulysses`: a few rows of keys and values per call.
Text, and every other segment but the target, is held by all processes. Picture tokens of a strip see those, their own
rows and the fetched ones. Text sees the whole picture: each process computes its part over its own rows, and the parts
are joined by their log-sum-exp, which is exact.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gensparse.attention import sparse_attention
from gensparse.errors import ConfigError, LayoutMismatchError
from gensparse.kernels.merge import merge_lse
from gensparse.layout import Boxes, Coords, Layout, Segment
from gensparse.parallel.team import Team
from gensparse.patterns import RoutedPattern
from gensparse.patterns.base import (
    NO_DATA,
    NONE,
    Bools,
    Columns,
    Data,
    Pattern,
    Relation,
    Rule,
    Source,
    Span,
    empty_span,
)
from gensparse.plan import Plan, build_plan

Rows = tuple[int, int]
"""First and last + 1 row of the target."""


@dataclass(frozen=True, eq=False)
class Strips:
    """A pattern on a picture whose rows are divided among processes; see `divide`.

    Args:
        pattern, layout: of the whole sequence.
        team: the processes.
        rows: strip of every process.
        needed: rows whose keys the strip of every process sees, its own among them.
        data: arrays that the pattern names.
    """

    pattern: Pattern
    layout: Layout
    team: Team
    rows: tuple[Rows, ...]
    needed: tuple[Rows, ...]
    data: Data = field(default_factory=dict, repr=False)

    @cached_property
    def own(self) -> Layout:
        """The layout of this process's tokens: every segment, of the target its own rows."""
        frames, _, columns = self.layout.grid
        first, last = self.rows[self.team.rank]
        return Layout(
            Segment(part.kind, (last - first) * frames * columns, (frames, last - first, columns), part.name)
            if part.kind == "target"
            else part
            for part in self.layout.segments
        )

    @cached_property
    def tokens(self) -> Tensor:
        """Numbers of this process's tokens in the whole sequence, int64; `x[:, strips.tokens]` takes them out."""
        frames, height, columns = self.layout.grid
        start, length = self.layout.starts[self.layout.target], prod(self.layout.grid)
        picture = torch.arange(start, start + length).view(frames, height, columns)[
            :, slice(*self.rows[self.team.rank])
        ]
        before, behind = torch.arange(start), torch.arange(start + length, self.layout.tokens)
        return torch.cat([before, picture.flatten(), behind])

    @property
    def fetched(self) -> int:
        """Tokens whose keys and values this process gets from others in every call."""
        frames, _, columns = self.layout.grid
        (first, last), (low, high) = self.rows[self.team.rank], self.needed[self.team.rank]
        return (high - low - (last - first)) * frames * columns

    @property
    def halos(self) -> tuple[Rows, Rows]:
        """Rows above and below the strip that are fetched."""
        (first, last), (low, high) = self.rows[self.team.rank], self.needed[self.team.rank]
        return (low, first), (last, high)

    def plan(self, device: torch.device | str = "cpu") -> Plan:
        """The plan of this process's tokens, with the fetched rows as sources of keys; from the plans' cache."""
        pattern = _Strip(self.pattern, self.layout, self.team.rank, self.rows, self.halos)
        return build_plan(pattern, self.own, data=self.data, device=device)

    def halo_of(self, x: Tensor) -> dict[str, Tensor]:
        """The fetched rows of x [B, own tokens, heads, D] by source: [B, rows * ..., heads, D]."""
        frames, _, columns = self.layout.grid
        first, last = self.rows[self.team.rank]
        start = self.layout.starts[self.layout.target]
        count = (last - first) * frames * columns
        strip = x[:, start : start + count].unflatten(1, (frames, last - first, columns))
        given, sizes = [], []
        for rank in range(self.team.size):
            low, high = self._given(self.team.rank, rank)
            given.append(strip[:, :, low - first : high - first].permute(2, 0, 1, 3, 4, 5).reshape(-1))
            low, high = self._given(rank, self.team.rank)
            sizes.append((high - low) * x.shape[0] * frames * columns * prod(x.shape[2:]))
        flat = torch.empty(sum(sizes), dtype=x.dtype, device=x.device)
        sent = [part.numel() for part in given]
        dist.all_to_all_single(flat, torch.cat(given), sizes, sent, group=self.team.group)
        rows = flat.view(-1, x.shape[0], frames, columns, *x.shape[2:]).permute(1, 2, 0, 3, 4, 5)
        (low, _), (_, high) = self.halos
        above, below = rows.split([first - low, high - last], dim=2)
        found = {"above": above, "below": below}
        return {name: part.flatten(1, 3) for name, part in found.items() if part.shape[2]}

    def _given(self, giver: int, taker: int) -> Rows:
        """Rows that one process gives to another."""
        if giver == taker:
            return self.rows[giver][0], self.rows[giver][0]
        low = max(self.rows[giver][0], self.needed[taker][0])
        return low, max(low, min(self.rows[giver][1], self.needed[taker][1]))


def divide(
    pattern: Pattern,
    layout: Layout,
    team: Team,
    *,
    data: Mapping[str, np.ndarray] | None = None,
    agree: bool = True,
) -> Strips:
    """Divide a picture into strips of rows, as even as they can be.

    Args:
        data: arrays that the pattern names.
        agree: compare the settings of all processes first; False where it was done.

    Raises:
        ConfigError: fewer rows than processes, keys chosen at run time, key sources (pooled keys), or a layout whose
            tokens are divided already.
        ParallelError: the processes disagree, or one is missing.
    """
    height = layout.grid[1]
    if height < team.size:
        raise ConfigError(f"{height} rows of tokens cannot be divided among {team.size} processes; use fewer of them.")
    if isinstance(pattern, RoutedPattern) or layout.parts > 1:
        raise ConfigError(
            f"{pattern!r} on {layout!r} cannot be divided into strips: keys are chosen at run time, or the tokens are "
            "divided already; use Ulysses."
        )
    arrays = {name: np.asarray(array) for name, array in (data or {}).items()}
    rule = pattern.bind(layout, arrays)
    if rule.sources:
        names = ", ".join(source.name for source in rule.sources)
        raise ConfigError(f"{pattern!r} has keys beside the tokens ({names}), which strips do not have; use Ulysses.")
    if agree:
        team.agree(f"strips of {pattern!r} on {layout!r}")
    cuts = (Team(None, rank, team.size, uneven=True).share(height) for rank in range(team.size))
    rows = tuple((cut.start, cut.stop) for cut in cuts)
    return Strips(pattern, layout, team, rows, tuple(_needed(rule, strip) for strip in rows), arrays)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    strips: Strips,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """Attention of this process's tokens, equal to those of one process with all tokens.

    Every process of the team has to call it. There are no gradients.

    Args:
        q, k, v: [B, S, H, D] with the tokens of `strips.own`.
        scale, groups: as in `sparse_attention`.
        key_bias: [B|1, H|1, S] of this process's tokens.

    Returns:
        [B, S, H, D]; what all processes hold (text) is equal in all of them.

    Raises:
        LayoutMismatchError: tensors of other tokens.
        ConfigError: tensors that need gradients.
    """
    if q.shape[1] != strips.own.tokens or k.shape[1] != strips.own.tokens:
        raise LayoutMismatchError(
            f"{q.shape[1]} queries and {k.shape[1]} keys, but process {strips.team.rank} holds {strips.own.tokens} "
            "tokens; pass x[:, strips.tokens] of the whole sequence."
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ConfigError("strips have no gradients; use Ulysses, or torch.no_grad().")
    keys, values = strips.halo_of(k), strips.halo_of(v)
    if key_bias is not None:
        around = strips.halo_of(key_bias.transpose(1, 2)[..., None])
        key_bias = torch.cat([key_bias, *(part[..., 0].transpose(1, 2) for part in around.values())], -1)
    out, lse = partial(q, k, v, strips, keys, values, scale=scale, key_bias=key_bias, groups=groups)
    held = shared_tokens(strips)
    if not len(held):
        return out
    held = held.to(q.device)
    parts = [_from_all(x[:, held], strips.team) for x in (out, lse)]
    out[:, held] = merge_lse(*parts)[0]
    return out


def partial(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    strips: Strips,
    keys: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """What this process can compute: outputs and log-sum-exp [B, S, H], of tokens that all hold over its keys alone."""
    sources = {name: (keys[name], values[name]) for name in keys} or None
    return sparse_attention(q, k, v, strips.plan(q.device), sources=sources, return_lse=True, **options)


def shared_tokens(strips: Strips) -> Tensor:
    """Places of the tokens that all processes hold, int64."""
    start = strips.own.starts[strips.own.target]
    return torch.cat([torch.arange(start), torch.arange(start + prod(strips.own.grid), strips.own.tokens)])


def _from_all(x: Tensor, team: Team) -> Tensor:
    """x of all processes: [P, ...]."""
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(team.size)]
    dist.all_gather(parts, x, group=team.group)
    return torch.stack(parts)


def _needed(rule: Rule, rows: Rows) -> Rows:
    """Rows whose keys a strip sees, itself among them."""
    frames, _, columns = rule.layout.grid
    box = Boxes(np.int64(rule.layout.target), np.array([0, rows[0], 0]), np.array([frames, rows[1], columns]))
    low, high = rows
    for group in range(rule.groups):
        lo, hi = rule.key_box(box, rule.layout.target, group)
        if np.all(hi > lo):
            low, high = min(low, int(lo[1])), max(high, int(hi[1]))
    return low, high


@dataclass(frozen=True)
class _Strip(Pattern):
    """A pattern as one process sees it: its rows, and the fetched ones as sources."""

    pattern: Pattern
    layout: Layout
    rank: int
    rows: tuple[Rows, ...]
    halos: tuple[Rows, Rows]

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        return _StripRule(self.pattern.bind(self.layout, data), layout, self)


class _StripRule(Rule):
    """A rule of the whole picture on one strip: coordinates are moved by whole rows.

    Tokens that all processes hold see the strip alone, without the fetched rows, and each other in process 0 only: the
    parts of all processes then hold every key once.
    """

    def __init__(self, rule: Rule, layout: Layout, strip: _Strip) -> None:
        frames, _, columns = layout.grid
        first, last = strip.rows[strip.rank]
        halos = {name: rows for name, rows in zip(("above", "below"), strip.halos, strict=True) if rows[1] > rows[0]}
        sources = tuple(
            Source(Segment("reference", (high - low) * frames * columns, (frames, high - low, columns), name))
            for name, (low, high) in halos.items()
        )
        super().__init__(layout, sources)
        self.rule, self.groups = rule, rule.groups
        own, target = len(layout.segments), layout.target
        moved = {target: (first, last), **{own + number: rows for number, rows in enumerate(halos.values())}}
        every = range(own + len(sources))
        self._segment = np.array([target if segment in moved else segment for segment in every], np.int64)
        self._first = np.array([moved.get(segment, (0, 0))[0] for segment in every], np.int64)
        self._rows = moved
        # what tokens of other segments than the target see: the strip, and each other once
        self._seen = np.array([segment == target or (segment < own and strip.rank == 0) for segment in every])

    def allowed(self, q: Coords, k: Coords, group: int = 0) -> Bools:
        return self.rule.allowed(self._whole(q), self._whole(k), group) & self._visible(q.segment, k.segment)

    def tile_relation(self, q: Boxes, k: Boxes, group: int = 0) -> Relation:
        relation = self.rule.tile_relation(self._whole_boxes(q), self._whole_boxes(k), group)
        return np.where(self._visible(q.segment, k.segment), relation, NONE)

    def key_box(self, q: Boxes, segment: int, group: int = 0) -> Span:
        lo, hi = self.rule.key_box(self._whole_boxes(q), int(self._segment[segment]), group)
        if segment in self._rows:
            first, last = self._rows[segment]
            lo, hi = np.array(lo), np.array(hi)
            lo[..., 1] = np.maximum(lo[..., 1], first) - first
            hi[..., 1] = np.minimum(hi[..., 1], last) - first
        none = empty_span(q)
        visible = self._visible(np.asarray(q.segment), np.int64(segment))[..., None]
        return np.where(visible, lo, none[0]), np.where(visible, hi, none[1])

    def signature(self, q: Boxes, k: Boxes, group: int = 0) -> Columns | None:
        columns = self.rule.signature(self._whole_boxes(q), self._whole_boxes(k), group)
        return None if columns is None else [*columns, self._visible(q.segment, k.segment).astype(np.int64)]

    def tile_step(self, segment: int) -> Any:
        return self.rule.tile_step(int(self._segment[segment]))

    def _visible(self, q_segment: Any, k_segment: Any) -> Bools:
        return (np.asarray(q_segment) == self.layout.target) | self._seen[k_segment]

    def _whole(self, at: Coords) -> Coords:
        return Coords(self._segment[at.segment], at.position + self._move(at.segment))

    def _whole_boxes(self, box: Boxes) -> Boxes:
        move = self._move(box.segment)
        return box._replace(segment=self._segment[box.segment], lo=box.lo + move, hi=box.hi + move)

    def _move(self, segment: Any) -> np.ndarray:
        rows = self._first[segment]
        return np.stack([np.zeros_like(rows), rows, np.zeros_like(rows)], axis=-1)
