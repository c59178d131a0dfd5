"""CogView4 and CogView3-Plus: text first, then the picture, in every block."""

from collections.abc import Mapping
from typing import Any

from gensparse.families.base import Family, Layouts, TensorMemo, needed, sites_of, whole_tokens
from gensparse.families.latents import token_grid, trained_tokens
from gensparse.layout import Layout


def read_layouts(model: Any, bound: Mapping[str, Any], _memo: TensorMemo) -> Layouts:
    """Layout from `hidden_states` [B, C, H, W] and `encoder_hidden_states` [B, T, C].

    Raises:
        LayoutMismatchError: latents or text are missing, or the latents are no picture.
    """
    latents, text = needed("CogView", bound, "hidden_states", "encoder_hidden_states")
    grid = token_grid("CogView", latents, model.config["patch_size"])
    return {"joint": Layout.joint(grid, text=text.shape[1])}


def layout_for(height: int, width: int, *, n_text: int, vae_scale: int = 8, patch: int = 2) -> Layout:
    """Layout of a picture of height x width pixels; sizes are cut down to whole patches.

    Args:
        n_text: text tokens. CogView4 pads a prompt to a multiple of 16, CogView3-Plus to `max_sequence_length`.
        vae_scale: pixels per latent cell; patch: latent cells per token, both per axis.

    Raises:
        ConfigError: the picture holds no whole token.
    """
    token = vae_scale * patch
    rows, columns = whole_tokens("CogView", ("height", height, token), ("width", width, token))
    return Layout.image(rows, columns, text=n_text)


def native_tokens(model: Any, _scheduler_config: Mapping[str, Any] | None = None) -> int:
    """Picture tokens of the training size (`sample_size` of the transformer).

    Args:
        model: a CogView transformer, or a pipeline that has one.

    Raises:
        ConfigError: the config does not say it.
    """
    return trained_tokens("CogView", model)


FAMILY = Family(
    name="CogView",
    sites=sites_of(joint=r"transformer_blocks\.\d+\.attn1"),
    read_layouts=read_layouts,
    layout_for=layout_for,
    native_tokens=native_tokens,
    blocks=r"transformer_blocks\.\d+",
)
