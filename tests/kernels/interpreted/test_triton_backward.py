"""Gradients of the kernels against those of dense attention in fp64."""

import pytest
import torch
from attention_checks import menu, oracle, poisoned_memory, random_qkv
from triton_checks import schedule_of

from gensparse.attention.sources import with_sources
from gensparse.kernels import ops
from gensparse.kernels.triton import launch, tune
from gensparse.layout import Layout
from gensparse.patterns import Blocks, Disc, Neighborhood, PerHead, Pooled, Stripes, Text
from gensparse.plan import build_plan

PICTURE = Layout.image(6, 7, text=5)
MENU = PerHead((Stripes(2), Disc(3), Blocks(4))) | Text()
RATIO = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def check_backward(pattern, layout, *, dim=8, dtype=torch.float32, batch=1, heads=2, tiles=(32, 32), bias=None, **more):
    pattern = pattern.clamped(layout.grid)
    plan = build_plan(pattern, layout, q_tile=tiles[0], k_tile=tiles[1])
    q, k, v = random_qkv(layout, batch=batch, heads=heads, dim=dim, dtype=dtype)
    k, v, bias = with_sources(k, v, plan, bias, None)
    compare(q, k, v, bias, plan, groups=menu(plan, batch, heads), **more)


def compare(q, k, v, bias, plan, *, most=None, **settings):
    """Relative error of every gradient; outputs and log-sum-exps both get one."""
    generator = torch.Generator().manual_seed(7)
    weight, total = (torch.randn(shape, generator=generator) for shape in (q.shape, q.shape[:3]))

    def gradients(tensors, attend):
        leaves = [x.detach().requires_grad_() for x in tensors if x is not None]
        named = dict(zip(("q", "k", "v", "key_bias"), leaves, strict=False))
        out, lse = attend(*(named[name] for name in "qkv"), key_bias=named.get("key_bias"), **settings)
        seen = torch.isfinite(lse)
        loss = (out * weight.to(out.dtype)).sum() + (lse[seen] * total.to(lse.dtype)[seen]).sum()
        return dict(zip(named, torch.autograd.grad(loss, leaves), strict=True))

    def engine(q, k, v, **options):
        return ops.attend(q, k, v, plan.lists, schedule_of(plan, most), engine="triton", **options)

    exact = [None if x is None else x.double() for x in (q, k, v, bias)]
    want = gradients(exact, lambda q, k, v, **options: oracle(q, k, v, plan.pattern, plan.layout, **options))
    with poisoned_memory():
        got = gradients((q, k, v, bias), engine)
    for name, theirs in want.items():
        mine = got[name].double()
        assert torch.isfinite(mine).all(), name
        error = (mine - theirs).square().mean().sqrt() / theirs.square().mean().sqrt()
        assert error <= RATIO[q.dtype], f"d{name} is off by {error:.1e}"


@pytest.mark.parametrize(
    ("pattern", "layout"),
    [
        (Disc(3) | Text(), Layout.image(1, 1, text=1)),
        (Disc(3) | Text(), Layout.image(11, 5, text=37)),
        (Neighborhood(3, dilation=2) | Text(), PICTURE),
        (Disc(2), Layout.video(2, 5, 7, text=3)),
    ],
    ids=repr,
)
def test_gradients_on_awkward_grids(pattern, layout):
    check_backward(pattern, layout)


@pytest.mark.parametrize("dim", [1, 72])
def test_gradients_of_any_head_dimension(dim):
    check_backward(Disc(2) | Text(), Layout.image(5, 7, text=2), dim=dim, heads=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_in_half_precision(dtype):
    check_backward(Disc(3) | Text(), PICTURE, dtype=dtype, dim=40, heads=1)


def test_gradients_of_split_lists():
    bias = torch.randn(1, 1, PICTURE.tokens)
    check_backward(Disc(3) | Text(), PICTURE, most=1, bias=bias)
    check_backward(MENU, PICTURE, most=1, heads=3)


def test_gradients_of_tiles_in_smaller_blocks(monkeypatch):
    config = tune.Config(32, 32, num_warps=4, num_stages=1)
    monkeypatch.setattr(launch, "config_for", lambda case: config)
    check_backward(Disc(3) | Text(), PICTURE, tiles=(128, 64), heads=1, most=1)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2)], ids=str)
