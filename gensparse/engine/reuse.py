"""Requests from outside: what the metadata of a picture or a file of unknown origin may decide."""

from collections.abc import Mapping
from typing import Any

from gensparse.errors import ConfigError
from gensparse.models import looks_like_path
from gensparse.request import UpscaleRequest, request_from_dict

UNTRUSTED = ("trust_remote_code", "device", "offload", "max_vram", "local_files_only", "token", "image")
"""Fields of a request that a stranger's file may not decide: they name this machine, its files or its secrets."""

FILES_OF_METHODS = ("weights", "profile")
"""Settings of methods that name a file or a repository to load."""


def request_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The checked request of a picture's metadata, without what a stranger's file must not decide.

    Raises:
        ConfigError: a request that names a model by a path, or one that is not valid.
    """
    data = dict(metadata["request"])
    if metadata.get("prompt_omitted"):
        data.pop("prompt", None)
    kept = {k: v for k, v in data.items() if k not in UNTRUSTED}
    if isinstance(kept.get("model"), str) and looks_like_path(kept["model"]):
        raise ConfigError("the request names a model by a path, which is not followed; name the model with -m")
    probe = {**kept, "image": "x"} if kept.get("kind") == UpscaleRequest.kind else kept
    checked = request_from_dict(probe).to_dict()
    return {k: checked[k] for k in kept if k not in ("kind", "version")}


def without_files(attention: str) -> tuple[str, tuple[str, ...]]:
    """The text of a method without settings that name files or repositories, and the names of those settings.

    Raises:
        ConfigError: text that names no method.
    """
    if attention in ("auto", "dense"):
        return attention, ()
    from gensparse.methods import parse_method
    from gensparse.methods.describe import method_text

    found: list[str] = []
    method = parse_method(attention)
    kept = _stripped(method.to_dict(), method.name, found)
    return (method_text(kept), tuple(found)) if found else (attention, ())


def _stripped(data: Any, where: str, found: list[str]) -> Any:
    """A method as data without files, also inside the phases of a schedule; `found` collects what was left out."""
    if isinstance(data, list):
        return [_stripped(item, where, found) for item in data]
    if not isinstance(data, Mapping):
        return data
    name = str(data.get("method", where))
    out = {}
    for key, value in data.items():
        if key in FILES_OF_METHODS and value is not None:
            found.append(f"{key} of {name}")
        else:
            out[key] = _stripped(value, name, found)
    return out
