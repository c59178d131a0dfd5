"""Chroma: the blocks and tokens of FLUX.1, and a mask over tokens that every block multiplies with itself.

The pipelines' mask is a number per token, 1 or 0, and so is its product, which attention then adds to the logits: pairs
of valid tokens get one more than others, nothing is hidden. A mask of bools hides padding.
"""

from collections.abc import Mapping
from typing import Any

from gensparse.families.base import Family, Layouts, TensorMemo, sites_of
from gensparse.families.flux import read_layout
from gensparse.families.packed import packed_layout_for, scheduled_tokens


def read_layouts(_model: Any, bound: Mapping[str, Any], memo: TensorMemo) -> Layouts:
    """Every block sees the same sequence; see `flux.read_layout`."""
    return {"joint": read_layout(bound, memo, "Chroma")}


layout_for = packed_layout_for("Chroma")
native_tokens = scheduled_tokens("Chroma")

FAMILY = Family(
    name="Chroma",
    sites=sites_of(joint=r"(single_)?transformer_blocks\.\d+\.attn"),
    read_layouts=read_layouts,
    layout_for=layout_for,
    native_tokens=native_tokens,
    product_mask="attention_mask",
)
