"""`gensparse bench`: speed and error tables, and what the compiler makes of the kernels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from gensparse.bench.gpu import KernelBench

app = typer.Typer(
    no_args_is_help=True, help="Speed, error and quality: aot (no GPU), cpu, kernels (GPU), quality, subjects, list."
)

_OUT = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Folder; rows are appended to its CSV (none: no file).")
]
_CASE = Annotated[
    list[str] | None, typer.Option("--case", help="Case by name, see `bench list`; name* for several; repeat (all).")
]

_DEVICE = Annotated[str, typer.Option("--device", help="cpu or cuda; the reader is always on the CPU.")]
_WORKERS = Annotated[int, typer.Option("--workers", help="Processes that share the work, and the device.")]


@app.command("list")
def list_cases() -> None:
    """List the cases of `bench kernels` and `bench cpu`.

    Examples:

      gensparse bench list

      gensparse bench kernels --case flux4k_clear_r16

      gensparse bench cpu --case 'cpu4096*'
    """
    from gensparse.bench.cases import SUITES, cases
    from gensparse.cli import output
    from gensparse.cli.state import STATE

    found = [case for suite in SUITES for case in cases(suite)]
    rows = [(c.suite, c.name, str(c.layout.tokens), f"{c.heads}x{c.dim}", c.about) for c in found]
    header = ("suite", "case", "tokens", "heads x dim", "about")
    if STATE.output == "json":
        output.print_json({"cases": [dict(zip(header, row, strict=True)) for row in rows]})
        return
    output.table("Cases", header, rows)


@app.command("aot")
def aot(
    arch: Annotated[
        list[str] | None,
        typer.Option("--arch", help="sm_80, sm_89, sm_90, sm_100, sm_120 or gfx942; repeat (all)."),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="All dtypes and padded head dimensions; takes a quarter of an hour (off).")
    ] = False,
    out: _OUT = None,
) -> None:
    """Compile every shipped kernel config for its GPU, without one, and judge it; exit code 1 if one fails.

    Registers and stack per thread, shared memory per block (bytes), spills inside loops, tensor-core and asynchronous
    copy instructions. Says nothing about speed. `--out docs/benchmarks` writes aot.csv anew.

    Examples:

      gensparse bench aot --arch sm_90

      gensparse bench aot --full --out docs/benchmarks

      gensparse bench aot --arch gfx942 --json
    """
    from gensparse.bench.aot import ARCHS, gate, shipped_builds, summary, triton_version
    from gensparse.bench.record import append, commit
    from gensparse.cli import output
    from gensparse.cli.state import STATE
    from gensparse.errors import ConfigError, unknown_name

    archs = tuple(arch or ARCHS)
    for name in archs:
        if name not in ARCHS:
            raise ConfigError(unknown_name("architecture", name, ARCHS))
    version = triton_version()
    builds = shipped_builds(archs, full=full)
    if out is not None:
        (out / "aot.csv").unlink(missing_ok=True)
    results, rows = [], []
    for number, build in enumerate(builds, 1):
        results.append(gate(build))
        rows.append({**results[-1].row(), "triton": version, "commit": commit()})
        if out is not None:
            append(out / "aot.csv", rows[-1:], tuple(rows[-1]))
        output.note(f"{number}/{len(builds)} {build.name}: {results[-1].verdict}")
    counts = summary(results)
    if STATE.output == "json":
        output.print_json({"status": "failed" if counts["failed"] else "ok", "triton": version, **counts, "rows": rows})
    else:
        output.table(f"Compiled with triton {version}", tuple(rows[0]), [tuple(map(str, row.values())) for row in rows])
    output.note(f"{counts['passed']} of {counts['builds']} builds pass")
    if counts["failed"]:
        raise typer.Exit(1)


@app.command("cpu")
def cpu(
    case: _CASE = None,
    tokens: Annotated[
        list[int] | None, typer.Option("--tokens", help="4096, 16384 or 65536; repeat (all three).")
    ] = None,
    threads: Annotated[list[int] | None, typer.Option("--threads", help="Threads; repeat (1 and 2).")] = None,
    dtype: Annotated[list[str] | None, typer.Option("--dtype", help="fp32 or bf16; repeat (both).")] = None,
    contender: Annotated[
        list[str] | None,
        typer.Option("--contender", help="dense, halo, plan_loop, flex or natten; repeat (all)."),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", help="Runs of each, the best counts.")] = 5,
    limit: Annotated[
        float, typer.Option("--limit", help="Seconds of one contender and case after its first run.")
    ] = 20,
    quick: Annotated[bool, typer.Option("--quick", help="4096 tokens, 1 thread, fp32, no flex, 1 run (off).")] = False,
    against: Annotated[
        str | None, typer.Option("--against", metavar="REV", help="Also on a git revision: prints ratios (none).")
    ] = None,
    out: _OUT = None,
) -> None:
    """Time CPU backends side by side: halo, plan loop, compiled FlexAttention, natten, dense attention.

    4 heads of 64, batch 1. Every result is checked before it is timed. Milliseconds (wall and processor), ratio to
    dense attention, share of the peak of a matrix product measured in the same run, extra memory. All of it takes about
    half an hour on two cores; flex compiles for seconds and needs a C++ compiler.

    Examples:

      gensparse bench cpu --quick

      gensparse bench cpu --out docs/benchmarks

      gensparse bench cpu --tokens 16384 --threads 1 --contender halo --contender dense --against main
    """
    from gensparse.bench.cpu import HEADER, TOKENS, CpuBench, run_cpu, table_rows
    from gensparse.cli import output
    from gensparse.cli.state import STATE

    given = {"tokens": tokens, "threads": threads, "dtypes": dtype, "contenders": contender, "names": case}
    options: dict[str, Any] = {"rounds": rounds, "limit": limit, "threads": _threads()}
    if quick:
        options |= {"tokens": TOKENS[:1], "threads": (1,), "dtypes": ("fp32",), "rounds": 1}
        options["contenders"] = ("dense", "halo", "plan_loop", "natten")
    options |= {name: tuple(value) for name, value in given.items() if value}
    bench = CpuBench(**options)
    bench.cases()
    rows = _collected(run_cpu(bench, output.note), out, "cpu_kernels.csv")
    compared = None
    if against is not None:
        from gensparse.bench.against import ratios, run_against

        compared = ratios(rows, run_against(against, bench))
    if STATE.output == "json":
        extra = {} if compared is None else {"against": against, "ratios": compared}
        output.print_json({"status": "ok", "rows": rows, **extra})
    else:
        output.table("CPU attention", HEADER, table_rows(rows))
        if compared is not None:
            header = ("case", "contender", "dtype", "threads", "ms", f"ms at {against}", "times faster")
            output.table(f"Against {against}", header, compared)
    _refuse_wrong(rows)


def _threads() -> tuple[int, ...]:
    import os

    return (1, 2) if (os.cpu_count() or 1) > 1 else (1,)


@app.command("kernels")
def kernels(
    case: _CASE = None,
    stage: Annotated[
        list[str] | None,
        typer.Option("--stage", help="correctness, ceilings, dense, ours or flex; repeat (all)."),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="bf16, fp16 or fp32.")] = "bf16",
    seconds: Annotated[float, typer.Option("--seconds", help="Nothing new is started after this long.")] = 540,
    interpret: Annotated[
        bool, typer.Option("--interpret", help="Without a GPU: the kernels in Triton's interpreter; slow (off).")
    ] = False,
    out: _OUT = None,
) -> None:
    """Time the GPU kernels against dense attention and FlexAttention; every case is checked before it is timed.

    Batch 1. Milliseconds are medians on rotating random inputs; TFLOP/s count 4 x head dimension per pair: useful pairs
    are those the mask allows, visited ones those computed. Without a GPU only the correctness stage runs, on the CPU
    backends that share the plans (fp32 there by default).

    Examples:

      gensparse bench kernels --out results

      gensparse bench kernels --case 'flux4k*' --stage dense --stage ours

      gensparse bench kernels --case flux4k_clear_r16 --interpret
    """
    from gensparse.bench.gpu import HEADER, NEEDS_GPU, KernelBench, run_kernels, table_rows
    from gensparse.cli import output
    from gensparse.cli.state import STATE
    from gensparse.engine.machine import pick_device

    device = "cuda" if pick_device() == "cuda" and not interpret else "cpu"
    wanted = "fp32" if device == "cpu" and dtype == "bf16" else dtype
    bench = KernelBench(tuple(stage or ()), tuple(case or ()), wanted, seconds, device)
    if interpret and not _interpreting():
        raise typer.Exit(_again_interpreted(bench, out))
    rows = _collected(run_kernels(bench, output.note), out, "kernels.csv")
    message = None if device == "cuda" else NEEDS_GPU
    if STATE.output == "json":
        output.print_json({"status": "ok", "device": device, "message": message, "rows": rows})
    else:
        output.table("Attention kernels", HEADER, table_rows(rows))
        if message:
            output.print_out(message)
    _refuse_wrong(rows)


@app.command("quality")
def quality(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of pictures and numbers; a run goes on.")],
    model: Annotated[
        str | None, typer.Option("-m", "--model", help="A model trained on the scenes: name or folder (embedded).")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option("--size", help="native, 512, 1024, 2048 or 4096 pixels per side (usual ones of the model)."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Prompts per size (200 native ones, 24 at 4096, 60 at others).")
    ] = None,
    contender: Annotated[
        list[str] | None,
        typer.Option(
            "--contender",
            help="What makes large pictures: an attention method or dense (cascade), a way such as direct or "
            "hidiffusion+auto, direct+clear:radius=8, stock; repeat (what the size is usually compared with).",
        ),
    ] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Only bicubic enlargements and renderings; no model (off).")
    ] = False,
    dtype: Annotated[str | None, typer.Option("--dtype", help="fp32 or bf16 (fp32 on the CPU, bf16 on a GPU).")] = None,
    threads: Annotated[int, typer.Option("--threads", help="Threads of the processor, per worker.")] = 1,
    device: _DEVICE = "cpu",
    workers: _WORKERS = 1,
) -> None:
    """Measure pictures of the embedded model: attributes, counts, duplicates, edges, seams, distance to renderings.

    Contenders of a size continue the same native pictures, beside bicubic enlargements and renderings of the same
    scenes; "stock" is diffusers' plain pipeline at that size. A way and an attention method are joined by +.
    Resumable: every finished picture is kept with its numbers. All of it takes hours on two cores. 95% intervals are
    bootstrapped over the prompts. Workers share the prompts; seconds are told where there is one worker only, seconds
    of the processor and peak memory always.

    Examples:

      gensparse bench quality --out run --size native --limit 20

      gensparse bench quality --out run --size 1024 --limit 8 --contender dense --contender stock

      gensparse bench quality --out run --device cuda --workers 12

      gensparse bench quality --out run --baselines
    """
    from gensparse.bench.quality import Options, run_quality
    from gensparse.cli import output
    from gensparse.cli.state import STATE

    options = Options(
        run=out,
        model=model,
        only=size,
        limit=limit,
        contenders=tuple(contender or ()),
        baselines=baselines,
        dtype=_torch_dtype(dtype),
        threads=threads,
        device=device,
        workers=workers,
    )
    text = run_quality(options, output.note)
    if STATE.output == "json":
        output.print_json({"status": "ok", "tables": str(out / "quality.md"), "picture": str(out / "quality.png")})
    else:
        output.print_out(text)


@app.command("subjects")
def subjects(
    run: Annotated[
        Path, typer.Option("--run", "--out", metavar="DIR", help="Folder of pictures and numbers; a run goes on.")
    ],
    model: Annotated[
        str | None, typer.Option("-m", "--model", help="embedded, embedded-unet, or a folder (embedded).")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option("--methods", help="plain, shared, rendering and methods, with commas between (all that fit)."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Cases (100 at 256, 40 at 1024, 12 at 4096).")] = None,
    size: Annotated[int, typer.Option("--size", help="Pixels per side: 256, 1024 or 4096.")] = 256,
    attention: Annotated[
        str, typer.Option("--attention", help="Of the stages beyond the native one, where subjects act.")
    ] = "clear:radius=8",
    guidance: Annotated[
        float | None, typer.Option("--guidance", help="Scale of guidance (what the model is used with).")
    ] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="fp32 or bf16 (fp32 on the CPU, bf16 on a GPU).")] = None,
    threads: Annotated[int, typer.Option("--threads", help="Threads of the processor, per worker.")] = 1,
    device: _DEVICE = "cpu",
    workers: _WORKERS = 1,
) -> None:
    """Measure methods for several subjects on an embedded model: do both come through, unmixed and drawn anew?

    The prompt names two shapes, and pictures of them show colours and fills. Beside plain pictures, plain shared
    attention ("shared") and drawings ("rendering"), from the same seeds. Resumable; 95% intervals and paired
    differences are bootstrapped over the cases. Writes subjects.md, subjects.csv and subjects.png.

    Examples:

      gensparse bench subjects --run run --limit 4

      gensparse bench subjects --run run --methods plain,shared,isolation,freecustom:weights=1 --limit 20

      gensparse bench subjects --run large --size 4096 --attention clear:radius=8 --device cuda --workers 12
    """
    from gensparse.bench.subjects import Options, run_subjects, split_contenders
    from gensparse.cli import output
    from gensparse.cli.state import STATE

    options = Options(
        run=run,
        model=None if model == "embedded" else model,
        contenders=() if methods is None else split_contenders(methods),
        limit=limit,
        size=size,
        attention=attention,
        guidance=guidance,
        dtype=_torch_dtype(dtype),
        threads=threads,
        device=device,
        workers=workers,
    )
    text = run_subjects(options, output.note)
    if STATE.output == "json":
        names = {"tables": "subjects.md", "rows": "subjects.csv", "picture": "subjects.png"}
        output.print_json({"status": "ok", **{key: str(run / name) for key, name in names.items()}})
    else:
        output.print_out(text)


def _torch_dtype(name: str | None) -> str | None:
    """torch's name of a dtype; None for None."""
    from gensparse.errors import ConfigError

    kinds = {None: None, "fp32": "float32", "bf16": "bfloat16"}
    if name not in kinds:
        raise ConfigError(f"--dtype is {name!r}; choose fp32 or bf16")
    return kinds[name]


