"""Averaged keys under a mask: hidden tokens are not averaged, and a cell of hidden tokens is hidden."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

import gensparse
from gensparse.attention import biased_pools, sparse_attention
from gensparse.errors import ConfigError
from gensparse.kernels.pool import pool_keys, pool_weighted
from gensparse.layout import Layout
from gensparse.patterns import Pattern, Pooled, Proxy, Reference, References, Text
from gensparse.plan import build_plan
from gensparse.testing.tiny import tiny_denoiser, tiny_inputs

LAYOUTS = [Layout.joint((1, 5, 3), text=3), Layout.video(3, 3, 2, text=2)]


def tensors(tokens: int, heads: int = 2, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(batch, tokens, heads, 8, generator=generator, dtype=torch.float64) for _ in range(3)]


def attend_loop(q, k, v, layout: Layout, window: tuple[int, int, int], bias: torch.Tensor) -> torch.Tensor:
    """`Proxy(window) | Text()` by its definition, query by query, with every token weighted by exp(bias)."""
    start, grid = layout.starts[layout.target], layout.grid
    place = {t: start + n for n, t in enumerate(itertools.product(*(range(n) for n in grid)))}
    words = [i for i in range(layout.tokens) if i not in place.values()]
    cell = {t: tuple(x // w for x, w in zip(t, window, strict=True)) for t in place}
    cells = {c: [place[t] for t in place if cell[t] == c] for c in set(cell.values())}
    out = torch.zeros_like(q)
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        beta = bias[min(b, bias.shape[0] - 1), 0]
        for i in range(layout.tokens):
            mine = next((c for c, members in cells.items() if i in members), None)
            exact = [j for j in range(layout.tokens) if mine is None or j in words or j in cells[mine]]
            keys, values, logs = [k[b, exact, h]], [v[b, exact, h]], [beta[exact]]
            for c in [c for c in cells if mine is not None and c != mine]:
                weight = torch.exp(beta[cells[c]])
                if weight.sum() > 0:
                    share = (weight / weight.sum())[:, None]
                    keys.append((share * k[b, cells[c], h]).sum(0, keepdim=True))
                    values.append((share * v[b, cells[c], h]).sum(0, keepdim=True))
                    logs.append(weight.sum().log()[None])
            logits = torch.cat(keys) @ q[b, i, h] / q.shape[-1] ** 0.5 + torch.cat(logs)
            out[b, i, h] = logits.softmax(0) @ torch.cat(values)
    return out


@pytest.mark.parametrize("kind", ["hidden", "graded"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_tokens_count_with_the_exponential_of_their_bias(layout: Layout, kind: str) -> None:
    q, k, v = tensors(layout.tokens)
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(2, 1, layout.tokens, generator=generator, dtype=torch.float64)
    if kind == "hidden":
        bias = torch.zeros_like(bias).masked_fill(bias > 0.4, -torch.inf)
        start = layout.starts[layout.target]
        bias[0, 0, start : start + 2] = -torch.inf
    plan = build_plan((Proxy((2, 2, 2)) | Text()).clamped(layout.grid), layout)
    sources, whole = biased_pools(k, v, plan, bias)
    out = sparse_attention(q, k, v, plan, key_bias=whole, sources=sources)
    window = tuple(min(2, n) for n in layout.grid)
    torch.testing.assert_close(out, attend_loop(q, k, v, layout, window, bias))


def test_a_bias_of_zero_changes_nothing_and_given_sources_stay() -> None:
    layout = LAYOUTS[0]
    q, k, v = tensors(layout.tokens)
    cat = References((Reference("cat", grid=(2, 2)),))
    pattern: Pattern = Pooled(3, weights="mean", bias="log_share") | Text() | cat
    plan = build_plan(pattern, layout)
    given = {"cat": (k[:, :4], v[:, :4])}
    sources, bias = biased_pools(k, v, plan, torch.zeros(1, 1, layout.tokens), given)
    assert sources["cat"] is given["cat"]
    expected = sparse_attention(q, k, v, plan, sources=given)
    torch.testing.assert_close(sparse_attention(q, k, v, plan, key_bias=bias, sources=sources), expected)


def test_hidden_tokens_may_hold_anything() -> None:
    x = torch.full((1, 6, 1, 2), torch.nan)
    x[:, ::2] = torch.arange(12.0).view(1, 6, 1, 2)[:, ::2]
    weight = torch.zeros(1, 1, 6)
    weight[..., 1::2] = -torch.inf
    pooled, total = pool_weighted(x, (1, 1, 6), (1, 1, 4), weight)
    torch.testing.assert_close(pooled, pool_keys(x[:, ::2], (1, 1, 3), (1, 1, 2), None))
    torch.testing.assert_close(total, torch.tensor([[[2.0, 1.0]]]).log())


def test_a_bias_per_head_needs_as_many_key_heads() -> None:
    layout = LAYOUTS[0]
    _, k, v = tensors(layout.tokens)
    plan = build_plan(Proxy(2) | Text(), layout)
    with pytest.raises(ConfigError, match="key_bias for 4 heads"):
        biased_pools(k, v, plan, torch.zeros(1, 4, layout.tokens))


def test_a_mask_of_a_model_joins_a_call_with_averages_but_not_one_with_learned_weights() -> None:
    model, inputs = tiny_denoiser("flux"), tiny_inputs("flux", (1, 6, 7), text=5, batch=2)
    keep = torch.ones(2, 47, dtype=torch.bool)
    keep[0, 3:5] = keep[1, 1:5] = keep[1, 20:29] = False

    def run(**more: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs, **more).sample

    mask = {"joint_attention_kwargs": {"attention_mask": keep[:, None, None]}}
    dense = run(**mask)
    assert (run() - dense).abs().max() > 1e-2
    handle = gensparse.apply(model, "proxy:window=1", strict=True)
    torch.testing.assert_close(run(**mask), dense, atol=1e-5, rtol=0)
    assert handle.report()["dense"] == {}
