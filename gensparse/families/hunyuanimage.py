"""HunyuanImage 2.1 and its refiner: the picture first, then text; what refines the text alone is no site."""

from collections.abc import Mapping
from typing import Any

from gensparse.errors import ConfigError
from gensparse.families.base import Family, Layouts, TensorMemo, needed, sites_of, whole_tokens
from gensparse.families.latents import denoiser_config, token_grid
from gensparse.layout import Layout


def read_layouts(model: Any, bound: Mapping[str, Any], _memo: TensorMemo) -> Layouts:
    """Layout from `hidden_states` [B, C, (F,) H, W] and the texts [B, T, C].

    Text for quoted words, `encoder_hidden_states_2`, is part of the sequence where the model has an embedder for it.
    Padding stays in the sequence too; the model hides it by a mask over keys.

    Raises:
        LayoutMismatchError: latents or text are missing, or the latents are no picture of this model.
    """
    latents, text = needed("HunyuanImage", bound, "hidden_states", "encoder_hidden_states")
    grid = token_grid("HunyuanImage", latents, model.config["patch_size"], axes=(2, 3))
    quoted = bound.get("encoder_hidden_states_2") if model.config["text_embed_2_dim"] is not None else None
    length = text.shape[1] + (0 if quoted is None else quoted.shape[1])
    return {"joint": Layout.joint(grid, text=length, text_first=False)}


def layout_for(height: int, width: int, *, n_text: int, vae_scale: int = 32, patch: int = 1) -> Layout:
    """Layout of a picture of height x width pixels; sizes are cut down to whole patches.

    Args:
        n_text: text tokens; the pipeline pads to 1000, and 128 more for quoted words.
        vae_scale: pixels per latent cell; patch: latent cells per token, both per axis.

    Raises:
        ConfigError: the picture holds no whole token.
    """
    token = vae_scale * patch
    rows, columns = whole_tokens("HunyuanImage", ("height", height, token), ("width", width, token))
    return Layout.image(rows, columns, text=n_text, text_first=False)


def native_tokens(model: Any, _scheduler_config: Mapping[str, Any] | None = None) -> int:
    """Picture tokens of the default size, which only the pipeline knows.

    Args:
        model: a HunyuanImage pipeline.

    Raises:
        ConfigError: a bare transformer, whose config does not say it.
    """
    size = getattr(model, "default_sample_size", None)
    if size is None:
        raise ConfigError("The size of a HunyuanImage model is known to its pipeline only; pass the pipeline.")
    *_, rows, columns = denoiser_config(model)["patch_size"]
    return (size // rows) * (size // columns)


FAMILY = Family(
    name="HunyuanImage",
    sites=sites_of(joint=r"(single_)?transformer_blocks\.\d+\.attn"),
    read_layouts=read_layouts,
    layout_for=layout_for,
    native_tokens=native_tokens,
)
