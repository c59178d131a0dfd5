"""The command line. Importing it loads neither torch nor diffusers: verbs import what they need when they run."""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from gensparse import errors

EXIT_CODES: dict[type[BaseException], int] = {
    errors.ConfigError: 2,
    errors.BackendError: 2,
    errors.WontFitError: 3,
    errors.PlanTooLargeError: 3,
    errors.ModelError: 4,
    errors.UnsupportedProcessorError: 4,
    errors.OutputError: 6,
    errors.NumericsError: 7,
    errors.Cancelled: 130,
}
UNEXPECTED = 1


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `gensparse`: run a command, turn what it raises into one line, a remedy and an exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _tolerant_streams()
    _hide_token(arguments)
    sys.exit(_run(arguments))


def _run(arguments: list[str]) -> int:
    from gensparse.cli.app import app
    from gensparse.cli.interrupts import Interrupts
    from gensparse.cli.state import STATE, hoist_globals

    STATE.reset()
    with Interrupts() as interrupts:
        STATE.interrupts = interrupts
        try:
            app(hoist_globals(arguments), prog_name="gensparse")
        except SystemExit as stop:
            return interrupts.code or _code(stop)
        except Exception as error:
            return interrupts.code or _report(error)
        return interrupts.code or 0


def _code(stop: SystemExit) -> int:
    return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else UNEXPECTED


def _report(error: Exception) -> int:
    """Say what went wrong, on stderr and in the JSON result, and return the exit code."""
    from gensparse.cli.output import print_error
    from gensparse.cli.state import STATE

    code = next((EXIT_CODES[cls] for cls in type(error).__mro__ if cls in EXIT_CODES), UNEXPECTED)
    print_error(error, code)
    if STATE.verbose and code == UNEXPECTED:
        import traceback

        traceback.print_exception(error)
    return code


def _tolerant_streams() -> None:
    """A terminal that cannot show a character gets an escape, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _hide_token(arguments: list[str]) -> None:
    """Take `--token VALUE` out of the process title: start again with it in HF_TOKEN instead."""
    token, rest = split_token(arguments)
    if token is None:
        return
    os.environ["HF_TOKEN"] = token
    if os.name == "posix" and arguments == sys.argv[1:]:
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", "gensparse.cli", *rest])
    arguments[:] = rest


def split_token(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return (token, arguments without it); arguments after `--` are a prompt."""
    rest, token, index = [], None, 0
    while index < len(arguments):
        item = arguments[index]
        if item == "--":
            return token, rest + list(arguments[index:])
        if item == "--token" and index + 1 < len(arguments):
            token, index = arguments[index + 1], index + 1
        elif item.startswith("--token="):
            token = item.removeprefix("--token=")
        else:
            rest.append(item)
        index += 1
    return token, rest
