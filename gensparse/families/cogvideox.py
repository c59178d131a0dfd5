"""CogVideoX and ConsisID: text first, then the clip, in every block."""

from collections.abc import Mapping
from math import prod
from typing import Any

from gensparse.errors import ConfigError, LayoutMismatchError
from gensparse.families.base import Family, Layouts, TensorMemo, needed, sites_of
from gensparse.families.clips import clip_grid
from gensparse.families.latents import denoiser_config, token_grid
from gensparse.layout import Grid, Layout


def read_layouts(model: Any, bound: Mapping[str, Any], _memo: TensorMemo) -> Layouts:
    """Layout from `hidden_states` [B, F, C, H, W] and `encoder_hidden_states` [B, T, C].

    Raises:
        LayoutMismatchError: latents or text are missing, or the latents are no clip.
    """
    latents, text = needed("CogVideoX", bound, "hidden_states", "encoder_hidden_states")
    if latents.ndim != 5:
        raise LayoutMismatchError(
            f"The CogVideoX call has latents of shape {tuple(latents.shape)}; pass [batch, frames, channels, rows, "
            "columns]."
        )
    side = int(model.config["patch_size"])
    grid = token_grid("CogVideoX", latents.transpose(1, 2), (_time(model.config), side, side), axes=(3,))
    return {"joint": Layout.joint(grid, text=text.shape[1])}


def layout_for(
    height: int,
    width: int,
    *,
    frames: int,
    n_text: int = 226,
    vae_scale: int = 8,
    vae_time: int = 4,
    patch: int = 2,
    patch_time: int = 1,
) -> Layout:
    """Layout of a clip of frames x height x width pixels; latent frames are padded to whole tokens.

    Args:
        n_text: text tokens, padding included.
        vae_scale: pixels per latent cell and axis; vae_time: frames per latent frame.
        patch: latent cells per token and axis; patch_time: latent frames per token (2 in CogVideoX 1.5).

    Raises:
        ConfigError: no frame, or a frame that holds no whole token.
    """
    grid = clip_grid("CogVideoX", frames, height, width, token=vae_scale * patch, vae_time=vae_time)
    return Layout.joint((-(-grid[0] // patch_time), *grid[1:]), text=n_text)


def native_tokens(model: Any, _scheduler_config: Mapping[str, Any] | None = None) -> int:
    """Tokens of a clip of the training size (`sample_frames`, `sample_height`, `sample_width` of the transformer).

    Args:
        model: a CogVideoX transformer, or a pipeline that has one.

    Raises:
        ConfigError: the config does not say it.
    """
    config = denoiser_config(model)
    sizes = ("sample_frames", "sample_height", "sample_width")
    if not all(config.get(name) for name in sizes):
        raise ConfigError(
            f"The training size of a CogVideoX model stands in its config ({', '.join(sizes)}), which lacks it; pass a "
            "denoiser or pipeline that was made from its published config."
        )
    frames, height, width = (int(config[name]) for name in sizes)
    latent = (frames - 1) // int(config["temporal_compression_ratio"]) + 1
    side = int(config["patch_size"])
    grid: Grid = (-(-latent // _time(config)), height // side, width // side)
    return prod(grid)


def _time(config: Mapping[str, Any]) -> int:
    """Latent frames of a token."""
    return int(config.get("patch_size_t") or 1)


FAMILY = Family(
    name="CogVideoX",
    sites=sites_of(joint=r"transformer_blocks\.\d+\.attn1"),
    read_layouts=read_layouts,
    layout_for=layout_for,
    native_tokens=native_tokens,
    blocks=r"transformer_blocks\.\d+",
)
