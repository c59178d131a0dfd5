import pytest
import torch
import torch.nn.functional as F

from gensparse.highres.resample import blur3, enlarge, enlarge_sharpened, resize


def picture(height: int, width: int) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def whole(size: tuple[int, int]) -> tuple[int, int, int, int]:
    return 0, size[0], 0, size[1]


@pytest.mark.parametrize(
    ("small", "large"), [((13, 20), (26, 40)), ((7, 5), (31, 12)), ((1, 1), (4, 3)), ((9, 8), (9, 8))]
)
def test_enlarging_equals_torch_bicubic(small, large):
    x = picture(*small)
    expected = F.interpolate(x, size=large, mode="bicubic", align_corners=False)
    torch.testing.assert_close(enlarge(x, large, whole(large)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("amount", [0.0, 1.0])
def test_regions_are_parts_of_the_whole(amount):
    x, size = picture(11, 17), (40, 57)
    full = enlarge_sharpened(x, size, whole(size), amount)
    assert full.shape == (2, 3, *size)
    for box in [(0, 7, 0, 57), (7, 40, 30, 57), (13, 14, 20, 21), (39, 40, 56, 57)]:
        part = enlarge_sharpened(x, size, box, amount)
        torch.testing.assert_close(part, full[..., box[0] : box[1], box[2] : box[3]], rtol=0, atol=1e-6)


def test_blur_is_a_normalised_gaussian():
    line = torch.zeros(1, 1, 5, 5)
    line[..., 2, 2] = 1
    kernel = blur3(line, sigma=1.0)
    assert kernel.sum() == pytest.approx(1.0, abs=1e-6)
    assert kernel[0, 0, 1, 1] / kernel[0, 0, 1, 0] == pytest.approx(torch.tensor(0.5).exp().item(), rel=1e-5)


def test_sharpening_keeps_the_range_and_flat_areas():
    x = torch.where(torch.arange(16) < 8, -1.0, 0.5).expand(1, 3, 16, 16)
    y = enlarge_sharpened(x, (64, 64), whole((64, 64)))
    assert y.min() >= -1
    assert y.max() <= 1
    torch.testing.assert_close(y[..., :16], torch.full((1, 3, 64, 16), -1.0))
    torch.testing.assert_close(y[..., 48:], torch.full((1, 3, 64, 16), 0.5))


def test_one_pixel_wide_pictures_can_be_sharpened():
    assert torch.isfinite(enlarge_sharpened(picture(1, 1), (2, 1), whole((2, 1)))).all()


def test_resize_shrinks_without_aliasing():
    stripes = (torch.arange(64) % 2).float().expand(1, 3, 64, 64) * 2 - 1
    assert resize(stripes, (8, 8)).abs().max() < 0.1
    assert resize(stripes, (64, 64)) is stripes
