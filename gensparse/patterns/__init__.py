"""Attention patterns: pure geometry, as frozen values that combine with | and &."""

from gensparse.patterns.base import FULL, NONE, PARTIAL, Intersection, Pattern, PerHead, Rule, Source, Union
from gensparse.patterns.blocks import MSW, Blocks, Grid, Halo, LongDistance
from gensparse.patterns.box import Box
from gensparse.patterns.cross import CrissCross, Stripes
from gensparse.patterns.disc import Disc
from gensparse.patterns.neighborhood import Neighborhood
from gensparse.patterns.pooled import HiLo, Pooled, Proxy, Pyramid, VaryingWindow
from gensparse.patterns.references import Reference, References
from gensparse.patterns.regions import Regions
from gensparse.patterns.segments import Isolation, KeyMask, Policy, QueryMask, Text

__all__ = [
    "FULL",
    "MSW",
    "NONE",
    "PARTIAL",
    "Blocks",
    "Box",
    "CrissCross",
    "Disc",
    "Grid",
    "Halo",
    "HiLo",
    "Intersection",
    "Isolation",
    "KeyMask",
    "LongDistance",
    "Neighborhood",
    "Pattern",
    "PerHead",
    "Policy",
    "Pooled",
    "Proxy",
    "Pyramid",
    "QueryMask",
    "Reference",
    "References",
    "Regions",
    "Rule",
    "Source",
    "Stripes",
    "Text",
    "Union",
    "VaryingWindow",
]
