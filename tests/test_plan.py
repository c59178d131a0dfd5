"""Plans against brute force: lists, masks, lowered forms, counts, limits."""

import gc
import re
import tracemalloc

import numpy as np
import pytest
import torch
from pattern_cases import COMPOSED, GEOMETRIC, GRIDS, layouts
from plan_checks import lowered_mask

from gensparse.errors import ConfigError, PlanTooLargeError
from gensparse.layout import Layout
from gensparse.patterns import MSW, Blocks, Box, CrissCross, Disc, Neighborhood, Pattern, PerHead, Pooled, Text
from gensparse.patterns.base import NO_DATA, Rule
from gensparse.patterns.disc import _DiscRule
from gensparse.plan import Plan, build_plan
from gensparse.plan import build as build_module
from gensparse.plan import lists as lists_module

LAYOUTS = [layouts(grid)[number % 2] for number, grid in enumerate(GRIDS)]
LARGER = [Layout.image(23, 29, text=70), Layout.video(3, 7, 13, text=2)]


def listed_mask(plan: Plan) -> np.ndarray:
    """The mask that the tile lists spell out, bool [G, Nq, Nk]."""
    lists = [x.numpy() for x in plan.lists]
    q_rows, k_rows, row_ptr, key_tile, mask_id, atlas = lists
    bits = (atlas[..., None] >> np.arange(32)) & 1
    bits = bits.reshape(*atlas.shape[:2], k_rows.shape[1]).astype(bool)
    mask = np.zeros((plan.groups, plan.tokens, plan.keys), bool)
    for group in range(plan.groups):
        for tile, rows in enumerate(q_rows):
            partial = False
            for entry in range(row_ptr[group, tile], row_ptr[group, tile + 1]):
                keys = k_rows[key_tile[entry]]
                if mask_id[entry] < 0:
                    assert not partial, "full tiles come first"
                    assert (keys >= 0).all(), "a full tile has no empty slot"
                    block = np.ones((len(rows), len(keys)), bool)
                else:
                    partial = True
                    block = bits[mask_id[entry]]
                    assert not block[:, keys < 0].any()
                    assert not block[rows < 0].any()
                i, j = np.nonzero(block & (rows >= 0)[:, None] & (keys >= 0))
                assert not mask[group, rows[i], keys[j]].any(), "a pair is listed twice"
                mask[group, rows[i], keys[j]] = True
    return mask


def check(pattern: Pattern, layout: Layout, **tiles) -> None:
    pattern = pattern.clamped(layout.grid)
    plan = build_plan(pattern, layout, **tiles)
    expected = pattern.dense_mask(layout)
    np.testing.assert_array_equal(listed_mask(plan), expected)
    assert plan.useful == tuple(expected.sum(axis=(1, 2)))
    for works in (plan.halo(), plan.partition()):
        if works is not None:
            np.testing.assert_array_equal(lowered_mask(works, plan), expected)


@pytest.mark.parametrize("pattern", [*GEOMETRIC, *COMPOSED], ids=repr)
def test_lists_and_lowered_forms_hold_exactly_the_allowed_pairs(pattern):
    for layout in LAYOUTS:
        check(pattern, layout)


@pytest.mark.parametrize("pattern", [*GEOMETRIC[::2], *COMPOSED], ids=repr)
def test_larger_grids_hold_exactly_the_allowed_pairs(pattern):
    for layout in LARGER:
        check(pattern, layout)


@pytest.mark.parametrize(
    "tiles",
    [{"q_tile": 64}, {"q_tile": 64, "k_tile": 32}, {"q_tile": (1, 4, 8), "k_tile": (1, 8, 16)}, {"q_tile": (1, 5, 7)}],
    ids=str,
)
def test_any_tile_shape_gives_the_same_pairs(tiles):
    for pattern in (Disc(5) | Text(), Neighborhood(5, dilation=2), PerHead((Box(2), CrissCross()))):
        check(pattern, Layout.image(19, 23, text=4), **tiles)


