"""Enlarged pictures kept to the one they were made from: area means, edges that move, any ratio, in strips."""

import numpy as np
import pytest
import torch
from PIL import Image

from gensparse.errors import ConfigError
from gensparse.highres import faithful
from gensparse.highres.faithful import Frame, area_mean, keep_to


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    small = Image.fromarray(noise(3, 4, seed))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def bicubic(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))


def disc(side: int, radius: float, zoom: int = 1) -> np.ndarray:
    """A red disc on blue, antialiased, a little off the middle."""
    at = (np.arange(side * 8) + 0.5) / 8 / zoom
    inside = np.hypot(at[:, None] - 10.3, at[None] - 9.6) < radius
    share = inside.reshape(side, 8, side, 8).mean((1, 3))[..., None]
    return np.rint(share * [200, 30, 40] + (1 - share) * [20, 60, 180]).astype(np.uint8)


@pytest.mark.parametrize(
    ("small", "large"), [((7, 5), (21, 20)), ((7, 5), (19, 23)), ((1, 1), (3, 2)), ((4, 6), (4, 6))]
)
def test_area_means_are_integrals_over_rectangles(small: tuple, large: tuple) -> None:
    picture = noise(*large)
    fine = np.repeat(np.repeat(picture, small[0], 0), small[1], 1).astype(float)  # every border is whole there
    want = fine.reshape(small[0], large[0], small[1], large[1], 3).mean((1, 3))
    assert np.abs(area_mean(picture, small) - want).max() < 1e-3


@pytest.mark.parametrize("strip", [1, 100, 1 << 20])
def test_strips_change_nothing(strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = keep_to(bicubic(noise(6, 7), 31, 40), smooth(6, 7, 3))
    monkeypatch.setattr(faithful, "STRIP_PIXELS", strip)
    assert np.array_equal(keep_to(bicubic(noise(6, 7), 31, 40), smooth(6, 7, 3)), whole)


def test_enlarging_is_that_of_torch() -> None:
    small, frame = torch.rand(5, 7, 3), Frame((5, 7), (17, 30))
    want = torch.nn.functional.interpolate(small.permute(2, 0, 1)[None], (17, 30), mode="bicubic")[0].permute(1, 2, 0)
    rows = [frame.enlarged(small, (top, min(top + 4, 17))) for top in range(0, 17, 4)]
    assert torch.allclose(torch.cat(rows), want, atol=1e-5)


@pytest.mark.parametrize("large", [(48, 60), (37, 41), (12, 15)], ids=str)
@pytest.mark.parametrize("tone", [0, 25], ids=["same", "brighter"])
def test_the_result_shrinks_to_its_source(large: tuple[int, int], tone: int) -> None:
    source = smooth(12, 15)
    picture = np.clip(bicubic(source, *large).astype(int) + tone, 0, 255).astype(np.uint8)
    error = np.abs(area_mean(keep_to(picture, source), (12, 15)) - source)
    assert error.mean() < 0.5
    assert np.quantile(error, 0.999) < 5


def test_an_edge_moves_to_its_place_without_a_halo() -> None:
    """Edges as sharp as the true ones, half a small pixel off: their error falls, and no level appears anew."""
    source, true = disc(20, 6.0), disc(160, 6.0, 8)
    moved = np.roll(true, (3, 2), (0, 1))
    kept = keep_to(moved.copy(), source, edges=10)
    before, after = (float(((a.astype(float) - true) ** 2).mean()) for a in (moved, kept))
    assert after < before / 4
    plain = keep_to(moved.copy(), source, edges=0, tones=6)
    assert after < float(((plain.astype(float) - true) ** 2).mean()) / 2
    assert kept.min() >= true.min() - 3
    assert kept.max() <= true.max() + 3
    quick = keep_to(moved.copy(), source)
    assert float(((quick.astype(float) - true) ** 2).mean()) < before / 4


def test_what_is_right_already_stays_as_it_is() -> None:
    true = disc(160, 6.0, 8)
    source = np.rint(area_mean(true, (20, 20))).astype(np.uint8)
    assert np.abs(keep_to(true.copy(), source).astype(int) - true).max() <= 2


def test_pictures_that_cannot_be_kept_are_refused() -> None:
    for picture in (noise(5, 9), noise(9, 5), np.zeros((9, 9, 4), np.uint8)):
        with pytest.raises(ConfigError, match="cannot be kept to"):
            keep_to(picture, noise(6, 6))
