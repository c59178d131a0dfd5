"""What the global flags said, for the duration of one command."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gensparse.cli.interrupts import Interrupts

FORMATS = ("auto", "human", "agent", "json", "quiet")
# flags that may stand anywhere on the line -> whether a value follows
GLOBAL_FLAGS = {
    "--format": True,
    "--json": False,
    "-v": False,
    "-vv": False,
    "--verbose": False,
    "--log-file": True,
    "--no-progress": False,
    "--offline": False,
}


@dataclass
class State:
    """Settings of the running command."""

    format: str = "auto"
    verbose: int = 0
    log_file: Path | None = None
    progress: bool = True
    offline: bool = False
    interrupts: Interrupts | None = None

    def reset(self) -> None:
        """Forget what an earlier command of the same process set."""
        self.__init__()

    @property
    def output(self) -> str:
        """The format in force: auto is human on a terminal and bare paths in a pipe."""
        if self.format != "auto":
            return self.format
        return "human" if sys.stdout.isatty() else "plain"

    @property
    def shows_progress(self) -> bool:
        return self.progress and self.output != "quiet"


STATE = State()


def hoist_globals(arguments: Sequence[str]) -> list[str]:
    """Move global flags to the front, where the parser expects them; what follows `--` stays untouched."""
    front: list[str] = []
    rest: list[str] = []
    index = 0
    while index < len(arguments):
        item = arguments[index]
        if item == "--":
            return front + rest + list(arguments[index:])
        name = item.split("=", 1)[0]
        if name not in GLOBAL_FLAGS:
            rest.append(item)
        else:
            front.append(item)
            if GLOBAL_FLAGS[name] and "=" not in item and index + 1 < len(arguments):
                index += 1
                front.append(arguments[index])
        index += 1
    return front + rest


def apply_environment(state: State) -> None:
    """Switches that libraries read when they are imported."""
    if state.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["TRANSFORMERS_OFFLINE"] = "1"
    if not state.shows_progress or not sys.stderr.isatty():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    if not state.verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