def test_every_token_has_one_slot_and_tiles_keep_to_their_segment():
    plan = build_plan(Disc(3) | Text() | Pooled(2, weights="mean"), Layout.image(13, 17, text=70))
    for rows, count in ((plan.lists.q_rows, plan.tokens), (plan.lists.k_rows, plan.keys)):
        tokens = rows[rows >= 0]
        assert sorted(tokens.tolist()) == list(range(count))
        for tile in rows:
            own = tile[tile >= 0]
            assert bool((own < 70).all()) or bool((own >= 70).all())


def test_longest_lists_come_first():
    plan = build_plan(Disc(3) | Text(), Layout.image(40, 40, text=10))
    counts = plan.lists.row_ptr[0].diff()[plan.order.long()]
    assert bool((counts.diff() <= 0).all())
    assert sorted(plan.order.tolist()) == list(range(len(plan.order)))


def test_equal_masks_are_stored_once_whatever_the_size():
    small, large = (build_plan(Disc(8) | Text(), Layout.image(n, n)) for n in (64, 128))
    assert large.lists.atlas.shape == small.lists.atlas.shape
    rows = large.lists.atlas.flatten(1)
    assert len(torch.unique(rows, dim=0)) == len(rows)


@pytest.mark.parametrize(("radius", "density"), [(8, 0.01827), (16, 0.02674), (32, 0.05861)])
def test_flux_4096_density_matches_the_closed_form(radius, density):
    n, text = 256, 512
    plan = build_plan(Disc(radius) | Text(), Layout.image(n, n, text=text))
    reach = range(1 - radius, radius)
    discs = sum((n - abs(y)) * (n - abs(x)) for y in reach for x in reach if y * y + x * x < radius**2)
    assert plan.useful[0] == text * (text + n * n) + n * n * text + discs
    stats = plan.stats()
    assert round(stats["density"], 5) == density
    assert stats["flop_bound"] == pytest.approx(1 / stats["density"])
    assert stats["tokens"] == n * n + text
    assert stats["useful_pairs"] < stats["visited_pairs"] < 1.6 * stats["useful_pairs"]


FLUX_4096 = Layout.image(256, 256)
WAN = Layout.video(21, 45, 80)
# (pattern, layout, query tile, key tile, visited / useful pairs) as a sampling simulator counted them
SIMULATED = [
    (Disc(8), FLUX_4096, (1, 16, 8), (1, 8, 8), 3.81),
    (Disc(8), FLUX_4096, (1, 8, 8), (1, 8, 8), 2.94),
    (Disc(16), FLUX_4096, (1, 16, 8), (1, 8, 8), 2.32),
    (Disc(16), FLUX_4096, (1, 8, 8), (1, 8, 8), 1.95),
    (Disc(32), FLUX_4096, (1, 16, 8), (1, 8, 8), 1.66),
    (Disc(32), FLUX_4096, (1, 8, 8), (1, 8, 8), 1.49),
    (Disc(8), FLUX_4096, (1, 1, 128), (1, 1, 64), 15.09),
    (Neighborhood(16), FLUX_4096, (1, 16, 8), (1, 8, 8), 2.76),
    (Neighborhood(16), FLUX_4096, (1, 8, 8), (1, 8, 8), 2.16),
    (Neighborhood(80), FLUX_4096, (1, 16, 8), (1, 8, 8), 1.23),
    (Disc(8), Layout.image(64, 64), (1, 16, 8), (1, 8, 8), 3.55),
    (Disc(8), Layout.image(64, 64), (1, 2, 64), (1, 1, 64), 5.54),
    (Disc(32), Layout.image(64, 64), (1, 16, 8), (1, 8, 8), 1.44),
    (Neighborhood((9, 24, 24)), WAN, (4, 4, 4), (4, 4, 4), 2.04),
    (Neighborhood((9, 24, 24)), WAN, (4, 4, 8), (4, 4, 4), 2.26),
    (Neighborhood((9, 24, 24)), WAN, (3, 5, 8), (3, 5, 4), 2.38),
    (Neighborhood((21, 23, 23)), WAN, (3, 5, 8), (3, 5, 4), 1.87),
    (Neighborhood((5, 15, 27)), WAN, (1, 8, 16), (1, 8, 8), 2.48),
    (Neighborhood((5, 15, 27)), WAN, (3, 5, 8), (3, 5, 4), 3.57),
]


