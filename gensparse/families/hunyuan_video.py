"""HunyuanVideo (text and image to video): the clip first, then text, whose padding a key mask hides, in every block.

The refiner of the text attends to text alone and is no site.
"""

from collections.abc import Mapping
from typing import Any

from gensparse.families.base import Family, Layouts, TensorMemo, needed, sites_of
from gensparse.families.clips import clip_grid, untold_size
from gensparse.families.latents import token_grid
from gensparse.layout import Layout


def read_layouts(model: Any, bound: Mapping[str, Any], _memo: TensorMemo) -> Layouts:
    """Layout from `hidden_states` [B, C, F, H, W] and `encoder_hidden_states` [B, T, C].

    Raises:
        LayoutMismatchError: latents or text are missing, or the latents are no clip.
    """
    latents, text = needed("HunyuanVideo", bound, "hidden_states", "encoder_hidden_states")
    grid = token_grid("HunyuanVideo", latents, patches(model), axes=(3,))
    return {"joint": Layout.joint(grid, text=text.shape[1], text_first=False)}


def patches(model: Any) -> tuple[int, int, int]:
    """Latent frames, rows and columns of a token."""
    time, side = int(model.config["patch_size_t"]), int(model.config["patch_size"])
    return time, side, side


def layout_for(
    height: int, width: int, *, frames: int, n_text: int, vae_scale: int = 8, vae_time: int = 4, patch: int = 2
) -> Layout:
    """Layout of a clip of frames x height x width pixels.

    Args:
        n_text: text tokens, padding included (256 in the published pipelines).
        vae_scale: pixels per latent cell and axis; vae_time: frames per latent frame.
        patch: latent cells per token and axis; a token is one latent frame long.

    Raises:
        ConfigError: no frame, or a frame that holds no whole token.
    """
    grid = clip_grid("HunyuanVideo", frames, height, width, token=vae_scale * patch, vae_time=vae_time)
    return Layout.joint(grid, text=n_text, text_first=False)


FAMILY = Family(
    name="HunyuanVideo",
    sites=sites_of(joint=r"(single_)?transformer_blocks\.\d+\.attn"),
    read_layouts=read_layouts,
    layout_for=layout_for,
    native_tokens=untold_size("HunyuanVideo"),
)
