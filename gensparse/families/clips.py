"""What families of clips share: grids from pixels and frames, and layouts from the coordinates of tokens."""

from itertools import pairwise
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from gensparse.errors import ConfigError, LayoutMismatchError
from gensparse.families.base import whole_tokens
from gensparse.families.position_ids import Numbers, raster_grid
from gensparse.layout import Grid, Layout, Segment

if TYPE_CHECKING:
    import torch


def clip_grid(family: str, frames: int, height: int, width: int, *, token: int, vae_time: int) -> Grid:
    """(F, H, W) latent frames and tokens per frame of a clip of frames x height x width pixels.

    Autoencoders of clips keep the first frame and join `vae_time` further ones.

    Args:
        token: pixels per token and axis.

    Raises:
        ConfigError: no frame, or a frame that holds no whole token.
    """
    if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
        raise ConfigError(f"{family} frames={frames!r} is not allowed; pass a number of frames from 1 up.")
    rows, columns = whole_tokens(family, ("height", height, token), ("width", width, token))
    return (frames - 1) // vae_time + 1, rows, columns


def rounded_frames(frames: int, vae_time: int) -> int:
    """Frames that pipelines make which round to one more than a multiple of `vae_time`; 80 become 81 with 4."""
    countable = isinstance(frames, int) and not isinstance(frames, bool) and frames > 0
    return frames // vae_time * vae_time + 1 if countable else frames


def layout_of_coordinates(family: str, coordinates: "torch.Tensor") -> Layout:
    """Layout of tokens whose times, rows and columns are given, [B, 3, N] or their first and last ones [B, 3, N, 2].

    Conditions stand beside the clip as runs of frames of their own, which start after time 0; they are references.

    Raises:
        LayoutMismatchError: the samples differ, the tokens are not frames of one size in order of time, or there are
            several runs of frames and not exactly one of them starts at time 0.
    """
    table = coordinates.detach().float().cpu().numpy()
    table = table[..., 0] if table.ndim == 4 else table
    if table.ndim != 3 or table.shape[1] != 3:
        raise LayoutMismatchError(
            f"The {family} call has coordinates of shape {tuple(coordinates.shape)}; pass [batch, 3, tokens]."
        )
    if not (table == table[:1]).all():
        raise LayoutMismatchError(f"The coordinates of the {family} call differ between samples; run them one by one.")
    times, height, width = _frames(family, *table[0])
    cuts = np.flatnonzero(np.diff(times) <= 0) + 1
    edges = [0, *(int(cut) for cut in cuts), len(times)]
    runs = [(stop - start, times[start]) for start, stop in pairwise(edges)]
    first = [start == 0 for _, start in runs]
    if len(runs) > 1 and (sum(first) != 1 or min(start for _, start in runs) < 0):
        raise LayoutMismatchError(
            f"The coordinates of the {family} call are {len(runs)} runs of frames, {sum(first)} of which start at time "
            "0; which of them is the clip cannot be told."
        )
    kinds = ["target" if clip or len(runs) == 1 else "reference" for clip in first]
    return Layout(
        tuple(
            Segment(kind, frames * height * width, (frames, height, width))
            for kind, (frames, _) in zip(kinds, runs, strict=True)
        )
    )


def _frames(family: str, times: Numbers, rows: Numbers, columns: Numbers) -> tuple[Numbers, int, int]:
    """Times of the frames, and their rows and columns, from coordinates of tokens [N]."""
    again = np.flatnonzero((rows == rows[0]) & (columns == columns[0]))
    plane = int(again[1]) if len(again) > 1 else len(rows)
    height, width = raster_grid(rows[:plane], columns[:plane])
    frames, rest = divmod(len(rows), plane)
    if rest == 0:
        times, rows, columns = (values.reshape(frames, plane) for values in (times, rows, columns))
        if (times == times[:, :1]).all() and (rows == rows[:1]).all() and (columns == columns[:1]).all():
            return times[:, 0], height, width
    raise LayoutMismatchError(
        f"The coordinates of {columns.size} {family} tokens are not frames of {height}x{width} tokens; pass those of "
        "whole frames of one size."
    )


def untold_size(family: str) -> Any:
    """`Family.native_tokens` where no config tells the size of training."""

    def native_tokens(_model: Any = None, _scheduler_config: Any = None) -> NoReturn:
        raise ConfigError(
            f"No config of a {family} model says at which size it was trained; choose settings that do not need it."
        )

    return native_tokens
