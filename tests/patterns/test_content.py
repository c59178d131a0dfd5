"""Patterns that read arrays (masks, groups, regions): against their definitions, and rules against brute force."""

from itertools import pairwise, product

import numpy as np
import pytest
from pattern_cases import (
    COMPOSED_CONTENT,
    CONTENT,
    ITSELF,
    OWN,
    SOURCES,
    content_data,
    content_layout,
)
from patterns.test_rules import _bounds, _rows, brute_relation, members, random_boxes
from plan_checks import lowered_mask
from test_plan import listed_mask

from gensparse.errors import ConfigError, PlanTooLargeError
from gensparse.layout import Boxes, Layout, Segment
from gensparse.patterns import (
    NONE,
    Disc,
    Isolation,
    KeyMask,
    Pattern,
    PerHead,
    Policy,
    Pooled,
    QueryMask,
    Reference,
    References,
    Regions,
    Rule,
    Text,
)
from gensparse.patterns.box_words import BoxWords
from gensparse.patterns.linear import linear
from gensparse.plan import build_plan
from gensparse.testing.pattern_checks import check_pattern

ALL = [*CONTENT, *COMPOSED_CONTENT]
GRIDS = [(1, 1, 1), (1, 1, 13), (1, 7, 11), (3, 1, 5), (2, 5, 7)]


def bind(pattern: Pattern, grid: tuple[int, int, int], seed: int = 0) -> tuple[Rule, np.ndarray]:
    layout = content_layout(grid)
    data = content_data(layout, seed)
    pattern = pattern.clamped(grid)
    return pattern.bind(layout, data), pattern.dense_mask(layout, data)


def case(pattern: Pattern, grid=(1, 7, 11), seed: int = 0) -> tuple[np.ndarray, dict, dict[str, slice]]:
    """The mask, the data, and where the tokens of every segment and source are."""
    rule, mask = bind(pattern, grid, seed)
    edges = np.cumsum([0, *(segment.length for segment in rule.key_segments)])
    where = {
        segment.name or segment.kind: slice(*pair)
        for segment, pair in zip(rule.key_segments, pairwise(edges), strict=True)
    }
    return mask[0], content_data(content_layout(grid), seed), where


def only(mask: np.ndarray, *parts: tuple[slice, slice, np.ndarray | bool]) -> None:
    """The mask is exactly these parts."""
    expected = np.zeros_like(mask)
    for rows, columns, seen in parts:
        expected[rows, columns] |= seen
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("seed", range(3))
def test_policy_is_its_table(seed):
    mask, _, at = case(ITSELF, seed=seed)
    pairs = [("target", "target"), ("cat", "cat"), ("dog", "dog"), ("text", "cat"), ("pad", "register")]
    only(mask, *((at[a], at[b], True) for a, b in pairs))


@pytest.mark.parametrize("seed", range(6))
def test_references_are_seen_through_both_masks(seed):
    mask, data, at = case(References((*SOURCES, Reference("cat", keys="cat"))), seed=seed)
    left, fox, owl, cat = (np.asarray(data[name]).reshape(-1) for name in ("left", "fox", "owl", "cat"))
    target = at["target"]
    only(mask, (target, at["fox"], left[:, None] & fox), (target, at["owl"], owl), (target, at["cat"], cat))


@pytest.mark.parametrize("seed", range(6))
def test_isolation_hides_other_groups_only(seed):
    for name in ("groups", "few"):
        mask, data, at = case(Isolation(name), seed=seed)
        group = data[name].reshape(-1)
        hidden = (group[:, None] != group) & (group[:, None] > 0) & (group > 0)
        expected = np.ones_like(mask)
        expected[at["target"], at["target"]] = ~hidden
        np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("seed", range(6))
def test_masks_hide_rows_and_columns_and_nothing_else(seed):
    columns, data, at = case(KeyMask("left"), seed=seed)
    expected = np.ones_like(columns)
    expected[:, at["target"]] = data["left"].reshape(-1)
    np.testing.assert_array_equal(columns, expected)
    rows, data, at = case((Text() | References(SOURCES)) & QueryMask("right"), seed=seed)
    whole, _, _ = case(Text() | References(SOURCES), seed=seed)
    whole[at["target"]] &= data["right"].astype(bool)[:, None]
    np.testing.assert_array_equal(rows, whole)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("background", [False, True])
