"""C-Upscale's tensor functions against loops in float64, and the regions of a picture."""

import math

import numpy as np
import pytest
import torch

from gensparse.errors import ConfigError
from gensparse.highres.c_upscale import FLOOR, hann_window, relevance, sampling_matrix, screen, word_maps
from gensparse.highres.views import averaged, windows


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias", [None, (2, 1, 5), (1, 3, 5)])
def test_word_maps_are_the_mean_of_the_heads_probabilities(bias):
    q, k = draw(2, 7, 3, 4), draw(2, 5, 3, 4, seed=1)
    added = None if bias is None else draw(*bias, seed=2)
    found = word_maps(q, k, 0.3, added)
    for b in range(2):
        for n in range(7):
            rows = []
            for h in range(3):
                logits = [0.3 * float(q[b, n, h].double() @ k[b, t, h].double()) for t in range(5)]
                if added is not None:
                    own = added[min(b, bias[0] - 1), min(h, bias[1] - 1)]
                    logits = [x + float(y) for x, y in zip(logits, own, strict=True)]
                weights = [math.exp(x) for x in logits]
                rows.append([w / sum(weights) for w in weights])
            np.testing.assert_allclose(found[b, n], np.mean(rows, 0), atol=1e-6)
    torch.testing.assert_close(word_maps(q, k), word_maps(q, k, 0.5))


def sampled(axis: list[float], place: float) -> float:
    """The axis read at a place, in cells, linearly between centres and constant beyond the outermost."""
    place = min(max(place - 0.5, 0), len(axis) - 1)
    low = min(int(place), len(axis) - 1)
    high = min(low + 1, len(axis) - 1)
    return axis[low] * (1 - place + low) + axis[high] * (place - low)


@pytest.mark.parametrize(
    ("length", "start", "stop", "count"),
    [(1, 0, 1, 3), (5, 0, 1, 5), (7, 0.2, 0.9, 4), (8, 0.5, 0.75, 11), (3, 0, 1, 1)],
)
def test_sampling_is_bilinear_at_the_centres(length, start, stop, count):
    matrix = sampling_matrix(length, start, stop, count)
    axis = draw(length).double()
    step = (stop - start) / count
    expected = [sampled(axis.tolist(), (start + (i + 0.5) * step) * length) for i in range(count)]
    np.testing.assert_allclose(matrix @ axis, expected, atol=1e-12)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-12)


def test_the_whole_picture_at_its_own_size_is_read_as_it_is():
    assert torch.equal(sampling_matrix(6, 0, 1, 6), torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize("part", [(0, 1, 0, 1), (0.25, 0.75, 0.1, 0.9), (0, 2 / 7, 3 / 5, 1)])
def test_relevance_is_one_where_a_word_is_most_at_home(part):
    maps = draw(2, 7, 5, 3).abs()
    found = relevance(maps, part, (4, 3))
    assert found.shape == (2, 12, 3)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    top, bottom, left, right = part
    for b in range(2):
        for t in range(3):
            plane = maps[b, :, :, t].double() / maps[b, :, :, t].max()
            for r in range(4):
                place = (top + (r + 0.5) / 4 * (bottom - top)) * 7
                row = [sampled(plane[:, c].tolist(), place) for c in range(5)]
                for c in range(3):
                    expected = sampled(row, (left + (c + 0.5) / 3 * (right - left)) * 5)
                    assert float(found[b, r * 3 + c, t]) == pytest.approx(expected, abs=1e-6)


def test_a_word_that_nothing_looks_at_is_screened_and_not_divided_by_zero():
    maps = torch.zeros(1, 2, 2, 2)
    maps[..., 0] = 0.5
    relevant = relevance(maps, (0, 1, 0, 1), (2, 2))
    added = screen(relevant, torch.tensor([[True, True]]))
    assert torch.equal(added[..., 0], torch.zeros(1, 4))
    torch.testing.assert_close(added[..., 1], torch.full((1, 4), math.log(FLOOR)))
    kept = screen(relevant, torch.tensor([[True, False]]))
    assert torch.equal(kept[..., 1], torch.zeros(1, 4))


@pytest.mark.parametrize(
    "part", [(0, 0, 0, 1), (0.5, 0.2, 0, 1), (0, 1.2, 0, 1), (-0.1, 1, 0, 1), (0, 1, 0, float("nan"))]
)
def test_a_part_outside_the_picture_is_refused(part):
    with pytest.raises(ConfigError, match="part"):
        relevance(torch.ones(1, 2, 2, 1), part, (2, 2))


@pytest.mark.parametrize("size", [(1, 1), (5, 8), (16, 3)])
def test_hann_weights_are_positive_symmetric_squares_of_a_sine(size):
    window = hann_window(*size)
    assert window.shape == size
    assert float(window.min()) > 0
    torch.testing.assert_close(window, window.flip(0, 1))
    expected = math.sin(math.pi * 0.5 / size[0]) ** 2 * math.sin(math.pi * 0.5 / size[1]) ** 2
    assert float(window[0, 0]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("size", [(16, 16), (23, 31), (9, 40)])
def test_weighted_windows_of_one_picture_are_that_picture(size):
    x = draw(2, 3, *size)
    found = windows(size, (16, 16), (8, 8))
    same = averaged(lambda group: torch.cat([view.of(x) for view in group]), found, x, 3, _weigh)
    torch.testing.assert_close(same, x, atol=1e-5, rtol=1e-5)


def test_weights_move_the_mean_where_windows_overlap():
    x = torch.zeros(1, 1, 4, 6)
    found = windows((4, 6), (4, 4), (2, 2))
    merged = averaged(
        lambda group: torch.cat([torch.full((1, 1, 4, 4), float(v.left)) for v in group]), found, x, 1, _weigh
    )
    own = hann_window(4, 4)
    expected = 2 * own[:, :2] / (own[:, :2] + own[:, 2:])
    torch.testing.assert_close(merged[0, 0, :, 2:4], expected)
    assert torch.equal(merged[0, 0, :, :2], torch.zeros(4, 2))


def _weigh(view):
    return hann_window(view.bottom - view.top, view.right - view.left)