def test_gradients_of_the_key_bias(shape):
    bias = torch.randn(*shape, PICTURE.tokens)
    bias[..., 20:30] = -torch.inf
    check_backward(Disc(3) | Text(), PICTURE, bias=bias, batch=2)


def test_hidden_keys_get_no_gradient():
    plan = build_plan(Disc(3) | Text(), PICTURE, q_tile=32, k_tile=32)
    q, k, v = (x.requires_grad_() for x in random_qkv(PICTURE))
    bias = torch.zeros(1, 1, PICTURE.tokens)
    bias[..., 10:40] = -torch.inf
    out, lse = ops.attend(q, k, v, plan.lists, schedule_of(plan), engine="triton", key_bias=bias.requires_grad_())
    grads = torch.autograd.grad(out.sum() + lse.sum(), (k, v, bias))
    assert all(torch.all(x[:, 10:40] == 0) for x in grads[:2])
    assert torch.all(grads[2][..., 10:40] == 0)
    assert torch.all(grads[2][..., :10] != 0)


@pytest.mark.parametrize("scale", [-0.7, 2.0])
def test_gradients_with_a_scale(scale):
    check_backward(Disc(3) | Text(), PICTURE, scale=scale, heads=1)


def test_gradients_of_pooled_keys_and_menus():
    check_backward(Disc(2) | Text() | Pooled(3, weights="mean", bias="log_count"), PICTURE)
    check_backward(MENU, PICTURE, batch=2, heads=3)


def test_gradients_of_grouped_heads_and_strided_tensors():
    plan = build_plan(MENU, PICTURE, q_tile=32, k_tile=32)
    packed = torch.randn(1, PICTURE.tokens, 4, 3, 16)
    q, k, v = (packed[..., i, ::2] for i in range(3))
    groups = torch.tensor([[0, 1, 2, 1]])
    compare(q, k[:, :, ::2], v[:, :, ::2], None, plan, groups=groups)
    compare(q, k[:, :, :1], v[:, :, :1], torch.randn(1, 4, PICTURE.tokens), plan, groups=groups, most=1)


def test_gradients_are_deterministic():
    plan = build_plan(Disc(3) | Text(), PICTURE, q_tile=32, k_tile=32)
    q, k, v = (x.requires_grad_() for x in random_qkv(PICTURE))
    runs = []
    for _ in range(2):
        out, lse = ops.attend(q, k, v, plan.lists, schedule_of(plan, 1), engine="triton")
        runs.append(torch.autograd.grad(out.sum() + lse.sum(), (q, k, v)))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("place", [0, 1, 2], ids=["query", "key", "value"])
def test_broken_tokens_leave_other_gradients_alone(place):
    """As if the rows that see the broken token did not exist; the plan loop does the same."""
    layout = Layout.image(8, 12, text=32)
    pattern = Blocks(4) | Text()
    plan = build_plan(pattern, layout, q_tile=32, k_tile=32)
    tensors = random_qkv(layout)
    clean = [x.clone() for x in tensors]
    tensors[place][:, 60] = torch.nan
    mask = torch.from_numpy(pattern.dense_mask(layout))[0]
    seen = mask[:, 60] if place else torch.arange(layout.tokens) == 60

    def gradients(tensors, attend):
        leaves = [x.requires_grad_() for x in tensors]
        out, _ = attend(*leaves)
        return torch.autograd.grad(out[:, ~seen].square().sum(), leaves)

    want = gradients([x.double() for x in clean], lambda *x: oracle(*x, pattern, layout))
    for engine in ops.ENGINES:
        got = gradients(tensors, lambda *x: ops.attend(*x, plan.lists, schedule_of(plan), engine=engine))  # noqa: B023
        for name, mine, theirs in zip("qkv", got, want, strict=True):
            torch.testing.assert_close(mine.double(), theirs, atol=2e-5, rtol=1e-4, msg=f"{engine} d{name}")
