"""Small layouts and patterns shared by the property tests."""

from gensparse.layout import Layout, Segment
from gensparse.patterns import (
    MSW,
    Blocks,
    Box,
    CrissCross,
    Disc,
    Grid,
    Halo,
    HiLo,
    LongDistance,
    Neighborhood,
    Pattern,
    PerHead,
    Pooled,
    Proxy,
    Pyramid,
    Stripes,
    Text,
    VaryingWindow,
)

GRIDS = [(1, 1, 1), (1, 1, 13), (1, 7, 1), (1, 7, 11), (1, 8, 12), (3, 1, 5), (2, 5, 7), (5, 3, 4)]

# relations of these are exact, not merely sound
GEOMETRIC: list[Pattern] = [
    Disc(1),
    Disc(3),
    Disc(30),
    Box(1),
    Box(3),
    Box(40),
    Neighborhood(3),
    Neighborhood(4, stride=3),
    Neighborhood(3, dilation=2),
    Neighborhood(2, stride=2, dilation=4),
    Neighborhood(5, stride=2, causal=True),
    Neighborhood(3, stride=2, dilation=2, causal=True),
    Neighborhood(None),
    Neighborhood(None, dilation=3),
    Blocks(4),
    Blocks(5, shift=2),
    Blocks(4, shift=3, wrap=True),
    Blocks(None),
    Halo(4, 2),
    Halo(3, 0),
    Grid(3),
    Grid(4),
    LongDistance(2, 3),
    LongDistance(3, 2),
    Stripes(2, "horizontal"),
    Stripes(3, "vertical"),
    CrissCross(),
    *(MSW(index) for index in range(4)),
]

COMPOSED: list[Pattern] = [
    Disc(3) | Text(),
    Text() | Pooled(2, weights="mean"),
    Disc(2) | Text() | Pooled(2, weights="mean") | Pooled(3, weights="mean", bias="log_count"),
    (Blocks(4) | Blocks(4, shift=2)) & Box(3),
    Box(2) & Grid(3),
    PerHead((Stripes(2, "horizontal"), Stripes(2, "vertical"))) | Text(),
    PerHead((Disc(2) | Pooled(2, weights="mean"), Neighborhood(3), Blocks(3) & Disc(3))) | Text(),
    Proxy(4) | Text(),
    Proxy(3, shift=1) | Text(),
    Text() | Blocks(4) | Pooled(2, weights="mean", bias=0.5, shift=1, exclude=Blocks(4)),
    Pyramid((2, 4), (1, Disc(3))) | Text(),
    Pyramid((3,), (Neighborhood(3, dilation=2),)),
    VaryingWindow(2, 2) | Text(),
    VaryingWindow(3, 3),
    HiLo(3, heads=2, low_heads=1) | Text(),
]


def layouts(grid: tuple[int, int, int]) -> list[Layout]:
    """The grid alone, and among text, a register, a reference and padding."""
    target = Segment("target", grid[0] * grid[1] * grid[2], grid)
    mixed = (Segment("text", 3), target, Segment("register", 1), Segment("reference", 6, (1, 2, 3)), Segment("pad", 2))
    return [Layout((target,)), Layout(mixed)]
