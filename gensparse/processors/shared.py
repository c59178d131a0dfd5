"""Attention of pictures that also see other pictures: the one primitive behind the methods for several subjects.

Every picture of a batch has a `View`: the keys of other pictures that it sees beside (or instead of) its own. Keys that
a mask keeps are gathered before they come here, so the cost follows the area of masks; pictures with views of one form
share a plan and a call. Nothing is ever as large as all pairs of tokens.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gensparse.attention import sparse_attention
from gensparse.errors import LayoutMismatchError
from gensparse.layout import Layout
from gensparse.patterns import Isolation, Pattern, Policy, Reference, References
from gensparse.plan import build_plan

Ints = np.ndarray


class Seen(NamedTuple):
    """Keys of another picture.

    Args:
        k, v: [tokens, H, D], those that are kept; no tokens are allowed.
        bias: added to their logits; exp(bias) multiplies their weight before the softmax.
        queries: bool [target tokens], those that see the keys; None for all of the target.
    """

    k: Tensor
    v: Tensor
    bias: float = 0.0
    queries: Ints | None = None


class View(NamedTuple):
    """What one picture of a batch sees.

    Args:
        seen: keys of other pictures, for queries of the target.
        own: whether its picture tokens see each other; text always sees and is seen as in the model.
        groups: int [target tokens], tokens of different groups do not see each other; 0 is free. None for no groups.
        weight: share of the result; the rest is that of plain attention.
    """

    seen: tuple[Seen, ...] = ()
    own: bool = True
    groups: Ints | None = None
    weight: float = 1.0


class SharedCall(NamedTuple):
    """One attention call for pictures whose views have one form.

    Args:
        rows: numbers of the pictures in the batch.
        pattern, data: who sees whom, and the arrays it names.
        sources: keys and values of other pictures, [rows, tokens, H, D] by name.
        bias: float32 [rows, 1, tokens + those of all sources], -inf for padding; None where all of it is 0.
    """

    rows: tuple[int, ...]
    pattern: Pattern
    data: Mapping[str, np.ndarray]
    sources: Mapping[str, tuple[Tensor, Tensor]]
    bias: Tensor | None


def attend_views(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    views: Sequence[View | None],
    layout: Layout,
    dense: Callable[[], Tensor],
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    multiple: int = 1,
) -> Tensor:
    """Attention of pictures under their views, [B, S, H, D].

    Args:
        q, k, v: [B, S, H, D], one picture per sample.
        views: one per sample; None, and views that change nothing, are plain attention.
        dense: plain attention of all samples; called where some need it.
        key_bias: [B|1, H|1, S] added to the logits of own keys.
        multiple: lengths of gathered keys are padded to it, so that masks drawn at random need few plans.

    Raises:
        LayoutMismatchError: another number of views than samples.
    """
    if len(views) != len(q):
        raise LayoutMismatchError(f"{len(views)} views for a batch of {len(q)} pictures; pass one per picture.")
    calls = shared_calls(views, layout, q, multiple=multiple)
    if not calls:
        return dense()
    covered = {row for call in calls for row in call.rows}
    blended = [row for row in sorted(covered) if _weight(views[row]) != 1.0]
    plain = dense() if blended or len(covered) < len(views) else None
    if plain is None and len(calls) == 1:
        return _attend(q, k, v, calls[0], layout, scale, key_bias)
    out = torch.empty_like(q) if plain is None else plain.clone()
    for call in calls:
        out[_rows(call.rows)] = _attend(q, k, v, call, layout, scale, key_bias)
    for row in blended:
        assert plain is not None, "blended with it"
        out[row] = torch.lerp(plain[row], out[row], _weight(views[row]))
    return out


def shared_calls(views: Sequence[View | None], layout: Layout, like: Tensor, *, multiple: int = 1) -> list[SharedCall]:
    """The calls that the views of a batch need; none for plain ones.

    Args:
        like: tensor whose device the biases get.
    """
    forms: dict[Any, list[tuple[int, View]]] = {}
    for row, given in enumerate(views):
        view = None if given is None else _reduced(given)
        if view is not None:
            forms.setdefault(_form(view), []).append((row, view))
    return [_call(members, layout, like, multiple) for members in forms.values()]


def attend_together(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    halves: int,
    layout: Layout,
    *,
    scale: float | None = None,
    together: Sequence[bool] | None = None,
    dense: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Pictures of a half as one sequence: each sees all tokens of all of them (StyleAligned, TokenFlow), [B, S, H, D].

    No key is copied. The layout must be of a picture alone.

    Args:
        together: which halves; all by default. Of the others `dense` gives the result.
    """
    shown = [True] * halves if together is None else list(together)
    items = len(q) // halves
    frames, rows, columns = layout.grid
    whole = Layout.video(items * frames, rows, columns)
    plan = build_plan(Policy((("target", "target"),)), whole, device=q.device)
    picked = [half for half in range(halves) if shown[half]]
    parts = [x.unflatten(0, (halves, items)).flatten(1, 2)[picked] for x in (q, k, v)]
    out = sparse_attention(*parts, plan, scale=scale).unflatten(1, (items, -1))
    if all(shown):
        return out.flatten(0, 1)
    assert dense is not None, "for the halves that stay plain"
    result = dense().unflatten(0, (halves, items)).clone()
    result[picked] = out
    return result.flatten(0, 1)


