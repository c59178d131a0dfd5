"""Runs the command line inside the test process, in a folder of its own."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from tiny_model import tiny_folder

from gensparse.cli import main


class Ran(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, a home of its own, and no settings from outside."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def cli(workdir: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """`cli("generate", "a star", ...)` -> exit code, stdout, stderr; `TINY` stands for the tiny model's folder."""

    def run(*arguments: object) -> Ran:
        before = dict(os.environ)
        words = [str(tiny_folder()) if word == "TINY" else str(word) for word in arguments]
        capfd.readouterr()
        try:
            with pytest.raises(SystemExit) as stop:
                main(words)
        finally:
            os.environ.clear()
            os.environ.update(before)
        captured = capfd.readouterr()
        return Ran(int(stop.value.code or 0), captured.out, captured.err)

    return run