@pytest.mark.parametrize(("pattern", "layout", "q_tile", "k_tile", "ratio"), SIMULATED, ids=str)
def test_simulated_tiles_visit_what_an_independent_simulator_counts(pattern, layout, q_tile, k_tile, ratio):
    stats = build_plan(pattern, layout).simulate(q_tile, k_tile)
    assert stats["visited_pairs"] / stats["useful_pairs"] == pytest.approx(ratio, rel=0.05)
    assert (stats["q_tile"], stats["k_tile"]) == (q_tile, k_tile)


@pytest.mark.parametrize(
    ("window", "stride", "tile", "flop", "tiles", "masked"),
    [
        (80, 1, (1, 16, 8), 10.24, 7.5, 0.50),
        (80, 16, (1, 16, 8), 10.24, 10.24, 0.0),
        (80, 1, (1, 1, 128), 10.24, 3.2, 1.0),
    ],
)
def test_bounds_of_neighborhoods_at_4096(window, stride, tile, flop, tiles, masked):
    """The speed-ups that counting allows, as published for FLUX at 4096 (GNA 2504.16922)."""
    plan = build_plan(Neighborhood(window, stride=stride), FLUX_4096, q_tile=tile, k_tile=tile)
    stats = plan.stats()
    assert stats["flop_bound"] == pytest.approx(flop, rel=1e-3)
    assert stats["tile_bound"] == pytest.approx(tiles, rel=5e-3)
    assert float((plan.lists.mask_id >= 0).float().mean()) == pytest.approx(masked, abs=5e-3)


def test_stats_count_what_the_lists_hold():
    """Every number from its definition."""
    plan = build_plan(Disc(4) | Text() | Pooled(3, weights="mean"), Layout.image(17, 13, text=70), q_tile=64, k_tile=32)
    stats, lists = plan.stats(), plan.lists
    mask = plan.pattern.dense_mask(plan.layout)
    tiles = len(lists.q_rows), len(lists.k_rows), len(lists.key_tile)
    assert stats["tokens"] == 17 * 13 + 70
    assert stats["useful_pairs"] == mask.sum()
    assert stats["visited_pairs"] == tiles[2] * 64 * 32
    assert stats["density"] == mask.mean()
    assert stats["bytes"] == 4 * (sum(x.numel() for x in lists) + tiles[0])
    assert stats["flop_bound"] == pytest.approx(1 / mask.mean())
    assert stats["tile_bound"] == pytest.approx(tiles[0] * tiles[1] / tiles[2])


def test_density_counts_pooled_keys_and_averages_the_menu():
    layout = Layout.image(8, 8)
    plan = build_plan(PerHead((Disc(1) | Pooled(4), Blocks(4))), layout)
    assert plan.keys == 64 + 4
    assert plan.stats()["density"] == pytest.approx((64 * 5 + 64 * 16) / (2 * 64 * 68))


def test_planning_66048_tokens_stays_small():
    gc.collect()
    tracemalloc.start()
    plan = build_plan(Disc(17) | Text(), Layout.image(256, 256, text=512))
    plan.halo()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 << 20
    assert plan.stats()["bytes"] < 2 << 20


def test_plans_are_cached_and_immutable():
    layout = Layout.image(9, 9, text=2)
    plan = build_plan(Disc(3) | Text(), layout)
    assert build_plan(Disc(3) | Text(), Layout.image(9, 9, text=2)) is plan
    assert build_plan(Disc(4) | Text(), layout) is not plan
    assert build_plan(Disc(3) | Text(), layout, q_tile=64) is not plan
    assert plan.to("cpu") is plan
    with pytest.raises(AttributeError):
        plan.layout = layout


def test_plans_move_once_per_device():
    plan = build_plan(Disc(3) | Text(), Layout.image(9, 9, text=2))
    moved = plan.to("meta")
    assert moved.lists.key_tile.device.type == "meta"
    assert plan.to("meta") is moved


