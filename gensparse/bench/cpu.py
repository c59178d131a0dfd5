"""CPU backends side by side in one run: halo, plan loop, compiled FlexAttention, natten, and dense attention.

Machines are noisy, so contenders of a case take turns and the best run counts; the peak of a matrix product measured in
the same run gives every number its scale.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gensparse.bench import record
from gensparse.bench.cases import BenchCase, cases
from gensparse.bench.contenders import (
    Contender,
    Prepared,
    Tensors,
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
from gensparse.bench.measure import Best, Timing, cpu_extra_bytes, first_call, gemm_flops
from gensparse.errors import BackendError, ConfigError, NumericsError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOKENS = (4096, 16384, 65536)
Row = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class CpuBench:
    """What `gensparse bench cpu` measures.

    Args:
        tokens: sizes, of 4096, 16384 and 65536.
        threads: numbers of threads.
        dtypes: "fp32", "bf16".
        names: cases by name, a trailing * stands for the rest; none: all of the sizes asked for.
        contenders: of "dense", "halo", "plan_loop", "flex", "natten"; none: all.
        rounds: runs of each contender, of which the best counts.
        limit: seconds of one contender on one case, beyond its first run.

    Raises:
        ConfigError: a value that is not allowed.
    """

    tokens: tuple[int, ...] = TOKENS
    threads: tuple[int, ...] = (1, 2)
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    names: tuple[str, ...] = ()
    contenders: tuple[str, ...] = ()
    rounds: int = 5
    limit: float = 20.0

    def __post_init__(self) -> None:
        for number in self.tokens:
            if number not in TOKENS:
                raise ConfigError(f"--tokens is {number}; choose of {', '.join(map(str, TOKENS))}")
        cores = os.cpu_count() or 1
        for number in self.threads:
            if not 1 <= number <= cores:
                raise ConfigError(f"--threads is {number}; this machine has {cores} cores")
        for name in self.dtypes:
            if name not in DTYPES:
                raise ConfigError(f"--dtype is {name!r}; choose of {', '.join(DTYPES)}")
        for name in self.contenders:
            if name not in CONTENDERS:
                raise ConfigError(f"--contender is {name!r}; choose of {', '.join(CONTENDERS)}")
        if self.rounds < 1 or self.limit <= 0:
            raise ConfigError("--rounds and --limit are too small; give at least 1 run and more than 0 seconds")

    def cases(self) -> list[BenchCase]:
        """The cases asked for; names win over sizes."""
        return [case for case in cases("cpu", self.names) if self.names or case.layout.tokens in self.tokens]


CONTENDERS: dict[str, tuple[Contender, ...]] = {
    "dense": (dense(),),
    "halo": (ours("halo"),),
    "plan_loop": (ours("plan_loop"),),
    "flex": (flex_attention(128, tiles=False), flex_attention(64, tiles=True), flex_attention(128, tiles=True)),
    "natten": (natten(),),
}


def run_cpu(bench: CpuBench, say: Say = print) -> Iterator[Row]:
    """Rows of results, one per contender, as they are ready. Threads are set back at the end.

    A contender whose result is wrong gets its sentence instead of numbers.
    """
    before = torch.get_num_threads()
    try:
        for threads in bench.threads:
            _set_threads(threads)
            for name in bench.dtypes:
                peak = gemm_flops(DTYPES[name], threads)
                say(f"{threads} threads, {name}: matrix product {peak / 1e9:.0f} GFLOP/s")
                yield from _run_dtype(bench, name, threads, peak, say)
    finally:
        _set_threads(before)


def _set_threads(count: int) -> None:
    torch.set_num_threads(count)
    # generated code has the number of threads in it
    torch._dynamo.reset()
    import torch._inductor.config as inductor

    inductor.cpp.threads = count


def _run_dtype(bench: CpuBench, name: str, threads: int, peak: float, say: Say) -> Iterator[Row]:
    dense_times: dict[tuple[int, int, int], Timing] = {}
    for case in bench.cases():
        forget_compiled()
        common = {"suite": "cpu", "case": case.name, "dtype": name, "threads": threads, **_shape(case)}
        tensors = inputs(case.layout, case.heads, case.dim, DTYPES[name], "cpu")
        key = (case.layout.tokens, case.heads, case.dim)
        rows, best = [], {}
        checked: Tensor | None = None
        for contender in _chosen(bench):
            row = {**common, "contender": contender.name, "peak_share": None}
            rows.append(row)
            if contender.name == "dense" and key in dense_times:
                continue
            say(f"  {case.name} {contender.name}")
            try:
                prepared, out = _checked(contender, case, tensors, checked, row)
            except (BackendError, NumericsError) as problem:
                row |= refusal(problem)
                continue
            if contender.on_small and checked is None:
                checked = out
            del out
            arranged = prepared.permuted(tensors)
            run = _bound(prepared, arranged)
            row["extra_bytes"] = cpu_extra_bytes(run)
            row["visited"] = prepared.visited
            best[contender.name] = Best(run, bench.limit)
        for _ in range(bench.rounds):
            for timer in best.values():
                timer.step()
        times = {label: timer.timing for label, timer in best.items() if timer.timing is not None}
        if "dense" in times:
            dense_times[key] = times["dense"]
        for row in rows:
            timing = dense_times.get(key) if row["contender"] == "dense" else times.get(row["contender"])
            yield _finished(row, case, timing, dense_times.get(key), peak)


def _chosen(bench: CpuBench) -> list[Contender]:
    wanted = bench.contenders or tuple(CONTENDERS)
    return [contender for name in CONTENDERS if name in wanted for contender in CONTENDERS[name]]


def _checked(
    contender: Contender, case: BenchCase, tensors: Tensors, checked: Tensor | None, row: Row
) -> tuple[Prepared, Tensor]:
    """The contender ready at full size, its first call made and its correctness shown."""
    if contender.on_small:
        row["error"] = check_small(contender, case, tensors[0].dtype, "cpu")
    prepared = contender.make(case.pattern, case.layout, tensors[0])
    row["plan_seconds"] = prepared.seconds
    arranged = prepared.permuted(tensors)
    try:
        out, row["first_call_seconds"] = first_call(lambda: prepared.run(*arranged))
    except Exception as error:  # compilers raise whatever they like
        if not contender.name.startswith("flex"):
            raise
        lines = str(error).strip().splitlines() or [""]
        raise BackendError(f"does not compile here: {type(error).__name__}: {lines[0][:120]}") from error
    if contender.name == "dense":
        return prepared, out
    if checked is not None:
        same = check_same(contender.name, case, prepared.restored(out, case.layout.tokens), checked)
        row.setdefault("error", same)
    elif not contender.on_small:
        raise BackendError("nothing checked to compare it with; run it together with halo or plan_loop")
    return prepared, out


def _bound(prepared: Prepared, tensors: Tensors) -> Callable[[], Tensor]:
    return lambda: prepared.run(*tensors)


def _shape(case: BenchCase) -> Row:
    return {"tokens": case.layout.tokens, "heads": case.heads, "head_dim": case.dim}


def _finished(row: Row, case: BenchCase, timing: Timing | None, dense: Timing | None, peak: float) -> Row:
    from gensparse.plan import build_plan

    useful = build_plan(case.pattern, case.layout).stats()["useful_pairs"]
    pairs = case.layout.tokens**2
    visited = row.pop("visited", None)
    row |= {"density": useful / pairs, **record.origin("cpu")}
    if timing is None:
        return row
    flop = 4 * case.dim * case.heads
    row |= {"seconds": timing.seconds, "cpu_seconds": timing.cpu_seconds}
    seconds = timing.clock(row["threads"])
    row["useful_tflops"] = flop * useful / seconds / 1e12
    if row["contender"] == "dense":
        visited = pairs
    if visited is not None:
        row["visited_to_useful"] = visited / useful
        row["visited_tflops"] = flop * visited / seconds / 1e12
        row["peak_share"] = row["visited_tflops"] * 1e12 / peak
    if dense is not None:
        row["times_dense"] = dense.clock(row["threads"]) / seconds
    return row


def table_rows(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """What a person reads of the rows."""
    from gensparse.estimate import format_bytes

    return [
        (
            row["case"],
            row["contender"],
            row["dtype"],
            str(row["threads"]),
            record.shown(row, "seconds", ".1f", 1e3),
            record.shown(row, "cpu_seconds", ".1f", 1e3),
            record.shown(row, "times_dense", ".2f"),
            record.shown(row, "peak_share", ".0%"),
            record.shown(row, "visited_to_useful", ".2f"),
            "" if row.get("extra_bytes") is None else format_bytes(row["extra_bytes"]),
            record.shown(row, "first_call_seconds", ".2f"),
            record.shown(row, "error", ".1e"),
            row.get("note") or "",
        )
        for row in rows
    ]


HEADER = (
    "case",
    "contender",
    "dtype",
    "threads",
    "ms",
    "cpu ms",
    "x dense",
    "of peak",
    "visited/useful",
    "extra memory",
    "first call s",
    "error",
    "note",
)
