"""The backends, what they object to, and the choice among them."""

import logging
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gensparse.attention.call import Call, Result
from gensparse.errors import BackendError
from gensparse.kernels import flex, halo, ops, partition, plan_loop, reference, xformers
from gensparse.kernels import triton as triton_kernels
from gensparse.kernels.blocks import Work
from gensparse.kernels.lists import Schedule
from gensparse.kernels.need import Need
from gensparse.kernels.triton.tune import arch_of
from gensparse.plan import Plan

logger = logging.getLogger("gensparse")


class Backend(NamedTuple):
    """A way to run a plan: why it cannot serve a call, and the call itself."""

    why_not: Callable[[Need], str | None]
    run: Callable[[Call], Result]


def run(call: Call, backend: str | None) -> Result:
    """The call on the backend that was named, or on the first without an objection."""
    if torch.compiler.is_compiling() and backend is None:
        return _run_compiled(call)
    need = need_of(call.q, call.k, call.v, call.plan, call.key_bias, call.return_lse)
    return run_first(call, need) if backend is None else explicit(backend, need).run(call)


def run_first(call: Call, need: Need) -> Result:
    """The first backend without an objection; where its kernels turn out not to run, the next one."""
    failed: dict[str, str] = {}
    while True:
        name = choose_backend(call.plan, need, failed)
        try:
            return BACKENDS[name].run(call)
        except BackendError as error:
            failed[name] = str(error)
            announce_failure(str(error))


def _run_compiled(call: Call) -> Result:
    """One op for any plan, because a compiler should neither look into the lists nor choose by what they hold."""
    return _run_op(call, "auto")


def compiled_backend(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Name of the backend that compiled calls run on."""
    return ops.automatic_engine(device, dtype, head_dim)


# all that torch.compiler.assume_constant_result does, which would import torch's compiler and triton here
compiled_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose_backend(plan: Plan, need: Need, failed: Mapping[str, str] = MappingProxyType({})) -> str:
    refusals: list[str] = []
    for name, backend in BACKENDS.items():
        reason = failed.get(name) or backend.why_not(need)
        if reason is None:
            # on a GPU anything but the kernels, or dense windows, is far slower than it could be
            slow = need.device != "cpu" and name not in ("partition", "triton")
            announce(name, plan.pattern.key(), tuple(refusals), logging.WARNING if slow else logging.INFO)
            return name
        refusals.append(reason)
    raise BackendError(" ".join(refusals))


def explicit(name: str, need: Need) -> Backend:
    if not isinstance(name, str) or name not in BACKENDS:
        raise BackendError(f"backend={name!r} is unknown; use one of {', '.join(BACKENDS)}.")
    reason = BACKENDS[name].why_not(need)
    if reason is not None:
        raise BackendError(reason)
    return BACKENDS[name]


@lru_cache(maxsize=256)
def announce(name: str, pattern: str, refusals: tuple[str, ...], level: int) -> None:
    """Log a choice once; the cache remembers what was said."""
    logger.log(level, "%s runs on %s. %s", pattern, name, " ".join(refusals))


@lru_cache(maxsize=256)
def announce_failure(reason: str) -> None:
    """Warn once of every reason."""
    logger.warning("%s Another backend with the same mask runs instead.", reason)


def need_of(q: Tensor, k: Tensor, v: Tensor, plan: Plan, key_bias: Tensor | None, lse: bool) -> Need:
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
    return _run_op(call, "triton")


def _run_op(call: Call, engine: str) -> Result:
    plan, schedule = call.plan, None
    tensors = [x for x in (call.q, call.k, call.v, call.key_bias) if x is not None]
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if engine == "triton" or call.q.device.type != "cpu":
        turned = (plan.turned, plan.turned_pieces) if grad else (None, None)
        schedule = Schedule(plan.pieces, *turned, plan.boxes)
    options = {"groups": call.groups, "key_bias": call.key_bias, "scale": call.scale}
    return ops.attend(call.q, call.k, call.v, plan.lists, schedule, engine=engine, **options)


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
    try:
        return flex.attend(call.q, call.k, call.v, lists, mask, **options)
    except Exception as error:
        if type(error).__name__ != "FailOnRecompileLimitHit":
            raise
        raise BackendError(
            "Can't run flex; torch keeps no more compiled variants of it in this process: call torch._dynamo.reset(), "
            "or use another backend."
        ) from error


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
