"""Geometric patterns against their definitions written out token by token, and what is true of them at any size."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from pattern_cases import COMPOSED, GEOMETRIC, GRIDS, layouts

from gensparse.attention import sparse_attention
from gensparse.errors import ConfigError
from gensparse.layout import Boxes, Layout, Segment
from gensparse.patterns import (
    FULL,
    NONE,
    Anchors,
    AnchorStream,
    Blocks,
    Box,
    CrissCross,
    Disc,
    InwardWindow,
    Neighborhood,
    PerHead,
    Planes,
    Radial,
    SlidingTiles,
    Text,
    double_windows,
)
from gensparse.patterns.anchors import window_places
from gensparse.patterns.linear import linear
from gensparse.plan import build_plan
from gensparse.testing.pattern_checks import check_pattern
from gensparse.testing.window_order import hilbert_points, window_first

equal = np.testing.assert_array_equal


def mask(pattern, layout: Layout) -> np.ndarray:
    return pattern.dense_mask(layout)[0]


# Radial


def radial_by_definition(pattern: Radial, frames: int, tokens: int, text: int) -> np.ndarray:
    """Block mask [n, n] from masks of tokens, pair of frames by pair of frames, as the method is written down."""
    block, fixed = pattern.block, pattern.rule == "fixed"
    count = (frames * tokens + text) // block + (fixed and (frames * tokens + text) % block > 0)
    power, place = 2 ** len(f"{tokens:b}"), np.arange(tokens)
    found = np.zeros((count, count), bool)
    for i, j in product(range(frames), range(frames)):
        d = abs(i - j)
        digits = len(f"{d:b}") if d else 0
        width = tokens if d <= 1 else max(power / 2**digits * pattern.decay, block)
        if d == 1 and pattern.near_window == "half":
            width = tokens // 2
        near = abs(place[:, None] - place) <= width
        group = power / 2**digits
        if group < 128 and d % int(128 / group):
            near[:] = False
        if pattern.sink and j == 0:
            near[:] = True
        r, c = i * tokens % block, j * tokens % block
        size = [-(-(offset + tokens) // block) if fixed else -(-tokens // block) for offset in (r, c)]
        canvas, real = np.zeros((2, (size[0] + 2) * block, (size[1] + 2) * block), bool)
        canvas[r : r + tokens, c : c + tokens] = near
        real[r : r + tokens, c : c + tokens] = True
        for a, b in product(range(size[0]), range(size[1])):
            cut = np.s_[a * block : (a + 1) * block, b * block : (b + 1) * block]
            rows = max(int(real[cut].any(axis=1).sum()), 1) if fixed else block
            columns = canvas[cut].sum(axis=0)
            some, many = (columns > 0).sum(), (3 * columns > rows).sum()
            if 10 * many > 6 * some:
                found[i * tokens // block + a, j * tokens // block + b] = True
    found[frames * tokens // block :] = found[:, frames * tokens // block :] = True
    return found


RADIAL = [
    (Radial(1.0, block=16), 5, 37, 0),
    (Radial(0.3, block=24, sink=False), 6, 150, 19),
    (Radial(0.5, block=32), 9, 131, 5),
    (Radial(0.7, block=64, near_window="half"), 4, 257, 0),
    (Radial(1.0, block=128, sink=False), 3, 300, 77),
    (Radial(0.2, block=1), 3, 7, 2),
    (Radial(0.5, block=48, rule="upstream"), 5, 200, 100),
    (Radial(0.4, block=64, rule="upstream", sink=False), 6, 160, 70),
    (Radial(2.0, block=32, rule="upstream"), 10, 96, 0),
]


@pytest.mark.parametrize(("pattern", "frames", "tokens", "text"), RADIAL, ids=repr)
def test_radial_keeps_the_blocks_of_its_definition(pattern, frames, tokens, text):
    layout = Layout.video(frames, 1, tokens, text=text)
    blocks = radial_by_definition(pattern, frames, tokens, text)
    seen = mask(pattern, layout)
    edges = np.minimum(np.arange(len(blocks) + 1) * pattern.block, layout.tokens)
    size = np.diff(edges)
    equal(seen[: edges[-1], : edges[-1]], blocks.repeat(size, 0).repeat(size, 1))
    assert not seen[edges[-1] :].any()
    assert not seen[:, edges[-1] :].any()
    if pattern.rule == "fixed":
        assert edges[-1] == layout.tokens


def test_radial_sees_only_tokens_not_the_shape_of_frames():
    flat = mask(Radial(0.5, block=16), Layout.video(5, 1, 77, text=9))
    equal(mask(Radial(0.5, block=16), Layout.video(5, 7, 11, text=9)), flat)
    order = np.concatenate([np.arange(9) + 5 * 77, np.arange(5 * 77)])
    equal(mask(Radial(0.5, block=16), Layout.video(5, 7, 11, text=9, text_first=True)), flat[np.ix_(order, order)])


def test_radial_text_sees_and_is_seen_and_other_segments_do_not_take_part():
    target = Segment("target", 5 * 40, (5, 4, 10))
    layout = Layout((Segment("text", 3), target, Segment("reference", 6, (1, 2, 3)), Segment("register", 2)))
    seen = mask(Radial(0.2, block=8), layout)
    words, pictures = np.r_[0:3, 209:211], np.arange(203, 209)
    taking = np.setdiff1d(np.arange(layout.tokens), pictures)
    assert seen[np.ix_(words, taking)].all()
    assert seen[np.ix_(taking, words)].all()
    assert not seen[pictures].any()
    assert not seen[:, pictures].any()
    alone = mask(Radial(0.2, block=8), Layout((target,)))
    equal(seen[3:203, 3:203], alone)


@pytest.mark.parametrize("tokens", [128, 131, 240])
def test_two_frames_are_dense(tokens):
    for frames in (1, 2):
        assert mask(Radial(0.1, block=64, sink=False), Layout.video(frames, 1, tokens)).all()


def test_radial_sink_symmetry_and_bands():
    layout, block, per_frame = Layout.video(12, 16, 16), 32, 8
    with_sink, without = (Radial(0.4, block=block, sink=sink).bind(layout).mask for sink in (True, False))
    assert with_sink[:, :per_frame].all()
    equal(with_sink[:, per_frame:], without[:, per_frame:])
    equal(without, without.T)
    frames = without.reshape(12, per_frame, 12, per_frame).transpose(0, 2, 1, 3)
    for i, j in product(range(11), range(11)):
        equal(frames[i, j], frames[i + 1, j + 1])
    wide = Radial(16.0, block=block, sink=False).bind(layout).mask.reshape(12, per_frame, 12, per_frame)
    per_pair = wide.transpose(0, 2, 1, 3).reshape(12, 12, -1)
    assert (per_pair.all(-1) == per_pair.any(-1)).all()  # only whole frames are left out


@pytest.mark.parametrize(
    ("layout", "pattern", "density"),
    [
        (Layout.video(33, 8, 8), Radial(block=64), 0.0597),
        (Layout.video(9, 16, 16), Radial(), 0.8765),
        (Layout.video(16, 16, 24), Radial(0.2), 0.5868),
        (Layout.video(18, 48, 80), Radial(0.2), 0.2871),
        (Layout.video(20, 48, 80), Radial(0.8, block=64), 0.3491),
        (Layout.video(30, 48, 80, text=256), Radial(0.95, sink=False), 0.2778),
    ],
)
def test_radial_densities_of_published_settings(layout, pattern, density):
    plan = build_plan(pattern, layout)
    assert plan.q_tile == (1, 1, 128)
    assert plan.k_tile == (1, 1, 64)
    assert round(plan.density, 4) == density
    if pattern.block == 128:  # blocks of 64 are half a query tile
        assert plan.stats()["visited_pairs"] == plan.useful[0]


@pytest.mark.parametrize("text", [0, 256])
def test_radial_fits_720p_where_blocks_do_not_divide_frames(text):
    """The official builder stops at these sizes. Tiles are runs, so that only ragged ends are computed in vain."""
    plan = build_plan(Radial(), Layout.video(21, 45, 80, text=text))
    assert 0.39 < plan.density < 0.42
    assert plan.stats()["visited_pairs"] < 1.01 * plan.useful[0]
    assert plan.stats()["bytes"] < 4 << 20


def test_radial_plans_hold_its_pairs_on_boxes_too():
    layout = Layout.video(5, 6, 10, text=7)
    for pattern in (Radial(0.5, block=16), Radial(block=16) | Disc(3), Radial(block=16) & Box((4, 2, 3))):
        expected = pattern.dense_mask(layout).sum()
        for tiles in ({}, {"q_tile": (1, 4, 8)}, {"k_tile": (1, 2, 16)}, {"q_tile": (2, 4, 8), "k_tile": (2, 4, 4)}):
            assert build_plan(pattern, layout, **tiles).useful == (expected,)


def test_radial_attention_equals_the_masked_oracle_in_all_orders():
    check_pattern(Radial(0.5, block=16), [Layout.video(4, 3, 11, text=5), Layout.ulysses(Layout.video(4, 5, 7), 3)])
    check_pattern(Radial(0.5, block=16, rule="upstream"), [Layout.video(5, 4, 8, text=21)])


@pytest.mark.parametrize(
    "make",
    [
        lambda: Radial(0),
        lambda: Radial(-1.0),
        lambda: Radial(float("nan")),
        lambda: Radial(float("inf")),
        lambda: Radial(True),
        lambda: Radial("1"),
        lambda: Radial(block=0),
        lambda: Radial(block=64.0),
        lambda: Radial(sink=1),
        lambda: Radial(rule="paper"),
        lambda: Radial(near_window="none"),
        lambda: Radial(rule="upstream").bind(Layout.video(3, 16, 16, text=8, text_first=True)),
        lambda: Radial(rule="upstream").bind(Layout.video(5, 45, 80)),
        lambda: Radial(rule="upstream").bind(Layout.joint((3, 16, 16), text=0, references=[(1, 4, 4)])),
    ],
)
def test_radial_refuses_what_it_cannot_do(make):
    with pytest.raises(ConfigError, match="Radial"):
        make()


# windows


@pytest.mark.parametrize("grid", [(1, 1, 9), (3, 11, 13), (2, 7, 4), (1, 20, 9)])
@pytest.mark.parametrize("half", [(2, 3), (0, 1), (5, 2), (40, 2)])
def test_inward_windows_follow_their_formula(grid, half):
    frames, height, width = grid
    seen = mask(InwardWindow(half), Layout.video(*grid)).reshape(*grid, *grid)
    for y, x in product(range(height), range(width)):
        expected = np.ones((height, width), bool)
        for axis, (at, d, length) in enumerate(((y, half[0], height), (x, half[1], width))):
            lo, hi = at - d - max(0, at + d - (length - 1)), at + d + max(0, d - at)
            inside = (lo <= np.arange(length)) & (np.arange(length) <= hi)
            expected &= inside[:, None] if axis == 0 else inside
        assert (seen[:, y, x] == expected).all()
    keys = frames * min(2 * half[0] + 1, height) * min(2 * half[1] + 1, width)
    assert (seen.reshape(frames * height * width, -1).sum(1) == keys).all()
    equal(seen, seen[:, ::-1, :, :, ::-1])
    equal(seen, seen[:, :, ::-1, :, :, ::-1])


def test_inward_windows_in_tokens_of_the_published_sizes():
    """1088 x 1920 pixels, 81 frames, from a native 480 x 832: one fifth of the pairs."""
    plan = build_plan(InwardWindow((15, 26)), Layout.video(21, 68, 120))
    assert plan.useful[0] == (21 * 68 * 120) * (21 * 31 * 53)
    assert round(plan.density, 2) == 0.20


@pytest.mark.parametrize("half", [-1, True, 1.5, (1,), (1, 2, 3), (1, -2), None, "2"], ids=repr)
def test_inward_windows_need_halves(half):
    with pytest.raises(ConfigError, match="InwardWindow half"):
        InwardWindow(half)


@pytest.mark.parametrize("grid", [(1, 1, 9), (1, 11, 13), (4, 5, 6), (1, 2, 12)])
@pytest.mark.parametrize("radius", [1, 2, 5])
def test_borders_of_boxes(grid, radius):
    layout = Layout.video(*grid)
    position = layout.coords().position
    apart = abs(position[:, None] - position)
    around = np.minimum(apart, np.array(grid) - apart)
    equal(mask(Box(radius), layout), (apart <= radius).all(-1))
    equal(mask(Box(radius, border="wrap"), layout), (around <= radius).all(-1))
    equal(mask(Box(radius, border="shift"), layout), mask(Neighborhood(2 * radius + 1).clamped(grid), layout))
    keys = np.prod(np.minimum(2 * radius + 1, grid))
    for border in ("shift", "wrap"):
        assert (mask(Box(radius, border=border), layout).sum(1) == keys).all()


def test_box_keeps_its_name_and_tells_borders_apart():
    assert repr(Box(3)) == "Box(radius=3)"
    assert repr(Box((2, 3), "wrap")) == "Box(radius=(2, 3), border='wrap')"
    with pytest.raises(ConfigError, match="Box border"):
        Box(3, border="reflect")


@pytest.mark.parametrize(("tile", "window"), [(3, 3), (4, 1), (2, 5), (5, 1)])
def test_sliding_tiles_are_strided_neighborhoods_where_tiles_divide(tile, window):
    layout = Layout.video(tile * window, tile * 5, tile * 6)
    if layout.tokens > 4000:
        layout = Layout.image(tile * 5, tile * 6)
    expected = mask(Neighborhood(window * tile, stride=tile), layout)
    equal(mask(SlidingTiles(tile, window), layout), expected)


@pytest.mark.parametrize("grid", [(1, 1, 17), (1, 11, 13), (7, 5, 9)])
@pytest.mark.parametrize(("tile", "window"), [(2, 3), (3, 2), (4, 2), (1, 4), (5, 1)])
def test_sliding_tiles_show_whole_tiles_around_their_own(grid, tile, window):
    layout = Layout.video(*grid)
    pattern = SlidingTiles(tile, window).clamped(grid)
    position = layout.coords().position
    expected = np.ones((layout.tokens, layout.tokens), bool)
    for axis, length in enumerate(grid):
        t = min(tile, length)
        own, count = position[:, axis] // t, -(-length // t)
        w = min(window, count)
        start = np.clip(own - w // 2, 0, count - w)
        expected &= (start[:, None] <= own) & (own < start[:, None] + w)
    equal(mask(pattern, layout), expected)


def test_sliding_tiles_of_the_published_setting_need_no_masks():
    """HunyuanVideo 768 x 1280, 117 frames: tiles (6, 8, 8), windows of 3 x 3 x 3 tiles, 91% of the pairs left out."""
    plan = build_plan(SlidingTiles((6, 8, 8), (3, 3, 3)), Layout.video(30, 48, 80))
    assert plan.density == 27 / (5 * 6 * 10)
    assert len(plan.lists.atlas) == 0
    assert plan.stats()["visited_pairs"] == plan.useful[0]


def test_sliding_tiles_refuse_more_than_there_is():
    for pattern in (SlidingTiles(12, 1), SlidingTiles(4, 4), SlidingTiles((3, 5), (5, 1))):
        with pytest.raises(ConfigError, match="SlidingTiles"):
            pattern.bind(Layout.image(11, 13))
        pattern.clamped((1, 11, 13)).bind(Layout.image(11, 13))
    for bad in (0, True, 2.0, "3", ()):
        with pytest.raises(ConfigError, match="SlidingTiles"):
            SlidingTiles(bad, 1)
        with pytest.raises(ConfigError, match="SlidingTiles"):
            SlidingTiles(2, bad)


@pytest.mark.parametrize("grid", [(3, 5, 7), (2, 2, 2), (4, 3, 3)])
def test_planes_share_a_coordinate_with_the_query(grid):
    layout = Layout.video(*grid)
    position = layout.coords().position
    seen = mask(Planes(), layout)
    equal(seen, (position[:, None] == position).any(-1))
    f, h, w = grid
    assert (seen.sum(1) == h * w + f * w + f * h - f - h - w + 1).all()


@pytest.mark.parametrize("grid", [(1, 5, 7), (4, 1, 6), (1, 1, 9), (1, 1, 1)])
def test_planes_of_a_picture_are_its_lines(grid):
    equal(mask(Planes(), Layout.video(*grid)), mask(CrissCross(), Layout.video(*grid)))


@pytest.mark.parametrize(("grid", "window"), [((1, 8, 12), 4), ((3, 7, 11), 5), ((1, 9, 9), 3), ((1, 5, 6), 1)])
def test_double_windows_shift_half_of_the_heads(grid, window):
    layout = Layout.video(*grid)
    plain, shifted = double_windows(window, grid).dense_mask(layout)
    position = layout.coords().position
    for seen, offset in ((plain, 0), (shifted, window - window // 2)):
        label = np.concatenate([position[:, :1], (position[:, 1:] + offset) // window], axis=1)
        equal(seen, (label[:, None] == label).all(-1))


@pytest.mark.parametrize("grid", [(1, 8, 12), (2, 6, 5)])
def test_double_windows_do_not_shift_what_one_window_covers(grid):
    shortest = min(grid[1:])
    for window in (shortest, shortest + 3):
        menu = double_windows(window, grid)
        plain, shifted = menu.dense_mask(Layout.video(*grid))
        equal(plain, shifted)
        equal(plain, mask(Blocks((1, shortest, shortest)), Layout.video(*grid)))
    with pytest.raises(ConfigError, match="double_windows window"):
        double_windows(0, grid)


def neighborhood_axis(length: int, window: int, stride: int, dilation: int, causal: bool) -> np.ndarray:
    """NATTEN's rule of one axis, query by query and key by key."""
    seen = np.zeros((length, length), bool)
    for i, j in product(range(length), range(length)):
        if i % dilation != j % dilation:
            continue
        u, v, size = i // dilation, j // dilation, len(range(i % dilation, length, dilation))
        leader = min(u // stride * stride + (stride - 1 if causal else stride // 2), size - 1)
        if causal:
            seen[i, j] = max(leader - window + 1, 0) <= v <= u
        else:
            start = min(max(leader - window // 2, 0), size - window)
            seen[i, j] = start <= v < start + window
    return seen


@pytest.mark.parametrize("grid", [(1, 1, 23), (1, 13, 7), (5, 4, 7)])
def test_neighborhoods_follow_the_rule_of_every_axis(grid):
    """Window, stride, dilation and causality all differ per axis."""
    rng = np.random.default_rng(1)
    for _ in range(12):
        window = tuple(int(rng.integers(1, length + 1)) for length in grid)
        dilation = tuple(int(rng.integers(1, length // w + 1)) for w, length in zip(window, grid, strict=True))
        stride = tuple(int(rng.integers(1, w + 1)) for w in window)
        causal = tuple(map(bool, rng.integers(0, 2, 3)))
        axes = [neighborhood_axis(*a) for a in zip(grid, window, stride, dilation, causal, strict=True)]
        expected = np.einsum("ad,be,cf->abcdef", *(axis.astype(int) for axis in axes)).reshape(2 * [np.prod(grid)])
        equal(mask(Neighborhood(window, stride, dilation, causal), Layout.video(*grid)), expected.astype(bool))


# anchors

ANCHORS = [
    (Anchors(4), (1, 8, 12), (2, 3), 3),
    (Anchors((4, 6)), (1, 13, 11), (3, 4), 2),
    (Anchors(5, neighbours="3x3"), (1, 12, 17), (6, 5), 0),
    (Anchors(3, text_sees_anchors=True), (1, 7, 9), (7, 9), 4),
    (Anchors(40), (1, 6, 9), (1, 1), 1),
    (Anchors(8, neighbours="3x3"), (1, 17, 19), (4, 5), 5),
]


def anchors_layout(grid, low, text: int) -> Layout:
    return Layout.joint(grid, text=text, references=[(1, *low)])


def anchors_by_definition(pattern: Anchors, layout: Layout) -> np.ndarray:
    """Token by token, from the table of the method."""
    wh, ww = pattern.window if isinstance(pattern.window, tuple) else (pattern.window, pattern.window)
    (_, height, width), (_, h, w) = layout.grid, layout.segments[-1].shape
    scale = max(height // h, 1), max(width // w, 1)
    lh, lw = max(wh // scale[0], 1), max(ww // scale[1], 1)
    per_row, rows = -(-w // lw), -(-h // lh)
    kinds = [layout.segments[number].kind for number in layout.coords().segment]
    places = layout.coords().position[:, 1:].tolist()

    def window_of(kind, place):
        y, x = place
        if kind == "target":  # tokens beyond the last anchor belong to the last window
            y, x = min(y // scale[0], rows * lh - 1), min(x // scale[1], per_row * lw - 1)
        return y // lh, x // lw

    def sees(q, k):
        (kind, (y, x)), (other, (v, u)) = (kinds[q], places[q]), (kinds[k], places[k])
        if kind == "text":
            return other != "reference" or pattern.text_sees_anchors
        if kind == "reference":
            return other == "reference" and abs(y - v) <= 2 and abs(x - u) <= 2
        if other == "target":
            return abs(y - v) <= wh / 2 and abs(x - u) <= ww / 2
        if other == "text":
            return True
        (a, b), (c, d) = window_of(kind, (y, x)), window_of(other, (v, u))
        if pattern.neighbours == "3x3":
            return abs(a - c) <= 1 and abs(b - d) <= 1
        return abs(a * per_row + b - c * per_row - d) <= 1

    return np.array([[sees(q, k) for k in range(layout.tokens)] for q in range(layout.tokens)])


@pytest.mark.parametrize(("pattern", "grid", "low", "text"), ANCHORS, ids=repr)
def test_anchors_follow_their_table(pattern, grid, low, text):
    layout = anchors_layout(grid, low, text)
    equal(mask(pattern, layout), anchors_by_definition(pattern, layout))


@pytest.mark.parametrize(("pattern", "grid", "low", "text"), ANCHORS, ids=repr)
def test_anchors_run_on_every_backend(pattern, grid, low, text):
    check_pattern(pattern, [anchors_layout(grid, low, text)])


@pytest.mark.parametrize(("pattern", "grid", "low", "text"), ANCHORS, ids=repr)
def test_relations_of_anchors_are_exact(pattern, grid, low, text):
    layout = anchors_layout(grid, low, text)
    rule, seen = pattern.bind(layout), mask(pattern, layout)
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, len(layout.segments), (2, 60))
    boxes = []
    for number in numbers:
        shape = np.array([layout.segments[i].shape for i in number])
        lo = rng.integers(0, shape)
        boxes.append(Boxes(number, lo, np.minimum(lo + rng.integers(1, 6, lo.shape), shape)))
    relation = rule.tile_relation(*boxes)
    for i in range(60):
        block = seen[np.ix_(*(box_tokens(layout, box, i) for box in boxes))]
        assert relation[i] == (FULL if block.all() else NONE if not block.any() else 1)


def box_tokens(layout: Layout, box: Boxes, index: int) -> np.ndarray:
    number = int(box.segment[index])
    axes = np.meshgrid(*map(np.arange, box.lo[index], box.hi[index]), indexing="ij")
    return layout.starts[number] + np.ravel_multi_index(axes, layout.segments[number].shape).reshape(-1)


@pytest.mark.parametrize("blocks", [(16, 8), (7, 11), (128, 64)])
@pytest.mark.parametrize(("grid", "low", "text"), [((1, 16, 24), (4, 6), 8), ((1, 13, 19), (3, 5), 5)])
def test_closure_shows_every_block_with_a_visible_pair(grid, low, text, blocks):
    layout = anchors_layout(grid, low, text)
    orders = window_first(grid[1:], (8, 8)), window_first(low, (4, 4))
    order = np.concatenate([np.arange(text), text + orders[0], text + len(orders[0]) + orders[1]])
    exact = mask(Anchors(8), layout)[np.ix_(order, order)]
    q, k = (np.arange(layout.tokens) // size for size in blocks)
    kept = np.zeros((q[-1] + 1, k[-1] + 1), bool)
    np.logical_or.at(kept, (q[:, None], k), exact)
    pattern = Anchors(8, closure=blocks)
    equal(mask(pattern, layout)[np.ix_(order, order)], kept[q[:, None], k])
    check_pattern(pattern, [layout])


def test_closure_of_4096_pixels_keeps_the_published_share_on_whole_tiles():
    layout = anchors_layout((1, 256, 256), (64, 64), 512)
    plan = build_plan(Anchors(16, closure=(128, 64)), layout)
    assert round(plan.density, 4) == 0.0298
    assert (plan.q_tile, plan.k_tile) == ((1, 8, 16), (1, 4, 16))
    assert plan.stats()["visited_pairs"] < 1.01 * plan.useful[0]
    assert round(build_plan(Anchors(16), layout).density, 4) == 0.0181


def test_anchors_count_the_keys_of_the_published_setting():
    """289 + 512 + 48 keys inside the picture at 4096 pixels."""
    layout = anchors_layout((1, 256, 256), (64, 64), 512)
    rule = Anchors(16).bind(layout)
    coords = layout.coords()
    middle = 512 + 128 * 256 + 128
    query = coords._replace(segment=coords.segment[middle], position=coords.position[middle])
    seen = rule.allowed(query, coords)
    assert [int(seen[coords.segment == number].sum()) for number in range(3)] == [512, 289, 48]


def test_anchors_do_not_depend_on_the_rest():
    """Their rows stay bit-identical, which is what makes their keys reusable in every step."""
    layout = anchors_layout((1, 16, 20), (4, 5), 7)
    plan = build_plan(Anchors(8), layout)
    generator = torch.Generator().manual_seed(0)
    first, second = ([torch.randn(1, layout.tokens, 2, 8, generator=generator) for _ in range(3)] for _ in range(2))
    low = slice(7 + 16 * 20, None)
    for a, b in zip(first, second, strict=True):
        b[:, low] = a[:, low]
    outs = [sparse_attention(*tensors, plan)[:, low] for tensors in (first, second)]
    assert torch.equal(*outs)


@pytest.mark.parametrize("closure", [None, (7, 11), (128, 64)])
@pytest.mark.parametrize(("pattern", "grid", "low", "text"), ANCHORS, ids=repr)
def test_anchors_as_a_source_are_the_rows_of_text_and_target(pattern, grid, low, text, closure):
    """Also where a block holds the last tokens of the target and the first anchors."""
    pattern, whole = replace(pattern, closure=closure), anchors_layout(grid, low, text)
    own = Layout.joint(grid, text=text)
    equal(mask(replace(pattern, low=low), own), mask(pattern, whole)[: own.tokens])


@pytest.mark.parametrize("closure", [None, (7, 11)])
def test_anchors_as_a_source_run_on_every_backend(closure):
    layouts = [
        Layout.joint((1, 13, 11), text=text, text_first=first) for text, first in ((4, True), (0, True), (3, False))
    ]
    check_pattern(Anchors((4, 6), closure=closure, low=(3, 4)), layouts)


@pytest.mark.parametrize("blocks", [None, (16, 8), (8, 32)])
@pytest.mark.parametrize(("grid", "low"), [((1, 16, 24), (4, 6)), ((1, 12, 8), (3, 2))])
def test_anchors_alone_see_what_they_see_behind_whole_blocks(grid, low, blocks):
    text = -grid[1] * grid[2] % 32 + 32
    layout = anchors_layout(grid, low, text)
    alone = mask(AnchorStream(blocks), Layout.image(*low))
    behind = layout.tokens - low[0] * low[1]
    equal(mask(Anchors(8, closure=blocks), layout)[behind:, behind:], alone)
    assert not mask(Anchors(8, closure=blocks), layout)[behind:, :behind].any()


@pytest.mark.parametrize("blocks", [None, (7, 11), (128, 64)])
def test_anchors_alone_run_on_every_backend(blocks):
    check_pattern(AnchorStream(blocks), [Layout.image(5, 7, text=1), Layout.image(9, 1), Layout.image(1, 1, text=3)])


@pytest.mark.parametrize(
    "make",
    [
        lambda: AnchorStream(128),
        lambda: AnchorStream((128, 0)),
        lambda: AnchorStream().bind(Layout.video(2, 3, 3)),
        lambda: Anchors(8, low=(4, 0)),
        lambda: Anchors(8, low=(4, 4, 4)),
        lambda: Anchors(8, low=(4, 4)).bind(Layout.joint((1, 16, 16), references=[(1, 4, 4)])),
        lambda: Anchors(8, low=(4, 17)).bind(Layout.image(16, 16)),
        lambda: Anchors(8, low=(4, 4)).bind(Layout.video(2, 16, 16)),
        lambda: Anchors(0),
        lambda: Anchors((4, 4, 4)),
        lambda: Anchors(True),
        lambda: Anchors(8, neighbours="5x5"),
        lambda: Anchors(8, text_sees_anchors=1),
        lambda: Anchors(8, closure=128),
        lambda: Anchors(8, closure=(128, 0)),
        lambda: Anchors(8, closure=(128, 64, 32)),
        lambda: Anchors(8).bind(Layout.image(16, 16, text=4)),
        lambda: Anchors(8).bind(Layout.joint((1, 16, 16), references=[(1, 4, 4), (1, 4, 4)])),
        lambda: Anchors(8).bind(Layout.joint((2, 16, 16), references=[(1, 4, 4)])),
        lambda: Anchors(8).bind(Layout.joint((1, 16, 16), references=[(1, 4, 17)])),
    ],
)
def test_anchors_refuse_what_they_cannot_do(make):
    with pytest.raises(ConfigError, match="Anchor"):
        make()


def test_window_orders_are_permutations_and_the_curve_has_no_jumps():
    for shape, window in (((8, 12), (4, 4)), ((7, 11), (3, 4)), ((1, 5), (2, 2))):
        order, places = window_first(shape, window), window_places(shape, window)
        equal(np.sort(order), np.arange(np.prod(shape)))
        equal(places[order], np.arange(len(order)))
    for side in (1, 2, 8, 16):
        row, column = hilbert_points(side)
        assert (abs(np.diff(row)) + abs(np.diff(column)) == 1).all()
        assert len(set(zip(row, column, strict=True))) == side**2


# runs of raster tokens


@pytest.mark.parametrize("pattern", [*GEOMETRIC[::3], *COMPOSED], ids=repr)
def test_linear_form_is_the_same_relation(pattern):
    rng = np.random.default_rng(0)
    for grid in GRIDS:
        layout = layouts(grid)[1]
        rule = pattern.clamped(grid).bind(layout)
        form, expected = linear(rule), rule.dense_mask()
        assert all(segment.shape[:2] == (1, 1) for segment in form.layout.segments)
        equal(form.dense_mask(), expected)
        lengths = np.array([segment.length for segment in layout.segments])
        number = rng.integers(0, len(lengths), (2, 40))
        start = rng.integers(0, lengths[number])
        stop = np.minimum(start + rng.integers(1, 12, start.shape), lengths[number])
        zero = np.zeros_like(start)
        lo, hi = np.stack([zero, zero, start], -1), np.stack([zero + 1, zero + 1, stop], -1)
        q, k = (Boxes(number[i], lo[i], hi[i]) for i in range(2))
        starts = np.array(layout.starts)[number]
        for group in range(rule.groups):
            relation = form.tile_relation(q, k, group)
            boxes = [form.key_box(q, segment, group) for segment in range(len(lengths))]
            for i in range(40):
                rows, columns = (np.arange(starts[s, i] + start[s, i], starts[s, i] + stop[s, i]) for s in range(2))
                block = expected[group][np.ix_(rows, columns)]
                assert relation[i] != NONE or not block.any()
                assert relation[i] != FULL or block.all()
                for segment, (first, length) in enumerate(zip(layout.starts, lengths, strict=True)):
                    keys = np.flatnonzero(expected[group][rows, first : first + length].any(0))
                    left, right = (edge[i][..., 2] for edge in boxes[segment])
                    assert not len(keys) or (left <= keys[0] and keys[-1] < right)


def test_a_menu_with_radial_follows_its_runs():
    layout = Layout.video(4, 6, 10, text=3)
    pattern = PerHead((Radial(block=16), Neighborhood((None, 3, 3)))) | Text()
    plan = build_plan(pattern, layout)
    assert plan.q_tile == (1, 1, 128)
    assert plan.useful == tuple(pattern.dense_mask(layout).sum(axis=(1, 2)))
