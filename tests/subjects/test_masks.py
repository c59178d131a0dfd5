"""Masks on token grids, kept keys, and the statistics of shared style."""

import pytest
import torch

from gensparse.errors import ConfigError
from gensparse.subjects.masks import gather_keys, last_wins, to_grid
from gensparse.subjects.style import adain, style_keys


@pytest.mark.parametrize(("size", "grid"), [((7, 11), (3, 5)), ((5, 6), (9, 13)), ((1, 8), (1, 3)), ((64, 48), (4, 3))])
def test_nearest_modes_take_the_stated_pixel(size, grid):
    mask = torch.arange(size[0] * size[1]).reshape(size)
    floor = [[i * n // m for i in range(m)] for n, m in zip(size, grid, strict=True)]
    centre = [[(2 * i + 1) * n // (2 * m) for i in range(m)] for n, m in zip(size, grid, strict=True)]
    for mode, (rows, columns) in {"nearest": floor, "nearest-exact": centre}.items():
        found = to_grid(mask[None, None], grid, mode)
        assert found.dtype == mask.dtype
        assert torch.equal(found[0, 0], mask[rows][:, columns]), mode


def test_thresholds_give_bool_and_are_strict():
    mask = torch.tensor([[0.0, 0.5, 1.0]])
    assert to_grid(mask, (1, 3), threshold=0.5).tolist() == [[False, False, True]]
    assert to_grid(mask, (1, 2), "bilinear").tolist() == [[0.125, 0.875]]
    assert to_grid(mask.bool(), (1, 3)).dtype == torch.bool


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.ones(3, 3), (2, 2), "bicubic"), "mode"),
        ((torch.ones(3), (2, 2)), "height"),
        ((torch.ones(0, 3), (2, 2)), "height"),
        ((torch.ones(3, 3), (2, 0)), "positive"),
        ((torch.ones(3, 3), (2,)), "positive"),
        ((torch.ones(3, 3), (2, True)), "positive"),
    ],
)
def test_what_is_not_allowed_is_named(arguments, words):
    with pytest.raises(ConfigError, match=words):
        to_grid(*arguments)


def test_tokens_of_several_regions_stay_in_the_last():
    regions = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 0, 0]], dtype=torch.uint8)
    assert last_wins(regions).long().tolist() == [[1, 0, 0, 0, 0], [0, 1, 0, 1, 0], [0, 0, 1, 0, 0]]


def test_gathered_keys_keep_their_order_and_hide_the_rest():
    k = torch.arange(12.0).reshape(2, 6, 1, 1)
    keep = torch.tensor([[0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]])
    found, values, bias = gather_keys(k, -k, keep, multiple=4)
    assert found[0, :3].flatten().tolist() == [1.0, 3.0, 4.0]
    assert torch.equal(values[0, :3], -found[0, :3])
    assert bias.isneginf().tolist() == [[[False, False, False, True]], [[True] * 4]]
    whole, _, free = gather_keys(k, k, torch.ones(6, dtype=torch.bool), multiple=1)
    assert torch.equal(whole, k)
    assert not free.any()


def test_every_item_takes_the_statistics_of_the_first_of_its_half():
    x = torch.randn(6, 50, 2, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1
    styled = adain(x, 3)
    for half in (0, 3):
        assert torch.equal(styled[half], x[half])
        for item in (half + 1, half + 2):
            torch.testing.assert_close(styled[item].mean(0), x[half].mean(0), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(styled[item].std(0), x[half].std(0), rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="4"):
        adain(x, 4)


def test_the_first_item_sees_its_own_copy_unscaled():
    k = torch.randn(4, 5, 1, 2, generator=torch.Generator().manual_seed(0))
    keys = style_keys(k, 2, 0.5)
    for half in (0, 2):
        assert torch.equal(keys[half], k[half])
        assert torch.equal(keys[half + 1], 0.5 * k[half])