def test_regions_are_the_published_definition(seed, background):
    runs = (2, 2, 1) if background else (2, 3)
    mask, data, at = case(Regions(runs, "regions", background=background), seed=seed)
    inside = data["regions"].reshape(2, -1).astype(bool)
    outside = ~inside.any(0)
    picture = (inside[:, :, None] & inside[:, None]).any(0) | outside[:, None] & outside
    parts = [(at["target"], at["target"], picture)]
    texts = [*inside, *([outside] if background else [])]
    start = at["text"].start
    for length, member in zip(runs, texts, strict=True):
        words = slice(start, start := start + length)
        parts += [(words, words, True), (at["target"], words, member[:, None]), (words, at["target"], member)]
    register = at["register"]
    for name in ("text", "target", "register"):
        parts += [(at[name], register, True), (register, at[name], True)]
    only(mask, *parts)


def test_windows_leave_rows_and_columns_of_text_alone():
    both, _, at = case(Regions((2, 3), "regions") & (Disc(3) | Text()))
    regions, _, _ = case(Regions((2, 3), "regions"))
    disc, _, _ = case(Disc(3))
    target = at["target"]
    np.testing.assert_array_equal(both[target, target], regions[target, target] & disc[target, target])
    both[target, target] = regions[target, target] = False
    np.testing.assert_array_equal(both, regions)


def test_what_only_hides_leaves_sources_visible():
    """Also pooled ones, and inside a union."""
    plain, _, _ = case(OWN | References(SOURCES) | Pooled(2, weights="mean"))
    for hiding in (Isolation("few"), KeyMask("left"), Isolation("few") | Isolation("groups")):
        hidden, _, at = case((OWN | References(SOURCES) | Pooled(2, weights="mean")) & hiding)
        np.testing.assert_array_equal(hidden[:, at["pad"].stop :], plain[:, at["pad"].stop :])


@pytest.mark.parametrize("pattern", CONTENT, ids=repr)
def test_relation_of_boxes_is_exact(pattern):
    rng = np.random.default_rng(0)
    for seed, grid in enumerate(GRIDS):
        rule, mask = bind(pattern, grid, seed)
        q, k = random_boxes(rng, rule.layout.segments, 16), random_boxes(rng, rule.key_segments, 18)
        relation = rule.tile_relation(_rows(q), k)
        assert relation.dtype == np.int8
        np.testing.assert_array_equal(relation, brute_relation(mask[0], q, k, rule), err_msg=repr(grid))


@pytest.mark.parametrize("pattern", ALL, ids=repr)
def test_key_box_covers_every_visible_key(pattern):
    """And for a single pattern it is exactly their bounding box."""
    rng = np.random.default_rng(3)
    for seed, grid in enumerate(GRIDS):
        rule, mask = bind(pattern, grid, seed)
        boxes = random_boxes(rng, rule.layout.segments, 10)
        rows = [members(boxes, i, rule.layout.segments) for i in range(len(boxes.segment))]
        starts = np.cumsum([0, *(segment.length for segment in rule.key_segments)])
        for group, (number, segment) in product(range(rule.groups), enumerate(rule.key_segments)):
            lo, hi = rule.key_box(boxes, number, group)
            own = mask[group][:, starts[number] : starts[number + 1]]
            for i, row in enumerate(rows):
                first, last = _bounds(np.flatnonzero(own[row].any(0)), segment.shape)
                if pattern in CONTENT:
                    assert (lo[i] == first).all()
                    assert (hi[i] == last).all()
                else:
                    assert (first >= last).all() or ((lo[i] <= first) & (hi[i] >= last)).all()


@pytest.mark.parametrize("pattern", ALL, ids=repr)
def test_partition_labels_equal_the_mask_and_every_equivalence_is_found(pattern):
    for seed, grid in enumerate(GRIDS):
        rule, mask = bind(pattern, grid, seed)
        for group, (number, start) in product(range(rule.groups), enumerate(rule.layout.starts)):
            labels = rule.partition(number, group)
            own = mask[group][start : start + rule.layout.segments[number].length][:, start:]
            own = own[:, : len(own)].astype(np.int64)
            if labels is not None:
                np.testing.assert_array_equal(labels[:, None] == labels, own)
            elif pattern in CONTENT:
                classes = np.unique(own, axis=0, return_inverse=True)[1].reshape(-1)
                assert not ((classes[:, None] == classes) == own).all()


