"""Feed-forward layers computed a number of tokens at a time: their hidden maps are the peak of large pictures.

A feed-forward treats every token on its own, so that pieces give the same result as the whole. Blocks with attention
and feed-forward side by side (FLUX's single blocks and their kin) join both before one projection; there, the
feed-forward waits until that projection is called, and is then computed piece by piece inside it.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from gensparse.errors import ConfigError, short

_NAME = "gensparse_chunks"
_PARALLEL = ("proj_mlp", "act_mlp", "proj_out")


class Chunks:
    """What `chunk` changed on one model.

    Attributes:
        feed_forwards, parallel_blocks: modules that are computed in pieces.
    """

    def __init__(self, model: nn.Module, tokens: int) -> None:
        self.model, self.tokens = model, tokens
        self._changed: list[nn.Module] = []
        self.feed_forwards = self.parallel_blocks = 0
        for module in list(model.modules()):
            if _is_feed_forward(module):
                self._hook(module, _Pieces(tokens))
                self.feed_forwards += 1
            elif _is_parallel(module):
                late = _Late(tokens, module.act_mlp)
                self._hook(module.proj_mlp, late.first)
                self._hook(module.proj_out, late.last)
                self.parallel_blocks += 1

    def _hook(self, module: nn.Module, hook: ModelHook) -> None:
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, _NAME)
        self._changed.append(module)

    def remove(self) -> None:
        """Compute everything at once again; may be called twice."""
        for module in self._changed:
            registry = module._diffusers_hook
            registry.remove_hook(_NAME, recurse=False)
            if not registry.hooks:
                del module._diffusers_hook
                own = module.__dict__.get("forward")
                if getattr(own, "__func__", None) is type(module).forward:  # the class's own, put back by the registry
                    del module.forward
        self._changed.clear()


def chunk(model: nn.Module, tokens: int) -> Chunks:
    """Compute the feed-forwards of a denoiser at most `tokens` tokens at a time, until `remove()` of the result.

    Args:
        model: a transformer or UNet of diffusers.
        tokens: of each sample; calls with fewer tokens run as before.

    Raises:
        ConfigError: no count of tokens, a model without a known feed-forward, or one that is chunked already.
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ConfigError(f"tokens={short(tokens)} per chunk; give a whole number from 1, for instance 4096.")
    if any(_NAME in getattr(getattr(m, "_diffusers_hook", None), "hooks", ()) for m in model.modules()):
        raise ConfigError(f"This {type(model).__name__} is computed in chunks already; remove those first.")
    chunks = Chunks(model, tokens)
    if not (chunks.feed_forwards or chunks.parallel_blocks):
        raise ConfigError(f"{type(model).__name__} has no feed-forward that can be computed in chunks; leave them out.")
    return chunks


@contextmanager
def chunked(model: nn.Module, tokens: int) -> Iterator[Chunks]:
    """`chunk` for the length of a with-block."""
    chunks = chunk(model, tokens)
    try:
        yield chunks
    finally:
        chunks.remove()


def _is_feed_forward(module: nn.Module) -> bool:
    """By name, as diffusers has no base class for them; mixtures of experts look at all tokens."""
    name = type(module).__name__
    return "FeedForward" in name and "MOE" not in name.upper()


def _is_parallel(module: nn.Module) -> bool:
    """A block whose attention and feed-forward are joined, in this order, before one projection."""
    parts = [getattr(module, name, None) for name in _PARALLEL]
    if not all(isinstance(part, nn.Module) for part in parts):
        return False
    inner, joined = (getattr(parts[0], "out_features", 0), getattr(parts[2], "in_features", 0))
    return 0 < inner < joined


def _pieces(x: Tensor, tokens: int, run: Callable[[slice], Tensor]) -> Tensor:
    """`run` on pieces of the tokens of x [..., N, C], put together without a second copy."""
    out: Tensor | None = None
    for start in range(0, x.shape[-2], tokens):
        part = slice(start, start + tokens)
        piece = run(part)
        if out is None:
            out = piece.new_empty(*x.shape[:-1], piece.shape[-1])
        out[..., part, :] = piece
    assert out is not None
    return out


class _Pieces(ModelHook):
    """A whole feed-forward."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def new_forward(self, module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        run = self.fn_ref.original_forward
        if args or kwargs or x.ndim < 2 or x.shape[-2] <= self.tokens:
            return run(x, *args, **kwargs)
        return _pieces(x, self.tokens, lambda part: run(x[..., part, :]))


class _Late:
    """A feed-forward beside an attention: its input waits (per thread) from its first projection to the joined one."""

    def __init__(self, tokens: int, act: nn.Module) -> None:
        self.tokens, self.act = tokens, act
        self.waiting = threading.local()
        self.first, self.last = _First(self), _Last(self)

    def grown(self, x: Tensor) -> Tensor:
        return self.act(self.first.fn_ref.original_forward(x))


class _First(ModelHook):
    """The projection into the feed-forward: gives nothing, [..., N, 0], where the work waits."""

    def __init__(self, late: _Late) -> None:
        super().__init__()
        self.late = late

    def new_forward(self, module: nn.Module, x: Tensor) -> Tensor:
        if x.shape[-2] <= self.late.tokens:
            return self.fn_ref.original_forward(x)
        self.late.waiting.x = x
        return x.new_empty(*x.shape[:-1], 0)


class _Last(ModelHook):
    """The projection out of both: what it gets is the attention alone, where the feed-forward waits."""

    def __init__(self, late: _Late) -> None:
        super().__init__()
        self.late = late

    def new_forward(self, module: nn.Module, joined: Tensor) -> Tensor:
        run, late = self.fn_ref.original_forward, self.late
        x = late.waiting.__dict__.pop("x", None)
        if x is None:
            return run(joined)
        return _pieces(
            joined, late.tokens, lambda part: run(torch.cat([joined[..., part, :], late.grown(x[..., part, :])], -1))
        )
