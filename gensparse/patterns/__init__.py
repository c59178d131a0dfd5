"""Attention patterns: pure geometry, as frozen values."""

from gensparse.patterns.base import FULL, NONE, PARTIAL, Intersection, Pattern, PerHead, Rule, Source, Union
from gensparse.patterns.disc import Disc
from gensparse.patterns.segments import Text

__all__ = [
    "FULL",
    "NONE",
    "PARTIAL",
    "Disc",
    "Intersection",
    "Pattern",
    "PerHead",
    "Rule",
    "Source",
    "Text",
    "Union",
]
