"""`gensparse calibrate`: what every attention head of a model loses under windows."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from gensparse.methods.profile import GridProfile


def calibrate(
    model: Annotated[str, typer.Argument(help="Alias, hub id or folder.")] = "embedded",
    prompt: Annotated[list[str] | None, typer.Option("-p", "--prompt", help="What to draw; repeat for more.")] = None,
    size: Annotated[list[str] | None, typer.Option("--size", help="As in generate; repeat for more (model's).")] = None,
    steps: Annotated[int, typer.Option("--steps", help="1 to 1000; a few are enough.")] = 4,
    rows: Annotated[int, typer.Option("--rows", help="Sampled queries per attention call.")] = 32,
    seed: Annotated[int, typer.Option("-s", "--seed", help="Of the pictures and of the sampling.")] = 0,
    dtype: Annotated[str, typer.Option("--dtype", help="auto|fp16|bf16|fp32.")] = "auto",
    output_file: Annotated[
        Path | None, typer.Option("-o", "--output", help="Profile to write (attention_profile.json).")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Measure which windows are good enough for every head, for --attention auto:profile=FILE.

    The model runs dense for a few steps at each size while sampled queries are compared exactly with windows of many
    radii. A profile that lies in the model's folder as attention_profile.json is found by `auto` on its own.

    Examples:

      gensparse calibrate embedded --size 512 --size 1024

      gensparse calibrate ./my-flux --prompt "a lighthouse in a storm" --size 2048 -o my-flux.json

      gensparse generate "a lighthouse" -m ./my-flux --size 4096 --attention auto:profile=my-flux.json,error=0.05
    """
    from gensparse import image_io
    from gensparse.cli import output
    from gensparse.cli.state import STATE
    from gensparse.engine.profiling import profile_model
    from gensparse.errors import ConfigError
    from gensparse.methods.profile import FILE_NAME
    from gensparse.models import SHIPPED
    from gensparse.request import GenerateRequest

    prompts = prompt or (_known_prompts() if model in SHIPPED else None)
    if not prompts:
        raise ConfigError(f"nothing to draw with {model!r} was given; pass one or more --prompt")
    path = output_file or Path(FILE_NAME)
    image_io.check_output(path, overwrite=overwrite)
    facts = {"model": model, "steps": steps, "dtype": dtype, "seed": [seed], "local_files_only": STATE.offline}
    requests = [
        GenerateRequest.from_dict({"kind": "generate", **facts, "prompt": text, "size": one})
        for one in size or [None]
        for text in prompts
    ]
    output.note(f"{len(requests)} dense runs of {steps} steps")
    profile = profile_model(requests, rows=rows, seed=seed)
    text = profile.to_json()
    image_io.write_atomic(path, lambda file: file.write(text.encode()), overwrite=overwrite)
    if STATE.output == "json":
        output.print_json({"status": "ok", "profile": str(path), "grids": [list(g.grid) for g in profile.grids]})
        return
    header = ("grid", "window", "attention kept", "worst head", "mean error", "worst head")
    lines = [row for entry in profile.grids for row in _rows(entry)]
    output.table(f"Windows of {profile.model}", header, lines)
    output.print_out(str(path))


def _known_prompts() -> list[str]:
    from gensparse.embedded.scenes import caption, random_scene

    return [caption(random_scene(seed), seed) or "a picture" for seed in range(4)]


def _rows(entry: "GridProfile") -> list[tuple[str, ...]]:
    import math

    rows = []
    for index, radii in enumerate(entry.windows):
        kept = [row[index] for layer in entry.layers for row in layer.kept]
        lost = [row[index] for layer in entry.layers for row in layer.error]
        mean = math.sqrt(sum(x * x for x in lost) / len(lost))
        grid = "x".join(map(str, entry.grid[0 if entry.grid[0] > 1 else 1 :]))
        window = f"radius {radii[2]}"
        shares = (f"{sum(kept) / len(kept):.1%}", f"{min(kept):.1%}")
        rows.append((grid, window, *shares, f"{mean:.3f}", f"{max(lost):.3f}"))
    return rows
