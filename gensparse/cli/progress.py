"""Progress on stderr: one living line on a terminal, a line per stage elsewhere."""

import sys
import time
from types import TracebackType
from typing import Any, Self

from gensparse.cli.output import print_err, warn
from gensparse.cli.state import STATE
from gensparse.engine.words import describe

MIN_SECONDS = 0.1  # between two redraws of the line


class Progress:
    """Shows the engine's events; use as a context manager and pass `on_event`."""

    def __init__(self) -> None:
        self._live = STATE.shows_progress and sys.stderr.isatty() and STATE.output != "agent"
        self._lines = STATE.shows_progress and not self._live
        self._drawn = 0.0
        self._stage: tuple[int, int] | None = None
        self._used = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clear()

    def _clear(self) -> None:
        if self._live and self._used:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()

    def on_event(self, event: Any) -> None:
        """Take one `gensparse.engine.Event`."""
        if event.phase == "warning":
            self._clear()
            warn([event.text])
            return
        if STATE.interrupts is not None and event.phase != "load":
            STATE.interrupts.deferred = True  # from here on a finished step is worth waiting for
        if self._live:
            self._draw(event)
        elif self._lines:
            self._line(event)

    def _draw(self, event: Any) -> None:
        now = time.monotonic()
        if event.phase == "step" and event.step != event.steps and now - self._drawn < MIN_SECONDS:
            return
        self._drawn, self._used = now, True
        sys.stderr.write("\r\x1b[2K" + fit(event, _columns()))
        sys.stderr.flush()

    def _line(self, event: Any) -> None:
        stage = (event.picture, event.stage)
        if event.phase == "step" and stage == self._stage:
            return
        if event.phase == "step":
            self._stage = stage
        print_err(describe(event))


def _columns() -> int:
    import shutil

    return max(20, shutil.get_terminal_size((80, 24)).columns)


def fit(event: Any, columns: int) -> str:
    """The event with a bar, or shortened, to fit on one line."""
    text = describe(event)
    room = columns - len(text) - 4
    if event.phase == "step" and event.steps and room >= 8:
        cells = min(room, 24)
        done = round(cells * event.step / event.steps)
        return f"[{'=' * done}{' ' * (cells - done)}] {text}"
    return text if len(text) < columns else text[: columns - 2] + "~"
