"""`gensparse plan`: what a request will cost, without weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gensparse.cli.options import REQUEST, REQUEST_OPTIONS, SIZE, SPARSE, with_options

if TYPE_CHECKING:
    from gensparse.engine import Resolved
    from gensparse.estimate import Estimate


@with_options(REQUEST_OPTIONS)
def plan(
    flags: dict[str, Any],
    prompt: Annotated[str | None, typer.Argument(help="Not needed; accepted so that a command can be reused.")] = None,
    image: Annotated[
        Path | None, typer.Option("--image", help="Plan `upscale` of this picture", rich_help_panel=SIZE)
    ] = None,
    strength: Annotated[
        float | None, typer.Option("--strength", help="With --image: 0 to 1 (0.3)", rich_help_panel=REQUEST)
    ] = None,
    highres: Annotated[
        str | None, typer.Option("--highres", help="auto|cascade|none (auto)", rich_help_panel=SPARSE)
    ] = None,
) -> None:
    """Say what a request will cost before any weight is read; exit code 3 if it will not fit.

    Examples:

      gensparse plan --size 4096

      gensparse plan -m flux.1-dev --size 4096 --attention clear --max-vram 24GiB

      gensparse plan --image photo.jpg --size 8k --json
    """
    from gensparse import engine, image_io
    from gensparse.cli.requests import generate_request, upscale_request

    extra = {"strength": strength} if image is not None else {"highres": highres}
    given = flags | {k: v for k, v in extra.items() if v is not None}
    request = generate_request(given, prompt or "-") if image is None else upscale_request(given, prompt, image)
    picture = image_io.read_image(image) if image is not None else None
    resolved, cost = engine.plan(request, picture=picture)
    show(resolved, cost)
    if not cost.fits:
        raise typer.Exit(3)


def show(resolved: "Resolved", cost: "Estimate") -> None:
    """The plan on stdout in the format in force."""
    from gensparse.cli import output
    from gensparse.cli.state import STATE

    output.warn(resolved.warnings)
    if STATE.output == "json":
        request = resolved.request.to_dict(portable=True)
        output.print_json({"status": "ok" if cost.fits else "will_not_fit", "request": request, **cost.to_dict()})
        return
    output.table(_title(resolved), HEADER, [_row(stage) for stage in cost.stages])
    for line in _totals(resolved, cost):
        output.print_out(line)


HEADER = ("size", "steps", "tokens", "attention", "density", "TFLOP/step", "memory / in chunks", "time")


def _title(resolved: "Resolved") -> str:
    return f"{resolved.info.alias}: {resolved.width}x{resolved.height}, {resolved.dtype} on {resolved.device}"


def _row(stage: Any) -> tuple[str, ...]:
    from gensparse.estimate import format_bytes, format_seconds

    return (
        f"{stage.width}x{stage.height}",
        str(stage.steps),
        str(stage.tokens),
        stage.attention,
        f"{stage.density:.4f}",
        f"{(stage.linear_flops + stage.attention_flops) / 1e12:.3g}",
        f"{format_bytes(stage.activation_bytes)} / {format_bytes(stage.chunked_bytes)}",
        "" if stage.seconds is None else format_seconds(stage.seconds),
    )


def _totals(resolved: "Resolved", cost: "Estimate") -> list[str]:
    from gensparse.estimate import format_bytes, format_seconds

    limit = "" if cost.limit_bytes is None else f" of {format_bytes(cost.limit_bytes)}"
    out = [f"memory  about {format_bytes(cost.peak_bytes)}{limit} (weights {format_bytes(cost.weight_bytes)})"]
    for phase in cost.phases:
        parts = f"weights {format_bytes(phase.weight_bytes)}, activations {format_bytes(phase.activation_bytes)}"
        out.append(f"        {phase.name}: {parts}")
    if cost.host_bytes:
        out.append(f"        main memory: {format_bytes(cost.host_bytes)} of waiting weights")
    out.append(f"choice  {cost.memory}")
    out += [f"        since {reason}" for reason in cost.why]
    out.append(f"work    {cost.total_flops / 1e12:.3g} TFLOP per picture")
    if cost.seconds is not None:
        out.append(f"time    {cost.time_class}, about {format_seconds(cost.seconds)} per picture on this machine")
    out += [f"advice  {line}" for line in cost.advice]
    return out
