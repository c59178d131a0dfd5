"""MultiDiffusion with regions (2302.08113): every view is denoised under every prompt, and masks fuse the results.

One model call per prompt and view, so it is slow, and it works with any model. Where results of scheduler steps are
fused, schedulers must have no memory, such as DDIM or Euler; predictions may be fused with any.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gensparse.errors import ConfigError

View = tuple[int, int, int, int]
"""Rows h0..h1 and columns w0..w1 of the latents, half-open."""


def views_of(size: tuple[int, int], window: int = 64, stride: int = 8) -> list[View]:
    """Windows over latents of `size`, row by row.

    Published for sides that fit: the rest behind the last window has none there. Here a last window ends with the side.

    Raises:
        ConfigError: sizes below 1, or a stride longer than the window.
    """
    if min(*size, window, stride) < 1 or stride > window:
        raise ConfigError(f"Windows of {window} every {stride} on {size} are not allowed; pass positive numbers.")
    rows, columns = (_starts(length, window, stride) for length in size)
    high, wide = (min(window, length) for length in size)
    return [(row, row + high, column, column + wide) for row in rows for column in columns]


def latent_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks of the background and of every region on the latents, [P + 1, 1, h, w] of 0 and 1, the background first.

    Args:
        masks: [P, H, W] in 0..1; may overlap. The background is what none of them covers.
    """
    masks = masks.float()
    planes = torch.cat([(1 - masks.sum(0, keepdim=True)).clamp(min=0), masks])
    return F.interpolate((planes > 0.5).float()[:, None], size=size, mode="nearest")


def fused(denoised: Callable[[int, int], Tensor], views: Sequence[View], masks: Tensor) -> tuple[Tensor, Tensor]:
    """One step of all views and prompts as one: the mean, weighted by masks; 0 where no mask is.

    Args:
        denoised: (number of a view, number of a prompt) -> what the scheduler made of that view, [B, C, h, w]. It is
            not asked where the mask of a prompt is empty in a view.
        views: of `views_of`; masks: [P, 1, H, W].

    Returns:
        float32 [B, C, H, W], and the count it was divided by, [1, 1, H, W].

    Raises:
        ConfigError: no views, or masks that are empty in all of them.
    """
    if not views:
        raise ConfigError("There are no views to fuse; pass those of views_of().")
    value: Tensor | None = None
    count = masks.new_zeros(1, 1, *masks.shape[-2:], dtype=torch.float32)
    for number, (h0, h1, w0, w1) in enumerate(views):
        for prompt, mask in enumerate(masks[..., h0:h1, w0:w1].float()):
            if not bool(mask.any()):
                continue
            part = denoised(number, prompt).float()
            if value is None:
                value = part.new_zeros(*part.shape[:2], *masks.shape[-2:])
            value[..., h0:h1, w0:w1] += part * mask
            count[..., h0:h1, w0:w1] += mask
    if value is None:
        raise ConfigError("The masks are empty in every view; pass the background's mask as well (latent_masks).")
    return torch.where(count > 0, value / count.clamp(min=1e-12), value), count


def bootstrapped(latents: Tensor, masks: Tensor, colour: Tensor) -> Tensor:
    """Latents of every region's prompt in the first steps: outside of its mask a plain colour, with this step's noise.

    Args:
        latents: [P, C, h, w], one row per prompt, the background's first, which is kept.
        masks: [P, 1, h, w]; colour: noised latents [1 or P - 1, C, h, w] of a picture of one colour.
    """
    return torch.cat([latents[:1], coloured(latents[1:], masks[1:], colour)])


def coloured(latents: Tensor, mask: Tensor, colour: Tensor) -> Tensor:
    """Latents [..., C, h, w] inside of a mask [..., 1, h, w] of 0 and 1, and `colour` outside of it."""
    inside = mask.to(latents)
    return latents * inside + colour.to(latents) * (1 - inside)


def _starts(length: int, window: int, stride: int) -> list[int]:
    if length <= window:
        return [0]
    starts = list(range(0, length - window + 1, stride))
    return starts if starts[-1] + window == length else [*starts, length - window]
