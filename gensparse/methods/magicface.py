"""MagicFace: first all references are seen everywhere, then each by the region of its word (Wang et al. 2408.07433)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from gensparse.methods.base import At, Place, Subject
from gensparse.methods.checks import flag, whole
from gensparse.methods.freecustom import SHARE, check_share, check_weights
from gensparse.methods.subject_method import Steps, SubjectMethod, check_count, check_steps, last_share, up_blocks

if TYPE_CHECKING:  # methods are listed and described without torch
    from gensparse.methods.subject_run import SubjectRun


@dataclass(frozen=True)
class MagicFace(SubjectMethod):
    """Every token sees all masked references at first; later the tokens of a word see the reference of that word alone.

    A batch is that of `freecustom`, whose first stage this is. After every step the picture is segmented by the
    attention of all layers, without a matrix of all pairs: every token belongs to a word of the prompt. `Subjects` says
    which word a reference stands for (`Concept(tokens=...)`, the first counts). Regions that are given
    (`Concept(region=...)`) stand for it instead. Guidance is also made stronger or weaker per pixel, so that all words
    are followed alike.

    Published for Stable Diffusion 2.1 at 512, and for UNets alone, since it needs cross-attention. One run at a time.

    Args:
        subjects: reference pictures of a half; none for as many as `Subjects` names.
        weights: added to the logits of a reference's keys, one value for all or one per reference; published 1.2 to 4.
        inject_step: last step in which every token sees all references, as a number or share of the run.
        damping: factor on the maps of all words but those of references; none for 0.9 with one reference and 0.5 with
            several. Below 0.9 the background belongs to no word.
        rate: whether guidance differs per pixel.
        fresh_noise: new noise for given references at every step, as published; false keeps one.
        seed: of that noise, from 0.
        layers: those that share, as numbers in the order of the computation (10-15) or names (up_blocks.2), joined by
            +; "auto" for the last two up blocks with attention.
        halves: 2 where both halves of guidance come in one batch, 1 where not; none asks the pipeline.

    Raises:
        ConfigError: a setting of the wrong type or range, or (when applied) a model that is no UNet; at the first call:
            no subjects.
    """

    name: ClassVar[str] = "magicface"
    families: ClassVar[tuple[str, ...]] = ("UNet",)
    paper: ClassVar[str] = (
        "MagicFace: Training-free Universal-Style Human Image Customized Synthesis (Wang et al.), arXiv 2408.07433"
    )
    licence: ClassVar[str] = "code without a licence, none of it used; no weights"
    use: ClassVar[str] = "a person with given accessories, each from a reference picture, and each in its own place"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"sd2.1": {"layers": "10-15"}}

    subjects: int | None = None
    weights: float | tuple[float, ...] = 3.0
    inject_step: Steps = 20
    damping: float | None = None
    rate: bool = True
    fresh_noise: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.name, "subjects", self.subjects)
        check_weights(self.name, self.weights, self.subjects)
        check_steps(self.name, "inject_step", self.inject_step)
        if self.damping is not None:
            check_share(self.name, "damping", self.damping)
        flag(self.name, "rate", self.rate)
        flag(self.name, "fresh_noise", self.fresh_noise)
        whole(self.name, "seed", self.seed, low=0)

    def auto_layers(self, subject: Subject, names: list[str]) -> str:
        blocks = up_blocks(names)
        return "+".join(blocks[-2:]) if blocks else last_share(names, SHARE)

    def regional(self, at: At) -> bool:
        """Whether every reference is seen by its region alone."""
        from gensparse.methods.subject_method import step_of

        last = step_of(self.inject_step, at)
        return last is not None and at.step > last

    def load(self, subject: Subject, places: Mapping[str, Place]) -> "SubjectRun":
        from gensparse.methods.magicface_run import MagicFaceRun

        return MagicFaceRun(self, subject, places)
