"""Patterns as values (printing, hashing, errors, clamping) and the published counts and equivalences."""

import math

import numpy as np
import pytest
from pattern_cases import COMPOSED, GEOMETRIC, GRIDS, layouts

import gensparse.patterns as patterns
from gensparse.errors import ConfigError, PlanTooLargeError
from gensparse.layout import Coords, Layout, Segment
from gensparse.patterns import (
    MSW,
    Blocks,
    Box,
    CrissCross,
    Disc,
    Grid,
    Halo,
    LongDistance,
    Neighborhood,
    PerHead,
    Pooled,
    Stripes,
    Text,
)

ALL = [*GEOMETRIC, *COMPOSED]


def mask(pattern, *size: int, **extra) -> np.ndarray:
    return pattern.dense_mask(Layout.image(*size, **extra))[0]


@pytest.mark.parametrize("pattern", ALL, ids=repr)
def test_patterns_are_printable_hashable_values(pattern):
    again = eval(repr(pattern), vars(patterns))
    assert again == pattern
    assert hash(again) == hash(pattern)
    assert again.key() == pattern.key()


def test_keys_tell_patterns_apart():
    keys = {pattern.key() for pattern in ALL}
    assert len(keys) == len(ALL)
    assert (Disc(2) | Text()).key() != (Disc(2) & Text()).key()


def test_operators_flatten_and_keep_order():
    assert repr(Disc(2) | Box(3) | Text()) == "Disc(radius=2) | Box(radius=3) | Text()"
    assert repr((Disc(2) | Text()) & Box(3)) == "(Disc(radius=2) | Text()) & Box(radius=3)"
    assert (Disc(2) | (Box(3) | Text())) == ((Disc(2) | Box(3)) | Text())
    with pytest.raises(TypeError):
        Disc(2) | 3


def test_integers_of_numpy_and_lists_are_normalised():
    assert Neighborhood([np.int64(3), 5]) == Neighborhood((3, 5))
    assert Disc(np.int32(4)).key() == Disc(4).key()


BAD_NUMBERS = [0, -1, True, 1.0, 2.5, math.nan, "8", None, np.bool_(True)]


@pytest.mark.parametrize("value", BAD_NUMBERS, ids=repr)
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (Disc, "Disc radius"),
        (Box, "Box radius"),
        (lambda v: Box((2, v)), "Box radius"),
        (lambda v: Neighborhood(7, stride=v), "Neighborhood stride"),
        (lambda v: Neighborhood(7, dilation=v), "Neighborhood dilation"),
        (Grid, "Grid grid"),
        (lambda v: LongDistance(v, 2), "LongDistance group"),
        (lambda v: LongDistance(2, v), "LongDistance interval"),
        (Stripes, "Stripes width"),
        (Pooled, "Pooled cells"),
    ],
)
def test_bad_numbers_name_parameter_value_and_range(make, name, value):
    with pytest.raises(ConfigError, match=name) as caught:
        make(value)
    assert repr(value) in str(caught.value)
    assert "at least 1" in str(caught.value)


@pytest.mark.parametrize("value", [v for v in BAD_NUMBERS if v is not None], ids=repr)
@pytest.mark.parametrize("make", [Neighborhood, Blocks, lambda v: Blocks((4, v)), lambda v: Halo(v, 2)])
def test_bad_windows_are_refused_but_none_means_the_axis(make, value):
    with pytest.raises(ConfigError, match="at least 1"):
        make(value)
    make(None)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Blocks(4, shift=-1),
        lambda: Blocks(4, shift=4),
        lambda: Blocks((4, 6), shift=(0, 6)),
        lambda: Blocks(4, wrap=1),
        lambda: Halo(4, -1),
        lambda: Halo(4, True),
        lambda: Neighborhood(4, stride=5),
        lambda: Neighborhood((4, 8), stride=5),
        lambda: Neighborhood((4, 8), stride=(1, 2, 3)),
        lambda: Neighborhood(4, causal=1),
        lambda: Neighborhood(4, causal=()),
        lambda: Neighborhood(()),
        lambda: Neighborhood((1, 2, 3, 4)),
        lambda: MSW(4),
        lambda: MSW(-1),
        lambda: MSW(True),
        lambda: Stripes(2, "diagonal"),
        lambda: Pooled(2, weights="max"),
        lambda: Pooled(2, bias="count"),
        lambda: Pooled(2, name=3),
        lambda: PerHead(()),
        lambda: PerHead((Disc(2), 3)),
    ],
)
def test_impossible_settings_raise(make):
    with pytest.raises(ConfigError):
        make()


