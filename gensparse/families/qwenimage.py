"""QwenImage, its edit and layered models, and its ControlNets: text first, then one picture after the other.

The first picture is the target. What follows it are references: pictures to edit, and in layered models the other
layers, which are denoised with the first one and lie on the same grid, so that windows join them position by position.
Padding stays in the sequence; the model hides it by a mask over keys.
"""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from gensparse.errors import LayoutMismatchError
from gensparse.families.base import Family, Layouts, TensorMemo, needed, sites_of
from gensparse.families.packed import packed_layout_for, scheduled_tokens
from gensparse.layout import Grid, Layout


def read_layouts(_model: Any, bound: Mapping[str, Any], _memo: TensorMemo) -> Layouts:
    """Layout from `hidden_states` [B, N, C], `encoder_hidden_states` [B, T, C] and `img_shapes`.

    `img_shapes` holds for every sample its pictures' (frames, rows, columns); some pipelines pass the only picture of a
    sample without a list around it.

    Raises:
        LayoutMismatchError: an argument is missing, samples differ in their pictures, or the tokens are not those of
            the shapes.
    """
    shapes, picture, text = needed("QwenImage", bound, "img_shapes", "hidden_states", "encoder_hidden_states")
    samples = {_grids(sample) for sample in shapes} if isinstance(shapes, Sequence) else set()
    if len(samples) != 1:
        raise LayoutMismatchError(
            f"QwenImage img_shapes={shapes!r} is not one list of picture shapes for every sample, the same for all; "
            "pass [[(1, rows, columns), ...]] * batch."
        )
    grids = samples.pop()
    tokens = sum(frames * rows * columns for frames, rows, columns in grids)
    if tokens != picture.shape[1]:
        raise LayoutMismatchError(
            f"QwenImage got {picture.shape[1]} picture tokens, but img_shapes describe {tokens}; pass the shapes in "
            "tokens."
        )
    return {"joint": Layout.joint(grids[0], text=text.shape[1], text_first=True, references=grids[1:])}


layout_for = packed_layout_for("QwenImage")
native_tokens = scheduled_tokens("QwenImage")


def _grids(sample: Any) -> tuple[Grid, ...]:
    """Grids of the pictures of one sample; none where it is no list of shapes."""
    if _is_shape(sample):
        return (tuple(map(int, sample)),)
    if isinstance(sample, Sequence) and sample and all(map(_is_shape, sample)):
        return tuple(tuple(map(int, shape)) for shape in sample)
    raise LayoutMismatchError(
        f"QwenImage img_shapes holds {sample!r}, which is no list of picture shapes; pass (1, rows, columns) for every "
        "picture of a sample."
    )


def _is_shape(value: Any) -> bool:
    sizes = value if isinstance(value, Sequence) and len(value) == 3 else ()
    return bool(sizes) and all(isinstance(size, Integral) and int(size) > 0 for size in sizes)


FAMILY = Family(
    name="QwenImage",
    sites=sites_of(joint=r"transformer_blocks\.\d+\.attn"),
    read_layouts=read_layouts,
    layout_for=layout_for,
    native_tokens=native_tokens,
    blocks=r"transformer_blocks\.\d+",
)
