"""`gensparse upscale`: a picture of one's own, larger."""

from pathlib import Path
from typing import Annotated, Any

import typer

from gensparse.cli.options import OUTPUT_OPTIONS, REQUEST, REQUEST_OPTIONS, SIZE, with_options


@with_options(REQUEST_OPTIONS, OUTPUT_OPTIONS)
def upscale(
    flags: dict[str, Any],
    inputs: Annotated[
        list[Path], typer.Argument(metavar="INPUT...", help="PNG, JPEG, WebP, TIFF, BMP or GIF files, or folders.")
    ],
    by: Annotated[
        str | None, typer.Option("--by", help="Factor: 2x, 1.5x (2x)", rich_help_panel=SIZE, show_default=False)
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option("--strength", help="0 keeps the picture, 1 starts from noise (0.3)", rich_help_panel=REQUEST),
    ] = None,
    faithful: Annotated[
        bool | None,
        typer.Option(
            "--faithful/--no-faithful",
            help="Correct the result until it shrinks to the input (on)",
            rich_help_panel=REQUEST,
            show_default=False,
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            "--mask",
            help="A picture of any size: only where it is white does the model change anything",
            rich_help_panel=REQUEST,
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", help="What the picture shows; optional", rich_help_panel=REQUEST)
    ] = None,
) -> None:
    """Enlarge pictures: size, rotation, colour profile and transparency are kept. With -o FOLDER/ names are kept too,
    and what an earlier run finished is skipped. Exit code 5 if some of several pictures failed.

    Examples:

      gensparse upscale photo.jpg

      gensparse upscale photo.jpg --by 4x --strength 0.2 -o large.png

      gensparse upscale photos/ --size 4096 -o large/
    """
    from gensparse.cli.many import upscale_all
    from gensparse.errors import ConfigError

    if by is not None and "size" in flags:
        raise ConfigError("--by and --size are both given; use one of them")
    if by is not None:
        flags["size"] = by if by.lower().endswith("x") else f"{by}x"
    own = {"strength": strength, "faithful": faithful, "mask": None if mask is None else str(mask)}
    upscale_all(inputs, flags | {name: value for name, value in own.items() if value is not None}, prompt)
