"""Attention by tile lists as torch custom ops: opaque to torch.compile, with shapes, gradients and no host sync.

`attend` runs one of two engines on the same plan tensors: "triton", the GPU kernels (CPU tensors in Triton's
interpreter), or "plan_loop", which runs on every device; "auto" takes the kernels on GPUs that run them. Other backends
are plain torch code and need no op.
"""

import logging
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from gensparse.errors import BackendError

from . import plan_loop, triton
from .lists import Boxes, Pieces, Schedule, TileLists, Turned
from .need import Need
from .triton.tune import arch_of

logger = logging.getLogger("gensparse")

ENGINES = ("auto", "triton", "plan_loop")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: TileLists,
    schedule: Schedule | None = None,
    *,
    groups: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    engine: str = "plan_loop",
) -> tuple[Tensor, Tensor]:
    """Attention by tile lists as one op.

    Args:
        q, k, v: [B, S, H, D], any strides; k and v may have fewer heads (a divisor of H) and extra keys at the end.
        lists: the plan's tensors, on the device of q.
        schedule: needed by engine "triton", and by "auto" on a GPU, with the turned lists where a gradient is wanted.
        groups: integer [B|1, H|1] picking one of the G lists for every head; not needed when G = 1.
        key_bias: [B|1, H|1, Nk] added to the logits (natural units), -inf hides a key and gets no gradient.
        scale: factor of the logits, 1/sqrt(D) by default.
        engine: one of `ENGINES`.

    Returns:
        out [B, Nq, H, D] in q.dtype and lse [B, Nq, H] in at least fp32, both contiguous and differentiable once. Rows
        without a key give 0 and -inf.

    Raises:
        BackendError: the kernels cannot be compiled or do not fit.
    """
    pieces, turned, slots = _flat(schedule)
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    boxes, sizes = _flat_boxes(schedule)
    return _attend(q, k, v, key_bias, groups, list(lists), pieces, turned, *slots, factor, engine, boxes, sizes)


@torch.library.custom_op("gensparse::attend", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    groups: Tensor | None,
    lists: Sequence[Tensor],
    pieces: Sequence[Tensor],
    turned: Sequence[Tensor],
    slots: int,
    turned_slots: int,
    scale: float,
    engine: str,
    boxes: Sequence[Tensor],
    box_sizes: Sequence[int],
) -> tuple[Tensor, Tensor]:
    options = {"groups": groups, "key_bias": key_bias, "scale": scale}
    if _settled(engine, q) == "plan_loop":
        out, lse = plan_loop.attend(q, k, v, TileLists(*lists), **options)
        return out.contiguous(), lse.contiguous()
    from .triton.forward import forward

    given = Boxes(*boxes, box_sizes[0], tuple(box_sizes[1:4]), tuple(box_sizes[4:])) if boxes else None
    return forward(q, k, v, TileLists(*lists), Pieces(*pieces, slots), boxes=given, **options)


