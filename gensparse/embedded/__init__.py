"""The embedded models: scene grammar, renderer, small FLUX and SDXL pipelines trained on them; loaded on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "load_embedded": "gensparse.embedded.loader",
    "embedded_path": "gensparse.embedded.loader",
    "embedded_notes": "gensparse.embedded.loader",
    "is_shipped": "gensparse.embedded.loader",
    "load_folder": "gensparse.embedded.loader",
    "SHIPPED": "gensparse.embedded.loader",
    "unknown_words": "gensparse.embedded.loader",
    "vocabulary": "gensparse.embedded.scenes",
}

__all__ = [
    "SHIPPED",
    "embedded_notes",
    "embedded_path",
    "is_shipped",
    "load_embedded",
    "load_folder",
    "unknown_words",
    "vocabulary",
]

if TYPE_CHECKING:
    from gensparse.embedded.loader import (
        SHIPPED,
        embedded_notes,
        embedded_path,
        is_shipped,
        load_embedded,
        load_folder,
        unknown_words,
    )
    from gensparse.embedded.scenes import vocabulary


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'gensparse.embedded' has no attribute {name!r}")
