"""Pipelines in diffusers' manner, one readable file each; they load on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "FluxHighresPipeline": "gensparse.pipelines.flux_highres",
    "SD15HighresPipeline": "gensparse.pipelines.sd15_highres",
    "SDXLHighresPipeline": "gensparse.pipelines.sdxl_highres",
}

__all__ = ["FluxHighresPipeline", "SD15HighresPipeline", "SDXLHighresPipeline"]

if TYPE_CHECKING:
    from gensparse.pipelines.flux_highres import FluxHighresPipeline
    from gensparse.pipelines.sd15_highres import SD15HighresPipeline
    from gensparse.pipelines.sdxl_highres import SDXLHighresPipeline


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'gensparse.pipelines' has no attribute {name!r}")
