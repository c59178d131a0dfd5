"""Which word every token shows, from attention maps, and a guidance scale per pixel (MagicFace 2408.07433)."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Times = Callable[[Tensor], Tensor]


def spread_maps(times: Times, cross: Tensor) -> Tensor:
    """(SA + 3 SA SA) / 4 times the cross-attention maps, [B, N, words], without SA itself.

    Args:
        times: gives head-averaged self-attention times maps [B, N, words], see `attention_maps.self_times`.
        cross: [B, N, words], averaged over heads.
    """
    once = times(cross)
    return (once + 3 * times(once)) / 4


def balanced(maps: Tensor, grid: tuple[int, int], size: tuple[int, int], eps: float = 1e-8) -> Tensor:
    """Maps [B, N, words] of one layer at `size`, blurred and divided by their mean, [B, words, rows, columns]."""
    planes = maps.transpose(1, 2).unflatten(2, tuple(grid))
    planes = blurred(F.interpolate(planes, size=tuple(size), mode="bilinear", align_corners=False))
    return planes / (planes.mean(dim=(2, 3), keepdim=True) + eps)


def foreground_maps(maps: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """As `balanced`, of two maps: the beginning of the prompt, and all other words together; [B, 2, rows, columns]."""
    return balanced(torch.stack([maps[..., 0], maps[..., 1:].sum(-1)], -1), grid, size, eps=0.0)


def blurred(x: Tensor) -> Tensor:
    """[B, C, H, W] under a 3 x 3 Gaussian of deviation 0.5 sqrt(2), reflected at the border."""
    line = torch.exp(-(torch.arange(-1.0, 2.0) ** 2))
    kernel = torch.outer(line, line)
    kernel = (kernel / kernel.sum()).to(x)
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, kernel.expand(x.shape[1], 1, 3, 3), groups=x.shape[1])


def segment(conditional: Tensor, foreground: Tensor, words: Sequence[int], damping: float) -> tuple[Tensor, Tensor]:
    """The word of every token, bool [words, rows, columns], and the foreground, bool [rows, columns].

    Args:
        conditional: [words, rows, columns], mean of `balanced` over layers and resolutions.
        foreground: [2, rows, columns], that of `foreground_maps` in the unconditional half.
        words: those that references stand for.
        damping: factor on all other words; below 0.9 the background belongs to no word.
    """
    factor = torch.full((len(conditional), 1, 1), damping, dtype=conditional.dtype, device=conditional.device)
    factor[list(words)] = 1
    scores = conditional * factor
    found = scores == scores.amax(0)
    front = foreground[0] < foreground.amax(0)
    return (found & front if damping < 0.9 else found), front


def guidance_rate(unconditional: Tensor, conditional: Tensor, found: Tensor, front: Tensor, guidance: float) -> Tensor:
    """Factor on the guidance scale of every latent cell, [H, W], so that all words are followed alike.

    Args:
        unconditional, conditional: predicted noise [C, H, W].
        found, front: of `segment`.
        guidance: the scale.
    """
    size = tuple(conditional.shape[-2:])
    strength = (conditional - unconditional).float().norm(dim=0)
    planes = torch.cat([found, front[None]]).float()[None]
    planes = F.interpolate(planes, size=size, mode="nearest")[0]
    words, front = planes[:-1], planes[-1]
    mean_front = (strength * front).sum() / (front.sum() + 1e-8)
    area = words.sum(dim=(1, 2))
    means = (strength * words).sum(dim=(1, 2)) / (area + 1e-8)
    factors = (area > 0) * mean_front / (means + 1e-8)
    rate = (words * factors[:, None, None]).sum(0).clamp(0.8, 3.0).clamp(max=15 / guidance)
    return blurred(rate[None, None])[0, 0]
