"""`gensparse plan`: what a request will cost, without weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gensparse.cli.options import REQUEST, REQUEST_OPTIONS, SIZE, SUBJECT_OPTIONS, with_options

if TYPE_CHECKING:
    from gensparse.engine import Resolved
    from gensparse.estimate import Estimate


@with_options(REQUEST_OPTIONS, SUBJECT_OPTIONS)
def plan(
    flags: dict[str, Any],
    prompt: Annotated[str | None, typer.Argument(help="Not needed; accepted so that a command can be reused.")] = None,
    image: Annotated[
        Path | None, typer.Option("--image", help="Plan `upscale` of this picture", rich_help_panel=SIZE)
    ] = None,
    strength: Annotated[
        float | None, typer.Option("--strength", help="With --image: 0 to 1 (0.3)", rich_help_panel=REQUEST)
    ] = None,
) -> None:
    """Say what a request will cost before any weight is read; exit code 3 if it will not fit.

    Examples:

      gensparse plan --size 4096

      gensparse plan -m flux.1-dev --size 4096 --attention clear --max-vram 24GiB

      gensparse plan --image photo.jpg --size 8k --json
    """
    from gensparse import engine, image_io
    from gensparse.cli.requests import customize_request, generate_request, upscale_request
    from gensparse.errors import ConfigError

    extra = {"strength": strength} if image is not None else {}
    given = flags | {k: v for k, v in extra.items() if v is not None}
    if image is not None and any(name in flags for name in SUBJECT_OPTIONS):
        raise ConfigError("--image and subjects are both given; plan upscale or customize, one at a time")
    if image is not None:
        request = upscale_request(given, prompt, image)
    elif any(name in flags for name in SUBJECT_OPTIONS):
        named = [text.partition("=")[0].strip() for text in flags.get("subject", ())]  # methods look for them
        request = customize_request(given, prompt or " and ".join(named) or "-")
    else:
        request = generate_request(given, prompt or "-")
    picture = image_io.read_image(image) if image is not None else None
    resolved, cost = engine.plan(request, picture=picture)
    show(resolved, cost)
    if not cost.fits:
        raise typer.Exit(3)


def show(resolved: "Resolved", cost: "Estimate") -> None:
    """The plan on stdout in the format in force."""
    from gensparse.cli import output
    from gensparse.cli.state import STATE
    from gensparse.engine.words import PLAN_HEADER, plan_row, plan_title, plan_totals

    output.warn(resolved.warnings)
    if STATE.output == "json":
        request = resolved.request.to_dict(portable=True)
        output.print_json({"status": "ok" if cost.fits else "will_not_fit", "request": request, **cost.to_dict()})
        return
    output.table(plan_title(resolved), PLAN_HEADER, [plan_row(stage) for stage in cost.stages])
    for line in plan_totals(cost):
        output.print_out(line)
