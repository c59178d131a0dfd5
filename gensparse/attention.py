"""One sparse attention call: arguments checked, extra keys made, a backend chosen."""

import logging
from collections.abc import Callable, Mapping
from functools import lru_cache
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gensparse.errors import BackendError, ConfigError, LayoutMismatchError
from gensparse.kernels import flex, halo, ops, partition, plan_loop, reference, xformers
from gensparse.kernels import triton as triton_kernels
from gensparse.kernels.blocks import Work
from gensparse.kernels.need import Need
from gensparse.kernels.pool import cell_counts, pool_keys
from gensparse.kernels.route import Choice, Clustering
from gensparse.kernels.triton.tune import arch_of
from gensparse.layout import Layout
from gensparse.patterns.base import Source
from gensparse.patterns.blocks import Blocks
from gensparse.plan import ClusterPlan, Plan, RouteContext, RoutedPlan, build_plan

logger = logging.getLogger("gensparse")

Sources = Mapping[str, Tensor | tuple[Tensor, Tensor]]
Result = tuple[Tensor, Tensor | None]


class Call(NamedTuple):
    """The checked arguments of one call; k, v and key_bias cover the sources too."""

    q: Tensor
    k: Tensor
    v: Tensor
    plan: Plan
    groups: Tensor | None
    key_bias: Tensor | None
    scale: float | None
    return_lse: bool


class Backend(NamedTuple):
    """A way to run a plan: why it cannot serve a call, and the call itself."""

    why_not: Callable[[Need], str | None]
    run: Callable[[Call], Result]


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan | RoutedPlan | ClusterPlan,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    sources: Sources | None = None,
    groups: Tensor | None = None,
    backend: str | None = None,
    return_lse: bool = False,
    ctx: RouteContext | Choice | Clustering | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention restricted to the pairs of a plan, as one softmax over all keys a query sees.

    Args:
        q, k, v: [B, S, H, D] with the tokens of the plan's layout; k and v may have fewer heads (a divisor of H).
        scale: factor of the logits, 1/sqrt(D) by default.
        key_bias: [B|1, H|1, S] added to the logits (natural units), -inf hides a key; may also cover the extra keys.
        sources: name of a key source of the plan -> its weights per position in the cell, or its (k, v) tensors.
            Sources with mean weights are pooled from k and v when absent.
        groups: integer [B|1, H|1], entry of the pattern menu for every head; needed by plans of PerHead patterns.
        backend: a name of `BACKENDS`; by default the first without an objection.
        return_lse: also return the log-sum-exp of every query's logits.
        ctx: for patterns chosen at run time, what the choice depends on (seed, layer, step), or a choice made before by
            `plan.select`.

    Returns:
        out [B, S, H, D] in q.dtype; with `return_lse` also lse fp32 [B, S, H]. Queries that see no key give 0 and -inf.

    Raises:
        LayoutMismatchError: tensors that do not fit the plan's layout.
        ConfigError: sources, groups or ctx that do not fit the plan.
        BackendError: the backend asked for cannot serve the call.
    """
    _check(q, k, v, plan, groups)
    _check_options(q, plan, scale, key_bias, groups)
    plan = plan.to(q.device)
    if isinstance(plan, RoutedPlan | ClusterPlan):
        _only_own(plan, key_bias, sources, groups)
        call = Call(q, k, v, plan, None, key_bias, scale, return_lse)
        out, lse = (_routed if isinstance(plan, RoutedPlan) else _clustered)(call, ctx, backend)
        return (out, lse) if return_lse else out
    if ctx is not None:
        raise ConfigError("ctx is given but nothing is chosen at run time by this plan; leave ctx out.")
    if plan.sources:
        k, v, key_bias = _with_sources(k, v, plan, key_bias, sources)
    elif sources:
        raise ConfigError(f"sources={sorted(sources)} are given but the plan has none; leave sources out.")
    call = Call(q, k, v, plan, groups, key_bias, scale, return_lse)
    if torch.compiler.is_compiling() and backend is None:
        out, lse = _run_compiled(call)
    else:
        need = _need(q, k, v, plan, key_bias, return_lse)
        out, lse = _run_first(call, need) if backend is None else _explicit(backend, need).run(call)
    return (out, lse) if return_lse else out


def length_bias(lengths: Tensor, layout: Layout, segment: int) -> Tensor:
    """The key_bias of samples that fill a segment only partly (text of different lengths in one batch).

    Made on the device of `lengths` without waiting for it.

    Args:
        lengths: integer [B], valid tokens at the start of the segment in every sample.
        layout: of the call.
        segment: index of the segment in `layout`.

    Returns:
        fp32 [B, 1, S], 0 for valid keys and all other segments, -inf for the rest.

    Raises:
        ConfigError: lengths of another shape or dtype, or a segment the layout does not have.
    """
    if lengths.dim() != 1 or lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ConfigError(
            f"length_bias lengths are {lengths.dtype} {tuple(lengths.shape)}; pass integers of shape [B], the valid "
            "tokens of every sample."
        )
    if type(segment) is not int or not 0 <= segment < len(layout.segments):
        raise ConfigError(
            f"length_bias segment={segment!r} is not in the layout; pass an index from 0 to {len(layout.segments) - 1}."
        )
    bias = torch.zeros(len(lengths), 1, layout.tokens, device=lengths.device)
    first = 0
    for start, stop in layout.runs(segment):
        token = torch.arange(first, first + stop - start, device=lengths.device)
        bias[:, 0, start:stop].masked_fill_(token >= lengths[:, None], float("-inf"))
        first += stop - start
    return bias


def explain(plan: Plan, q: Tensor) -> dict[str, str | None]:
    """Backend -> why it cannot run `plan` on tensors like `q`, None where it can; the first None is chosen."""
    need = _need(q, q, q, plan, None, False)
    return {name: backend.why_not(need) for name, backend in BACKENDS.items()}


def backends(device: torch.device | str | None = None) -> dict[str, str | None]:
    """Backend -> why it does not run on this machine, None where it does; in the order they are tried.

    Args:
        device: what to ask about; by default the first GPU, or the CPU without one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    plan = build_plan(Blocks(8), Layout.image(16, 16))  # windows: every backend has a form for them
    return explain(plan, torch.zeros(1, 256, 1, 64, device=device))


