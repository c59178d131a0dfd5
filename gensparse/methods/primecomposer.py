"""PrimeComposer: a given object in a given background, its place steered by a second pass (Wang et al. 2403.05053)."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from gensparse.families import CROSS
from gensparse.methods.base import At, Place, Subject
from gensparse.methods.checks import flag, one_of, whole
from gensparse.methods.freecustom import check_share
from gensparse.methods.steps import USUAL_STEPS
from gensparse.methods.subject_method import SubjectMethod

if TYPE_CHECKING:  # methods are listed and described without torch
    from gensparse.methods.subject_run import SubjectRun

COMPOSITE, OBJECT = "composite", "object"


@dataclass(frozen=True)
class PrimeComposer(SubjectMethod):
    """An object is drawn into a background: how it looks at its surroundings, and they at it, comes from a second pass.

    A batch holds per half of guidance the composite (the background with the object pasted in), the object on its own,
    and the pictures that are generated. `Subjects(Concept(name, mask=..., region=..., tokens=...))` says where the
    object is in its own picture, in the middle of which region it is to be, and the places of its words in the prompt,
    which the rest of the picture does not read. In the first steps the tokens of the object get their logits, as keys
    and as queries, from the first two pictures; in the conditional half alone.

    The pipelines for subjects do the rest: both pictures inverted, the start, the object pasted anew in the first steps
    and the background kept around it. Published for Stable Diffusion 2.1 at 512 with 20 steps of DPM-Solver++ and
    guidance 2 to 3, and for UNets alone, since it needs cross-attention.

    Args:
        steer: share of the run in which attention is steered.
        paste: share of the run in which pipelines paste the object, at the noise of the step, into the background.
        keep: share of the run, behind that, in which they keep the background around the object's box.
        order: of the solver, which counts from the shares: all of them end with step share * steps + 1 - order, but the
            first `order` steps are always steered.
        queries: whose queries look at the object: of the composite, our reading of the paper, or of the object's own
            picture, as released; the batch then has no composite.
        confine: whether the words of the object are hidden from the rest of the picture, in all steps.
        same_domain: whether pipelines invert the background with the object in it, for photographs in photographs.
        layers: those that are steered, as numbers in the order of the computation (10-15) or names, joined by +; "auto"
            for all, as published.
        halves: 2 where both halves of guidance come in one batch, 1 where not; none asks the pipeline.

    Raises:
        ConfigError: a setting of the wrong type or range, or (when applied) a model that is no UNet; at the first call:
            no subjects.
    """

    name: ClassVar[str] = "primecomposer"
    families: ClassVar[tuple[str, ...]] = ("UNet",)
    fixed: ClassVar[int | None] = 1
    paper: ClassVar[str] = (
        "PrimeComposer: Faster Progressively Combined Diffusion for Image Composition with Attention Steering (Wang et "
        "al.), arXiv 2403.05053"
    )
    licence: ClassVar[str] = "code for non-commercial academic use, none of it used; no weights"
    use: ClassVar[str] = "a given object in a given background, in its style and light"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "same_domain": {"steer": 0.3, "paste": 0.1, "same_domain": True},
        "painting": {"steer": 0.3},
        "cartoon": {"paste": 0.3},
        "sketch": {"steer": 0.6, "paste": 0.3},
    }

    steer: float = 0.4
    paste: float = 0.2
    keep: float = 0.8
    order: int = 2
    queries: str = COMPOSITE
    confine: bool = True
    same_domain: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steer", "paste", "keep"):
            check_share(self.name, name, getattr(self, name))
        whole(self.name, "order", self.order)
        one_of(self.name, "queries", self.queries, (COMPOSITE, OBJECT))
        flag(self.name, "confine", self.confine)
        flag(self.name, "same_domain", self.same_domain)

    @property
    def beside(self) -> tuple[str, ...]:
        """The pictures of a half before those that are generated."""
        return (COMPOSITE, OBJECT) if self.queries == COMPOSITE else (OBJECT,)

    @property
    def empty(self) -> bool:
        return self.confine

    def part(self, family: str) -> str:
        return "both"

    def kind(self, place: Place) -> Hashable:
        if place.role.startswith(CROSS):
            return "confined" if self.confine else None
        return super().kind(place)

    def ends(self, share: float, steps: int | None) -> int:
        """The step before which what lasts a share of the run ends."""
        return max(0, int(share * (steps or USUAL_STEPS) + 1 - self.order))

    def when(self, at: At) -> str | None:
        if at.step < max(self.order, self.ends(self.steer, at.steps)):
            return None
        return f"{self.name} steers the first steps alone"

    def load(self, subject: Subject, places: Mapping[str, Place]) -> "SubjectRun":
        from gensparse.methods.primecomposer_run import PrimeComposerRun

        return PrimeComposerRun(self, subject, places)
