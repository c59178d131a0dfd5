"""Every CPU backend against the dense fp64 oracle: sizes, dtypes, gradients, options, refusals."""

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from attention_checks import BACKENDS, menu, oracle, poisoned_memory, random_qkv, run, usable
from pattern_cases import COMPOSED, GEOMETRIC, GRIDS, layouts

from gensparse.attention import choose, dispatch, explain, sparse_attention
from gensparse.errors import BackendError, ConfigError, LayoutMismatchError, PlanTooLargeError
from gensparse.kernels import blocks, dense, plan_loop
from gensparse.kernels.pool import pool_keys
from gensparse.layout import Layout
from gensparse.patterns import MSW, Blocks, Box, CrissCross, Disc, Neighborhood, PerHead, Pooled, Stripes, Text
from gensparse.plan import build_plan

LAYOUTS = [layouts(grid)[(number + 1) % 2] for number, grid in enumerate(GRIDS)]
SPREAD = [
    Disc(3) | Text(),
    Neighborhood(4, stride=3) | Text(),
    Neighborhood(3, dilation=2) | Text(),
    MSW(1) | Text(),
    CrissCross() | Text(),
    Disc(2) | Text() | Pooled(3, weights="mean", bias="log_count"),
    PerHead((Stripes(2), Box(2))) | Text(),
]
PICTURE = Layout.image(13, 11, text=5)


def with_pools(pattern, layout, k, v, key_bias=None):
    """k, v and bias with mean-pooled sources appended, made here from the definition."""
    rule = pattern.bind(layout)
    if not rule.sources:
        return k, v, key_bias
    start, segment = layout.starts[layout.target], layout.segments[layout.target]
    own = slice(start, start + segment.length)
    pooled = [[pool_keys(x[:, own], segment.shape, s.cells, None, s.shift) for s in rule.sources] for x in (k, v)]
    bias = [k.new_zeros(layout.tokens)] if key_bias is None else [key_bias]
    bias += [cell_bias(segment.shape, source) for source in rule.sources]
    shape = (*bias[0].shape[:-1], -1)
    joined = torch.cat([bias[0], *(part.to(k.dtype).expand(*shape) for part in bias[1:])], -1)
    joined = joined if joined.dim() == 3 else joined[None, None]
    return torch.cat([k, *pooled[0]], 1), torch.cat([v, *pooled[1]], 1), joined


