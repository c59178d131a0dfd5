"""The cases: a pattern on a layout, by name, and the suite each belongs to."""

from dataclasses import dataclass

import numpy as np

from gensparse.errors import ConfigError, unknown_name
from gensparse.layout import Layout, Segment
from gensparse.patterns import Disc, Neighborhood, Pattern, Radial, Rule, Text
from gensparse.patterns.base import NO_DATA, RUNS, Data
from gensparse.patterns.blockmask import BlockMaskRule

SUITES = ("kernels", "cpu")


@dataclass(frozen=True)
class BenchCase:
    """What is measured.

    Args:
        name: as typed.
        suite: "kernels" (GPU) or "cpu".
        pattern, layout: of the attention call; batch 1.
        heads, dim: H and D.
        small, small_pattern: the same in small for the correctness stage: awkward sides, few enough tokens for a dense
            mask, windows that do not cover the grid.
        about: where the case comes from.
    """

    name: str
    suite: str
    pattern: Pattern
    layout: Layout
    heads: int
    dim: int
    small: Layout
    small_pattern: Pattern
    about: str = ""


_CASES: dict[str, BenchCase] = {}


def register_case(
    name: str,
    *,
    suite: str,
    pattern: Pattern,
    layout: Layout,
    heads: int,
    dim: int,
    small: Layout | None = None,
    small_pattern: Pattern | None = None,
    about: str = "",
) -> BenchCase:
    """Add a case; see `BenchCase`.

    Raises:
        ConfigError: the name is taken, or the suite unknown.
    """
    if name in _CASES:
        raise ConfigError(f"benchmark case {name!r} exists; choose another name")
    if suite not in SUITES:
        raise ConfigError(f"suite {suite!r} is unknown; use {' or '.join(SUITES)}")
    tiny = small or _small(layout)
    case = BenchCase(name, suite, pattern, layout, heads, dim, tiny, small_pattern or pattern.clamped(tiny.grid), about)
    _CASES[name] = case
    return case


def cases(suite: str, names: tuple[str, ...] = ()) -> list[BenchCase]:
    """The cases of a suite, or those named; a name may end in * . Raises ConfigError for names that do not exist."""
    own = {name: case for name, case in _CASES.items() if case.suite == suite}
    if not names:
        return list(own.values())
    found: dict[str, BenchCase] = {}
    for name in names:
        wanted = [known for known in own if known == name or (name.endswith("*") and known.startswith(name[:-1]))]
        if not wanted:
            raise ConfigError(unknown_name(f"case of `gensparse bench {suite}`", name, own))
        found.update({known: own[known] for known in wanted})
    return list(found.values())


def _small(layout: Layout) -> Layout:
    """A layout of the same kind with sides that no tile divides."""
    frames, height, width = layout.grid
    text = 21 if layout.tokens > frames * height * width else 0
    if frames > 1:
        return Layout.video(5, 13, 11, text=text)
    return Layout.image(27, 21, text=text)


# ------------------------------------------------------------------------------------------------------------- patterns
@dataclass(frozen=True)
class RandomTiles(Pattern):
    """Every query tile sees a share of the key tiles, drawn at random, all of them whole; for break-even curves.

    Args:
        density: share of the key tiles, at least one of them.
        tiles: tokens of a query tile and of a key tile.
        seed: of the draw.
    """

    density: float
    tiles: tuple[int, int] = (128, 64)
    seed: int = 0

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        rows, columns = (-(-layout.tokens // size) for size in self.tiles)
        count = max(1, round(self.density * columns))
        drawn = np.random.default_rng(self.seed).random((rows, columns)).argsort(axis=1)[:, :count]
        mask = np.zeros((rows, columns), np.bool_)
        np.put_along_axis(mask, drawn, True, axis=1)
        return BlockMaskRule(layout, np.arange(layout.tokens), self.tiles, mask, RUNS)


# ---------------------------------------------------------------------------------------------------------------- cases
def _register_kernels() -> None:
    for size, name in ((128, "2k"), (256, "4k"), (512, "8k")):
        for radius in (8, 16, 32):
            register_case(
                f"flux{name}_clear_r{radius}",
                suite="kernels",
                pattern=Disc(radius) | Text(),
                layout=Layout.image(size, size, text=512),
                heads=24,
                dim=128,
                small_pattern=Disc(min(radius, 12)) | Text(),
                about=f"FLUX at {size * 16} pixels, CLEAR radius {radius}, 512 text tokens",
            )
    register_case(
        "flux4k_na80",
        suite="kernels",
        pattern=Neighborhood(80),
        layout=Layout.image(256, 256),
        heads=24,
        dim=128,
        small_pattern=Neighborhood((9, 8)),
        about="80x80 neighborhood on 256x256, the case NATTEN publishes for the H100",
    )
    wan = Layout.video(21, 45, 80)
    for decay in (0.2, 1.0):
        register_case(
            f"wan720_radial_{decay}",
            suite="kernels",
            pattern=Radial(decay=decay),
            layout=wan,
            heads=40,
            dim=128,
            small=Layout.video(13, 9, 7),
            small_pattern=Radial(decay=decay, block=16),
            about=f"Wan 2.1 14B, 720p, 81 frames, Radial decay {decay}, block 128",
        )
    register_case(
        "wan720_window",
        suite="kernels",
        pattern=Neighborhood((9, 24, 24)),
        layout=wan,
        heads=40,
        dim=128,
        small_pattern=Neighborhood((3, 6, 5)),
        about="Wan 2.1 14B, 720p, 81 frames, window 9x24x24",
    )
    register_case(
        "sdxl4k_disc_r16",
        suite="kernels",
        pattern=Disc(16),
        layout=Layout.image(256, 256),
        heads=10,
        dim=64,
        small_pattern=Disc(12),
        about="65536 tokens with head dimension 64 (SDXL's upper level at 4096 pixels)",
    )
    for percent in (100, 75, 60, 45, 30, 20, 10, 5, 2):
        register_case(
            f"density_{percent:03d}",
            suite="kernels",
            pattern=RandomTiles(percent / 100),
            layout=Layout((Segment("target", 1 << 15, (1, 1, 1 << 15)),)),
            heads=16,
            dim=128,
            small=Layout((Segment("target", 641, (1, 1, 641)),)),
            about=f"random whole tiles, density {percent / 100}",
        )


def _register_cpu() -> None:
    for side in (64, 128, 256):
        layout = Layout.image(side, side)
        for radius in (8, 16):
            register_case(
                f"cpu{side * side}_disc_r{radius}",
                suite="cpu",
                pattern=Disc(radius),
                layout=layout,
                heads=4,
                dim=64,
                small_pattern=Disc(min(radius, 9)),
                about=f"{side}x{side} tokens, disc of radius {radius}",
            )
        if side >= 80:
            register_case(
                f"cpu{side * side}_na80",
                suite="cpu",
                pattern=Neighborhood(80),
                layout=layout,
                heads=4,
                dim=64,
                small_pattern=Neighborhood((9, 8)),
                about=f"{side}x{side} tokens, 80x80 neighborhood",
            )


_register_kernels()
_register_cpu()
