"""C-Upscale's priors as tensor functions (Qian et al., arXiv 2505.16976); the authors released no code.

From the paper: low frequencies of the low-resolution latent lead the large one (`frequency.guide_estimate` does that);
cross-attention between the global prompt and a region is screened by that part of the low-resolution picture's; and
cross-attention to a region's own prompt is composed with it. Constants and the exact form of screening are ours, since
the text that could be read names none.
"""

import math

import torch
from torch import Tensor

from gensparse.errors import ConfigError

FLOOR = 1e-3
"""The least relevance of a word: its logit is lowered by at most 6.9."""

Part = tuple[float, float, float, float]
"""Of a picture: top, bottom, left, right as shares of its height and width."""


def hann_window(rows: int, columns: int, device: torch.device | str | None = None) -> Tensor:
    """Weights sin^2 of a window for merging without seams, float32 [rows, columns], all above 0."""
    row, column = (torch.sin(math.pi * (torch.arange(n, device=device) + 0.5) / n).square() for n in (rows, columns))
    return row[:, None] * column


def word_maps(q: Tensor, k: Tensor, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
    """What share of its attention every token gives to every word, mean over heads: float32 [B, N, T].

    Args:
        q: [B, N, H, D]; k: [B, T, H, D].
        scale: of the logits, 1/sqrt(D) by default.
        bias: added to them, [B|1, H|1, T].
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    total = q.new_zeros(q.shape[0], q.shape[1], k.shape[1], dtype=torch.float32)
    for head in range(q.shape[2]):  # one at a time: all heads of a long prompt would be many gigabytes
        logits = scale * (q[:, :, head].float() @ k[:, :, head].float().transpose(1, 2))
        if bias is not None:
            logits += bias[:, head if bias.shape[1] > 1 else 0, None]
        total += logits.softmax(-1)
    return total / q.shape[2]


def sampling_matrix(length: int, start: float, stop: float, count: int) -> Tensor:
    """Bilinear weights [count, length], float64, of `count` cells that divide the share start..stop of an axis.

    A cell is read at its centre; beyond the centres of the outermost cells of the axis these continue.
    """
    place = (start + (torch.arange(count, dtype=torch.float64) + 0.5) / count * (stop - start)) * length - 0.5
    place = place.clamp(0, length - 1)
    first = place.floor().clamp(max=max(length - 2, 0))
    matrix = torch.zeros(count, length, dtype=torch.float64)
    for tap, weight in ((0, 1 - (place - first)), (1, place - first)):
        matrix.scatter_add_(1, (first + tap).clamp(max=length - 1).long()[:, None], weight[:, None])
    return matrix


def relevance(maps: Tensor, part: Part, grid: tuple[int, int]) -> Tensor:
    """How much every token of a part of the picture belongs to every word, 0..1: [B, rows * columns, T].

    A word's map is divided by its largest value in the whole picture, so 1 is where the word is most at home, and read
    at the places of the part's tokens, whatever their number.

    Args:
        maps: of the whole picture, [B, H, W, T].
        grid: (rows, columns) of the part's tokens.

    Raises:
        ConfigError: a part that is empty or leaves the picture.
    """
    top, bottom, left, right = part
    if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        raise ConfigError(f"The part {part} is no part of a picture; give top < bottom and left < right in 0..1.")
    rows = sampling_matrix(maps.shape[1], top, bottom, grid[0]).to(maps)
    columns = sampling_matrix(maps.shape[2], left, right, grid[1]).to(maps)
    scaled = maps / maps.amax((1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
    return torch.einsum("rh,bhwt,cw->brct", rows, scaled, columns).flatten(1, 2)


def screen(relevant: Tensor, content: Tensor) -> Tensor:
    """What screening adds to the logits [B, N, T]: log(relevance) of content words, 0 for all others.

    Args:
        relevant: [B, N, T] of `relevance`.
        content: bool [B, T], True for words; begin, end and padding keep their logits.
    """
    return relevant.clamp_min(FLOOR).log().masked_fill(~content[:, None], 0.0)