@pytest.mark.parametrize("pattern", ALL, ids=repr)
def test_every_backend_keeps_the_contract(pattern):
    check_pattern(pattern, [content_layout((1, 7, 11)), content_layout((2, 5, 7))], content_data)


@pytest.mark.parametrize("pattern", [Isolation("few"), QueryMask("right"), Regions((2, 3), "regions")], ids=repr)
def test_interleaved_sequences_keep_the_contract(pattern):
    check_pattern(pattern, [Layout.ulysses(Layout.image(7, 11, text=5), 3)], content_data)


@pytest.mark.parametrize("pattern", CONTENT, ids=repr)
def test_relation_of_runs_is_exact(pattern):
    rng = np.random.default_rng(2)
    rule, mask = bind(pattern, (1, 7, 11))
    flat = linear(rule)
    np.testing.assert_array_equal(flat.dense_mask(), mask)
    q, k = random_boxes(rng, flat.layout.segments, 16), random_boxes(rng, flat.key_segments, 18)
    np.testing.assert_array_equal(flat.tile_relation(_rows(q), k), brute_relation(mask[0], q, k, flat))


@pytest.mark.parametrize("pattern", ALL, ids=repr)
def test_plans_hold_exactly_the_allowed_pairs(pattern):
    for seed, grid in enumerate([*GRIDS[:2], (1, 23, 29)]):
        layout = content_layout(grid)
        data = content_data(layout, seed)
        fitting = pattern.clamped(grid)
        plan = build_plan(fitting, layout, data=data)
        expected = fitting.dense_mask(layout, data)
        np.testing.assert_array_equal(listed_mask(plan), expected)
        assert plan.useful == tuple(expected.sum(axis=(1, 2)))
        for works in (plan.halo(), plan.partition()):
            if works is not None:
                np.testing.assert_array_equal(lowered_mask(works, plan), expected)


def test_empty_boxes_relate_to_nothing():
    for pattern in ALL:
        rule, _ = bind(pattern, (1, 8, 12))
        lo = np.array([[0, 0, 2], [0, 3, 4], [0, 9, 0]])
        hi = np.array([[0, 1, 2], [1, 3, 8], [1, 12, 3]])
        empty = Boxes(np.array([1, 1, 1]), lo, hi, 1)
        whole = Boxes(np.array([[1]]), np.zeros((1, 1, 3), int), np.array([[[1, 8, 12]]]), 1)
        for group in range(rule.groups):
            assert (rule.tile_relation(whole, empty, group) == NONE).all()
            assert (rule.tile_relation(empty, whole, group) == NONE).all()
        if pattern in CONTENT:
            spans = [rule.key_box(empty, number) for number in range(len(rule.key_segments))]
            assert all((last <= first).any(axis=-1).all() for first, last in spans)


def test_or_over_boxes_equals_brute_force():
    rng = np.random.default_rng(5)
    for shape in ((1, 1, 1), (1, 1, 37), (1, 19, 23), (5, 7, 11)):
        words = rng.integers(0, 1 << 62, (*shape, 2), dtype=np.uint64) & rng.integers(0, 1 << 62, 2, dtype=np.uint64)
        for table in (words, np.broadcast_to(words[:1, :1, :1], words.shape)):
            lo = rng.integers(0, shape, (200, 3))
            hi = lo + 1 + rng.integers(0, np.array(shape) - lo)
            found = BoxWords(table).over(lo, hi)
            for i in range(200):
                own = table[tuple(slice(a, b) for a, b in zip(lo[i], hi[i], strict=True))].reshape(-1, 2)
                assert (found[i] == np.bitwise_or.reduce(own)).all()


def square(n: int, top: int, left: int, size: int) -> np.ndarray:
    mask = np.zeros((n, n), bool)
    mask[top : top + size, left : left + size] = True
    return mask


def test_dropped_keys_are_never_listed():
    """What a key mask hides costs nothing but the borders of tiles."""
    layout = Layout.image(32, 32)
    keep = square(32, 8, 16, 16)
    plan = build_plan(OWN | References((Reference("ref", (32, 32), keys="keep"),)), layout, data={"keep": keep})
    alone = build_plan(OWN, layout)
    assert plan.useful[0] == 1024 * (1024 + 256)
    assert plan.stats()["visited_pairs"] == alone.stats()["visited_pairs"] + 1024 * 256
    assert len(plan.lists.atlas) == 0


