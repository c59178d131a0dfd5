"""Drawings of what a query sees: the pixels say what the mask says."""

import subprocess
import sys

import numpy as np
import pytest

from gensparse.errors import ConfigError
from gensparse.layout import Layout, Segment
from gensparse.patterns import Box, Disc, Isolation, Neighborhood, PerHead, Pooled, Stripes, Text
from gensparse.patterns import draw as draw_module
from gensparse.patterns.draw import EXTRA, HIDDEN, QUERY, SEEN


def cells(image, shape: tuple[int, int], scale: int, top: int = 0, left: int = 0) -> np.ndarray:
    """Colours [H, W, 3] in the middle of the cells of the first panel below and right of (top, left)."""
    pixels = np.asarray(image)
    found = np.isin(pixels[top:, left:].reshape(-1, 3) @ [65536, 256, 1], [code(c) for c in (SEEN, HIDDEN, EXTRA)])
    rows, columns = np.nonzero(found.reshape(pixels.shape[0] - top, -1))
    y, x = top + rows.min(), left + columns[rows == rows.min()].min()
    middle = scale // 2
    return pixels[y + middle :: scale, x + middle :: scale][: shape[0], : shape[1]]


def code(colour) -> int:
    return int(np.dot(colour, [65536, 256, 1]))


def is_colour(found: np.ndarray, colour) -> np.ndarray:
    return (found == np.array(colour)).all(-1)


