"""Counting live bytes: the peak of tensors per device while code runs, also of tensors that do not exist.

Under `fake_tensors` a GPU and 100 GiB are not needed: shapes alone are computed. Attention counts as one output tensor,
as fused kernels have it; workspaces of libraries and the slack of allocators are not seen.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class FusedAttention(TorchFunctionMode):
    """Attention of torch that makes its result and nothing else, as a fused kernel."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is functional.scaled_dot_product_attention:
            query, _, value = [*args, *((kwargs or {}).get(name) for name in ("query", "key", "value")[len(args) :])][
                :3
            ]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Tensors made inside have shapes, devices and dtypes, but no memory; "cuda" is there on every machine."""
    with FakeTensorMode(), FusedAttention():
        yield


class LiveBytes(TorchDispatchMode):
    """While active, follows every tensor that an operation makes; tensors from before are not counted.

    Attributes:
        live, peak: bytes per device type now and at most.
        largest: entries of the largest tensor made, per device type.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.largest: Counter[str] = Counter()
        self._owners: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        known = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        out = function(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            self._follow(tensor, known)
        return out

    def _follow(self, tensor: torch.Tensor, known: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, size, device = storage._cdata, storage.nbytes(), tensor.device.type
        if key not in self._owners and key in known:
            return  # a view of something from before
        if key not in self._owners:
            self._owners[key] = 0
            self.live[device] += size
            self.peak[device] = max(self.peak[device], self.live[device])
            self.largest[device] = max(self.largest[device], tensor.numel())
        self._owners[key] += 1
        weakref.finalize(tensor, self._forget, key, size, device)

    def _forget(self, key: int, size: int, device: str) -> None:
        self._owners[key] -= 1
        if not self._owners[key]:
            del self._owners[key]
            self.live[device] -= size


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def materialised(model: torch.nn.Module, device: str = "cuda") -> torch.nn.Module:
    """A model that was built on the meta device, with weights of no content; call it under `fake_tensors`."""
    for module in model.modules():
        for name, value in list(module._parameters.items()):
            if value is not None:
                empty = torch.empty(value.shape, dtype=value.dtype, device=device)
                module._parameters[name] = torch.nn.Parameter(empty, requires_grad=False)
        for name, value in list(module._buffers.items()):
            if value is not None:
                module._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=device)
    return model
