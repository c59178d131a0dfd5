"""Stable Diffusion 3 and 3.5 and their ControlNets: the picture first, then text.

Some blocks of Stable Diffusion 3.5 medium have a second attention, `attn2`, of the picture alone. Both attentions of
such a block hold the same processor object. The ControlNets of Stable Diffusion 3.5 large have no text at all, and get
the picture as tokens that its transformer embedded.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from gensparse.errors import LayoutMismatchError
from gensparse.families.base import Family, Layouts, TensorMemo, needed, sites_of, whole_tokens
from gensparse.families.latents import token_grid, trained_tokens
from gensparse.layout import Grid, Layout

_ATTN, _ATTN2 = r"transformer_blocks\.\d+\.attn", r"transformer_blocks\.\d+\.attn2"


def sites(model: Any, names: Iterable[str]) -> dict[str, str]:
    """`attn` is joint where the model has text, `attn2` always of the picture alone."""
    if _has_text(model):
        return sites_of(joint=_ATTN, image=_ATTN2)(model, names)
    return sites_of(image=_ATTN)(model, names)


def read_layouts(model: Any, bound: Mapping[str, Any], _memo: TensorMemo) -> Layouts:
    """Layouts from `hidden_states` [B, C, H, W] and `encoder_hidden_states` [B, T, C].

    Of a ControlNet that gets tokens [B, N, C] the grid is that of its condition `controlnet_cond` [B, C, H, W].

    Raises:
        LayoutMismatchError: latents or text are missing, are no picture, or have another grid than the condition.
    """
    (hidden,) = needed("Stable Diffusion 3", bound, "hidden_states")
    embedded = not model.config.get("use_pos_embed", True)
    grid = _grid_of_tokens(model, hidden, bound) if embedded else _grid(model, hidden)
    layouts = {"image": Layout.joint(grid)}
    if _has_text(model):
        (text,) = needed("Stable Diffusion 3", bound, "encoder_hidden_states")
        layouts["joint"] = Layout.joint(grid, text=text.shape[1], text_first=False)
    return layouts


def layout_for(height: int, width: int, *, n_text: int, vae_scale: int = 8, patch: int = 2) -> Layout:
    """Layout of a picture of height x width pixels; sizes are cut down to whole patches.

    Args:
        n_text: text tokens, 77 of CLIP and `max_sequence_length` of T5; 0 for the attention of the picture alone.
        vae_scale: pixels per latent cell; patch: latent cells per token, both per axis.

    Raises:
        ConfigError: the picture holds no whole token.
    """
    token = vae_scale * patch
    rows, columns = whole_tokens("Stable Diffusion 3", ("height", height, token), ("width", width, token))
    return Layout.image(rows, columns, text=n_text, text_first=False)


def native_tokens(model: Any, _scheduler_config: Mapping[str, Any] | None = None) -> int:
    """Picture tokens of the training size (`sample_size` of the transformer).

    Args:
        model: a Stable Diffusion 3 transformer or ControlNet, or a pipeline that has one.

    Raises:
        ConfigError: the config does not say it.
    """
    return trained_tokens("Stable Diffusion 3", model)


def _has_text(model: Any) -> bool:
    return model.config["joint_attention_dim"] is not None


def _grid(model: Any, latents: Any) -> Grid:
    return token_grid("Stable Diffusion 3", latents, model.config["patch_size"])


def _grid_of_tokens(model: Any, hidden: Any, bound: Mapping[str, Any]) -> Grid:
    (condition,) = needed("Stable Diffusion 3 ControlNet", bound, "controlnet_cond")
    grid = _grid(model, condition)
    if hidden.shape[1] != grid[1] * grid[2]:
        raise LayoutMismatchError(
            f"The Stable Diffusion 3 ControlNet got {hidden.shape[1]} picture tokens, but its condition has "
            f"{grid[1]}x{grid[2]}; pass a condition of the size of the picture."
        )
    return grid


FAMILY = Family(
    name="Stable Diffusion 3",
    sites=sites,
    read_layouts=read_layouts,
    layout_for=layout_for,
    native_tokens=native_tokens,
    blocks=r"transformer_blocks\.\d+",
    prompted="image",
)
