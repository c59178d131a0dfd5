"""Pipelines in diffusers' manner, one readable file each; they load on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_EXPORTS = {"FluxHighresPipeline": "gensparse.pipelines.flux_highres"}

__all__ = ["FluxHighresPipeline"]

if TYPE_CHECKING:
    from gensparse.pipelines.flux_highres import FluxHighresPipeline


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'gensparse.pipelines' has no attribute {name!r}")
