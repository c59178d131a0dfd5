"""Sana, its ControlNet and its video model: their self-attention is linear, so no pattern can make it sparse."""

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from gensparse.errors import ConfigError
from gensparse.families.base import Family, TensorMemo


def _refuse() -> NoReturn:
    raise ConfigError(
        "Sana cannot be made sparse: its self-attention is linear, a sum over all keys without a softmax, which has no "
        "pairs of tokens to leave out; run it as it is, or choose another model."
    )


def sites(_model: Any, _names: Iterable[str]) -> NoReturn:
    """ConfigError."""
    _refuse()


def read_layouts(_model: Any, _bound: Mapping[str, Any], _memo: TensorMemo) -> NoReturn:
    """ConfigError."""
    _refuse()


def layout_for(_height: int, _width: int, **_sizes: Any) -> NoReturn:
    """ConfigError."""
    _refuse()


def native_tokens(_model: Any, _scheduler_config: Mapping[str, Any] | None = None) -> NoReturn:
    """ConfigError."""
    _refuse()


FAMILY = Family("Sana", sites, read_layouts, layout_for, native_tokens)