@pytest.mark.parametrize("scale", [1, 2, 4, 5, 8, 13])
@pytest.mark.parametrize(
    ("pattern", "query"), [(Disc(4), (6, 9)), (Neighborhood(5, dilation=2), (1, 15)), (Box(3), (12, 3))], ids=repr
)
def test_cells_are_coloured_as_the_mask_says(pattern, query, scale):
    layout = Layout.image(14, 17)
    found = cells(pattern.draw(layout, query, scale=scale), (14, 17), scale)
    mask = pattern.dense_mask(layout)[0][query[0] * 17 + query[1]].reshape(14, 17)
    away = np.abs(np.indices((14, 17)) - np.array(query)[:, None, None]).max(0) > (0 if scale >= 5 else 8 // scale)
    np.testing.assert_array_equal(is_colour(found, SEEN)[away], mask[away])
    np.testing.assert_array_equal(is_colour(found, HIDDEN)[away], ~mask[away])


def test_the_query_is_marked_and_shows_whether_it_sees_itself():
    layout = Layout.image(9, 9, text=3)
    for pattern, colour in ((Disc(3), SEEN), (Text(), HIDDEN)):
        picture = np.asarray(pattern.draw(layout, (4, 5), scale=12))
        rows, columns = np.nonzero(is_colour(picture, QUERY))
        own = rows < rows.max() - 12  # the legend is the last
        middle = picture[(rows[own].min() + rows[own].max()) // 2, (columns[own].min() + columns[own].max()) // 2]
        assert is_colour(middle, colour)
        assert 12 <= np.ptp(rows[own]) <= 14


def test_frames_of_a_video_stand_side_by_side():
    layout = Layout.video(3, 6, 7)
    pattern = Neighborhood((2, 3, 3))
    picture = pattern.draw(layout, (2, 3, 3), scale=8)
    mask = pattern.dense_mask(layout)[0][2 * 42 + 3 * 7 + 3].reshape(3, 6, 7)
    left = 0
    for frame in range(3):
        found = cells(picture, (6, 7), 8, left=left)
        seen = is_colour(found, SEEN)
        if frame == 2:
            seen[3, 3] = mask[2, 3, 3]
        np.testing.assert_array_equal(seen, mask[frame])
        left = 12 + (frame + 1) * (7 * 8 + 8) - 4


def test_many_frames_continue_below():
    wide = Box(2).draw(Layout.video(40, 4, 16), (0, 1, 1), scale=8)
    assert wide.width < 1500
    assert wide.height > Box(2).draw(Layout.video(8, 4, 16), (0, 1, 1), scale=8).height + 100


def test_other_segments_and_extra_keys_have_panels_of_their_own():
    layout = Layout.joint((1, 8, 8), text=3, references=((1, 4, 4),))
    pattern = Disc(2) | Text() | Pooled(4, weights="mean")
    picture = np.asarray(pattern.draw(layout, (3, 4), scale=8))
    panel = {colour: is_colour(picture, colour).sum() for colour in (SEEN, HIDDEN, EXTRA)}
    legend = 12 * 12
    inside = 49 / 64  # of a cell without its lines
    query = 49 - 9  # the mark leaves the middle of its cell
    assert panel[EXTRA] == 4 * 31 * 31 + legend
    assert panel[SEEN] == pytest.approx((8 + 3 + 1) * 64 * inside + legend, abs=query + 8 * 4)
    assert panel[HIDDEN] == pytest.approx((64 - 9 + 16) * 64 * inside + legend, abs=8 * 4)


def test_text_queries_and_sequence_numbers():
    """A number counts in the sequence, also in an interleaved one."""
    plain = Layout.image(6, 8, text=4)
    inter = Layout.ulysses(plain, 2)
    number = int(inter.places()[4 + 2 * 8 + 5])
    pattern = Disc(3) | Text()
    assert pattern.draw(plain, 4 + 2 * 8 + 5).tobytes() == pattern.draw(plain, (2, 5)).tobytes()
    assert pattern.draw(inter, number).tobytes() == pattern.draw(plain, (2, 5)).tobytes()
    text = np.asarray(pattern.draw(plain, 1))
    assert is_colour(text, SEEN).sum() > 40 * 49  # everything


def test_entries_of_a_menu_differ():
    menu, layout = PerHead((Stripes(2, "vertical"), Stripes(2, "horizontal"))), Layout.image(8, 9)
    pictures = [menu.draw(layout, (3, 4), group=group) for group in (0, 1)]
    seen = [is_colour(cells(picture, (8, 9), 8), SEEN) for picture in pictures]
    assert seen[0][:, 4].sum() >= 7
    assert seen[1][3].sum() >= 8
    with pytest.raises(ConfigError, match="group=2"):
        menu.draw(layout, (3, 4), group=2)


def test_patterns_with_data_are_drawn():
    layout = Layout.image(4, 6)
    groups = np.repeat([[1, 1, 1, 2, 2, 2]], 4, axis=0)
    picture = (Box(9) & Isolation("who")).draw(layout, (1, 1), data={"who": groups})
    assert is_colour(cells(picture, (4, 6), 8), SEEN)[0].tolist() == [True] * 3 + [False] * 3


def test_a_line_and_a_single_token_can_be_drawn():
    for layout in (Layout.image(1, 1), Layout.image(1, 30), Layout.joint((1, 30, 1))):
        Disc(2).draw(layout, 0)
    Disc(2).draw(Layout((Segment("target", 50),)), 49)


@pytest.mark.parametrize(
    ("query", "options"),
    [
        ((14, 0), {}),
        ((0, -1), {}),
        ((0, 1.0), {}),
        ((1, 0, 0), {}),
        ((0,), {}),
        ((0, 0, 0, 0), {}),
        ((), {}),
        (14 * 17, {}),
        (-1, {}),
        (True, {}),
        ("0", {}),
        (0, {"scale": 0}),
        (0, {"scale": 65}),
        (0, {"scale": 2.0}),
        (0, {"group": 1}),
        (0, {"group": -1}),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_named(query, options):
    with pytest.raises(ConfigError, match=r"draw (query|scale|group)="):
        Disc(3).draw(Layout.image(14, 17), query, **options)


def test_pictures_that_are_too_large_are_refused(monkeypatch):
    monkeypatch.setattr(draw_module, "MOST_PIXELS", 150_000)
    Disc(3).draw(Layout.image(20, 20), (3, 3))
    with pytest.raises(ConfigError, match="limit is 150000; pass a smaller scale"):
        Disc(3).draw(Layout.image(20, 20), (3, 3), scale=20)


def test_patterns_stay_light(tmp_path):
    report = "import sys; from gensparse.patterns import Disc, Text; print('PIL' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", report], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize(("layout", "scale"), [(Layout.image(5, 7, text=3), 6), (Layout.video(9, 4, 5), 4)])
def test_a_bare_drawing_tells_which_token_is_where(layout, scale):
    whole, bare = Box(2).draw(layout, 4, scale=scale), draw_module.drawn(Box(2), layout, 4, scale=scale, bare=True)
    assert bare.image.height < whole.height  # no title, no legend
    grid = layout.grid
    width, height = bare.image.size
    found = {draw_module.token_at(grid, scale, x, y) for y in range(height) for x in range(width)} - {None}
    assert found == {(f, y, x) for f in range(grid[0]) for y in range(grid[1]) for x in range(grid[2])}
    assert draw_module.token_at(grid, scale, -5, -5) is None
    target = layout.segments[layout.target].length
    counted = sum(draw_module.token_at(grid, scale, x, y) is not None for y in range(height) for x in range(width))
    assert counted == target * scale**2
    mask = Box(2).dense_mask(layout)[0][4]
    assert (bare.sees, bare.keys) == (mask.sum(), len(mask))
