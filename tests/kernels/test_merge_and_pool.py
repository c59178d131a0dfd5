"""Merging by log-sum-exp and pooling of keys, as plain tensor functions."""

import pytest
import torch
import torch.nn.functional as F

from gensparse.kernels import reference
from gensparse.kernels.merge import merge_lse
from gensparse.kernels.pool import pool_keys


def test_merging_disjoint_key_sets_is_exact():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 6, 3, 5, dtype=torch.float64) for _ in range(3))
    part = torch.randint(0, 3, (6, 6))
    parts = [reference.attend(q, k, v, part == i) for i in range(3)]
    out, lse = merge_lse(torch.stack([o for o, _ in parts]), torch.stack([s for _, s in parts]))
    whole, total = reference.attend(q, k, v, torch.ones(6, 6, dtype=torch.bool))
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(lse, total)


def test_merging_nothing_gives_zero_and_minus_infinity_with_finite_gradients():
    outs = torch.randn(2, 4, 3, requires_grad=True)
    lses = torch.tensor([[0.0, -torch.inf, -torch.inf, 2.0], [1.0, 3.0, -torch.inf, -torch.inf]], requires_grad=True)
    out, lse = merge_lse(outs, lses)
    assert torch.all(out[2] == 0)
    assert torch.isneginf(lse[2])
    torch.testing.assert_close(out[1], outs[1, 1])
    (out.sum() + lse[[0, 1, 3]].sum()).backward()
    assert torch.isfinite(outs.grad).all()
    assert torch.isfinite(lses.grad).all()


def test_merging_survives_huge_logits():
    outs = torch.tensor([[[1.0]], [[3.0]]])
    out, lse = merge_lse(outs, torch.tensor([[1e4], [1e4]]))
    torch.testing.assert_close(out, torch.tensor([[2.0]]))
    assert torch.isfinite(lse).all()


def test_mean_pool_equals_average_pooling_and_keeps_ragged_cells():
    x = torch.randn(2, 5 * 7, 3, 4)
    pooled = pool_keys(x, (1, 5, 7), (1, 2, 3), None)
    picture = x.permute(0, 2, 3, 1).reshape(2, 12, 5, 7)
    expected = F.avg_pool2d(picture, (2, 3), ceil_mode=True, count_include_pad=False)
    torch.testing.assert_close(pooled, expected.reshape(2, 3, 4, -1).permute(0, 3, 1, 2))


def test_learned_weights_are_a_strided_convolution_with_gradients():
    x = torch.randn(1, 4 * 6, 2, 3, dtype=torch.float64)
    weights = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    pooled = pool_keys(x, (1, 4, 6), (1, 2, 2), weights)
    picture = x.permute(0, 2, 3, 1).reshape(6, 1, 4, 6)
    expected = F.conv2d(picture, weights[None, None], stride=2).reshape(1, 2, 3, -1).permute(0, 3, 1, 2)
    torch.testing.assert_close(pooled, expected)
    pooled.square().sum().backward()
    assert weights.grad.abs().min() > 0


def test_half_precision_cells_are_summed_in_fp32():
    x = torch.full((1, 64 * 64, 1, 1), 1.0, dtype=torch.float16)
    assert pool_keys(x, (1, 64, 64), (1, 64, 64), None).item() == 1.0


@pytest.mark.parametrize(("weights", "cells"), [(torch.ones(3), (1, 2, 2)), (torch.ones(6), (1, 2, 3))])
def test_learned_weights_must_fit_the_cells_and_the_grid(weights, cells):
    with pytest.raises(ValueError, match="pass"):
        pool_keys(torch.zeros(1, 16, 1, 1), (1, 4, 4), cells, weights)
