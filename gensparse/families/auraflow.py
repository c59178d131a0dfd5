"""AuraFlow: 8 learned register tokens, then text, then the picture, in every block."""

from collections.abc import Mapping
from typing import Any

from gensparse.families.base import Family, Layouts, TensorMemo, needed, sites_of, whole_tokens
from gensparse.families.latents import token_grid, trained_tokens
from gensparse.layout import Grid, Layout, Segment


def read_layouts(model: Any, bound: Mapping[str, Any], _memo: TensorMemo) -> Layouts:
    """Layout from `hidden_states` [B, C, H, W] and `encoder_hidden_states` [B, T, C].

    Raises:
        LayoutMismatchError: latents or text are missing, or the latents are no picture.
    """
    latents, text = needed("AuraFlow", bound, "hidden_states", "encoder_hidden_states")
    grid = token_grid("AuraFlow", latents, model.config["patch_size"])
    return {"joint": _layout(grid, text.shape[1], model.register_tokens.shape[1])}


def layout_for(
    height: int, width: int, *, n_text: int, registers: int = 8, vae_scale: int = 8, patch: int = 2
) -> Layout:
    """Layout of a picture of height x width pixels; sizes are cut down to whole patches.

    Args:
        n_text: text tokens (`max_sequence_length` of the pipeline).
        registers: learned tokens before the text.
        vae_scale: pixels per latent cell; patch: latent cells per token, both per axis.

    Raises:
        ConfigError: the picture holds no whole token.
    """
    token = vae_scale * patch
    rows, columns = whole_tokens("AuraFlow", ("height", height, token), ("width", width, token))
    return _layout((1, rows, columns), n_text, registers)


def native_tokens(model: Any, _scheduler_config: Mapping[str, Any] | None = None) -> int:
    """Picture tokens of the training size (`sample_size` of the transformer).

    Args:
        model: an AuraFlow transformer, or a pipeline that has one.

    Raises:
        ConfigError: the config does not say it.
    """
    return trained_tokens("AuraFlow", model)


def _layout(grid: Grid, text: int, registers: int) -> Layout:
    own = Layout.joint(grid, text=text)
    return Layout((Segment("register", registers), *own.segments))


FAMILY = Family(
    name="AuraFlow",
    sites=sites_of(joint=r"(joint|single)_transformer_blocks\.\d+\.attn"),
    read_layouts=read_layouts,
    layout_for=layout_for,
    native_tokens=native_tokens,
    blocks=r"(joint|single)_transformer_blocks\.\d+",
)
