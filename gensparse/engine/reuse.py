"""Requests from outside: what the metadata of a picture or a file of unknown origin may decide."""

import json
from collections.abc import Mapping
from typing import Any

from gensparse.errors import ConfigError
from gensparse.models import looks_like_path
from gensparse.request import CustomizeRequest, UpscaleRequest, request_from_dict

UNTRUSTED = (
    "trust_remote_code",
    "device",
    "offload",
    "max_vram",
    "local_files_only",
    "token",
    "image",
    "mask",
    "subject",
)
"""Fields of a request that a stranger's file may not decide: they name this machine, its files or its secrets."""

FILES_OF_METHODS = ("weights", "profile", "regions", "mask")
"""Settings of methods that may name a file or a repository; where they are text, they do."""


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
    if kept.get("kind") == CustomizeRequest.kind:
        subjects = data.get("subject", ())
        if isinstance(subjects, list | tuple) and not any("=" in str(item) for item in subjects):
            kept["subject"] = list(subjects)  # words name no files
        probe = {**kept, "subject": subjects}
    checked = request_from_dict(probe).to_dict()
    return {k: checked[k] for k in kept if k not in ("kind", "version")}


def without_files(attention: str) -> tuple[str, tuple[str, ...]]:
    """The text of a method without settings that name files or repositories, and the names of those settings.

    Nothing is opened on the way: the text is cut before a method is made of it.

    Raises:
        ConfigError: text that names no method, or that is none without those settings.
    """
    if attention in ("auto", "dense"):
        return attention, ()
    from gensparse.methods import parse_method

    found: list[str] = []
    kept = _cut(attention, found)
    parse_method(kept)
    return (kept, tuple(found)) if found else (attention, ())


def _cut(text: str, found: list[str]) -> str:
    """The text of a method, or "dense", without files; `found` collects what was left out."""
    from gensparse.methods import method_class

    name, _, rest = (part.strip() for part in text.partition(":"))
    if name == "dense":
        return text
    own = method_class(name).read_text(rest)
    if rest.startswith("{"):
        return f"{name}:{json.dumps(_cut_data(own, name, found), ensure_ascii=False)}"
    if own is None:
        kept = ",".join(item for item in map(str.strip, rest.split(",")) if item and not _is_file(item, name, found))
    elif name == "schedule":
        kept = ";".join(f"{start}={_cut(str(what), found)}" for start, what in own.get("phases", ()))
    else:
        kept = ";".join(_cut(str(method), found) for method in own.get("methods", ()))
    return f"{name}:{kept}" if kept else name


def _is_file(item: str, name: str, found: list[str]) -> bool:
    """Whether key=value names a file, also inside the text of a method with ";" for ","."""
    from gensparse.methods import METHODS, parse_value

    key, _, value = (part.strip() for part in item.partition("="))
    if key in FILES_OF_METHODS and isinstance(parse_value(value), str):
        found.append(f"{key} of {name}")
        return True
    if value.partition(":")[0].strip() in METHODS:
        inside: list[str] = []
        _cut(value.replace(";", ","), inside)
        found += inside
        return bool(inside)
    return False


def _cut_data(data: Any, name: str, found: list[str]) -> Any:
    """The same for settings as JSON data."""
    from gensparse.methods import METHODS

    if isinstance(data, list):
        return [_cut_data(item, name, found) for item in data]
    if isinstance(data, str) and data.partition(":")[0].strip() in METHODS:
        return _cut(data, found)
    if not isinstance(data, Mapping):
        return data
    name = str(data.get("method", name))
    out = {}
    for key, value in data.items():
        if key in FILES_OF_METHODS and isinstance(value, str):
            found.append(f"{key} of {name}")
        else:
            out[key] = _cut_data(value, name, found)
    return out
