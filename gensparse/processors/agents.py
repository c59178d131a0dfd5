"""Merged tokens and agent tokens: the attention of AgentSD (Han et al. 2312.08874) on queries, keys and values.

The authors merge the input of the attention module. Projections are linear, so merging queries, keys and values by
means is the same, as long as nothing comes between projection and attention. Where text stands in the sequence or
queries are rotated, only picture queries are merged, and a merged query gets the rotation of the token it became.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gensparse.errors import LayoutMismatchError
from gensparse.kernels import route
from gensparse.layout import Grid, Layout
from gensparse.processors.operators import OperatorCall

SCORE_BYTES = 1 << 26  # similarities that are held at once, 64 MiB

Rotary = tuple[Tensor, Tensor]


class Merging(NamedTuple):
    """Which tokens are merged into which, of N picture tokens of which D are destinations.

    Args:
        dst: int64 [D], ascending.
        kept: int64 [B, N - D - r], sources that stay.
        merged: int64 [B, r], sources that are merged, and `into` int64 [B, r], the number of their destination.
    """

    dst: Tensor
    kept: Tensor
    merged: Tensor
    into: Tensor

    @property
    def places(self) -> Tensor:
        """Token that stands at every place of the merged sequence, int64 [B, N - r]."""
        return torch.cat([self.kept, self.dst.expand(len(self.kept), -1)], 1)

    def merge(self, x: Tensor) -> Tensor:
        """x [B, N, ...] -> [B, N - r, ...]: sources that stay, then destinations as means of all that is in them."""
        wide = torch.promote_types(x.dtype, torch.float32)
        sums = _picked(x, self.dst.expand(len(x), -1)).to(wide)
        index = _like(self.into, sums)
        sums = sums.scatter_add(1, index, _picked(x, self.merged).to(wide))
        counts = torch.ones(len(x), len(self.dst), dtype=wide, device=x.device)
        counts = counts.scatter_add(1, self.into, torch.ones_like(self.into, dtype=wide))
        means = sums / counts.view(*counts.shape, *(1,) * (x.ndim - 2))
        return torch.cat([_picked(x, self.kept), means.to(x.dtype)], 1)

    def unmerge(self, x: Tensor) -> Tensor:
        """[B, N - r, ...] -> [B, N, ...]: everything back at its place, merged sources as their destination."""
        stay = self.kept.shape[1]
        own, merged = x[:, stay:], self.merged
        out = x.new_empty(len(x), x.shape[1] + merged.shape[1], *x.shape[2:])
        places = torch.cat([self.places, merged], 1)
        return out.scatter(1, _like(places, out), torch.cat([x, _picked(own, self.into)], 1))


class Match(NamedTuple):
    """Sources in the order in which they are merged: tokens int64 [B, N - D] and their destinations' numbers."""

    dst: Tensor
    src: Tensor
    into: Tensor

    def merging(self, count: int) -> Merging:
        """The first `count` sources merged, all of them at most."""
        count = min(count, self.src.shape[1])
        return Merging(self.dst, self.src[:, count:], self.src[:, :count], self.into[:, :count])


def match(metric: Tensor, dst: Tensor) -> Match:
    """Every source with the destination most similar to it, the most similar pairs first.

    Args:
        metric: [B, N, C], compared by cosine.
        dst: int64 [D], tokens that are destinations; all others are sources.
    """
    batch, tokens, _ = metric.shape
    is_dst = torch.zeros(tokens, dtype=torch.int8, device=metric.device).index_fill(0, dst, 1)
    order = is_dst.argsort(stable=True)
    src, dst = order[: tokens - len(dst)], order[tokens - len(dst) :]
    unit = F.normalize(metric.float(), dim=-1)
    sources, targets = unit[:, src], unit[:, dst].transpose(1, 2)
    step = max(1, SCORE_BYTES // (4 * batch * len(dst)))
    best = [(part @ targets).max(-1) for part in sources.split(step, dim=1)]
    value, into = (torch.cat([found[i] for found in best], 1) for i in range(2))
    ranked = value.argsort(dim=1, descending=True, stable=True)
    return Match(dst, src.expand(batch, -1).gather(1, ranked), into.gather(1, ranked))


def destinations(
    rows: int, columns: int, cell: tuple[int, int], numbers: tuple[int, ...] | None, device: Any
) -> Tensor:
    """One token of every whole cell of a grid, int64 [cells]: drawn from `numbers`, else the top-left one."""
    high, wide = rows // cell[0], columns // cell[1]
    number = torch.arange(high * wide, device=device)
    inside = torch.zeros_like(number)
    if numbers is not None:
        inside = route.draw(number, cell[0] * cell[1], 1, numbers)[:, 0]
    row = number // wide * cell[0] + inside // cell[1]
    return row * columns + number % wide * cell[1] + inside % cell[1]


def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    *,
    own: Tensor,
    sharpness: float,
    shortcut: float,
    scale: float | None = None,
    key_bias: Tensor | None = None,
) -> Tensor:
    """Agents read all keys, then queries read the agents: [B, Nq, H, D].

    Args:
        q, k, v: [B, N, H, D] queries, keys and values; agents [B, m, H, D] queries.
        own: [B, Nq, H, D] values that are added to the outputs, times `shortcut`.
        sharpness: exponent of the scale in the second softmax; 1 is the scale of the first, 0 none.
        key_bias: [B|1, H|1, N] added to the logits of the first softmax.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    read = attention(agents, k, v, scale, key_bias)
    return attention(q, agents, read, scale**sharpness) + shortcut * own


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None, key_bias: Tensor | None = None) -> Tensor:
    """Softmax attention of q [B, Nq, H, D] over k, v [B, Nk, H, D]; k and v may have fewer heads."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    repeat = q.shape[1] // k.shape[1]
    if repeat > 1:
        k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
    mask = None if key_bias is None else key_bias[:, :, None].to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


