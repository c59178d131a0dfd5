"""Key tiles loaded as boxes: the same results as by rows and as dense attention in fp64, or a sentence why not."""

import logging
from dataclasses import replace

import pytest
import torch
from attention_checks import menu, oracle, poisoned_memory, random_qkv
from triton_checks import ATOL, schedule_of

from gensparse.attention import sparse_attention
from gensparse.attention.sources import with_sources
from gensparse.bench import tuning
from gensparse.kernels import ops
from gensparse.kernels.triton import boxes as box_loader
from gensparse.kernels.triton import forward, launch, tune
from gensparse.kernels.triton.boxes import why_not
from gensparse.kernels.triton.tune import Config
from gensparse.layout import Layout, Segment
from gensparse.patterns import Blocks, Disc, Neighborhood, PerHead, Pooled, Stripes, Text
from gensparse.plan import build_plan
from gensparse.plan.schedule import box_lists

PICTURE = Layout.image(11, 7, text=5)
BEFORE_AND_AFTER = Layout((Segment("text", 3), Segment("target", 130, (1, 13, 10)), Segment("reference", 6, (1, 2, 3))))
MENU = PerHead((Stripes(2), Disc(3), Blocks(4))) | Text()
BOXES = Config(32, 32, 4, 2, "boxes")


@pytest.fixture
def made(monkeypatch):
    """Shapes of the descriptors' boxes that launches made."""
    found = []
    real = box_loader.BoxLoader.of

    def of(k, v, boxes):
        loader = real(k, v, boxes)
        found.append(loader.descriptors[0].block_shape)
        return loader

    monkeypatch.setattr(forward.BoxLoader, "of", of)
    return found


def run(q, k, v, plan, config, *, most=None, **settings):
    """out and lse with one config, in memory that holds NaN beforehand."""
    schedule = schedule_of(plan, most)
    boxes = box_lists(plan.lists, schedule.pieces, plan.key_tiles, plan.layout.target)
    with pytest.MonkeyPatch.context() as patch, poisoned_memory():
        patch.setattr(launch, "config_for", lambda case: config.fitted(case.tile_m, case.tile_n))
        return ops.attend(q, k, v, plan.lists, schedule._replace(boxes=boxes), engine="triton", **settings)


def check(q, k, v, plan, *, most=None, **settings):
    out, lse = run(q, k, v, plan, BOXES, most=most, **settings)
    rows, rows_lse = run(q, k, v, plan, replace(BOXES, loader="rows"), most=most, **settings)
    want, want_lse = oracle(q, k, v, plan.pattern, plan.layout, **settings)
    torch.testing.assert_close(out, rows, atol=ATOL[q.dtype], rtol=1e-5)
    torch.testing.assert_close(lse, rows_lse, atol=4e-6, rtol=1e-5)
    torch.testing.assert_close(out.double(), want, atol=ATOL[q.dtype], rtol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, atol=4e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("pattern", "layout", "k_tile"),
    [
        (Disc(3) | Text(), Layout.image(1, 1, text=1), (1, 4, 8)),
        (Disc(3) | Text(), Layout.image(13, 5, text=37), (1, 8, 4)),
        (Disc(4), Layout.image(8, 16), (1, 2, 16)),
        (Disc(2) | Text(), BEFORE_AND_AFTER, (1, 4, 8)),
        (Neighborhood(5) | Text(), PICTURE, (1, 1, 32)),
        (Disc(3) | Text(), Layout.video(3, 5, 7, text=3), (2, 4, 4)),
        (Disc(2), Layout.video(5, 3, 6), (8, 2, 2)),
    ],
    ids=repr,
)
def test_awkward_grids(pattern, layout, k_tile, made):
    plan = build_plan(pattern.clamped(layout.grid), layout, q_tile=32, k_tile=k_tile)
    check(*random_qkv(layout, dim=64, heads=1), plan)
    assert made == [[1, *k_tile, 64]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, made):
    check(
        *random_qkv(PICTURE, dim=128, dtype=dtype), build_plan(Disc(3) | Text(), PICTURE, q_tile=64, k_tile=(1, 4, 8))
    )
    assert made


