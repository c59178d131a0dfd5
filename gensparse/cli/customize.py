"""`gensparse customize`: text and pictures of subjects to picture."""

from pathlib import Path
from typing import Annotated, Any

import typer

from gensparse.cli.options import OUTPUT_OPTIONS, REQUEST, REQUEST_OPTIONS, SUBJECT_OPTIONS, SUBJECTS, with_options


@with_options(SUBJECT_OPTIONS, REQUEST_OPTIONS, OUTPUT_OPTIONS)
def customize(
    flags: dict[str, Any],
    prompt: Annotated[str | None, typer.Argument(help="What to show; - reads stdin.", show_default=False)] = None,
    prompt_option: Annotated[
        list[str] | None,
        typer.Option(
            "-p", "--prompt", help="The prompt as a flag; with consistory one for each picture", rich_help_panel=REQUEST
        ),
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", help="Read the prompt from a file", rich_help_panel=REQUEST)
    ] = None,
    turns: Annotated[
        Path | None,
        typer.Option(
            "--turns",
            help="A story.json: subjects and turns, a picture for each; run again to go on",
            rich_help_panel=SUBJECTS,
        ),
    ] = None,
) -> None:
    """Make a picture with given subjects, each from pictures of it or by words.

    Examples:

      gensparse customize "a cat on a sofa" -m sdxl --subject cat=cat.png@cat_mask.png

      gensparse customize "a cat and a dog" -m sdxl --subject cat=cat.png --subject dog=dog.png
      --subject-method isolation --layout boxes.json

      gensparse customize -m flux.1-dev --turns story.json -o story/
    """
    from gensparse.cli.requests import customize_request, read_prompt
    from gensparse.cli.run import run_requests

    if turns is not None:
        from gensparse.cli.story import run_story

        given = [item for item in (prompt, *(prompt_option or ()), prompt_file) if item is not None]
        run_story(turns, flags, [str(item) for item in given])
        return
    first, *more = prompt_option or [None]
    request = customize_request(flags, read_prompt(prompt, first, prompt_file), more)
    run_requests([request], flags)
