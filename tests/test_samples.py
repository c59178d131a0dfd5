"""Every numbered sample runs as a user runs it, with --tiny, and stays short."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

SAMPLES = sorted((Path(__file__).resolve().parent.parent / "samples").glob("[0-9][0-9]_*.py"))


@pytest.mark.parametrize("script", SAMPLES, ids=lambda path: path.stem)
def test_sample_runs(script: Path, tmp_path: Path) -> None:
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-P", str(script), "--tiny"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    named = [Path(word) for word in done.stdout.split() if word.endswith(".png")]
    assert all((tmp_path / path).stat().st_size > 0 for path in named)


@pytest.mark.parametrize("script", SAMPLES, ids=lambda path: path.stem)
def test_sample_is_short_and_uses_public_names(script: Path) -> None:
    source = script.read_text()
    assert len(source.splitlines()) <= 40
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gensparse"):
            assert not any(alias.name.startswith("_") for alias in node.names)


def test_samples_exist() -> None:
    assert len(SAMPLES) >= 3
