"""FLUX.2: text, target, then references; with a cache of their keys and values, references come before the target.

Models with such a cache (Klein KV) let references see only themselves. The first call computes them ("extract"), the
others ("cached") find them among the keys alone. Sites compute the attention of text and target, whose keys hold more
than their queries in both cases, and everybody sees all references; what references see of themselves stays as it is.
"""

from collections.abc import Mapping
from typing import Any

from gensparse.errors import LayoutMismatchError
from gensparse.families.base import Family, Layouts, TensorMemo, WithKeys, needed, sites_of
from gensparse.families.flux import grids_of
from gensparse.families.packed import packed_layout_for, scheduled_tokens
from gensparse.layout import Layout


def read_layouts(_model: Any, bound: Mapping[str, Any], memo: TensorMemo) -> Layouts:
    """Layout from `hidden_states` [B, N, C], `encoder_hidden_states` [B, T, C] and `img_ids` [B, N, 4].

    Columns of the ids are the picture (0 target; 10, 20, ... references), row, column and place in the text.

    Raises:
        LayoutMismatchError: ids are missing, of another length than the pictures, or no grids.
    """
    ids, pictures, text = needed("FLUX.2", bound, "img_ids", "hidden_states", "encoder_hidden_states")
    grids = memo.get(ids, grids_of)
    lengths = [height * width for _, height, width in grids]
    if sum(lengths) != pictures.shape[1]:
        raise LayoutMismatchError(
            f"FLUX.2 got {pictures.shape[1]} picture tokens, but img_ids describe {sum(lengths)}; pass one row of ids "
            "per token."
        )
    words = text.shape[1]
    cached = _cached_tokens(bound)
    if not cached:
        return {"joint": Layout.joint(grids[0], text=words, text_first=True, references=grids[1:])}
    if bound["kv_cache_mode"] == "extract" and sum(lengths[:-1]) != cached:
        raise LayoutMismatchError(
            f"FLUX.2 got num_ref_tokens={cached}, but the pictures before the last one have {sum(lengths[:-1])} "
            "tokens; pass the references first and the target last."
        )
    return {"joint": WithKeys(Layout.joint(grids[-1], text=words, text_first=True), start=words, keys=cached)}


def _cached_tokens(bound: Mapping[str, Any]) -> int:
    """Reference tokens that are among the keys only."""
    mode, cache = bound.get("kv_cache_mode"), bound.get("kv_cache")
    if mode == "extract":
        return bound.get("num_ref_tokens", 0)
    return cache.num_ref_tokens if mode == "cached" and cache is not None else 0


layout_for = packed_layout_for("FLUX.2")
native_tokens = scheduled_tokens("FLUX.2")

FAMILY = Family(
    name="FLUX.2",
    sites=sites_of(joint=r"(single_)?transformer_blocks\.\d+\.attn"),
    read_layouts=read_layouts,
    layout_for=layout_for,
    native_tokens=native_tokens,
)
