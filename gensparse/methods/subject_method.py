"""What the self-attention methods for several subjects have in common: pictures of one batch that see each other.

The pictures of a half of guidance stand in one order for all of these methods: references first, then the pictures that
are generated. With guidance in one batch (UNets, Stable Diffusion 3) the unconditional half comes first, as in
diffusers. Instead of standing in the batch, references may come from a bank that an earlier run has written.
"""

from abc import abstractmethod
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from gensparse.errors import ConfigError
from gensparse.layout import Layout
from gensparse.methods.base import START, At, Dense, Loaded, Method, Place, Subject
from gensparse.methods.checks import whole
from gensparse.methods.steps import USUAL_STEPS

if TYPE_CHECKING:  # methods are listed and described without torch
    from gensparse.methods.subject_run import SharedAttention

BATCHED = ("UNet", "Stable Diffusion 3", "PixArt")
"""Families whose pipelines put both halves of guidance into one batch."""

APART = ("FLUX.1",)
"""Families whose pipelines call the denoiser twice, conditional first."""

FLOWS = ("FLUX.1", "Stable Diffusion 3")
"""Families whose latents at time s are (1 - s) * picture + s * noise."""

AUTO = "auto"
Steps = int | float | None


@dataclass(frozen=True)
class SubjectMethod(Method):
    """Base of methods by which pictures of a batch see each other; see `gensparse.methods.subject_run`.

    Args:
        halves: see the methods.
    """

    timed: ClassVar[bool] = True
    casts: ClassVar[bool] = True
    families: ClassVar[tuple[str, ...]] = ("UNet", "FLUX.1", "Stable Diffusion 3", "PixArt")
    fixed: ClassVar[int | None] = None
    """Reference pictures of a half, where the method has a fixed number."""

    layers: str | int = field(default=AUTO, kw_only=True)
    halves: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_layers(self.name, self.layers)
        object.__setattr__(self, "layers", str(self.layers))
        if self.halves is not None and self.halves not in (1, 2):
            raise ConfigError(f"{self.name} halves={self.halves!r} is not allowed; pass 1, 2 or none.")

    @property
    def empty(self) -> bool:
        """Whether it has something to do without any layer that shares."""
        return False

    def auto_layers(self, subject: Subject, names: list[str]) -> str:
        """What "auto" stands for on a model whose sites have these names, in the order of the computation."""
        return "all"

    def knows(self, family: str) -> bool:
        """Whether it has a rule for a family of models."""
        return family in self.families

    def resolved(self, subject: Subject) -> Self:
        if not self.knows(subject.family):
            raise ConfigError(
                f"{self.name} lets pictures of a batch see each other and knows {', '.join(self.families)}, not "
                f"{subject.family}; take a model of these."
            )
        names = site_names(subject)
        layers = self.auto_layers(subject, names) if self.layers == AUTO else self.layers
        if not self.empty and not any(takes(layers, number, name) for number, name in enumerate(names)):
            raise ConfigError(
                f"{self.name} layers={self.layers!r} takes none of the {len(names)} attention layers of this "
                f"{type(subject.model).__name__}; pass numbers such as 10-15, or names such as {_block(names)}."
            )
        return replace(self, layers=layers)

    def kind(self, place: Place) -> Hashable:
        return "shared" if takes(self.layers, place.layer, place.name) else None

    def when(self, at: At) -> str | None:
        """Why nothing is shared at a step, or None."""
        return None

    def pattern(self, layout: Layout, at: At = START) -> "SharedAttention | Dense":
        if at.kind is None:
            return Dense(f"{self.name} leaves this layer as it is")
        reason = self.when(at)
        if reason is not None:
            return Dense(reason)
        from gensparse.methods.subject_run import SharedAttention

        return SharedAttention(self.name)

    def why_not(self, layout: Layout, role: str = "joint") -> str | None:
        if layout.grid[0] > 1:
            return f"{self.name} is for pictures, and this call has {layout.grid[0]} frames"
        return super().why_not(layout, role)

    @abstractmethod
    def load(self, subject: Subject, places: Mapping[str, Place]) -> Loaded | None:
        """What it puts on the model: a `SubjectRun`."""


def check_layers(method: str, value: Any) -> None:
    """ConfigError unless `value` is "auto", "all", a number, or parts joined by "+": numbers, ranges, names."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return
    parts = value.split("+") if isinstance(value, str) else [""]
    if not all(part.strip() for part in parts) or any(_backward(part) for part in parts):
        raise ConfigError(
            f"{method} layers={value!r} is not allowed; pass auto, all, numbers in the order of the computation such "
            "as 10-15, or names such as up_blocks.2, joined by +."
        )


def takes(layers: str | int, number: int, name: str) -> bool:
    """Whether a site is among the layers: by its number in the order of the computation, or by a part of its name."""
    return any(_takes(part.strip(), number, name) for part in str(layers).split("+"))


def site_names(subject: Subject) -> list[str]:
    """Names of a model's sites in the order of the computation: down, middle, up."""
    from gensparse.families import attention_modules, family_of

    return list(family_of(subject.model).sites(subject.model, attention_modules(subject.model)))


def last_share(names: list[str], share: float) -> str:
    """The last layers from that share of all on, as numbers: 10-15 of 16 for 10/16."""
    return f"{round(share * len(names))}-{len(names) - 1}"


def up_blocks(names: Iterable[str]) -> list[str]:
    """The up blocks of a UNet that have attention, in order; none for other models."""
    found = dict.fromkeys(".".join(name.split(".")[:2]) for name in names if name.startswith("up_blocks."))
    return list(found)


def check_steps(method: str, name: str, value: Any) -> None:
    """ConfigError unless `value` is an integer from 0 up (steps), a share of the run from 0 to 1, or None."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and (not number or value < 0 or (isinstance(value, float) and not value <= 1)):
        raise ConfigError(
            f"{method} {name}={value!r} is not allowed; pass a number of steps from 0 up, a share of the run from 0.0 "
            "to 1.0, or none."
        )


def step_of(value: Steps, at: At) -> int | None:
    """A step given as a number or as a share of the run."""
    return value if value is None or isinstance(value, int) else round(value * (at.steps or USUAL_STEPS))


def outside(method: str, start: Steps, stop: Steps, at: At) -> str | None:
    """Why a step from before `start`, or from `stop` on, is left alone; None between them."""
    first, last = step_of(start, at) or 0, step_of(stop, at)
    if at.step < first:
        return f"{method} begins at step {first}"
    if last is not None and at.step >= last:
        return f"{method} ends before step {last}"
    return None


def check_count(method: str, name: str, value: Any) -> None:
    """ConfigError unless `value` is a positive integer or None."""
    if value is not None:
        whole(method, name, value)


def _takes(part: str, number: int, name: str) -> bool:
    if part == "all":
        return True
    first, dash, last = part.partition("-")
    if first.isdigit() and (last.isdigit() or not dash):
        return int(first) <= number <= int(last or first)
    return name == part or name.startswith(f"{part}.") or f".{part}." in f".{name}."


def _backward(part: str) -> bool:
    first, _, last = part.strip().partition("-")
    return first.isdigit() and last.isdigit() and int(first) > int(last)


def _block(names: list[str]) -> str:
    return ".".join(names[-1].split(".")[:2]) if names else "up_blocks.1"
