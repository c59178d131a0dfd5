"""What a call must look like; every sentence names the argument, what is allowed and what to do."""

import torch
from torch import Tensor

from gensparse.attention.call import Sources
from gensparse.errors import ConfigError, LayoutMismatchError
from gensparse.plan import ClusterPlan, Plan, RoutedPlan


def check_tensors(q: Tensor, k: Tensor, v: Tensor, plan: Plan, groups: Tensor | None) -> None:
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


def check_options(q: Tensor, plan: Plan, scale: float | None, key_bias: Tensor | None, groups: Tensor | None) -> None:
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


def require_own_keys(
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
