"""References: keys of other pictures that the target also sees, each with a bias, a key mask and a query mask.

The primitive behind FreeCustom 2405.13870, MagicFace 2408.07433, IR-Diffusion 2411.19261, ConsiStory 2402.03286,
StoryDiffusion 2405.01434, StyleAligned 2312.02133 and MasaCtrl 2304.08465.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, prod

import numpy as np

from gensparse.errors import ConfigError
from gensparse.layout import Grid, Layout, Segment
from gensparse.patterns.arrays import token_mask
from gensparse.patterns.base import NO_DATA, Data, Pattern, Rule, Source
from gensparse.patterns.checks import whole_number
from gensparse.patterns.segments import segment_numbers, select, select_one
from gensparse.patterns.shared import Share, SharedRule


@dataclass(frozen=True)
class Reference:
    """One run of reference keys.

    With a grid or a length it is a key source: the caller passes its tensors, `sources={name: (k, v)}`. With neither it
    is the segment of that name in the layout. The same name may stand twice, with other masks.

    Args:
        name: of the source, or of the segment.
        grid: (H, W) or (F, H, W) of a source.
        length: tokens of a source without a grid.
        bias: added to the logits of a source's keys (natural units; exp(bias) multiplies their weight).
        keys: array of the data, 1 for every key that is kept; "" keeps all.
        queries: array of the data, 1 for every query that sees the reference; "" for all.

    Raises:
        ConfigError: an empty name, both grid and length, sizes below 1, or a bias that is not finite or has no source
            (a segment's keys are also seen by others; use `key_bias` there, or a source).
    """

    name: str
    grid: tuple[int, ...] | None = None
    length: int | None = None
    bias: float = 0.0
    keys: str = ""
    queries: str = ""

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and self.name):
            raise ConfigError(f"Reference name={self.name!r} is not allowed; pass a name.")
        for field in ("keys", "queries"):
            if not isinstance(getattr(self, field), str):
                raise ConfigError(
                    f"Reference {field}={getattr(self, field)!r} is not allowed; pass the name of an array in data."
                )
        if self.grid is not None and self.length is not None:
            raise ConfigError(f"Reference {self.name!r} has grid={self.grid!r} and length={self.length!r}; pass one.")
        if self.grid is not None:
            object.__setattr__(self, "grid", _grid(self.grid))
        if self.length is not None:
            object.__setattr__(self, "length", whole_number("Reference length", self.length, unit="tokens"))
        number = isinstance(self.bias, int | float | np.number) and not isinstance(self.bias, bool | np.bool_)
        if not number or not isfinite(self.bias):
            raise ConfigError(f"Reference bias={self.bias!r} is not allowed; pass a finite number; `keys` hides.")
        object.__setattr__(self, "bias", float(self.bias))
        if self.bias and not self.external:
            raise ConfigError(
                f"Reference {self.name!r} has bias={self.bias!r} but is a segment of the layout, whose keys others see "
                "too; pass its grid or length to make it a source, or key_bias to the attention call."
            )

    @property
    def external(self) -> bool:
        """Whether the keys come from the caller rather than from a segment of the layout."""
        return self.grid is not None or self.length is not None

    @property
    def source(self) -> Source:
        """The key source of an external reference."""
        length = prod(self.grid) if self.grid is not None else self.length
        return Source(Segment("reference", length, self.grid, self.name), bias=self.bias)


@dataclass(frozen=True)
class References(Pattern):
    """Queries see references, and nothing else: `own | References((Reference("cat", grid=(64, 64), bias=3.0),))`.

    What the queries see of themselves, and what references that are segments see, is said by other patterns:
    `Policy((("target", "target"), ("reference", "itself")))`.

    Args:
        references: the references, at least one.
        queries: kind or name of the segments whose queries see them; with query masks it must be one segment.

    Raises:
        ConfigError: no references, sources of one name that differ in size or bias, or (when bound) an unknown segment
            or mask.
    """

    references: tuple[Reference, ...]
    queries: str = "target"

    def __post_init__(self) -> None:
        given = self.references
        items = (given,) if isinstance(given, Reference) else tuple(given) if isinstance(given, list | tuple) else ()
        if not items or not all(isinstance(item, Reference) for item in items):
            raise ConfigError(f"References references={given!r} is not allowed; pass one or more Reference in a tuple.")
        object.__setattr__(self, "references", items)
        if not (isinstance(self.queries, str) and self.queries):
            raise ConfigError(f"References queries={self.queries!r} is not allowed; pass the kind or name of segments.")
        sizes: dict[str, tuple] = {}
        for item in items:
            size = (item.grid, item.length, item.bias)
            if sizes.setdefault(item.name, size) != size:
                raise ConfigError(
                    f"References name {item.name!r} twice, as (grid, length, bias) {sizes[item.name]} and {size}; give "
                    "them different names, or only different masks."
                )

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        sources = tuple(dict.fromkeys(item.source for item in self.references if item.external))
        segments = (*layout.segments, *(source.segment for source in sources))
        rows = select(f"References queries={self.queries!r}", layout.segments, self.queries)
        number = segment_numbers(segments)
        seeing = np.isin(number[: layout.tokens], rows)
        shares = []
        for item in self.references:
            what = f"Reference {item.name!r}"
            column = _column(what, item, layout, segments)
            keys, queries = number == column, seeing.copy()
            if item.keys:
                keys[keys] = token_mask(f"{what} keys", item.keys, data, segments[column])
            if item.queries:
                row = select_one(f"{what} queries={item.queries!r}", layout.segments, self.queries)
                queries[queries] = token_mask(f"{what} queries", item.queries, data, layout.segments[row])
            shares.append(Share(queries, keys))
        return SharedRule(layout, shares, sources)


def _column(what: str, item: Reference, layout: Layout, segments: Sequence[Segment]) -> int:
    """Number of the key segment of a reference."""
    if not item.external:
        return select_one(what, layout.segments, item.name)
    own = len(layout.segments)
    return own + [segment.name for segment in segments[own:]].index(item.name)


def _grid(value: object) -> Grid:
    if not isinstance(value, list | tuple) or len(value) not in (2, 3):
        raise ConfigError(f"Reference grid={value!r} is not allowed; pass (rows, columns) or (frames, rows, columns).")
    sizes = [whole_number("Reference grid", size, unit="tokens") for size in value]
    frames, rows, columns = [1] * (3 - len(sizes)) + sizes
    return frames, rows, columns
