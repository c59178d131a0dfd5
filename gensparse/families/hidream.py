"""HiDream: the picture first, then text, in every block.

Pictures that are not square are padded to the model's largest number of tokens. The model zeroes the keys of padding
instead of hiding them, so that padding takes part in attention like other tokens. It counts as registers here, which
everybody sees and which see everything: a window over the whole picture gives the dense output.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

from gensparse.errors import ConfigError, LayoutMismatchError
from gensparse.families.base import Family, Layouts, TensorMemo, needed, sites_of, whole_tokens
from gensparse.families.latents import token_grid, trained_tokens
from gensparse.layout import Grid, Layout, Segment


def read_layouts(model: Any, bound: Mapping[str, Any], memo: TensorMemo) -> Layouts:
    """Layout from latents `hidden_states` [B, C, H, W], or from tokens [B, N, C] with `img_sizes` [B, 2].

    Text is `encoder_hidden_states_t5` [B, T, C] and twice `encoder_hidden_states_llama3` [layers, B, L, C], whose last
    layer and own layer every block sees.

    Raises:
        LayoutMismatchError: an argument is missing, latents are no picture, or a picture has more tokens than there
            are places for it.
    """
    picture, t5, llama = needed(
        "HiDream", bound, "hidden_states", "encoder_hidden_states_t5", "encoder_hidden_states_llama3"
    )
    text = t5.shape[1] + 2 * llama.shape[2]
    if bound.get("hidden_states_masks") is not None:
        (sizes,) = needed("HiDream", bound, "img_sizes")
        grids = memo.get(sizes, _grids) if hasattr(sizes, "tolist") else _grids(sizes)
        layouts = tuple(_layout(grid, picture.shape[1], text) for grid in grids)
        return {"joint": layouts if len(set(layouts)) > 1 else layouts[0]}
    grid = token_grid("HiDream", picture, model.config["patch_size"])
    square = picture.shape[-2] == picture.shape[-1]
    return {"joint": _layout(grid, prod(grid) if square else model.max_seq, text)}


def layout_for(
    height: int, width: int, *, n_text: int, max_tokens: int = 4096, vae_scale: int = 8, patch: int = 2
) -> Layout:
    """Layout of a picture of height x width pixels; sizes are cut down to whole patches.

    Args:
        n_text: text tokens; three times `max_sequence_length` of the pipeline.
        max_tokens: picture tokens that the model pads to, unless the picture is square.
        vae_scale: pixels per latent cell; patch: latent cells per token, both per axis.

    Raises:
        ConfigError: the picture holds no whole token, or is not square and has more than max_tokens.
    """
    token = vae_scale * patch
    rows, columns = whole_tokens("HiDream", ("height", height, token), ("width", width, token))
    square = height // vae_scale == width // vae_scale
    if not square and rows * columns > max_tokens:
        raise ConfigError(
            f"HiDream height={height}, width={width} is {rows}x{columns} tokens, but only square pictures may have "
            f"more than {max_tokens}; pass equal sides or a smaller size."
        )
    return _layout((1, rows, columns), rows * columns if square else max_tokens, n_text)


def native_tokens(model: Any, _scheduler_config: Mapping[str, Any] | None = None) -> int:
    """Picture tokens of the training size (`max_resolution` of the transformer).

    Args:
        model: a HiDream transformer, or a pipeline that has one.

    Raises:
        ConfigError: the config does not say it.
    """
    return trained_tokens("HiDream", model, setting="max_resolution")


def _layout(grid: Grid, places: int, text: int) -> Layout:
    own = Layout.joint(grid, text=text, text_first=False)
    padding = places - prod(grid)
    if padding < 0:
        raise LayoutMismatchError(
            f"A HiDream picture of {grid[1]}x{grid[2]} tokens has more than the {places} places for it; pass a square "
            "picture or a smaller one."
        )
    picture, *words = own.segments
    return Layout((picture, *([Segment("register", padding, name="padding")] if padding else []), *words))


def _grids(sizes: Any) -> list[Grid]:
    rows = sizes.tolist() if hasattr(sizes, "tolist") else sizes
    return [(1, int(height), int(width)) for height, width in rows]


FAMILY = Family(
    name="HiDream",
    sites=sites_of(joint=r"(double|single)_stream_blocks\.\d+\.block\.attn1"),
    read_layouts=read_layouts,
    layout_for=layout_for,
    native_tokens=native_tokens,
    blocks=r"(double|single)_stream_blocks\.\d+",
)
