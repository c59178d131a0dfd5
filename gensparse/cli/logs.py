"""The log: on stderr with -v, in a file with --log-file, and never with a token in it."""

import logging
import os
import sys
import warnings
from typing import ClassVar

from gensparse.cli.output import redact
from gensparse.cli.state import State
from gensparse.errors import OutputError


class _Redacting(logging.Formatter):
    """Formats a record without the hub token."""

    LAYOUT: ClassVar[str] = "%(asctime)s %(levelname)s %(name)s: %(message)s"

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def start_logging(state: State) -> None:
    """Set up the root logger for one command. Raises OutputError when the log file cannot be written."""
    level = {0: logging.ERROR, 1: logging.INFO}.get(state.verbose, logging.DEBUG)
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h.formatter, _Redacting)]:
        root.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = []
    if state.log_file is not None:
        try:
            handlers.append(logging.FileHandler(state.log_file, encoding="utf-8", errors="backslashreplace"))
        except OSError as error:
            raise OutputError(f"cannot write log {state.log_file.name!r}: {error.strerror}; choose another") from error
        level = min(level, logging.INFO)
    if state.verbose:
        handlers.append(logging.StreamHandler(sys.stderr))
    for handler in handlers:
        handler.setFormatter(_Redacting(_Redacting.LAYOUT))
        root.addHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(True)
    if not state.verbose:
        # both libraries print to stderr by themselves while they are imported
        for library in ("DIFFUSERS", "TRANSFORMERS"):
            os.environ.setdefault(f"{library}_VERBOSITY", "error")
    if not handlers:
        warnings.simplefilter("ignore")
        root.addHandler(logging.NullHandler())
