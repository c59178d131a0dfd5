"""Masks from files, pictures, arrays, boxes and polygons, and what is refused."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gensparse.errors import ConfigError
from gensparse.subjects import read_masks
from gensparse.subjects.masks import to_grid, token_mask
from gensparse.subjects.read_masks import box_mask, polygon_mask, read_mask

DISC = ((np.arange(37)[:, None] - 18) ** 2 + (np.arange(53) - 26) ** 2) < 15**2


def test_a_mask_survives_jpeg_and_any_size(tmp_path: Path) -> None:
    for quality in (20, 75):
        path = tmp_path / f"{quality}.jpg"
        Image.fromarray(DISC.astype(np.uint8) * 255).save(path, quality=quality)
        assert (read_mask(path).numpy() == DISC).mean() > 0.99
        assert (read_mask(str(path)) == read_mask(path)).all()


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P", "LA", "RGBA", "CMYK"])
def test_pictures_of_every_mode(mode: str) -> None:
    picture = (
        Image.fromarray(DISC.astype(np.uint8) * 255).convert("RGB" if mode in ("P", "CMYK") else "L").convert(mode)
    )
    assert (read_mask(picture).numpy() == DISC).all()


def test_a_painted_picture_is_read_by_its_transparency(tmp_path: Path) -> None:
    paint = np.zeros((*DISC.shape, 4), np.uint8)
    paint[DISC] = (10, 0, 20, 255)  # dark paint
    Image.fromarray(paint).save(tmp_path / "paint.png")
    for given in (tmp_path / "paint.png", paint, torch.from_numpy(paint), torch.from_numpy(paint).permute(2, 0, 1)):
        assert (read_mask(given).numpy() == DISC).all()


def test_a_rotated_photo_is_turned() -> None:
    picture, file = Image.fromarray(DISC.astype(np.uint8) * 255), BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(file, "PNG", exif=exif)
    assert read_mask(Image.open(file)).shape == (53, 37)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.float32, np.float64, np.int64])
@pytest.mark.parametrize("high", [1, 255])
def test_arrays_of_every_range(dtype: type, high: int) -> None:
    given = DISC.astype(dtype) * (1 if dtype is bool else dtype(high))
    for array in (given, given[..., None], given[None], torch.from_numpy(given)):
        assert (read_mask(array).numpy() == DISC).all()
    assert not read_mask(np.zeros((3, 5), dtype)).any()


def test_soft_edges_count_from_one_half() -> None:
    assert read_mask(np.array([[0.0, 0.49, 0.5, 1.0]])).tolist() == [[False, False, True, True]]
    assert read_mask(np.array([[0, 127, 128, 255]], np.uint8)).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize(
    "given", [None, "nowhere.png", 3, np.zeros((2, 2, 2)), np.zeros((0, 3)), np.array([[-1.0]]), np.array([[256.0]]),
              np.array([[np.nan]]), np.array([["a"]])]
)  # fmt: skip
def test_other_things_are_refused(given: object) -> None:
    with pytest.raises(ConfigError):
        read_mask(given)


def test_files_that_are_no_pictures_or_too_large_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "page.png").write_text("<html>")
    with pytest.raises(ConfigError, match=r"page\.png cannot be read"):
        read_mask(tmp_path / "page.png")
    Image.new("L", (30, 20)).save(tmp_path / "large.png")
    monkeypatch.setattr(read_masks, "MAX_PIXELS", 599)
    with pytest.raises(ConfigError, match="30 x 20"):
        read_mask(tmp_path / "large.png")


def test_boxes_by_pixels_and_by_shares() -> None:
    expected = torch.zeros(7, 11, dtype=torch.bool)
    expected[2:5, 1:4] = True
    assert torch.equal(box_mask((1, 2, 4, 5), (7, 11)), expected)
    assert torch.equal(box_mask((0.0, 0.0, 1.0, 0.5), (6, 4))[:, 0], torch.arange(6) < 3)
    assert box_mask((-5, -5, 50, 50), (3, 4)).all()


def test_polygons_follow_the_even_odd_rule() -> None:
    square = [(1, 2), (4, 2), (4, 5), (1, 5)]
    assert torch.equal(polygon_mask(square, (7, 11)), box_mask((1, 2, 4, 5), (7, 11)))
    assert torch.equal(polygon_mask(square[::-1], (7, 11)), box_mask((1, 2, 4, 5), (7, 11)))
    triangle = polygon_mask([(0, 0), (1, 0), (0, 1)], (8, 8))
    assert triangle.sum() == 28
    star = [(0.5, 0.0), (0.8, 0.95), (0.02, 0.36), (0.98, 0.36), (0.2, 0.95)]
    found = polygon_mask(star, (101, 101))
    assert not found[55, 50], "the middle of a star is outside"
    assert found[20, 50]


@pytest.mark.parametrize("box", [(0, 0, 0, 1), (1, 1, 0, 2), (0, 0, 1), (0, 0, 1, float("nan")), "0123", None])
def test_bad_boxes_are_refused(box: object) -> None:
    with pytest.raises(ConfigError, match="box"):
        box_mask(box, (4, 4))


def test_bad_polygons_and_sizes_are_refused() -> None:
    for points in ([(0, 0), (1, 1)], [(0, 0), (1, 1), (1,)], "abc"):
        with pytest.raises(ConfigError, match="polygon"):
            polygon_mask(points, (4, 4))
    for size in ((0, 4), (4,), 4, (4.0, 4), (True, 4)):
        with pytest.raises(ConfigError, match="size"):
            box_mask((0, 0, 1, 1), size)


def test_small_subjects_stay_on_coarse_grids() -> None:
    mask = torch.zeros(128, 96, dtype=torch.bool)
    mask[52:61, 50:59] = True
    assert token_mask(mask, (8, 6)).any()
    assert token_mask(mask, (16, 12)).sum() >= to_grid(mask, (16, 12)).sum() >= 1
    assert token_mask(torch.ones(3, 5), (2, 7)).all()
    assert not token_mask(torch.zeros(3, 5), (2, 7)).any()
