"""What a family supplies, and the memo that spares reading position ids at every step."""

import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from gensparse.layout import Layout

if TYPE_CHECKING:
    import torch


T = TypeVar("T")


class Family(Protocol):
    """Members every family module has."""

    SITES: str
    """Regular expression that matches the full name of every attention module whose call has the model's layout."""

    def read_layout(self, bound: Mapping[str, Any], memo: "TensorMemo | None" = None) -> Layout:
        """Layout of one denoiser call from its arguments bound by name.

        Raises:
            LayoutMismatchError: the arguments contradict each other or describe no grid.
        """

    def layout_for(self, height: int, width: int, *, n_text: int, vae_scale: int = 8, patch: int = 2) -> Layout:
        """Layout a picture of height x width pixels will have; needs no weights."""

    def native_tokens(self, model: Any, scheduler_config: Mapping[str, Any] | None = None) -> int:
        """Picture tokens at the size the model was trained for."""


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
