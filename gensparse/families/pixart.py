"""PixArt-alpha and PixArt-Sigma: self-attention of the picture alone; text comes by cross attention."""

from collections.abc import Mapping
from typing import Any

from gensparse.families.base import Family, Layouts, TensorMemo, needed, sites_of, whole_tokens
from gensparse.families.latents import token_grid, trained_tokens
from gensparse.layout import Layout


def read_layouts(model: Any, bound: Mapping[str, Any], _memo: TensorMemo) -> Layouts:
    """Layout from `hidden_states` [B, C, H, W], cut down to whole patches.

    Raises:
        LayoutMismatchError: latents are missing or no picture.
    """
    (latents,) = needed("PixArt", bound, "hidden_states")
    return {"self": Layout.joint(token_grid("PixArt", latents, model.config["patch_size"]))}


def layout_for(height: int, width: int, *, n_text: int = 0, vae_scale: int = 8, patch: int = 2) -> Layout:
    """Layout of a picture of height x width pixels; sizes are cut down to whole patches.

    Args:
        n_text: text takes no part in self-attention, so its length does not matter.
        vae_scale: pixels per latent cell; patch: latent cells per token, both per axis.

    Raises:
        ConfigError: the picture holds no whole token.
    """
    token = vae_scale * patch
    return Layout.image(*whole_tokens("PixArt", ("height", height, token), ("width", width, token)))


def native_tokens(model: Any, _scheduler_config: Mapping[str, Any] | None = None) -> int:
    """Picture tokens of the training size (`sample_size` of the transformer).

    Args:
        model: a PixArt transformer, or a pipeline that has one.

    Raises:
        ConfigError: the config does not say it.
    """
    return trained_tokens("PixArt", model)


FAMILY = Family(
    name="PixArt",
    sites=sites_of(self=r"transformer_blocks\.\d+\.attn1"),
    read_layouts=read_layouts,
    layout_for=layout_for,
    native_tokens=native_tokens,
    blocks=r"transformer_blocks\.\d+",
)
