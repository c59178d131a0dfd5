"""`gensparse generate`: text to picture."""

from pathlib import Path
from typing import Annotated, Any

import typer

from gensparse.cli.options import OUTPUT_OPTIONS, REQUEST, REQUEST_OPTIONS, with_options


@with_options(REQUEST_OPTIONS, OUTPUT_OPTIONS)
def generate(
    flags: dict[str, Any],
    prompt: Annotated[str | None, typer.Argument(help="What to show; - reads stdin.", show_default=False)] = None,
    prompt_option: Annotated[
        str | None, typer.Option("-p", "--prompt", help="The prompt as a flag", rich_help_panel=REQUEST)
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", help="Read the prompt from a file", rich_help_panel=REQUEST)
    ] = None,
) -> None:
    """Make a picture from text, at the model's own size or far beyond it.

    Examples:

      gensparse generate "a red circle left of a blue star"

      gensparse generate "a red circle left of a blue star" --size 4096 -o big.png

      gensparse generate --from draft.png --size 4096   [dim](continue that very draft)[/dim]
    """
    from gensparse.cli.requests import generate_request, read_prompt
    from gensparse.cli.run import run_requests

    run_requests([generate_request(flags, read_prompt(prompt, prompt_option, prompt_file))], flags)
