"""Resized tables of positions, against the table's own middle and against the waves it is made of."""

import copy

import pytest
import torch
from diffusers.models.embeddings import PatchEmbed

from gensparse.errors import ConfigError
from gensparse.highres.patch_table import ResizedPatchEmbed, axis_weights

SIDE, NATIVE = 40, 12  # entries of the table, tokens per side in training


@pytest.fixture(scope="module")
def own():
    torch.manual_seed(0)
    return PatchEmbed(
        height=2 * NATIVE, width=2 * NATIVE, patch_size=2, in_channels=4, embed_dim=32, pos_embed_max_size=SIDE
    )


@pytest.mark.parametrize("grid", [(12, 12), (7, 19), (1, 40)])
def test_at_native_size_it_is_the_models_own_to_the_bit(own, grid):
    latent = torch.randn(2, 4, 2 * grid[0], 2 * grid[1])
    resized = ResizedPatchEmbed(own, grid, grid)
    assert torch.equal(resized(latent), own(latent))
    assert torch.equal(resized.table(), own.cropped_pos_embed(2 * grid[0], 2 * grid[1])[0])


@pytest.mark.parametrize(("native", "grid"), [((12, 12), (24, 24)), ((14, 9), (37, 23)), ((9, 15), (50, 83))])
def test_resized_entries_lie_on_the_tables_waves(own, native, grid):
    """The table holds sines and cosines of positions 12 / 40 apart, so that what lies between two entries is known."""
    found = ResizedPatchEmbed(own, native, grid).table().reshape(*grid, 32).double()
    omega = 10000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
    for axis in (0, 1):
        place = (torch.arange(grid[axis], dtype=torch.float64) + 0.5) * native[axis] / grid[axis] - 0.5
        place = (place + (SIDE - native[axis]) // 2) * NATIVE / SIDE
        angles = torch.outer(place, omega)
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)
        # the first half of the channels tells the column, the second the row
        along = found[0, :, :16] if axis == 1 else found[:, 0, 16:]
        torch.testing.assert_close(along, waves, rtol=0, atol=2e-3)
    assert (found[:, :, :16] - found[:1, :, :16]).abs().max() < 1e-6
    assert (found[:, :, 16:] - found[:, :1, 16:]).abs().max() < 1e-6


def test_a_shifted_grid_lies_half_a_token_off(own):
    plain = ResizedPatchEmbed(own, (8, 8), (32, 32)).table().reshape(32, 32, 32)
    shifted = ResizedPatchEmbed(own, (8, 8), (33, 33), offset=-0.5).table().reshape(33, 33, 32)
    middles = (plain[1:, 1:] + plain[:-1, :-1] + plain[1:, :-1] + plain[:-1, 1:]) / 4
    torch.testing.assert_close(shifted[1:-1, 1:-1], middles, rtol=0, atol=1e-3)


def test_the_table_ends_with_its_last_entry():
    matrix, span = axis_weights(12, 12, 60)
    whole = torch.zeros(60, 12)
    whole[:, span] = matrix
    torch.testing.assert_close(whole.sum(1), torch.ones(60))
    assert whole[0, 0] > 0.9
    assert whole[-1, -1] > 0.9


def test_the_model_is_not_changed_and_half_precision_stays(own):
    before = {k: v.clone() for k, v in own.state_dict().items()}
    half = copy.deepcopy(own).bfloat16()
    resized = ResizedPatchEmbed(half, (12, 12), (24, 18))
    out = resized(torch.randn(1, 4, 48, 36).bfloat16())
    assert (out.dtype, out.shape) == (torch.bfloat16, (1, 24 * 18, 32))
    ResizedPatchEmbed(own, (12, 12), (24, 18))(torch.randn(1, 4, 48, 36))
    assert all(torch.equal(v, before[k]) for k, v in own.state_dict().items())


def test_modules_without_such_a_table_are_refused():
    plain = PatchEmbed(height=24, width=24, patch_size=2, in_channels=4, embed_dim=32)
    with pytest.raises(ConfigError, match="no table of positions"):
        ResizedPatchEmbed(plain, (12, 12), (24, 24))
