"""Operators: methods that need more than one sparse call, or more than queries, keys and values."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from gensparse.layout import Layout


class OperatorCall(NamedTuple):
    """What an operator may use besides q, k and v.

    Args:
        layout: of the call's tokens.
        hidden: input of the attention module [B, S, C], or None where the module was called without one.
        scale: factor of the logits; None is 1/sqrt(D).
        key_bias: [B|1, H|1, S] added to the logits, or None.
        layer, step: numbers of the site and of the denoising step, for reproducible random choices.
        dense: computes the model's own attention, [B, S, H, D].
        notes: what `Loaded.notes` of the method gave for this site.
    """

    layout: Layout
    hidden: Tensor | None
    scale: float | None
    key_bias: Tensor | None
    layer: int
    step: int
    dense: Callable[[], Tensor]
    notes: Any = None


@runtime_checkable
class Operator(Protocol):
    """A frozen value that computes attention in its own way.

    It may also have `density(layout) -> float | None`, the share of the query-key pairs that it computes, for reports.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: OperatorCall) -> Tensor:
        """q, k, v [B, S, H, D] -> [B, S, H, D]."""

    def key(self) -> str:
        """Name and settings, for reports; equal for equal operators."""
