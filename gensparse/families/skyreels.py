"""SkyReels V2: Wan's sequence; models with causal blocks of frames mask attention themselves.

Sparse calls keep to those blocks without the mask of token pairs that the model makes at every call. In diffusion
forcing every frame has a timestep of its own, and the step of a call is that of its noisiest frame.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gensparse.errors import LayoutMismatchError
from gensparse.families import wan
from gensparse.families.base import Layouts, TensorMemo
from gensparse.families.clips import untold_size
from gensparse.layout import Layout
from gensparse.patterns import Blocks, Neighborhood, Pattern


def read_layouts(model: Any, bound: Mapping[str, Any], memo: TensorMemo) -> Layouts:
    """Layout as that of Wan.

    Raises:
        LayoutMismatchError: latents are missing or no clip, or its frames are no whole number of causal blocks.
    """
    layouts = wan.read_layouts(model, bound, memo)
    (layout,) = layouts.values()
    assert isinstance(layout, Layout)
    frames, block = layout.grid[0], _block(model)
    if frames % block:
        raise LayoutMismatchError(
            f"SkyReels V2 attends in blocks of {block} frames, but the clip has {frames} latent frames; pass frames "
            "that the block divides."
        )
    return layouts


def own_mask(model: Any, _layout: Layout) -> Pattern | None:
    """Frames see their own block of frames and all earlier ones, where the model has blocks."""
    block = _block(model)
    if block == 1:
        return None
    earlier = Neighborhood((None, None, None), causal=(True, False, False))
    return earlier | Blocks((block, None, None))


def _block(model: Any) -> int:
    return max(1, int(model.config["num_frame_per_block"]))


FAMILY = replace(
    wan.FAMILY,
    name="SkyReels V2",
    read_layouts=read_layouts,
    native_tokens=untold_size("SkyReels V2"),
    own_mask=own_mask,
)
