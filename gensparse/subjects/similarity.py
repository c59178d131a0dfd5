"""Features of pictures token by token: which token of another picture shows the same (ConsiStory 2402.03286)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gensparse.subjects.attention_maps import BLOCK_BYTES, otsu

OUTSIDE = 2.0
"""Distance to tokens outside of the other picture's subject, more than any cosine distance of theirs."""

OWN = 1e9
"""Distance of a picture to itself."""


def smoothed(features: Tensor, sigma: float = 1.0) -> Tensor:
    """Feature maps [B, C, H, W] blurred by a 3 x 3 Gaussian, zeros beyond the border."""
    x = torch.arange(-1.0, 2.0)
    line = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = torch.outer(line, line)
    kernel = (kernel / kernel.sum()).to(features)
    channels = features.shape[1]
    return F.conv2d(features, kernel.expand(channels, 1, 3, 3), padding=1, groups=channels)


def nearest_tokens(features: Tensor, masks: Tensor, mapping: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """For every picture and other picture the most similar token, and its cosine distance.

    Args:
        features: [B, C, H, W], resized (bilinear) to the grid.
        masks: bool [B, N], tokens of the subject in every picture; only they are found.
        mapping: bool [B, B], row i: pictures that i may take from.
        grid: (rows, columns) of N tokens.

    Returns:
        index int64 and distance float32, [B, B, N]: of picture i (first axis) in picture j. Where i may not take from j
        the distance is `OWN`, and so is it of a picture to itself.
    """
    if features.shape[-2:] != tuple(grid):
        features = F.interpolate(features.float(), size=tuple(grid), mode="bilinear", align_corners=False)
    unit = F.normalize(features.float().flatten(2), dim=1).transpose(1, 2)  # [B, N, C]
    count, tokens, _ = unit.shape
    index = torch.zeros(count, count, tokens, dtype=torch.int64, device=unit.device)
    distance = torch.full((count, count, tokens), OWN, device=unit.device)
    step = max(1, BLOCK_BYTES // (4 * tokens))
    for i in range(count):
        for j in range(count):
            if i == j or not bool(mapping[i, j]):
                continue
            found = []
            for rows in unit[i].split(step):
                apart = (1 - rows @ unit[j].T).masked_fill(~masks[j].bool(), OUTSIDE)
                found.append(apart.min(dim=1))
            index[i, j] = torch.cat([part.indices for part in found])
            distance[i, j] = torch.cat([part.values for part in found])
    return index, distance


def inject(out: Tensor, index: Tensor, distance: Tensor, masks: Tensor, alpha: float) -> Tensor:
    """Outputs [B, N, C] whose subject tokens take from the most similar ones of other pictures, in order.

    Args:
        index, distance: of `nearest_tokens`.
        masks: bool [B, N].
        alpha: share of what is taken.

    Every picture takes from one other per token, the nearest, if it is nearer than Otsu's threshold of all those
    distances. Pictures are handled in turn, so that a later one takes from an earlier one as that one then is.
    """
    out = out.clone()
    for picture in range(len(out)):
        best, other = distance[picture].min(dim=0)
        if bool((best >= OWN).any()):
            continue  # no other picture
        taken = masks[picture].bool() & (best < otsu(best))
        rows = taken.nonzero()[:, 0]
        source = index[picture].gather(0, other[None])[0, rows]
        out[picture, rows] = alpha * out[other[rows], source] + (1 - alpha) * out[picture, rows]
    return out


def subject_masks(
    maps: Tensor, tokens: Sequence[Sequence[int]], grid: tuple[int, int], sizes: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """Where words act, thresholded by Otsu, bool [B, rows * columns] for every size.

    Args:
        maps: cross-attention [T, B, N, words], of layers and steps, averaged over heads; it is averaged over T.
        tokens: for every word the place of its first token in the prompt of each picture, -1 where it is not there.
        grid: (rows, columns) of N tokens.
        sizes: grids of the masks.

    A token belongs to the subject where any of the words says so.
    """
    mean = maps.float().mean(0)
    found = [torch.zeros(mean.shape[0], size[0] * size[1], dtype=torch.bool, device=maps.device) for size in sizes]
    for places in tokens:
        for picture, place in enumerate(places):
            if place < 0:
                continue
            plane = mean[picture, :, place].view(1, 1, *grid)
            for mask, size in zip(found, sizes, strict=True):
                values = F.interpolate(plane, size=tuple(size), mode="bilinear", align_corners=False).flatten()
                mask[picture] |= values > otsu(values)
    return found