@dataclass(frozen=True)
class AgentAttention:
    """AgentSD's attention as an operator; see `methods.agentsd` for the settings.

    Args:
        cell: rows and columns of the cells that have one destination each.
        ratio, agent_ratio: shares of the picture tokens that are merged, for queries (and keys), and for agents.
        sharpness, shortcut: see `agent_attention`.
        hidden: whether tokens are compared by the block's input instead of the attention module's.
        random: draw the destinations instead of the top-left tokens.
        seed: of the draw.
    """

    cell: tuple[int, int]
    ratio: float
    agent_ratio: float
    sharpness: float
    shortcut: float
    hidden: bool
    random: bool
    seed: int

    def key(self) -> str:
        return repr(self)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: OperatorCall) -> Tensor:
        """q, k, v [B, S, H, D] -> [B, S, H, D]."""
        notes: SiteNotes | None = call.notes
        seen = Seen() if notes is None else notes.take()
        start = call.layout.starts[call.layout.target]
        tokens = call.layout.segments[call.layout.target].length
        picture = slice(start, start + tokens)
        metric = self._metric(call, seen, picture)
        found = match(metric, self.destinations(call, q.device))
        queries, agents = self.counts(tokens, len(found.dst))
        merging, agency = found.merging(queries), None if agents is None else found.merging(agents)
        if len(call.layout.segments) == 1 and seen.rotary is None and call.key_bias is None:
            return merging.unmerge(self._merged(q, k, v, merging, agency, call))
        out = self._joint(q[:, picture], k, v, v[:, picture], merging, agency, call, _part(seen.rotary, picture))
        words = torch.cat([q[:, :start], q[:, start + tokens :]], 1)
        others = attention(words, k, v, call.scale, call.key_bias) if words.shape[1] else words
        return torch.cat([others[:, :start], merging.unmerge(out), others[:, start:]], 1)

    def counts(self, tokens: int, cells: int) -> tuple[int, int | None]:
        """Tokens merged for queries, and for agents; None where a layer has none: so many would save nothing."""
        merged = min(int(self.ratio * tokens), tokens - cells)
        agents = min(int(self.agent_ratio * tokens), tokens - cells)
        return merged, agents if 2 * (tokens - agents) < tokens - merged else None

    def density(self, layout: Layout) -> float:
        """Scores that are computed, as a share of all pairs."""
        tokens, every = layout.segments[layout.target].length, layout.tokens
        (rows, columns), words = layout.grid[1:], every - tokens
        merged, agents = self.counts(tokens, (rows // self.cell[0]) * (columns // self.cell[1]))
        queries = tokens - merged
        keys = every if words else queries
        pairs = queries * keys if agents is None else (tokens - agents) * (keys + queries)
        return (pairs + words * every) / every**2

    def destinations(self, call: OperatorCall, device: Any) -> Tensor:
        """One destination per cell; both halves of guidance get the same, in one call or in two."""
        _, rows, columns = call.layout.grid
        numbers = (self.seed, call.step, call.layer) if self.random else None
        return destinations(rows, columns, self.cell, numbers, device)

    def _metric(self, call: OperatorCall, seen: "Seen", picture: slice) -> Tensor:
        """What picture tokens are compared by, [B, N, C]."""
        value = seen.hidden if self.hidden else call.hidden
        if value is None:
            raise LayoutMismatchError(
                "agentsd got no input of the block to compare tokens by, because its attention ran outside the block; "
                "use metric='normed'."
            )
        tokens = picture.stop - picture.start
        if value.ndim != 3 or value.shape[1] not in (tokens, call.layout.tokens):
            raise LayoutMismatchError(
                f"agentsd got tokens {tuple(value.shape)} to compare, but the picture of the call has {tokens}."
            )
        return value if value.shape[1] == tokens else value[:, picture]

    def _merged(
        self, q: Tensor, k: Tensor, v: Tensor, merging: Merging, agency: Merging | None, call: OperatorCall
    ) -> Tensor:
        """As published: queries, keys and values of merged tokens."""
        merged_q, merged_k, merged_v = (merging.merge(x) for x in (q, k, v))
        if agency is None:
            return attention(merged_q, merged_k, merged_v, call.scale)
        return self._agents(merged_q, merged_k, merged_v, agency.merge(q), merged_v, call)

    def _joint(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        own: Tensor,
        merging: Merging,
        agency: Merging | None,
        call: OperatorCall,
        rotary: Rotary | None,
    ) -> Tensor:
        """Only picture queries are merged; they and the agents see all keys."""
        merged_q = merge_rotated(q, merging, rotary)
        if agency is None:
            return attention(merged_q, k, v, call.scale, call.key_bias)
        return self._agents(merged_q, k, v, merge_rotated(q, agency, rotary), merging.merge(own), call)

    def _agents(self, q: Tensor, k: Tensor, v: Tensor, agents: Tensor, own: Tensor, call: OperatorCall) -> Tensor:
        return agent_attention(
            q, k, v, agents, own=own, sharpness=self.sharpness, shortcut=self.shortcut, scale=call.scale,
            key_bias=call.key_bias,
        )  # fmt: skip


def merge_rotated(q: Tensor, merging: Merging, rotary: Rotary | None) -> Tensor:
    """Merged queries [B, N - r, H, D]: means of what was rotated, with the rotation of the place they stand at."""
    if rotary is None:
        return merging.merge(q)
    cos, sin = (x.to(q.device)[:, None].float() for x in rotary)  # [N, 1, D]
    plain = (q.float() * cos - _turned(q.float()) * sin) / (cos**2 + sin**2)
    stay, merged = merging.kept.shape[1], merging.merge(plain)[:, merging.kept.shape[1] :]
    rotated = merged * cos[merging.dst] + _turned(merged) * sin[merging.dst]
    return torch.cat([_picked(q, merging.places[:, :stay]), rotated.to(q.dtype)], 1)


class Seen(NamedTuple):
    """What hooks saw on the way to an attention call: input of the block [B, N, C], rotation of the queries [S, D]."""

    hidden: Tensor | None = None
    rotary: Rotary | None = None


class SiteNotes:
    """What the hooks of one site saw last in this thread; each call takes it, so that nothing is kept alive."""

    def __init__(self) -> None:
        self._own = _Own()

    @torch.compiler.disable
    def block(self, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook of the block: its input."""
        self._own.hidden = kwargs.get("hidden_states", args[0] if args else None)

    @torch.compiler.disable
    def attention(self, _module: nn.Module, _args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Forward pre-hook of the attention module: its rotary embedding."""
        self._own.rotary = kwargs.get("image_rotary_emb")

    def take(self) -> Seen:
        """What was seen; it is forgotten then."""
        seen = Seen(self._own.hidden, self._own.rotary)
        self._own.hidden = self._own.rotary = None
        return seen

    def __reduce__(self) -> "tuple[type[SiteNotes], tuple[()]]":
        return SiteNotes, ()


class _Own(threading.local):
    def __init__(self) -> None:
        self.hidden: Tensor | None = None
        self.rotary: Rotary | None = None


def clamped_cell(cell: tuple[int, int], grid: Grid) -> tuple[int, int]:
    """A cell cut to the grid, so that there is one at least."""
    return min(cell[0], grid[1]), min(cell[1], grid[2])


def _turned(x: Tensor) -> Tensor:
    """A quarter turn of neighbouring pairs of channels: (a, b) -> (-b, a)."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([-second, first], -1).flatten(-2)


def _part(rotary: Rotary | None, picture: slice) -> Rotary | None:
    return None if rotary is None else (rotary[0][picture], rotary[1][picture])


def _like(index: Tensor, x: Tensor) -> Tensor:
    """Token numbers [B, n] spread over the further axes of x [B, N, ...]."""
    return index.view(*index.shape, *(1,) * (x.ndim - 2)).expand(*index.shape, *x.shape[2:])


def _picked(x: Tensor, index: Tensor) -> Tensor:
    """Tokens `index` [B, n] of x [B, N, ...]."""
    return x.gather(1, _like(index, x))
