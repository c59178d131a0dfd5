"""Rows of results: one schema, appended to a CSV with the machine, the versions and the commit."""

import csv
import functools
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gensparse import __version__
from gensparse.errors import OutputError

RESULT = (
    "suite",
    "case",
    "contender",
    "dtype",
    "threads",
    "tokens",
    "heads",
    "head_dim",
    "density",
    "visited_to_useful",
    "seconds",
    "cpu_seconds",
    "useful_tflops",
    "visited_tflops",
    "times_dense",
    "peak_share",
    "extra_bytes",
    "plan_seconds",
    "first_call_seconds",
    "error",
    "note",
)
ORIGIN = ("date", "machine", "python", "torch", "triton", "gensparse", "commit")
FIELDS = (*RESULT, *ORIGIN)


def origin(device: str) -> dict[str, str]:
    """Where and with what numbers were taken."""
    return {"date": time.strftime("%Y-%m-%d"), **_origin(device)}


@functools.cache
def _origin(device: str) -> dict[str, str]:
    return {
        "machine": machine(device),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "triton": _version("triton"),
        "gensparse": __version__,
        "commit": commit(),
    }


def machine(device: str) -> str:
    """The GPU, or the CPU with its number of cores."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        names = [line.split(":", 1)[1].strip() for line in facts.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores"


@functools.cache
def commit() -> str:
    """Short hash of the checkout this package lies in, with + for changed files; "" outside one."""
    folder = Path(__file__).resolve().parent
    head = _git(folder, "rev-parse", "--short", "HEAD")
    return head + "+" * bool(_git(folder, "status", "--porcelain", "--untracked-files=no")) if head else ""


def _git(folder: Path, *words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def shown(row: Mapping[str, Any], name: str, form: str, scale: float = 1.0) -> str:
    """A number of a row for people, "" where it has none."""
    value = row.get(name)
    return "" if value is None else format(value * scale, form)


def append(path: Path, rows: Sequence[Mapping[str, Any]], fields: Sequence[str] = FIELDS) -> None:
    """Append rows to a CSV, with a header where the file is new.

    Raises:
        OutputError: the file cannot be written, or has other columns.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+", newline="", encoding="utf-8") as file:
            file.seek(0)
            header = next(csv.reader(file), None)
            if header is not None and header != list(fields):
                raise OutputError(f"{path} has other columns; give another file")
            writer = csv.DictWriter(file, fields, restval="", lineterminator="\n")
            if header is None:
                writer.writeheader()
            writer.writerows({name: _cell(row.get(name)) for name in fields} for row in rows)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; give another place") from error


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value