def test_simulate_gives_the_stats_of_other_tiles():
    plan = build_plan(Disc(8) | Text(), Layout.image(64, 64))
    other = plan.simulate((1, 1, 128), (1, 1, 64))
    assert other["visited_pairs"] > plan.stats()["visited_pairs"]
    assert other["useful_pairs"] == plan.stats()["useful_pairs"]


def test_the_search_finds_square_tiles_for_discs_and_rows_for_stripes():
    plan = build_plan(Disc(8), Layout.image(128, 128))
    assert plan.k_tile == (1, 8, 8)
    line = build_plan(Box((1, 40)), Layout.image(64, 256))
    assert line.k_tile[2] > line.k_tile[1]


def test_dilated_patterns_use_stepped_tiles():
    dilated = build_plan(Neighborhood(8, dilation=4), Layout.image(64, 64))
    plain = build_plan(Neighborhood(8), Layout.image(64, 64))
    assert dilated.stats()["visited_pairs"] <= 1.5 * plain.stats()["visited_pairs"]
    assert dilated.halo() is not None


def test_windows_with_a_stride_of_their_tile_need_no_mask():
    plan = build_plan(Neighborhood(32, stride=16), Layout.image(64, 64))
    assert all(tiles.bias()[0] is None for tiles in plan.halo()[0].tiles)


def test_a_window_over_the_whole_grid_is_one_dense_call():
    plan = build_plan(Box(40) | Text(), Layout.image(20, 30, text=3))
    (work,) = plan.halo()
    assert not work.tiles
    assert plan.stats()["density"] == 1


def test_refusals_name_the_reason():
    assert "windows that see only themselves" in build_plan(Disc(3), Layout.image(9, 9)).refused["partition"]
    assert "boxes of keys" in build_plan(CrissCross(), Layout.image(96, 96)).refused["halo"]
    assert build_plan(MSW(1) | Text(), Layout.image(9, 9, text=3)).partition() is not None


@pytest.mark.parametrize("tile", [0, -64, 48, 512, True, (1, 0, 8), (16, 16, 16), 64.0, "64"], ids=repr)
def test_tiles_that_are_not_allowed_are_named(tile):
    with pytest.raises(ConfigError, match="k_tile"):
        build_plan(Disc(3), Layout.image(9, 9), k_tile=tile)


def test_too_many_listed_tiles_are_refused_with_their_number(monkeypatch):
    layout = Layout.image(65, 63)
    listed = len(build_plan(Disc(9), layout).lists.key_tile)
    monkeypatch.setattr(lists_module, "ENTRY_LIMIT", 50)
    build_module._cached.cache_clear()
    with pytest.raises(PlanTooLargeError, match="limit is 50") as caught:
        build_plan(Disc(9), layout)
    named = int(re.search(r"up to (\d+) tile pairs", str(caught.value))[1])
    assert listed <= named <= 1.2 * listed


def test_dense_attention_of_many_tokens_is_refused_with_its_exact_size(monkeypatch):
    monkeypatch.setattr(lists_module, "ENTRY_LIMIT", 1 << 18)
    with pytest.raises(PlanTooLargeError, match=r"up to 524288 tile pairs \(4 MiB\), the limit is 262144 \(2 MiB\)"):
        build_plan(Blocks(None), Layout.image(256, 256))


def test_too_many_masks_are_refused_with_their_number(monkeypatch):
    monkeypatch.setattr(lists_module, "ATLAS_LIMIT", 2048)
    with pytest.raises(
        PlanTooLargeError, match=r"needs \d+ tile masks of 128 x 64 bits \(\d+ MiB\), the limit is 0 MiB"
    ):
        build_plan(Disc(9), Layout.image(66, 63))


class PlainRule(_DiscRule):
    """A disc without a signature."""

    def signature(self, q, k, group=0):
        return None


class PlainDisc(Disc):
    def bind(self, layout: Layout, data=NO_DATA) -> Rule:
        return PlainRule(layout, self.radius)


def test_rules_without_a_signature_get_the_same_plan():
    check(PlainDisc(4), Layout.image(17, 19, text=3))
    check(PlainDisc(4) | Text(), Layout.image(17, 19, text=3))
