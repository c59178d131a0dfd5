"""Phases: one method after the other, or dense, by steps of the run; what papers call warm-up, for any method."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Self

from gensparse.errors import ConfigError
from gensparse.layout import Layout
from gensparse.methods.base import START, At, Dense, Loaded, Method, Place, Subject
from gensparse.methods.settings_text import as_number
from gensparse.methods.sliding_window import SlidingWindow
from gensparse.patterns import Pattern, RoutedPattern

if TYPE_CHECKING:
    from gensparse.processors.operators import Operator

DENSE = "dense"

Phase = tuple[int | float, "Method | str"]


@dataclass(frozen=True)
class Schedule(Method):
    """Several methods that take turns: each acts from its step on until the next one does.

    As text: `schedule:0=dense;0.25=clear:radius=16;0.9=dense`.

    Args:
        phases: (start, method or "dense") of every phase, rising from 0. Starts are numbers of steps (integers), or
            shares of the run (below 1.0), which need a pipeline that knows how many steps there are.

    Raises:
        ConfigError: no phase, starts that do not rise from 0 or are of both kinds, something that is no method, or a
            method that looks at a recorded call.
    """

    name: ClassVar[str] = "schedule"
    timed: ClassVar[bool] = True
    paper: ClassVar[str] = "ours"
    licence: ClassVar[str] = "nothing to load of its own; the phases' methods may"
    use: ClassVar[str] = (
        "Dense first or last steps, wider windows early and narrower ones late, or two methods in one run."
    )

    phases: tuple[Phase, ...] = ((0, DENSE), (0.25, SlidingWindow()))

    def __post_init__(self) -> None:
        given = self.phases
        if not isinstance(given, tuple) or not all(
            isinstance(phase, tuple | list) and len(phase) == 2 for phase in given
        ):
            raise ConfigError(
                f'schedule phases={given!r} is not allowed; pass pairs such as (0.25, "clear:radius=16").'
            )
        object.__setattr__(self, "phases", tuple((start, _method(what)) for start, what in given))
        _check_starts(tuple(start for start, _ in given))

    @property
    def methods(self) -> tuple[Method, ...]:
        """The different methods of the phases, without the dense ones."""
        return tuple(dict.fromkeys(what for _, what in self.phases if isinstance(what, Method)))

    @property
    def casts(self) -> bool:  # type: ignore[override]
        """Whether one of the methods takes subjects."""
        return any(method.casts for method in self.methods)

    def active(self, at: At) -> tuple[Method, At] | Dense:
        number = self._number(at)
        what = self.phases[number][1]
        if not isinstance(what, Method):
            return Dense("dense phase")
        kind = at.kind[number] if isinstance(at.kind, tuple) else None
        return what.active(at._replace(kind=kind))

    def pattern(self, layout: Layout, at: At = START) -> "Pattern | RoutedPattern | Operator | Dense":
        active = self.active(at)
        return active if isinstance(active, Dense) else active[0].pattern(layout, active[1])

    def heads(self, at: At, heads: int) -> tuple[int, ...] | None:
        active = self.active(at)
        return None if isinstance(active, Dense) else active[0].heads(active[1], heads)

    def kind(self, place: Place) -> Hashable:
        return tuple(what.kind(place) if isinstance(what, Method) else None for _, what in self.phases)

    def why_not(self, layout: Layout, role: str = "joint") -> str | None:
        """Why no phase can run sparse, or None; each phase answers for itself when it acts."""
        reasons = [method.why_not(layout, role) for method in self.methods]
        return reasons[0] if reasons and None not in reasons else None

    def resolved(self, subject: Subject) -> Self:
        settled = {method: method.resolved(subject) for method in self.methods}
        return replace(self, phases=tuple((start, settled.get(what, what)) for start, what in self.phases))

    def load(self, subject: Subject, places: Mapping[str, Place]) -> Loaded | None:
        """Weights of the one phase that has any; they stay on in all others.

        Raises:
            ConfigError: weights for two phases.
        """
        found: Loaded | None = None
        for method in self.methods:
            loaded = method.load(subject, places)
            if loaded is not None and found is not None:
                loaded.undo()
                found.undo()
                raise ConfigError(
                    f"Two phases of {self!r} put weights on the model, which stay for the whole run; let only one of "
                    "them do so."
                )
            found = found or loaded
        return found

    def to_dict(self) -> dict[str, Any]:
        phases = [[start, what.to_dict() if isinstance(what, Method) else what] for start, what in self.phases]
        return {"method": self.name, "version": self.version, "phases": phases}

    @classmethod
    def read_text(cls, text: str) -> dict[str, Any]:
        phases = []
        for item in filter(None, (part.strip() for part in text.split(";"))):
            start, equals, what = (part.strip() for part in item.partition("="))
            if not equals or not what:
                raise ConfigError(f"{item!r} is not a phase; write schedule:0=dense;0.25=clear:radius=16.")
            phases.append((as_number(start), what))
        return {"phases": tuple(phases)} if phases else {}

    @classmethod
    def write_text(cls, settings: Mapping[str, Any]) -> str:
        from gensparse.methods.describe import method_text

        texts = ((start, what if isinstance(what, str) else method_text(what)) for start, what in settings["phases"])
        return ";".join(f"{start}={text}" for start, text in texts)

    def _number(self, at: At) -> int:
        """Which phase acts at a step."""
        if at.step == 0:
            return 0
        starts = [start for start, _ in self.phases]
        if at.steps is None and any(isinstance(start, float) for start in starts):
            raise ConfigError(
                f"The phases of {self!r} are shares of a run of unknown length; apply it to the pipeline, call "
                "handle.restart(steps=...) before each run, or give starts as numbers of steps."
            )
        firsts = [round(start * (at.steps or 0)) if isinstance(start, float) else start for start in starts]
        return max(number for number, first in enumerate(firsts) if first <= at.step)


def _method(what: Any) -> Method | str:
    from gensparse.methods import as_method

    if isinstance(what, str) and what.strip() == DENSE:
        return DENSE
    method = as_method(what)
    if method.records:
        raise ConfigError(f"schedule phases hold {method.name}, which looks at a recorded call; use it on its own.")
    if method.name == "primecomposer":
        raise ConfigError(f"schedule phases hold {method.name}, which has phases of its own; use it on its own.")
    return method


def _check_starts(starts: tuple[Any, ...]) -> None:
    numbers = all(isinstance(start, int | float) and not isinstance(start, bool) for start in starts)
    steps = numbers and all(isinstance(start, int) for start in starts)
    shares = numbers and all((isinstance(start, float) or start == 0) and start < 1 for start in starts)
    rising = bool(starts) and starts[0] == 0 and all(a < b for a, b in pairwise(starts))
    if not (steps or shares) or not rising:
        raise ConfigError(
            f"schedule phases start at {starts!r}; pass numbers that rise from 0, either all steps (integers) or all "
            "shares of the run (below 1.0)."
        )