def _interpreting() -> bool:
    from gensparse.kernels.triton import interpreted

    return interpreted()


def _again_interpreted(bench: "KernelBench", out: Path | None) -> int:
    """The same benchmark in a process whose triton interprets from the start; returns its exit code."""
    import os
    import subprocess
    import sys

    from gensparse.cli.state import STATE

    words = ["--format", STATE.format, "bench", "kernels", "--interpret", "--dtype", bench.dtype]
    words += ["--seconds", str(bench.seconds)]
    words += [word for name in bench.names for word in ("--case", name)]
    words += [word for name in bench.stages for word in ("--stage", name)]
    words += [] if STATE.progress else ["--no-progress"]
    words += [] if out is None else ["--out", str(out)]
    command = [sys.executable, "-P", "-m", "gensparse.cli", *words]
    return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False).returncode


# -------------------------------------------------------------------------------------------------------------- results
def _collected(rows: Any, out: Path | None, name: str) -> list[dict[str, Any]]:
    """All rows, each appended to the CSV as soon as it is there, so that an interrupted run keeps its numbers."""
    from gensparse.bench.record import append

    kept = []
    for row in rows:
        kept.append(row)
        if out is not None:
            append(out / name, [row])
    return kept


def _refuse_wrong(rows: Sequence[Mapping[str, Any]]) -> None:
    from gensparse.errors import NumericsError

    wrong = [row for row in rows if row.get("failed")]
    if wrong:
        first = f"{wrong[0]['case']} {wrong[0]['contender']}"
        raise NumericsError(f"{len(wrong)} results are wrong, first {first}; the table says which")