def test_split_lists_and_menus(made):
    layout = Layout.image(7, 9, text=5)
    plan = build_plan(MENU, layout, q_tile=32, k_tile=(1, 8, 4))
    check(*random_qkv(layout, dim=64, batch=2, heads=3), plan, most=1, groups=menu(plan, 2, 3), scale=-0.3)
    assert made


def test_pooled_keys_with_their_bias(made):
    plan = build_plan(Disc(2) | Text() | Pooled(3, weights="mean", bias="log_count"), PICTURE, q_tile=32, k_tile=32)
    bias = torch.randn(1, 2, PICTURE.tokens, generator=torch.Generator().manual_seed(1))
    bias[0, 1, 20:50] = -torch.inf
    q, k, v = random_qkv(PICTURE, dim=64)
    k, v, bias = with_sources(k, v, plan, bias, None)
    check(q, k, v, plan, key_bias=bias)
    assert made


def test_grouped_heads_and_memory_orders(made):
    layout = Layout.image(5, 7, text=3)
    plan = build_plan(Disc(3) | Text(), layout, q_tile=32, k_tile=32)
    packed = torch.randn(2, layout.tokens, 3, 4, 64, generator=torch.Generator().manual_seed(0))
    q, k, v = packed.unbind(2)
    first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]  # batch and head joined
    check(q, k[:, :, :2], first[2][:, :, 2:3].expand(-1, -1, 2, -1).contiguous(), plan)
    check(q, first[1], first[2], plan)
    check(q[:1], first[1][:1, :, ::2], v[:1, :, ::2], plan)  # one sample: any distance of heads
    assert len(made) == 3


