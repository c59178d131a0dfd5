"""Rotary positions counted from the middle of the picture (QwenImage): a drop-in table beyond the trained size.

Rows are numbered -(H - H // 2) .. H // 2 - 1 and columns alike, the frame 0; text starts at max(H // 2, W // 2), with
the same number on all three axes.
"""

from collections.abc import Sequence

import torch

from gensparse.errors import ConfigError, LayoutMismatchError
from gensparse.highres.rope import base_frequencies, interpolated, spatial_frequencies


class CentredPositionTable(torch.nn.Module):
    """Takes the place of QwenImageTransformer2DModel.pos_embed for one picture: its shape -> (picture, text) tables.

    Each table is complex64 [tokens, D / 2], mscale * exp(i * position * frequency), made in float64. A rule changes the
    frequencies of rows and of columns for every token, text too, as in a language model: then rotations still tell
    nothing but distances, and where low frequencies are divided by the scale, text lies as far outside the picture as
    in training. "interpolate" keeps the frequencies, places rows and columns in native units, and starts text where it
    starts at native size. Shapes stay integers, so whoever reads the grid from them still can.

    Args:
        axes_dim, theta: of the module it replaces.
        grid: tokens (rows, columns) of the picture.
        native: tokens per side in training.
        rule: a key of `gensparse.highres.rope.RULES`.
        native_grid: tokens (rows, columns) of this picture at native size; used by "interpolate".
        offset: tokens by which the grid is shifted (a padded grid: -0.5); used by "interpolate".
        logit_scale: further factor on every logit, put into the tables (proportional attention).

    Raises:
        ConfigError: an unknown rule, or "interpolate" without `native_grid`.
    """

    def __init__(
        self,
        axes_dim: Sequence[int],
        theta: float,
        grid: tuple[int, int],
        native: int,
        *,
        rule: str = "yarn",
        native_grid: tuple[int, int] | None = None,
        offset: float = 0.0,
        logit_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if rule == "interpolate" and native_grid is None:
            raise ConfigError(
                "The position rule 'interpolate' needs native_grid, the picture's token grid at native size."
            )
        self.axes_dim, self.theta, self.grid, self.native = tuple(axes_dim), theta, tuple(grid), native
        self.rule, self.native_grid, self.offset, self.logit_scale = rule, native_grid, offset, logit_scale
        self.time = 1.0
        self._frequencies()  # an unknown rule raises here, not in the middle of a step
        self._cache: tuple[float, torch.device, torch.Tensor] | None = None

    def set_time(self, sigma: float) -> None:
        """Noise level of the coming step, 1 = pure noise; only the dy_ rules depend on it."""
        self.time = sigma if self.rule.startswith("dy_") else 1.0

    def forward(
        self,
        video_fhw: Sequence,
        device: torch.device | None = None,
        max_txt_seq_len: int | torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            video_fhw: of every sample its picture's (1, rows, columns), or a list with that one shape.
            max_txt_seq_len: text tokens.

        Raises:
            LayoutMismatchError: another grid, or more pictures than one.
        """
        shape = video_fhw[0] if isinstance(video_fhw, list) else video_fhw
        shapes = shape if isinstance(shape, list) else [shape]
        if [tuple(one) for one in shapes] != [(1, *self.grid)]:
            raise LayoutMismatchError(
                f"These positions are for one picture of {self.grid[0]}x{self.grid[1]} tokens, but the call has "
                f"{shapes}; call the pipeline for the size it was asked for."
            )
        device = torch.device("cpu") if device is None else torch.device(device)
        return self._picture(device), self._text(int(max_txt_seq_len or 0), device)

    def _picture(self, device: torch.device) -> torch.Tensor:
        if self._cache is None or self._cache[:2] != (self.time, device):
            frame, *spatial = self._frequencies()
            rows, cols = (
                wave(self._positions(axis), *frequencies, self.logit_scale) for axis, frequencies in enumerate(spatial)
            )
            still = wave(torch.zeros(1, dtype=torch.float64), *frame, self.logit_scale)
            shape = (*self.grid, -1)
            parts = (still[None].expand(shape), rows[:, None].expand(shape), cols[None].expand(shape))
            self._cache = (self.time, device, torch.cat(parts, dim=-1).flatten(0, 1).to(device))
        return self._cache[2]

    def _text(self, count: int, device: torch.device) -> torch.Tensor:
        start = max(side // 2 for side in (self.native_grid if self.rule == "interpolate" else self.grid))
        positions = start + torch.arange(count, dtype=torch.float64)
        parts = [wave(positions, *frequencies, self.logit_scale) for frequencies in self._frequencies()]
        return torch.cat(parts, dim=-1).to(device)

    def _positions(self, axis: int) -> torch.Tensor:
        """Positions of the rows (axis 0) or columns (axis 1), float64."""
        length = self.grid[axis]
        if self.rule != "interpolate":
            return torch.arange(length, dtype=torch.float64) - (length - length // 2)
        assert self.native_grid is not None
        native = self.native_grid[axis]
        side = length + round(2 * self.offset)  # a shifted grid has one token more than the picture it covers
        placed = interpolated(torch.arange(length, dtype=torch.float64), side / native, self.offset)
        return placed - (native - native // 2)

    def _frequencies(self) -> list[tuple[torch.Tensor, float]]:
        frame = (base_frequencies(self.axes_dim[0], self.theta), 1.0)
        return [
            frame, *spatial_frequencies(self.rule, self.axes_dim[1:], self.theta, self.grid, self.native, self.time)
        ]  # fmt: skip


def wave(positions: torch.Tensor, frequencies: torch.Tensor, mscale: float, logit_scale: float = 1.0) -> torch.Tensor:
    """mscale * sqrt(logit_scale) * exp(i * positions x frequencies), complex64 [tokens, F]."""
    angles, factor = torch.outer(positions, frequencies), mscale * logit_scale**0.5
    return torch.complex((angles.cos() * factor).float(), (angles.sin() * factor).float())
