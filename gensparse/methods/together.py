"""Several methods on one model at once: one on self-attention, any number on cross-attention."""

from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from gensparse.errors import ConfigError, short
from gensparse.families import CROSS
from gensparse.layout import Layout
from gensparse.methods.base import START, At, Dense, Loaded, Method, Place, Subject
from gensparse.methods.settings_text import JsonSettings
from gensparse.methods.sliding_window import SlidingWindow

if TYPE_CHECKING:
    from torch import Tensor

    from gensparse.attention import Sources
    from gensparse.patterns import Pattern, RoutedPattern
    from gensparse.processors.operators import Operator
    from gensparse.processors.stages import Stages


@dataclass(frozen=True)
class Together(JsonSettings, Method):
    """Methods that act on different attention, or on different stages of it, in one run.

    Such as a window for self-attention of a large picture, regions for its prompts and image prompts of two objects:
    `Together(("neighborhood:window=64x64", Regional(...), MipAdapter(...)))`. One of them may act on self-attention (or
    on joint attention of text and picture), and no two on the same stage of cross-attention: hidden words, phrases,
    regions, image prompts. As text: `together:neighborhood:window=64x64;lpa:...`, or JSON.

    Args:
        methods: the methods, as values, texts or dicts.

    Raises:
        ConfigError: no method, something that is none, one that records calls or takes turns, or (when applied) two
            that act on the same attention.
    """

    name: ClassVar[str] = "together"
    timed: ClassVar[bool] = True
    paper: ClassVar[str] = "ours"
    licence: ClassVar[str] = "nothing to load of its own; the methods may"
    use: ClassVar[str] = (
        "a window for self-attention and prompts of regions, or several ways to steer the text, in one run"
    )

    methods: tuple[Any, ...] = (SlidingWindow(),)

    def __post_init__(self) -> None:
        from gensparse.methods import as_method

        given = self.methods
        if isinstance(given, str | Mapping | Method) or not isinstance(given, tuple | list) or not given:
            raise ConfigError(f"together methods={short(given)} is not allowed; pass a list of methods.")
        methods = tuple(as_method(item) for item in given)
        for method in methods:
            if method.records or method.name in ("together", "schedule", "auto", "primecomposer"):
                raise ConfigError(f"together holds {method.name}, which cannot act beside others; use it on its own.")
        object.__setattr__(self, "methods", methods)

    def to_dict(self) -> dict[str, Any]:
        methods = [method.to_dict() for method in self.methods]
        return {"method": self.name, "version": self.version, "methods": methods}

    @classmethod
    def read_text(cls, text: str) -> dict[str, Any] | None:
        if text.lstrip().startswith("{"):
            return super().read_text(text)
        methods = tuple(filter(None, (part.strip() for part in text.split(";"))))
        return {"methods": methods} if methods else {}

    @classmethod
    def write_text(cls, settings: Mapping[str, Any]) -> str | None:
        from gensparse.methods.describe import method_text

        texts = [method_text(method) for method in settings["methods"]]
        return super().write_text(settings) if any(set(text) & set("{};") for text in texts) else ";".join(texts)

    @property
    def casts(self) -> bool:  # type: ignore[override]
        """Whether one of the methods takes subjects."""
        return any(method.casts for method in self.methods)

    # ---------------------------------------------------------------------------------------------- who acts on what
    def part(self, family: str) -> str:
        parts = {method.part(family) for method in self.methods}
        return parts.pop() if len(parts) == 1 else "both"

    def _own(self, family: str | None = None) -> Method | None:
        """The method of self-attention; of UNets where nobody says the family."""
        return next((method for method in self.methods if method.part(family or self._family) != "cross"), None)

    @property
    def _family(self) -> str:
        return self.__dict__.get("_settled", "UNet")

    @property
    def _crossing(self) -> tuple[Method, ...]:
        return tuple(method for method in self.methods if method.part(self._family) == "cross")

    def resolved(self, subject: Subject) -> Self:
        own = [method.name for method in self.methods if method.part(subject.family) != "cross"]
        if len(own) > 1:
            raise ConfigError(f"together holds {' and '.join(own)}, which act on the same attention; keep one of them.")
        settled = replace(self, methods=tuple(method.resolved(subject) for method in self.methods))
        object.__setattr__(settled, "_settled", subject.family)
        return settled

    def kind(self, place: Place) -> Hashable:
        if place.role.startswith(CROSS):
            return tuple(method.kind(place) for method in self._crossing)
        own = self._own()
        return None if own is None else own.kind(place)

    def active(self, at: At) -> tuple[Method, At] | Dense:
        own = self._own()
        return (self, at) if own is None or at.role.startswith(CROSS) else own.active(at)

    def pattern(self, layout: Layout, at: At = START) -> "Pattern | RoutedPattern | Operator | Dense":
        own = self._own()
        return Dense("no method of these acts on self-attention") if own is None else own.pattern(layout, at)

    def heads(self, at: At, heads: int) -> tuple[int, ...] | None:
        own = self._own()
        return None if own is None else own.heads(at, heads)

    def why_not(self, layout: Layout, role: str = "joint") -> str | None:
        own = self._own()
        return super().why_not(layout, role) if own is None else own.why_not(layout, role)

    def logit_gain(self, layout: Layout, native_tokens: int | None) -> float:
        own = self._own()
        return 1.0 if own is None else own.logit_gain(layout, native_tokens)

    def predicted_error(self, layout: Layout) -> float | None:
        own = self._own()
        return None if own is None else own.predicted_error(layout)

    def load(self, subject: Subject, places: Mapping[str, Place]) -> Loaded:
        loaded: list[tuple[bool, Loaded]] = []
        for method in self.methods:
            crossing = method.part(subject.family) == "cross"
            own = {name: place for name, place in places.items() if place.role.startswith(CROSS) == crossing}
            try:
                found = method.load(subject, own)
            except BaseException:
                for _, before in reversed(loaded):
                    before.undo()
                raise
            loaded.append((crossing, found or _Nothing()))
        return _All(loaded)


