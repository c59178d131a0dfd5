"""Cosmos 1, Predict2 and 2.5: self-attention over the clip, text (and image) apart.

Where conditions have a timestep of their own every frame has one.
"""

from collections.abc import Mapping
from typing import Any

from gensparse.families.base import Family, Layouts, TensorMemo, needed, sites_of
from gensparse.families.clips import clip_grid, untold_size
from gensparse.families.latents import token_grid
from gensparse.layout import Layout


def read_layouts(model: Any, bound: Mapping[str, Any], _memo: TensorMemo) -> Layouts:
    """Layout from `hidden_states` [B, C, F, H, W].

    Raises:
        LayoutMismatchError: latents are missing or no clip.
    """
    (latents,) = needed("Cosmos", bound, "hidden_states")
    return {"self": Layout.joint(token_grid("Cosmos", latents, model.config["patch_size"], axes=(3,)))}


def layout_for(
    height: int, width: int, *, frames: int, n_text: int = 0, vae_scale: int = 8, vae_time: int = 8, patch: int = 2
) -> Layout:
    """Layout of a clip of frames x height x width pixels.

    Args:
        n_text: text tokens, which are not among the tokens of self-attention.
        vae_scale: pixels per latent cell and axis; vae_time: frames per latent frame (4 from Predict2 on).
        patch: latent cells per token and axis; a token is one latent frame long.

    Raises:
        ConfigError: no frame, or a frame that holds no whole token.
    """
    return Layout.joint(clip_grid("Cosmos", frames, height, width, token=vae_scale * patch, vae_time=vae_time))


FAMILY = Family(
    name="Cosmos",
    sites=sites_of(self=r"transformer_blocks\.\d+\.attn1"),
    read_layouts=read_layouts,
    layout_for=layout_for,
    native_tokens=untold_size("Cosmos"),
    blocks=r"transformer_blocks\.\d+",
)
