import math

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxPosEmbed

from gensparse.errors import ConfigError
from gensparse.highres.rope import (
    RULES,
    Axis,
    PositionTable,
    axis_frequencies,
    base_frequencies,
    fade_mask,
    proportional_scale,
)

AXES, THETA = (16, 56, 56), 10000


def ids(height: int, width: int, text: int = 3) -> torch.Tensor:
    out = torch.zeros(text + height * width, 3)
    out[text:, 1] = torch.arange(height).repeat_interleave(width)
    out[text:, 2] = torch.arange(width).repeat(height)
    return out


def axis(tokens: int, time: float = 1.0, dim: int = 56) -> Axis:
    return Axis(dim, THETA, 64, tokens, tokens**2, 64**2, time)


@pytest.mark.parametrize("rule", ["base", "ntk", "yarn", "dy_ntk", "dy_yarn"])
@pytest.mark.parametrize("grid", [(64, 64), (1, 64), (37, 5), (1, 1)])
def test_within_the_trained_size_the_table_is_stock_to_the_bit(rule, grid):
    stock = FluxPosEmbed(theta=THETA, axes_dim=AXES)(ids(*grid))
    table = PositionTable(AXES, THETA, grid, 64, rule=rule)
    table.set_time(0.4)
    assert all(torch.equal(a, b) for a, b in zip(table(ids(*grid)), stock, strict=True))


@pytest.mark.parametrize("tokens", [96, 128, 256, 257])
def test_dynamic_rules_equal_the_static_ones_at_pure_noise(tokens):
    frequencies, mscale = axis_frequencies("dy_yarn", axis(tokens, 1.0))
    expected, expected_mscale = axis_frequencies("yarn", axis(tokens))
    assert torch.equal(frequencies, expected)
    assert mscale == expected_mscale


@pytest.mark.parametrize("time", [0.0, 1e-4, 0.003, 0.0069, 0.008])
@pytest.mark.parametrize("tokens", [96, 128, 256, 512])
def test_dynamic_yarn_ends_at_the_base_frequencies(time, tokens):
    """The published code inverts its ramp below t = 0.007 and divides by zero at 0."""
    frequencies, _ = axis_frequencies("dy_yarn", axis(tokens, time))
    torch.testing.assert_close(frequencies, base_frequencies(56, THETA), rtol=1e-9, atol=0)


def test_dynamic_ntk_ends_at_the_base_frequencies():
    torch.testing.assert_close(axis_frequencies("dy_ntk", axis(256, 0.0))[0], base_frequencies(56, THETA))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tokens", [1, 64, 65, 256, 511])
@pytest.mark.parametrize("dim", [2 * 4, 16, 56])
def test_frequencies_are_finite_positive_and_falling(rule, tokens, dim):
    frequencies, mscale = axis_frequencies(rule, axis(tokens, 0.5, dim))
    assert torch.isfinite(frequencies).all()
    assert (frequencies > 0).all()
    assert (frequencies.diff() < 0).all()
    assert mscale >= 1


def test_fade_mask_falls_from_one_to_zero():
    mask = fade_mask((16, 2), 56, THETA, 64)
    assert mask[0] == 1
    assert mask[-1] == 0
    assert (mask.diff() <= 0).all()


def test_interpolated_positions_are_native_and_centre_aligned():
    """Doubling a 4 x 6 grid: neighbours are half a unit apart and the picture covers the same span."""
    table = PositionTable(AXES, THETA, (8, 12), 16, rule="interpolate", native_grid=(4, 6))
    positions = table._positions(ids(8, 12, text=2))
    assert (positions[:2] == 0).all()
    rows = positions[2:, 1].reshape(8, 12)[:, 0]
    cols = positions[2:, 2].reshape(8, 12)[0]
    assert rows.tolist() == [-0.25 + 0.5 * i for i in range(8)]
    assert cols[0] == -0.25
    assert cols[-1] == 5.25
    native = FluxPosEmbed(theta=THETA, axes_dim=AXES)(positions)
    assert all(torch.equal(a, b) for a, b in zip(table(ids(8, 12, text=2)), native, strict=True))


