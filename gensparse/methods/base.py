"""Method: the frozen settings of one published way to make attention sparse, and what it does on a layout."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from gensparse.errors import ConfigError, unknown_name
from gensparse.layout import Layout, Segment
from gensparse.patterns import Pattern, RoutedPattern

if TYPE_CHECKING:  # methods are listed and described without torch
    from torch import Tensor, nn

    from gensparse.attention import Sources
    from gensparse.processors.operators import Operator
    from gensparse.processors.stages import Stages


class Place(NamedTuple):
    """Where a site is: its role in the family, its number among the `layers` sites of the model, its heads."""

    role: str
    layer: int
    layers: int
    heads: int
    name: str = ""


class At(NamedTuple):
    """Which sites, and when: the kind that `Method.kind` gave them, their role, and the step of the run.

    `steps` is None where nobody knows how many there will be (a bare model without its pipeline); `layout` is that of
    the call where `Method.heads` is asked; `coarseness` is how many times fewer tokens per axis the sites have than the
    first level of a model of several resolutions; `recorded` are the key sources that the sites have kept, see
    `Method.recording`. `guided` says whether the first half of the batch is the unconditional one, as the pipeline
    tells; None for a bare model. `call` counts the calls with the timestep of this step, for methods that are timed.
    """

    kind: Hashable = None
    role: str = "joint"
    step: int = 0
    steps: int | None = None
    layout: Layout | None = None
    coarseness: int = 1
    recorded: tuple[Segment, ...] = ()
    guided: bool | None = None
    call: int = 0


START = At()
"""The first step of a model whose sites all act alike."""


class Subject(NamedTuple):
    """The model a method is put on.

    `denoisers` is how many models of its kind take turns in a run of its pipeline (Wan 2.2: two). `owner` is the
    pipeline, where `Method.load` may ask it for encodings; None for a bare model. Do not keep it.
    """

    family: str
    model: "nn.Module"
    native_tokens: int | None = None
    denoisers: int = 1
    owner: Any = None


class Recording(NamedTuple):
    """What sites compute in a call that is recorded, and the name of the key source its target becomes."""

    pattern: Pattern
    name: str


@dataclass(frozen=True)
class Dense:
    """Run dense, for this reason."""

    reason: str


class Loaded(ABC):
    """What a method put on a model besides processors: weights, adapters, hooks."""

    beside: ClassVar[tuple[str, ...]] = ()
    """Names of further models of a pipeline, such as "controlnet", whose calls `begin_beside` sees."""

    def begin(self, at: At, arguments: dict[str, Any]) -> bool:
        """Before every denoiser call, with its step (for methods that are `timed`) and its arguments by name.

        Returns:
            Whether it changed `arguments`.
        """
        return False

    def begin_beside(self, at: At, arguments: dict[str, Any]) -> bool:
        """The same before calls of the models `beside` the denoiser, which come first in a step."""
        return False

    pipeline: Callable[[], Any] = staticmethod(lambda: None)
    """Gives the pipeline of the model, None for a bare one; set before the first call."""

    def use(self, subjects: Any) -> None:
        """Who is in the pictures to come, see `Handle.use`; only where the method `casts`."""
        raise NotImplementedError

    def writing(self, names: Sequence[str], device: Any) -> "AbstractContextManager[None]":
        """Around calls whose reference pictures are kept, see `Handle.writing`; only where the method `casts`."""
        raise NotImplementedError

    def rehearsal(self) -> "AbstractContextManager[None]":
        """Around a first run that the method learns from, see `Handle.rehearsal`.

        Raises:
            ConfigError: it has none.
        """
        raise ConfigError("The method on the model learns nothing from a rehearsal; run it at once.")

    def forget(self) -> None:  # noqa: B027 - most keep nothing
        """Drop what was kept of reference pictures."""

    def stages(self, layout: Layout, at: At) -> "Stages | Dense":
        """What cross-attention sites of `at` do in this call; `layout` is that of their queries."""
        return Dense("it does not act on cross-attention")

    def start(self, pipe: Any, latents: "Tensor", arguments: dict[str, Any]) -> "Tensor":
        """See `Handle.start`."""
        return latents

    def maps(self) -> "Tensor":
        """See `Handle.maps`.

        Raises:
            ConfigError: the method keeps none.
        """
        raise ConfigError("The method on the model keeps no attention maps; apply disendiff for that.")

    def step_end(self, pipe: Any, index: int, timestep: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """What the pipeline calls after every step, see `Handle.on_step_end`; returns the tensors it changed."""
        return {}

    def layout(self, layout: Layout, at: At) -> Layout:
        """What sites of `at` really see in this call, where the sizes inside the model are other ones."""
        return layout

    def report(self) -> dict[str, Any]:
        """Further entries of `Handle.report`."""
        return {}

    def sources(self, place: Place) -> "Sources | None":
        """Weights of the key sources of one site, see `sparse_attention`."""
        return None

    def notes(self, place: Place) -> Any:
        """What the operators of one site read as `OperatorCall.notes`."""
        return None

    def recording(self) -> "AbstractContextManager[None]":
        """Around a call that is recorded; adapters that serve it alone are active inside."""
        return nullcontext()

    @abstractmethod
    def undo(self) -> None:
        """Take everything off again, bit for bit."""


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods: a frozen dataclass whose fields are the settings, checked when it is made."""

    name: ClassVar[str]
    """The word users type: `--attention NAME`, "method" in files."""
    version: ClassVar[int] = 1
    """Raised when the meaning of a setting changes, so that old files are refused instead of misread."""
    timed: ClassVar[bool] = False
    """Whether `pattern` looks at the step; reading it waits for the device once per step."""
    edits: ClassVar[bool] = False
    """Whether `pattern` has a rule for reference pictures in the sequence (see `methods.pictures`)."""
    records: ClassVar[bool] = False
    """Whether it needs a call that is recorded, see `Handle.record` and `recording`."""
    casts: ClassVar[bool] = False
    """Whether pictures of a batch see each other, so that it takes subjects and references, see `Handle.use`."""
    audit: ClassVar[int] = 0
    """Picture tokens per call that are compared with dense attention unless the user says otherwise."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Published settings by the model they were published for; `Method.preset`, "name:preset=model"."""
    paper: ClassVar[str] = ""
    """Where it was published: title, authors, arXiv id; "ours" where it was not."""
    licence: ClassVar[str] = ""
    """What the authors' code and weights allow. Our code is written from the papers, so it binds weights only."""
    use: ClassVar[str] = ""
    """When to take it, in a sentence."""

    @abstractmethod
    def pattern(self, layout: Layout, at: At = START) -> "Pattern | RoutedPattern | Operator | Dense":
        """Which key every query sees on `layout`; windows longer than the grid are shortened to it.

        Called for every denoiser call, so it only describes; equal patterns share one plan.
        """

    def part(self, family: str) -> str:
        """Which attention it acts on in models of a family: "self" (and joint), "cross", or "both"."""
        return "self"

    def kind(self, place: Place) -> Hashable:
        """What of its place a site's pattern depends on. Sites of equal kinds and roles act alike.

        Give few kinds (up to four): under torch.compile each is a graph of its own.
        """
        return None

    def active(self, at: At) -> "tuple[Method, At] | Dense":
        """The method that acts at a step, and the place as that method sees it; another one for methods of phases."""
        return self, at

    def heads(self, at: At, heads: int) -> tuple[int, ...] | None:
        """Entry of a PerHead pattern for every head; None where all heads have one pattern."""
        return None

    def why_not(self, layout: Layout, role: str = "joint") -> str | None:
        """Why calls with this layout must run dense, or None."""
        if not self.edits and any(segment.kind == "reference" for segment in layout.segments):
            return f"{self.name} has no rule for reference pictures"
        return None

    def logit_gain(self, layout: Layout, native_tokens: int | None) -> float:
        """Factor on the logits; 1 keeps the model's own scale.

        Args:
            native_tokens: picture tokens at the model's training size, None when nothing says it.
        """
        return 1.0

    def predicted_error(self, layout: Layout) -> float | None:
        """Relative error of the attention outputs on `layout` that this method expects; None where it has no idea."""
        return None

    def resolved(self, subject: Subject) -> Self:
        """This method with every setting that was left to the model filled in for it.

        Raises:
            ConfigError: the method does not fit the model; says which do.
        """
        return self

    def recorded(self, call: dict[str, Any]) -> dict[str, Any]:
        """The denoiser call that is recorded, from the one that `Handle.record` was given.

        Raises:
            ConfigError: an argument is missing.
        """
        return call

    def recording(self, layout: Layout, at: At = START) -> Recording | None:
        """What sites compute and keep in a call that is recorded; their patterns then find it in `At.recorded`."""
        return None

    def load(self, subject: Subject, places: Mapping[str, Place]) -> Loaded | None:
        """Put weights or adapters on the model, where the method has any; called when it is applied.

        Raises:
            ConfigError: weights that do not fit the model or the settings; the model is unchanged then.
        """
        return None

    @classmethod
    def preset(cls, model: str, **changes: Any) -> Self:
        """The settings published for a model, with changes.

        Raises:
            ConfigError: nothing was published for a model of that name.
        """
        if model not in cls.presets:
            raise ConfigError(unknown_name(f"{cls.name} preset", str(model), cls.presets))
        return cls(**{**cls.presets[model], **changes})

    def to_dict(self) -> dict[str, Any]:
        """Settings as JSON data: {"method": name, "version": n, ...}."""
        settings = {key: _listed(value) for key, value in asdict(self).items()}
        return {"method": self.name, "version": self.version, **settings}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The method `to_dict` described; settings that are left out keep their defaults, or those of "preset".

        Raises:
            ConfigError: an unknown method, version, preset or setting, another method than this class, or a bad value.
        """
        settings = dict(data)
        chosen = cls._named(settings.pop("method", None))
        version = settings.pop("version", chosen.version)
        if version != chosen.version:
            raise ConfigError(
                f"{chosen.name} version={version!r} is not allowed; this release reads version {chosen.version}."
            )
        preset = settings.pop("preset", None)
        known = [field.name for field in fields(chosen)]
        for key in settings:
            if key not in known:
                raise ConfigError(unknown_name(f"setting of {chosen.name}", str(key), known))
        settings = {key: _tupled(value) for key, value in settings.items()}
        return chosen(**settings) if preset is None else chosen.preset(preset, **settings)

    @classmethod
    def read_text(cls, text: str) -> dict[str, Any] | None:
        """Settings from a text of the method's own form; None for the usual "key=value,key=value".

        Raises:
            ConfigError: text that is not of that form.
        """
        return None

    @classmethod
    def write_text(cls, settings: Mapping[str, Any]) -> str | None:
        """The text that `read_text` reads, from settings as `to_dict` gives them; None for the usual form."""
        return None

    @classmethod
    def _named(cls, name: Any) -> type[Self]:
        from gensparse.methods import method_class

        chosen = cls if name is None and cls is not Method else method_class(name)
        if not issubclass(chosen, cls):
            raise ConfigError(f"method={name!r} is not {cls.__name__}; read it with Method.from_dict.")
        return chosen


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple) else value


def _tupled(value: Any) -> Any:
    return tuple(_tupled(item) for item in value) if isinstance(value, list) else value
