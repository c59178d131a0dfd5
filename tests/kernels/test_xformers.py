"""The xformers adapter: windows packed as the library's block-diagonal sequences.

The library computes on GPUs only, so a stand-in with its published contract (sequences packed along one axis, a bias
made of lengths, lse as [1, heads, queries]) computes the blocks; what is tested is what the adapter hands over.
"""

import sys
from types import ModuleType

import pytest
import torch
from attention_checks import menu, oracle, random_qkv

from gensparse import Layout, build_plan, sparse_attention
from gensparse.errors import BackendError
from gensparse.kernels import xformers
from gensparse.kernels.need import Need
from gensparse.patterns import MSW, Blocks, Disc, Grid, PerHead, Text


class Lengths:
    """Block-diagonal bias: query and key tokens of every sequence."""

    def __init__(self, queries: list[int], keys: list[int]) -> None:
        self.queries, self.keys = queries, keys

    from_seqlens = classmethod(lambda cls, queries, keys: cls(queries, keys))


def attention(q, k, v, attn_bias, scale=None):
    assert q.shape[0] == k.shape[0] == v.shape[0] == 1
    assert (q.shape[1], k.shape[1]) == (sum(attn_bias.queries), sum(attn_bias.keys))
    sizes = (attn_bias.queries, attn_bias.keys, attn_bias.keys)
    windows = zip(*(x.transpose(1, 2).split(size, 2) for x, size in zip((q, k, v), sizes, strict=True)), strict=True)
    parts = [torch.nn.functional.scaled_dot_product_attention(*window, scale=scale) for window in windows]
    return torch.cat(parts, 2).transpose(1, 2)


def with_lse(q, k, v, attn_bias, scale=None):
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    rows = [
        torch.logsumexp(factor * torch.einsum("bqhd,bkhd->bhqk", a, b).float(), -1)
        for a, b in zip(q.split(attn_bias.queries, 1), k.split(attn_bias.keys, 1), strict=True)
    ]
    return attention(q, k, v, attn_bias, scale), torch.cat(rows, -1)


@pytest.fixture
def library(monkeypatch):
    for name in ("xformers", "xformers.ops", "xformers.ops.fmha", "xformers.ops.fmha.attn_bias"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["xformers.ops"].memory_efficient_attention = attention
    sys.modules["xformers.ops"].memory_efficient_attention_forward_requires_grad = with_lse
    sys.modules["xformers.ops.fmha.attn_bias"].BlockDiagonalMask = Lengths


@pytest.mark.parametrize("grid", [(1, 7, 11), (1, 8, 8), (3, 4, 5), (1, 1, 1)])
@pytest.mark.parametrize(
    "pattern", [Blocks(4), Blocks(3, shift=1, wrap=True), MSW(1), Grid(3), PerHead((Blocks(2), Blocks(5)))], ids=repr
)
def test_windows_equal_the_oracle(library, grid, pattern):
    layout = Layout.joint(grid, text=3)
    pattern = pattern.clamped(grid) | Text()
    plan = build_plan(pattern, layout)
    q, k, v = random_qkv(layout, batch=2, heads=2, dim=8)
    groups = menu(plan, 2, 2)
    works = plan.partition()
    expected, expected_lse = oracle(q, k, v, pattern, layout, groups=groups)
    out, lse = xformers.attend(q, k, v, works, groups=groups, return_lse=True)
    torch.testing.assert_close(out, expected.float(), rtol=0, atol=2e-6)
    torch.testing.assert_close(lse, expected_lse.float(), rtol=0, atol=2e-6)
    torch.testing.assert_close(xformers.attend(q, k, v, works, groups=groups)[0], out, rtol=0, atol=2e-6)


def test_grouped_key_heads_are_repeated(library):
    layout = Layout.image(6, 9)
    plan = build_plan(Blocks(3), layout)
    q, k, v = random_qkv(layout, heads=4, dim=8)
    out, _ = xformers.attend(q, k[:, :, :2], v[:, :, :2], plan.partition())
    expected, _ = oracle(q, k[:, :, :2], v[:, :, :2], Blocks(3), layout)
    torch.testing.assert_close(out, expected.float(), rtol=0, atol=2e-6)


def _need(**changes) -> Need:
    facts = {"dtype": torch.float16, "device": "cuda", "head_dim": 8, "queries": 9, "keys": 9, "density": 1.0}
    return Need(**{**facts, **changes})


def test_every_objection_has_its_sentence(monkeypatch):
    monkeypatch.setattr(xformers, "find_spec", lambda name: None)
    assert "not installed" in xformers.why_not(_need())
    monkeypatch.setattr(xformers, "find_spec", lambda name: object())
    assert xformers.why_not(_need()) is None
    assert "GPUs only" in xformers.why_not(_need(device="cpu"))
    assert "key bias" in xformers.why_not(_need(bias=True))
    assert "float32" in xformers.why_not(_need(dtype=torch.float32))
    assert "windows" in xformers.why_not(_need(refused={"partition": "no windows."}))


def test_asking_for_it_on_the_cpu_raises_and_never_runs_something_else():
    layout = Layout.image(6, 6)
    with pytest.raises(BackendError, match="Can't run xformers"):
        sparse_attention(*random_qkv(layout), build_plan(Disc(2), layout), backend="xformers")
