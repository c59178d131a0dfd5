"""Timers and memory meters."""

import contextlib
import ctypes
import gc
import itertools
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

Run = Callable[[], Any]


class Timing(NamedTuple):
    """Wall seconds, and processor seconds of all threads; each the best of several runs."""

    seconds: float
    cpu_seconds: float

    def clock(self, threads: int) -> float:
        """What ratios are made of: with one thread processor time, which other programs disturb least."""
        return self.cpu_seconds if threads == 1 else self.seconds


class Best:
    """Best of k, filled one run at a time so that contenders can take turns on a noisy machine."""

    def __init__(self, run: Run, limit: float) -> None:
        self.run, self.limit = run, limit
        self.timing: Timing | None = None
        self.spent = 0.0

    def step(self) -> None:
        """One more run, unless this contender has had its time."""
        if self.timing is not None and self.spent + self.timing.seconds > self.limit:
            return
        gc.collect()
        wall, cpu = time.perf_counter(), time.process_time()
        self.run()
        new = Timing(time.perf_counter() - wall, time.process_time() - cpu)
        self.spent += new.seconds
        old = self.timing or new
        self.timing = Timing(min(old.seconds, new.seconds), min(old.cpu_seconds, new.cpu_seconds))


def first_call(run: Run) -> tuple[Any, float]:
    """Result and wall seconds of one call."""
    start = time.perf_counter()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def gpu_seconds(run: Callable[..., Any], inputs: Sequence[tuple[Tensor, ...]], rep: int = 100) -> float:
    """Median seconds of a call on rotating inputs, caches flushed between calls."""
    from triton.testing import do_bench

    turn = itertools.cycle(inputs)
    return float(do_bench(lambda: run(*next(turn)), warmup=25, rep=rep, return_mode="median")) / 1e3


def gpu_extra_bytes(run: Run) -> int:
    """Peak device memory of a call beyond what was allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def cpu_extra_bytes(run: Run) -> int | None:
    """Growth of the peak resident memory during a call; None where the system does not tell (only Linux does)."""
    gc.collect()
    _trim()
    if not _restart_peak():
        return None
    before = _kib("VmRSS")
    run()
    return max(0, _kib("VmHWM") - before) * 1024


@dataclass
class Use:
    """What something took.

    Args:
        seconds: of the wall clock; cpu_seconds: of all threads of this process.
        peak_bytes: most memory held meanwhile, on the device; on a CPU all resident memory of the process, None where
            the system does not tell (only Linux does).
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int | None = None

    def shared(self, parts: int) -> "Use":
        """Of each of so many things done at once, which share the memory."""
        return replace(self, seconds=self.seconds / parts, cpu_seconds=self.cpu_seconds / parts)


@contextlib.contextmanager
def watched(device: str) -> Iterator[Use]:
    """What a block takes, told at its end."""
    gc.collect()
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        _trim()
    told = on_gpu or _restart_peak()
    use, wall, cpu = Use(), time.perf_counter(), time.process_time()
    yield use
    if on_gpu:
        torch.cuda.synchronize()
    use.seconds, use.cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    if told:
        use.peak_bytes = int(torch.cuda.max_memory_allocated()) if on_gpu else _kib("VmHWM") * 1024


def _restart_peak() -> bool:
    """Let the peak of resident memory start again from what is resident now; whether the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _trim() -> None:
    """Give freed memory back to the system, so that a call's growth is seen."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def gemm_flops(dtype: torch.dtype, threads: int, *, size: int = 1024, rounds: int = 8) -> float:
    """Peak FLOP per second of a square matrix product on the CPU, best of `rounds`."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    best = Best(lambda: a @ b, limit=10.0)
    for _ in range(rounds + 1):
        best.step()
    assert best.timing is not None
    return 2 * size**3 / best.timing.clock(threads)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Tensors made by torch.empty hold NaN, so that results nobody wrote show."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.utils.deterministic.fill_uninitialized_memory = fill
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
