"""The halves of classifier-free guidance one after the other, where a pipeline runs them as one batch.

Samples of a batch do not know of each other, so that two calls give what one gives, with half of the activations.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

_NAME = "gensparse_halves"


@contextmanager
def halved(model: nn.Module) -> Iterator[None]:
    """While active, a denoiser computes a batch of an even number of samples as two batches of half of it."""
    hook = _Halves()
    HookRegistry.check_if_exists_or_initialize(model).register_hook(hook, _NAME)
    try:
        yield
    finally:
        registry = model._diffusers_hook
        registry.remove_hook(_NAME, recurse=False)
        if not registry.hooks:
            del model._diffusers_hook
            own = model.__dict__.get("forward")
            if getattr(own, "__func__", None) is type(model).forward:  # the class's own, put back by the registry
                del model.forward


class _Halves(ModelHook):
    """Splits whatever has the batch as its first axis."""

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = self.fn_ref.original_forward
        sample = args[0] if args else next(iter(kwargs.values()), None)
        batch = len(sample) if isinstance(sample, torch.Tensor) and sample.ndim > 1 else 1
        if batch % 2:
            return run(*args, **kwargs)
        parts = []
        for half in (slice(0, batch // 2), slice(batch // 2, batch)):
            own = [_part(value, batch, half) for value in args]
            parts.append(run(*own, **{name: _part(value, batch, half) for name, value in kwargs.items()}))
        return _joined(parts)


def _part(value: Any, batch: int, half: slice) -> Any:
    """The half of a value, where it has one entry per sample of the batch."""
    if isinstance(value, torch.Tensor):
        return value[half] if value.ndim > 0 and len(value) == batch else value
    if isinstance(value, Mapping):
        return {name: _part(item, batch, half) for name, item in value.items()}
    if isinstance(value, list | tuple) and value and all(isinstance(item, torch.Tensor) for item in value):
        return type(value)(_part(item, batch, half) for item in value)
    return value


def _joined(parts: list[Any]) -> Any:
    """The outputs of both halves as one."""
    first = parts[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(parts)
    if isinstance(first, tuple):
        return tuple(_joined([part[k] for part in parts]) for k in range(len(first)))
    return type(first)(**{name: _joined([part[name] for part in parts]) for name in first})
