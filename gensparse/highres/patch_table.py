"""Positions that are a table added to the tokens (Stable Diffusion 3), beyond the size of training.

The model has a square table of `pos_embed_max_size` entries per axis and takes its middle: a picture of 64 x 64 tokens
sees the 64 x 64 entries around the centre. A larger picture would see entries that training never or seldom used, and
past the table's end there is none. So a larger picture gets the entries of its native size, resized: token i of an axis
stands at (i + 0.5) / z - 0.5 in native tokens, z = tokens / native tokens, and its entry is a mean of the four around
it with the weights of cubic convolution (Keys 1981, a = -0.5). What lies just outside the native part is taken from the
table itself, and at its end from the last entry.
"""

import torch

from gensparse.errors import ConfigError
from gensparse.highres.resample import cubic_matrix
from gensparse.highres.rope import interpolated


class ResizedPatchEmbed(torch.nn.Module):
    """Takes the place of SD3Transformer2DModel.pos_embed: latents [B, C, h, w] -> tokens [B, rows * columns, D].

    The projection and the table are those of the module it stands for, which is not changed.

    Args:
        own: diffusers' PatchEmbed with `pos_embed` [1, S * S, D] and `pos_embed_max_size` S.
        native_grid: tokens (rows, columns) of this picture at native size.
        grid: tokens of the picture now.
        offset: tokens by which the grid is shifted (a padded grid of one token more: -0.5).

    Raises:
        ConfigError: the module has no such table.
    """

    def __init__(
        self,
        own: torch.nn.Module,
        native_grid: tuple[int, int],
        grid: tuple[int, int],
        offset: float = 0.0,
    ) -> None:
        super().__init__()
        if getattr(own, "pos_embed", None) is None or not own.pos_embed_max_size:
            raise ConfigError(
                f"{type(own).__name__} has no table of positions that is cut to the picture; use position='base'."
            )
        self.own, self.grid = own, grid
        self._axes = [
            axis_weights(own.pos_embed_max_size, native, length, offset)
            for native, length in zip(native_grid, grid, strict=True)
        ]

    def set_time(self, sigma: float) -> None:
        """Nothing: these positions are the same at every noise level."""

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        tokens = self.own.proj(latent).flatten(2).transpose(1, 2)
        if self.own.norm is not None:
            tokens = self.own.norm(tokens)
        return (tokens + self.table().to(tokens.device)).to(latent.dtype)

    def table(self) -> torch.Tensor:
        """Positions of all tokens, [rows * columns, D] in the type of the model's table."""
        side, entries = self.own.pos_embed_max_size, self.own.pos_embed
        (rows, row_span), (cols, col_span) = self._axes
        part = entries.reshape(side, side, -1)[row_span, col_span].float()
        rows, cols = rows.to(part), cols.to(part)
        tall = (rows @ part.flatten(1)).reshape(len(rows), part.shape[1], -1)
        return (cols @ tall).flatten(0, 1).to(entries.dtype)


def axis_weights(side: int, native: int, length: int, offset: float = 0.0) -> tuple[torch.Tensor, slice]:
    """Weights [length, entries] of one axis, and which entries of a table of `side` they are for.

    Args:
        native: tokens of the axis at native size, which stand in the middle of the table.
        length: tokens now, with the one more of a shifted grid.
        offset: tokens by which the grid is shifted.
    """
    zoom = (length + round(2 * offset)) / native
    positions = interpolated(torch.arange(length, dtype=torch.float64), zoom, offset)
    matrix = cubic_matrix(positions + (side - native) // 2, side, a=-0.5)
    used = matrix.any(0).nonzero()
    span = slice(int(used[0]), int(used[-1]) + 1)
    return matrix[:, span], span
