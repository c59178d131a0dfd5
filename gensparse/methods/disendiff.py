"""DisenDiff: the attention maps that its training losses are made of (2403.18551)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from gensparse.layout import Layout
from gensparse.methods.base import At, Dense, Loaded, Place, Subject
from gensparse.methods.checks import flag, whole
from gensparse.methods.cross_method import CrossLoaded, CrossMethod

if TYPE_CHECKING:
    from torch import Tensor

    from gensparse.processors.stages import Stages


@dataclass(frozen=True)
class DisenDiff(CrossMethod):
    """For training: keeps attention maps of the text with their gradients, so that concepts of one picture come apart.

        handle = gensparse.apply(unet, DisenDiff())
        unet(noisy, timesteps, encoder_hidden_states=text)
        bind, separate = calibration_loss(handle.maps()[:, 0], [(modifier, class_word), ...])

    `gensparse.subjects.calibration` has the losses, samples/train_disendiff.py a whole training of keys, values and the
    embeddings of modifier words. The output is that of the plain model; a concept that was trained is used without this
    method. Stable Diffusion 1.5 as published, any UNet alike.

    Args:
        coarseness: latent cells per token and axis of the layers whose maps are kept: 4, which are 16 x 16 tokens at
            512 pixels, as published.
        hold_first: no gradient through key and value of the first token, as published.
        guided: whether the first half of a batch is the unconditional one; by default the pipeline says it, and a bare
            model has none.

    Raises:
        ConfigError: a setting of another form, or (when applied) a model that is no UNet.
    """

    name: ClassVar[str] = "disendiff"
    paper: ClassVar[str] = (
        "Attention Calibration for Disentangled Text-to-Image Personalization (Zhang et al.), arXiv 2403.18551"
    )
    licence: ClassVar[str] = (
        "code partly under the Adobe Research License (no commercial use), none of it used; no weights"
    )
    use: ClassVar[str] = "training two or more concepts from one picture; for nothing else"

    coarseness: int = 4
    hold_first: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self.name, "coarseness", self.coarseness)
        flag(self.name, "hold_first", self.hold_first)

    def load(self, subject: Subject, places: Mapping[str, Place]) -> Loaded:
        return _Kept(self, subject.owner)


class _Kept(CrossLoaded):
    """The maps of the last call."""

    def __init__(self, method: DisenDiff, owner: Any) -> None:
        from gensparse.processors.stages import MapBook

        super().__init__(method.guided, owner)
        self._method = method
        self._book = MapBook(frozenset(), conditional=bool(method.guided), hold_first=method.hold_first)

    def look(self, at: At, arguments: dict[str, Any]) -> None:
        self._book.maps = []

    def stages(self, layout: Layout, at: At) -> "Stages | Dense":
        from gensparse.processors.stages import MapBook, Stages

        grid = layout.grid[1:]
        if at.coarseness == self._method.coarseness:
            self._book.grids = frozenset({grid})
            return Stages(self.guided(at), grid, book=self._book)
        if not self._method.hold_first:
            return Dense("disendiff keeps no maps of this layer")
        return Stages(self.guided(at), grid, book=MapBook(frozenset(), hold_first=True))

    def maps(self) -> "Tensor":
        return self._book.take()

    def undo(self) -> None:
        super().undo()
        self._book.maps = []
