"""Attention patterns: pure geometry, as frozen values that combine with | and &."""

from gensparse.patterns.aligned import Aligned
from gensparse.patterns.anchors import Anchors, AnchorStream
from gensparse.patterns.base import FULL, NONE, PARTIAL, Intersection, Pattern, PerHead, Rule, Source, Union
from gensparse.patterns.blocks import MSW, Blocks, Grid, Halo, LongDistance, double_windows
from gensparse.patterns.box import Box, InwardWindow, SlidingTiles
from gensparse.patterns.cross import CrissCross, Planes, Stripes
from gensparse.patterns.disc import Disc
from gensparse.patterns.neighborhood import Neighborhood
from gensparse.patterns.pooled import HiLo, Pooled, Proxy, Pyramid, VaryingWindow
from gensparse.patterns.radial import Radial
from gensparse.patterns.references import Reference, References
from gensparse.patterns.regions import Regions
from gensparse.patterns.routed import Clusters, PyramidBlocks, RoutedPattern, TopRegions
from gensparse.patterns.segments import Isolation, KeyMask, Policy, QueryMask, Text
from gensparse.patterns.target import TargetRule

__all__ = [
    "FULL",
    "MSW",
    "NONE",
    "PARTIAL",
    "Aligned",
    "AnchorStream",
    "Anchors",
    "Blocks",
    "Box",
    "Clusters",
    "CrissCross",
    "Disc",
    "Grid",
    "Halo",
    "HiLo",
    "Intersection",
    "InwardWindow",
    "Isolation",
    "KeyMask",
    "LongDistance",
    "Neighborhood",
    "Pattern",
    "PerHead",
    "Planes",
    "Policy",
    "Pooled",
    "Proxy",
    "Pyramid",
    "PyramidBlocks",
    "QueryMask",
    "Radial",
    "Reference",
    "References",
    "Regions",
    "RoutedPattern",
    "Rule",
    "SlidingTiles",
    "Source",
    "Stripes",
    "TargetRule",
    "Text",
    "TopRegions",
    "Union",
    "VaryingWindow",
    "double_windows",
]
