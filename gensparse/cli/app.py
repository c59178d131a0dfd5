"""The verbs of `gensparse` and its global flags."""

from pathlib import Path
from typing import Annotated

import typer

from gensparse import __version__
from gensparse.cli import (
    bench,
    calibrate,
    customize,
    env,
    generate,
    inspect_file,
    methods,
    models,
    plan,
    serve,
    tune,
    upscale,
)
from gensparse.cli.state import FORMATS, STATE, apply_environment
from gensparse.errors import ConfigError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Pictures far beyond the trained size, with sparse attention.",
)
app.command("generate")(generate.generate)
app.command("upscale")(upscale.upscale)
app.command("customize")(customize.customize)
app.command("plan")(plan.plan)
app.command("inspect")(inspect_file.inspect_file)
app.add_typer(models.app, name="models")
app.add_typer(methods.app, name="methods")
app.add_typer(bench.app, name="bench")
app.command("calibrate")(calibrate.calibrate)
app.command("tune")(tune.tune)
app.command("app")(serve.serve)
app.command("env")(env.env)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gensparse {__version__}")
        raise typer.Exit


@app.callback()
def settings(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    format: Annotated[
        str, typer.Option("--format", help="auto|human|agent|json|quiet: how results are printed.")
    ] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Short for --format json.")] = False,
    verbose: Annotated[int, typer.Option("-v", "--verbose", count=True, help="Say more; -vv says all.")] = 0,
    log_file: Annotated[Path | None, typer.Option("--log-file", help="Write the log to a file.")] = None,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="No progress on stderr.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network.")] = False,
) -> None:
    """Global flags; they may stand anywhere on the line."""
    if format not in FORMATS:
        raise ConfigError(f"--format is {format!r}; choose one of {', '.join(FORMATS)}")
    STATE.format = "json" if json_output else format
    STATE.verbose, STATE.log_file = verbose, log_file
    STATE.progress, STATE.offline = not no_progress, offline
    apply_environment(STATE)
    from gensparse.cli.logs import start_logging

    start_logging(STATE)
