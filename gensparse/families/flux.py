"""FLUX.1 and its ControlNets: text first, then the picture, then Kontext's reference pictures, in every block.

What a method does with references is up to it; those with windows share the rule of `gensparse.methods.pictures`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gensparse.errors import LayoutMismatchError
from gensparse.families.base import Family, Layouts, TensorMemo, needed, sites_of
from gensparse.families.packed import packed_layout_for, scheduled_tokens
from gensparse.families.position_ids import raster_grid, runs
from gensparse.layout import Grid, Layout

if TYPE_CHECKING:
    import torch


def read_layouts(model: Any, bound: Mapping[str, Any], memo: TensorMemo) -> Layouts:
    """Every block sees the same sequence; that of a union ControlNet begins with a token for its mode."""
    mode = 1 if getattr(model, "union", False) else 0
    return {"joint": read_layout(bound, memo, leading=mode)}


def read_layout(
    bound: Mapping[str, Any], memo: TensorMemo | None = None, family: str = "FLUX", *, leading: int = 0
) -> Layout:
    """Layout from `hidden_states` [B, N, C], `encoder_hidden_states` [B, T, C] and `img_ids` [N, 3].

    Column 0 of the ids tells the pictures apart (Kontext: 0 target, 1 reference), columns 1 and 2 are row and column.
    `leading` tokens of the model's own stand before the text.

    Raises:
        LayoutMismatchError: ids are missing, of another length than the picture, or not a grid.
    """
    ids, picture, text = needed(family, bound, "img_ids", "hidden_states", "encoder_hidden_states")
    grids = (memo or TensorMemo()).get(ids, grids_of)
    tokens = sum(height * width for _, height, width in grids)
    if tokens != picture.shape[1]:
        raise LayoutMismatchError(
            f"{family} got {picture.shape[1]} picture tokens, but img_ids describe {tokens}; pass one row of ids per "
            "token."
        )
    return Layout.joint(grids[0], text=leading + text.shape[1], text_first=True, references=grids[1:])


layout_for = packed_layout_for("FLUX")
native_tokens = scheduled_tokens("FLUX")


def grids_of(ids: "torch.Tensor") -> tuple[Grid, ...]:
    """(1, H, W) of every picture in position ids [N, C], or [B, N, C] with the same ids for every sample.

    Columns are the number of the picture, row and column, and what more there is.

    Raises:
        LayoutMismatchError: the tokens of a picture are no grid in raster order.
    """
    table = (ids[0] if ids.ndim == 3 else ids).detach().float().cpu().numpy()
    return tuple((1, *raster_grid(table[part, 1], table[part, 2])) for part in runs(table[:, 0]))


FAMILY = Family(
    name="FLUX.1",
    sites=sites_of(joint=r"(single_)?transformer_blocks\.\d+\.attn"),
    read_layouts=read_layouts,
    layout_for=layout_for,
    native_tokens=native_tokens,
)
