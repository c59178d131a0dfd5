"""BiFormer: tokens see the regions that suit theirs best, chosen at run time (Zhu et al. 2303.08810)."""

from dataclasses import dataclass
from typing import ClassVar

from gensparse.layout import Layout
from gensparse.methods.base import START, At, Method
from gensparse.patterns import RoutedPattern, TopRegions


@dataclass(frozen=True)
class BiFormer(Method):
    """Picture tokens see text and all tokens of the best regions, their own among them; text sees everything.

    Regions are ranked by the product of their mean query and mean key, at every call. The defaults are the module's;
    its trained depth-wise branch is not part of it. The own region and the text are forced in, which a pretrained model
    needs and the paper does not have.

    Args:
        regions: regions per axis, one value (every axis longer than one token) or (H, W) or (F, H, W).
        top: regions that a region sees, the own one included.
        own: always see the own region, as one of `top`; false is the paper's choice.
        per_head: every head chooses for itself, instead of all together as in the paper.

    Raises:
        ConfigError: a setting of the wrong type or range.
    """

    name: ClassVar[str] = "biformer"
    paper: ClassVar[str] = (
        'Zhu et al.: "BiFormer: Vision Transformer with Bi-Level Routing Attention", arXiv 2303.08810, CVPR 2023'
    )
    licence: ClassVar[str] = "code MIT; no weights are used"
    use: ClassVar[str] = "Experiments with keys that are chosen at run time, where a fixed window misses what matters."

    regions: int | tuple[int, ...] = 7
    top: int = 4
    own: bool = True
    per_head: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "regions", self._regions().regions)

    def pattern(self, layout: Layout, at: At = START) -> RoutedPattern:
        return self._regions().clamped(layout.grid)

    def _regions(self) -> TopRegions:
        return TopRegions(self.regions, self.top, own=self.own, per_head=self.per_head)
