"""FlexAttention as a rival: block lists from our plan, masks from coordinates, in raster order or in tile order.

`create_block_mask` looks at all pairs, which does not fit at 65536 tokens on a CPU; the lists of a plan are the same
blocks. Permuting tokens into tile order and back is not timed: a model can keep its tokens in that order.
"""

import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gensparse.bench.cases import RandomTiles
from gensparse.errors import BackendError
from gensparse.layout import Layout
from gensparse.patterns import Disc, Neighborhood, Pattern, Radial, Text, Union
from gensparse.plan import Plan, build_plan

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class FlexCase(NamedTuple):
    """What a compiled call needs.

    Args:
        block_mask: torch's BlockMask.
        order: int64 [slots], token of every place of the permuted sequence; None for raster order.
        visited: token pairs in the listed blocks.
        options: kernel options.
    """

    block_mask: Any
    order: Tensor | None
    visited: int
    options: dict[str, Any] | None


def why_not(device: str) -> str | None:
    """Why compiled FlexAttention cannot run here, or None."""
    if device == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "needs a C++ compiler at run time: install g++ or clang++"
    if device == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX"):
        return "needs AVX2"
    return None


def flex_case(pattern: Pattern, layout: Layout, *, block: int, tiles: bool, device: str = "cpu") -> FlexCase:
    """The pattern for FlexAttention.

    Args:
        block: tokens of a block, of queries and of keys.
        tiles: permute tokens so that blocks are boxes of the grid; otherwise blocks are runs in raster order.

    Raises:
        BackendError: a grid on which runs of `block` tokens are no boxes, or a pattern without a mask function.
    """
    plan = _plan(pattern, layout, block, tiles)
    order = plan.lists.q_rows.reshape(-1).long()
    expected = torch.full_like(order, -1)
    expected[: plan.tokens] = torch.arange(plan.tokens)
    raster = torch.equal(order, expected)
    if raster and tiles:
        raise BackendError("the blocks of this pattern are runs in raster order, permuted or not")
    if not raster and not tiles:
        raise BackendError(f"runs of {block} tokens do not divide the segments of this layout")
    function = mask_function(pattern, layout, None if raster else order, device)
    mask = _block_mask(plan, function, block, plan.tokens if raster else len(order), device)
    options = {"BLOCK_M": 64, "BLOCK_N": 64} if block == 64 and device != "cpu" else None
    visited = len(plan.lists.key_tile) * block * block
    return FlexCase(mask, None if raster else order.to(device), visited, options)


def attend(case: FlexCase, compiled: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """q, k, v [B, S, H, D] already in the order of the case -> out in that order."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(*heads_first, block_mask=case.block_mask, kernel_options=case.options).transpose(1, 2)

    return run


def _plan(pattern: Pattern, layout: Layout, block: int, tiles: bool) -> Plan:
    if tiles or isinstance(pattern, Radial | RandomTiles):  # those are made of runs
        return build_plan(pattern, layout, q_tile=block, k_tile=block)
    width, height = layout.grid[2], layout.grid[1]
    if width % block == 0:
        shape = (1, 1, block)
    elif block % width == 0 and height % (block // width) == 0:
        shape = (1, block // width, width)
    else:
        raise BackendError(f"runs of {block} tokens are no boxes of the grid {layout.grid}")
    return build_plan(pattern, layout, q_tile=shape, k_tile=shape)


def _block_mask(plan: Plan, function: MaskFunction | None, block: int, length: int, device: str) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    lists = plan.lists
    n_q, n_k = len(lists.q_rows), len(lists.k_rows)
    queries = torch.repeat_interleave(torch.arange(n_q), lists.row_ptr[0].long().diff())
    full = lists.mask_id < 0
    if function is None:  # only the ragged end is partial, and the kernel stops there by itself
        full = torch.ones_like(full)
    parts = []
    for chosen in (~full, full):
        listed = torch.zeros(n_q, n_k, dtype=torch.int8)
        listed[queries[chosen], lists.key_tile[chosen].long()] = 1
        order = torch.argsort(listed, dim=-1, descending=True, stable=True).int()
        parts += [listed.sum(-1, dtype=torch.int32)[None, None].to(device), order[None, None].to(device)]
    sides = (length, length)
    return BlockMask.from_kv_blocks(
        *parts, BLOCK_SIZE=block, mask_mod=function, seq_lengths=sides, compute_q_blocks=False
    )


# ---------------------------------------------------------------------------------------------------------------- masks
def mask_function(pattern: Pattern, layout: Layout, order: Tensor | None, device: str) -> MaskFunction | None:
    """The pattern as a function of query and key place; None where whole blocks are all there is.

    Args:
        order: token of every place, -1 for none; None for raster order.

    Raises:
        BackendError: a pattern nobody has written a function for.
    """
    if isinstance(pattern, Radial | RandomTiles):
        return None
    disc = _disc(pattern)
    if disc is None and not isinstance(pattern, Neighborhood):
        raise BackendError(f"FlexAttention has no mask function for {pattern!r}")
    words, position = _coordinates(layout, order, device)
    if disc is not None:
        return _disc_function(disc, words, position)
    assert isinstance(pattern, Neighborhood)
    return _window_function(pattern, layout, words, position)


def _disc(pattern: Pattern) -> int | None:
    """Radius of a disc, alone or with text."""
    parts = pattern.parts if isinstance(pattern, Union) else (pattern,)
    discs = [part for part in parts if isinstance(part, Disc)]
    rest = [part for part in parts if not isinstance(part, Disc | Text)]
    return discs[0].radius if len(discs) == 1 and not rest else None


def _coordinates(layout: Layout, order: Tensor | None, device: str) -> tuple[Tensor, list[Tensor]]:
    """Per place: kind (0 picture, 1 text, 2 nothing) and position on each axis of the grid, int32."""
    tokens = torch.arange(layout.tokens) if order is None else order
    first = layout.starts[layout.target]
    frames, height, width = layout.grid
    local = tokens - first
    inside = (local >= 0) & (local < frames * height * width)
    kind = torch.where(inside, 0, torch.where(tokens < 0, 2, 1)).int().to(device)
    local = local.where(inside, torch.zeros_like(local))
    position = [local // (height * width), local // width % height, local % width]
    return kind, [x.int().to(device) for x in position]


def _disc_function(radius: int, kind: Tensor, position: list[Tensor]) -> MaskFunction:
    _, y, x = position

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        down, right = y[q] - y[k], x[q] - x[k]
        near = down * down + right * right < radius * radius
        return (near | (kind[q] == 1) | (kind[k] == 1)) & (kind[k] != 2)

    return visible


def _window_function(pattern: Neighborhood, layout: Layout, kind: Tensor, position: list[Tensor]) -> MaskFunction:
    axes = []
    for axis, length in enumerate(layout.grid):
        window = pattern.window if isinstance(pattern.window, int) else (None, None, None, *pattern.window)[axis - 3]
        if window is not None and length > 1:
            axes.append((position[axis], min(window, length), length))

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        near = kind[k] == 0
        for place, window, length in axes:
            start = (place[q] - window // 2).clamp(0, length - window)
            near = near & (place[k] >= start) & (place[k] < start + window)
        return near

    return visible
