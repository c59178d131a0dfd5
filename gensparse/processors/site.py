"""A site: one attention module of a model, and the decision sparse or dense at each of its calls."""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gensparse.attention import Sources, biased_pools, choose, sparse_attention
from gensparse.errors import LayoutMismatchError
from gensparse.kernels.merge import merge_lse
from gensparse.layout import Layout
from gensparse.parallel import Team, ulysses
from gensparse.patterns import TopRegions
from gensparse.plan import ClusterPlan, Plan, RouteContext, RoutedPlan
from gensparse.processors.bank import Record
from gensparse.processors.masks import key_bias
from gensparse.processors.operators import Operator, OperatorCall
from gensparse.processors.pairs import ProductMask
from gensparse.processors.rows import outputs_of, sample_rows, weights_of

if TYPE_CHECKING:
    from gensparse.processors.stages import Stages

SPARSE = "sparse"

CACHED = "cached references"
"""Name of the key source that holds the keys of `Extra`."""

AnyPlan = Plan | RoutedPlan | ClusterPlan


@dataclass(frozen=True, eq=False)
class Work:
    """Sparse attention of calls (or samples) with one layout: a plan, or an operator in its place.

    Args:
        layout: of the queries.
        groups: int [1, H], entry of the plan's menu for every head (of this process).
        unbiased: plan of the queries that an added product mask gives no preference, see `Action.pairs`.
        parts: tokens that every process of a team holds.
    """

    layout: Layout
    plan: AnyPlan | None = None
    operator: Operator | None = None
    groups: Tensor | None = None
    unbiased: Plan | None = None
    parts: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return self.layout.tokens

    @property
    def density(self) -> float | None:
        """Share of the query-key pairs that are computed; None for operators that do not say it."""
        if self.plan is not None:
            return self.plan.density
        density = getattr(self.operator, "density", None)
        return None if density is None else density(self.layout)


class Extra(NamedTuple):
    """Keys that have no query in the call: `keys` tokens from token `start` of the keys on, seen by every query."""

    start: int
    keys: int


@dataclass(frozen=True, eq=False)
class Action:
    """What the sites that act alike do during one denoiser call.

    Args:
        works: one for the whole batch, or several where samples differ in length; empty runs dense.
        reason: why the calls are dense without works.
        gain: factor on the logits (1 leaves the scale of the model).
        strict: raise instead of running dense for a reason nobody asked for.
        step: of the denoising run.
        seed: of methods that choose at random.
        masked: the works keep to the mask that the model has of its own, so that the one in the call is left out.
        pairs: mask of all pairs that was taken out of the model's call and belongs to calls over all its tokens.
        extra: keys without queries, which calls of these sites have.
        audit: queries per call whose output is compared with that of dense attention.
        alone: work over the picture alone, for the second call that image prompts make.
        team: processes that divide the tokens of a call, so that each computes some heads.
        heads: those of the model that calls have, under tensor parallelism; None for all.
        record: what the sites keep of the call, also those that otherwise stay dense.
        stages: what cross-attention sites do.
    """

    works: tuple[Work, ...] = ()
    reason: str = ""
    gain: float = 1.0
    strict: bool = False
    step: int = 0
    seed: int = 0
    masked: bool = False
    pairs: ProductMask | None = None
    extra: Extra | None = None
    audit: int = 0
    alone: Work | None = None
    team: Team | None = None
    heads: slice | None = None
    record: Record | None = None
    stages: "Stages | None" = None


class ActionSlot:
    """The current `Action` of sites that act alike: of the running thread, else of the last one that had any.

    The second case is backpropagation, which recomputes checkpointed blocks in a thread of its own.
    """

    def __init__(self) -> None:
        self._own = _OwnAction()
        self._last: Action | None = None

    def put(self, action: Action) -> None:
        """What this thread's calls do from now on."""
        self._own.action = self._last = action

    def get(self) -> Action | None:
        """The current action, None before the first."""
        own = self._own.action
        return self._last if own is None else own

    def __reduce__(self) -> "tuple[type[ActionSlot], tuple[()]]":
        return ActionSlot, ()


