"""What a command says: results on stdout, everything else on stderr."""

import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from gensparse.cli.state import STATE


def print_out(text: str) -> None:
    """One result line on stdout; a reader that has gone away is not an error."""
    _write(sys.stdout, text + "\n")


def print_err(text: str) -> None:
    """One line for the person on stderr."""
    _write(sys.stderr, text + "\n")


def note(text: str) -> None:
    """One line of progress on stderr, unless progress is switched off."""
    if STATE.shows_progress:
        print_err(text)


def print_json(data: Mapping[str, Any]) -> None:
    """One JSON object on stdout, ASCII only so that every terminal and pipe can carry it."""
    print_out(json.dumps(data, ensure_ascii=True, default=str))


def write_bytes(data: bytes) -> None:
    """Raw bytes on stdout."""
    with _pipe_may_close(sys.stdout):
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


def warn(messages: Sequence[str]) -> None:
    """Warnings on stderr, unless only errors are wanted."""
    if STATE.output != "quiet":
        for message in messages:
            print_err(f"warning: {message}")


def print_error(error: BaseException, code: int) -> None:
    """One line with the cause and one with the remedy; a JSON object as well when JSON is wanted."""
    text = " ".join(redact(str(error) or type(error).__name__).split())
    cause, _, remedy = text.partition("; ")
    if code == 1:
        cause, remedy = f"{type(error).__name__}: {text}", remedy or "run again with -v for the place in the program"
    print_err(f"error: {cause}")
    if remedy:
        print_err(f"  try: {remedy}")
    if STATE.output == "json":
        print_json({"status": "failed", "error": {"code": code, "message": text}})


def redact(text: str) -> str:
    """The text without the hub token."""
    token = os.environ.get("HF_TOKEN")
    return text.replace(token, "***") if token else text


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout: drawn on a terminal, tab-separated elsewhere."""
    if STATE.output != "human":
        for row in rows:
            print_out("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table

    grid = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in header:
        grid.add_column(name, overflow="fold")
    for row in rows:
        grid.add_row(*(_plain(cell) for cell in row))
    with _pipe_may_close(sys.stdout):
        Console(file=sys.stdout, highlight=False).print(grid)


def facts(pairs: Mapping[str, object]) -> None:
    """Name and value, one per line."""
    width = max((len(name) for name in pairs), default=0)
    for name, value in pairs.items():
        print_out(f"{name:<{width}}  {value}")


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def _write(stream: Any, text: str) -> None:
    with _pipe_may_close(stream):
        stream.write(text)
        stream.flush()


@contextlib.contextmanager
def _pipe_may_close(stream: Any) -> Any:
    """After the reader of a pipe has gone, send what follows nowhere, so that the interpreter can end quietly."""
    try:
        yield
    except (BrokenPipeError, ValueError):  # ValueError: the stream is closed already
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
