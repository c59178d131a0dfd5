"""Wan 2.1 and 2.2 (text, image and first-frame to video) and VACE: self-attention over the clip, text apart.

Wan 2.2 has two denoisers of this kind that take turns by noise level. In the TI2V model every token has a timestep. The
reference pictures of VACE stand before the clip as frames of their own, which no argument of a call tells: they count
as frames of the clip.
"""

from collections.abc import Mapping
from typing import Any

from gensparse.families.base import Family, Layouts, TensorMemo, needed, sites_of
from gensparse.families.clips import clip_grid, rounded_frames, untold_size
from gensparse.families.latents import token_grid
from gensparse.layout import Layout


def read_layouts(model: Any, bound: Mapping[str, Any], _memo: TensorMemo) -> Layouts:
    """Layout from `hidden_states` [B, C, F, H, W], cut down to whole patches.

    Raises:
        LayoutMismatchError: latents are missing or no clip.
    """
    name = type(model).__name__
    (latents,) = needed(name, bound, "hidden_states")
    return {"self": Layout.joint(token_grid(name, latents, model.config["patch_size"], axes=(3,)))}


def layout_for(
    height: int, width: int, *, frames: int, n_text: int = 0, vae_scale: int = 8, vae_time: int = 4, patch: int = 2
) -> Layout:
    """Layout of a clip of frames x height x width pixels; the pipelines round frames to 4 k + 1 and sizes down.

    Args:
        n_text: text tokens, which are not among the tokens of self-attention.
        vae_scale: pixels per latent cell and axis (16 in Wan 2.2 TI2V); vae_time: frames per latent frame.
        patch: latent cells per token and axis; a token is one latent frame long.

    Raises:
        ConfigError: no frame, or a frame that holds no whole token.
    """
    frames = rounded_frames(frames, vae_time)
    return Layout.joint(clip_grid("Wan", frames, height, width, token=vae_scale * patch, vae_time=vae_time))


FAMILY = Family(
    name="Wan",
    sites=sites_of(self=r"(vace_)?blocks\.\d+\.attn1"),
    read_layouts=read_layouts,
    layout_for=layout_for,
    native_tokens=untold_size("Wan"),
    blocks=r"(vace_)?blocks\.\d+",
)
