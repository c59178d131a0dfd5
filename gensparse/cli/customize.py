"""`gensparse customize`: text and pictures of subjects to picture."""

from pathlib import Path
from typing import Annotated, Any

import typer

from gensparse.cli.options import OUTPUT_OPTIONS, REQUEST, REQUEST_OPTIONS, SUBJECT_OPTIONS, with_options


@with_options(SUBJECT_OPTIONS, REQUEST_OPTIONS, OUTPUT_OPTIONS)
def customize(
    flags: dict[str, Any],
    prompt: Annotated[str | None, typer.Argument(help="What to show; - reads stdin.", show_default=False)] = None,
    prompt_option: Annotated[
        str | None, typer.Option("-p", "--prompt", help="The prompt as a flag", rich_help_panel=REQUEST)
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", help="Read the prompt from a file", rich_help_panel=REQUEST)
    ] = None,
) -> None:
    """Make a picture with given subjects, each from a picture of it.

    Examples:

      gensparse customize "a cat on a sofa" -m sdxl --subject cat=cat.png@cat_mask.png

      gensparse customize "a cat and a dog" -m sdxl --subject cat=cat.png --subject dog=dog.png
      --subject-method isolation --layout boxes.json

      gensparse customize "a cat in the snow" -m flux.1-dev --subject cat=cat.png --size 2048
    """
    from gensparse.cli.requests import customize_request, read_prompt
    from gensparse.cli.run import run_requests

    run_requests([customize_request(flags, read_prompt(prompt, prompt_option, prompt_file))], flags)
