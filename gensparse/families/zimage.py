"""Z-Image: the picture first, then text; with references (omni models) text, references, target, then their features.

Every picture and every text is filled up to a multiple of 32 tokens with learned tokens that take part in attention
like any other, so they are registers here, not padding. Samples with captions of different lengths are padded behind
their tokens, and those are hidden by a mask over keys. Before the joint layers, refiners attend to the pictures alone
(`noise_refiner`), to the text alone and to the features alone (no sites).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gensparse.errors import LayoutMismatchError
from gensparse.families.base import Family, Layouts, TensorMemo, needed, sites_of, whole_tokens
from gensparse.families.packed import scheduled_tokens
from gensparse.layout import Grid, Layout, Segment

MULTIPLE = 32
"""Tokens of a picture, a text or its features are filled up to a multiple of this."""

PATCH = {"f_patch_size": 1, "patch_size": 2}
"""Latent cells per token (frames; rows and columns) where the call does not say it."""

Sample = tuple[list[Segment], list[Segment]]
"""Segments of the pictures alone, and of the whole sequence."""


def read_layouts(model: Any, bound: Mapping[str, Any], _memo: TensorMemo) -> Layouts:
    """Layouts from `x`, a picture [C, F, H, W] per sample, and `cap_feats`, a text [T, C] per sample.

    With references both are lists of lists, the target comes last, and `siglip_feats` [H, W, C] may follow.

    Raises:
        LayoutMismatchError: an argument is missing, a sample has no text or no target, or a picture holds no whole
            token.
    """
    pictures, texts = needed("Z-Image", bound, "x", "cap_feats")
    if len(pictures) != len(texts) or not len(pictures):
        raise LayoutMismatchError(
            f"The Z-Image call has {len(pictures)} pictures and {len(texts)} texts; pass one of each for every sample."
        )
    frames, cells = (bound.get(name, default) for name, default in PATCH.items())
    patch = (frames, cells, cells)
    if not isinstance(pictures[0], list):
        return _roles([_plain(*sample, patch) for sample in zip(pictures, texts, strict=True)])
    features = bound.get("siglip_feats") or [None] * len(pictures)
    if features[0] is None or model.config["siglip_feat_dim"] is None:
        features = [None] * len(pictures)
    return _roles([_omni(*sample, patch) for sample in zip(pictures, texts, features, strict=True)])


def layout_for(
    height: int, width: int, *, n_text: int, vae_scale: int = 8, patch: int = 2, multiple: int = MULTIPLE
) -> Layout:
    """Layout of a picture of height x width pixels without references; sizes are cut down to whole patches.

    Args:
        n_text: tokens of the caption itself, without padding; 0 for the attention of the picture alone.
        vae_scale: pixels per latent cell; patch: latent cells per token, both per axis.
        multiple: what the tokens of picture and text are filled up to.

    Raises:
        ConfigError: the picture holds no whole token.
    """
    token = vae_scale * patch
    rows, columns = whole_tokens("Z-Image", ("height", height, token), ("width", width, token))
    return Layout((*_gridded("target", (1, rows, columns), multiple), *_run("text", n_text, multiple)))


native_tokens = scheduled_tokens("Z-Image")


def _roles(samples: Sequence[Sample]) -> Layouts:
    image = tuple(Layout(tuple(pictures)) for pictures, _ in samples)
    joint = tuple(Layout(tuple(sequence)) for _, sequence in samples)
    return {"joint": _one_or_each(joint), "image": _one_or_each(image)}


def _one_or_each(layouts: tuple[Layout, ...]) -> Layout | tuple[Layout, ...]:
    return layouts[0] if len(set(layouts)) == 1 else layouts


def _plain(picture: Any, text: Any, patch: Grid) -> Sample:
    alone = list(_picture(picture, patch))
    return alone, [*alone, *_run("text", len(text))]


def _omni(pictures: Sequence[Any], texts: Sequence[Any], features: Sequence[Any] | None, patch: Grid) -> Sample:
    """One sample with references; a picture or feature that is missing counts as a multiple of registers."""
    if not pictures or pictures[-1] is None:
        raise LayoutMismatchError("A sample of the Z-Image call has no target; pass it as the last of its pictures.")
    last = len(pictures) - 1
    alone = [
        segment
        for number, picture in enumerate(pictures)
        for segment in _picture(picture, patch, "target" if number == last else "reference", f"reference{number}")
    ]
    words = [segment for text in texts for segment in _run("text", len(text))]
    seen = [segment for item in features or () for segment in _features(item)]
    return alone, [*words, *alone, *seen]


def _picture(picture: Any, patch: Grid, kind: str = "target", name: str = "") -> Iterator[Segment]:
    if picture is None:
        yield Segment("register", MULTIPLE)
        return
    if picture.ndim != 4 or any(size < cells for size, cells in zip(picture.shape[1:], patch, strict=True)):
        raise LayoutMismatchError(
            f"A picture of the Z-Image call has shape {tuple(picture.shape)}, which holds no whole token; pass "
            f"(channels, frames, rows, columns) with at least {'x'.join(map(str, patch))} cells."
        )
    frames, rows, columns = (size // cells for size, cells in zip(picture.shape[1:], patch, strict=True))
    yield from _gridded(kind, (frames, rows, columns), name="" if kind == "target" else name)


def _features(item: Any) -> Iterator[Segment]:
    if item is None:
        yield Segment("register", MULTIPLE)
    else:
        yield from _run("register", item.shape[0] * item.shape[1])


def _gridded(kind: str, grid: Grid, multiple: int = MULTIPLE, name: str = "") -> Iterator[Segment]:
    """A picture and the registers that fill it up."""
    tokens = grid[0] * grid[1] * grid[2]
    yield Segment(kind, tokens, grid, name)
    yield from _filling(tokens, multiple)


def _run(kind: str, tokens: int, multiple: int = MULTIPLE) -> Iterator[Segment]:
    """Tokens without a grid and the registers that fill them up."""
    if tokens:
        yield Segment(kind, tokens)
    yield from _filling(tokens, multiple)


def _filling(tokens: int, multiple: int) -> Iterator[Segment]:
    if tokens % multiple:
        yield Segment("register", multiple - tokens % multiple)


FAMILY = Family(
    name="Z-Image",
    sites=sites_of(joint=r"layers\.\d+\.attention", image=r"noise_refiner\.\d+\.attention"),
    read_layouts=read_layouts,
    layout_for=layout_for,
    native_tokens=native_tokens,
    ascending_time=True,
    blocks=r"(layers|noise_refiner|context_refiner|siglip_refiner)\.\d+",
)
