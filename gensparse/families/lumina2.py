"""Lumina Image 2.0: text first, then the picture, which starts right after each sample's own caption.

Before the joint layers, refiners attend to the picture alone (`noise_refiner`) and to the text alone (no site).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gensparse.errors import LayoutMismatchError
from gensparse.families.base import Family, Layouts, TensorMemo, needed, sites_of, whole_tokens
from gensparse.families.latents import token_grid, trained_tokens
from gensparse.layout import Layout

if TYPE_CHECKING:
    import torch


def read_layouts(model: Any, bound: Mapping[str, Any], memo: TensorMemo) -> Layouts:
    """Layouts from `hidden_states` [B, C, H, W] and `encoder_attention_mask` [B, T], whose ones count the caption.

    Raises:
        LayoutMismatchError: an argument is missing, the latents are no picture, or the mask is not one row per sample.
    """
    latents, mask = needed("Lumina2", bound, "hidden_states", "encoder_attention_mask")
    grid = token_grid("Lumina2", latents, model.config["patch_size"])
    if mask.ndim != 2 or mask.shape[0] != latents.shape[0]:
        raise LayoutMismatchError(
            f"The Lumina2 call has {latents.shape[0]} pictures, but encoder_attention_mask has shape "
            f"{tuple(mask.shape)}; pass one row of it for every picture."
        )
    own = tuple(Layout.joint(grid, text=length, text_first=True) for length in memo.get(mask, _lengths))
    return {"joint": own[0] if len(set(own)) == 1 else own, "image": Layout.joint(grid)}


def layout_for(height: int, width: int, *, n_text: int, vae_scale: int = 8, patch: int = 2) -> Layout:
    """Layout of a picture of height x width pixels; sizes are cut down to whole patches.

    Args:
        n_text: tokens of the caption itself, without padding; 0 for the attention of the picture alone.
        vae_scale: pixels per latent cell; patch: latent cells per token, both per axis.

    Raises:
        ConfigError: the picture holds no whole token.
    """
    token = vae_scale * patch
    rows, columns = whole_tokens("Lumina2", ("height", height, token), ("width", width, token))
    return Layout.image(rows, columns, text=n_text, text_first=True)


def native_tokens(model: Any, _scheduler_config: Mapping[str, Any] | None = None) -> int:
    """Picture tokens of the training size (`sample_size` of the transformer).

    Args:
        model: a Lumina2 transformer, or a pipeline that has one.

    Raises:
        ConfigError: the config does not say it.
    """
    return trained_tokens("Lumina2", model)


def _lengths(mask: "torch.Tensor") -> tuple[int, ...]:
    return tuple(int(length) for length in mask.sum(dim=1).tolist())


FAMILY = Family(
    name="Lumina2",
    sites=sites_of(joint=r"layers\.\d+\.attn", image=r"noise_refiner\.\d+\.attn"),
    read_layouts=read_layouts,
    layout_for=layout_for,
    native_tokens=native_tokens,
    ascending_time=True,
    blocks=r"(layers|noise_refiner|context_refiner)\.\d+",
)
