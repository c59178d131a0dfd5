"""`gensparse inspect`: what a picture says about how it was made."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from gensparse.request import Request


def inspect_file(
    file: Annotated[Path, typer.Argument(help="A picture that gensparse wrote, or its JSON sidecar.")],
    as_args: Annotated[bool, typer.Option("--as-args", help="Print the command that makes it again.")] = False,
) -> None:
    """Print the metadata of a picture.

    Examples:

      gensparse inspect picture.png

      gensparse inspect picture.png --as-args

      gensparse inspect picture.png --json
    """
    from gensparse.cli import output
    from gensparse.cli.state import STATE
    from gensparse.engine.words import command_of
    from gensparse.image_io import read_metadata

    metadata = read_metadata(file)
    if as_args:
        output.print_out(command_of(_request(metadata)))
    elif STATE.output == "json":
        output.print_json(metadata)
    else:
        output.facts(flat(metadata))


def _request(metadata: dict[str, Any]) -> "Request":
    """The request in a picture's metadata."""
    from gensparse.engine.reuse import request_of
    from gensparse.request import CustomizeRequest, GenerateRequest, UpscaleRequest, request_from_dict

    kind = metadata["request"].get("kind", GenerateRequest.kind)
    source: dict[str, Any] = {"image": "INPUT"} if kind == UpscaleRequest.kind else {}
    if kind == CustomizeRequest.kind:
        source = {"subject": metadata["request"].get("subject", ())}
    return request_from_dict({"kind": kind, **request_of(metadata), **source})


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested dictionaries as dotted names."""
    from gensparse.engine.words import clean

    out: dict[str, str] = {}
    for key, value in data.items():
        name = clean(f"{prefix}{key}")
        if isinstance(value, dict):
            out |= flat(value, f"{name}.")
        else:
            out[name] = clean(str(value))
    return out
