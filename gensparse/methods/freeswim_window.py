"""FreeSwim's window: all frames, and rows and columns that keep their number at borders (Wu et al. 2511.14712)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gensparse.layout import Layout
from gensparse.methods.base import START, At, Method
from gensparse.methods.checks import whole
from gensparse.methods.pictures import over_pictures
from gensparse.patterns import InwardWindow, Pattern


@dataclass(frozen=True)
class FreeSwimWindow(Method):
    """Every frame, and in each a window of 2 half + 1 rows and columns moved inward at borders; text sees everything.

    The window has the size of the picture the model was trained on, wherever the query stands. This is the window
    branch of FreeSwim with its softmax scale; its second, dense branch that overrides cross attention is not part.

    References of the target's grid are seen through the same window, others wholly (see `methods.pictures`).

    Args:
        half: rows and columns on each side, one value or (H, W), in tokens: the training grid // 2.
        n0: tokens per frame at the training size: logits are raised by sqrt(ln(2 n0) / ln(n0)). None keeps the model's
            own scale. The authors' code has 1560 (480 x 832 pixels of Wan) for every model.

    Raises:
        ConfigError: half is not one or two integers of at least 0, or n0 is not an integer of at least 2.
    """

    name: ClassVar[str] = "freeswim_window"
    paper: ClassVar[str] = "FreeSwim: training-free high-resolution video (Wu, Song, Tan, He, Liu), arXiv 2511.14712"
    licence: ClassVar[str] = "code without a licence; no weights"
    use: ClassVar[str] = "Wan videos above the size of training, without training"
    edits: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "wan2.1-t2v-1.3b": {"half": (15, 26), "n0": 1560},
        "wan2.1-t2v-14b": {"half": (22, 40), "n0": 1560},
    }

    half: int | tuple[int, ...] = (15, 26)
    n0: int | None = 1560

    def __post_init__(self) -> None:
        object.__setattr__(self, "half", InwardWindow(self.half).half)
        if self.n0 is not None:
            whole(self.name, "n0", self.n0, low=2)

    def pattern(self, layout: Layout, at: At = START) -> Pattern:
        return over_pictures(InwardWindow(self.half), layout)

    def logit_gain(self, layout: Layout, native_tokens: int | None) -> float:
        return 1.0 if self.n0 is None else math.sqrt(math.log(2 * self.n0) / math.log(self.n0))
