"""The same CPU cases on another revision of this repository, in a work tree and a process of its own."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gensparse.errors import ConfigError

if TYPE_CHECKING:
    from gensparse.bench.cpu import CpuBench

ROOT = Path(__file__).resolve().parents[2]
MAPPED = ("kernels", "pipelines")  # folders of the root that belong inside the package
_CODE = """
import json, sys
from gensparse.bench.cpu import CpuBench, run_cpu
options = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(sys.argv[1]).items()}
rows = list(run_cpu(CpuBench(**options), lambda text: print(text, file=sys.stderr, flush=True)))
print("ROWS" + json.dumps(rows))
"""


def run_against(revision: str, bench: "CpuBench") -> list[dict[str, Any]]:
    """Rows of the same benchmark on a revision.

    Raises:
        ConfigError: this is no git checkout, or the revision is unknown or has no such benchmark.
    """
    with _worktree(revision) as tree, tempfile.TemporaryDirectory() as shim:
        if not (tree / "gensparse" / "bench" / "cpu.py").exists():
            raise ConfigError(f"revision {revision!r} has no CPU benchmark; give a newer one")
        (Path(shim) / "gensparse").symlink_to(tree / "gensparse", target_is_directory=True)
        for name in MAPPED:
            (tree / "gensparse" / name).symlink_to(tree / name, target_is_directory=True)
        # only the package itself is put on the path: the root holds folders with names of other packages
        environment = {**os.environ, "PYTHONPATH": shim}
        command = [sys.executable, "-P", "-c", _CODE, json.dumps(asdict(bench))]
        done = subprocess.run(command, env=environment, cwd=shim, stdout=subprocess.PIPE, text=True, check=False)
    marked = [line[4:] for line in done.stdout.splitlines() if line.startswith("ROWS")]
    if done.returncode or not marked:
        raise ConfigError(f"the benchmark of revision {revision!r} failed; see its message above")
    return json.loads(marked[-1])


@contextlib.contextmanager
def _worktree(revision: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        done = _git("worktree", "add", "--detach", str(tree), revision)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["git said nothing"])[-1]
            raise ConfigError(f"revision {revision!r} cannot be checked out: {reason}; run this in a git checkout")
        try:
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _git(*words: str) -> subprocess.CompletedProcess[str]:
    if revision := next((word for word in words[-1:] if word.startswith("-")), None):
        raise ConfigError(f"revision {revision!r} is not allowed; give a branch, tag or commit")
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)


def ratios(rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """(case, contender, dtype, threads, ms now, ms there, there / now) where both have numbers."""
    key = ("case", "contender", "dtype", "threads")
    there = {tuple(row[name] for name in key): row for row in others if row.get("seconds")}
    out = []
    for row in rows:
        other = there.get(tuple(row[name] for name in key))
        if other is None or not row.get("seconds"):
            continue
        clock = "cpu_seconds" if row["threads"] == 1 else "seconds"
        now, then = row[clock], other[clock]
        words = [str(row[name]) for name in key]
        out.append((*words, f"{now * 1e3:.1f}", f"{then * 1e3:.1f}", f"{then / now:.2f}"))
    return out