def automatic_engine(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The engine that "auto" stands for on tensors of this kind."""
    need = Need(dtype, device.type, head_dim, queries=0, keys=0, density=1.0, arch=arch_of(device))
    return "triton" if device.type != "cpu" and triton.why_not(need) is None else "plan_loop"


def _settled(engine: str, q: Tensor) -> str:
    return automatic_engine(q.device, q.dtype, q.shape[-1]) if engine == "auto" else engine


@_attend.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    groups: Tensor | None,
    lists: Sequence[Tensor],
    pieces: Sequence[Tensor],
    turned: Sequence[Tensor],
    slots: int,
    turned_slots: int,
    scale: float,
    engine: str,
    boxes: Sequence[Tensor],
    box_sizes: Sequence[int],
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=wide)


@torch.library.custom_op("gensparse::attend_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    groups: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lists: Sequence[Tensor],
    pieces: Sequence[Tensor],
    turned: Sequence[Tensor],
    slots: int,
    turned_slots: int,
    scale: float,
    engine: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = {"groups": groups, "key_bias": key_bias, "scale": scale}
    given = (d_out, d_lse, q, k, v, out, lse, TileLists(*lists))
    if _settled(engine, q) == "plan_loop":
        grads = plan_loop.backward(*given, **options)
    else:
        grads = _triton_gradients(given, pieces, turned, (slots, turned_slots), **options)
    dq, dk, dv = (x.contiguous() for x in grads[:3])
    return dq, dk, dv, q.new_empty(0) if grads[3] is None else grads[3].contiguous()


def _triton_gradients(
    given: tuple, pieces: Sequence[Tensor], turned: Sequence[Tensor], slots: tuple[int, int], **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients by the kernels; where they turn out not to run, by the plan loop, which sees the same pairs."""
    from .triton.backward import backward

    if not turned:
        raise BackendError("Can't run triton; gradients need the turned lists: pass Schedule(pieces, turned, ...).")
    schedule = (Pieces(*pieces, slots[0]), Turned(*turned[:3]), Pieces(*turned[3:], slots[1]))
    try:
        return backward(*given, *schedule, **options)
    except BackendError as error:
        logger.warning("%s The plan loop computes these gradients.", error)
    return plan_loop.backward(*given, **options)


@_backward.register_fake
def _(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    groups: Tensor | None,
    out: Tensor,
    lse: Tensor,
    lists: Sequence[Tensor],
    pieces: Sequence[Tensor],
    turned: Sequence[Tensor],
    slots: int,
    turned_slots: int,
    scale: float,
    engine: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias = q.new_empty(0) if key_bias is None else key_bias.new_empty(key_bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), bias


def _save(ctx, inputs, output) -> None:
    q, k, v, key_bias, groups, lists, pieces, turned, slots, turned_slots, scale, engine, boxes, _ = inputs
    ctx.save_for_backward(q, k, v, key_bias, groups, *output, *lists, *pieces, *turned)
    ctx.counts = (len(lists), len(pieces), len(turned))
    ctx.boxes = len(boxes)  # gradients go by rows
    ctx.numbers = (slots, turned_slots, scale, engine)
    ctx.set_materialize_grads(True)


def _gradients(ctx, d_out: Tensor, d_lse: Tensor):
    q, k, v, key_bias, groups, out, lse, *rest = ctx.saved_tensors
    ends = list(accumulate(ctx.counts, initial=0))
    lists, pieces, turned = (rest[first:end] for first, end in pairwise(ends))
    given = (d_out, d_lse, q, k, v, key_bias, groups, out, lse)
    dq, dk, dv, d_bias = _backward(*given, lists, pieces, turned, *ctx.numbers)
    empty = ([None] * count for count in ctx.counts)
    unused = (None, None, None, None, [None] * ctx.boxes, None)
    return dq, dk, dv, None if key_bias is None else d_bias, None, *empty, *unused


_attend.register_autograd(_gradients, setup_context=_save)


def _flat(schedule: Schedule | None) -> tuple[list[Tensor], list[Tensor], tuple[int, int]]:
    """The tensors and numbers of a schedule: pieces, turned lists, slots of both."""
    if schedule is None:
        return [], [], (0, 0)
    pieces = list(schedule.pieces[:2])
    if schedule.turned is None or schedule.turned_pieces is None:
        return pieces, [], (schedule.pieces.slots, 0)
    turned = [*schedule.turned, *schedule.turned_pieces[:2]]
    return pieces, turned, (schedule.pieces.slots, schedule.turned_pieces.slots)


def _flat_boxes(schedule: Schedule | None) -> tuple[list[Tensor], list[int]]:
    """The tensors of the boxes of a schedule, and seven numbers: an empty list would be taken for one of tensors."""
    if schedule is None or schedule.boxes is None:
        return [], [0] * 7
    boxes = schedule.boxes
    return list(boxes[:4]), [boxes.start, *boxes.grid, *boxes.shape]
