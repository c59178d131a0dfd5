"""Settings out of a dropped picture. What it says is untrusted: checked field by field, and shown as text only."""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gensparse.app.forms import FIELDS
from gensparse.engine.reuse import UNTRUSTED, without_files
from gensparse.errors import ConfigError, short
from gensparse.image_io import read_metadata, read_parameters
from gensparse.models import looks_like_path
from gensparse.request import KINDS, VERSION, CustomizeRequest, GenerateRequest, Request, UpscaleRequest
from gensparse.subjects.naming import parse_subject

LIMIT = 64 << 10
"""Characters of metadata that are read."""

_MACHINE = "this machine decides it"
_BY_HAND = "choose it by hand"
_REASONS = {
    **{name: _MACHINE for name in UNTRUSTED if name != "subject"},  # of that the names are taken
    "trust_remote_code": "code of a model is trusted by hand only",
    "token": "secrets are never taken from a picture",
    "image": "a picture names no other file; drop that picture instead",
    "lora": _BY_HAND,
    "revision": _BY_HAND,
    "variant": _BY_HAND,
}
_OUTPUT = re.compile(r"(.*_)?(output|path|dir|folder|file|sidecar)s?(_.*)?")
_NAMED = 20  # entries that are named one by one
_LINE = 4096  # characters of the settings line of another tool
_PAIR = re.compile(r'([A-Za-z][\w ]{0,40}): *("(?:[^"\\]|\\.)*"|[^,]*)(?:, *|$)')


@dataclass(frozen=True)
class Reloaded:
    """What a picture gave.

    Args:
        kind: of the request, "generate", "upscale" or "customize".
        values: fields of the request that passed every check; all others keep what the page has.
        dropped: what was left out -> why.
        text: all of the metadata, made safe for showing as plain text.
        foreign: whether another tool wrote it.
    """

    kind: str
    values: Mapping[str, Any]
    dropped: Mapping[str, str]
    text: str
    foreign: bool = False

    @property
    def message(self) -> str:
        """One or more lines of plain text for the user."""
        usual = KINDS[self.kind].__dataclass_fields__
        given = [name for name, value in self.values.items() if value not in (usual[name].default, None, "", [])]
        taken = ", ".join(name.replace("_", " ") for name in given) or "nothing"
        lines = [f"Taken from the picture{' (another tool made it)' if self.foreign else ''}: {taken}."]
        named = list(self.dropped.items())
        lines += [f"Left out: {plain(name, 40)} ({reason})." for name, reason in named[:_NAMED]]
        lines += [f"Left out: {len(named) - _NAMED} more."] if len(named) > _NAMED else []
        return "\n".join(lines)


def reload(
    path: str | Path,
    *,
    models: Collection[str] | None = None,
    fields: Mapping[str, Collection[str]] | None = None,
) -> Reloaded:
    """Read the settings of a PNG, JPEG, WebP or TIFF.

    Args:
        models: names that may be taken over; None for every alias and hub id, never for paths.
        fields: kind of request -> fields that the page has; None for all of them.

    Raises:
        ConfigError: no picture, no settings in it, or more of them than `LIMIT`; file names stand without folders.
    """
    try:
        return _of_page(_reload(path, models), fields)
    except ConfigError as error:
        raise ConfigError(str(error).replace(str(path), Path(path).name)) from None


def _of_page(found: Reloaded, fields: Mapping[str, Collection[str]] | None) -> Reloaded:
    """Without what the page has no field for; that is named where it is not what a request has anyway."""
    if fields is None:
        return found
    own = fields.get(found.kind, ())
    usual = KINDS[found.kind].__dataclass_fields__
    gone = {key: value for key, value in found.values.items() if key not in own}
    told = [key for key, value in gone.items() if value not in (usual[key].default, None, [], "none", 0)]
    values = {key: value for key, value in found.values.items() if key in own}
    return replace(
        found, values=values, dropped={**found.dropped, **dict.fromkeys(told, "this page has no field for it")}
    )


def _reload(path: str | Path, models: Collection[str] | None) -> Reloaded:
    try:
        metadata = read_metadata(path, limit=LIMIT)
    except ConfigError as error:
        text = read_parameters(path)
        values, rest = parse_parameters(text) if text is not None and len(text) <= LIMIT else ({}, ())
        if text is None or not values:
            raise error
        accepted, dropped = checked(GenerateRequest, values)
        dropped |= dict.fromkeys(map(plain, rest), "only prompt, steps, seed and size are taken from other tools")
        return Reloaded(GenerateRequest.kind, accepted, dropped, plain(text, LIMIT, lines=True), foreign=True)
    request = metadata["request"]
    kind = request.get("kind", GenerateRequest.kind)
    if not isinstance(kind, str) or kind not in FIELDS:
        raise ConfigError(f"the picture was made by {short(kind)}, which this page has no form for")
    if request.get("version", VERSION) != VERSION:
        raise ConfigError(f"the picture's settings have version {short(request['version'])}; update gensparse")
    values, dropped = _sorted(KINDS[kind], request, metadata, models)
    accepted, wrong = checked(KINDS[kind], values)
    text = json.dumps(metadata, indent=2, ensure_ascii=False)
    return Reloaded(kind, accepted, dropped | wrong, plain(text, 4 * LIMIT, lines=True))


