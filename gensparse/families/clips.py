"""What families of clips share: tokens of a clip from pixels and frames, and from the coordinates of its tokens."""

from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from gensparse.errors import ConfigError, LayoutMismatchError
from gensparse.families.base import whole_tokens
from gensparse.families.position_ids import Numbers, raster_grid
from gensparse.layout import Grid

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
    return frames // vae_time * vae_time + 1 if isinstance(frames, int) and frames > 0 else frames


def grid_of_coordinates(family: str, coordinates: "torch.Tensor") -> Grid:
    """(F, H, W) of tokens whose times, rows and columns are given, [B, 3, N] or their first and last ones [B, 3, N, 2].

    Raises:
        LayoutMismatchError: the samples differ, or the tokens are not frames of one size in order of time. Conditions
            that stand beside the clip in the same sequence are such a case: nothing says which run is the clip.
    """
    table = coordinates.detach().float().cpu().numpy()
    table = table[..., 0] if table.ndim == 4 else table
    if table.ndim != 3 or table.shape[1] != 3:
        raise LayoutMismatchError(
            f"The {family} call has coordinates of shape {tuple(coordinates.shape)}; pass [batch, 3, tokens]."
        )
    if not (table == table[:1]).all():
        raise LayoutMismatchError(f"The coordinates of the {family} call differ between samples; run them one by one.")
    return _frames_in_order(family, *table[0])


def _frames_in_order(family: str, times: Numbers, rows: Numbers, columns: Numbers) -> Grid:
    again = np.flatnonzero((rows == rows[0]) & (columns == columns[0]))
    plane = int(again[1]) if len(again) > 1 else len(rows)
    height, width = raster_grid(rows[:plane], columns[:plane])
    frames, rest = divmod(len(rows), plane)
    if rest == 0:
        grid = (frames, plane)
        times, rows, columns = times.reshape(grid), rows.reshape(grid), columns.reshape(grid)
        same = (times == times[:, :1]).all() and (rows == rows[:1]).all() and (columns == columns[:1]).all()
        if same and (np.diff(times[:, 0]) > 0).all():
            return frames, height, width
    raise LayoutMismatchError(
        f"The coordinates of {columns.size} {family} tokens are not frames of one size in order of time; tokens of "
        "conditions beside the clip cannot be told from it."
    )


def untold_size(family: str) -> Any:
    """`Family.native_tokens` where no config tells the size of training."""

    def native_tokens(_model: Any = None, _scheduler_config: Any = None) -> NoReturn:
        raise ConfigError(
            f"No config of a {family} model says at which size it was trained; choose settings that do not need it."
        )

    return native_tokens
