"""MasaCtrl: a picture takes keys and values from its source instead of its own (Cao et al. 2304.08465)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from gensparse.methods.base import At, Place, Subject
from gensparse.methods.checks import flag
from gensparse.methods.freecustom import SHARE
from gensparse.methods.subject_method import Steps, SubjectMethod, check_steps, last_share, outside

if TYPE_CHECKING:  # methods are listed and described without torch
    from gensparse.methods.subject_run import SubjectRun


@dataclass(frozen=True)
class MasaCtrl(SubjectMethod):
    """Pictures of a batch draw the content of the first one in another pose: they see its tokens and not their own.

    The first picture of a half is the source, generated from the same noise as the others or given by its latents; it
    is left as it is. `Subjects(Concept(..., mask=..., region=...))` restricts it: tokens inside `region` see the tokens
    inside `mask`, the others the tokens outside. A side without a token is not restricted. In a UNet
    `Concept(..., tokens=...)` does so too, where both masks are those of the words' cross-attention, in the layers
    behind those that it is read from.

    Published for Stable Diffusion 1.x and XL. FLUX and Stable Diffusion 3, whose text stays visible, and PixArt are an
    extension of ours without measurements.

    Args:
        start, stop: first step, and the step before which it ends, as numbers or as shares of the run; none for the
            end.
        union: whether pictures see their own tokens too.
        layers: those that share, as numbers in the order of the computation (10-15) or names, joined by +; "auto" for
            all from 10/16 of them on: 10-15 of Stable Diffusion 1.5 and 44-69 of XL, as published.
        halves: 2 where both halves of guidance come in one batch, 1 where not; none asks the pipeline.

    Raises:
        ConfigError: a setting of the wrong type or range, or (when applied) a model of another family.
    """

    name: ClassVar[str] = "masactrl"
    fixed: ClassVar[int | None] = 1
    paper: ClassVar[str] = (
        "MasaCtrl: Tuning-Free Mutual Self-Attention Control for Consistent Image Synthesis and Editing (Cao et al.), "
        "arXiv 2304.08465"
    )
    licence: ClassVar[str] = "code Apache-2.0, none of it used; no weights"
    use: ClassVar[str] = "the content of one picture in another pose or action"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "sd1.5": {"layers": "10-15"},
        "sdxl": {"layers": "44-69"},
        "sdxl-54": {"layers": "54-69"},
        "sdxl-64": {"layers": "64-69"},
    }

    start: Steps = 4
    stop: Steps = None
    union: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("start", "stop"):
            check_steps(self.name, name, getattr(self, name))
        flag(self.name, "union", self.union)

    def auto_layers(self, subject: Subject, names: list[str]) -> str:
        return last_share(names, SHARE)

    def when(self, at: At) -> str | None:
        return outside(self.name, self.start, self.stop, at)

    def load(self, subject: Subject, places: Mapping[str, Place]) -> "SubjectRun":
        from gensparse.methods.masactrl_run import MasaCtrlRun

        return MasaCtrlRun(self, subject, places)