def test_interpolation_with_a_shifted_patch_grid_keeps_the_span():
    """Nine tokens over the same eight: half a token earlier, the same spacing."""
    table = PositionTable(AXES, THETA, (9, 13), 16, rule="interpolate", native_grid=(4, 6), offset=-0.5)
    rows = table._positions(ids(9, 13))[3:, 1].reshape(9, 13)[:, 0]
    assert rows.tolist() == [-0.5 + 0.5 * i for i in range(9)]


def test_interpolation_takes_each_axis_by_itself():
    table = PositionTable(AXES, THETA, (8, 30), 16, rule="interpolate", native_grid=(4, 10))
    positions = table._positions(ids(8, 30, text=0))
    assert positions[-1, 1] == pytest.approx(7.5 / 2 - 0.5)
    assert positions[-1, 2] == pytest.approx(29.5 / 3 - 0.5, abs=1e-6)


def test_table_follows_the_time_only_where_the_rule_does():
    grid_ids = ids(80, 70)
    for rule in ("yarn", "dy_yarn"):
        table = PositionTable(AXES, THETA, (80, 70), 64, rule=rule)
        table.set_time(1.0)
        first = table(grid_ids)[0]
        table.set_time(0.3)
        assert torch.equal(first, table(grid_ids)[0]) == (rule == "yarn")


def test_table_is_made_once_per_grid_and_time():
    table, grid_ids = PositionTable(AXES, THETA, (8, 8), 4), ids(8, 8)
    first = table(grid_ids)
    assert table(grid_ids)[0] is first[0]
    assert table(grid_ids.clone())[0] is first[0]
    assert not torch.equal(table(grid_ids + 1)[0], first[0])


def test_isotropic_uses_the_larger_scale_for_both_axes():
    table = PositionTable(AXES, THETA, (64, 256), 64, rule="ntk", isotropic=True)
    _, rows, cols = table._frequencies(1.0)
    assert torch.equal(rows[0], cols[0])
    assert not torch.equal(rows[0], base_frequencies(56, THETA))


def test_logit_scale_in_the_table_scales_every_logit():
    plain = PositionTable((4, 4, 8), THETA, (8, 8), 4)
    scaled = PositionTable((4, 4, 8), THETA, (8, 8), 4, logit_scale=1.7)
    q, k = torch.randn(67, 16), torch.randn(67, 16)

    def logits(table):
        cos, sin = table(ids(8, 8))
        turn = lambda x: x * cos + torch.stack([-x[:, 1::2], x[:, ::2]], -1).flatten(1) * sin  # noqa: E731
        return turn(q) @ turn(k).T

    torch.testing.assert_close(logits(scaled), 1.7 * logits(plain), rtol=1e-4, atol=1e-4)


def test_proportional_scale_at_4096():
    assert proportional_scale(66048, 4608) == pytest.approx(1.147, abs=5e-4)
    assert proportional_scale(4608, 4608) == 1
    assert proportional_scale(100, 4608) < 1


def test_half_precision_ids_are_read_as_integers():
    grid_ids = ids(200, 3)
    table = PositionTable(AXES, THETA, (200, 3), 64)
    assert torch.equal(table(grid_ids.bfloat16())[0], table(grid_ids)[0])


@pytest.mark.parametrize("arguments", [{"rule": "magic"}, {"rule": "interpolate"}])
def test_wrong_rules_are_refused_when_made(arguments):
    with pytest.raises(ConfigError, match="position rule"):
        PositionTable(AXES, THETA, (8, 8), 4, **arguments)


def test_table_has_no_weights():
    assert PositionTable(AXES, THETA, (8, 8), 4).state_dict() == {}
    assert math.isfinite(float(PositionTable(AXES, THETA, (8, 8), 4)(ids(8, 8))[0].sum()))