class _Nothing(Loaded):
    """Of a method that puts nothing on the model."""

    def undo(self) -> None:
        pass


class _All(Loaded):
    """What all methods put on the model."""

    def __init__(self, parts: list[tuple[bool, Loaded]]) -> None:
        self._parts = [part for _, part in parts]
        self._crossing = [part for crossing, part in parts if crossing]
        self._own = next((part for crossing, part in parts if not crossing), _Nothing())
        self.beside = tuple(dict.fromkeys(name for part in self._parts for name in part.beside))  # type: ignore[misc]

    def begin(self, at: At, arguments: dict[str, Any]) -> bool:
        changed = [part.begin(at, arguments) for part in self._parts]  # all of them
        return any(changed)

    def begin_beside(self, at: At, arguments: dict[str, Any]) -> bool:
        changed = [part.begin_beside(at, arguments) for part in self._parts]
        return any(changed)

    def layout(self, layout: Layout, at: At) -> Layout:
        return self._own.layout(layout, at)

    def stages(self, layout: Layout, at: At) -> "Stages | Dense":
        found = [
            part.stages(layout, at._replace(kind=kind)) for part, kind in zip(self._crossing, at.kind, strict=True)
        ]
        joined: Stages | None = None
        for item in found:
            if not isinstance(item, Dense):
                joined = item if joined is None else joined.joined(item)
        return Dense("; ".join(item.reason for item in found if isinstance(item, Dense))) if joined is None else joined

    def start(self, pipe: Any, latents: "Tensor", arguments: dict[str, Any]) -> "Tensor":
        for part in self._parts:
            latents = part.start(pipe, latents, arguments)
        return latents

    def step_end(self, pipe: Any, index: int, timestep: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        changed: dict[str, Any] = {}
        for part in self._parts:
            changed |= part.step_end(pipe, index, timestep, {**arguments, **changed})
        return changed

    def report(self) -> dict[str, Any]:
        return {name: value for part in self._parts for name, value in part.report().items()}

    def sources(self, place: Place) -> "Sources | None":
        return self._own.sources(place)

    def notes(self, place: Place) -> Any:
        parts = self._crossing if place.role.startswith(CROSS) else [self._own]
        return next((found for part in parts if (found := part.notes(place)) is not None), None)

    @property
    def pipeline(self) -> Any:  # type: ignore[override]
        return self._own.pipeline

    @pipeline.setter
    def pipeline(self, value: Any) -> None:
        for part in self._parts:
            part.pipeline = value

    def use(self, subjects: Any) -> None:
        self._own.use(subjects)

    def writing(self, names: Sequence[str], device: Any) -> AbstractContextManager[None]:
        return self._own.writing(names, device)

    def rehearsal(self) -> AbstractContextManager[None]:
        return self._own.rehearsal()

    def forget(self) -> None:
        for part in self._parts:
            part.forget()

    def undo(self) -> None:
        for part in reversed(self._parts):
            part.undo()
