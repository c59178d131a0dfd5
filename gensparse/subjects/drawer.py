"""AutoStudio's drawer (2406.01388): layout weights of texts and image prompts, and a first latent from drafts.

Boxes are x, y, width, height in pixels. Contexts are ordered global, background, objects.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gensparse.errors import ConfigError

GLOBAL_SHARE = 0.3
"""Of the global prompt inside boxes."""


def layout_weights(
    boxes: Sequence[Sequence[float]], size: tuple[int, int], fuse: tuple[float, float] = (1.2, 0.0)
) -> Tensor:
    """Weights of texts [0] and of image prompts [1], float32 [2, n + 2, H, W]; those of the texts sum to 1.

    With fuse[0] above 0.7 the background's text counts negative inside boxes, as published.

    Args:
        boxes: of the n objects; they may overlap, and share then.
        size: (H, W) in pixels.
        fuse: weight of an object's text in its box, and of the background's image prompt outside.

    Raises:
        ConfigError: boxes that are not four numbers.
    """
    height, width = size
    if any(len(box) != 4 for box in boxes):
        raise ConfigError("autostudio boxes hold something else than x, y, width, height; pass four numbers each.")
    inside = torch.zeros(len(boxes), height, width)
    for plane, (x, y, wide, high) in zip(inside, boxes, strict=True):
        left, top = round(x), round(y)
        plane[max(0, top) : max(0, top + round(high)), max(0, left) : max(0, left + round(wide))] = 1
    count = inside.sum(0).clamp(min=1)
    out = torch.zeros(2, len(boxes) + 2, height, width)
    out[0, 2:], out[1, 2:] = fuse[0] * inside / count, inside / count
    out[0, 0] = GLOBAL_SHARE * inside.any(0)
    out[0, 1] = 1 - out[0, 2:].sum(0) - out[0, 0]
    out[1, 1] = fuse[1] * (1 - out[1, 2:].sum(0))
    return out


def on_grid(weights: Tensor, grid: tuple[int, int]) -> Tensor:
    """Layout weights [..., H, W] on a token grid, bilinear, [..., rows, columns]."""
    planes = weights.reshape(1, -1, *weights.shape[-2:])
    return F.interpolate(planes, size=grid, mode="bilinear", align_corners=False).reshape(*weights.shape[:-2], *grid)


def guided_start(latents: Tensor, noised: Tensor, mask: Tensor) -> Tensor:
    """Latents drawn towards a draft inside a mask, before the call of one of the first steps.

    Args:
        latents: [B, C, h, w]; noised: the draft's latents with the noise of this step; mask: [h, w], 1 for subjects.
    """
    mask = mask.to(latents)
    return latents * (1 - mask) + mask * (0.2 * latents + 0.8 * noised.to(latents))


def composed(
    drafts: Sequence[Tensor], masks: Sequence[Tensor], boxes: Sequence[Sequence[float]], size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Subjects cut out of their drafts and pasted into their boxes, on black; of two that overlap the earlier stays.

    Args:
        drafts: pictures [C, h, w]; masks: bool [h, w] of the subject in each.
        boxes: where each goes, x, y, width, height in pixels; the cut-out is scaled to fit and put at the top left.
        size: (H, W) of the result.

    Returns:
        The picture [C, H, W] and the mask bool [H, W] of all subjects.

    Raises:
        ConfigError: other numbers of drafts, masks and boxes, or none.
    """
    if not drafts or not len(drafts) == len(masks) == len(boxes):
        raise ConfigError(
            f"{len(drafts)} drafts, {len(masks)} masks and {len(boxes)} boxes are given; pass one of each."
        )
    picture, taken = drafts[0].new_zeros(drafts[0].shape[0], *size), torch.zeros(size, dtype=torch.bool)
    for draft, mask, box in zip(drafts, masks, boxes, strict=True):
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        left, top, wide, high = (round(value) for value in box)
        if not len(rows) or wide < 1 or high < 1 or top >= size[0] or left >= size[1]:
            continue  # nothing was found, or nothing is asked for
        cut = (slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
        own, shape = draft[:, cut[0], cut[1]], mask[cut]
        factor = min(wide / shape.shape[1], high / shape.shape[0])
        new = max(1, round(shape.shape[0] * factor)), max(1, round(shape.shape[1] * factor))
        own = F.interpolate(own[None].float(), size=new, mode="bilinear", align_corners=False)[0].to(picture.dtype)
        inside = F.interpolate(shape[None, None].float(), size=new, mode="nearest-exact")[0, 0] > 0.5
        top, left = max(0, top), max(0, left)
        place = (slice(top, min(size[0], top + new[0])), slice(left, min(size[1], left + new[1])))
        seen = inside[: place[0].stop - top, : place[1].stop - left] & ~taken[place]
        target = picture[:, place[0], place[1]]
        target[:, seen] = own[:, : seen.shape[0], : seen.shape[1]][:, seen]
        taken[place] |= seen
    return picture, taken
