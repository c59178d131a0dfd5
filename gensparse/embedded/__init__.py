"""The embedded model: scene grammar, renderer, and a small FLUX pipeline trained on them; loaded on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "load_embedded": "gensparse.embedded.loader",
    "embedded_path": "gensparse.embedded.loader",
    "embedded_notes": "gensparse.embedded.loader",
    "unknown_words": "gensparse.embedded.loader",
    "vocabulary": "gensparse.embedded.scenes",
}

__all__ = ["embedded_notes", "embedded_path", "load_embedded", "unknown_words", "vocabulary"]

if TYPE_CHECKING:
    from gensparse.embedded.loader import embedded_notes, embedded_path, load_embedded, unknown_words
    from gensparse.embedded.scenes import vocabulary


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'gensparse.embedded' has no attribute {name!r}")
