"""Methods in words: what each is, its settings, and the text that users type for it."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from gensparse.methods.base import Method


def describe(cls: type[Method]) -> dict[str, Any]:
    """A method as data.

    Returns:
        "name"; "summary", its first sentence or two; "about", the whole text without the settings; "paper", "licence",
        "use"; "text", what to type for the defaults; "defaults" {setting: value}; "settings" {setting: what it is};
        "presets" {model: its published settings as text}.
    """
    about, settings = docs(cls)
    defaults = {item.name: _default(item) for item in fields(cls) if item.init}
    return {
        "name": cls.name,
        "summary": about.split("\n\n", 1)[0].replace("\n", " "),
        "about": about,
        "paper": cls.paper,
        "licence": cls.licence,
        "use": cls.use,
        "text": method_text({"method": cls.name, **defaults}),
        "defaults": defaults,
        "settings": {name: settings[name] for name in defaults if name in settings},
        "presets": {model: method_text({"method": cls.name, **_lists(own)}) for model, own in cls.presets.items()},
    }


def method_text(data: Mapping[str, Any]) -> str:
    """The dictionary of a method as the text of `--attention`: {"method": "clear", "radius": 8} -> clear:radius=8.

    `parse_method` reads it back.
    """
    from gensparse.methods import METHODS

    settings, name = {k: v for k, v in data.items() if k not in ("method", "version")}, str(data.get("method", ""))
    own = METHODS[name].write_text(settings) if settings and name in METHODS else None
    items = ",".join(f"{name}={_setting(value)}" for name, value in settings.items()) if own is None else own
    return f"{name}:{items}" if items else name


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "x".join(map(_setting, value)) if isinstance(value, list) else "none" if value is None else str(value)


def _default(item: Any) -> Any:
    return _lists(item.default if item.default is not MISSING else item.default_factory())


def _lists(value: Any) -> Any:
    if isinstance(value, Method):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: _lists(part) for key, part in value.items()}
    return [_lists(part) for part in value] if isinstance(value, tuple) else value


def docs(cls: type) -> tuple[str, dict[str, str]]:
    """(what stands before `Args:` in the docstring of a dataclass, setting -> what stands there about it)."""
    head, _, rest = (inspect.getdoc(cls) or "").partition("\n\nArgs:\n")
    block = inspect.cleandoc(re.split(r"\n\n(?=\w+:\n)", rest)[0]) if rest else ""
    known = [item.name for item in fields(cls)]
    starts = list(re.finditer(r"^([\w, ]+): ", block, re.MULTILINE))
    found = {}
    for match, following in zip(starts, [*starts[1:], None], strict=False):
        text = " ".join(block[match.end() : following.start() if following else len(block)].split())
        found |= {name: text for name in re.split(r",\s*", match[1]) if name in known}
    return head.split("\n\nRaises:", 1)[0], found