def attend_all(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, scale: float | None = None, key_bias: Tensor | None = None
) -> Tensor:
    """Plain attention of every picture over its own tokens, [B, S, H, D]."""
    kinds = dict.fromkeys(segment.kind for segment in layout.segments)
    plan = build_plan(Policy(_pairs(kinds, own=True)), layout, device=q.device)
    return sparse_attention(q, k, v, plan, scale=scale, key_bias=key_bias)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, call: SharedCall, layout: Layout, scale: float | None, key_bias: Tensor | None
) -> Tensor:
    rows = _rows(call.rows)
    q, k, v = (x[rows] for x in (q, k, v))
    bias = call.bias
    if key_bias is not None:
        own = key_bias if key_bias.shape[0] == 1 else key_bias[rows]
        extra = layout.tokens + sum(pair[0].shape[1] for pair in call.sources.values())
        bias = q.new_zeros(1, 1, extra, dtype=torch.float32) if bias is None else bias
        batch, heads = (max(a, b) for a, b in zip(own.shape[:2], bias.shape[:2], strict=True))
        bias = bias.expand(batch, heads, -1).clone()
        bias[..., : layout.tokens] += own
    plan = build_plan(call.pattern, layout, data=call.data, device=q.device)
    return sparse_attention(q, k, v, plan, scale=scale, key_bias=bias, sources=call.sources or None)


def _weight(view: View | None) -> float:
    return 1.0 if view is None else view.weight


def _reduced(view: View) -> View | None:
    """The view without what changes nothing; None where plain attention is left."""
    seen = tuple(
        item._replace(queries=None) if item.queries is not None and item.queries.all() else item
        for item in view.seen
        if len(item.k) and (item.queries is None or item.queries.any())
    )
    groups = view.groups
    if groups is not None and len(np.unique(groups[groups > 0])) < 2:
        groups = None
    if view.weight == 0 or (not seen and (groups is None or not view.own)):
        return None
    return view._replace(seen=seen, groups=groups)


def _form(view: View) -> Any:
    """Equal for views that one plan serves, whatever keys they see."""
    groups = None if view.groups is None else view.groups.tobytes()
    return view.own, groups, tuple(_masks(view))


def _masks(view: View) -> list[bytes]:
    """The different query masks of a view in one order; b"" stands for all queries."""
    return sorted({_mask(item) for item in view.seen})


def _mask(item: Seen) -> bytes:
    return b"" if item.queries is None else np.ascontiguousarray(item.queries, bool).tobytes()


def _call(members: Sequence[tuple[int, View]], layout: Layout, like: Tensor, multiple: int) -> SharedCall:
    rows, first = tuple(row for row, _ in members), members[0][1]
    data: dict[str, np.ndarray] = {}
    sources: dict[str, tuple[Tensor, Tensor]] = {}
    references, biases = [], [torch.zeros(len(rows), layout.tokens, device=like.device)]
    biased = False  # known without waiting for the device
    for number, mask in enumerate(_masks(first)):
        name = f"seen{number}"
        runs = [[item for item in view.seen if _mask(item) == mask] for _, view in members]
        length = max(sum(len(item.k) for item in run) for run in runs)
        length = -(-length // multiple) * multiple
        sources[name] = _padded(runs, length)
        biases.append(torch.stack([_bias_of(run, length, like.device) for run in runs]))
        biased |= any(item.bias for run in runs for item in run)
        biased |= any(sum(len(item.k) for item in run) < length for run in runs)
        if mask:
            data[f"queries{number}"] = np.frombuffer(mask, bool)
        references.append(Reference(name, length=length, queries=f"queries{number}" if mask else ""))
    kinds = dict.fromkeys(segment.kind for segment in layout.segments)
    pattern = _own_pattern(kinds, first)
    if first.groups is not None:
        data["groups"] = np.asarray(first.groups, np.int64)
    if references:
        shown = References(tuple(references))
        pattern = shown if pattern is None else pattern | shown
    assert pattern is not None, "a view that sees nothing was left out"
    return SharedCall(rows, pattern, data, sources, torch.cat(biases, 1)[:, None] if biased else None)


def _own_pattern(kinds: Iterable[str], view: View) -> Pattern | None:
    pairs = _pairs(kinds, own=view.own)
    if not pairs:
        return None
    pattern: Pattern = Policy(pairs)
    return pattern if view.groups is None else pattern & Isolation("groups")


def _pairs(kinds: Iterable[str], *, own: bool) -> tuple[tuple[str, str], ...]:
    """All kinds of tokens see all, but target tokens each other only with `own`."""
    kinds = tuple(kinds)
    return tuple((a, b) for a in kinds for b in kinds if own or (a, b) != ("target", "target"))


def _padded(runs: Sequence[Sequence[Seen]], length: int) -> tuple[Tensor, Tensor]:
    """Keys and values [rows, length, H, D] of several runs, zeros behind the shorter ones."""
    keys, values = ([_joined([item[part] for item in run], length) for run in runs] for part in range(2))
    return torch.stack(keys), torch.stack(values)


def _joined(parts: Sequence[Tensor], length: int) -> Tensor:
    x = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    return x if len(x) == length else F.pad(x, (0, 0, 0, 0, 0, length - len(x)))


def _bias_of(run: Sequence[Seen], length: int, device: torch.device) -> Tensor:
    bias = torch.cat([torch.full((len(item.k),), float(item.bias), device=device) for item in run])
    return F.pad(bias, (0, length - len(bias)), value=float("-inf"))


def _rows(rows: Sequence[int]) -> slice | list[int]:
    """Numbers of pictures as an index: a slice where they follow each other, which copies nothing."""
    first, last = rows[0], rows[-1] + 1
    return slice(first, last) if last - first == len(rows) else list(rows)


def target_part(layout: Layout) -> slice:
    """Where the picture's own tokens stand in a sequence."""
    start = layout.starts[layout.target]
    return slice(start, start + layout.segments[layout.target].length)


def alone(layout: Layout) -> bool:
    """Whether a sequence holds the picture and nothing else."""
    return len(layout.segments) == 1 and layout.parts == 1
