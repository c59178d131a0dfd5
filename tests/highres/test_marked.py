"""Masks of what may change: nothing outside of them does, whatever their size."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from gensparse.errors import ConfigError
from gensparse.highres import marked
from gensparse.highres.marked import blended, free_cells, plain_enlargement, soft_mask


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def disc(height: int, width: int) -> np.ndarray:
    """White around a point left of and above the middle."""
    y, x = np.mgrid[:height, :width]
    return (((y / height - 0.4) ** 2 + (x / width - 0.45) ** 2 < 0.09) * 255).astype(np.uint8)


@pytest.mark.parametrize("shape", [(64, 48), (7, 5), (301, 211), (1, 3), (800, 800)])
def test_a_mask_of_any_size_is_zero_outside_and_full_inside(shape):
    size, source = (97, 61), (31, 20)
    mask = disc(*shape) if min(shape) > 3 else np.array([[0, 255, 0]], np.uint8)
    soft = soft_mask(mask, size, source)
    assert soft.shape == size
    covered = mask
    for axis, count in enumerate(size):  # the most that any mask pixel below a pixel of the result says
        edges = np.arange(count + 1) * mask.shape[axis] / count
        spans = zip(np.floor(edges[:-1]).astype(int), np.ceil(edges[1:]).astype(int), strict=True)
        covered = np.stack([covered.take(range(a, b), axis).max(axis) for a, b in spans], axis)
    assert (covered == 0).any()
    assert (soft[covered == 0] == 0).all()
    assert soft.max() > 0
    if min(shape) > 5:
        assert soft.max() == 255
        assert ((soft > 0) & (soft < 255)).any()


@pytest.mark.parametrize("strip", [1, 7, 1 << 20])
def test_levels_are_means_of_the_masks_erosions(monkeypatch, strip):
    monkeypatch.setattr(marked, "STRIP_PIXELS", strip * 23)
    mask = disc(19, 23)
    mask[3:5, 15:] = 100
    padded = np.pad(mask, 3, constant_values=255).astype(float)
    total = np.zeros(mask.shape)
    for radius in range(4):
        window = np.lib.stride_tricks.sliding_window_view(padded, (2 * radius + 1,) * 2).min((2, 3))
        cut = 3 - radius
        total += window[cut : cut + 19, cut : cut + 23]
    found = marked._softened(mask, 3)
    assert np.array_equal(found, np.round(total / 4).astype(np.uint8))
    assert (found[mask == 0] == 0).all()


def test_a_white_mask_lets_everything_through_and_a_black_one_is_refused():
    assert (soft_mask(np.full((5, 9), 255, np.uint8), (40, 30), (10, 10)) == 255).all()
    with pytest.raises(ConfigError, match="marks nothing"):
        soft_mask(np.zeros((5, 9), np.uint8), (40, 30), (10, 10))


@pytest.mark.parametrize("size", [(64, 96), (53, 41), (97, 33), (29, 20), (31, 40), (15, 22)])
def test_the_plain_enlargement_is_bicubic(size):
    source = picture(29, 20)
    x = torch.from_numpy(source).permute(2, 0, 1)[None].float()
    shrinks = size[0] < 29 or size[1] < 20
    expected = F.interpolate(x, size=size, mode="bicubic", align_corners=False, antialias=shrinks)
    expected = expected[0].permute(1, 2, 0).round().clamp(0, 255).numpy()
    found = plain_enlargement(source, size).astype(float)
    assert np.abs(found - expected).max() <= 1  # sums in another order may round to the next level
    assert (found != expected).mean() < 1e-3


def test_joining_is_exact_at_both_ends_and_rounds_between(monkeypatch):
    monkeypatch.setattr(marked, "STRIP_PIXELS", 64)
    first, second = picture(40, 30), picture(40, 30, 1)
    mask = soft_mask(disc(12, 13), (40, 30), (20, 15))
    joined = blended(first, second, mask)
    assert np.array_equal(joined[mask == 0], second[mask == 0])
    assert np.array_equal(joined[mask == 255], first[mask == 255])
    exact = second + (first.astype(float) - second) * mask[..., None] / 255
    assert np.abs(joined - exact).max() <= 0.5
    with pytest.raises(ConfigError, match="one size"):
        blended(first, second[:-1], mask)


def test_cells_are_free_where_any_pixel_is():
    mask = torch.zeros(37, 26, dtype=torch.uint8)
    mask[0, 0] = mask[4, 12] = mask[36, 13] = 1
    cells = free_cells(mask, (9, 6))
    assert cells.shape == (1, 1, 9, 6)
    assert cells[0, 0].nonzero().tolist() == [[0, 0], [0, 2], [1, 2], [8, 3]]  # row 4 is in two cells


def test_pillow_still_takes_box_for_the_nearest_pixel():
    """What keeps an enlarged mask out of pixels that are not marked."""
    mask = np.array([[0, 255], [255, 0]], np.uint8)
    large = np.asarray(Image.fromarray(mask).resize((7, 6), Image.Resampling.BOX))
    assert set(np.unique(large)) <= {0, 127, 128, 255}
    assert (large[:3, :3] == 0).all()
    assert (large[3:, 4:] == 0).all()
