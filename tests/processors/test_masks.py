"""Masks over keys become a bias with the same effect."""

import pytest
import torch
import torch.nn.functional as F

from gensparse.processors.masks import key_bias


@pytest.mark.parametrize("shape", [(1, 9), (1, 1, 9), (2, 1, 1, 9), (1, 3, 1, 9), (2, 3, 1, 9)])
@pytest.mark.parametrize("kind", ["bool", "float", "half"])
def test_bias_has_the_effect_of_the_mask(shape: tuple[int, ...], kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 9, 8, generator=generator) for _ in range(3))
    mask = torch.rand(shape, generator=generator) > 0.4
    mask[..., 0] = True
    if kind != "bool":
        mask = torch.randn(shape, generator=generator).to(torch.float16 if kind == "half" else torch.float32)
    bias = key_bias(mask)
    assert bias is not None
    assert bias.ndim == 3
    assert bias.dtype is torch.float32
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask if kind == "bool" else mask.float())
    torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, :, None]), expected)


@pytest.mark.parametrize("shape", [(9, 9), (2, 3, 9, 9), (2, 1, 9, 9), (9,)])
def test_masks_per_query_are_not_taken_for_masks_over_keys(shape: tuple[int, ...]) -> None:
    assert key_bias(torch.ones(shape, dtype=torch.bool)) is None
