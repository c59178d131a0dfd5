"""HunyuanVideo 1.5: the clip first, then image, quoted words and text, each sample's padding at the end.

Its processor hides padding by a mask of all token pairs; the sparse variant does so by a mask of keys.
"""

from collections.abc import Mapping
from typing import Any

from gensparse.families.base import Family, Layouts, TensorMemo, needed, sites_of
from gensparse.families.clips import clip_grid, untold_size
from gensparse.families.hunyuan_video import patches
from gensparse.families.latents import token_grid
from gensparse.layout import Layout


def read_layouts(model: Any, bound: Mapping[str, Any], _memo: TensorMemo) -> Layouts:
    """Layout from `hidden_states` [B, C, F, H, W] and the image, quoted words and text [B, T, C].

    Raises:
        LayoutMismatchError: latents, image or text are missing, or the latents are no clip.
    """
    latents, *texts = needed(
        "HunyuanVideo 1.5", bound, "hidden_states", "encoder_hidden_states", "encoder_hidden_states_2", "image_embeds"
    )
    grid = token_grid("HunyuanVideo 1.5", latents, patches(model), axes=(3,))
    return {"joint": Layout.joint(grid, text=sum(text.shape[1] for text in texts), text_first=False)}


def layout_for(
    height: int, width: int, *, frames: int, n_text: int = 1985, vae_scale: int = 16, vae_time: int = 4, patch: int = 1
) -> Layout:
    """Layout of a clip of frames x height x width pixels.

    Args:
        n_text: tokens of text (1000 in the published pipelines), quoted words (256) and image (729), with padding.
        vae_scale: pixels per latent cell and axis; vae_time: frames per latent frame.
        patch: latent cells per token and axis; a token is one latent frame long.

    Raises:
        ConfigError: no frame, or a frame that holds no whole token.
    """
    grid = clip_grid("HunyuanVideo 1.5", frames, height, width, token=vae_scale * patch, vae_time=vae_time)
    return Layout.joint(grid, text=n_text, text_first=False)


FAMILY = Family(
    name="HunyuanVideo 1.5",
    sites=sites_of(joint=r"transformer_blocks\.\d+\.attn"),
    read_layouts=read_layouts,
    layout_for=layout_for,
    native_tokens=untold_size("HunyuanVideo 1.5"),
    blocks=r"transformer_blocks\.\d+",
)
