"""FlexAttention over the tile lists of a plan: torch's own block-sparse kernel, for those who ask for it.

Queries and keys are gathered into tile order, the lists become a BlockMask and the atlas its mask function. Compiling
takes seconds for every new size; on a CPU there is no log-sum-exp and no gradient.
"""

import shutil
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .finite import contained
from .lists import TileLists
from .need import Need

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

TABLE_LIMIT = 1 << 27  # bytes of the table that finds the mask of a tile pair


def why_not(need: Need) -> str | None:
    """Why FlexAttention cannot serve a call, or None."""
    if need.device == "cpu":
        if need.lse or need.grad:
            return "Can't run flex; on a CPU it has neither a log-sum-exp nor a gradient: use halo or plan_loop."
        if not any(map(shutil.which, ("g++", "clang++", "c++"))):
            return "Can't run flex; on a CPU it needs a C++ compiler (g++ or clang++): install one, or use halo."
    if need.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"Can't run flex; it takes fp16, bf16 and fp32, not {need.dtype}: use halo or plan_loop."
    return None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: TileLists,
    mask: "BlockMask",
    *,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention by tile lists and their `block_mask`; else as for the plan loop, the lse only with `return_lse`."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled, score = _compiled(flex_attention), None
    if key_bias is not None:
        bias = _in_tiles(key_bias.float().transpose(1, 2), lists.k_rows).transpose(1, 2).contiguous()
        shared = bias.shape[0] == 1, bias.shape[1] == 1

        def score(s, b, h, q_index, k_index):
            return s + bias[0 if shared[0] else b, 0 if shared[1] else h, k_index]

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        tiles = [_in_tiles(x, rows).transpose(1, 2) for x, rows in zip((q, k, v), _rows(lists), strict=True)]
        gqa = q.shape[2] != k.shape[2]
        result = compiled(*tiles, score_mod=score, block_mask=mask, scale=scale, enable_gqa=gqa, return_lse=return_lse)
        out, lse = result if return_lse else (result, None)
        place = _places(lists.q_rows, q.shape[1])
        return out.transpose(1, 2)[:, place], None if lse is None else lse.transpose(1, 2)[:, place]

    return contained(run, q, k, v)


def _rows(lists: TileLists) -> tuple[Tensor, Tensor, Tensor]:
    return lists.q_rows, lists.k_rows, lists.k_rows


def _in_tiles(x: Tensor, rows: Tensor) -> Tensor:
    """Tokens [B, S, ...] in the order of the tiles' slots; empty slots hold token 0, which no mask shows."""
    return x.index_select(1, rows.reshape(-1).clamp_min(0).long())


def _places(q_rows: Tensor, tokens: int) -> Tensor:
    """Slot of every token."""
    flat = q_rows.reshape(-1).long()
    place = torch.zeros(tokens + 1, dtype=torch.long, device=flat.device)  # empty slots write to the last entry
    place[flat.where(flat >= 0, flat.new_full((), tokens))] = torch.arange(len(flat), device=flat.device)
    return place[:tokens]


def block_mask(lists: TileLists, groups: Tensor | None = None) -> "BlockMask":
    """The lists as a BlockMask [B|1, H|1] whose mask function reads the atlas.

    Raises:
        ValueError: the table that finds the mask of a tile pair would pass `TABLE_LIMIT`.
    """
    from torch.nn.attention.flex_attention import BlockMask

    (n_qt, q_size), (n_kt, k_size) = lists.q_rows.shape, lists.k_rows.shape
    menu = len(lists.row_ptr)
    if menu * n_qt * n_kt * 4 > TABLE_LIMIT:
        raise ValueError(
            f"flex would need a table of {menu * n_qt * n_kt * 4 >> 20} MiB for {n_qt} x {n_kt} tiles "
            f"(at most {TABLE_LIMIT >> 20}); use another backend."
        )
    table = torch.full((menu, n_qt, n_kt), -2, dtype=torch.int32, device=lists.q_rows.device)
    for group in range(menu):
        pointer = lists.row_ptr[group].long()
        entries = slice(int(pointer[0]), int(pointer[-1]))
        queries = torch.repeat_interleave(torch.arange(n_qt, device=table.device), pointer.diff())
        table[group, queries, lists.key_tile[entries].long()] = lists.mask_id[entries]
    pick = torch.zeros(1, 1, dtype=torch.long, device=table.device) if groups is None else groups.long()
    pick = pick.to(table.device)
    partial = [x[pick] for x in _ordered(table >= 0)]
    full = [x[pick] for x in _ordered(table == -1)]
    atlas = lists.atlas if len(lists.atlas) else lists.atlas.new_zeros(1, q_size, k_size // 32)
    one_batch, one_head = pick.shape[0] == 1, pick.shape[1] == 1

    def visible(b, h, q_index, k_index):
        entry = pick[0 if one_batch else b, 0 if one_head else h]
        row = table[entry, q_index // q_size, k_index // k_size].clamp(min=0)
        slot = k_index % k_size
        return (atlas[row, q_index % q_size, slot // 32] >> (slot % 32)) & 1 == 1

    return BlockMask.from_kv_blocks(
        *partial,
        *full,
        BLOCK_SIZE=(q_size, k_size),
        mask_mod=visible,
        seq_lengths=(n_qt * q_size, n_kt * k_size),
    )


def _ordered(listed: Tensor) -> tuple[Tensor, Tensor]:
    """Number of listed key tiles [G, n_qt] and their numbers first in [G, n_qt, n_kt], int32."""
    order = torch.argsort(listed.to(torch.int8), dim=-1, descending=True, stable=True)
    return listed.sum(-1, dtype=torch.int32), order.to(torch.int32)


@cache
def _compiled(flex: Callable) -> Callable:
    """Without compilation flex computes all pairs; one whole graph fails where torch would silently leave it so."""
    return torch.compile(flex, dynamic=False, fullgraph=True)
