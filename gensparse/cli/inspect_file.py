"""`gensparse inspect`: what a picture says about how it was made."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer


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
    from gensparse.image_io import read_metadata

    metadata = read_metadata(file)
    if as_args:
        output.print_out(command_of(metadata))
    elif STATE.output == "json":
        output.print_json(metadata)
    else:
        output.facts(flat(metadata))


def command_of(metadata: dict[str, Any]) -> str:
    """The command line of a request, with everything that is not a default."""
    from gensparse.cli.requests import request_of
    from gensparse.request import UpscaleRequest, request_from_dict

    kind = metadata["request"].get("kind", "generate")
    values = request_of(metadata) | ({"image": "INPUT"} if kind == UpscaleRequest.kind else {})
    request = request_from_dict({"kind": kind, **values})
    words = ["gensparse", kind]
    for name in values:
        default = type(request).__dataclass_fields__[name].default
        current = getattr(request, name)
        if name in ("prompt", "num_images", "image") or current in (default, None, ()):
            continue
        words += _flag(name, current)
    words += ["INPUT"] if kind == UpscaleRequest.kind else []
    if request.prompt:
        words += ["-p", request.prompt] if kind == UpscaleRequest.kind else ["--", request.prompt]
    return " ".join(shlex.quote(clean(word)) for word in words)


def _flag(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if name == "dense_layers":
        return [f"{flag}={','.join(map(str, value))}"]
    values = value if isinstance(value, tuple) else (value,)
    return [word for item in values for word in (flag, str(item))]


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested dictionaries as dotted names."""
    out: dict[str, str] = {}
    for key, value in data.items():
        name = clean(f"{prefix}{key}")
        if isinstance(value, dict):
            out |= flat(value, f"{name}.")
        else:
            out[name] = clean(str(value))
    return out


def clean(text: str) -> str:
    """Untrusted text without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