def _sorted(
    cls: type[Request], request: Mapping[str, Any], metadata: Mapping[str, Any], models: Collection[str] | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """(fields to check, what is left out and why); settings that say nothing, such as false, are not named."""
    kept: dict[str, Any] = {}
    dropped: dict[str, str] = {}
    for key, value in request.items():
        if key in ("kind", "version") or (key == "prompt" and metadata.get("prompt_omitted")):
            continue
        reason = _REASONS.get(key)
        if reason is None and key not in cls.__dataclass_fields__:
            reason = "where files are is never taken from a picture" if _OUTPUT.fullmatch(key) else "not a setting"
        if reason is None and key == "model":
            reason = _why_not_model(value, models)
        if reason is None:
            kept[key] = value
        elif value not in (None, False, "", []):
            dropped[key] = reason
    if "subject" in kept:
        kept["subject"] = _names(kept["subject"])
        dropped["pictures of subjects"] = "files are chosen by hand; upload them again"
    if isinstance(kept.get("attention"), str):
        try:
            kept["attention"], files = without_files(kept["attention"])
            dropped |= dict.fromkeys(files, "files are chosen by hand")
        except ConfigError as error:
            dropped["attention"] = plain(str(error), 200)
            del kept["attention"]
    return kept, dropped


def _names(subjects: Any) -> list[str]:
    """The names of subjects without their files; none of what is no list of subjects."""
    try:
        return list(CustomizeRequest(subject=[parse_subject(text)[0] for text in subjects]).subject)
    except (ConfigError, AttributeError, TypeError):
        return []


def _why_not_model(value: Any, models: Collection[str] | None) -> str | None:
    if not isinstance(value, str) or not 0 < len(value) <= 200:
        return "not a name"
    if looks_like_path(value):
        return "models are never loaded by a path from a picture"
    return "this page does not offer that model" if models is not None and value not in models else None


def checked(cls: type[Request], values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """(what the request's own checks accept, in their form; what they refuse, with their words)."""
    accepted: dict[str, Any] = {}
    refused: dict[str, str] = {}
    own: dict[str, Any] = {"image": "x"} if cls is UpscaleRequest else {}
    if cls is CustomizeRequest:
        own = {"subject": values.get("subject") or ["x"]}
    for key, value in values.items():
        try:
            read = getattr(cls(**{**own, key: value}), key)
        except (ConfigError, TypeError, ValueError) as error:
            refused[key] = plain(str(error), 200)
        else:
            accepted[key] = list(read) if isinstance(read, tuple) else read
    return accepted, refused


def parse_parameters(text: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Prompt, steps, seed and size from the text of stable-diffusion-webui, and the names of what else it says.

    Only the plain form is read: the prompt, "Negative prompt: ...", and a last line "Steps: 20, Seed: 1, ...". ({}, ())
    for anything else.
    """
    lines = text.strip().splitlines()
    if not lines or len(lines[-1]) > _LINE or not re.match(r"Steps: \d{1,6}(,|$)", lines[-1]):
        return {}, ()
    pairs = dict(_PAIR.findall(lines[-1]))
    out: dict[str, Any] = {}
    for name, key in (("Steps", "steps"), ("Seed", "seed")):
        if re.fullmatch(r"\d{1,20}", pairs.get(name, "")):
            out[key] = int(pairs[name])
    if re.fullmatch(r"\d{1,6}x\d{1,6}", pairs.get("Size", "")):
        out["size"] = pairs["Size"]
    end = next((n for n, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines) - 1)
    prompt = "\n".join(lines[:end]).strip()
    tags = re.compile(r"<\w{1,20}:[^<>]{0,200}>")  # <lora:name:1> and the like
    rest = [name for name in pairs if name not in ("Steps", "Seed", "Size", "Version")]
    rest += ["Negative prompt"] if end < len(lines) - 1 else []
    rest += tags.findall(prompt)
    plain_prompt = tags.sub("", prompt).strip()
    return ({"prompt": plain_prompt} if plain_prompt else {}) | out, tuple(rest)


def plain(text: str, longest: int = 80, *, lines: bool = False) -> str:
    """Untrusted text for showing as text: no control or direction characters, and not too long."""
    cut = text if len(text) <= longest else text[: longest - 1] + "…"
    return "".join(c if c.isprintable() or (lines and c == "\n") else repr(c)[1:-1] for c in cut)