def cell_bias(grid, source):
    """What a source adds to its logits, by counting the tokens of every cell."""
    if not isinstance(source.bias, str):
        return torch.full((source.segment.length,), float(source.bias), dtype=torch.float64)
    index = [(torch.arange(n) + -s % c) // c for n, c, s in zip(grid, source.cells, source.shift, strict=True)]
    shape = source.segment.shape
    cell = (index[0][:, None, None] * shape[1] + index[1][:, None]) * shape[2] + index[2]
    count = torch.bincount(cell.reshape(-1)).double()
    return (count if source.bias == "log_count" else count / math.prod(source.cells)).log()


def expected(pattern, layout, q, k, v, plan, **settings):
    k, v, bias = with_pools(pattern, layout, k.double(), v.double(), settings.pop("key_bias", None))
    return oracle(q, k, v, pattern, layout, key_bias=bias, **settings)


def check(pattern, layout, *, batch=2, heads=3, dim=8, **settings):
    pattern = pattern.clamped(layout.grid)
    plan = build_plan(pattern, layout)
    q, k, v = random_qkv(layout, batch=batch, heads=heads, dim=dim)
    groups = menu(plan, batch, heads)
    want, want_lse = expected(pattern, layout, q, k, v, plan, groups=groups, **settings)
    for name in usable(plan, q):
        out, lse = run(name, q, k, v, plan=plan, groups=groups, **settings)
        torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
        torch.testing.assert_close(lse.double(), want_lse.double(), atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("pattern", [*GEOMETRIC, *COMPOSED], ids=repr)
def test_every_backend_equals_the_dense_oracle(pattern):
    for layout in LAYOUTS:
        check(pattern, layout)


@pytest.mark.parametrize("pattern", SPREAD, ids=repr)
@pytest.mark.parametrize("dim", [1, 7, 40, 256])
def test_any_head_dimension(pattern, dim):
    check(pattern, PICTURE, dim=dim, batch=1, heads=2)


@pytest.mark.parametrize("pattern", SPREAD, ids=repr)
def test_scale_and_key_bias(pattern):
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(1, 3, PICTURE.tokens, generator=generator)
    bias[0, 1, 40:60] = -torch.inf
    check(pattern, PICTURE, scale=0.7, key_bias=bias)


def test_key_bias_may_hide_everything_a_query_sees():
    plan = build_plan(Disc(2), Layout.image(9, 9))
    q, k, v = random_qkv(Layout.image(9, 9))
    bias = torch.full((1, 1, 81), -torch.inf)
    bias[..., 70:] = 0.0
    for name in usable(plan, q):
        out, lse = run(name, q, k, v, plan=plan, key_bias=bias)
        assert torch.all(out[:, :40] == 0)
        assert torch.all(torch.isneginf(lse[:, :40]))
        assert torch.isfinite(out).all()


@pytest.mark.parametrize("pattern", SPREAD, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_as_exact_as_dense_attention_in_that_dtype(pattern, dtype):
    """Error against fp64, relative to plain low-precision attention (products in the dtype, softmax in fp32)."""
    plan = build_plan(pattern, PICTURE)
    q, k, v = random_qkv(PICTURE, batch=2, heads=2, dim=64, dtype=dtype)
    groups = menu(plan, 2, 2)
    want, _ = expected(pattern, PICTURE, q.double(), k.double(), v.double(), plan, groups=groups)
    baseline = low_precision(pattern, q, k, v, groups)
    limit = 1.5 * rms(baseline.double() - want)
    for name in usable(plan, q):
        out, _ = run(name, q, k, v, plan=plan, groups=groups)
        assert rms(out.double() - want) <= limit, name


def low_precision(pattern, q, k, v, groups):
    k, v, bias = with_pools(pattern, PICTURE, k, v)
    mask = torch.from_numpy(pattern.dense_mask(PICTURE))
    allowed = mask[groups] if groups is not None else mask[:, None]
    scores = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).float() * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias.float()[:, :, None]
    weights = torch.softmax(scores.masked_fill(~allowed, -torch.inf), -1).to(q.dtype)
    return (weights @ v.transpose(1, 2)).transpose(1, 2)


def rms(x):
    return x.square().mean().sqrt()


@pytest.mark.parametrize("pattern", SPREAD, ids=repr)
def test_gradients_equal_those_of_the_dense_oracle(pattern):
    plan = build_plan(pattern, PICTURE)
    tensors = [x.double().requires_grad_() for x in random_qkv(PICTURE, batch=1, heads=2, dim=5)]
    bias = torch.randn(1, 2, PICTURE.tokens, dtype=torch.float64, requires_grad=True)
    groups = menu(plan, 1, 2)
    weight = torch.randn_like(tensors[0])
    k, v, full = with_pools(pattern, PICTURE, *tensors[1:], bias)
    want, _ = oracle(tensors[0], k, v, pattern, PICTURE, key_bias=full, groups=groups)
    grads = torch.autograd.grad((want * weight).sum(), [*tensors, bias])
    for name in usable(plan, tensors[0]):
        out = sparse_attention(*tensors, plan, backend=name, key_bias=bias, groups=groups)
        got = torch.autograd.grad((out * weight).sum(), [*tensors, bias])
        for mine, theirs in zip(got, grads, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("pattern", SPREAD, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_the_fast_paths(pattern, dtype):
    """Without bias or log-sum-exp each dtype takes its own products."""
    plan = build_plan(pattern, PICTURE)
    tensors = [x.requires_grad_() for x in random_qkv(PICTURE, batch=1, heads=2, dim=8, dtype=dtype)]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    groups = menu(plan, 1, 2)
    want, _ = expected(pattern, PICTURE, *exact, plan, groups=groups)
    grads = torch.autograd.grad(want.square().sum(), exact)
    limit = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for name in usable(plan, tensors[0]):
        out = sparse_attention(*tensors, plan, backend=name, groups=groups)
        for mine, theirs in zip(torch.autograd.grad(out.square().sum(), tensors), grads, strict=True):
            assert mine.dtype == dtype
            assert rms(mine.double() - theirs) <= limit * rms(theirs)


def test_gradients_of_the_log_sum_exp_stay_finite_where_no_key_is_seen():
    layout = Layout.image(7, 9, text=4)
    plan = build_plan(Disc(3), layout)
    tensors = [x.requires_grad_() for x in random_qkv(layout)]
    for name in usable(plan, tensors[0]):
        out, lse = sparse_attention(*tensors, plan, backend=name, return_lse=True)
        grads = torch.autograd.grad(out.sum() + lse[:, 4:].sum(), tensors)
        assert all(torch.isfinite(x).all() for x in grads)
        assert all(torch.all(x[:, :4] == 0) for x in grads)


def test_learned_pool_weights_get_gradients():
    layout = Layout.image(8, 12, text=3)
    pattern = Disc(3) | Text() | Pooled(2)
    plan = build_plan(pattern, layout)
    (source,) = plan.sources
    q, k, v = (x.double() for x in random_qkv(layout))
    weights = torch.rand(2, 2, dtype=torch.float64, requires_grad=True)
    pooled = [pool_keys(x[:, 3:], (1, 8, 12), (1, 2, 2), weights) for x in (k, v)]
    want, _ = oracle(q, torch.cat([k, pooled[0]], 1), torch.cat([v, pooled[1]], 1), pattern, layout)
    (grad,) = torch.autograd.grad(want.square().sum(), weights)
    for name in usable(plan, q):
        out = sparse_attention(q, k, v, plan, backend=name, sources={source.name: weights})
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(torch.autograd.grad(out.square().sum(), weights)[0], grad)
        ready = sparse_attention(q, k, v, plan, backend=name, sources={source.name: tuple(pooled)})
        torch.testing.assert_close(ready, want)


@pytest.mark.parametrize("pattern", SPREAD, ids=repr)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_broken_token_spoils_only_the_rows_that_see_it(pattern, poison):
    if pattern.bind(PICTURE).sources:
        pattern = Disc(2) | Text()
    plan = build_plan(pattern, PICTURE)
    q, k, v = random_qkv(PICTURE, batch=1)
    groups = menu(plan, 1, 2)
    seen = torch.from_numpy(pattern.dense_mask(PICTURE))[:, :, 50]
    seen = seen[groups[0]] if groups is not None else seen.expand(2, -1)
    for target in (1, 2):
        tensors = [q, k.clone(), v.clone()]
        tensors[target][:, 50] = poison
        for name in usable(plan, q):
            clean = sparse_attention(q, k, v, plan, backend=name, groups=groups)
            out = sparse_attention(*tensors, plan, backend=name, groups=groups)
            assert torch.isnan(out[0].transpose(0, 1)[seen]).all()
            torch.testing.assert_close(out[0].transpose(0, 1)[~seen], clean[0].transpose(0, 1)[~seen])


@pytest.mark.parametrize("pattern", SPREAD[:5], ids=repr)
def test_strided_views_and_grouped_heads(pattern):
    plan = build_plan(pattern, PICTURE)
    packed = torch.randn(2, PICTURE.tokens, 8, 3, 8)
    q = packed[..., 0, :]
    k, v = (packed[:, :, ::4, i].transpose(1, 2).contiguous().transpose(1, 2) for i in (1, 2))
    want, _ = oracle(q, k, v, pattern, PICTURE)
    for name in usable(plan, q):
        out, _ = run(name, q, k, v, plan=plan)
        torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("pattern", SPREAD, ids=repr)
def test_small_memory_steps_give_the_same_result(pattern, monkeypatch):
    """One tile, one head, one list entry at a time."""
    monkeypatch.setattr(blocks, "CHUNK_BYTES", 1)
    monkeypatch.setattr(plan_loop, "STEP_BYTES", 1)
    monkeypatch.setattr(dense, "SCORE_BYTES", 1)
    check(pattern, PICTURE, batch=1, heads=2)


@pytest.mark.parametrize("bias", [False, True])
def test_queries_of_a_tile_skip_the_keys_that_only_others_of_it_see(bias):
    layout = Layout.image(37, 43)
    classes = build_plan(Disc(8), layout).halo()[0].tiles
    computed = sum(
        tiles.sizes[0] * len(range(*queries.indices(tiles.sizes[1]))) * len(range(*keys.indices(tiles.sizes[2])))
        for tiles in classes
        for queries, keys in blocks._pieces(tiles.bias()[0])
    )
    assert int(Disc(8).dense_mask(layout).sum()) <= computed < 0.9 * sum(math.prod(tiles.sizes) for tiles in classes)
    check(Disc(8), layout, key_bias=torch.randn(1, 3, layout.tokens) if bias else None)


def test_text_rows_are_empty_without_a_text_policy():
    layout = Layout.image(9, 7, text=4)
    plan = build_plan(Disc(3), layout)
    q, k, v = random_qkv(layout)
    for name in usable(plan, q):
        out, lse = run(name, q, k, v, plan=plan)
        assert torch.all(out[:, :4] == 0)
        assert torch.all(torch.isneginf(lse[:, :4]))


def test_a_window_over_the_whole_grid_equals_dense_attention():
    layout = Layout.image(12, 9, text=5)
    q, k, v = random_qkv(layout, heads=3)
    want = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    for pattern in (Disc(30) | Text(), Box(12) | Text(), Neighborhood((12, 9)) | Text(), Blocks(None) | Text()):
        plan = build_plan(pattern, layout)
        for name in usable(plan, q):
            torch.testing.assert_close(sparse_attention(q, k, v, plan, backend=name), want)


def test_the_first_backend_without_objection_is_taken_and_logged_once(caplog):
    dispatch.announce.cache_clear()
    q, k, v = random_qkv(PICTURE)
    picks = {Disc(3) | Text(): "halo", MSW(1) | Text(): "partition"}
    with caplog.at_level(logging.INFO, logger="gensparse"):
        for pattern, name in picks.items():
            plan = build_plan(pattern, PICTURE)
            assert choose(plan, q) == name
            for _ in range(3):
                sparse_attention(q, k, v, plan)
            assert [record.getMessage() for record in caplog.records if f"runs on {name}" in record.getMessage()]
    assert len(caplog.records) == 2


def test_explain_names_every_backend_and_its_refusal():
    plan = build_plan(CrissCross(), Layout.image(150, 150))
    reasons = explain(plan, torch.zeros(1, 22500, 1, 8))
    assert list(reasons) == ["partition", "triton", "halo", "plan_loop", "reference", "flex", "xformers"]
    assert reasons["plan_loop"] is None
    assert all(reasons[name] for name in ("partition", "halo", "reference"))
    assert choose(plan, torch.zeros(1, 22500, 1, 8)) == "plan_loop"


def test_an_explicit_backend_never_falls_back():
    plan = build_plan(Disc(3) | Text(), PICTURE)
    q, k, v = random_qkv(PICTURE)
    with pytest.raises(BackendError, match="Can't run partition"):
        sparse_attention(q, k, v, plan, backend="partition")
    with pytest.raises(BackendError, match="use one of partition"):
        sparse_attention(q, k, v, plan, backend="fastest")


def test_the_dense_oracle_is_a_backend_at_small_sizes_only():
    q, k, v = random_qkv(PICTURE)
    plan = build_plan(Disc(3) | Text(), PICTURE)
    torch.testing.assert_close(
        sparse_attention(q, k, v, plan, backend="reference"), sparse_attention(q, k, v, plan), atol=2e-6, rtol=1e-5
    )
    large = build_plan(Disc(3), Layout.image(130, 130))
    tokens = torch.zeros(1, 16900, 1, 1)
    with pytest.raises(BackendError, match="16384"):
        sparse_attention(tokens, tokens, tokens, large, backend="reference")
    with pytest.raises(PlanTooLargeError):
        Disc(3).dense_mask(Layout.image(200, 200))


def test_arguments_that_do_not_fit_are_named():
    layout = Layout.image(6, 6)
    q, k, v = random_qkv(layout)
    plan = build_plan(Disc(3), layout)
    with pytest.raises(LayoutMismatchError, match="30 queries"):
        sparse_attention(q[:, :30], k[:, :30], v[:, :30], plan)
    with pytest.raises(LayoutMismatchError, match="fit together"):
        sparse_attention(q, k, v[..., :4], plan)
    with pytest.raises(LayoutMismatchError, match="multiple"):
        sparse_attention(q, torch.cat([k, k[:, :, :1]], 2), torch.cat([v, v[:, :, :1]], 2), plan)
    with pytest.raises(ConfigError, match="leave sources out"):
        sparse_attention(q, k, v, plan, sources={"pool": k})
    with pytest.raises(ConfigError, match="groups"):
        sparse_attention(q, k, v, build_plan(PerHead((Disc(2), Box(2))), layout))
    with pytest.raises(ConfigError, match="needs weights"):
        sparse_attention(q, k, v, build_plan(Disc(2) | Pooled(2), layout))


@pytest.mark.parametrize("name", BACKENDS)
def test_results_do_not_depend_on_memory_left_behind(name):
    plan = build_plan(Blocks(4) | Text(), Layout.image(10, 10, text=3))
    q, k, v = random_qkv(Layout.image(10, 10, text=3))
    first = sparse_attention(q, k, v, plan, backend=name)
    with poisoned_memory():
        again = sparse_attention(q, k, v, plan, backend=name)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
