"""What a family supplies, how models and their calls are read, and the memo that spares reading ids at every step."""

import inspect
import re
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from gensparse.errors import ConfigError, LayoutMismatchError
from gensparse.layout import Layout

if TYPE_CHECKING:
    import torch

    from gensparse.patterns import Pattern


T = TypeVar("T")

CROSS = "cross "
"""What the roles of cross-attention begin with."""


@dataclass(frozen=True)
class WithKeys:
    """Calls whose keys hold more tokens than their queries: cached references, which every query sees.

    Args:
        layout: of the queries.
        start: first of the extra keys; keys: how many.
    """

    layout: Layout
    start: int
    keys: int


Layouts = Mapping[str, Layout | tuple[Layout, ...] | WithKeys]
"""Role -> layout of its calls; a tuple holds one layout per sample, where samples differ in length."""


@dataclass(frozen=True)
class Family:
    """How one family of diffusers denoisers attends.

    Args:
        name: what reports and tables call it.
        sites: (model, names of its attention modules) -> name -> role, for every module that attends by softmax over
            tokens of one layout. Modules of equal roles have equal layouts. What is left out (cross attention, text
            refiners, linear attention) stays as it is.
        read_layouts: (model, arguments of its forward by name, memo) -> layouts of every role in this call. Raises
            LayoutMismatchError where the arguments contradict each other or describe no grid.
        layout_for: (height, width in pixels, **sizes) -> layout of the picture or clip, without weights.
        native_tokens: (model or pipeline, scheduler config) -> picture tokens at the size of training; ConfigError
            where nothing says it.
        ascending_time: whether the timestep argument grows during a run.
        coarseness: role -> how many times fewer tokens per axis its sites see than `native_tokens` counts; UNets see
            the picture at several resolutions.
        blocks: regular expression of the repeated blocks, the modules worth compiling on their own.
        own_mask: (model, layout) -> what the model itself lets a query see, where it masks attention between the tokens
            of the layout query by query; None where it does not.
        product_mask: name of an argument [B, tokens] that the blocks multiply with itself to a mask of all pairs. It is
            taken out of sparse calls, so that no such matrix is made; "" where there is none.
        cross: (model, names of its attention modules) -> name -> role of modules that attend to text alone, which is
            "cross " and the role whose layout their queries have; none for families without such methods.
        prompted: role of the layout of the picture alone, where image prompts call attention a second time, over the
            picture's keys and their own; "" where they do not.
    """

    name: str
    sites: Callable[[Any, Iterable[str]], dict[str, str]]
    read_layouts: Callable[[Any, Mapping[str, Any], "TensorMemo"], Layouts]
    layout_for: Callable[..., Layout]
    native_tokens: Callable[..., int]
    ascending_time: bool = False
    coarseness: Callable[[str], int] = lambda _role: 1
    blocks: str = r"(single_)?transformer_blocks\.\d+"
    own_mask: Callable[[Any, Layout], "Pattern | None"] = lambda _model, _layout: None
    product_mask: str = ""
    prompted: str = ""
    cross: Callable[[Any, Iterable[str]], dict[str, str]] = lambda _model, _names: {}

    def timestep(self, bound: Mapping[str, Any]) -> Any:
        """The time of a call, falling during a run: a number or a tensor.

        Raises:
            LayoutMismatchError: the call has none.
        """
        value = next((bound[name] for name in ("timestep", "timesteps", "t") if bound.get(name) is not None), None)
        if value is None:
            raise LayoutMismatchError(f"The {self.name} call has no timestep; pass it to the denoiser.")
        return -value if self.ascending_time else value

    def native_at(self, role: str, native_tokens: int | None) -> int | None:
        """Picture tokens that the sites of a role see at the size of training; None where nothing says it."""
        return None if native_tokens is None else max(1, native_tokens // self.coarseness(role) ** 2)


def sites_of(**patterns: str) -> Callable[[Any, Iterable[str]], dict[str, str]]:
    """`Family.sites` from role=regular expression of the full module name."""

    def sites(_model: Any, names: Iterable[str]) -> dict[str, str]:
        return {name: role for name in names for role, pattern in patterns.items() if re.fullmatch(pattern, name)}

    return sites


def attention_modules(model: Any) -> dict[str, Any]:
    """Every module with an attention processor, by its full name; some models have no `attn_processors`."""
    return {name: module for name, module in model.named_modules() if getattr(module, "processor", None) is not None}


def bound_call(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    """The arguments of a model's call by name, however they were passed; a pre-hook returns its `args[1:], kwargs`."""
    return _signature(type(model)).bind(model, *args, **kwargs)


@cache
def _signature(model_class: type) -> inspect.Signature:
    return inspect.signature(model_class.forward)


def needed(family: str, bound: Mapping[str, Any], *names: str) -> tuple[Any, ...]:
    """Arguments of a denoiser call.

    Raises:
        LayoutMismatchError: one is missing.
    """
    missing = [name for name in names if bound.get(name) is None]
    if missing:
        raise LayoutMismatchError(
            f"The {family} call has no {' and no '.join(missing)}, which tell its grid; pass {', '.join(names)} to the "
            "denoiser."
        )
    return tuple(bound[name] for name in names)


def whole_tokens(family: str, *sides: tuple[str, int, int]) -> tuple[int, ...]:
    """Tokens per axis, rounded down, from (axis, size, size of a token).

    Raises:
        ConfigError: an axis holds no whole token.
    """
    for axis, size, token in sides:
        if size < token:
            raise ConfigError(f"{family} {axis}={size} holds no whole token; pass at least {token}.")
    return tuple(size // token for _, size, token in sides)


class TensorMemo:
    """Keeps what was computed from the last few tensors, so that ids on a device are read once per run, not per step.

    An entry counts only for the very same, unmodified tensor object: an equal address or shape is no proof, since a
    freed address is soon used again and 8x6 tokens have the shape of 6x8.
    """

    SIZE = 4

    def __init__(self) -> None:
        self._entries: tuple[tuple[weakref.ref[torch.Tensor], int, Any], ...] = ()

    def get(self, tensor: "torch.Tensor", compute: "Callable[[torch.Tensor], T]") -> T:
        """`compute(tensor)`, from memory when the tensor is one of the last."""
        version = 0 if tensor.is_inference() else tensor._version
        entries = self._entries
        for source, seen, value in entries:
            if source() is tensor and seen == version:
                return value
        value = compute(tensor)
        self._entries = ((weakref.ref(tensor), version, value), *entries[: self.SIZE - 1])
        return value

    def __reduce__(self) -> tuple[type["TensorMemo"], tuple[()]]:
        return TensorMemo, ()
