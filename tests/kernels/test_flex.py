"""FlexAttention over tile lists: equal to the oracle, and candid about what it cannot do. Compiles, so few cases."""

import pytest
import torch
from attention_checks import menu, oracle, random_qkv

from gensparse import Layout, build_plan, sparse_attention
from gensparse.attention import choose, explain
from gensparse.errors import BackendError
from gensparse.kernels import flex
from gensparse.kernels.need import Need
from gensparse.patterns import Blocks, Disc, PerHead, Pooled, Text

LAYOUT = Layout.image(13, 11, text=5)


@pytest.fixture(autouse=True)
def compiler():
    reason = flex.why_not(_need())
    if reason:
        pytest.skip(reason)


def _need(**changes) -> Need:
    from gensparse.kernels.need import Need

    return Need(
        **{"dtype": torch.float32, "device": "cpu", "head_dim": 8, "queries": 9, "keys": 9, "density": 1.0, **changes}
    )


def test_menu_with_text_pooled_keys_and_bias_equals_the_oracle():
    pattern = PerHead((Disc(3) | Pooled(2, weights="mean"), Blocks(4))) | Text()
    plan = build_plan(pattern, LAYOUT)
    q, k, v = random_qkv(LAYOUT, batch=2, heads=3, dim=12)
    groups = menu(plan, 2, 3)
    bias = torch.randn(2, 1, plan.keys, generator=torch.Generator().manual_seed(1))
    bias[:, :, 7] = float("-inf")
    out = sparse_attention(q, k, v, plan, groups=groups, key_bias=bias, backend="flex")
    other = sparse_attention(q, k, v, plan, groups=groups, key_bias=bias, backend="plan_loop")
    torch.testing.assert_close(out, other, rtol=0, atol=3e-6)


def test_rows_without_keys_are_zero_and_nan_stays_in_its_rows():
    plan = build_plan(Disc(2), LAYOUT)
    q, k, v = random_qkv(LAYOUT, heads=1, dim=12)
    k[:, 40] = float("nan")
    out = sparse_attention(q, k, v, plan, backend="flex")
    assert (out[:, :5] == 0).all()
    seen = torch.from_numpy(Disc(2).dense_mask(LAYOUT))[0, :, 40]
    assert out[0].isnan().all(-1).all(-1).equal(seen)
    clean = oracle(q, k.nan_to_num(), v, Disc(2), LAYOUT)[0].float()
    torch.testing.assert_close(out[:, ~seen], clean[:, ~seen], rtol=0, atol=3e-6)


def test_flex_runs_only_when_asked_and_refuses_with_the_reason():
    plan = build_plan(Disc(2) | Text(), LAYOUT)
    q, k, v = random_qkv(LAYOUT, heads=1)
    assert explain(plan, q)["flex"] is None
    assert choose(plan, q) != "flex"
    with pytest.raises(BackendError, match=r"flex.*log-sum-exp"):
        sparse_attention(q, k, v, plan, backend="flex", return_lse=True)
    with pytest.raises(BackendError, match=r"flex.*gradient"):
        sparse_attention(q.requires_grad_(), k, v, plan, backend="flex")


def test_a_table_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(flex, "TABLE_LIMIT", 4)
    plan = build_plan(Disc(4) | Text(), LAYOUT)
    with pytest.raises(BackendError, match="MiB"):
        sparse_attention(*random_qkv(LAYOUT, heads=1), plan, backend="flex")


def test_flex_says_when_torch_keeps_no_more_variants():
    import torch._dynamo

    torch._dynamo.reset()
    calls = [(build_plan(Disc(2), layout), random_qkv(layout, heads=1, dim=16)) for layout in map(_square, (3, 9, 17))]
    with torch._dynamo.config.patch(recompile_limit=1), pytest.raises(BackendError, match="variants"):
        [sparse_attention(*tensors, plan, backend="flex") for plan, tensors in calls]
    torch._dynamo.reset()


def _square(side: int) -> Layout:
    return Layout.image(side, side)
