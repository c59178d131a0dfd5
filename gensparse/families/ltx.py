"""LTX-Video and the video half of LTX-2: self-attention over packed tokens of the clip, text (and sound) apart.

The grid stands in arguments of its own. Where coordinates of the tokens are given they count, as they do for the model;
conditions that stand beside the clip in the sequence, which only coordinates tell, are references.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from gensparse.errors import ConfigError, LayoutMismatchError
from gensparse.families.base import Family, Layouts, TensorMemo, needed, sites_of
from gensparse.families.clips import clip_grid, layout_of_coordinates
from gensparse.layout import Layout


def read_layouts(_model: Any, bound: Mapping[str, Any], memo: TensorMemo) -> Layouts:
    """Layout from `num_frames`, `height` and `width` in tokens, or `video_coords` [B, 3, N] or [B, 3, N, 2].

    Raises:
        LayoutMismatchError: neither is given, coordinates are no clip, or `hidden_states` [B, N, C] have other tokens.
    """
    (tokens,) = needed("LTX", bound, "hidden_states")
    coordinates = bound.get("video_coords")
    if coordinates is None:
        frames, height, width = needed("LTX", bound, "num_frames", "height", "width")
        layout = Layout.joint((int(frames), int(height), int(width)))
    else:
        layout = memo.get(coordinates, partial(layout_of_coordinates, "LTX"))
    if tokens.ndim != 3 or tokens.shape[1] != layout.tokens:
        raise LayoutMismatchError(
            f"LTX got tokens of shape {tuple(tokens.shape)}, but its arguments describe a grid of "
            f"{'x'.join(map(str, layout.grid))} and {layout.tokens} tokens; pass the grid of the packed latents."
        )
    return {"self": layout}


def layout_for(
    height: int, width: int, *, frames: int, n_text: int = 0, vae_scale: int = 32, vae_time: int = 8, patch: int = 1
) -> Layout:
    """Layout of a clip of frames x height x width pixels.

    Args:
        n_text: text tokens, which are not among the tokens of self-attention.
        vae_scale: pixels per latent cell and axis; vae_time: frames per latent frame.
        patch: latent cells per token and axis; a token is one latent frame long.

    Raises:
        ConfigError: no frame, or a frame that holds no whole token.
    """
    return Layout.joint(clip_grid("LTX", frames, height, width, token=vae_scale * patch, vae_time=vae_time))


def native_tokens(model: Any, scheduler_config: Mapping[str, Any] | None = None) -> int:
    """Tokens of the training size: the end of the scheduler's shift by length (`max_image_seq_len`).

    Args:
        model: an LTX pipeline, or its transformer together with `scheduler_config`.

    Raises:
        ConfigError: no scheduler config says it.
    """
    config = scheduler_config or getattr(getattr(model, "scheduler", None), "config", None) or {}
    if "max_image_seq_len" not in config:
        raise ConfigError(
            "The training size of an LTX model stands in its scheduler config (max_image_seq_len), which was not "
            "given; pass the pipeline, or scheduler_config=pipe.scheduler.config."
        )
    return int(config["max_image_seq_len"])


FAMILY = Family(
    name="LTX",
    sites=sites_of(self=r"transformer_blocks\.\d+\.attn1"),
    read_layouts=read_layouts,
    layout_for=layout_for,
    native_tokens=native_tokens,
    blocks=r"transformer_blocks\.\d+",
)
