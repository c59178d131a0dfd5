"""The GPU protocol: correctness, ceilings, dense attention, our kernels, FlexAttention; one script, ended in time.

Without a GPU only the correctness stage runs, on the CPU backends, or on the kernels in Triton's interpreter.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gensparse.bench import record
from gensparse.bench.cases import BenchCase, cases
from gensparse.bench.contenders import (
    Contender,
    check_same,
    check_small,
    dense,
    flex_attention,
    forget_compiled,
    inputs,
    natten,
    ours,
    refusal,
)
from gensparse.bench.measure import first_call, gpu_extra_bytes, gpu_seconds
from gensparse.errors import BackendError, ConfigError, NumericsError
from gensparse.kernels.triton import interpreted
from gensparse.plan import build_plan

STAGES = ("correctness", "ceilings", "dense", "ours", "flex")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NEEDS_GPU = "Timings need a GPU: only the correctness stage ran."
Row = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class KernelBench:
    """What `gensparse bench kernels` measures.

    Args:
        stages: of `STAGES`; none: all. Numbers of a case are only taken once it passed the correctness stage, which
            therefore runs for every case.
        names: cases by name, a trailing * stands for the rest; none: all.
        dtype: "bf16", "fp16" or "fp32".
        seconds: after this long nothing new is started.
        device: "cuda" or "cpu".

    Raises:
        ConfigError: a value that is not allowed.
    """

    stages: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    dtype: str = "bf16"
    seconds: float = 540.0
    device: str = "cuda"

    def __post_init__(self) -> None:
        for name in self.stages:
            if name not in STAGES:
                raise ConfigError(f"--stage is {name!r}; choose of {', '.join(STAGES)}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype is {self.dtype!r}; choose of {', '.join(DTYPES)}")
        if not self.seconds > 0:
            raise ConfigError(f"--seconds is {self.seconds:g}; give more than 0")
        cases("kernels", self.names)

    def wants(self, stage: str) -> bool:
        return not self.stages or stage in self.stages


def run_kernels(bench: KernelBench, say: Say = print) -> Iterator[Row]:
    """Rows of results as they are ready; a case that fails its correctness stage gets a sentence instead of numbers."""
    clock = Clock(bench.seconds)
    if bench.device != "cuda":
        yield from _run_cpu(bench, clock, say)
        return
    if bench.wants("ceilings"):
        yield from _ceilings(bench)
    for case in cases("kernels", bench.names):
        if clock.spent():
            yield _row(bench, case, "all", note="not started: the time limit was reached")
            continue
        say(f"{case.name}: {case.about}")
        yield from _run_case(bench, case, clock, say)


class Clock:
    """Tells when a time limit has passed."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def spent(self) -> bool:
        return time.monotonic() >= self.end


def _run_case(bench: KernelBench, case: BenchCase, clock: Clock, say: Say) -> Iterator[Row]:
    dtype, mine = DTYPES[bench.dtype], ours("triton")
    try:
        error = check_small(mine, case, dtype, bench.device)
    except (BackendError, NumericsError) as problem:
        yield _row(bench, case, mine.name, **refusal(problem))
        return
    yield _row(bench, case, "triton_small", error=error)
    if not any(bench.wants(stage) for stage in ("dense", "ours", "flex")):
        return
    sets = [inputs(case.layout, case.heads, case.dim, dtype, bench.device, seed) for seed in range(2)]
    forget_compiled()
    dense_seconds, checked = None, None
    for stage, contender in _timed(bench):
        if clock.spent():
            yield _row(bench, case, contender.name, note="not started: the time limit was reached")
            continue
        say(f"  {contender.name}")
        row = _row(bench, case, contender.name)
        try:
            checked = _measure(contender, case, sets, checked, row)
        except Exception as problem:  # rivals raise whatever they like
            yield row | refusal(problem)
            continue
        if stage == "dense":
            dense_seconds = min(dense_seconds or row["seconds"], row["seconds"])
        yield _finished(row, case, dense_seconds)


def _timed(bench: KernelBench) -> Iterator[tuple[str, Contender]]:
    """Contenders in the order they are measured: dense first, for the ratios; ours before what is compared with it."""
    if bench.wants("dense"):
        yield "dense", dense("cudnn")
        yield "dense", dense("flash")
    if bench.wants("ours") or bench.wants("flex"):
        yield "ours", ours("triton")
    if bench.wants("flex"):
        yield "flex", flex_attention(128, tiles=False)
        yield "flex", flex_attention(64, tiles=True)
        yield "flex", flex_attention(128, tiles=True)
        yield "flex", natten()


