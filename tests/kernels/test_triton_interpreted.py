"""The Triton kernels in Triton's interpreter: a process of its own, see interpreted/conftest.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "interpreted"


def test_in_the_interpreter() -> None:
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", str(FOLDER)]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=FOLDER.parents[2], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-12000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) >= 60, "modules went missing"
