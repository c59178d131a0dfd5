"""FreeCustom: the generated picture attends to masked reference pictures, one per concept (Ding et al. 2405.13870)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING, Any, ClassVar, Self

from gensparse.errors import ConfigError
from gensparse.methods.base import At, Place, Subject
from gensparse.methods.checks import flag, whole
from gensparse.methods.subject_method import (
    Steps,
    SubjectMethod,
    check_count,
    check_steps,
    last_share,
    outside,
    up_blocks,
)

if TYPE_CHECKING:  # methods are listed and described without torch
    from gensparse.methods.subject_run import SubjectRun

SHARE = 10 / 16
"""Where the published layers begin: the tenth of the sixteen of Stable Diffusion 1.5."""

WEIGHT = 3.0
"""Published for UNets."""

WEIGHTS = {"FLUX.1": 1.0}
"""Ours where the published weight drowns the picture, by `gensparse bench subjects`."""


@dataclass(frozen=True)
class FreeCustom(SubjectMethod):
    """Every token of the generated picture also sees the masked tokens of reference pictures, whose logits are raised.

    A batch holds the reference pictures first, then the generated ones, each with a prompt of its own. Reference
    pictures with latents are noised anew to the level of every step, and what is made of them is of no use; see
    docs/subjects.md. They never see anything but themselves. The unconditional half does not look at them, so that
    guidance amplifies them. ControlNets of the pipeline see the same noised references.

    Published for Stable Diffusion 1.5; XL, FLUX, Stable Diffusion 3 and PixArt are an extension of ours. FLUX rotates
    queries and keys by their places, so that a subject tends to appear where it stands in its picture: a reference that
    shows it where it is to be helps there, or `isolation_reposition`, which moves it.

    Args:
        subjects: reference pictures of a half; none for as many as `Subjects` names, else all but the last one.
        weights: added to the logits of a reference's keys (3 makes them 20 times heavier), one value for all or one per
            reference, as 3x2.5. 0 is neutral. None for the published 3, and for 1 on FLUX.
        style_fidelity: share of plain attention in the unconditional half.
        start, stop: first step, and the step before which it ends, as numbers or as shares of the run; none for the
            end.
        fresh_noise: new noise for given references at every step, as published; false keeps one.
        seed: of that noise, from 0.
        layers: those that share, as numbers in the order of the computation (10-15) or names (up_blocks.2), joined by
            +; "auto" for the last two up blocks with attention (published 10-15 of Stable Diffusion 1.5), and as large
            a share of other models.
        halves: 2 where both halves of guidance come in one batch, 1 where not; none asks the pipeline.

    Raises:
        ConfigError: a setting of the wrong type or range, or (when applied) a model of another family or other numbers
            of weights and references.
    """

    name: ClassVar[str] = "freecustom"
    paper: ClassVar[str] = (
        "FreeCustom: Tuning-Free Customized Image Generation for Multi-Concept Composition (Ding et al.), "
        "arXiv 2405.13870"
    )
    licence: ClassVar[str] = "code BSD-2-Clause, for non-commercial use by its README, none of it used; no weights"
    use: ClassVar[str] = "several concepts in one picture, each from one masked reference picture, without training"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "sd1.5": {"layers": "10-15"},
        "sd1.5-controlnet": {"layers": "10-15", "weights": 1.0},
    }

    subjects: int | None = None
    weights: float | tuple[float, ...] | None = None
    style_fidelity: float = 1.0
    start: Steps = 0
    stop: Steps = None
    fresh_noise: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.name, "subjects", self.subjects)
        if self.weights is not None:
            check_weights(self.name, self.weights, self.subjects)
        check_share(self.name, "style_fidelity", self.style_fidelity)
        for name in ("start", "stop"):
            check_steps(self.name, name, getattr(self, name))
        flag(self.name, "fresh_noise", self.fresh_noise)
        whole(self.name, "seed", self.seed, low=0)

    def resolved(self, subject: Subject) -> Self:
        settled = super().resolved(subject)
        return settled if settled.weights is not None else replace(settled, weights=WEIGHTS.get(subject.family, WEIGHT))

    def auto_layers(self, subject: Subject, names: list[str]) -> str:
        blocks = up_blocks(names)
        return "+".join(blocks[-2:]) if blocks else last_share(names, SHARE)

    def when(self, at: At) -> str | None:
        return outside(self.name, self.start, self.stop, at)

    def load(self, subject: Subject, places: Mapping[str, Place]) -> "SubjectRun":
        from gensparse.methods.subject_views import FreeCustomRun

        return FreeCustomRun(self, subject, places)


def check_weights(method: str, value: Any, count: int | None) -> None:
    """ConfigError unless `value` is a finite number, or a tuple of `count` (of any number, for None)."""
    numbers = value if isinstance(value, tuple) else (value,)
    plain = all(isinstance(n, int | float) and not isinstance(n, bool) and isfinite(n) for n in numbers)
    if not numbers or not plain or (isinstance(value, tuple) and count is not None and len(value) != count):
        many = "" if count is None else f" {count}"
        raise ConfigError(
            f"{method} weights={value!r} is not allowed; pass a finite number, or a tuple of{many} such numbers, one "
            "per reference picture."
        )


def check_share(method: str, name: str, value: Any) -> None:
    """ConfigError unless `value` is a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigError(f"{method} {name}={value!r} is not allowed; pass a number from 0 to 1.")


def weights_of(method: str, weights: float | tuple[float, ...], count: int) -> tuple[float, ...]:
    """One weight per reference.

    Raises:
        ConfigError: another number of weights.
    """
    if not isinstance(weights, tuple):
        return (float(weights),) * count
    if len(weights) != count:
        raise ConfigError(
            f"{method} has {len(weights)} weights for {count} reference pictures; pass one for each, or one number."
        )
    return tuple(float(weight) for weight in weights)
