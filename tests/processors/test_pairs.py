"""Masks over pairs as a mask over tokens times itself."""

import pytest
import torch

from gensparse.processors.pairs import NO_MASK, ProductMask, last_zero


def attention(logits: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return logits.softmax(-1).nan_to_num(0.0) @ values


@pytest.mark.parametrize("dtype", [torch.float64, torch.bool])
def test_joined_results_are_attention_under_the_whole_mask(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tokens = (torch.rand(2, 7) > 0.4).to(dtype)
    mask = ProductMask(tokens)
    logits, values = torch.randn(2, 7, 7, dtype=torch.float64), torch.randn(2, 7, 3, dtype=torch.float64)
    whole = mask.whole()[:, 0]
    if dtype is torch.bool:
        expected = attention(logits.masked_fill(~whole, -torch.inf), values)
    else:
        expected = attention(logits + whole, values)
    bias = mask.bias()
    assert bias is not None
    ones = attention(logits + bias, values)[:, :, None]
    zeros = attention(logits, values)[:, :, None] if mask.added else None
    torch.testing.assert_close(mask.joined(ones, zeros)[:, :, 0], expected)
    assert mask.added is (dtype is not torch.bool)


def test_a_trivial_mask_does_nothing() -> None:
    mask, out = ProductMask(torch.ones(1, 4), trivial=True), torch.randn(1, 4, 2, 3)
    assert mask.bias() is None
    assert not mask.added
    assert mask.joined(out, None) is out


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1]]).float(), 3),
        (torch.tensor([[1, 1, 0, 1]]).bool(), 3),
        (torch.ones(2, 4), 0),
        (torch.zeros(1, 4).bfloat16(), 4),
        (torch.tensor([[1.0, 0.5]]), NO_MASK),
        (torch.tensor([[1.0, torch.nan]]), NO_MASK),
        (torch.ones(2, 1, 4), NO_MASK),
        (torch.ones(2, 4, dtype=torch.int64), NO_MASK),
        (torch.ones(2, 4, dtype=torch.uint8), NO_MASK),
    ],
    ids=lambda value: str(value).replace("\n", "") if isinstance(value, torch.Tensor) else value,
)
def test_what_counts_as_such_a_mask(tokens: torch.Tensor, expected: int) -> None:
    assert last_zero(tokens) == expected
