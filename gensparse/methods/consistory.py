"""ConsiStory: pictures of one batch share the keys of their common subject (Tewel et al. 2402.03286)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from gensparse.errors import ConfigError
from gensparse.methods.base import At, Place, Subject
from gensparse.methods.checks import whole
from gensparse.methods.freecustom import check_share
from gensparse.methods.steps import USUAL_STEPS
from gensparse.methods.subject_method import SubjectMethod, up_blocks

if TYPE_CHECKING:  # methods are listed and described without torch
    from gensparse.methods.subject_run import SubjectRun


@dataclass(frozen=True)
class ConsiStory(SubjectMethod):
    """Every picture sees the subject's tokens of the first pictures, the anchors, and so draws the same subject.

    Where the subject is, the cross-attention of its words tells: `Subjects(Concept("dog", tokens=...))`, the places of
    its words in the prompts. Masks are made anew after every step, from the last steps. In the first steps the queries
    of a plain call, which is made for that, are mixed in, so that pictures keep layouts of their own. After a first run
    inside `handle.rehearsal()`, a second one from the same noise also aligns details: tokens of the subject take from
    the most similar ones of the other pictures. `handle.writing()` keeps the anchors for pictures that are drawn later.

    Published for SDXL at 1024, and for UNets alone, since it needs cross-attention. Subjects hold for all pictures at
    once; one run at a time.

    Args:
        anchors: pictures that all others see, the first of a half.
        dropout: share of the mask's tokens that are not seen, drawn anew for every step, picture and resolution.
        window: steps whose maps make a mask.
        blend, blend_end: share of the plain queries in the first and in the last step of a run; between them it falls
            evenly.
        blend_steps: share of the run in which queries are mixed.
        inject: share of what tokens take from similar ones; 0 turns it off.
        inject_from, inject_to: shares of the run between which they take.
        feature_time: timestep at which features are noted, the nearest one of the run.
        seed: of the dropout, from 0.
        layers: those that share, as numbers in the order of the computation (34-69) or names (up_blocks), joined by +;
            "auto" for the up blocks.
        halves: 2 where both halves of guidance come in one batch, 1 where not; none asks the pipeline.

    Raises:
        ConfigError: a setting of the wrong type or range, or (when applied) a model that is no UNet; at the first call:
            no subject with words.
    """

    name: ClassVar[str] = "consistory"
    families: ClassVar[tuple[str, ...]] = ("UNet",)
    paper: ClassVar[str] = "Training-Free Consistent Text-to-Image Generation (Tewel et al.), arXiv 2402.03286"
    licence: ClassVar[str] = "code under NVIDIA's non-commercial licence, none of it used; no weights"
    use: ClassVar[str] = "the same subject in several SDXL pictures, with poses and layouts of their own"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"sdxl": {"layers": "34-69"}}

    anchors: int = 2
    dropout: float = 0.5
    window: int = 20
    blend: float = 0.9
    blend_end: float = 0.1
    blend_steps: float = 0.1
    inject: float = 0.8
    inject_from: float = 0.1
    inject_to: float = 1 / 3
    feature_time: int = 261
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self.name, "anchors", self.anchors)
        whole(self.name, "window", self.window)
        for name in ("dropout", "blend", "blend_end", "blend_steps", "inject", "inject_from", "inject_to"):
            check_share(self.name, name, getattr(self, name))
        whole(self.name, "feature_time", self.feature_time, low=0)
        whole(self.name, "seed", self.seed, low=0)

    def auto_layers(self, subject: Subject, names: list[str]) -> str:
        blocks = up_blocks(names)
        if not blocks:
            raise ConfigError(f"{self.name} shares in up blocks with attention, and this UNet has none; pass layers.")
        return "+".join(blocks)

    def share_of_plain(self, at: At) -> float:
        """How much of the queries is that of a plain call; 0 where none is made."""
        steps = at.steps or USUAL_STEPS
        if at.step == 0 or at.step > int(self.blend_steps * steps):
            return 0.0
        return self.blend + (self.blend_end - self.blend) * at.step / max(1, steps - 1)

    def injects(self, at: At) -> bool:
        """Whether tokens take from similar ones in a step."""
        steps = at.steps or USUAL_STEPS
        return self.inject > 0 and int(self.inject_from * steps) <= at.step <= int(self.inject_to * steps + 1e-9)

    def load(self, subject: Subject, places: Mapping[str, Place]) -> "SubjectRun":
        from gensparse.methods.consistory_run import ConsiStoryRun

        return ConsiStoryRun(self, subject, places)
