"""Every numbered sample runs with --tiny, the first one as a user starts it, and stays short."""

import ast
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SAMPLES = sorted((Path(__file__).resolve().parent.parent / "samples").glob("[0-9][0-9]_*.py"))


def assert_pictures(printed: str, folder: Path) -> None:
    """Every file that a sample names is there."""
    named = [Path(word) for word in printed.split() if word.endswith((".png", ".json"))]
    assert all((folder / path).stat().st_size > 0 for path in named)


def test_the_first_sample_runs_as_a_user_starts_it(tmp_path: Path) -> None:
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", str(SAMPLES[0]), "--tiny"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_pictures(done.stdout, tmp_path)


@pytest.mark.parametrize("script", SAMPLES[1:], ids=lambda path: path.stem)
def test_sample_runs(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, which has imported what takes long already."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), "--tiny"])
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        torch.compiler.reset()
    printed = capsys.readouterr().out
    assert printed
    assert_pictures(printed, tmp_path)


@pytest.mark.parametrize("script", SAMPLES, ids=lambda path: path.stem)
def test_sample_is_short_and_uses_public_names(script: Path) -> None:
    source = script.read_text()
    assert len(source.splitlines()) <= 40
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gensparse"):
            assert not any(alias.name.startswith("_") for alias in node.names)


def test_samples_exist() -> None:
    assert len(SAMPLES) >= 9
