"""Grids of denoisers that receive latents as pictures or clips, and their training size from the config."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gensparse.errors import ConfigError, LayoutMismatchError
from gensparse.layout import Grid

if TYPE_CHECKING:
    import torch


def token_grid(
    family: str, latents: "torch.Tensor", patch: int | Sequence[int], *, axes: tuple[int, ...] = (2,)
) -> Grid:
    """(F, H, W) tokens of latents [B, C, H, W] or [B, C, F, H, W], rounded down to whole patches.

    Args:
        patch: latent cells per token, one for all axes or one per axis.
        axes: how many axes behind the channels the family allows; pictures have 2, clips 3.

    Raises:
        LayoutMismatchError: latents with other axes, or an axis without a whole token.
    """
    sizes = tuple(latents.shape[2:])
    if len(sizes) not in axes or (not isinstance(patch, int) and len(patch) != len(sizes)):
        allowed = " or ".join(str(count + 2) for count in axes)
        raise LayoutMismatchError(
            f"The {family} call has latents of shape {tuple(latents.shape)}, which are no picture of this model; pass "
            f"{allowed} axes (batch, channels, then the grid)."
        )
    patches = (patch,) * len(sizes) if isinstance(patch, int) else tuple(patch)
    tokens = tuple(size // cells for size, cells in zip(sizes, patches, strict=True))
    if not all(tokens):
        raise LayoutMismatchError(
            f"The {family} call has latents of {'x'.join(map(str, sizes))} cells, which hold no whole token; pass at "
            f"least {'x'.join(map(str, patches))} cells."
        )
    frames, rows, columns = (1,) * (3 - len(tokens)) + tokens
    return frames, rows, columns


def trained_tokens(family: str, model: Any, *, setting: str = "sample_size", patch: str | None = "patch_size") -> int:
    """Picture tokens at the training size that a denoiser's config tells.

    Args:
        model: the denoiser, or a pipeline that has one.
        setting: name of the size in latent cells, one number or (height, width).
        patch: name of the cells per token and axis; None for one.

    Raises:
        ConfigError: the config does not say it.
    """
    config = denoiser_config(model)
    size = config.get(setting)
    if not size:
        raise ConfigError(
            f"The training size of a {family} model stands in its config ({setting}), which has none; pass a denoiser "
            "or pipeline that was made from its published config."
        )
    height, width = (size, size) if isinstance(size, int) else size
    cells = 1 if patch is None else int(config[patch])
    return (int(height) // cells) * (int(width) // cells)


def denoiser_config(model: Any) -> Mapping[str, Any]:
    """Config of a denoiser, or of the denoiser of a pipeline; empty where there is none."""
    own = next((part for name in ("transformer", "unet") if (part := getattr(model, name, None)) is not None), model)
    return getattr(own, "config", None) or {}
