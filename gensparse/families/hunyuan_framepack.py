"""FramePack on HunyuanVideo: history at two coarser scales, clean frames, the section being made, then image and text.

History and clean frames are references: they stand in the same sequence, on grids of their own.
"""

from collections.abc import Mapping
from math import ceil, prod
from typing import TYPE_CHECKING, Any

from gensparse.errors import LayoutMismatchError
from gensparse.families import hunyuan_video
from gensparse.families.base import Family, Layouts, TensorMemo, needed
from gensparse.families.clips import clip_grid, untold_size
from gensparse.families.latents import token_grid
from gensparse.layout import Grid, Layout, Segment

if TYPE_CHECKING:
    import torch

_NAME = "HunyuanVideo FramePack"

_HISTORY = (("4x", (4, 8, 8)), ("2x", (2, 4, 4)))
"""Scales of the history in the order of the sequence, and the latent cells of their tokens, padded up."""


def read_layouts(model: Any, bound: Mapping[str, Any], memo: TensorMemo) -> Layouts:
    """Layout from the latents of the section and of its history, the image and the text.

    A single sample has its text cut to the valid tokens; in a batch a key mask hides padding.

    Raises:
        LayoutMismatchError: latents, image, text or its mask are missing, or latents are no clip.
    """
    latents, image, text, mask = needed(
        _NAME, bound, "hidden_states", "image_embeds", "encoder_hidden_states", "encoder_attention_mask"
    )
    target = token_grid(_NAME, latents, hunyuan_video.patches(model), axes=(3,))
    words = image.shape[1] + (memo.get(mask, _valid) if latents.shape[0] == 1 else text.shape[1])
    return {"joint": _layout(target, _references(bound), words)}


def layout_for(
    height: int,
    width: int,
    *,
    frames: int = 33,
    n_text: int,
    history: tuple[int, int, int] = (16, 2, 2),
    vae_scale: int = 8,
    vae_time: int = 4,
    patch: int = 2,
) -> Layout:
    """Layout of one section of frames x height x width pixels.

    Args:
        frames: of a section; n_text: image and text tokens.
        history: latent frames of the history at 4 times and 2 times coarser scale, and of the clean frames.
        vae_scale: pixels per latent cell and axis; vae_time: frames per latent frame.
        patch: latent cells per token and axis; a token is one latent frame long.

    Raises:
        ConfigError: no frame, or a frame that holds no whole token.
    """
    target = clip_grid(_NAME, frames, height, width, token=vae_scale * patch, vae_time=vae_time)
    rows, columns = height // vae_scale, width // vae_scale
    grids = [_padded((count, rows, columns), cells) for count, (_, cells) in zip(history, _HISTORY, strict=False)]
    clean = (history[2], *target[1:])
    named = [*((name, grid) for (name, _), grid in zip(_HISTORY, grids, strict=True)), ("clean", clean)]
    return _layout(target, [(name, grid) for name, grid in named if grid[0]], n_text)


def _layout(target: Grid, references: list[tuple[str, Grid]], words: int) -> Layout:
    named = [Segment("reference", prod(grid), grid, name) for name, grid in references]
    return Layout((*named, *Layout.joint(target, text=words, text_first=False).segments))


def _references(bound: Mapping[str, Any]) -> list[tuple[str, Grid]]:
    """Grids of what stands before the section; the model leaves out what has no frame numbers."""
    found = []
    for scale, cells in _HISTORY:
        latents = bound.get(f"latents_history_{scale}")
        if latents is not None and bound.get(f"indices_latents_history_{scale}") is not None:
            found.append((scale, _padded(_cells(latents), cells)))
    clean = bound.get("latents_clean")
    if clean is not None and bound.get("indices_latents_clean") is not None:
        found.append(("clean", token_grid(_NAME, clean, (1, 2, 2), axes=(3,))))
    return found


def _cells(latents: "torch.Tensor") -> Grid:
    if latents.ndim != 5:
        raise LayoutMismatchError(
            f"The {_NAME} call has history latents of shape {tuple(latents.shape)}; pass [batch, channels, frames, "
            "rows, columns]."
        )
    frames, rows, columns = latents.shape[2:]
    return frames, rows, columns


def _padded(cells: Grid, token: Grid) -> Grid:
    frames, rows, columns = (ceil(size / one) for size, one in zip(cells, token, strict=True))
    return frames, rows, columns


def _valid(mask: "torch.Tensor") -> int:
    return int(mask[0].sum())


FAMILY = Family(
    name=_NAME,
    sites=hunyuan_video.FAMILY.sites,
    read_layouts=read_layouts,
    layout_for=layout_for,
    native_tokens=untold_size(_NAME),
)
