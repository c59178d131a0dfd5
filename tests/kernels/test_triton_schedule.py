"""Pieces and turned lists against brute force."""

import numpy as np
import pytest
import torch
from pattern_cases import COMPOSED, GEOMETRIC

from gensparse.layout import Layout
from gensparse.patterns import Disc, Text
from gensparse.plan import build_plan
from gensparse.plan.schedule import LONG, SHORT, cut_pieces

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
