"""Whether an upscaled picture is still the picture: praised when it is the true one, caught when it is not."""

import numpy as np
import pytest
from PIL import Image

from gensparse.embedded import defects
from gensparse.embedded.faithful import GAIN_LIMIT, MEAN_LIMIT, area_error, edge_band, faithfulness
from gensparse.embedded.render import render
from gensparse.embedded.scenes import random_scene
from gensparse.engine import execute
from gensparse.errors import ConfigError
from gensparse.request import UpscaleRequest

SEEDS = (9_700_000, 9_700_001, 9_700_003)
SMALL, LARGE = 64, 256


def pair(seed: int, small: int = SMALL, large: int = LARGE) -> tuple[Image.Image, Image.Image]:
    """A scene as it is given, and as it truly looks."""
    scene = random_scene(seed)
    return Image.fromarray(render(scene, small, small)), Image.fromarray(render(scene, large, large))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_true_picture_is_praised_and_bicubic_is_not(seed: int) -> None:
    source, truth = pair(seed)
    found = faithfulness(truth, source, truth)
    assert found.kept
    assert found.mean < MEAN_LIMIT
    assert found.gain == np.inf
    enlarged = faithfulness(source.resize(truth.size, Image.Resampling.BICUBIC), source, truth)
    assert enlarged.gain == 0
    assert not enlarged.kept


DEFECTS = {
    "blurred": lambda picture: defects.blurred(picture, 2.0),
    "shifted": defects.shifted,
    "toned": defects.toned,
}


@pytest.mark.parametrize("name", DEFECTS)
@pytest.mark.parametrize("seed", SEEDS)
def test_planted_defects_are_caught(name: str, seed: int) -> None:
    source, truth = pair(seed)
    found = faithfulness(DEFECTS[name](truth), source, truth)
    assert not found.kept
    if name == "toned":
        assert found.mean > MEAN_LIMIT
    else:
        assert found.gain < GAIN_LIMIT


def test_the_band_lies_around_edges_only() -> None:
    truth = np.zeros((40, 60, 3), np.uint8)
    truth[:, 30:] = 200
    band = edge_band(truth, 4)
    assert set(np.flatnonzero(band[7])) == set(range(25, 35))
    assert band.all(0).sum() == 10


def test_area_error_counts_every_channel_of_every_pixel_once() -> None:
    picture = np.zeros((8, 12, 3), np.uint8)
    source = np.zeros((4, 6, 3), np.uint8)
    source[0, 0, 0] = 36
    mean, p999 = area_error(picture, source)
    assert mean == pytest.approx(36 / source.size)
    assert 0 < p999 <= 36


def test_pictures_that_cannot_be_compared_are_refused() -> None:
    source, truth = pair(SEEDS[0])
    for picture, true in ((truth.resize((100, 100)), truth), (source, source.resize((32, 32)))):
        with pytest.raises(ConfigError, match="are given"):
            faithfulness(picture, source, true)
    with pytest.raises(ConfigError, match="no edge"):
        faithfulness(Image.new("RGB", (128, 128)), Image.new("RGB", (64, 64)), Image.new("RGB", (128, 128)))


def test_upscaling_keeps_the_picture_and_beats_bicubic(tmp_path) -> None:
    """The shipped model at a small size and few steps; samples/embedded/upscale_quality.py measures larger ones."""
    source, truth = pair(SEEDS[0], 256, 1024)
    source.save(tmp_path / "in.png")
    request = UpscaleRequest(image=str(tmp_path / "in.png"), size="1024", steps=10, dtype="fp32", device="cpu")
    found = faithfulness(execute(request).outputs[0].image, source, truth)
    assert found.mean < 1.0
    assert found.kept, found
