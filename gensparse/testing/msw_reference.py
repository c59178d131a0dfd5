"""HiDiffusion's own handling of odd grids: bicubic resizing around 2 x 2 rolled windows (2311.17528, released code).

The library attends exactly on odd grids (`patterns.MSW`); this mode only reproduces the authors' numbers.
"""

import torch.nn.functional as F
from torch import Tensor


def msw_attention(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], heads: int, index: int) -> Tensor:
    """Attention of the released code: [B, H*W, heads*D] in and out, any grid (H, W), shift index 0..3."""
    window = tuple(-(-length // 2) for length in grid)
    size = (2 * window[0], 2 * window[1])
    shift = tuple(index * (length // 4) for length in window)
    if shift[0] == 0:
        shift = (0, 0)
    parts = [_windows(_resize(x, grid, size), size, shift, heads) for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*parts)
    return _resize(_merge(out, size, shift), size, grid)


def _resize(x: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """[B, h*w, C] -> [B, H*W, C], bicubic; the same tensor when the size is right already."""
    if grid == size:
        return x
    picture = x.transpose(1, 2).unflatten(2, grid)
    return F.interpolate(picture, size=size, mode="bicubic").flatten(2).transpose(1, 2)


def _windows(x: Tensor, size: tuple[int, int], shift: tuple[int, int], heads: int) -> Tensor:
    """[B, H*W, C] -> rolled 2 x 2 windows [B, 4, heads, H*W/4, D]."""
    rolled = x.unflatten(1, size).roll((-shift[0], -shift[1]), (1, 2))
    cut = rolled.unflatten(2, (2, -1)).unflatten(1, (2, -1))  # B 2 wh 2 ww C
    return cut.transpose(2, 3).flatten(3, 4).flatten(1, 2).unflatten(-1, (heads, -1)).transpose(2, 3)


def _merge(x: Tensor, size: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """The inverse of `_windows`."""
    cut = x.transpose(2, 3).flatten(3, 4).unflatten(1, (2, 2)).unflatten(3, (size[0] // 2, size[1] // 2))
    whole = cut.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return whole.roll(shift, (1, 2)).flatten(1, 2)
