"""StoryDiffusion: every picture also sees a random sample of the other pictures' tokens (Zhou et al. 2405.01434)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from gensparse.errors import ConfigError
from gensparse.methods.base import At, Place, Subject
from gensparse.methods.checks import flag, whole
from gensparse.methods.freecustom import check_share
from gensparse.methods.subject_method import Steps, SubjectMethod, check_steps, outside, up_blocks

if TYPE_CHECKING:  # methods are listed and described without torch
    from gensparse.methods.subject_run import SubjectRun


@dataclass(frozen=True)
class StoryDiffusion(SubjectMethod):
    """Pictures of one batch share a character: each sees itself and a random half of the tokens of all others.

    The pictures of a half are drawn together. Those of a first run can be kept by `handle.writing()`: later pictures,
    one or several at a time, then see them as they were at the same step, and their own tokens. A bank may hold several
    characters, and `handle.use(Subjects(...))` says which of them are in a picture; without a place for each they
    blend (see `isolation_reposition`).

    Published for SDXL at 768 and more pixels; other models are an extension of ours without measurements.

    Args:
        rate: share of a picture's tokens that others see, drawn anew at every step and resolution.
        start: steps that come before, as a number or share of the run, share nothing. Published are 5, and 1 in the
            low-memory version.
        gate, late_gate: probability that a layer shares at all in a step before and from `late` on.
        late: the step, as a number or share of the run.
        read_early: whether pictures that read from a bank see all of its tokens before `start`.
        seed: of samples and gates, from 0.
        layers: those that share, as numbers in the order of the computation (34-69) or names (up_blocks), joined by +;
            "auto" for the up blocks, and all layers of models without.
        halves: 2 where both halves of guidance come in one batch, 1 where not; none asks the pipeline.

    Raises:
        ConfigError: a setting of the wrong type or range, or (when applied) a model of another family.
    """

    name: ClassVar[str] = "storydiffusion"
    paper: ClassVar[str] = (
        "StoryDiffusion: Consistent Self-Attention for Long-Range Image and Video Generation (Zhou et al.), "
        "arXiv 2405.01434"
    )
    licence: ClassVar[str] = "code Apache-2.0, none of it used; no weights"
    use: ClassVar[str] = "the same character in several SDXL pictures, and in pictures that are drawn later"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "sdxl": {"start": 5, "layers": "34-69"},
        "sdxl-low-vram": {"start": 1, "layers": "34-69"},
    }

    rate: float = 0.5
    start: Steps = 5
    gate: float = 0.7
    late_gate: float = 0.9
    late: Steps = 20
    read_early: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rate", "gate", "late_gate"):
            check_share(self.name, name, getattr(self, name))
        for name in ("start", "late"):
            check_steps(self.name, name, getattr(self, name))
            if getattr(self, name) is None:
                raise ConfigError(f"{self.name} {name}=None is not allowed; pass a number or a share of the run.")
        flag(self.name, "read_early", self.read_early)
        whole(self.name, "seed", self.seed, low=0)

    def auto_layers(self, subject: Subject, names: list[str]) -> str:
        return "+".join(up_blocks(names)) or "all"

    def early(self, at: At) -> bool:
        """Whether a step comes before `start`."""
        return outside(self.name, self.start, None, at) is not None

    def gate_at(self, at: At) -> float:
        """Probability that a layer shares."""
        return self.gate if outside(self.name, self.late, None, at) is not None else self.late_gate

    def load(self, subject: Subject, places: Mapping[str, Place]) -> "SubjectRun":
        from gensparse.methods.subject_views import StoryRun

        return StoryRun(self, subject, places)
