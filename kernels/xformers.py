"""xformers for partitions: all windows as one sequence under its block-diagonal bias, for those who ask for it."""

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from .blocks import DenseRows, Work
from .heads import group_rows
from .need import Need


def why_not(need: Need) -> str | None:
    """Why xformers cannot serve a call, or None."""
    reason = need.refused.get("partition")
    if reason:
        return f"Can't run xformers; {reason}"
    if find_spec("xformers") is None:
        return "Can't run xformers; it is not installed: pip install gensparse[xformers]."
    if need.device == "cpu":
        return "Can't run xformers; its attention runs on GPUs only, the tensors are on the CPU: use partition."
    if need.bias:
        return "Can't run xformers; its block-diagonal bias takes no key bias beside it: use partition."
    if need.dtype not in (torch.float16, torch.bfloat16):
        return f"Can't run xformers; it takes fp16 and bf16, not {need.dtype}: use partition."
    return None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    works: Sequence[Work],
    *,
    groups: Tensor | None = None,
    key_bias: None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention inside windows; arguments and results as for the partition backend, but no key bias is taken."""
    batch, tokens, heads, dim = q.shape
    repeat = heads // k.shape[2]
    k, v = (x.repeat_interleave(repeat, dim=2) if repeat > 1 else x for x in (k, v))
    # the library's sequences have one mask for all heads, so every head of every sample is a batch of its own
    flat = [x.transpose(1, 2).reshape(batch * heads, x.shape[1], 1, dim) for x in (q, k, v)]
    out = flat[0].new_zeros(batch * heads, tokens, dim)
    lse = flat[0].new_full((batch * heads, tokens), float("-inf"), dtype=torch.float32) if return_lse else None
    for work, own in zip(works, group_rows(groups, len(works), batch, heads), strict=True):
        rows = torch.arange(batch * heads, device=q.device) if own is None else own
        for queries, keys in _sequences(work, q.device):
            part, total = _attend(*(x[rows] for x in flat), queries, keys, scale, return_lse)
            index = torch.cat(queries)
            out[rows[:, None], index] = part
            if lse is not None and total is not None:
                lse[rows[:, None], index] = total
    return _heads_last(out, batch), None if lse is None else _heads_last(lse, batch)


Lists = list[Tensor]


def _sequences(work: Work, device: torch.device) -> list[tuple[Lists, Lists]]:
    """Query tokens and key tokens of windows, one pair of lists per class of windows and one per run of dense rows."""
    found = []
    for tiles in work.tiles:
        q_rows, k_rows = tiles.rows(0, tiles.sizes[0])
        found.append((list(q_rows), list(k_rows)))
    for rows in work.dense:
        found.append(([torch.arange(*rows.queries, device=device)], [_runs(rows, device)]))
    return found


def _runs(rows: DenseRows, device: torch.device) -> Tensor:
    return torch.cat([torch.arange(*run, device=device) for run in rows.keys])


def _attend(
    q: Tensor, k: Tensor, v: Tensor, queries: Lists, keys: Lists, scale: float | None, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """out [heads, n, D] and lse [heads, n] of the windows' queries, window after window."""
    from xformers.ops import memory_efficient_attention, memory_efficient_attention_forward_requires_grad
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    count, _, _, dim = q.shape
    q_index, k_index = torch.cat(queries), torch.cat(keys)
    lengths = [[len(x) for x in rows] * count for rows in (queries, keys)]
    bias = BlockDiagonalMask.from_seqlens(*lengths)
    packed = [x[:, index].reshape(1, -1, 1, dim) for x, index in ((q, q_index), (k, k_index), (v, k_index))]
    if not return_lse:
        out = memory_efficient_attention(*packed, attn_bias=bias, scale=scale)
        return out.view(count, len(q_index), dim), None
    out, lse = memory_efficient_attention_forward_requires_grad(*packed, attn_bias=bias, scale=scale)
    return out.view(count, len(q_index), dim), lse.reshape(-1)[: count * len(q_index)].view(count, -1)


def _heads_last(x: Tensor, batch: int) -> Tensor:
    return x.unflatten(0, (batch, -1)).transpose(1, 2)
