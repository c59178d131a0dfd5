"""Calls whose keys are chosen at run time."""

import torch
from torch import Tensor

from gensparse.attention.call import Call, Result
from gensparse.attention.dispatch import explicit, need_of, run, run_first
from gensparse.errors import BackendError, ConfigError
from gensparse.kernels.route import Choice, Clustering
from gensparse.layout import Layout
from gensparse.patterns import Blocks
from gensparse.plan import ClusterPlan, RouteContext, RoutedPlan, build_plan


def attend_routed(call: Call, ctx: RouteContext | Choice | Clustering | None, backend: str | None) -> Result:
    """Choose, append pooled keys, and attend by the lists of the choice, as many heads at a time as their lists fit."""
    plan: RoutedPlan = call.plan
    choice = ctx if isinstance(ctx, Choice) else plan.select(call.q, call.k, _context(ctx, call.plan))
    k, v, key_bias = plan.extend(call.k, call.v, call.key_bias)
    need = need_of(call.q, k, v, plan, key_bias, call.return_lse)
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
        parts.append(run_first(part, need) if backend is None else explicit(backend, need).run(part))
    out = torch.cat([out for out, _ in parts], 2)
    return out, torch.cat([lse for _, lse in parts], 2) if call.return_lse else None


def attend_clustered(call: Call, ctx: RouteContext | Choice | Clustering | None, backend: str | None) -> Result:
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
    out, _ = run(Call(*gathered, inner, None, bias, call.scale, False), backend)
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
