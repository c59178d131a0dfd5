"""Settings as text: numbers as typed, and JSON where they hold sentences or lists of objects."""

import json
from collections.abc import Mapping
from typing import Any

from gensparse.errors import ConfigError, short


def as_number(text: str) -> int | float | str:
    """A number as typed; what is none stays text, which is refused where the setting is checked."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


class JsonSettings:
    """For methods whose settings may be prompts, regions or words: `name:{"prompt": "a red car", ...}`.

    Settings that are plain keep the usual form.
    """

    @classmethod
    def read_text(cls, text: str) -> dict[str, Any] | None:
        """Settings from JSON; None for the usual form.

        Raises:
            ConfigError: damaged JSON.
        """
        if not text.lstrip().startswith("{"):
            return None
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(
                f"The settings {short(text)} are no JSON ({error}); close all brackets and quotes."
            ) from None
        return dict(data)

    @classmethod
    def write_text(cls, settings: Mapping[str, Any]) -> str | None:
        """JSON of the settings, or None where the usual form can hold them."""
        return None if all(map(_is_plain, settings.values())) else json.dumps(settings, ensure_ascii=False)


def _is_plain(value: Any) -> bool:
    from gensparse.methods import parse_value

    if isinstance(value, str):
        return bool(value) and value == value.strip() and not set(value) & set(",=;{}") and parse_value(value) == value
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(item, int | float) for item in value)
    return value is None or isinstance(value, int | float)
