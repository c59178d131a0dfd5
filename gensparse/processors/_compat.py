"""The private names of diffusers that processors rely on, all in this file.

Read in diffusers 0.42: every processor that computes softmax attention calls `dispatch_attention_fn` (tensors
[B, S, H, D]) or `F.scaled_dot_product_attention` (tensors [B, H, S, D]) by that global name in its own `__call__`, or
in a function of its module that it calls (FLUX.2 with a cache of references).
"""

import logging
import types
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gensparse.errors import ConfigError
from gensparse.parallel import Team

_LOG = logging.getLogger(__name__)

TESTED = "0.42."
"""Start of the diffusers versions whose private names were read and tested."""

DISPATCH = "dispatch_attention_fn"
SDPA = "scaled_dot_product_attention"
_SCORE_SKIP = "AttentionScoreSkipFunctionMode"

Replacement = Callable[..., Tensor]


@cache
def warn_of_other_versions(version: str | None = None) -> None:
    """Warn, once of each version, that the installed diffusers (or `version`) is not one that was tested."""
    if version is None:
        from diffusers import __version__ as version
    if not version.startswith(TESTED):
        _LOG.warning(
            "gensparse was tested with diffusers %sx; with %s, compare a run under a window as large as the picture "
            "with a dense one before you rely on it.",
            TESTED,
            version,
        )


def repeated_blocks(model: Any) -> Collection[str]:
    """Class names of the blocks that diffusers would compile; none for many models."""
    return tuple(getattr(model, "_repeated_blocks", None) or ())


def remedy(cls: type) -> str:
    """What to do about a processor class without an attention call that can be redirected."""
    for word, call in (
        ("Sliced", "disable_attention_slicing"),
        ("XFormers", "disable_xformers_memory_efficient_attention"),
    ):
        if word in cls.__name__:
            return f"call {call}() on the pipeline"
    return "set a processor that calls torch's scaled_dot_product_attention, such as AttnProcessor2_0"


def core_call(function: types.FunctionType) -> str | None:
    """The name of the attention call in a processor's `__call__`, or None."""
    names = function.__code__.co_names
    if DISPATCH in names:
        return DISPATCH
    return SDPA if SDPA in names and "F" in names else None


def helpers(function: types.FunctionType) -> dict[str, types.FunctionType]:
    """Functions of a function's own module that it calls and that make attention calls, by name."""
    names = function.__globals__
    found = {name: names.get(name) for name in function.__code__.co_names}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, types.FunctionType) and value.__globals__ is names and core_call(value) is not None
    }


def functional_shim(sdpa: Replacement) -> types.ModuleType:
    """`torch.nn.functional` with another scaled_dot_product_attention."""
    shim = types.ModuleType("gensparse_functional")
    shim.__dict__.update({name: getattr(F, name) for name in dir(F) if not name.startswith("__")})
    shim.__dict__[SDPA] = sdpa
    return shim


def widened_mask(mask: Tensor | None, batch: int, keys: int) -> Tensor | None:
    """A mask as scaled_dot_product_attention reads it: diffusers' dispatch takes [B, Nk] as a mask over keys."""
    if mask is not None and mask.ndim == 2 and mask.shape == (batch, keys):
        return mask[:, None, None, :]
    return mask


def refusal(dropout_p: float, is_causal: bool) -> str | None:
    """Why the arguments of an attention call rule out a sparse one, or None."""
    if dropout_p:
        return "attention dropout is on"
    if is_causal:
        return "causal attention was asked for"
    return None


def divided(options: dict[str, Any]) -> bool:
    """Whether the tensors of an attention call are a process's part of the sequence."""
    return options.get("parallel_config") is not None


def team_of(model: Any) -> Team | None:
    """The processes that share the attention calls of a model by Ulysses; None for a model of one process.

    Raises:
        ConfigError: the model uses ring attention.
    """
    config = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
    if config is None:
        return None
    if config.ring_degree > 1:
        raise ConfigError(
            f"Ring attention (ring_degree={config.ring_degree}) shows a process the keys of the others piece by piece, "
            "where a sparse pattern needs them in place; use ContextParallelConfig(ulysses_degree=...), or "
            "gensparse.remove() to run dense."
        )
    return Team.of(config._ulysses_mesh.get_group(), uneven=config.ulysses_anything)


def heads_of(model: Any, heads: int) -> slice | None:
    """The heads that this process computes of `heads` under tensor parallelism; None where it computes all."""
    config = getattr(getattr(model, "_parallel_config", None), "tensor_parallel_config", None)
    if config is None or not heads:
        return None
    return Team(None, config._mesh.get_local_rank(), config._mesh.size()).share(heads)


def dispatcher() -> Callable[..., Tensor]:
    """diffusers' `dispatch_attention_fn`; its options beside q, k and v are those of the processor that calls it."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    return dispatch_attention_fn


def dispatch_options(processor: Any) -> dict[str, Any]:
    """What a processor passes to the dispatch for the backend and the parallelism chosen for it."""
    return {"backend": processor._attention_backend, "parallel_config": processor._parallel_config}


def rotary() -> Callable[..., Tensor]:
    """diffusers' rotation of queries or keys [B, S, H, D] by (cos, sin) [S, D]."""
    from diffusers.models.embeddings import apply_rotary_emb

    return partial(apply_rotary_emb, sequence_dim=1)


def set_aside(model: Any) -> list[Any]:
    """Processors that a model keeps to bring them back later: `fuse_qkv_projections` exchanges all of them."""
    return list((getattr(model, "original_attn_processors", None) or {}).values())


def scores_are_skipped() -> bool:
    """Whether a layer-skip hook of diffusers runs: it answers scaled_dot_product_attention by the values themselves."""
    stack = range(torch._C._len_torch_function_stack())
    return any(type(torch._C._get_function_stack_at(place)).__name__ == _SCORE_SKIP for place in stack)


def know_variant(variant: type, base: type) -> None:
    """Tell diffusers' layer-skip hooks, which look classes up, what they know about the base of a variant."""
    from diffusers.hooks._helpers import AttentionProcessorRegistry as Registry

    with suppress(ValueError):  # a base they do not know
        Registry.register(variant, Registry.get(base))
