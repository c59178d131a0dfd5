"""Mochi: the clip first, then the text without its padding; every sample is attended to on its own.

Its timesteps grow from noise to picture.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gensparse.errors import LayoutMismatchError
from gensparse.families.base import Family, Layouts, TensorMemo, needed, sites_of
from gensparse.families.clips import clip_grid, untold_size
from gensparse.families.latents import token_grid
from gensparse.layout import Layout

if TYPE_CHECKING:
    import torch


def read_layouts(model: Any, bound: Mapping[str, Any], memo: TensorMemo) -> Layouts:
    """One layout per sample, from `hidden_states` [B, C, F, H, W] and `encoder_attention_mask` [B, T].

    Raises:
        LayoutMismatchError: latents, text or its mask are missing, latents are no clip, or mask and text do not fit.
    """
    latents, text, mask = needed("Mochi", bound, "hidden_states", "encoder_hidden_states", "encoder_attention_mask")
    side = int(model.config["patch_size"])
    grid = token_grid("Mochi", latents, (1, side, side), axes=(3,))
    if mask.ndim != 2 or tuple(mask.shape) != tuple(text.shape[:2]) or mask.shape[0] != latents.shape[0]:
        raise LayoutMismatchError(
            f"Mochi got a text mask of shape {tuple(mask.shape)} for text of shape {tuple(text.shape)} and "
            f"{latents.shape[0]} clips; pass one entry per text token of every clip."
        )
    return {"joint": tuple(Layout.joint(grid, text=words, text_first=False) for words in memo.get(mask, _valid))}


def layout_for(
    height: int, width: int, *, frames: int, n_text: int, vae_scale: int = 8, vae_time: int = 6, patch: int = 2
) -> Layout:
    """Layout of one clip of frames x height x width pixels.

    Args:
        n_text: valid text tokens, at most 256; padding has no place in the sequence.
        vae_scale: pixels per latent cell and axis; vae_time: frames per latent frame.
        patch: latent cells per token and axis; a token is one latent frame long.

    Raises:
        ConfigError: no frame, or a frame that holds no whole token.
    """
    grid = clip_grid("Mochi", frames, height, width, token=vae_scale * patch, vae_time=vae_time)
    return Layout.joint(grid, text=n_text, text_first=False)


def _valid(mask: "torch.Tensor") -> tuple[int, ...]:
    return tuple((mask != 0).sum(dim=1).tolist())


FAMILY = Family(
    name="Mochi",
    sites=sites_of(joint=r"transformer_blocks\.\d+\.attn1"),
    read_layouts=read_layouts,
    layout_for=layout_for,
    native_tokens=untold_size("Mochi"),
    ascending_time=True,
    blocks=r"transformer_blocks\.\d+",
)
