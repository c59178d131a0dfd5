"""Denoisers that receive latents as pictures or clips: their grids, and their training size from the config."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gensparse.errors import ConfigError, LayoutMismatchError
from gensparse.families.base import Family, Layouts, TensorMemo, needed, sites_of, whole_tokens
from gensparse.layout import Grid, Layout

if TYPE_CHECKING:
    import torch


def picture_alone(name: str, *, attention: str, blocks: str) -> Family:
    """A family whose self-attention sees the picture alone; text comes by cross attention.

    Args:
        attention, blocks: regular expressions of its self-attention modules and of its repeated blocks.
    """

    def read_layouts(model: Any, bound: Mapping[str, Any], _memo: TensorMemo) -> Layouts:
        """Layout from `hidden_states` [B, C, H, W], cut down to whole patches.

        Raises:
            LayoutMismatchError: latents are missing or no picture.
        """
        (latents,) = needed(name, bound, "hidden_states")
        return {"self": Layout.joint(token_grid(name, latents, model.config["patch_size"]))}

    def layout_for(height: int, width: int, *, n_text: int = 0, vae_scale: int = 8, patch: int = 2) -> Layout:
        """Layout of a picture of height x width pixels; sizes are cut down to whole patches.

        Args:
            n_text: text takes no part in self-attention, so its length does not matter.
            vae_scale: pixels per latent cell; patch: latent cells per token, both per axis.

        Raises:
            ConfigError: the picture holds no whole token.
        """
        token = vae_scale * patch
        return Layout.image(*whole_tokens(name, ("height", height, token), ("width", width, token)))

    def native_tokens(model: Any, _scheduler_config: Mapping[str, Any] | None = None) -> int:
        """Picture tokens of the training size (`sample_size`) of a transformer, or of a pipeline that has one.

        Raises:
            ConfigError: the config does not say it.
        """
        return trained_tokens(name, model)

    return Family(
        name=name,
        sites=sites_of(self=attention),
        read_layouts=read_layouts,
        layout_for=layout_for,
        native_tokens=native_tokens,
        blocks=blocks,
    )


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
