"""The forward kernel against dense attention in fp64."""

import pytest
import torch
from attention_checks import menu, oracle, random_qkv
from triton_checks import check_forward, compare, run_triton

from gensparse.attention import explain, sparse_attention
from gensparse.kernels.triton import launch, tune
from gensparse.layout import Layout, Segment
from gensparse.patterns import Blocks, CrissCross, Disc, Neighborhood, PerHead, Pooled, Stripes, Text
from gensparse.plan import build_plan

PICTURE = Layout.image(11, 7, text=5)
MIXED = Layout((Segment("text", 3), Segment("target", 30, (2, 3, 5)), Segment("reference", 6, (1, 2, 3))))
MENU = PerHead((Stripes(2), Disc(3), Blocks(4))) | Text()


@pytest.mark.parametrize(
    ("pattern", "layout"),
    [
        (Disc(3) | Text(), Layout.image(1, 1, text=1)),
        (Disc(2) | Text(), Layout.image(1, 13, text=2)),
        (Disc(3) | Text(), Layout.image(13, 5, text=37)),
        (Neighborhood(3, dilation=2) | Text(), PICTURE),
        (CrissCross() | Text(), Layout.image(7, 11)),
        (Disc(2) | Text(), MIXED),
        (Disc(2), Layout.video(2, 5, 7, text=3)),
    ],
    ids=repr,
)
def test_awkward_grids(pattern, layout):
    check_forward(pattern.clamped(layout.grid), layout)


@pytest.mark.parametrize("tiles", [(128, 64), (64, 128), (32, 256), (256, 32)], ids=repr)
def test_tile_sizes(tiles):
    check_forward(Disc(3) | Text(), PICTURE, tiles=tiles, heads=1)


@pytest.mark.parametrize("blocks", [(64, 32), (32, 64)], ids=repr)
def test_tiles_are_computed_in_smaller_blocks(blocks, monkeypatch):
    config = tune.Config(*blocks, num_warps=4, num_stages=1)
    monkeypatch.setattr(launch, "config_for", lambda case: config)
    check_forward(Disc(3) | Text(), PICTURE, tiles=(128, 64), heads=1, most=1)


@pytest.mark.parametrize("dim", [1, 4, 40, 72, 160, 256])
def test_any_head_dimension(dim):
    check_forward(Disc(2) | Text(), Layout.image(5, 7, text=2), dim=dim, heads=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [12, 64])
def test_half_precision(dtype, dim):
    check_forward(Disc(3) | Text(), PICTURE, dim=dim, dtype=dtype, tiles=(64, 32))


@pytest.mark.parametrize("most", [1, None])
def test_split_lists_give_the_same_result(most):
    check_forward(Disc(3) | Text(), Layout.image(13, 11, text=5), most=most, heads=1)
    check_forward(MENU, PICTURE, most=most, heads=3)