@pytest.mark.parametrize(
    "pattern",
    [
        Neighborhood((12, 8)),
        Neighborhood((4, 8), dilation=(3, 1)),
        Neighborhood(4, dilation=20),
        Neighborhood((3, 9, 9)),
        Neighborhood(None, dilation=30),
        Blocks(12),
        Blocks((None, 14)),
        Blocks(None, shift=11),
        Halo(12, 1),
        Grid(12),
        LongDistance(12, 1),
        LongDistance(1, 12),
        Stripes(12, "horizontal"),
        Stripes(14, "vertical"),
        Pooled(12, weights="mean"),
        Pooled(3),
    ],
    ids=repr,
)
def test_what_does_not_fit_the_grid_raises_when_bound_and_clamped_fits(pattern):
    layout = Layout.image(11, 13)
    with pytest.raises(ConfigError):
        pattern.bind(layout)
    if pattern != Pooled(3):
        pattern.clamped(layout.grid).bind(layout)


def test_a_tuple_must_name_every_axis_with_tokens():
    with pytest.raises(ConfigError, match="leaves out an axis"):
        Box((2, 2)).bind(Layout.video(3, 5, 5))
    with pytest.raises(ConfigError, match="leaves out an axis"):
        Neighborhood((2,)).clamped((1, 5, 5))
    Box((2, 2)).bind(Layout.image(5, 5))


def test_nested_or_unequal_menus_raise():
    menu = PerHead((Disc(2), Disc(3)))
    layout = Layout.image(4, 4)
    with pytest.raises(ConfigError, match="PerHead"):
        PerHead((menu, Disc(2))).bind(layout)
    with pytest.raises(ConfigError, match="PerHead"):
        (menu | PerHead((Disc(1),) * 3)).bind(layout)


def test_two_pools_of_one_name_raise_and_equal_pools_are_shared():
    layout = Layout.image(4, 4)
    with pytest.raises(ConfigError, match="share the name"):
        (Pooled(2, name="p") | Pooled(4, name="p")).bind(layout)
    assert len(PerHead((Pooled(2), Disc(2) | Pooled(2))).bind(layout).sources) == 1


def test_clamping_keeps_fitting_patterns_equal():
    layout = Layout.video(5, 7, 9)
    for pattern in [Neighborhood(3, stride=2), Blocks(3, shift=1), Halo(2, 1), Grid(2), LongDistance(2, 2)]:
        np.testing.assert_array_equal(pattern.clamped(layout.grid).dense_mask(layout), pattern.dense_mask(layout))


@pytest.mark.parametrize("pattern", [Neighborhood(64), Blocks(64, shift=7), Halo(64, 3), Grid(64), Disc(99), Box(99)])
def test_a_window_that_covers_the_grid_is_dense(pattern):
    for grid in GRIDS:
        assert pattern.clamped(grid).dense_mask(layouts(grid)[0]).all()


def test_dense_mask_refuses_large_sizes():
    with pytest.raises(PlanTooLargeError, match="build_plan"):
        Disc(8).dense_mask(Layout.image(256, 256))


# counts and equivalences


@pytest.mark.parametrize(("radius", "keys"), [(1, 1), (8, 193), (16, 793), (32, 3205)])
def test_interior_disc_sizes(radius, keys):
    layout = Layout.image(2 * radius + 1, 2 * radius + 1)
    centre = Coords(np.int64(0), np.array([0, radius, radius]))
    assert Disc(radius).bind(layout).allowed(centre, layout.coords()).sum() == keys


@pytest.mark.parametrize(("radius", "density"), [(8, 0.01827), (16, 0.02674), (32, 0.05861)])
def test_clear_density_at_4096_pixels(radius, density):
    """Counted from the rule: pairs at offset (dy, dx) occur (H - dy)(W - dx) times, doubled per sign."""
    side, text = 256, 512
    layout = Layout.image(side, side, text=text)
    rule = (Disc(radius) | Text()).bind(layout)
    coords = layout.coords()
    corner = Coords(np.int64(1), np.zeros(3, np.int64))
    near = rule.allowed(corner, coords)[text:].reshape(side, side)
    ways = np.where(np.arange(side) > 0, 2, 1) * (side - np.arange(side))
    pairs = (near * ways[:, None] * ways).sum() + text * (text + 2 * side * side)
    assert round(pairs / layout.tokens**2, 5) == density


@pytest.mark.parametrize("size", [(12, 10), (9, 14), (5, 5), (1, 17), (13, 1)])
@pytest.mark.parametrize("radius", [1, 3, 4])
def test_clear_pairs_equal_the_closed_form(size, radius):
    (height, width), text = size, 6
    offsets = np.arange(1 - radius, radius)
    inside = offsets[:, None] ** 2 + offsets**2 < radius**2
    ways = [np.maximum(length - abs(offsets), 0) for length in size]
    local = (inside * ways[0][:, None] * ways[1]).sum()
    expected = text * (text + height * width) + height * width * text + local
    assert mask(Disc(radius) | Text(), height, width, text=text).sum() == expected


