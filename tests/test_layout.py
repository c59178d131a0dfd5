"""Layouts: segments, constructors, coordinates, errors."""

import numpy as np
import pytest

from gensparse.errors import ConfigError
from gensparse.layout import Layout, Segment


def test_image_puts_text_first_and_video_last():
    image, video = Layout.image(4, 6, text=5), Layout.video(2, 4, 6, text=5)
    assert [segment.kind for segment in image.segments] == ["text", "target"]
    assert [segment.kind for segment in video.segments] == ["target", "text"]
    assert (image.tokens, image.starts, image.target, image.grid) == (29, (0, 5), 1, (1, 4, 6))
    assert (video.tokens, video.starts, video.target, video.grid) == (53, (0, 48), 0, (2, 4, 6))


def test_references_follow_the_target():
    own = Segment("reference", 4, name="face")
    layout = Layout.joint((1, 3, 3), text=2, text_first=False, references=((1, 2, 2), own))
    assert [segment.kind for segment in layout.segments] == ["target", "reference", "reference", "text"]
    assert layout.segments[1] == Segment("reference", 4, (1, 2, 2), "reference0")
    assert layout.segments[2] is own
    assert layout.starts == (0, 9, 13, 17)


def test_coords_count_every_token_in_raster_order():
    layout = Layout.joint((2, 3, 2), text=2, references=((1, 1, 2),))
    coords = layout.coords()
    assert coords.segment.tolist() == [0] * 2 + [1] * 12 + [2] * 2
    assert coords.position[:4].tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 0], [0, 0, 1]]
    flat = np.ravel_multi_index(tuple(coords.position[2:14].T), (2, 3, 2))
    np.testing.assert_array_equal(flat, np.arange(12))
    assert coords.position[-1].tolist() == [0, 0, 1]


@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 1, 9), (7, 1, 1)])
def test_one_token_axes_are_legal(grid):
    layout = Layout.joint(grid)
    assert layout.tokens == len(layout.coords().segment) == np.prod(grid)


def test_layouts_are_equal_and_hash_by_value():
    assert Layout.image(4, 6, text=5) == Layout.joint((1, 4, 6), text=5)
    assert hash(Layout.image(4, 6)) == hash(Layout.video(1, 4, 6))
    assert Layout.image(4, 6) != Layout.image(6, 4)
    assert Layout.image(np.int64(4), 6).segments[0].grid == (1, 4, 6)


@pytest.mark.parametrize("value", [0, -3, True, 2.0, float("nan"), "4", None])
def test_bad_sizes_raise(value):
    for make in (
        lambda: Layout.image(value, 4),
        lambda: Layout.video(2, 4, value),
        lambda: Segment("target", value),
        lambda: Segment("target", 8, (1, 8, value)),
    ):
        with pytest.raises(ConfigError, match="at least 1"):
            make()
    if value != 0:
        with pytest.raises(ConfigError, match="at least 0"):
            Layout.image(4, 4, text=value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Segment("picture", 4),
        lambda: Segment("target", 5, (1, 2, 2)),
        lambda: Segment("target", 4, (2, 2)),
        lambda: Segment("target", 4, "122"),
        lambda: Layout(()),
        lambda: Layout((Segment("text", 4),)),
        lambda: Layout((Segment("target", 4), Segment("target", 4))),
        lambda: Layout((4,)),
        lambda: Layout.joint((4, 4)),
        lambda: Layout.joint((1, 4, 4), references=(Segment("text", 3),)),
    ],
)
def test_impossible_layouts_raise(make):
    with pytest.raises(ConfigError):
        make()
