"""Time whole commands as a user types them, cold start to written file, and append the rows to a CSV.

python samples/benchmark_cpu.py --output docs/benchmarks/cpu.csv
"""

import argparse
import csv
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

PROMPT = "a red circle left of a blue star on a green striped background"
CASES: dict[str, list[str]] = {
    "help": ["--help"],
    # the memory is stated, so that the verdict does not depend on the machine
    "plan-flux-4096": ["plan", "-m", "flux.1-dev", "--size", "4096", "--attention", "clear", "--max-vram", "200GiB"],
    "native": ["generate", PROMPT, "--seed", "0"],
    "2048": ["generate", PROMPT, "--size", "2048", "--seed", "0"],
    "2048-dense": ["generate", PROMPT, "--size", "2048", "--seed", "0", "--attention", "dense"],
    "4096": ["generate", PROMPT, "--size", "4096", "--seed", "0"],
}


@dataclass(frozen=True)
class Run:
    """One finished process: wall seconds, processor seconds, peak resident memory in bytes."""

    wall: float
    cpu: float
    peak: int


def run_once(arguments: list[str]) -> Run:
    """Run `gensparse ARGUMENTS` in an empty folder; the operating system accounts time and memory of that process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(Path(sys.executable).with_name("gensparse")), *arguments]
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} exited with {process.returncode}")
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def machine() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores"


def row(case: str, runs: list[Run]) -> dict[str, object]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "case": case,
        "runs": len(runs),
        "wall_s_median": round(statistics.median(r.wall for r in runs), 2),
        "wall_s_max": round(max(r.wall for r in runs), 2),
        "cpu_s_median": round(statistics.median(r.cpu for r in runs), 2),
        "peak_gib_max": round(max(r.peak for r in runs) / 2**30, 2),
        "machine": machine(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "diffusers": version("diffusers"),
        "gensparse": version("gensparse"),
        "commit": commit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("cpu.csv"))
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--runs", type=int, default=3, help="runs of each case (default 3)")
    options = parser.parse_args()
    fresh = not options.output.exists()
    with options.output.open("a", newline="") as file:
        for case in options.case or CASES:
            result = row(case, [run_once(CASES[case]) for _ in range(options.runs)])
            writer = csv.DictWriter(file, result)
            if fresh:
                writer.writeheader()
                fresh = False
            writer.writerow(result)
            file.flush()
            print(f"{case}: {result['wall_s_median']} s, {result['peak_gib_max']} GiB", flush=True)


if __name__ == "__main__":
    main()
