"""The renderer: windows agree with the whole, edges are one pixel wide, scale is the scene's."""

import dataclasses

import numpy as np
import pytest

from gensparse.embedded.render import render
from gensparse.embedded.scenes import BACKGROUNDS, FILLS, PALETTE, SHAPES, SIZES, Scene, Subject, random_scene
from gensparse.errors import ConfigError


def single(shape="circle", fill="plain", background="plain", rotation=0.0, aspect=1.0, colour="red"):
    subject = Subject(shape, colour, fill, "large", 0.5, 0.5, SIZES["large"], rotation)
    return Scene((subject,), background, "white", aspect)


def test_the_same_scene_gives_the_same_pixels():
    assert np.array_equal(render(random_scene(3), 61, 83), render(random_scene(3), 61, 83))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("aspect", [1.0, 1.5, 0.6])
def test_a_window_equals_the_cut_from_the_whole(seed, aspect):
    height, width = 211, 173
    scene = random_scene(seed, aspect)
    whole = render(scene, height, width).astype(int)
    y0, x0, y1, x1 = 40, 31, 151, 160
    window = render(scene, y1 - y0, x1 - x0, (y0 / height, x0 / width, y1 / height, x1 / width)).astype(int)
    assert np.abs(window - whole[y0:y1, x0:x1]).max() <= 1


def test_strips_leave_no_seams(monkeypatch):
    scene = random_scene(12)
    whole = render(scene, 97, 64)
    monkeypatch.setattr("gensparse.embedded.render._STRIP_PIXELS", 64 * 10)
    assert np.array_equal(render(scene, 97, 64), whole)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_large_rendering_averages_to_the_small_one(shape):
    scene = single(shape, "striped", "wavy", rotation=13)
    small = render(scene, 64, 64).astype(float)
    large = render(scene, 512, 512).astype(float).reshape(64, 8, 64, 8, 3).mean((1, 3))
    assert np.abs(small - large).mean() < 2.0
    assert np.percentile(np.abs(small - large), 99) < 25


@pytest.mark.parametrize("shape", SHAPES)
def test_edges_are_about_one_pixel_wide_at_any_zoom(shape):
    scene = single(shape)
    red, white = np.array(PALETTE["red"]), np.array(PALETTE["white"])
    for side, window in ((256, (0, 0, 1, 1)), (256, (0.25, 0.25, 0.75, 0.75))):
        picture = render(scene, side, side, window).astype(float)
        between = (np.abs(picture - red).max(-1) > 2) & (np.abs(picture - white).max(-1) > 2)
        outline = np.abs(np.diff((np.abs(picture - red).max(-1) < 60).astype(int), axis=1)).sum()
        assert 0 < between.sum() < 5 * outline


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_stay_in_their_box_when_turned(shape):
    for rotation in (-20, 0, 20):
        scene = single(shape, rotation=rotation)
        picture = render(scene, 200, 200)
        rows, columns = np.nonzero((picture != np.array(PALETTE["white"])).any(-1))
        reach = 200 * SIZES["large"] * 1.2
        assert max(abs(rows - 99.5).max(), abs(columns - 99.5).max()) < reach
        assert max(abs(rows - 99.5).max(), abs(columns - 99.5).max()) > 0.75 * 200 * SIZES["large"]


def test_shapes_fills_and_backgrounds_all_look_different():
    shapes = [render(single(shape), 64, 64) for shape in SHAPES]
    fills = [render(single(fill=fill), 64, 64) for fill in FILLS]
    backgrounds = [render(single(background=kind), 64, 64) for kind in BACKGROUNDS]
    for pictures in (shapes, fills, backgrounds):
        for i, a in enumerate(pictures):
            for b in pictures[:i]:
                assert (np.abs(a.astype(int) - b).max(-1) > 40).mean() > 0.01


def test_circles_stay_round_in_wide_pictures():
    scene = single("circle", aspect=2.0)
    inside = np.nonzero(render(scene, 100, 200)[..., 1] < 100)
    height, width = np.ptp(inside[0]), np.ptp(inside[1])
    assert abs(int(height) - int(width)) <= 1


def test_the_texture_period_is_fixed_in_scene_units():
    scene = dataclasses.replace(single(background="checkered"), subjects=())
    row = render(scene, 1, 4000, (0, 0, 1e-4, 1))[0, :, 0].astype(int)
    changes = np.count_nonzero(np.diff(row > (row.min() + row.max()) / 2))
    assert changes in (13, 14)  # two per period of 0.15


@pytest.mark.parametrize(
    ("size", "window"), [((0, 5), (0, 0, 1, 1)), ((5, 5), (0.5, 0, 0.5, 1)), ((5, 5), (0, 1, 1, 0))]
)
def test_empty_windows_are_refused(size, window):
    with pytest.raises(ConfigError, match="empty"):
        render(random_scene(0), *size, window)