def test_a_call_brings_the_boxes_of_its_plan(made, monkeypatch):
    monkeypatch.setattr(launch, "config_for", lambda case: BOXES.fitted(case.tile_m, case.tile_n))
    plan = build_plan(Disc(3) | Text(), PICTURE, q_tile=32, k_tile=32)
    tensors = random_qkv(PICTURE, dim=64, heads=1)
    out = sparse_attention(*tensors, plan, backend="triton")
    assert not made
    boxed = sparse_attention(*tensors, plan.with_boxes(), backend="triton")
    assert made
    torch.testing.assert_close(boxed, out, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("place", [1, 2], ids=["key", "value"])
def test_a_broken_token_spoils_only_the_rows_that_see_it(place, made):
    """In full and in partial boxes, in text, and hidden by bias; heads of a menu do not meet."""
    pattern, layout = PerHead((Blocks(4), Disc(3))) | Text(), Layout.image(8, 12, text=32)
    plan = build_plan(pattern, layout, q_tile=32, k_tile=(1, 4, 8))
    tensors, groups = random_qkv(layout, dim=64), menu(plan, 1, 2)
    bias = torch.zeros(1, 1, layout.tokens)
    bias[..., 3] = -torch.inf
    broken = [x.clone() for x in tensors]
    broken[place][:, [3, 60]] = torch.nan
    clean, _ = oracle(*tensors, pattern, layout, groups=groups, key_bias=bias)
    out, lse = run(*broken, plan, BOXES, groups=groups, key_bias=bias)
    seen = torch.from_numpy(pattern.dense_mask(layout))[groups[0], :, 60].T
    assert made
    assert seen.any()
    assert not seen.all()
    assert not torch.isfinite(out[0][seen]).all(-1).any()
    assert torch.isfinite(lse[0][~seen]).all()
    torch.testing.assert_close(out[0][~seen].double(), clean[0][~seen], atol=2e-6, rtol=1e-5)


def test_boxes_that_do_not_fit_run_by_rows_and_say_so_once(made, caplog):
    forward._announce.cache_clear()
    plan = build_plan(Disc(3) | Text(), PICTURE, q_tile=32, k_tile=32)
    with caplog.at_level(logging.INFO, "gensparse"):
        check(*random_qkv(PICTURE, dim=40), plan)
        check(*random_qkv(PICTURE, dim=40), plan)
    assert not made
    said = [record.message for record in caplog.records if "by rows" in record.message]
    assert said == ["Keys are loaded by rows; the head dimension is 40 and boxes are loaded for 64 and 128."]


def test_reasons_are_one_sentence(monkeypatch):
    plan = build_plan(Disc(3) | Text(), PICTURE, q_tile=32, k_tile=(1, 4, 8)).with_boxes()
    listed, wide = plan.boxes, Config(128, 64, 8, 3, "boxes")
    k = torch.zeros(2, PICTURE.tokens, 4, 64, dtype=torch.bfloat16)

    def reason(k=k, v=None, boxes=listed, config=wide, arch="sm_90"):
        return why_not(k, k if v is None else v, boxes, config, arch)

    assert reason() is None
    assert reason(arch="sm_100") is None
    assert reason(k.transpose(1, 2).contiguous().transpose(1, 2)) is None
    assert reason(boxes=None) == "the plan brings no boxes."
    for arch in ("sm_89", "gfx942"):
        assert reason(arch=arch) == f"this GPU is {arch} and only sm_90 (Hopper) and newer load boxes."
    assert reason(k[..., :40]) == "the head dimension is 40 and boxes are loaded for 64 and 128."
    assert reason(k.float()) == "the dtype is torch.float32 and boxes are loaded for float16 and bfloat16."
    assert reason(config=Config(128, 16, 8, 3, "boxes")) == "a box has 32 keys and the config computes 16 at once."
    assert reason(k[:, :50]) == "the grid ends after the last of 50 keys."
    strided = k.new_zeros(2, PICTURE.tokens, 4, 128)[..., ::2]
    assert reason(v=strided) == f"v has strides {strided.stride()} and the last must be 1."
    begin = "its rows must begin at multiples of 16 bytes."
    shifted = k.new_zeros(k.numel() + 1)[1:].view(k.shape)
    odd = k.new_zeros(2, PICTURE.tokens, 4 * 64 + 4)[..., :256].unflatten(2, (4, 64))
    for x in (shifted, odd):
        assert reason(x) == f"k has strides {x.stride()} of 2 bytes and {begin}"
    same = k[:1].expand(2, -1, -1, -1)
    assert reason(same) == f"k has strides {same.stride()} and none may be 0."
    spread = k.new_zeros(2, PICTURE.tokens, 8, 64)[:, :, ::2]
    assert reason(spread) == f"k has strides {spread.stride()}, in which heads follow neither each other nor the batch."
    monkeypatch.setattr(box_loader, "installed", lambda: (3, 3))
    assert reason() == "this Triton is older than 3.4, the first with tensor descriptors."


def test_the_tuner_times_boxes_and_notes_why_it_cannot(monkeypatch, made):
    monkeypatch.setattr(tuning, "HEADS", {"small": 1, "large": 1})
    monkeypatch.setattr(tuning, "SMALL", Layout.image(7, 9, text=3))
    monkeypatch.setattr(tuning, "LARGE", Layout.image(9, 7, text=2))
    monkeypatch.setattr(tuning, "candidates", lambda *_: [Config(64, 64, 4, 3, "boxes"), Config(64, 32, 4, 3, "boxes")])
    good, bad = tuning.tune_cell("fp32", "forward", 64, float("inf"), "cpu", lambda run: (run(), 1.0)[1])
    assert (good["loader"], good["seconds"], len(made)) == ("boxes", 1.0, 2)
    assert good["error"] < 1e-5
    assert bad["note"] == "a box has 64 keys and the config computes 32 at once."
    entry = tuning.entry(good)
    assert tune.checked_table({"entries": [entry]}, "it")[0]["loader"] == "boxes"
