"""Checks of method settings: every refusal names the setting, its value and what is allowed."""

from typing import Any

from gensparse.errors import ConfigError


def whole(method: str, name: str, value: Any, low: int = 1) -> None:
    """ConfigError unless `value` is an integer (no bool) of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{method} {name}={value!r} is not allowed; pass an integer of at least {low}.")


def flag(method: str, name: str, value: Any) -> None:
    """ConfigError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{method} {name}={value!r} is not allowed; pass true or false.")


def one_of(method: str, name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """ConfigError unless `value` is one of `allowed`."""
    if not any(type(value) is type(entry) and value == entry for entry in allowed):
        raise ConfigError(f"{method} {name}={value!r} is not allowed; pass one of {', '.join(map(repr, allowed))}.")


def all_frames(value: Any, whole: Any) -> Any:
    """A setting for the axes (F, H, W) of a clip: one given for (H, W) takes `whole` for the frames."""
    return (whole, *value) if isinstance(value, tuple) and len(value) == 2 else value