def test_pieces_are_deterministic():
    plan = build_plan(Disc(3) | Text(), PICTURE, q_tile=32, k_tile=32)
    tensors = random_qkv(PICTURE, dim=16)
    first, second = (run_triton(*tensors, plan, most=1) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("scale", [0.7, -0.7, 0.0, 30.0])
def test_scale(scale):
    check_forward(Disc(3) | Text(), PICTURE, scale=scale, heads=1)


def test_key_bias_per_head_and_hidden_keys():
    bias = torch.randn(1, 2, PICTURE.tokens, generator=torch.Generator().manual_seed(1))
    bias[0, 1, 20:50] = -torch.inf
    check_forward(Disc(3) | Text(), PICTURE, key_bias=bias, batch=2)
    check_forward(Disc(3) | Text(), PICTURE, key_bias=bias[:, :1], batch=2, most=1)


def test_pooled_keys_with_their_bias():
    check_forward(Disc(2) | Text() | Pooled(3, weights="mean", bias="log_count"), PICTURE)


def test_menus_pick_a_list_per_head_and_sample():
    check_forward(MENU, PICTURE, batch=2, heads=3)


def test_grouped_heads_and_strided_tensors():
    plan = build_plan(Disc(3) | Text(), PICTURE, q_tile=32, k_tile=32)
    packed = torch.randn(2, PICTURE.tokens, 4, 3, 16)
    q, k, v = (packed[..., i, ::2] for i in range(3))
    compare(q, k[:, :, ::2], v[:, :, ::2], plan)
    compare(q, k[:, :, :1].expand(-1, -1, 4, -1), v[:1, :, :1].expand(2, -1, 4, -1), plan)
    compare(q.transpose(1, 2).contiguous().transpose(1, 2), k, v, plan)


def test_rows_without_a_key_are_zero():
    layout = Layout.image(9, 7, text=4)
    plan = build_plan(Disc(3), layout, q_tile=32, k_tile=32)
    out, lse = run_triton(*random_qkv(layout), plan)
    assert torch.all(out[:, :4] == 0)
    assert torch.all(torch.isneginf(lse[:, :4]))
    assert torch.isfinite(out).all()
    bias = torch.full((1, 1, 67), -torch.inf)
    bias[..., 60:] = 0.0
    compare(*random_qkv(layout), plan, key_bias=bias)
    compare(*random_qkv(layout), plan, key_bias=bias, most=1)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [1, 2], ids=["key", "value"])
@pytest.mark.parametrize("most", [None, 1])
def test_a_broken_token_spoils_only_the_rows_that_see_it(poison, place, most):
    """Full tiles, partial tiles and keys hidden by bias; heads of a menu do not meet."""
    pattern = PerHead((Blocks(4), Disc(3))) | Text()
    layout = Layout.image(8, 12, text=32)
    plan = build_plan(pattern, layout, q_tile=32, k_tile=32)
    tensors, groups = random_qkv(layout), menu(plan, 1, 2)
    bias = torch.zeros(1, 1, layout.tokens)
    bias[..., 3] = -torch.inf
    broken = [x.clone() for x in tensors]
    broken[place][:, [3, 60]] = poison
    clean, _ = oracle(*tensors, pattern, layout, groups=groups, key_bias=bias)
    out, lse = run_triton(*broken, plan, groups=groups, key_bias=bias, most=most)
    seen = torch.from_numpy(pattern.dense_mask(layout))[groups[0], :, 60].T
    assert seen.any()
    assert not seen.all()
    assert not torch.isfinite(out[0][seen]).all(-1).any()
    assert torch.isfinite(lse[0][~seen]).all()
    torch.testing.assert_close(out[0][~seen].double(), clean[0][~seen], atol=2e-6, rtol=1e-5)


def test_a_broken_query_stays_alone():
    plan = build_plan(Disc(3) | Text(), PICTURE, q_tile=32, k_tile=32)
    q, k, v = random_qkv(PICTURE)
    clean, _ = run_triton(q, k, v, plan)
    q[:, 20] = torch.nan
    out, _ = run_triton(q, k, v, plan)
    others = torch.arange(PICTURE.tokens) != 20
    assert torch.isnan(out[:, 20]).all()
    torch.testing.assert_close(out[:, others], clean[:, others], rtol=0, atol=0)


def test_the_backend_takes_calls_in_the_interpreter():
    plan = build_plan(Disc(3) | Text(), PICTURE)
    q, k, v = random_qkv(PICTURE)
    assert explain(plan, q)["triton"] is None
    assert explain(plan, q.double())["triton"] == (
        "Can't run triton; the dtype is torch.float64 and the kernels take float16, bfloat16 and float32."
    )
    out, lse = sparse_attention(q, k, v, plan, backend="triton", return_lse=True)
    want, want_lse = sparse_attention(q, k, v, plan, backend="plan_loop", return_lse=True)
    torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(lse, want_lse, atol=4e-6, rtol=1e-5)
