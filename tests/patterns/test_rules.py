"""Rules against brute force over `allowed`: relations, key boxes, partitions, on awkward grids."""

from itertools import product

import numpy as np
import pytest
from pattern_cases import COMPOSED, GEOMETRIC, GRIDS, ROUGH_BOXES, layouts

from gensparse.layout import Boxes, Layout
from gensparse.patterns import FULL, NONE, PARTIAL, Disc, Pattern, Rule, Text

ALL = [*GEOMETRIC, *COMPOSED]
LAYOUTS = [layout for grid in GRIDS for layout in layouts(grid)]


def bind(pattern: Pattern, layout: Layout) -> tuple[Rule, np.ndarray]:
    fitting = pattern.clamped(layout.grid)
    return fitting.bind(layout), fitting.dense_mask(layout)


def random_boxes(rng: np.random.Generator, segments, count: int, most_step: int = 1) -> Boxes:
    """Boxes inside the segments, some of one token and some of a whole segment."""
    number = rng.integers(0, len(segments), count)
    shape = np.array([segments[i].shape for i in number])
    lo = rng.integers(0, shape)
    hi = np.minimum(lo + rng.integers(1, 6, (count, 3)), shape)
    whole = rng.random((count, 1)) < 0.1
    step = rng.integers(1, most_step + 1, (count, 3))
    return Boxes(number, np.where(whole, 0, lo), np.where(whole, shape, hi), step)


def members(box: Boxes, index: int, segments) -> np.ndarray:
    """Sequence indices of the tokens of one box."""
    number = int(box.segment[index])
    start = sum(segment.length for segment in segments[:number])
    axes = [np.arange(lo, hi, step) for lo, hi, step in zip(box.lo[index], box.hi[index], box.step[index], strict=True)]
    return start + np.ravel_multi_index(np.meshgrid(*axes, indexing="ij"), segments[number].shape).reshape(-1)


def brute_relation(mask: np.ndarray, q: Boxes, k: Boxes, rule: Rule) -> np.ndarray:
    rows = [members(q, i, rule.layout.segments) for i in range(len(q.segment))]
    columns = [members(k, j, rule.key_segments) for j in range(len(k.segment))]
    return np.array([[_relation(mask[np.ix_(row, column)]) for column in columns] for row in rows])


def _relation(block: np.ndarray) -> int:
    return FULL if block.all() else PARTIAL if block.any() else NONE


@pytest.mark.parametrize("pattern", GEOMETRIC, ids=repr)
def test_relation_of_boxes_is_exact(pattern):
    rng = np.random.default_rng(0)
    for layout in LAYOUTS:
        rule, mask = bind(pattern, layout)
        q, k = random_boxes(rng, layout.segments, 12), random_boxes(rng, layout.segments, 14)
        relation = rule.tile_relation(_rows(q), k)
        assert relation.dtype == np.int8
        np.testing.assert_array_equal(relation, brute_relation(mask[0], q, k, rule), err_msg=repr(layout))


@pytest.mark.parametrize("pattern", ALL, ids=repr)
def test_relation_of_stepped_boxes_is_sound(pattern):
    """Exact for separable patterns."""
    rng = np.random.default_rng(1)
    for layout in LAYOUTS:
        rule, mask = bind(pattern, layout)
        q, k = random_boxes(rng, layout.segments, 10, 4), random_boxes(rng, rule.key_segments, 12, 4)
        for group in range(rule.groups):
            relation = rule.tile_relation(_rows(q), k, group)
            wrong = relation != brute_relation(mask[group], q, k, rule)
            if isinstance(pattern, Disc) or pattern in COMPOSED:
                wrong &= relation != PARTIAL
            assert not wrong.any(), layout


