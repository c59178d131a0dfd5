"""Presets: settings kept under a name in the user's configuration folder, for the command line and the page alike."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gensparse.engine.reuse import UNTRUSTED
from gensparse.errors import ConfigError, OutputError
from gensparse.request import Request

OWN_OF_A_PICTURE = ("prompt", "seed", "num_images", "layout", "regions")
"""What a preset leaves out, next to `UNTRUSTED`: it belongs to one picture, not to a way of making pictures."""


def preset_values(request: Request) -> dict[str, Any]:
    """What a preset of a request keeps, as JSON data."""
    return {k: v for k, v in request.to_dict().items() if k not in (*UNTRUSTED, *OWN_OF_A_PICTURE)}


def preset_path(name: str) -> Path:
    """File of a preset.

    Raises:
        ConfigError: a name with other characters than letters, digits, dots and dashes.
    """
    return presets_folder() / f"{check_name(name)}.json"


def check_name(name: str) -> str:
    """The name of a preset, as it was given.

    Raises:
        ConfigError: as `preset_path`.
    """
    if not re.fullmatch(r"[\w.-]{1,64}", name) or name.startswith("."):
        raise ConfigError(f"preset name is {name[:64]!r}; use letters, digits, dots and dashes")
    return name


def presets_folder() -> Path:
    """Where presets are kept; it need not exist."""
    import typer

    return Path(typer.get_app_dir("gensparse")) / "presets"


def preset_names() -> list[str]:
    """Names of the presets there are, sorted."""
    return sorted(path.stem for path in presets_folder().glob("*.json") if not path.name.startswith("."))


def read_preset(name: str) -> dict[str, Any]:
    """The values of a preset, not yet checked as a request.

    Raises:
        ConfigError: no such preset, or one that is not readable.
    """
    return read_object(preset_path(name))


def save_preset(name: str, request: Request) -> None:
    """Keep a request under a name, without prompt, seed and machine settings.

    Raises:
        ConfigError: a name with other characters than letters, digits, dots and dashes.
        OutputError: the configuration folder cannot be written.
    """
    path, data = preset_path(name), preset_values(request)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_text(data), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot save preset {name!r}: {error.strerror}; check your home folder") from error


def delete_preset(name: str) -> None:
    """Forget a preset; does nothing where there is none.

    Raises:
        ConfigError: a name that no preset can have.
        OutputError: the file cannot be removed.
    """
    try:
        preset_path(name).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot delete preset {name!r}: {error.strerror}; check your home folder") from error


def read_object(path: Path) -> dict[str, Any]:
    """A small JSON object from a file.

    Raises:
        ConfigError: a file that cannot be read, or holds something else.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            data = json.loads(file.read(1 << 20))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is not valid JSON"
        raise ConfigError(f"cannot read {path.name!r}: {reason}; give a JSON file") from error
    if not isinstance(data, dict):
        raise ConfigError(f'{path.name!r} holds no JSON object; give a file such as {{"method": "clear"}}')
    return data


def _text(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2) + "\n"