class _OwnAction(threading.local):
    def __init__(self) -> None:
        self.action: Action | None = None


class SiteCall(NamedTuple):
    """One attention call inside a processor.

    Args:
        q, k, v: [B, S, H, D].
        mask: as scaled_dot_product_attention takes it; over keys it joins the sparse call.
        scale: factor of the logits; None is 1/sqrt(D).
        dense: the model's own attention, [B, S, H, D]; with an argument, under that mask instead of the call's.
        refused: why the arguments rule out a sparse call.
        hidden: input of the attention module.
        divided: whether the tokens are one process's part of them.
        visit: what `Site.visit` noted of the processor's call.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float | None
    dense: Callable[..., Tensor]
    refused: str | None = None
    hidden: Tensor | None = None
    divided: bool = False
    visit: Any = None


class _Part(NamedTuple):
    """What is computed sparsely: a call, one sample of it, or some heads of all processes' tokens.

    Args:
        q, k, v: [B, S, H, D].
        bias: [B|1, H|1, S] added to the logits, or None.
        scale: factor of the logits; None is 1/sqrt(D).
        dense: the model's own attention of the same part.
        hidden: input of the attention module, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    scale: float | None
    dense: Callable[[], Tensor]
    hidden: Tensor | None


class Site:
    """State of one attention module.

    Args:
        name: full name of the module in its model.
        slot: where the model's pre-hook puts the current action; None for a module that is no site of the method and
            only shares its processor with one.
        layer: number of the site in the model.
        pinned: why this site always runs dense, or None.

    `held` says whether the site's processor has been sparse, so that it must stay so. `sources` are weights of key
    sources that belong to this site, `recorded` the sources it kept of a recorded call, `notes` what its operators
    read. `backend` is the one of the last sparse call.
    `outcome` is written by every call and collected by the pre-hook of the next one; it is never read in between, so
    that compiled blocks need not be compiled again for it. `audited` sums up [squared difference, squared norm] of the
    outputs that were compared with dense ones.
    """

    def __init__(self, name: str, slot: ActionSlot | None, layer: int = 0, pinned: str | None = None) -> None:
        self.name = name
        self.slot = slot
        self.layer = layer
        self.pinned = pinned
        self.held = False
        self.sources: Sources | None = None
        self.recorded: Sources | None = None
        self.notes: Any = None
        self.outcome: str | None = None
        self.backend: str | None = None
        self.audited: Tensor | None = None

    def visit(self, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a site needs to know of a call of its processor besides q, k and v; None for nothing."""
        return None

    def attend(self, call: SiteCall) -> Tensor:
        """Attention of q, k, v [B, S, H, D] -> [B, S, H, D]: sparse by the current action, else `call.dense()`.

        Calls whose keys are others than the queries (cross attention, image prompts) are not this site's business, but
        for the extra keys of its action.

        Raises:
            LayoutMismatchError: the method is strict and the call does not fit its layout.
        """
        action = None if self.slot is None else self.slot.get()
        pairs = _pairs_of(action, call.q, call.k)
        if pairs is not None:
            call = call._replace(dense=partial(_under, call.dense, pairs))
        if self.slot is None or not _is_own(action, call.q, call.k):
            prompted = None if action is None else self._prompted(call, action)
            return call.dense() if prompted is None else prompted
        if action is None or not action.works or (self.pinned is not None and action.record is None):
            self.outcome = self.pinned or (action.reason if action else "called outside the model's forward")
            return call.dense()
        if action.masked:
            call = call._replace(mask=None)
        if call.divided:
            return self._shared(call, action)
        works = _works_of(action, call.q)
        misfit = call.refused or _misfit(action, works, call.q, call.k)
        misfit = misfit or _unmaskable(action, works or (), call.mask, pairs)
        if works is None or misfit is not None:
            self._refuse(action, misfit or "")
            return call.dense()
        self.outcome = SPARSE
        if action.record is not None:
            action.record.keep(self.name, call.k, call.v)
        bias = pairs.bias() if pairs is not None else _bias_of(call.mask)
        scale = _scaled(call.scale, call.q.shape[-1], action.gain)
        part = _Part(call.q, call.k, call.v, bias, scale, call.dense, call.hidden)
        out = self._sparse(part, action, works)
        if action.audit:
            self._audit(out, part, action, works, call.scale)
        return out

    def _prompted(self, call: SiteCall, action: Action) -> Tensor | None:
        """Attention of the picture over itself and an image prompt behind it; None for any other call."""
        q, k, v = call.q, call.k, call.v
        work, tokens = action.alone, q.shape[1]
        if work is None or self.pinned is not None or call.mask is not None or not work.tokens == tokens < k.shape[1]:
            return None
        assert isinstance(work.plan, Plan), "made of a pattern"
        scale = _scaled(call.scale, q.shape[-1], action.gain)
        own, own_lse = sparse_attention(
            q, k[:, :tokens], v[:, :tokens], work.plan, scale=scale, groups=work.groups, return_lse=True
        )
        prompt, prompt_lse = _over_few(q, k[:, tokens:], v[:, tokens:], scale)
        return merge_lse(torch.stack([own, prompt]), torch.stack([own_lse, prompt_lse]))[0]

    def _shared(self, call: SiteCall, action: Action) -> Tensor:
        """A call whose tokens are divided: each process attends with its heads over all of them."""
        team, work = action.team, action.works[0]
        if team is None:
            self._refuse(action, "the tokens of the call are divided among processes, those of the model are not")
            return call.dense()
        refused = call.refused or _indivisible(work, team, call.q, call.k, call.mask)
        if refused is not None:
            self._refuse(action, refused)
            return call.dense()
        self.outcome = SPARSE
        total, heads = call.q.shape[2], team.share(call.q.shape[2])
        bias = _bias_of(call.mask)
        bias = None if bias is None else ulysses.gather_keys(bias, team, work.parts)
        q, k, v = (ulysses.gather(x, team, work.parts) for x in (call.q, call.k, call.v))
        part = _Part(q, k, v, bias, _scaled(call.scale, q.shape[-1], action.gain), call.dense, None)
        return ulysses.scatter(self._attend(part, work, action, heads), team, work.parts, total)

    def _sparse(self, part: _Part, action: Action, works: tuple[Work, ...]) -> Tensor:
        if len(works) == 1:
            return self._attend(part, works[0], action, action.heads)
        out = torch.zeros_like(part.q)  # what lies behind the tokens of a sample is padding
        for index, work in enumerate(works):
            where = (slice(index, index + 1), slice(work.tokens))
            q, k, v = (x[where] for x in (part.q, part.k, part.v))
            bias = part.bias
            bias = None if bias is None else bias[index if bias.shape[0] > 1 else 0][None, :, : work.tokens]

            def dense(where: tuple[slice, slice] = where) -> Tensor:
                return part.dense()[where]

            hidden = None if part.hidden is None else part.hidden[where]
            sample = _Part(q, k, v, bias, part.scale, dense, hidden)
            out[where] = self._attend(sample, work, action, action.heads)
        return out

    def _attend(self, part: _Part, work: Work, action: Action, heads: slice | None) -> Tensor:
        plan = work.plan
        if not isinstance(plan, Plan):
            return self._eager(part, work, action, heads)
        q, k, v, bias, scale = part[:5]
        self.backend = choose(plan, q)
        given = self._given(plan)
        sources = given if heads is None else _of_heads(given, heads)
        if action.extra is not None:
            k, v, sources = _split(k, v, action.extra, sources)
        if plan.sources and bias is not None:  # a mask also weights the tokens that are averaged
            sources, bias = biased_pools(k, v, plan, bias, sources)
        out = sparse_attention(q, k, v, plan, scale=scale, key_bias=bias, sources=sources, groups=work.groups)
        if action.pairs is None:
            return out
        rest = None
        if work.unbiased is not None:
            rest = sparse_attention(q, k, v, work.unbiased, scale=scale, sources=given, groups=work.groups)
        return action.pairs.joined(out, rest)

    def _given(self, plan: Plan) -> Sources | None:
        """The key sources of a plan that belong to this site."""
        if self.recorded is None:
            return self.sources
        known = {**(self.sources or {}), **self.recorded}
        return {source.name: known[source.name] for source in plan.sources if source.name in known} or None

    @torch.compiler.disable
    @torch.no_grad()
    def _audit(self, out: Tensor, part: _Part, action: Action, works: tuple[Work, ...], scale: float | None) -> None:
        """Compare a few outputs of picture tokens with the model's own, dense attention at its own `scale`."""
        if action.extra is not None or action.pairs is not None:
            return  # their keys and masks are not those of the call
        for index, work in enumerate(works):
            sample = slice(None) if len(works) == 1 else slice(index, index + 1)
            target = work.layout.segments[work.layout.target]
            first = work.layout.starts[work.layout.target]
            rows = sample_rows(first, target.length, action.audit, action.step, out.device)
            keys, values = part.k[sample, : work.tokens], part.v[sample, : work.tokens]
            own = part.bias if part.bias is None or part.bias.shape[0] == 1 else part.bias[sample]
            own = None if own is None else own[..., : work.tokens]
            dense = outputs_of(weights_of(part.q[sample], keys, rows, scale, own), values)
            lost = out[sample, rows].float().transpose(1, 2) - dense
            sums = torch.stack([lost.square().sum(), dense.square().sum()])
            self.audited = sums if self.audited is None else self.audited + sums

    def density(self) -> float | None:
        """Mean over the works of the current action; None where none says it."""
        action = None if self.slot is None else self.slot.get()
        known = [work.density for work in (action.works if action else ()) if work.density is not None]
        return sum(known) / len(known) if known else None

    @torch.compiler.disable  # the numbers of layer and step would cost one compilation each
    def _eager(self, part: _Part, work: Work, action: Action, heads: slice | None) -> Tensor:
        """Operators, and plans whose keys are chosen at run time."""
        q, k, v, bias, scale = part[:5]
        if work.operator is not None:
            self.backend = work.operator.key()
            call = OperatorCall(work.layout, part.hidden, scale, bias, self.layer, action.step, part.dense, self.notes)
            return work.operator.attend(q, k, v, call)
        assert work.plan is not None, "a work has a plan or an operator"
        self.backend = "routed"
        ctx = RouteContext(action.seed, self.layer, action.step, first_head=heads.start if heads else 0)
        return sparse_attention(q, k, v, work.plan, scale=scale, key_bias=bias, ctx=ctx)

    def _refuse(self, action: Action, reason: str) -> None:
        if action.strict:
            raise LayoutMismatchError(f"{self.name}: {reason}; pass strict=False to run such calls dense.")
        self.outcome = reason


def _bias_of(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else key_bias(mask)


def _over_few(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Attention over few keys: out [B, S, H, D] in q's dtype, log-sum-exp fp32 [B, S, H]; 8192 queries at a time."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    parts = []
    for rows in q.split(8192, dim=1):
        logits = torch.einsum("bqhd,bkhd->bqhk", rows.float() * scale, k.float())
        lse = logits.logsumexp(-1)
        parts.append((torch.einsum("bqhk,bkhd->bqhd", (logits - lse[..., None]).exp(), v.float()), lse))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, 1).to(q.dtype), torch.cat(lses, 1)


def _works_of(action: Action, q: Tensor) -> tuple[Work, ...] | None:
    """The works of a call: the one of all samples, one per sample, or the one with as many tokens as the call.

    The last are models that call attention sample by sample, without padding.
    """
    works = action.works
    if len(works) == 1:
        return works if works[0].tokens == q.shape[1] else None
    if q.shape[0] == len(works) and max(work.tokens for work in works) <= q.shape[1]:
        return works
    return next(((work,) for work in works if q.shape[0] == 1 and work.tokens == q.shape[1]), None)


def _is_own(action: Action | None, q: Tensor, k: Tensor) -> bool:
    """Whether a call is the site's business: as many keys as queries, or its extra keys more."""
    extra = None if action is None else action.extra
    surplus = k.shape[1] - q.shape[1]
    if extra is None:
        return surplus == 0
    # the references' attention to themselves stays the model's own
    return surplus == extra.keys or (surplus == 0 and q.shape[1] != extra.keys)


def _indivisible(work: Work, team: Team, q: Tensor, k: Tensor, mask: Tensor | None) -> str | None:
    """Why a team cannot compute a call; the same answer in all of its processes."""
    if q.shape[1] != work.parts[team.rank]:
        return f"process {team.rank} got {q.shape[1]} tokens, but its part of the layout has {work.parts[team.rank]}"
    if (
        isinstance(work.plan, RoutedPlan)
        and isinstance(work.plan.pattern, TopRegions)
        and not work.plan.pattern.per_head
    ):
        return f"{work.plan.pattern!r} chooses for all heads together, which are divided among processes"
    if k.shape[2] != q.shape[2] and k.shape[2] % team.size:
        return f"{k.shape[2]} key heads cannot be divided among {team.size} processes"
    if mask is None:
        return None
    bias = key_bias(mask)
    if bias is None or bias.shape[-1] != q.shape[1]:
        return "the attention mask differs from query to query, or is not divided like the tokens"
    if work.plan is not None and work.plan.sources:
        return "an attention mask does not cover pooled keys on several processes"
    return None


def _of_heads(sources: Sources | None, heads: slice) -> Sources | None:
    """Sources for some heads: tensors of keys are cut, weights are the same for all."""
    if sources is None:
        return None
    return {
        name: (given[0][:, :, heads], given[1][:, :, heads]) if isinstance(given, tuple) else given
        for name, given in sources.items()
    }


def _misfit(action: Action, works: tuple[Work, ...] | None, q: Tensor, k: Tensor) -> str | None:
    if works is None:
        expected = " or ".join(str(tokens) for tokens in sorted({work.tokens for work in action.works}))
        return f"got {q.shape[1]} tokens, but the layout of the model's call has {expected}"
    if action.extra is not None and k.shape[1] == q.shape[1]:
        return f"got no keys beside those of the {q.shape[1]} queries, but there are {action.extra.keys} of references"
    return None


def _split(k: Tensor, v: Tensor, extra: Extra, sources: Sources | None) -> tuple[Tensor, Tensor, Sources]:
    """Keys and values of the queries' own tokens, and the sources with the extra ones."""
    start, stop = extra.start, extra.start + extra.keys
    own = [torch.cat([x[:, :start], x[:, stop:]], 1) for x in (k, v)]
    return own[0], own[1], {**(sources or {}), CACHED: (k[:, start:stop], v[:, start:stop])}


def _pairs_of(action: Action | None, q: Tensor, k: Tensor) -> ProductMask | None:
    """The product mask of a call: of those over all tokens of the model."""
    pairs = None if action is None else action.pairs
    return pairs if pairs is not None and q.shape[1] == k.shape[1] == pairs.tokens.shape[1] else None


def _under(dense: Callable[..., Tensor], pairs: ProductMask) -> Tensor:
    return dense(pairs.whole())


def _unmaskable(action: Action, works: tuple[Work, ...], mask: Tensor | None, pairs: ProductMask | None) -> str | None:
    if pairs is not None:
        if mask is not None or any(not isinstance(work.plan, Plan) for work in works):
            return "the attention mask differs from query to query"
    elif mask is None:
        return None
    elif action.extra is not None:
        return "an attention mask does not cover cached references"
    elif key_bias(mask) is None:
        return "the attention mask differs from query to query"
    if any(source.weights == "learned" for work in works if work.plan is not None for source in work.plan.sources):
        return "an attention mask does not cover pooled keys with learned weights"
    return None


def _scaled(scale: float | None, head_dim: int, gain: float) -> float | None:
    if gain == 1.0:
        return scale
    return (1 / math.sqrt(head_dim) if scale is None else scale) * gain
