import pytest
import torch

from gensparse.errors import ConfigError
from gensparse.highres.latent_tiles import axis_weights, blend_rows, tile_starts


@pytest.mark.parametrize("length", [1, 7, 64, 65, 100, 511, 512])
@pytest.mark.parametrize(("tile", "overlap"), [(64, 16), (64, 0), (7, 6), (1, 0), (50, 33)])
def test_tiles_are_full_size_cover_everything_and_end_at_the_border(length, tile, overlap):
    starts = tile_starts(length, tile, overlap)
    size = min(tile, length)
    assert starts[0] == 0
    assert starts[-1] == length - size
    assert all(0 < b - a <= max(1, tile - overlap) for a, b in zip(starts, starts[1:], strict=False))  # noqa: RUF007
    weights = axis_weights(starts, size, length)
    total = torch.zeros(length)
    for start, weight in zip(starts, weights, strict=True):
        assert weight.shape == (size,)
        assert (weight > 0).all()
        total[start : start + size] += weight
    torch.testing.assert_close(total, torch.ones(length))


@pytest.mark.parametrize(("tile", "overlap"), [(0, 0), (8, 8), (8, -1)])
def test_impossible_tiles_are_refused(tile, overlap):
    with pytest.raises(ConfigError, match="overlap"):
        tile_starts(32, tile, overlap)


@pytest.mark.parametrize("shape", [(16, 16), (37, 23), (5, 40), (8, 8)])
@pytest.mark.parametrize(("tile", "overlap"), [(8, 2), (8, 7), (16, 9)])
@pytest.mark.parametrize(("in_scale", "out_scale"), [(1, 1), (1, 4), (4, 1)])
def test_blending_tiles_of_one_picture_gives_the_picture(shape, tile, overlap, in_scale, out_scale):
    cells = torch.randn(2, 3, *shape)
    source = cells.repeat_interleave(in_scale, -2).repeat_interleave(in_scale, -1)
    expected = cells.repeat_interleave(out_scale, -2).repeat_interleave(out_scale, -1)

    def read(rows: slice, cols: slice) -> torch.Tensor:
        part = source[..., rows, cols][..., ::in_scale, ::in_scale]
        return part.repeat_interleave(out_scale, -2).repeat_interleave(out_scale, -1)

    out = torch.full_like(expected, float("nan"))
    for top, strip in blend_rows(read, shape, tile, overlap, in_scale=in_scale, out_scale=out_scale):
        assert out[..., top : top + strip.shape[-2], :].isnan().all()
        out[..., top : top + strip.shape[-2], :] = strip
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_blend_fades_between_disagreeing_tiles():
    marks = iter([0.0, 1.0])
    ((_, strip),) = blend_rows(lambda r, c: torch.full((8, 8), next(marks)), (8, 12), 8, 4)
    assert (strip.diff(dim=1) >= -1e-6).all()
    assert (strip[:, 0] == 0).all()
    assert (strip[:, -1] == 1).all()