@pytest.mark.parametrize("pattern", ALL, ids=repr)
def test_key_box_covers_every_visible_key(pattern):
    """And for a single geometric pattern it is exactly their bounding box."""
    rng = np.random.default_rng(3)
    for layout in LAYOUTS:
        rule, mask = bind(pattern, layout)
        boxes = random_boxes(rng, layout.segments, 8)
        rows = [members(boxes, i, layout.segments) for i in range(len(boxes.segment))]
        starts = np.cumsum([0, *(segment.length for segment in rule.key_segments)])
        for group, (number, segment) in product(range(rule.groups), enumerate(rule.key_segments)):
            lo, hi = rule.key_box(boxes, number, group)
            own = mask[group][:, starts[number] : starts[number + 1]]
            for i, row in enumerate(rows):
                first, last = _bounds(np.flatnonzero(own[row].any(0)), segment.shape)
                if pattern in [*COMPOSED, *ROUGH_BOXES]:
                    assert (first >= last).all() or ((lo[i] <= first) & (hi[i] >= last)).all()
                else:
                    assert (lo[i] == first).all()
                    assert (hi[i] == last).all()


def _bounds(tokens: np.ndarray, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    positions = np.stack(np.unravel_index(tokens, shape), -1)
    return (positions.min(0), positions.max(0) + 1) if len(tokens) else (np.zeros(3, int), np.zeros(3, int))


@pytest.mark.parametrize("pattern", ALL, ids=repr)
def test_partition_labels_equal_the_mask(pattern):
    for layout in LAYOUTS:
        rule, mask = bind(pattern, layout)
        for group, (number, start) in product(range(rule.groups), enumerate(layout.starts)):
            labels = rule.partition(number, group)
            if labels is not None:
                own = slice(start, start + layout.segments[number].length)
                np.testing.assert_array_equal(labels[:, None] == labels, mask[group][own, own])


@pytest.mark.parametrize("pattern", [pattern for pattern in GEOMETRIC if pattern != Disc(1)], ids=repr)
def test_every_equivalence_relation_is_found(pattern):
    for grid in GRIDS:
        rule, mask = bind(pattern, layouts(grid)[0])
        own = mask[0].astype(np.int64)
        is_equivalence = (own == own.T).all() and ((own @ own > 0) == mask[0]).all()
        assert is_equivalence == (rule.partition(0) is not None), grid


@pytest.mark.parametrize("pattern", ALL, ids=repr)
def test_text_leaves_the_partition_alone(pattern):
    layout = layouts((1, 8, 12))[1]
    alone, _ = bind(pattern, layout)
    joined, _ = bind(pattern | Text(), layout)
    for group in range(alone.groups):
        first, second = alone.partition(1, group), joined.partition(1, group)
        assert (first is None) == (second is None)
        assert first is None or (first == second).all()


def test_empty_boxes_relate_to_nothing():
    layout = layouts((1, 8, 12))[1]
    empty = Boxes(
        np.array([0, 1, 1]),
        np.array([[0, 0, 2], [0, 3, 4], [0, 9, 0]]),
        np.array([[1, 1, 2], [1, 3, 8], [1, 12, 3]]),
        1,
    )
    whole = Boxes(np.array([[1]]), np.zeros((1, 1, 3), int), np.array([[[1, 8, 12]]]), 1)
    for pattern in ALL:
        rule, _ = bind(pattern, layout)
        assert (rule.tile_relation(whole, empty) == NONE).all()
        assert (rule.tile_relation(empty, whole) == NONE).all()


def test_boxes_may_hang_over_the_grid():
    """A ragged tile counts as the tokens that exist."""
    layout = Layout.image(5, 7)
    inside = Boxes(np.array([0]), np.array([[0, 4, 4]]), np.array([[1, 5, 7]]))
    over = Boxes(np.array([0]), np.array([[0, 4, 4]]), np.array([[1, 8, 12]]))
    for pattern in GEOMETRIC:
        rule, _ = bind(pattern, layout)
        assert rule.tile_relation(over, over) == rule.tile_relation(inside, inside)
        assert (np.array(rule.key_box(over, 0)) == np.array(rule.key_box(inside, 0))).all()


def _rows(box: Boxes) -> Boxes:
    return Boxes(box.segment[:, None], box.lo[:, None], box.hi[:, None], box.step[:, None])