def choose(plan: Plan, q: Tensor) -> str:
    """Name of the backend that `sparse_attention` takes for `plan` on tensors like `q`."""
    return _choose(plan, _need(q, q, q, plan, None, False))


def _run_first(call: Call, need: Need) -> Result:
    """The first backend without an objection; where its kernels turn out not to run, the next one."""
    failed: dict[str, str] = {}
    while True:
        name = _choose(call.plan, need, failed)
        try:
            return BACKENDS[name].run(call)
        except BackendError as error:
            failed[name] = str(error)
            _announce_failure(str(error))


def _run_compiled(call: Call) -> Result:
    """One op for any plan, because a compiler should neither look into the lists nor choose by what they hold."""
    if _compiled_engine(call.q.device, call.q.dtype, call.q.shape[-1]) == "triton":
        return _run_triton(call)
    options = {"groups": call.groups, "key_bias": call.key_bias, "scale": call.scale}
    return ops.attend(call.q, call.k, call.v, call.plan.lists, **options)


@torch.compiler.assume_constant_result
def _compiled_engine(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The engine of compiled calls: the kernels on GPUs that run them, else the plan loop."""
    need = Need(dtype, device.type, head_dim, queries=0, keys=0, density=1.0, arch=arch_of(device))
    return "triton" if device.type != "cpu" and triton_kernels.why_not(need) is None else "plan_loop"


def _choose(plan: Plan, need: Need, failed: Mapping[str, str] = MappingProxyType({})) -> str:
    refusals: list[str] = []
    for name, backend in BACKENDS.items():
        reason = failed.get(name) or backend.why_not(need)
        if reason is None:
            # on a GPU anything but the kernels, or dense windows, is far slower than it could be
            slow = need.device != "cpu" and name not in ("partition", "triton")
            _announce(name, plan.pattern.key(), tuple(refusals), logging.WARNING if slow else logging.INFO)
            return name
        refusals.append(reason)
    raise BackendError(" ".join(refusals))


def _explicit(name: str, need: Need) -> Backend:
    if not isinstance(name, str) or name not in BACKENDS:
        raise BackendError(f"backend={name!r} is unknown; use one of {', '.join(BACKENDS)}.")
    reason = BACKENDS[name].why_not(need)
    if reason is not None:
        raise BackendError(reason)
    return BACKENDS[name]


@lru_cache(maxsize=256)
def _announce(name: str, pattern: str, refusals: tuple[str, ...], level: int) -> None:
    """Log a choice once; the cache remembers what was said."""
    logger.log(level, "%s runs on %s. %s", pattern, name, " ".join(refusals))


@lru_cache(maxsize=256)
def _announce_failure(reason: str) -> None:
    """Warn once of every reason."""
    logger.warning("%s Another backend with the same mask runs instead.", reason)


def _need(q: Tensor, k: Tensor, v: Tensor, plan: Plan, key_bias: Tensor | None, lse: bool) -> Need:
    tensors = [x for x in (q, k, v, key_bias) if x is not None]
    return Need(
        dtype=q.dtype,
        device=q.device.type,
        head_dim=q.shape[-1],
        queries=plan.tokens,
        keys=plan.keys,
        density=plan.density,
        groups=plan.groups,
        bias=key_bias is not None,
        lse=lse,
        grad=torch.is_grad_enabled() and any(x.requires_grad for x in tensors),
        refused=plan.refused,
        arch=arch_of(q.device),
    )


def _check(q: Tensor, k: Tensor, v: Tensor, plan: Plan, groups: Tensor | None) -> None:
    if not all(isinstance(x, Tensor) for x in (q, k, v)):
        raise ConfigError(f"q, k, v are {[type(x).__name__ for x in (q, k, v)]}; pass torch tensors.")
    if not q.dtype.is_floating_point or len({q.dtype, k.dtype, v.dtype}) > 1 or len({q.device, k.device, v.device}) > 1:
        kinds = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise ConfigError(f"q, k, v are {kinds}; pass floating-point tensors of one dtype on one device.")
    if q.dim() != 4 or k.shape != v.shape or k.dim() != 4 or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise LayoutMismatchError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit together; pass [B, S, H, D] with "
            "equal B and D, and k and v alike."
        )
    if 0 in (*q.shape, *k.shape):
        raise LayoutMismatchError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} are empty; pass at least one sample, head and channel."
        )
    if q.shape[1] != plan.tokens or k.shape[1] != plan.tokens:
        raise LayoutMismatchError(
            f"{q.shape[1]} queries and {k.shape[1]} keys, but the plan's layout has {plan.tokens} tokens; build the "
            "plan for the tokens of the call."
        )
    if q.shape[2] % k.shape[2]:
        raise LayoutMismatchError(
            f"{q.shape[2]} query heads are no multiple of {k.shape[2]} key heads; pass a multiple."
        )
    if groups is None and plan.groups > 1:
        raise ConfigError(
            f"the plan has a menu of {plan.groups} patterns; pass groups [B|1, H|1] to pick one per head."
        )


def _check_options(q: Tensor, plan: Plan, scale: float | None, key_bias: Tensor | None, groups: Tensor | None) -> None:
    """Shapes and dtypes of what comes with q, k, v; values only where looking at them does not wait for a device."""
    batch, _, heads, _ = q.shape
    number = isinstance(scale, int | float | torch.SymFloat) and not isinstance(scale, bool)
    if scale is not None and not (number and abs(scale) < float("inf")):
        raise ConfigError(f"scale={scale!r} is not allowed; pass a finite number, or None for 1/sqrt(D).")
    if key_bias is not None:
        fits = key_bias.dim() == 3 and key_bias.shape[0] in (1, batch) and key_bias.shape[1] in (1, heads)
        if not fits or not key_bias.is_floating_point() or key_bias.shape[2] not in (plan.tokens, plan.keys):
            raise ConfigError(
                f"key_bias is {key_bias.dtype} {tuple(key_bias.shape)}; pass floating-point numbers [1 or {batch}, "
                f"1 or {heads}, {plan.tokens}], -inf for hidden keys."
            )
    if groups is not None:
        fits = groups.dim() == 2 and groups.shape[0] in (1, batch) and groups.shape[1] in (1, heads)
        whole = not (groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool)
        seen = fits and whole and groups.device.type == "cpu" and not torch.compiler.is_compiling()
        if not (fits and whole) or (seen and not 0 <= int(groups.min()) <= int(groups.max()) < plan.groups):
            values = f" with entries {groups.unique().tolist()}" if seen else ""
            raise ConfigError(
                f"groups is {groups.dtype} {tuple(groups.shape)}{values}; pass integers from 0 to {plan.groups - 1} "
                f"[1 or {batch}, 1 or {heads}]."
            )


def _with_sources(
    k: Tensor, v: Tensor, plan: Plan, key_bias: Tensor | None, sources: Sources | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """k and v with the extra keys appended, and the bias over all of them."""
    given = dict(sources or {})
    unknown = sorted(set(given) - {source.name for source in plan.sources})
    if unknown:
        names = ", ".join(source.name for source in plan.sources)
        raise ConfigError(f"sources={unknown} are not in the plan; it has {names}.")
    made = [_source_keys(k, v, plan, source, given.get(source.name)) for source in plan.sources]
    bias = _source_bias(k, plan, key_bias)
    return torch.cat([k, *(keys for keys, _ in made)], 1), torch.cat([v, *(values for _, values in made)], 1), bias


def _source_keys(
    k: Tensor, v: Tensor, plan: Plan, source: Source, given: Tensor | tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    if isinstance(given, tuple):
        expected = (k.shape[0], source.segment.length, *k.shape[2:])
        if any(x.shape != expected for x in given):
            raise ConfigError(f"source {source.name!r} got {[tuple(x.shape) for x in given]}; pass k and v {expected}.")
        return given[0].to(k), given[1].to(v)
    if source.of is None:
        raise ConfigError(
            f"source {source.name!r} is not made from the call's own keys; pass sources={{{source.name!r}: (k, v)}} "
            f"with {source.segment.length} tokens."
        )
    if given is None and source.weights != "mean":
        size = source.cells[0] * source.cells[1] * source.cells[2]
        raise ConfigError(
            f"source {source.name!r} needs weights; pass sources={{{source.name!r}: weights}} with {size} entries, or "
            "its (k, v)."
        )
    segment = plan.layout.segments[source.of]
    runs = plan.layout.runs(source.of)
    own = (
        torch.cat([x[:, first:last] for first, last in runs], 1) if len(runs) > 1 else x[:, slice(*runs[0])]
        for x in (k, v)
    )
    pooled = [pool_keys(x, segment.shape, source.cells, given, source.shift) for x in own]
    return pooled[0], pooled[1]


def _source_bias(k: Tensor, plan: Plan, key_bias: Tensor | None) -> Tensor | None:
    """The bias over own tokens and sources: key_bias, then what the sources add to the logits of their keys."""
    biased = any(source.bias != 0.0 for source in plan.sources)
    if key_bias is not None and key_bias.shape[-1] == plan.keys and not biased:
        return key_bias
    if key_bias is None and not biased:
        return None
    extra = torch.cat([_own_bias(plan, source, k.device) for source in plan.sources])
    if key_bias is None:
        return torch.cat([extra.new_zeros(plan.tokens), extra])[None, None]
    if key_bias.shape[-1] == plan.keys:
        return torch.cat([key_bias[..., : plan.tokens], key_bias[..., plan.tokens :] + extra], -1)
    return torch.cat([key_bias, extra.to(key_bias.dtype).expand(*key_bias.shape[:-1], -1)], -1)


def _own_bias(plan: Plan, source: Source, device: torch.device) -> Tensor:
    """What a source adds to the logits of its keys, float64 [tokens]: a constant, or ln(tokens in every cell)."""
    if not isinstance(source.bias, str):
        return torch.full((source.segment.length,), float(source.bias), dtype=torch.float64, device=device)
    counts = cell_counts(plan.layout.segments[source.of].shape, source.cells, source.shift, device)
    whole = prod(source.cells) if source.bias == "log_share" else 1
    return (counts.double() / whole).log()


def _only_own(
    plan: RoutedPlan | ClusterPlan, key_bias: Tensor | None, sources: Sources | None, groups: Tensor | None
) -> None:
    if sources or groups is not None:
        raise ConfigError(
            f"{plan.pattern!r} makes its own keys and lists; leave sources and groups out of a call with this plan."
        )
    if key_bias is not None and key_bias.shape[-1] != plan.tokens:
        raise ConfigError(
            f"key_bias covers {key_bias.shape[-1]} keys; pass one entry for each of the {plan.tokens} own tokens."
        )


def _routed(call: Call, ctx: RouteContext | Choice | Clustering | None, backend: str | None) -> Result:
    """Choose, append pooled keys, and attend by the lists of the choice, as many heads at a time as their lists fit."""
    plan: RoutedPlan = call.plan
    choice = ctx if isinstance(ctx, Choice) else plan.select(call.q, call.k, _context(ctx, call.plan))
    k, v, key_bias = plan.extend(call.k, call.v, call.key_bias)
    need = _need(call.q, k, v, plan, key_bias, call.return_lse)
    if need.grad and backend is None:
        backend = "plan_loop"
    if need.grad and backend == "triton":
        raise BackendError(
            "Can't run triton; lists chosen at run time hold a key in several tiles, and its gradient kernels need "
            "each key in one: use plan_loop."
        )
    repeat = call.q.shape[2] // k.shape[2]
    step = plan.heads_per_step(call.q.shape[0], k.shape[2], call.q.shape[2], choice)
    parts = []
    for first in range(0, k.shape[2], step):
        keys, heads = slice(first, first + step), slice(first * repeat, (first + step) * repeat)
        own = Choice(*(x if x.shape[1] == 1 else x[:, heads] for x in choice))
        bias = key_bias if key_bias is None or key_bias.shape[1] == 1 else key_bias[:, heads]
        chosen = plan.lower(own)
        tensors = (call.q[:, :, heads], k[:, :, keys], v[:, :, keys])
        part = Call(*tensors, chosen, chosen.group_index, bias, call.scale, call.return_lse)
        parts.append(_run_first(part, need) if backend is None else _explicit(backend, need).run(part))
    out = torch.cat([out for out, _ in parts], 2)
    return out, torch.cat([lse for _, lse in parts], 2) if call.return_lse else None


def _clustered(call: Call, ctx: RouteContext | Choice | Clustering | None, backend: str | None) -> Result:
    """Attention inside clusters of gathered tokens, outputs averaged over the clusters of a token."""
    if call.return_lse:
        raise ConfigError("Clusters averages outputs of several softmaxes, which have no log-sum-exp; leave it out.")
    plan: ClusterPlan = call.plan
    repeat = call.q.shape[2] // call.k.shape[2]
    k, v = (x.repeat_interleave(repeat, dim=2) for x in (call.k, call.v))
    own = ctx if isinstance(ctx, Clustering) else plan.select(call.q, k, _context(ctx, plan))
    q_index, k_index = (x.long().flatten(2) for x in own)  # [B, H, clusters * size]
    gathered = [_picked(x, index) for x, index in ((call.q, q_index), (k, k_index), (v, k_index))]
    bias = call.key_bias
    if bias is not None:
        bias = bias.expand(*q_index.shape[:2], -1).gather(2, k_index)
    clusters, size = own.q_index.shape[2:]
    inner = build_plan(Blocks((1, 1, size)), Layout.joint((1, 1, clusters * size)), device=call.q.device)
    out = sparse_attention(*gathered, inner, scale=call.scale, key_bias=bias, backend=backend)
    index = q_index.transpose(1, 2)[..., None]
    total = torch.zeros_like(call.q).scatter_add(1, index.expand_as(out), out)
    count = torch.zeros_like(call.q[..., :1]).scatter_add(1, index, torch.ones_like(out[..., :1]))
    return total / (count + plan.pattern.eps).clamp_min(torch.finfo(count.dtype).tiny), None


def _context(ctx: RouteContext | Choice | Clustering | None, plan: RoutedPlan | ClusterPlan) -> RouteContext:
    if ctx is None or isinstance(ctx, RouteContext):
        return ctx or RouteContext()
    raise ConfigError(f"ctx is a {type(ctx).__name__}, which {plan.pattern!r} does not take; pass a RouteContext.")


def _picked(x: Tensor, index: Tensor) -> Tensor:
    """Tokens `index` [B, H, n] of x [B, S, H, D]: [B, n, H, D]."""
    return x.gather(1, index.transpose(1, 2)[..., None].expand(-1, -1, -1, x.shape[3]))


def _run_works(attend: Callable[..., Result], works: tuple[Work, ...] | None, call: Call) -> Result:
    assert works is not None, "why_not answers for plans without the form"
    options = {"groups": call.groups, "scale": call.scale, "return_lse": call.return_lse}
    if call.plan.places is None:
        return attend(call.q, call.k, call.v, works, key_bias=call.key_bias, **options)
    places, order = call.plan.places
    keys = torch.cat([places, torch.arange(len(places), call.k.shape[1], device=places.device)])
    bias = None if call.key_bias is None else call.key_bias[..., keys]
    out, lse = attend(call.q[:, places], call.k[:, keys], call.v[:, keys], works, key_bias=bias, **options)
    return out[:, order], None if lse is None else lse[:, order]


def _run_partition(call: Call) -> Result:
    return _run_works(partition.attend, call.plan.partition(), call)


def _run_halo(call: Call) -> Result:
    return _run_works(halo.attend, call.plan.halo(), call)


def _run_triton(call: Call) -> Result:
    plan = call.plan
    tensors = [x for x in (call.q, call.k, call.v, call.key_bias) if x is not None]
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    schedule = ops.Schedule(plan.pieces, *((plan.turned, plan.turned_pieces) if grad else ()))
    options = {"groups": call.groups, "key_bias": call.key_bias, "scale": call.scale}
    return ops.attend(call.q, call.k, call.v, plan.lists, schedule, engine="triton", **options)


def _run_plan_loop(call: Call) -> Result:
    options = {"groups": call.groups, "key_bias": call.key_bias, "scale": call.scale}
    return plan_loop.attend(call.q, call.k, call.v, call.plan.lists, **options)


def _run_flex(call: Call) -> Result:
    lists = call.plan.lists
    try:
        mask = _flex_mask(call.plan) if call.groups is None else flex.block_mask(lists, call.groups)
    except ValueError as error:
        raise BackendError(str(error)) from error
    options = {"key_bias": call.key_bias, "scale": call.scale, "return_lse": call.return_lse}
    return flex.attend(call.q, call.k, call.v, lists, mask, **options)


@lru_cache(maxsize=4)
def _flex_mask(plan: Plan) -> Any:
    return flex.block_mask(plan.lists)


def _run_xformers(call: Call) -> Result:
    return _run_works(xformers.attend, call.plan.partition(), call)


def _run_reference(call: Call) -> Result:
    options = {"groups": call.groups, "key_bias": call.key_bias, "scale": call.scale}
    return reference.attend(call.q, call.k, call.v, call.plan.dense_mask, **options)


BACKENDS: dict[str, Backend] = {
    "partition": Backend(partition.why_not, _run_partition),
    "triton": Backend(triton_kernels.why_not, _run_triton),
    "halo": Backend(halo.why_not, _run_halo),
    "plan_loop": Backend(plan_loop.why_not, _run_plan_loop),
    "reference": Backend(reference.why_not, _run_reference),
    # ON_REQUEST: behind plan_loop, which takes everything
    "flex": Backend(flex.why_not, _run_flex),
    "xformers": Backend(xformers.why_not, _run_xformers),
}
ON_REQUEST = ("flex", "xformers")  # backends that run only when named
