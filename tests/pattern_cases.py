"""Small layouts and patterns shared by the property tests."""

from collections.abc import Callable

import numpy as np

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
    InwardWindow,
    Isolation,
    KeyMask,
    LongDistance,
    Neighborhood,
    Pattern,
    PerHead,
    Planes,
    Policy,
    Pooled,
    Proxy,
    Pyramid,
    QueryMask,
    Radial,
    Reference,
    References,
    Regions,
    SlidingTiles,
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
    Planes(),
    Box(2, border="shift"),
    Box(1, border="wrap"),
    Box(2, border="wrap"),
    InwardWindow(1),
    InwardWindow((2, 0)),
    SlidingTiles(3, 2),
    SlidingTiles(2, 3),
    SlidingTiles(None, 1),
    Radial(block=4),
    Radial(0.5, block=3, sink=False),
    Radial(block=7, near_window="half"),
    *(MSW(index) for index in range(4)),
]

# key boxes of these only cover the visible keys
ROUGH_BOXES = [pattern for pattern in GEOMETRIC if isinstance(pattern, Radial)]

COMPOSED: list[Pattern] = [
    Disc(3) | Text(),
    Text() | Pooled(2, weights="mean"),
    Disc(2) | Text() | Pooled(2, weights="mean") | Pooled(3, weights="mean", bias="log_count"),
    (Blocks(4) | Blocks(4, shift=2)) & Box(3),
    Box(2) & Grid(3),
    PerHead((Stripes(2, "horizontal"), Stripes(2, "vertical"))) | Text(),
    PerHead((Radial(block=8) | Pooled(2, weights="mean"), Disc(3), Neighborhood(3, stride=2))) | Text(),
    Radial(block=5) & Box(3),
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


# Patterns that name arrays, on a layout with two references: text 5, target, a register, padding.
REFERENCES = {"cat": (1, 3, 5), "dog": (2, 2, 3)}
SOURCES = (Reference("fox", (4, 5), bias=1.5, keys="fox", queries="left"), Reference("owl", length=7, keys="owl"))
CAT_AND_DOG = (Reference("cat", keys="cat", queries="left"), Reference("dog", queries="right"))
OWN = Policy((("target", "target"),))
ITSELF = Policy((("target", "target"), ("reference", "itself"), ("text", "cat"), ("pad", "register")))

CONTENT: list[Pattern] = [
    OWN,
    ITSELF,
    References(CAT_AND_DOG),
    References(SOURCES),
    References((*SOURCES, Reference("fox", (4, 5), bias=1.5, queries="right"), *CAT_AND_DOG)),
    References((Reference("dog", keys="dog", queries="cat"),), queries="cat"),
    Isolation("groups"),
    Isolation("few"),
    KeyMask("left"),
    KeyMask("dog", "dog"),
    QueryMask("right"),
    Regions((2, 3), "regions"),
    Regions((2, 2, 1), "regions", background=True),
]

COMPOSED_CONTENT: list[Pattern] = [
    OWN & Isolation("groups") | References(SOURCES),
    (OWN | References(SOURCES)) & Isolation("few") & QueryMask("right") & KeyMask("left"),
    Regions((2, 3), "regions") & (Disc(3) | Text()),
    (Blocks(3) | Text() | Pooled(2, weights="mean")) & Isolation("few"),
    (Isolation("groups") | Isolation("few")) & (Box(2) | References(SOURCES)),
    PerHead((Disc(3), OWN | References(SOURCES), ITSELF & Isolation("few") | References(CAT_AND_DOG))) | Text(),
    PerHead((Isolation("few"), QueryMask("left"))) & (OWN | Pooled(2, weights="mean")),
]


def content_layout(grid: tuple[int, int, int]) -> Layout:
    """Everything the content patterns name."""
    target = Segment("target", grid[0] * grid[1] * grid[2], grid)
    pets = [Segment("reference", a * b * c, (a, b, c), name) for name, (a, b, c) in REFERENCES.items()]
    return Layout((Segment("text", 5), target, pets[0], Segment("register", 1), pets[1], Segment("pad", 2)))


def content_data(layout: Layout, seed: int = 0) -> dict[str, np.ndarray]:
    """Blobs, noise, and masks of ones or zeros, under the names of `CONTENT`."""
    rng = np.random.default_rng(seed)
    grid = layout.grid
    make: list[Callable[[tuple[int, ...]], np.ndarray]] = [
        lambda shape: rng.random(shape) < 0.5,
        lambda shape: np.indices(shape).sum(0) < sum(shape) // 2,
        lambda shape: np.full(shape, rng.random() < 0.5),
    ]

    def mask(*shape: int) -> np.ndarray:
        return make[rng.integers(len(make))](shape)

    return {
        "left": mask(*grid),
        "right": mask(grid[0] * grid[1] * grid[2]).astype(np.uint8),
        "cat": mask(*REFERENCES["cat"][1:]),
        "dog": mask(*REFERENCES["dog"]).astype(np.float32),
        "fox": mask(4, 5),
        "owl": mask(7),
        "groups": rng.integers(0, 70, grid),
        "few": mask(*grid) + 2 * mask(*grid).astype(np.uint8),
        "regions": np.stack([mask(*grid), mask(*grid)]),
    }
