"""The oracle against torch's own dense attention, and its rules for empty rows, menus and grouped heads."""

import pytest
import torch
import torch.nn.functional as F

from gensparse.kernels import reference
from gensparse.kernels.need import Need


def qkv(batch=2, tokens=7, heads=4, dim=5, keys=None, kv_heads=None):
    torch.manual_seed(0)
    shape = (batch, keys or tokens, kv_heads or heads, dim)
    q, k, v = torch.randn(batch, tokens, heads, dim), torch.randn(shape), torch.randn(shape)
    return q.double(), k.double(), v.double()


def test_equals_torch_attention_under_a_mask():
    q, k, v = qkv(keys=9)
    allowed = torch.rand(7, 9) < 0.5
    allowed[:, 0] = True
    out, lse = reference.attend(q, k, v, allowed, scale=0.3)
    expected = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=allowed, scale=0.3
    )
    torch.testing.assert_close(out, expected.transpose(1, 2))
    scores = 0.3 * torch.einsum("bqhd,bkhd->bqhk", q, k)
    torch.testing.assert_close(lse, scores.masked_fill(~allowed[:, None], -torch.inf).logsumexp(-1))


def test_grouped_heads_repeat_their_keys():
    q, k, v = qkv(kv_heads=2)
    everything = torch.ones(7, 7, dtype=torch.bool)
    out, _ = reference.attend(q, k, v, everything)
    repeated = [x.repeat_interleave(2, dim=2) for x in (k, v)]
    torch.testing.assert_close(out, reference.attend(q, *repeated, everything)[0])


def test_menu_picks_a_mask_per_head_and_sample():
    q, k, v = qkv(heads=2)
    masks = torch.stack([torch.eye(7, dtype=torch.bool), torch.ones(7, 7, dtype=torch.bool)])
    out, _ = reference.attend(q, k, v, masks, groups=torch.tensor([[0, 1], [1, 0]]))
    torch.testing.assert_close(out[0, :, 0], v[0, :, 0])
    torch.testing.assert_close(out[1, :, 1], v[1, :, 1])
    torch.testing.assert_close(out[:, :, :1][1], reference.attend(q, k, v, masks[1])[0][1, :, :1])


def test_rows_without_a_key_give_zero_and_minus_infinity_with_finite_gradients():
    q, k, v = (x.requires_grad_() for x in qkv())
    allowed = torch.ones(7, 7, dtype=torch.bool)
    allowed[2] = False
    out, lse = reference.attend(q, k, v, allowed)
    assert torch.all(out[:, 2] == 0)
    assert torch.all(torch.isneginf(lse[:, 2]))
    out.square().sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_fp32(dtype):
    q, k, v = (x.to(dtype) for x in qkv())
    out, lse = reference.attend(q, k, v, torch.ones(7, 7, dtype=torch.bool))
    exact, _ = reference.attend(q.double(), k.double(), v.double(), torch.ones(7, 7, dtype=torch.bool))
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert (out.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_refuses_sizes_whose_mask_would_not_fit():
    need = Need(torch.float32, "cpu", 64, 65536, 65536, 0.1)
    assert "65536 x 65536" in reference.why_not(need)
    assert reference.why_not(Need(torch.float32, "cpu", 64, 100, 100, 0.1)) is None
