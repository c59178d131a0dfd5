"""BoxDiff's losses on attention maps (2307.10816): objects fill their boxes, reach their borders and stay inside."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gensparse.errors import ConfigError
from gensparse.subjects.calibration import blur_kernel

Box = tuple[int, int, int, int]
"""x0, y0, x1, y1 in tokens of the map, half-open."""


def token_maps(attention: Tensor, tokens: Sequence[int], smooth: bool = True, sigma: float = 0.5) -> Tensor:
    """Maps [n, rows, columns] of tokens, sharpened among all words of the prompt.

    Args:
        attention: probabilities [rows, columns, L], mean over layers and heads.
        tokens: with the begin token counted.
        smooth: blur them by 3 x 3 tokens, see `calibration.blur_kernel`.
    """
    words = (attention[..., 1:-1] * 100).softmax(-1)
    maps = words[..., [token - 1 for token in tokens]].permute(2, 0, 1)
    if not smooth:
        return maps
    kernel = blur_kernel(3, sigma).to(maps)[None, None]
    return F.conv2d(F.pad(maps[:, None], (1, 1, 1, 1), mode="reflect"), kernel)[:, 0]


def box_tokens(box: Sequence[float], grid: tuple[int, int], size: tuple[int, int] = (512, 512)) -> Box:
    """A box in pixels on a map of grid = (rows, columns) tokens of a picture of size = (height, width)."""
    (rows, columns), (height, width) = grid, size
    x0, y0, x1, y1 = box
    across, down = width / columns, height / rows
    return round(x0 / across), round(y0 / down), round(x1 / across), round(y1 / down)


def box_losses(maps: Tensor, boxes: Sequence[Box], share: float = 0.2, reach: int = 1) -> tuple[Tensor, ...]:
    """(1 - inside, outside, corners along x, corners along y) of every object, [n] each.

    Args:
        maps: [n, rows, columns].
        share: of the box's (and of the outside's) tokens, the strongest, that count.
        reach: tokens around a border of the box that count for the corners.

    Raises:
        ConfigError: another number of maps than boxes.
    """
    if len(maps) != len(boxes):
        raise ConfigError(f"{len(maps)} maps do not fit {len(boxes)} boxes; pass a box per token.")
    inner, outer, across, down = [], [], [], []
    for plane, box in zip(maps, boxes, strict=True):
        x0, y0, x1, y1 = box
        mask = torch.zeros_like(plane)
        mask[y0:y1, x0:x1] = 1
        inner.append((1 - _strongest(plane * mask, mask, share)).clamp(min=0))
        outer.append(_strongest(plane * (1 - mask), 1 - mask, share).clamp(min=0))
        across.append(_corner(plane.amax(0), mask.amax(0), (x0, x1), reach))
        down.append(_corner(plane.amax(1), mask.amax(1), (y0, y1), reach))
    return torch.stack(inner), torch.stack(outer), torch.stack(across), torch.stack(down)


def box_loss(maps: Tensor, boxes: Sequence[Box], share: float = 0.2, reach: int = 1) -> tuple[Tensor, Tensor]:
    """(the sum of all losses, the largest 1 - inside, by which refinement stops)."""
    losses = box_losses(maps, boxes, share, reach)
    return torch.stack([part.sum() for part in losses]).sum(), losses[0].max()


def _strongest(values: Tensor, mask: Tensor, share: float) -> Tensor:
    """Mean of the largest share of the mask's tokens; 0 for an empty mask."""
    count = int(share * float(mask.sum()))
    if not count:
        return values.sum() * 0
    return values.flatten().topk(count).values.mean()


def _corner(profile: Tensor, expected: Tensor, ends: tuple[int, int], reach: int) -> Tensor:
    """Mean over an axis of |profile - expected| near both ends of the box."""
    near = torch.zeros_like(profile)
    for end in ends:
        near[max(0, end - reach) : min(len(near), end + reach + 1)] = 1
    return ((profile - expected).abs() * near).mean()
