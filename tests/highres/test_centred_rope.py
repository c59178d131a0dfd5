"""Positions counted from the middle of the picture, against diffusers' own at the size of training."""

import pytest
import torch

from gensparse.errors import ConfigError, LayoutMismatchError
from gensparse.highres.centred_rope import CentredPositionTable
from gensparse.highres.rope import RULES
from gensparse.testing.tiny import tiny_denoiser

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def own():
    return tiny_denoiser("qwenimage").pos_embed


def table(own, grid, **more) -> CentredPositionTable:
    return CentredPositionTable(own.axes_dim, own.theta, grid, 8, **more)


@pytest.mark.parametrize("grid", [(8, 8), (7, 5), (1, 8), (8, 1), (3, 8)])
@pytest.mark.parametrize("rule", ["base", "ntk", "yarn", "dy_ntk", "dy_yarn", "interpolate"])
def test_at_native_size_every_rule_is_the_models_own(own, grid, rule):
    shapes = [[(1, *grid)]]
    made = table(own, grid, rule=rule, native_grid=grid)
    made.set_time(0.3)
    for mine, theirs in zip(made(shapes, max_txt_seq_len=11, device=CPU), own(shapes, CPU, 11), strict=True):
        assert mine.shape == theirs.shape
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=0, atol=5e-6)


@pytest.mark.parametrize("grid", [(17, 9), (8, 23)])
def test_interpolated_positions_are_native_ones(own, grid):
    """Angles of rows and columns stay within the native ones, the middle stays, and text starts where it did."""
    native = (9, 5) if grid[0] > grid[1] else (4, 11)
    made = table(own, grid, rule="interpolate", native_grid=native)
    for axis in (0, 1):
        positions = made._positions(axis)
        assert len(positions) == grid[axis]
        z = grid[axis] / native[axis]
        expected = (torch.arange(grid[axis]) + 0.5) / z - 0.5 - (native[axis] - native[axis] // 2)
        torch.testing.assert_close(positions, expected.double(), rtol=0, atol=1e-6)
    _, text = made([[(1, *grid)]], max_txt_seq_len=6, device=CPU)
    _, native_text = own([[(1, *native)]], CPU, 6)
    torch.testing.assert_close(text, native_text, rtol=0, atol=5e-6)


def test_a_shifted_grid_lies_half_a_token_off(own):
    plain = table(own, (16, 10), rule="interpolate", native_grid=(8, 5))
    shifted = table(own, (17, 11), rule="interpolate", native_grid=(8, 5), offset=-0.5)
    for axis in (0, 1):
        middles = (plain._positions(axis)[1:] + plain._positions(axis)[:-1]) / 2
        torch.testing.assert_close(shifted._positions(axis)[1:-1], middles)


@pytest.mark.parametrize("rule", ["yarn", "ntk"])
def test_rotations_tell_distances_and_nothing_else(own, rule):
    """The product of a token's table with another's conjugate depends on where they lie to one another only."""
    made = table(own, (16, 12), rule=rule)
    picture, text = made([[(1, 16, 12)]], max_txt_seq_len=5, device=CPU)
    picture = picture.reshape(16, 12, -1)
    for a, b in (((3, 4), (7, 6)), ((8, 2), (12, 4))):
        first = picture[3, 4] * picture[7, 6].conj()
        torch.testing.assert_close(picture[a] * picture[b].conj(), first, rtol=0, atol=1e-4)
    frame, rest = 4, slice(4, None)  # text k and the cell k cells from another along both axes turn by the same
    along = picture[5, 5, rest] * picture[3, 3, rest].conj()
    torch.testing.assert_close(text[4, rest] * text[2, rest].conj(), along, rtol=0, atol=1e-4)
    assert picture[..., :frame].sub(picture[0, 0, :frame]).abs().max() == 0


def test_proportional_attention_scales_every_logit(own):
    plain, sharp = (table(own, (16, 12), rule="ntk10", logit_scale=s) for s in (1.0, 1.44))
    for one, two in zip(*(t([[(1, 16, 12)]], max_txt_seq_len=5, device=CPU) for t in (plain, sharp)), strict=True):
        torch.testing.assert_close(two, one * 1.2, rtol=1e-6, atol=1e-6)


def test_time_acts_on_dype_alone():
    for rule in RULES:
        made = CentredPositionTable((16, 56, 56), 10000, (20, 12), 8, rule=rule, native_grid=(8, 5))
        made.set_time(1.0)
        first = made([[(1, 20, 12)]], max_txt_seq_len=3, device=CPU)
        made.set_time(0.2)
        second = made([[(1, 20, 12)]], max_txt_seq_len=3, device=CPU)
        same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert same != rule.startswith("dy_")


def test_other_grids_and_several_pictures_are_refused(own):
    made = table(own, (16, 12))
    for shapes in ([[(1, 12, 16)]], [[(1, 16, 12), (1, 16, 12)]], [[(2, 16, 12)]]):
        with pytest.raises(LayoutMismatchError, match="one picture of 16x12"):
            made(shapes, max_txt_seq_len=3, device=CPU)
    for wrong in ({"rule": "magic"}, {"rule": "interpolate"}):
        with pytest.raises(ConfigError):
            table(own, (16, 12), **wrong)