def test_a_menu_may_have_no_masks_at_all():
    """Masks that follow the tiles need no atlas, in no entry of the menu."""
    layout = Layout.image(32, 32)
    data = {"keep": square(32, 0, 0, 16), "groups": 1 + square(32, 0, 0, 32)}
    pattern = PerHead((OWN, OWN & KeyMask("keep"), OWN & Isolation("groups")))
    plan = build_plan(pattern, layout, data=data)
    assert len(plan.lists.atlas) == 0
    np.testing.assert_array_equal(listed_mask(plan), pattern.dense_mask(layout, data))


def test_masks_of_one_side_are_stored_once_per_tile():
    """Noise over the keys of three references: one mask per key tile, whatever the queries."""
    layout = Layout.image(64, 64)
    rng = np.random.default_rng(6)
    data = {f"keep{i}": rng.random((64, 64)) < 0.5 for i in range(3)}
    pattern = OWN | References(tuple(Reference(f"ref{i}", (64, 64), keys=f"keep{i}") for i in range(3)))
    plan = build_plan(pattern, layout, data=data)
    assert len(plan.lists.atlas) == 3 * 64
    assert plan.useful[0] == 4096 * (4096 + sum(int(keep.sum()) for keep in data.values()))


def test_masks_of_both_sides_fit_the_atlas():
    """Three references seen by three regions: noise is the worst case and still a plan; at 240 x 256 it is refused."""
    rng = np.random.default_rng(7)
    data = {name: rng.random((64, 64)) < 0.5 for name in ("k0", "k1", "k2", "q0", "q1", "q2")}
    entries = tuple(Reference(f"ref{i}", (64, 64), keys=f"k{i}", queries=f"q{i}") for i in range(3))
    plan = build_plan(OWN | References(entries), Layout.image(64, 64), data=data)
    assert len(plan.lists.atlas) == 3 * 32 * 64
    wide = {name: rng.random((240, 256)) < 0.5 for name in ("k", "q")}
    with pytest.raises(PlanTooLargeError, match="masks"):
        build_plan(
            References((Reference("ref", (240, 256), keys="k", queries="q"),)), Layout.image(240, 256), data=wide
        )


def test_windows_inside_groups_share_masks_whatever_the_size():
    """Only tiles at the border of a group have masks of their own, and a straight border has few."""
    pattern = Disc(9) & Isolation("groups")
    atlas = {}
    for n in (96, 192):
        layout = Layout.image(n, n)
        groups = np.where(square(n, 13, 0, n - 35), 1, 2)
        cut = build_plan(pattern, layout, data={"groups": groups})
        free = build_plan(pattern, layout, data={"groups": np.ones_like(groups)})
        plain = build_plan(Disc(9), layout)
        assert len(free.lists.atlas) == len(plain.lists.atlas) < len(cut.lists.atlas)
        assert free.useful == plain.useful > cut.useful
        atlas[n] = len(cut.lists.atlas)
    assert atlas[96] == atlas[192]


def test_groups_without_free_tokens_are_windows():
    layout = Layout.image(12, 9)
    groups = np.where(np.indices((12, 9))[1] < 4, 3, 70)
    plan = build_plan(OWN & Isolation("g"), layout, data={"g": groups})
    assert plan.partition() is not None
    groups[0, 0] = 0
    assert build_plan(OWN & Isolation("g"), layout, data={"g": groups}).partition() is None


def test_many_groups_span_several_words():
    layout = Layout.image(17, 19)
    groups = np.arange(17 * 19).reshape(17, 19) // 2
    plan = build_plan(OWN & Isolation("g"), layout, data={"g": groups})
    np.testing.assert_array_equal(listed_mask(plan), (OWN & Isolation("g")).dense_mask(layout, {"g": groups}))


def test_plans_follow_the_contents_of_the_arrays():
    layout = Layout.image(9, 9)
    one, two = square(9, 0, 0, 3), square(9, 4, 4, 3)
    pattern = OWN & KeyMask("keep")
    first = build_plan(pattern, layout, data={"keep": one})
    assert build_plan(pattern, layout, data={"keep": one.copy()}) is first
    assert build_plan(pattern, layout, data={"keep": two}) is not first