def _measure(
    contender: Contender, case: BenchCase, sets: Sequence[Any], checked: Tensor | None, row: Row
) -> Tensor | None:
    """Fill a row with the numbers of one contender; returns the result that later ones are compared with."""
    prepared = contender.make(case.pattern, case.layout, sets[0][0])
    arranged = [prepared.permuted(tensors) for tensors in sets]
    row["plan_seconds"] = prepared.seconds
    out, row["first_call_seconds"] = first_call(lambda: prepared.run(*arranged[0]))
    if not contender.name.startswith("dense"):
        out = prepared.restored(out, case.layout.tokens)
        if checked is None:
            if not bool(torch.isfinite(out).all()):
                raise NumericsError(f"{contender.name} gives numbers that are not finite at full size")
            checked = out
        else:
            row["error"] = check_same(contender.name, case, out, checked)
    del out
    row["extra_bytes"] = gpu_extra_bytes(lambda: prepared.run(*arranged[0]))
    row["seconds"] = gpu_seconds(prepared.run, arranged)
    row["visited"] = prepared.visited
    return checked


def _finished(row: Row, case: BenchCase, dense_seconds: float | None) -> Row:
    useful = build_plan(case.pattern, case.layout).stats()["useful_pairs"]
    visited, flop = row.pop("visited"), 4 * case.dim * case.heads
    row["density"] = useful / case.layout.tokens**2
    row["useful_tflops"] = flop * useful / row["seconds"] / 1e12
    if visited is not None:
        row["visited_to_useful"] = visited / useful
        row["visited_tflops"] = flop * visited / row["seconds"] / 1e12
    if dense_seconds is not None:
        row["times_dense"] = dense_seconds / row["seconds"]
    return row


def _row(bench: KernelBench, case: BenchCase, contender: str, **more: Any) -> Row:
    shape = {"tokens": case.layout.tokens, "heads": case.heads, "head_dim": case.dim}
    names = {"suite": "kernels", "case": case.name, "contender": contender, "dtype": bench.dtype}
    return {**names, **shape, **more, **record.origin(bench.device)}


# ------------------------------------------------------------------------------------------------------------- ceilings
def _ceilings(bench: KernelBench) -> Iterator[Row]:
    """A square matrix product and a large copy: what the chip can do at all."""
    size = 8192
    common = {"suite": "kernels", "dtype": bench.dtype, **record.origin("cuda")}
    pairs = [tuple(torch.randn(size, size, device="cuda").to(DTYPES[bench.dtype]) for _ in range(2)) for _ in range(2)]
    seconds = gpu_seconds(torch.matmul, pairs)
    yield {**common, "case": "ceiling_matmul8192", "contender": "cublas", "seconds": seconds,
           "visited_tflops": 2 * size**3 / seconds / 1e12}  # fmt: skip
    del pairs
    count = 43 * 10**8 // 2
    source, target = (torch.empty(count, dtype=torch.bfloat16, device="cuda").fill_(i) for i in range(2))
    seconds = gpu_seconds(lambda: target.copy_(source), [()])
    yield {**common, "case": "ceiling_copy8.6GB", "contender": "copy", "seconds": seconds,
           "note": f"{2 * count * 2 / seconds / 1e12:.2f} TB/s read and written"}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- on the CPU
def _run_cpu(bench: KernelBench, clock: Clock, say: Say) -> Iterator[Row]:
    """The correctness stage on small layouts: kernels interpreted, or the CPU backends that share their plans."""
    names = ("triton",) if interpreted() else ("plan_loop", "halo")
    heads = 1 if interpreted() else 2
    for case in cases("kernels", bench.names):
        say(f"{case.name}: {case.about}")
        for name in names:
            if clock.spent():
                yield _row(bench, case, name, note="not started: the time limit was reached")
                continue
            try:
                yield _row(bench, case, name, error=check_small(ours(name), case, DTYPES[bench.dtype], "cpu", heads))
            except (BackendError, NumericsError) as problem:
                yield _row(bench, case, name, **refusal(problem))


# ---------------------------------------------------------------------------------------------------------------- table
HEADER = ("case", "contender", "ms", "useful TFLOP/s", "visited TFLOP/s", "visited/useful", "x dense", "extra memory",
          "plan s", "first call s", "error", "note")  # fmt: skip


def table_rows(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """What a person reads of the rows."""
    from gensparse.estimate import format_bytes

    return [
        (
            row["case"],
            row["contender"],
            record.shown(row, "seconds", ".3f", 1e3),
            record.shown(row, "useful_tflops", ".0f"),
            record.shown(row, "visited_tflops", ".0f"),
            record.shown(row, "visited_to_useful", ".2f"),
            record.shown(row, "times_dense", ".2f"),
            "" if row.get("extra_bytes") is None else format_bytes(row["extra_bytes"]),
            record.shown(row, "plan_seconds", ".2f"),
            record.shown(row, "first_call_seconds", ".2f"),
            record.shown(row, "error", ".1e"),
            row.get("note") or "",
        )
        for row in rows
    ]
