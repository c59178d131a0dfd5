"""Attention couple: weights, the sum over regions, and the one call that replaces it for hard masks."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gensparse.attention import sparse_attention
from gensparse.errors import ConfigError
from gensparse.layout import Layout
from gensparse.patterns import Reference, References
from gensparse.plan import build_plan
from gensparse.subjects.regions import couple_weights, hard_regions, region_sum

GRID = (5, 7)
LENGTHS = (4, 9, 6)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def case() -> tuple[Tensor, list[tuple[Tensor, Tensor]], Tensor]:
    """q, texts of base and two regions, and two overlapping masks that leave pixels uncovered."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 35, 3, 8, generator=generator)
    texts = [tuple(torch.randn(2, n, 3, 8, generator=generator) for _ in range(2)) for n in LENGTHS]
    masks = torch.zeros(2, 40, 56)
    masks[0, :20, :30] = 1
    masks[1, 10:35, 20:50] = 0.5
    return q, texts, masks


@pytest.mark.parametrize("base", [0.0, 0.2, 1.0])
def test_weights_sum_to_one(base):
    weights = couple_weights(case()[2], base, GRID)
    assert weights.shape == (3, 35)
    torch.testing.assert_close(weights.sum(0), torch.ones(35))
    assert bool((weights >= 0).all())


def test_base_of_zero_fills_what_no_region_covers():
    weights = couple_weights(case()[2], 0.0, GRID)
    uncovered = weights[1:].sum(0) == 0
    assert 0 < int(uncovered.sum()) < 35
    assert torch.equal(weights[0], uncovered.float())


def test_one_region_over_everything_is_ordinary_attention():
    q, texts, _ = case()
    weights = couple_weights(torch.ones(1, 40, 56), 0.0, GRID)
    torch.testing.assert_close(region_sum(q, texts[:2], weights, attend), attend(q, *texts[1]))


def test_equal_prompts_are_ordinary_attention_and_order_does_not_matter():
    q, texts, masks = case()
    weights = couple_weights(masks, 0.3, GRID)
    torch.testing.assert_close(region_sum(q, [texts[1]] * 3, weights, attend), attend(q, *texts[1]))
    swapped = couple_weights(masks.flip(0), 0.3, GRID)
    torch.testing.assert_close(
        region_sum(q, [texts[0], *texts[:0:-1]], swapped, attend), region_sum(q, texts, weights, attend)
    )


def test_layers_without_weight_are_not_attended():
    q, texts, _ = case()
    calls = []
    weights = couple_weights(torch.ones(1, 8, 8), 0.0, GRID)
    region_sum(q, texts[:2], weights, lambda *tensors: calls.append(tensors) or attend(*tensors))
    assert len(calls) == 1


def test_hard_masks_need_one_call():
    q, texts, masks = case()
    masks[1] = (masks[1] > 0) & (masks[0] == 0)
    weights = couple_weights(masks, 0.0, GRID)
    regions = hard_regions(weights)
    assert regions is not None
    assert hard_regions(couple_weights(masks, 0.1, GRID)) is None
    entries = [Reference(f"text{i}", length=n, queries=f"region{i}") for i, n in enumerate(LENGTHS)]
    data = {f"region{i}": region.numpy() for i, region in enumerate(regions)}
    plan = build_plan(References(entries), Layout.image(*GRID), data=data)
    sources = {f"text{i}": text for i, text in enumerate(texts)}
    torch.testing.assert_close(
        sparse_attention(q, q, q, plan, sources=sources), region_sum(q, texts, weights, attend), rtol=1e-5, atol=1e-5
    )


def test_what_is_not_allowed_is_named():
    q, texts, masks = case()
    with pytest.raises(ConfigError, match="base_weight"):
        couple_weights(masks, 1.5, GRID)
    with pytest.raises(ConfigError, match="masks"):
        couple_weights(masks - 1, 0.5, GRID)
    with pytest.raises(ConfigError, match="one row per text"):
        region_sum(q, texts[:2], couple_weights(masks, 0.5, GRID), attend)
