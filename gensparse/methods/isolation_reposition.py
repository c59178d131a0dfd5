"""IR-Diffusion: subjects of a picture do not see each other; references are moved onto their places (2411.19261)."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING, Any, ClassVar, Self

from gensparse.errors import ConfigError
from gensparse.methods.base import At, Place, Subject
from gensparse.methods.checks import flag, whole
from gensparse.methods.freecustom import check_share
from gensparse.methods.subject_method import Steps, SubjectMethod, check_steps, outside, takes, up_blocks

if TYPE_CHECKING:  # methods are listed and described without torch
    from gensparse.methods.subject_run import SubjectRun

PUBLISHED = {"dropout": 0.5, "unconditional": True}
OURS = {"FLUX.1": {"dropout": 0.0, "unconditional": False}}
"""Of families for which nothing was published, by `gensparse bench subjects`."""


@dataclass(frozen=True)
class IsolationReposition(SubjectMethod):
    """Several subjects in one picture, each from its own portrait, kept apart and in their places.

    A batch holds one portrait per subject first, then the scene, usually all from one noise. `Subjects` says for each
    where it is in its portrait (`mask`) and where it is to be in the scene (`region`). In the scene, tokens of
    different subjects do not see each other (isolation). In the sharing layers the portrait's subject is cut out,
    resized onto the box of its region, and seen by the tokens of that region (reposition). And tokens of a region look
    for the most part at the portrait's prompt instead of the scene's (mutual cross-attention, UNets and PixArt).

    Regions that overlap are made disjoint: the later subject wins. Pipelines for subjects find them by a rehearsal, the
    scene drawn without references, in which the model's own answers show the subjects' places (published: by a
    detector); boxes and drawn masks take its place. Published for SDXL models at 1280 x 768. In a UNet moving the
    reference has no effect, only its change of size has. FLUX, where moved keys get the rotation of their new place,
    Stable Diffusion 3 and PixArt are an extension of ours, the last two without measurements.

    Args:
        isolation: whether subjects are kept apart in the scene, in all layers.
        reposition: whether references are resized onto their regions; false shows them as they are.
        dropout: share of the tokens that masks lose, drawn anew at every step and resolution; none for 0.5, as
            published, and for 0 on FLUX.1.
        bias: added to the logits of reference keys, 0 as published. Where there is no guidance that amplifies the
            references, more of it does.
        cross: share of the portraits' prompts inside the regions; 0 turns mutual cross-attention off.
        start, stop: first step, and the step before which it ends, as numbers or as shares of the run; none for the
            end.
        seed: of the dropout, from 0.
        unconditional: whether the unconditional half sees the references too; where it does not, guidance amplifies
            them. None for true, as published, and for false on FLUX.1. Subjects are kept apart in both halves.
        layers: those that share references, as numbers in the order of the computation (36-69) or names, joined by +;
            "auto" for the up blocks but their first two layers (published 36-69 of SDXL), and all layers of models
            without. "isolated" for none, where subjects are only kept apart.
        halves: 2 where both halves of guidance come in one batch, 1 where not; none asks the pipeline.

    Raises:
        ConfigError: a setting of the wrong type or range, or (when applied) a model of another family.
    """

    name: ClassVar[str] = "isolation_reposition"
    paper: ClassVar[str] = (
        "Improving Multi-Subject Consistency in Open-Domain Image Generation with Isolation and Reposition Attention "
        "(IR-Diffusion), arXiv 2411.19261"
    )
    licence: ClassVar[str] = "code without a licence, none of it used; no weights"
    use: ClassVar[str] = "two or more characters in one picture, each from its own portrait, without mixing them"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "sdxl": {"layers": "36-69"},
        "playground-v2.5": {"layers": "36-69"},
    }

    isolation: bool = True
    reposition: bool = True
    dropout: float | None = None
    bias: float = 0.0
    cross: float = 0.9
    start: Steps = 0
    stop: Steps = None
    seed: int = 0
    unconditional: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        flag(self.name, "isolation", self.isolation)
        flag(self.name, "reposition", self.reposition)
        if self.dropout is not None:
            check_share(self.name, "dropout", self.dropout)
        if self.unconditional is not None:
            flag(self.name, "unconditional", self.unconditional)
        check_share(self.name, "cross", self.cross)
        if isinstance(self.bias, bool) or not isinstance(self.bias, int | float) or not isfinite(self.bias):
            raise ConfigError(f"{self.name} bias={self.bias!r} is not allowed; pass a finite number.")
        for name in ("start", "stop"):
            check_steps(self.name, name, getattr(self, name))
        whole(self.name, "seed", self.seed, low=0)

    @property
    def empty(self) -> bool:
        return self.isolation

    def resolved(self, subject: Subject) -> Self:
        settled, usual = super().resolved(subject), OURS.get(subject.family, PUBLISHED)
        return replace(settled, **{name: value for name, value in usual.items() if getattr(settled, name) is None})

    def auto_layers(self, subject: Subject, names: list[str]) -> str:
        blocks = up_blocks(names)
        first = next((n for n, name in enumerate(names) if name.startswith("up_blocks.")), 0)
        return f"{min(first + 2, len(names) - 1)}-{len(names) - 1}" if blocks else "all"

    def kind(self, place: Place) -> Hashable:
        if takes(self.layers, place.layer, place.name):
            return "shared"
        return "isolated" if self.isolation else None

    def when(self, at: At) -> str | None:
        return outside(self.name, self.start, self.stop, at)

    def load(self, subject: Subject, places: Mapping[str, Place]) -> "SubjectRun":
        from gensparse.methods.isolation_run import IsolationRun

        return IsolationRun(self, subject, places)
