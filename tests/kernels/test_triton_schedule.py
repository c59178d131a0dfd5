"""Pieces and turned lists against brute force."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from pattern_cases import COMPOSED, GEOMETRIC

from gensparse.layout import Layout, Segment
from gensparse.patterns import Disc, Grid, PerHead, Pooled, Stripes, Text
from gensparse.plan import build_plan
from gensparse.plan.schedule import LONG, SHORT, box_lists, cut_pieces

LAYOUT = Layout.image(13, 11, text=70)


def pairs(pointer, tile, mask):
    """{(list, tile, mask id)} of one group."""
    return {
        (row, int(tile[entry]), int(mask[entry]))
        for row in range(len(pointer) - 1)
        for entry in range(pointer[row], pointer[row + 1])
    }


@pytest.mark.parametrize("pattern", [*GEOMETRIC[::4], *COMPOSED], ids=repr)
def test_turned_lists_are_the_transpose(pattern):
    plan = build_plan(pattern.clamped(LAYOUT.grid), LAYOUT, q_tile=32, k_tile=32)
    lists, turned = plan.lists, plan.turned
    assert {x.dtype for x in turned} == {torch.int32}
    for group in range(plan.groups):
        straight = pairs(lists.row_ptr[group], lists.key_tile, lists.mask_id)
        back = pairs(turned.col_ptr[group], turned.query_tile, turned.mask_id)
        assert {(k, q, mask) for q, k, mask in straight} == back
        for tile in range(len(lists.k_rows)):
            own = turned.mask_id[turned.col_ptr[group, tile] : turned.col_ptr[group, tile + 1]] >= 0
            assert not (own[:-1] & ~own[1:]).any(), "full tiles come first"


@pytest.mark.parametrize("most", [1, 2, 3, None])
@pytest.mark.parametrize("pattern", COMPOSED, ids=repr)
def test_pieces_cover_every_entry_once(pattern, most):
    plan = build_plan(pattern.clamped(LAYOUT.grid), LAYOUT, q_tile=32, k_tile=32)
    lists = plan.lists
    work = cut_pieces(lists.row_ptr, lists.mask_id, most=most)
    assert work.pieces.dtype == work.joins.dtype == torch.int32
    for group in range(plan.groups):
        pieces = work.pieces[group].numpy()
        pieces = pieces[pieces[:, 0] >= 0]
        lengths = pieces[:, 3] - pieces[:, 1]
        assert (np.diff(lengths) <= 0).all(), "longest first"
        assert lengths.max() <= (most or max(SHORT, np.ceil(LONG * np.diff(lists.row_ptr[group].numpy()).mean())))
        joins = {int(tile): range(first, end) for tile, first, end in work.joins[group].tolist() if tile >= 0}
        for tile in range(len(lists.q_rows)):
            own = pieces[pieces[:, 0] == tile]
            own = own[np.argsort(own[:, 1])]
            edges = [int(x) for x in lists.row_ptr[group, tile : tile + 2]]
            assert own[0, 1] == edges[0]
            assert own[-1, 3] == edges[1]
            assert (own[1:, 1] == own[:-1, 3]).all()
            assert list(own[:, 4]) == (list(joins[tile]) if tile in joins else [-1])
            for _, first, middle, end, _ in own:
                assert (lists.mask_id[first:middle] < 0).all()
                assert (lists.mask_id[middle:end] >= 0).all()
        used = [slot for slots in joins.values() for slot in slots]
        assert sorted(used) == list(range(len(used)))
        assert len(used) <= work.slots


def test_long_text_rows_are_cut_and_short_ones_are_not():
    layout = Layout.image(64, 64, text=32)
    plan = build_plan(Disc(3) | Text(), layout, q_tile=32, k_tile=32)
    counts = plan.lists.row_ptr[0].diff()
    tiles = set(plan.pieces.joins[0, :, 0].tolist())
    assert tiles == set(torch.nonzero(counts > max(SHORT, LONG * counts.double().mean())).reshape(-1).tolist())
    assert len(tiles) == 1


def test_a_moved_plan_moves_its_schedule():
    plan = build_plan(Disc(3) | Text(), LAYOUT)
    moved = plan.to("meta").to("meta")
    for name in ("pieces", "turned", "turned_pieces"):
        mine, theirs = getattr(plan, name), getattr(moved, name)
        for x, y in zip(mine, theirs, strict=True):
            assert x == y if isinstance(x, int) else (x.shape, x.device.type, y.device.type) == (y.shape, "cpu", "meta")


MENU = PerHead((Disc(4), Stripes(2))) | Text() | Pooled(3, weights="mean")
AMID = Layout((Segment("text", 40), Segment("target", 330, (2, 11, 15)), Segment("reference", 6, (1, 2, 3))))


@pytest.mark.parametrize("most", [1, 3, None])
@pytest.mark.parametrize(("pattern", "layout"), [(MENU, Layout.image(19, 16, text=70)), (Disc(4) | Text(), AMID)])
def test_boxes_come_first_among_full_and_partial_tiles(pattern, layout, most):
    plan = build_plan(pattern, layout, q_tile=32, k_tile=(1, 4, 8))
    lists, work = plan.lists, cut_pieces(plan.lists.row_ptr, plan.lists.mask_id, most=most)
    boxes = box_lists(lists, work, plan.key_tiles, layout.target)
    start = sum(segment.length for segment in layout.segments[: layout.target])
    own = (lists.k_rows >= start) & (lists.k_rows < start + layout.segments[layout.target].length)
    is_box = own.any(1)
    assert (boxes.start, boxes.grid, boxes.shape) == (start, layout.grid, (1, 4, 8))
    assert is_box.any()
    assert not is_box.all()
    for tile in torch.nonzero(is_box).reshape(-1).tolist():
        f, y, x = (int(n) for n in boxes.corners[tile])
        assert lists.k_rows[tile, 0] == start + (f * layout.grid[1] + y) * layout.grid[2] + x
    kinds = set()
    for group in range(plan.groups):
        assert pairs(lists.row_ptr[group], boxes.key_tile, boxes.mask_id) == pairs(
            lists.row_ptr[group], lists.key_tile, lists.mask_id
        )
        for piece, cut in zip(work.pieces[group].tolist(), boxes.pieces[group].tolist(), strict=True):
            tile, first, middle, end, slot = piece
            assert (cut[0], cut[1], cut[3], cut[5], cut[6]) == (tile, first, middle, end, slot)
            if tile < 0:
                assert cut == [-1] * 7
                continue
            assert cut[1:6] == sorted(cut[1:6])
            for kind, (low, high) in enumerate(pairwise(cut[1:6])):
                assert (is_box[boxes.key_tile[low:high].long()] == (kind % 2 == 0)).all()
                assert ((boxes.mask_id[low:high] >= 0) == (kind >= 2)).all()
                kinds |= {kind} if high > low else set()
    assert kinds >= {0, 1, 2, 3}


def test_plans_say_why_they_have_no_boxes():
    layout = Layout.image(16, 16, text=5)
    plan = build_plan(Disc(3) | Text(), layout)
    assert plan.boxes is None
    assert plan.boxes_refused is None
    assert plan.with_boxes().boxes is not None
    for other, reason in [
        (build_plan(Grid(4), layout), "key tiles take every step-th token with steps (1, 4, 4) and boxes hold all."),
        (
            build_plan(Disc(3) | Text(), Layout.video(3, 5, 8), k_tile=(3, 5, 4)),
            "key tiles are (3, 5, 4) and boxes need powers of two whose product is 64.",
        ),
        (
            build_plan(Disc(3) | Text(), layout, k_tile=(1, 4, 4)),
            "key tiles are (1, 4, 4) and boxes need powers of two whose product is 32.",
        ),
        (
            build_plan(Disc(3) | Text(), Layout.ulysses(layout, 3)),
            "the sequence is interleaved, so neighbours on the grid are no neighbours in memory.",
        ),
    ]:
        assert other.boxes_refused == reason
        assert other.with_boxes() is other