@pytest.mark.parametrize("grid", [(1, 1, 23), (1, 11, 13), (4, 7, 9)])
def test_neighborhoods_hold_exactly_their_window(grid):
    rng = np.random.default_rng(0)
    for _ in range(20):
        window = tuple(int(rng.integers(1, length + 1)) for length in grid)
        dilation = tuple(int(rng.integers(1, length // w + 1)) for w, length in zip(window, grid, strict=True))
        stride = tuple(int(rng.integers(1, w + 1)) for w in window)
        seen = Neighborhood(window, stride, dilation).dense_mask(Layout.joint(grid))[0]
        assert (seen.sum(1) == math.prod(window)).all()
        assert seen.diagonal().all() or any(s > 1 for s in stride)


def test_neighborhood_equivalences():
    equal = np.testing.assert_array_equal
    equal(mask(Neighborhood(4, stride=4), 12, 16), mask(Blocks(4), 12, 16))
    equal(mask(Neighborhood(4, dilation=(3, 4)), 12, 16), mask(Grid(4), 12, 16))
    equal(mask(Neighborhood(4, stride=4, dilation=2), 16, 16), mask(LongDistance(4, 2), 16, 16))
    equal(mask(Neighborhood((2, None), stride=(2, 1)), 12, 12), mask(Stripes(2, "horizontal"), 12, 12))
    equal(mask(Neighborhood(None, stride=3), 11, 13), np.ones((143, 143), bool))
    interior = np.array([[4 <= y < 8 and 4 <= x < 12 for x in range(16)] for y in range(12)]).reshape(-1)
    equal(mask(Neighborhood(8, stride=4), 12, 16)[interior], mask(Halo(4, 2), 12, 16)[interior])


def test_classic_equivalences():
    equal = np.testing.assert_array_equal
    halves = Stripes(1, "horizontal") | Stripes(1, "vertical")
    equal(mask(halves, 10, 13), mask(CrissCross(), 10, 13))
    assert (mask(CrissCross(), 10, 13).sum(1) == 10 + 13 - 1).all()
    equal(mask(Halo(4, 0), 11, 13), mask(Blocks(4), 11, 13))
    equal(
        mask(Blocks(4, shift=1), 11, 13),
        mask(Blocks(4), 14, 16).reshape(14, 16, 14, 16)[3:, 3:, 3:, 3:].reshape(143, 143),
    )


@pytest.mark.parametrize("size", [(16, 16), (14, 10), (13, 18), (7, 5), (1, 9)])
@pytest.mark.parametrize("index", range(4))
def test_msw_has_four_windows_at_any_size(size, index):
    seen = mask(MSW(index), *size)
    windows = len(np.unique(seen, axis=0))
    assert windows == min(2, size[0]) * min(2, size[1])
    if size[0] % 2 == size[1] % 2 == 0:
        assert seen.mean() == 0.25


def test_disc_mask_is_symmetric_and_keeps_the_symmetries_of_the_grid():
    seen = mask(Disc(4), 11, 7)
    np.testing.assert_array_equal(seen, seen.T)
    turned = mask(Disc(4), 7, 11).reshape(7, 11, 7, 11).transpose(1, 0, 3, 2).reshape(77, 77)
    np.testing.assert_array_equal(seen, turned)
    flipped = seen.reshape(11, 7, 11, 7)[::-1, ::-1, ::-1, ::-1].reshape(77, 77)
    np.testing.assert_array_equal(seen, flipped)


def test_video_disc_is_a_ball_and_blocks_span_frames():
    layout = Layout.video(3, 4, 5)
    position = layout.coords().position
    distance = ((position[:, None] - position) ** 2).sum(-1)
    np.testing.assert_array_equal(Disc(2).dense_mask(layout)[0], distance < 4)
    block = position // 2
    np.testing.assert_array_equal(Blocks(2).dense_mask(layout)[0], (block[:, None] == block).all(-1))


def test_text_policy():
    """Text and registers see all own tokens and are seen by all; padding neither; pooled keys belong to the target."""
    kinds = ("text", "target", "register", "reference", "pad")
    layout = Layout(tuple(Segment(kind, 4, (1, 2, 2) if kind == "target" else None) for kind in kinds))
    seen = (Text() | Pooled(2)).dense_mask(layout)[0][::4]
    blocks = np.array([seen[:, 4 * i : 4 * i + 4].all(1) for i in range(5)]).T
    expected = [[1, 1, 1, 1, 0], [1, 0, 1, 0, 0], [1, 1, 1, 1, 0], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(blocks, np.array(expected, bool))
    np.testing.assert_array_equal(seen[:, 20:], np.array([[0], [1], [0], [0], [0]], bool))


def test_pooled_source_describes_its_cells():
    rule = (Disc(2) | Pooled((2, 3), weights="mean", bias="log_count")).bind(Layout.image(5, 6, text=2))
    (source,) = rule.sources
    assert rule.key_segments[-1] == source.segment
    assert (source.segment.grid, source.cells, source.of, source.bias) == ((1, 3, 2), (1, 2, 3), 1, "log_count")
    assert source.name == "pooled_1x2x3_mean_log_count"
