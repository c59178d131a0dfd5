"""FLUX.1 and its ControlNets: text first, then the picture, then Kontext's reference pictures, in every block."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gensparse.errors import ConfigError, LayoutMismatchError
from gensparse.families.base import Family, Layouts, TensorMemo, needed, sites_of, whole_tokens
from gensparse.families.position_ids import raster_grid, runs
from gensparse.layout import Grid, Layout

if TYPE_CHECKING:
    import torch


def read_layouts(_model: Any, bound: Mapping[str, Any], memo: TensorMemo) -> Layouts:
    """Every block sees the same sequence."""
    return {"joint": read_layout(bound, memo)}


def read_layout(bound: Mapping[str, Any], memo: TensorMemo | None = None) -> Layout:
    """Layout from `hidden_states` [B, N, C], `encoder_hidden_states` [B, T, C] and `img_ids` [N, 3].

    Column 0 of the ids tells the pictures apart (Kontext: 0 target, 1 reference), columns 1 and 2 are row and column.

    Raises:
        LayoutMismatchError: ids are missing, of another length than the picture, or not a grid.
    """
    ids, picture, text = needed("FLUX", bound, "img_ids", "hidden_states", "encoder_hidden_states")
    grids = (memo or TensorMemo()).get(ids, _grids)
    tokens = sum(height * width for _, height, width in grids)
    if tokens != picture.shape[1]:
        raise LayoutMismatchError(
            f"FLUX got {picture.shape[1]} picture tokens, but img_ids describe {tokens}; pass one row of ids per token."
        )
    return Layout.joint(grids[0], text=text.shape[1], text_first=True, references=grids[1:])


def layout_for(height: int, width: int, *, n_text: int, vae_scale: int = 8, patch: int = 2) -> Layout:
    """Layout of a picture of height x width pixels; FLUX cuts sizes down to whole patches.

    Args:
        n_text: text tokens (`max_sequence_length` of the pipeline).
        vae_scale: pixels per latent cell; patch: latent cells per token, both per axis.

    Raises:
        ConfigError: the picture holds no whole token.
    """
    token = vae_scale * patch
    rows, columns = whole_tokens("FLUX", ("height", height, token), ("width", width, token))
    return Layout.image(rows, columns, text=n_text, text_first=True)


def native_tokens(model: Any, scheduler_config: Mapping[str, Any] | None = None) -> int:
    """Picture tokens of the training size: the end of the scheduler's resolution shift (`max_image_seq_len`).

    Args:
        model: a FLUX pipeline, or its transformer together with `scheduler_config`.

    Raises:
        ConfigError: no scheduler config says it.
    """
    config = scheduler_config or getattr(getattr(model, "scheduler", None), "config", None) or {}
    if "max_image_seq_len" not in config:
        raise ConfigError(
            "The training size of a FLUX model stands in its scheduler config (max_image_seq_len), which was not "
            "given; pass the pipeline, or scheduler_config=pipe.scheduler.config."
        )
    return int(config["max_image_seq_len"])


def _grids(ids: "torch.Tensor") -> tuple[Grid, ...]:
    """(1, H, W) of every picture in `img_ids` [N, 3], or [1, N, 3] as older callers pass them."""
    table = (ids[0] if ids.ndim == 3 else ids).detach().float().cpu().numpy()
    return tuple((1, *raster_grid(table[part, 1], table[part, 2])) for part in runs(table[:, 0]))


FAMILY = Family(
    name="FLUX.1",
    sites=sites_of(joint=r"(single_)?transformer_blocks\.\d+\.attn"),
    read_layouts=read_layouts,
    layout_for=layout_for,
    native_tokens=native_tokens,
)
