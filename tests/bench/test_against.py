"""The same benchmark on another revision."""

import subprocess

import pytest

from gensparse.bench import against
from gensparse.bench.cpu import CpuBench


def row(contender: str, threads: int, seconds: float | None, cpu_seconds: float) -> dict:
    names = {"case": "c", "contender": contender, "dtype": "fp32", "threads": threads}
    return {**names, "seconds": seconds, "cpu_seconds": cpu_seconds}


def test_ratios_use_processor_time_with_one_thread_and_wall_time_with_more() -> None:
    now = [row("halo", 1, 9.0, 1.0), row("halo", 2, 1.0, 9.0), row("new", 1, 1.0, 1.0), row("flex", 1, None, 0.0)]
    then = [row("halo", 1, 1.0, 2.0), row("halo", 2, 3.0, 1.0), row("flex", 1, 1.0, 1.0)]
    assert against.ratios(now, then) == [
        ("c", "halo", "fp32", "1", "1000.0", "2000.0", "2.00"),
        ("c", "halo", "fp32", "2", "1000.0", "3000.0", "3.00"),
    ]


def test_a_revision_runs_its_own_code_and_its_work_tree_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (against.ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    seen = []
    real = subprocess.run

    def spy(command, **settings):
        if "-c" in command:
            command = [*command]
            command[command.index("-c") + 1] += "\nimport gensparse, gensparse.kernels as k\n"
            command[command.index("-c") + 1] += "print('FROM', gensparse.__file__, k.__file__)"
        done = real(command, **settings)
        seen.append(done.stdout or "")
        return done

    monkeypatch.setattr(against.subprocess, "run", spy)
    bench = CpuBench((4096,), (1,), ("fp32",), ("cpu4096_disc_r8",), ("halo",), rounds=1)
    rows = against.run_against("HEAD", bench)
    assert [(item["contender"], item["case"]) for item in rows] == [("halo", "cpu4096_disc_r8")]
    assert rows[0]["seconds"] > 0
    places = next(line for text in seen for line in text.splitlines() if line.startswith("FROM")).split()[1:]
    assert len(places) == 2
    assert not any(place.startswith(str(against.ROOT)) for place in places)
    listed = real(["git", "worktree", "list"], cwd=against.ROOT, capture_output=True, text=True, check=True).stdout
    assert not any(line.split()[0].endswith("/tree") for line in listed.splitlines())
