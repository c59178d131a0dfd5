"""Aligned windows: target and references of its grid share positions, references of another grid are seen wholly."""

from itertools import product

import numpy as np
import pytest

from gensparse.errors import ConfigError
from gensparse.layout import Layout, Segment
from gensparse.patterns import (
    Aligned,
    Blocks,
    Box,
    Disc,
    Neighborhood,
    Pattern,
    PerHead,
    Pooled,
    Radial,
    Text,
)
from gensparse.testing.pattern_checks import check_pattern


def edit_layout(grid: tuple[int, int, int], *references: tuple[int, int, int], text: int = 3) -> Layout:
    """Text, one reference, the target, the other references, padding."""
    rest = [Segment("reference", int(np.prod(shape)), shape, f"r{n}") for n, shape in enumerate(references)]
    target = Segment("target", int(np.prod(grid)), grid)
    return Layout((Segment("text", text), *rest[:1], target, *rest[1:], Segment("pad", 2)))


LAYOUTS = [
    edit_layout((1, 7, 11), (1, 7, 11)),
    edit_layout((1, 7, 11), (1, 11, 7), (1, 7, 11)),
    edit_layout((1, 5, 4), (1, 5, 4), (1, 1, 7), (1, 5, 4), (1, 4, 5)),
    edit_layout((1, 1, 13), (1, 1, 13), (1, 13, 1)),
    edit_layout((1, 1, 1), (1, 1, 1), (1, 2, 3)),
    edit_layout((2, 5, 3), (2, 5, 3), (1, 5, 3)),
    Layout.ulysses(edit_layout((1, 7, 5), (1, 7, 5), (1, 3, 4)), 2),
    Layout.image(5, 7, text=3),
]


def spelled(layout: Layout, sees) -> np.ndarray:
    """The rule in its own words, pair by pair, in segment order; sees(q position, k position)."""
    tokens = [(s, tuple(p)) for s in layout.segments for p in np.ndindex(*s.shape)]
    mask = np.zeros((len(tokens), len(tokens)), bool)
    for (i, (a, p)), (j, (b, q)) in product(enumerate(tokens), enumerate(tokens)):
        if {a.kind, b.kind} <= {"target", "reference"}:
            mask[i, j] = sees(p, q) if a.grid == b.grid == layout.grid else True
    return mask


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(str(s.length) for s in layout.segments))
@pytest.mark.parametrize(
    ("pattern", "sees"),
    [
        (Disc(3), lambda p, q: sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) < 9),
        (Box(1), lambda p, q: all(abs(a - b) <= 1 for a, b in zip(p, q, strict=True))),
        (Blocks(3), lambda p, q: all(a // 3 == b // 3 for a, b in zip(p, q, strict=True))),
    ],
    ids=["disc", "box", "blocks"],
)
def test_mask_is_the_window_on_pictures_of_one_grid_and_everything_between_others(layout, pattern, sees):
    order = layout.order()
    expected = spelled(layout, sees)
    if order is not None:
        expected = expected[np.ix_(order, order)]
    fitting = Aligned(pattern).clamped(layout.grid)
    np.testing.assert_array_equal(fitting.dense_mask(layout)[0], expected)


PATTERNS: list[Pattern] = [
    Aligned(Disc(3)),
    Aligned(Neighborhood(3, dilation=2)),
    Aligned(Neighborhood(5, stride=2)) | Text(),
    Aligned(Blocks(3, shift=1, wrap=True)) | Text(),
    Aligned(PerHead((Box(1), Disc(2)))) | Text(),
    Aligned(Radial(block=4)),
    Aligned(Disc(2)) | Pooled(2, weights="mean"),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_aligned_patterns_pass_the_kit(pattern):
    check_pattern(pattern, [LAYOUTS[1], LAYOUTS[5]])


@pytest.mark.parametrize("layout", LAYOUTS[:4], ids=lambda layout: "-".join(str(s.length) for s in layout.segments))
def test_a_window_over_the_grid_is_dense_between_all_but_padding(layout):
    mask = (Aligned(Disc(100)) | Text()).dense_mask(layout)[0]
    own = np.repeat([s.kind != "pad" for s in layout.segments], [s.length for s in layout.segments])
    np.testing.assert_array_equal(mask, own[:, None] & own[None, :])


def test_references_without_a_grid_have_no_positions_and_are_seen_wholly():
    layout = Layout((Segment("target", 6, (1, 1, 6)), Segment("reference", 6)))
    mask = Aligned(Disc(1)).dense_mask(layout)[0]
    assert mask[:6, 6:].all()
    assert mask[6:].all()
    np.testing.assert_array_equal(mask[:6, :6], np.eye(6, dtype=bool))


def test_without_references_it_is_the_window_itself():
    layout = Layout.image(7, 5, text=3)
    np.testing.assert_array_equal(Aligned(Disc(3)).dense_mask(layout), Disc(3).dense_mask(layout))


def test_windows_that_do_not_fit_are_refused_or_clamped_like_the_window_itself():
    layout = edit_layout((1, 3, 9), (1, 3, 9))
    with pytest.raises(ConfigError, match="does not fit axis H"):
        Aligned(Neighborhood((5, 5))).bind(layout)
    assert Aligned(Neighborhood((5, 5))).clamped((1, 3, 9)) == Aligned(Neighborhood((5, 5)).clamped((1, 3, 9)))


def test_extra_keys_and_no_patterns_are_refused_with_the_way_to_write_it():
    with pytest.raises(ConfigError, match=r"join them outside"):
        Aligned(Disc(3) | Pooled(2)).bind(edit_layout((1, 4, 4), (1, 4, 4)))
    with pytest.raises(ConfigError, match="is not a pattern"):
        Aligned(3)
