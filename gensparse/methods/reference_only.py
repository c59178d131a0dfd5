"""Reference-only: pictures look at one given picture in every layer (diffusers' community pipeline, no paper)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from gensparse.errors import ConfigError
from gensparse.methods.base import At, Place, Subject
from gensparse.methods.checks import flag, whole
from gensparse.methods.freecustom import check_share
from gensparse.methods.subject_method import Steps, SubjectMethod, check_steps, outside, site_names, takes

if TYPE_CHECKING:  # methods are listed and described without torch
    from gensparse.methods.subject_run import SubjectRun


@dataclass(frozen=True)
class ReferenceOnly(SubjectMethod):
    """Every picture also sees the keys of the reference picture, and its features get that picture's statistics.

    The reference picture is the first of a half, with its latents in `Subjects` and with the prompt of the generated
    picture; it is noised anew to the level of every step. That is the published write pass as one more picture of the
    batch. In the unconditional half a share of the result stays plain. `handle.writing()` keeps the reference of a run
    for later ones, without its statistics.

    Published for Stable Diffusion 1.5 and XL. FLUX, Stable Diffusion 3 and PixArt, without statistics, are an extension
    of ours without measurements.

    Args:
        style_fidelity: share of plain attention and of unchanged features in the unconditional half.
        attention_weight: layers share whose rank by width, widest first, is below this share of all; 1 for all.
        adain: whether features behind the blocks of a UNet get the reference's mean and deviation; where a model is no
            UNet there are none.
        feature_weight: blocks whose weight is at most this take part: 0 the middle, up to 2 the outermost.
        fresh_noise: new noise for the reference at every step, as published; false keeps one.
        start, stop: first step, and the step before which it ends, as numbers or as shares of the run; none for the
            end.
        seed: of that noise, from 0.
        layers: those that may share, as numbers in the order of the computation or names, joined by +; "auto" for all.
        halves: 2 where both halves of guidance come in one batch, 1 where not; none asks the pipeline.

    Raises:
        ConfigError: a setting of the wrong type or range, or (when applied) a model of another family.
    """

    name: ClassVar[str] = "reference_only"
    fixed: ClassVar[int | None] = 1
    paper: ClassVar[str] = (
        "none: the reference-only mode of ControlNet 1.1, as in diffusers' community pipelines (2023)"
    )
    licence: ClassVar[str] = "community code Apache-2.0, none of it used; no weights"
    use: ClassVar[str] = "pictures that look like a given one, in content or style, without training or masks"

    style_fidelity: float = 0.5
    attention_weight: float = 1.0
    adain: bool = True
    feature_weight: float = 1.0
    fresh_noise: bool = True
    start: Steps = 0
    stop: Steps = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.name, "style_fidelity", self.style_fidelity)
        check_share(self.name, "attention_weight", self.attention_weight)
        flag(self.name, "adain", self.adain)
        flag(self.name, "fresh_noise", self.fresh_noise)
        value = self.feature_weight
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 2:
            raise ConfigError(f"{self.name} feature_weight={value!r} is not allowed; pass a number from 0 to 2.")
        for name in ("start", "stop"):
            check_steps(self.name, name, getattr(self, name))
        whole(self.name, "seed", self.seed, low=0)

    def resolved(self, subject: Subject) -> Self:
        settled = super().resolved(subject)
        names = site_names(subject)
        ranked = widest(subject, names)
        kept = [n for rank, n in enumerate(ranked) if self.attention_weight > rank / len(ranked)]
        kept = [n for n in sorted(kept) if takes(settled.layers, n, names[n])]
        if not kept:
            raise ConfigError(
                f"{self.name} attention_weight={self.attention_weight} and layers={self.layers!r} leave no layer; pass "
                "a larger weight."
            )
        return settled if len(kept) == len(names) else replace(settled, layers="+".join(map(str, kept)))

    def when(self, at: At) -> str | None:
        return outside(self.name, self.start, self.stop, at)

    def load(self, subject: Subject, places: Mapping[str, Place]) -> "SubjectRun":
        from gensparse.methods.subject_views import ReferenceRun

        return ReferenceRun(self, subject, places)


def widest(subject: Subject, names: list[str]) -> list[int]:
    """Numbers of the sites by decreasing width; among equals in the order of the modules (down, up, middle)."""
    listed = sorted(range(len(names)), key=lambda n: (names[n].startswith("mid_block"), n))
    return sorted(listed, key=lambda n: -_width(subject.model.get_submodule(names[n])))


def _width(module: Any) -> int:
    weight = getattr(getattr(module, "to_q", None), "weight", None)
    return int(getattr(module, "query_dim", 0) or (0 if weight is None else weight.shape[-1]))