PICTURE = content_layout((1, 4, 6))
GOOD = content_data(PICTURE)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Policy(()), "pairs"),
        (lambda: Policy((("target",),)), "pairs"),
        (lambda: Policy(("target", "text")), "pairs"),
        (lambda: Policy((("target", "bird"),)).bind(PICTURE), "no segment is named 'bird'.*'cat', 'dog'"),
        (lambda: Reference(""), "name"),
        (lambda: Reference("cat", bias=1.0), "source"),
        (lambda: Reference("fox", (4, 5), bias=float("inf")), "finite"),
        (lambda: Reference("fox", (4, 5), bias=True), "finite"),
        (lambda: Reference("fox", (4, 0)), "at least 1"),
        (lambda: Reference("fox", (4,)), "rows"),
        (lambda: Reference("fox", (4, 5), length=20), "pass one"),
        (lambda: Reference("fox", length=True), "length"),
        (lambda: Reference("fox", (4, 5), keys=None), "array"),
        (lambda: References(()), "one or more"),
        (lambda: References(("cat",)), "one or more"),
        (lambda: References((Reference("a", (2, 2)), Reference("a", (2, 3)))), "twice"),
        (lambda: References((Reference("a", (2, 2)), Reference("a", (2, 2), bias=1.0))), "twice"),
        (lambda: References((Reference("cat"),), queries=""), "queries"),
        (lambda: References((Reference("bird"),)).bind(PICTURE), "no segment is named 'bird'"),
        (lambda: References((Reference("cat"),), queries="bird").bind(PICTURE), "no segment is named 'bird'"),
        (
            lambda: References((Reference("cat", queries="cat"),), queries="reference").bind(PICTURE, GOOD),
            "2 segments are of kind",
        ),
        (lambda: References(SOURCES).bind(PICTURE), "there is none"),
        (lambda: References((Reference("cat", keys="nix"),)).bind(PICTURE, GOOD), "needs the array 'nix'.*it has"),
        (lambda: References((Reference("cat", keys="owl"),)).bind(PICTURE, GOOD), r"shape \(7,\).*to \(3, 5\)"),
        (lambda: (References(SOURCES) | References((Reference("fox", (4, 5)),))).bind(PICTURE, GOOD), "share the name"),
        (lambda: Isolation(""), "name"),
        (lambda: Isolation("cat", "reference").bind(PICTURE, GOOD), "needs one"),
        (lambda: Isolation("g").bind(PICTURE, {"g": np.zeros((4, 6))}), "integers"),
        (lambda: Isolation("g").bind(PICTURE, {"g": np.full((4, 6), -1)}), "integers"),
        (lambda: KeyMask("m").bind(PICTURE, {"m": np.full((4, 6), 0.5)}), "threshold"),
        (lambda: KeyMask("m").bind(PICTURE, {"m": np.full((4, 6), "x")}), "threshold"),
        (lambda: KeyMask("m").bind(PICTURE, {"m": np.ones((6, 4), bool)}), r"shape \(6, 4\)"),
        (lambda: QueryMask("m", None), "name"),
        (lambda: Regions((), "m"), "text tokens"),
        (lambda: Regions((2, 0), "m"), "at least 1"),
        (lambda: Regions((2, 3), ""), "masks"),
        (lambda: Regions((2, 3), "m", background=1), "True or False"),
        (lambda: Regions((2, 2), "regions").bind(PICTURE, GOOD), "needs 4 text tokens but the layout has 5"),
        (lambda: Regions((2, 3), "regions", background=True).bind(PICTURE, GOOD), "needs 1 masks"),
        (lambda: Regions((2, 3), "left").bind(PICTURE, GOOD | {"left": np.ones(24)}), "needs 2 masks"),
    ],
)  # fmt: skip
def test_what_is_not_allowed_is_named(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_patterns_print_as_themselves_and_compare_by_value():
    for pattern in CONTENT:
        assert eval(repr(pattern)) == pattern
        assert hash(eval(repr(pattern))) == hash(pattern)


def test_a_kind_may_be_absent_but_a_name_may_not():
    layout = Layout((Segment("target", 6, (1, 2, 3)),))
    mask = Policy((("text", "target"), ("target", "target"))).dense_mask(layout)
    assert mask.all()
