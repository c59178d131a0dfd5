"""Cosmos-Predict2's sparse layers: a neighborhood of its own for every layer (NVIDIA; NATTEN 2504.16922)."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gensparse.errors import ConfigError
from gensparse.layout import Layout
from gensparse.methods.base import START, At, Dense, Method, Place
from gensparse.methods.checks import one_of
from gensparse.methods.neighborhood import scaled
from gensparse.patterns import Neighborhood, Pattern, Text

BASE = (None, 44, 80)
"""Grid of the settings; time is never cut."""

MENU = {
    "p98": Neighborhood((None, 4, 16), dilation=(1, 11, 5)),
    "p95": Neighborhood((None, 12, 16), (1, 4, 1), (1, 1, 5)),
    "p92": Neighborhood((None, 12, 24), (1, 4, 8)),
    "p77": Neighborhood((None, 20, 40), (1, 4, 8)),
    "p55": Neighborhood((None, 28, 56), (1, 4, 8)),
}
"""Neighborhoods, named by the percentage of pairs that they leave out."""

DENSE = "dense"

LAYERS = {
    "2b": {
        "p98": {0, 1},
        "p95": {2, 5, 10},
        "p92": {3, 4, 6, 7, 8, 9, 27},
        "p77": {*range(11, 23), 24, 25, 26},
        "p55": {23},
    },
    "14b": {
        "p98": {*range(11)},
        "p95": {11, 12},
        "p92": {*range(13, 23)},
        "p77": {23, 25, 29, 30, 33, 35},
        "p55": {24, 26, 28, 31, 32, 34},
        DENSE: {27},
    },
}
"""Variant -> neighborhood -> layers."""


@dataclass(frozen=True)
class CosmosSparse(Method):
    """Every layer has the neighborhood that the sparse Video2World checkpoints of Cosmos-Predict2 were tuned with.

    The first layers see a few far tokens, the middle ones wide windows, and all of them every frame. Settings are those
    of 44 x 80 tokens; other grids scale them by NVIDIA's rule. Pictures (one frame) run dense. Use it with the sparse
    checkpoints: other weights were not tuned for it.

    Args:
        variant: "2b" (28 layers) or "14b" (36 layers, one of them dense).

    Raises:
        ConfigError: another variant, or (when applied) a model with another number of attention layers.
    """

    name: ClassVar[str] = "cosmos_sparse"
    paper: ClassVar[str] = (
        "Cosmos-Predict2 (NVIDIA) with NATTEN: Generalized Neighborhood Attention (Hassani et al.), arXiv 2504.16922"
    )
    licence: ClassVar[str] = "NATTEN MIT; the sparse checkpoints have their own licence by NVIDIA"
    use: ClassVar[str] = "the sparse Video2World checkpoints of Cosmos-Predict2, and no others"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "cosmos-predict2-2b": {"variant": "2b"},
        "cosmos-predict2-14b": {"variant": "14b"},
    }

    variant: str = "2b"

    def __post_init__(self) -> None:
        one_of(self.name, "variant", self.variant, tuple(LAYERS))

    def kind(self, place: Place) -> Hashable:
        kinds = LAYERS[self.variant]
        count = sum(map(len, kinds.values()))
        if place.layers != count:
            raise ConfigError(
                f"cosmos_sparse variant={self.variant!r} is for {count} attention layers, but the model has "
                f"{place.layers}; apply it to the Cosmos-Predict2 of that size, or take neighborhood."
            )
        return next(kind for kind, layers in kinds.items() if place.layer in layers)

    def pattern(self, layout: Layout, at: At = START) -> Pattern | Dense:
        if layout.grid[0] == 1:
            return Dense("cosmos_sparse runs pictures dense")
        if at.kind == DENSE:
            return Dense("a dense layer of cosmos_sparse")
        own = MENU["p77" if at.kind is None else str(at.kind)]
        return (scaled(own, BASE, layout.grid) | Text()).clamped(layout.grid)
