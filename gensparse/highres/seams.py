"""Do tiles show? The steps of a picture across the borders of its tiles, against the steps everywhere else."""

from collections.abc import Sequence

import torch

from gensparse.errors import ConfigError
from gensparse.highres.latent_tiles import tile_starts
from gensparse.highres.tiling import Tiling


def seam_score(picture: torch.Tensor, rows: Sequence[int], columns: Sequence[int]) -> float:
    """Mean squared step across the given lines over that across all others; about 1 where nothing shows.

    Compare it with the score of a picture that was made in one piece: what lies at a line is also part of the picture.

    Args:
        picture: [..., H, W].
        rows, columns: lines before which a tile begins or ends, 1 to H - 1 and 1 to W - 1.

    Raises:
        ConfigError: no line at all, or one outside the picture.
    """
    on, off = [0.0, 0], [0.0, 0]
    for lines, axis in ((rows, -2), (columns, -1)):
        length = picture.shape[axis]
        if any(not 0 < line < length for line in lines):
            raise ConfigError(f"Borders of tiles are at {sorted(lines)}; give lines from 1 to {length - 1}.")
        if not lines:
            continue
        steps = picture.double().diff(dim=axis).square().movedim(axis, 0).flatten(1).mean(1)
        border = torch.zeros(length - 1, dtype=torch.bool)
        border[[line - 1 for line in lines]] = True
        for found, part in ((on, steps[border]), (off, steps[~border])):
            found[0] += float(part.sum())
            found[1] += len(part)
    if not on[1] or not off[1]:
        raise ConfigError("A seam score needs lines with and without a border; give the borders of at least two tiles.")
    return (on[0] / on[1]) / max(off[0] / off[1], 1e-30)


def borders(length: int, tiling: Tiling, scale: int) -> list[int]:
    """Lines of an axis of `length` pixels at which a tile begins or ends.

    Args:
        scale: pixels per latent pixel.
    """
    cells = max(1, tiling.tile // scale)
    if tiling.mode == "exact":
        return list(range(tiling.tile, length, tiling.tile))
    overlap = min(cells - 1, round(cells * tiling.overlap))
    starts = tile_starts(length // scale, cells, overlap)
    lines = {edge * scale for start in starts for edge in (start, start + min(cells, length // scale))}
    return sorted(line for line in lines if 0 < line < length)
