"""`gensparse tune`: kernel configs timed on the GPU at hand."""

from typing import Annotated

import typer


def tune(
    dtype: Annotated[list[str] | None, typer.Option("--dtype", help="bf16, fp16 or fp32; repeat (bf16).")] = None,
    head_dim: Annotated[
        list[int] | None, typer.Option("--head-dim", help="Head dimension, 1 to 256; repeat (64 and 128).")
    ] = None,
    kernel: Annotated[
        list[str] | None, typer.Option("--kernel", help="forward, dq or dkv; repeat (all three).")
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", help="Nothing new is started after this long.")] = 540,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be tried; needs no GPU.")] = False,
) -> None:
    """Time kernel configs on this GPU and keep the fastest in the user's table, which every later run reads.

    Each config is checked against dense attention before it is timed. The table lies in the user's settings folder, or
    in GENSPARSE_CONFIG_DIR; it comes before the shipped one. Needs a GPU (exit code 2 without one).

    Examples:

      gensparse tune

      gensparse tune --dtype bf16 --head-dim 128 --kernel forward --seconds 120

      gensparse tune --dry-run
    """
    from gensparse.bench.tuning import HEADER, Tune, best, candidates, run_tune, save, table_rows
    from gensparse.cli import output
    from gensparse.cli.state import STATE

    given = {"dtypes": dtype, "dims": head_dim, "kernels": kernel}
    request = Tune(**{name: tuple(value) for name, value in given.items() if value}, seconds=seconds)
    if dry_run:
        found = [(k, d, str(dim), str(len(candidates(d, k, dim)))) for d, k, dim in request.cells()]
        header = ("kernel", "dtype", "head dim", "configs")
        if STATE.output == "json":
            output.print_json({"cells": [dict(zip(header, row, strict=True)) for row in found]})
        else:
            output.table("To be tried", header, found)
        return
    rows = list(run_tune(request, output.note))
    path = save(rows)
    if STATE.output == "json":
        output.print_json({"status": "ok", "table": path, "best": best(rows), "rows": rows})
        return
    output.table("Fastest configs", HEADER, table_rows(best(rows)))
    output.print_out(path)
