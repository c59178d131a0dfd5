"""Kandinsky 5 (pictures and clips): self-attention over the clip in plain order, text apart.

With `sparse_params` the model runs a sparse attention of its own, for which it orders tokens in 8 x 8 blocks; such
calls are refused.
"""

from collections.abc import Mapping
from typing import Any

from gensparse.errors import LayoutMismatchError
from gensparse.families.base import Family, Layouts, TensorMemo, needed, sites_of
from gensparse.families.clips import clip_grid, rounded_frames, untold_size
from gensparse.families.latents import token_grid
from gensparse.layout import Layout


def read_layouts(model: Any, bound: Mapping[str, Any], _memo: TensorMemo) -> Layouts:
    """Layout from `hidden_states` [B, F, H, W, C].

    Raises:
        LayoutMismatchError: latents are missing or no clip, or the model's own sparse attention is on.
    """
    (latents,) = needed("Kandinsky 5", bound, "hidden_states")
    if bound.get("sparse_params") is not None:
        raise LayoutMismatchError(
            "Kandinsky 5 runs its own sparse attention (sparse_params), which orders tokens in 8 x 8 blocks; set "
            'transformer.config attention_type to "regular" to use another one.'
        )
    if latents.ndim != 5:
        raise LayoutMismatchError(
            f"The Kandinsky 5 call has latents of shape {tuple(latents.shape)}; pass [batch, frames, rows, columns, "
            "channels]."
        )
    grid = token_grid("Kandinsky 5", latents.movedim(-1, 1), model.config["patch_size"], axes=(3,))
    return {"self": Layout.joint(grid)}


def layout_for(
    height: int, width: int, *, frames: int = 1, n_text: int = 0, vae_scale: int = 8, vae_time: int = 4, patch: int = 2
) -> Layout:
    """Layout of a picture or clip of frames x height x width pixels; the pipelines round frames to 4 k + 1.

    Args:
        n_text: text tokens, which are not among the tokens of self-attention.
        vae_scale: pixels per latent cell and axis; vae_time: frames per latent frame.
        patch: latent cells per token and axis; a token is one latent frame long.

    Raises:
        ConfigError: no frame, or a frame that holds no whole token.
    """
    frames = rounded_frames(frames, vae_time)
    return Layout.joint(clip_grid("Kandinsky 5", frames, height, width, token=vae_scale * patch, vae_time=vae_time))


FAMILY = Family(
    name="Kandinsky 5",
    sites=sites_of(self=r"visual_transformer_blocks\.\d+\.self_attention"),
    read_layouts=read_layouts,
    layout_for=layout_for,
    native_tokens=untold_size("Kandinsky 5"),
    blocks=r"(visual|text)_transformer_blocks\.\d+",
)
