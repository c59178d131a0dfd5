"""One sparse attention call: arguments checked, extra keys made, a backend chosen."""

import torch
from torch import Tensor

from gensparse.attention.call import Call, Sources
from gensparse.attention.checks import check_options, check_tensors, require_own_keys
from gensparse.attention.dispatch import (
    BACKENDS,
    ON_REQUEST,
    Backend,
    choose_backend,
    compiled_backend,
    need_of,
    run,
)
from gensparse.attention.routed import attend_clustered, attend_routed
from gensparse.attention.sources import biased_pools, length_bias, with_sources
from gensparse.errors import ConfigError
from gensparse.kernels.route import Choice, Clustering
from gensparse.layout import Layout
from gensparse.patterns import Blocks
from gensparse.plan import ClusterPlan, Plan, RouteContext, RoutedPlan, build_plan

__all__ = [
    "BACKENDS",
    "ON_REQUEST",
    "Backend",
    "Sources",
    "backends",
    "biased_pools",
    "choose",
    "explain",
    "length_bias",
    "sparse_attention",
]


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
    check_tensors(q, k, v, plan, groups)
    check_options(q, plan, scale, key_bias, groups)
    plan = plan.to(q.device)
    if isinstance(plan, RoutedPlan | ClusterPlan):
        require_own_keys(plan, key_bias, sources, groups)
        call = Call(q, k, v, plan, None, key_bias, scale, return_lse)
        out, lse = (attend_routed if isinstance(plan, RoutedPlan) else attend_clustered)(call, ctx, backend)
        return (out, lse) if return_lse else out
    if ctx is not None:
        raise ConfigError("ctx is given but nothing is chosen at run time by this plan; leave ctx out.")
    if plan.sources:
        k, v, key_bias = with_sources(k, v, plan, key_bias, sources)
    elif sources:
        raise ConfigError(f"sources={sorted(sources)} are given but the plan has none; leave sources out.")
    call = Call(q, k, v, plan, groups, key_bias, scale, return_lse)
    out, lse = run(call, backend)
    return (out, lse) if return_lse else out


def explain(plan: Plan, q: Tensor) -> dict[str, str | None]:
    """Backend -> why it cannot run `plan` on tensors like `q`, None where it can; the first None is chosen."""
    need = need_of(q, q, q, plan, None, False)
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
    """Name of the backend that `sparse_attention` takes for `plan` on tensors like `q`, also in compiled calls."""
    if torch.compiler.is_compiling():
        return compiled_backend(q.device, q.dtype, q.shape[-1])
    return choose_backend(plan, need_of(q, q, q, plan, None, False))
