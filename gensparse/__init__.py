"""Sparse attention and high-resolution generation for diffusers; public names load on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> module that defines it; no name may equal a submodule name
_EXPORTS = {
    "apply": "gensparse.attach",
    "remove": "gensparse.attach",
    "applied": "gensparse.attach",
    "compile_blocks": "gensparse.attach",
    "make_processors": "gensparse.attach",
    "Handle": "gensparse.attach",
    "sparse_attention": "gensparse.attention",
    "backends": "gensparse.attention",
    "explain": "gensparse.attention",
    "length_bias": "gensparse.attention",
    "build_plan": "gensparse.plan",
    "Plan": "gensparse.plan",
    "RouteContext": "gensparse.plan",
    "RoutedPlan": "gensparse.plan",
    "Layout": "gensparse.layout",
    "Segment": "gensparse.layout",
    "Concept": "gensparse.subjects.cast",
    "Reference": "gensparse.subjects.references",
    "Region": "gensparse.subjects.areas",
    "Regions": "gensparse.subjects.areas",
    "Subjects": "gensparse.subjects.cast",
    "load_embedded": "gensparse.embedded",
    "GensparseError": "gensparse.errors",
    "ConfigError": "gensparse.errors",
}

__all__ = [
    "Concept",
    "ConfigError",
    "GensparseError",
    "Handle",
    "Layout",
    "Plan",
    "Reference",
    "Region",
    "Regions",
    "RouteContext",
    "RoutedPlan",
    "Segment",
    "Subjects",
    "__version__",
    "applied",
    "apply",
    "backends",
    "build_plan",
    "compile_blocks",
    "explain",
    "length_bias",
    "load_embedded",
    "make_processors",
    "remove",
    "sparse_attention",
]

if TYPE_CHECKING:
    from gensparse.attach import Handle, applied, apply, compile_blocks, make_processors, remove
    from gensparse.attention import backends, explain, length_bias, sparse_attention
    from gensparse.embedded import load_embedded
    from gensparse.errors import ConfigError, GensparseError
    from gensparse.layout import Layout, Segment
    from gensparse.plan import Plan, RouteContext, RoutedPlan, build_plan
    from gensparse.subjects.areas import Region, Regions
    from gensparse.subjects.cast import Concept, Subjects
    from gensparse.subjects.references import Reference


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'gensparse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
