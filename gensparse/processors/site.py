"""A site: one attention module of a model, and the decision sparse or dense at each of its calls."""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gensparse.attention import choose, sparse_attention
from gensparse.errors import LayoutMismatchError
from gensparse.plan import Plan
from gensparse.processors.masks import key_bias

SPARSE = "sparse"


@dataclass(frozen=True)
class Call:
    """What all sites of a model do during one denoiser call.

    Args:
        plan: which keys every query sees; None runs dense.
        tokens: length of the sequence the plan is for.
        reason: why the call is dense when there is no plan.
        gain: factor on the logits (1 leaves the scale of the model).
        strict: raise instead of running dense for a reason nobody asked for.
    """

    plan: Plan | None
    tokens: int = 0
    reason: str = ""
    gain: float = 1.0
    strict: bool = False


class CallSlot:
    """The current `Call` of a model, shared by its sites: of the running thread, else of the last one that had any.

    The second case is backpropagation, which recomputes checkpointed blocks in a thread of its own.
    """

    def __init__(self) -> None:
        self._own = _OwnCall()
        self._last: Call | None = None

    def put(self, call: Call) -> None:
        """What this thread's calls do from now on."""
        self._own.call = self._last = call

    def get(self) -> Call | None:
        """The current call, None before the first."""
        own = self._own.call
        return self._last if own is None else own

    def __reduce__(self) -> "tuple[type[CallSlot], tuple[()]]":
        return CallSlot, ()


class _OwnCall(threading.local):
    def __init__(self) -> None:
        self.call: Call | None = None


class Site:
    """State of one attention module.

    Args:
        name: full name of the module in its model.
        slot: where the model's pre-hook puts the current call.
        pinned: why this site always runs dense, or None.
        held: whether the site's processor has been sparse, so that it must stay so.

    `backend` is the one of the last sparse call. `outcome` is written by every call and collected by the pre-hook of
    the next one; it is never read in between, so that compiled blocks need not be compiled again for it.
    """

    def __init__(self, name: str, slot: CallSlot, pinned: str | None = None) -> None:
        self.name = name
        self.slot = slot
        self.pinned = pinned
        self.held = False
        self.outcome: str | None = None
        self.backend: str | None = None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
        dense: Callable[[], Tensor],
        refused: str | None = None,
    ) -> Tensor:
        """Attention of q, k, v [B, S, H, D] -> [B, S, H, D]: sparse by the current call, else `dense()`.

        Calls whose keys are others than the queries (cross attention, image prompts) are not this site's business.

        Args:
            mask: as scaled_dot_product_attention takes it; over keys it joins the sparse call.
            refused: why the arguments rule out a sparse call.

        Raises:
            LayoutMismatchError: the model is strict and the call does not fit its plan.
        """
        if k.shape[1] != q.shape[1]:
            return dense()
        call = self.slot.get()
        if call is None or call.plan is None or self.pinned is not None:
            self.outcome = self.pinned or (call.reason if call else "called outside the model's forward")
            return dense()
        misfit = refused or _misfit(call, call.plan, q, mask)
        if misfit is not None:
            self._refuse(call, misfit)
            return dense()
        self.outcome = SPARSE
        return self._sparse(q, k, v, call.plan, None if mask is None else key_bias(mask), scale, call.gain)

    @torch.compiler.disable  # CPU backends look at values, which a traced graph cannot
    def _sparse(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, bias: Tensor | None, scale: float | None, gain: float
    ) -> Tensor:
        self.backend = choose(plan, q)
        return sparse_attention(q, k, v, plan, scale=_scaled(scale, q.shape[-1], gain), key_bias=bias)

    def _refuse(self, call: Call, reason: str) -> None:
        if call.strict:
            raise LayoutMismatchError(f"{self.name}: {reason}; pass strict=False to run such calls dense.")
        self.outcome = reason


def _misfit(call: Call, plan: Plan, q: Tensor, mask: Tensor | None) -> str | None:
    if q.shape[1] != call.tokens:
        return f"got {q.shape[1]} tokens, but the layout of the model's call has {call.tokens}"
    if mask is None:
        return None
    if key_bias(mask) is None:
        return "the attention mask differs from query to query"
    if plan.sources:
        return "an attention mask does not cover pooled keys"
    return None


def _scaled(scale: float | None, head_dim: int, gain: float) -> float | None:
    if gain == 1.0:
        return scale
    return (1 / math.sqrt(head_dim) if scale is None else scale) * gain
