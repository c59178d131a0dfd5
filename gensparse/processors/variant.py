"""Sparse variants of attention processors: diffusers' own code with its one attention call redirected.

A variant subclasses the processor's class, so weights, state-dict keys, `isinstance` checks and constructor stay as
they are; an existing processor becomes sparse by a change of its class and dense again by changing it back. The
variant runs the class's own `__call__` code with a private copy of its globals in which only the attention call is
another one. Projections, norms and rotary embedding therefore remain diffusers', whichever release is installed. Where
that call is the wrong place to cut, code of `processors.native` stands for the class's own.
"""

import inspect
import threading
import types
from collections.abc import Callable
from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gensparse.errors import UnsupportedProcessorError
from gensparse.processors import _compat
from gensparse.processors.native import native_call
from gensparse.processors.site import Site, SiteCall

SITE = "_gensparse_site"
"""Name of the attribute that holds an attention module's `Site`."""

_BASE = "_gensparse_base"


class _Running(threading.local):
    """The site whose processor runs in this thread, its input and the site's note of it.

    The redirected call cannot see the module.
    """

    def __init__(self) -> None:
        self.site: Site | None = None
        self.hidden: Tensor | None = None
        self.visit: Any = None


_RUNNING = _Running()


def is_sparse(processor: Any) -> bool:
    """Whether the class of a processor is a sparse variant."""
    return hasattr(type(processor), _BASE)


def make_sparse(processor: Any) -> None:
    """Change a processor's class to its sparse variant, in place.

    Raises:
        UnsupportedProcessorError: its class never reaches an attention call that can be redirected.
    """
    if not is_sparse(processor):
        processor.__class__ = sparse_variant(type(processor))


def make_dense(processor: Any) -> None:
    """Undo `make_sparse`; does nothing to other processors."""
    if is_sparse(processor):
        processor.__class__ = getattr(type(processor), _BASE)


@cache
def sparse_variant(cls: type) -> type:
    """The sparse subclass of a processor class, the same one at every call; a variant is its own.

    Raises:
        UnsupportedProcessorError: `cls.__call__` has no attention call that can be redirected.
    """
    if hasattr(cls, _BASE):
        return cls
    original = cls.__call__
    if not isinstance(original, types.FunctionType) or _compat.core_call(original) is None:
        raise UnsupportedProcessorError(
            f"{cls.__name__} computes attention without {_compat.DISPATCH} or F.{_compat.SDPA}, so nothing can be made "
            f"sparse in it; {_compat.remedy(cls)}."
        )
    redirected = _redirect(native_call(cls) or original)

    def call(self: Any, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        previous = _RUNNING.site, _RUNNING.hidden, _RUNNING.visit
        site = _site_of(attn)
        _RUNNING.site, _RUNNING.hidden = site, args[0] if args else kwargs.get("hidden_states")
        _RUNNING.visit = site.visit(attn, args, kwargs)
        try:
            return redirected(self, attn, *args, **kwargs)
        finally:
            _RUNNING.site, _RUNNING.hidden, _RUNNING.visit = previous

    # attention modules drop the keyword arguments that are not in the signature of their processor
    call.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    members = {"__call__": call, "__reduce_ex__": _reduce, "__module__": __name__, _BASE: cls}
    variant = type(f"Sparse{cls.__name__}", (cls,), members)
    _compat.know_variant(variant, cls)
    return variant


def _site_of(attn: nn.Module) -> Site:
    site = getattr(attn, SITE, None)
    if site is None:
        raise UnsupportedProcessorError(
            f"A sparse processor runs in a {type(attn).__name__} that was not prepared for it; call gensparse.apply() "
            "on this model instead of moving processors between models."
        )
    return site


def _redirect(original: types.FunctionType) -> types.FunctionType:
    """`original` with private globals in which the attention call goes to the running site."""
    names = dict(original.__globals__)
    if _compat.DISPATCH in names:
        names[_compat.DISPATCH] = _dispatch_to_site(names[_compat.DISPATCH])
    if "F" in names:
        names["F"] = _compat.functional_shim(_sdpa_to_site)
    names.pop("__name__", None)  # torch.compile would resolve globals through the module of that name
    for name, helper in _compat.helpers(original).items():
        names[name] = _rebound(helper, names)
    return _rebound(original, names)


def _rebound(function: types.FunctionType, names: dict[str, Any]) -> types.FunctionType:
    """The code of a function with other globals."""
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _dispatch_to_site(dispatch: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """diffusers' dispatch on [B, S, H, D], sparse where the running site says so."""

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **options: Any,
    ) -> Tensor:
        def dense(instead: Tensor | None = None) -> Tensor:
            given = attn_mask if instead is None else instead
            return dispatch(query, key, value, given, dropout_p, is_causal, scale, **options)

        if _compat.scores_are_skipped():
            return dense()
        mask = _compat.widened_mask(attn_mask, query.shape[0], key.shape[1])
        refused, divided = _compat.refusal(dropout_p, is_causal), _compat.divided(options)
        call = SiteCall(query, key, value, mask, scale, dense, refused, _RUNNING.hidden, divided, _RUNNING.visit)
        return _running_site().attend(call)

    return attend


def _sdpa_to_site(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """F.scaled_dot_product_attention on [B, H, S, D], sparse where the running site says so."""

    def dense(instead: Tensor | None = None) -> Tensor:
        given = attn_mask if instead is None else instead
        out = F.scaled_dot_product_attention(
            query, key, value, given, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        return out.transpose(1, 2)

    if _compat.scores_are_skipped():
        return dense().transpose(1, 2)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    refused = _compat.refusal(dropout_p, is_causal)
    call = SiteCall(q, k, v, attn_mask, scale, dense, refused, _RUNNING.hidden, False, _RUNNING.visit)
    return _running_site().attend(call).transpose(1, 2)


def _running_site() -> Site:
    site = _RUNNING.site
    if site is None:
        raise UnsupportedProcessorError("A redirected attention call ran outside a processor; call the processor.")
    return site


def _rebuild(base: type) -> Any:
    variant = sparse_variant(base)
    return variant.__new__(variant)


def _reduce(self: Any, protocol: int) -> tuple[Any, ...]:
    """Pickle by the base class: variants exist at run time only."""
    return _rebuild, (getattr(type(self), _BASE),), self.__dict__
