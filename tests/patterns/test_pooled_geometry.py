"""Proxies, pyramids, varying windows and HiLo: which cells they show, and when they equal dense attention."""

from itertools import product

import numpy as np
import pytest
import torch
from attention_checks import random_qkv

from gensparse.attention import sparse_attention
from gensparse.errors import ConfigError
from gensparse.kernels import reference
from gensparse.kernels.pool import cell_counts, pool_keys, proxy_tokens
from gensparse.layout import Layout
from gensparse.patterns import (
    Blocks,
    Box,
    Disc,
    HiLo,
    Neighborhood,
    Pattern,
    PerHead,
    Pooled,
    Proxy,
    Pyramid,
    Text,
    VaryingWindow,
)
from gensparse.plan import build_plan

LAYOUTS = [
    Layout.image(7, 11, text=3),
    Layout.joint((3, 5, 7)),
    Layout.joint((1, 1, 13), text=2, text_first=False),
    Layout.image(1, 1, text=1),
    Layout.ulysses(Layout.image(7, 11, text=5), 3),
]
PARTITIONS: list[Pattern] = [
    Proxy(4),
    Proxy(3, shift=2),
    Proxy(1),
    Proxy(None),
    Pyramid((2,), (1,)),
    Pyramid((2, 4), (1, 3)),
    Pyramid((2, 4, 8), (Disc(2), Box(2), Neighborhood(5))),
    Pyramid((3, 6), (Blocks(3), Box(1))),
    Pyramid((1, 2, 4), (Box(1), Box(5), Box(1))),  # a cell is split only where the larger one is
    Pyramid((1, 2), (Neighborhood(3, dilation=2), 2)),
]


def fitted(pattern: Pattern, layout: Layout) -> Pattern:
    return pattern.clamped(layout.grid) | Text()


def dense(q, k, v, layout: Layout) -> torch.Tensor:
    return reference.attend(q, k, v, torch.ones(layout.tokens, layout.tokens, dtype=torch.bool))[0]


def members(pattern: Pattern, layout: Layout) -> np.ndarray:
    """Which own tokens every key stands for, bool [keys, own tokens], from the sources' settings."""
    rule = pattern.bind(layout)
    grid, coords = np.array(layout.grid), layout.coords()
    rows = [np.eye(layout.tokens, dtype=bool)]
    own = coords.segment == layout.target
    for source in rule.sources:
        size = np.array(source.cells)
        cell = (coords.position - np.array(source.shift)) // size
        first = np.where(np.array(source.shift) > 0, -1, 0)
        shape = np.array(source.segment.grid)
        assert (cell[own] - first < shape).all()
        assert (shape == (grid - np.array(source.shift) + size - 1) // size - first).all()
        number = np.ravel_multi_index(np.minimum(cell - first, shape - 1).clip(0).T, source.segment.grid)
        rows.append((number == np.arange(source.segment.length)[:, None]) & own)
    return np.concatenate(rows)


@pytest.mark.parametrize("pattern", PARTITIONS, ids=repr)
def test_every_target_token_counts_exactly_once(pattern):
    for layout in LAYOUTS:
        fitting = fitted(pattern, layout)
        target = layout.coords().segment == layout.target
        counts = fitting.dense_mask(layout)[0].astype(int) @ members(fitting, layout).astype(int)
        assert (counts[target] == 1).all(), layout
        assert (counts[~target] == 1).all(), "text queries see every own token and no pooled key"


@pytest.mark.parametrize("pattern", PARTITIONS, ids=repr)
def test_cells_of_equal_tokens_give_dense_attention(pattern):
    """Exactly, with ragged cells, shifts and levels: a mean with ln(count) stands for equal tokens."""
    for layout in LAYOUTS:
        fitting = fitted(pattern, layout)
        q, k, v = random_qkv(layout, dtype=torch.float64)
        for cell in members(fitting, layout)[layout.tokens :]:  # small cells first, so that large ones end up equal
            rows = np.flatnonzero(cell)
            k[:, rows], v[:, rows] = (x[:, rows[:1]].clone() for x in (k, v))
        out = sparse_attention(q, k, v, build_plan(fitting, layout))
        torch.testing.assert_close(out, dense(q, k, v, layout), rtol=1e-9, atol=1e-10)


def test_windows_over_the_grid_are_dense():
    layout = Layout.image(7, 11, text=3)
    q, k, v = random_qkv(layout)
    for pattern in (Proxy(None), Proxy((7, 11)), Proxy(1), Pyramid((2, 4), (11, 11)), Pyramid((1,), (1,))):
        out = sparse_attention(q, k, v, build_plan(pattern | Text(), layout))
        torch.testing.assert_close(out, dense(q, k, v, layout), rtol=1e-5, atol=1e-5)


def test_a_constant_added_to_the_values_moves_the_output_by_it():
    layout = Layout.joint((2, 5, 7), text=2)
    q, k, v = random_qkv(layout, dtype=torch.float64)
    for pattern in (Proxy((2, 3, 3), shift=1) | Text(), Pyramid((2,), (1,)) | Text(), VaryingWindow(2, 2) | Text()):
        plan = build_plan(pattern, layout)
        moved = sparse_attention(q, k, v + 3.0, plan) - sparse_attention(q, k, v, plan)
        torch.testing.assert_close(moved, torch.full_like(moved, 3.0))


def test_levels_follow_the_definition_token_by_token():
    """Cells are split from the largest down while the pattern shows the query one of their tokens."""
    layout, near = Layout.image(9, 13), (Box(1), Disc(4))
    pattern, own = Pyramid((2, 6), near), [part.dense_mask(layout)[0] for part in near]
    rule, mask = pattern.bind(layout), pattern.dense_mask(layout)[0]
    starts = np.cumsum([0, *(segment.length for segment in rule.key_segments)])
    labels = [(y // c * -(-13 // c) + x // c) for c in (2, 6) for y, x in [np.divmod(np.arange(117), 13)]]
    for query, key in product(range(117), range(117)):
        fine, coarse = (labels[i] == labels[i][key] for i in range(2))
        level = 2 if not own[1][query, coarse].any() else int(not own[0][query, fine].any())
        seen = [mask[query, key], *(mask[query, starts[1 + i] + labels[i][key]] for i in range(2))]
        assert np.flatnonzero(seen).tolist() == [level]


def test_an_excluded_pattern_hides_every_cell_it_touches():
    layout = Layout.image(8, 9)
    pattern = Pooled(2, weights="mean", bias="log_count", exclude=Disc(3))
    seen, disc = pattern.dense_mask(layout)[0][:, 72:], Disc(3).dense_mask(layout)[0]
    y, x = np.divmod(np.arange(72), 9)
    touched = np.stack([disc[:, y // 2 * 5 + x // 2 == cell].any(1) for cell in range(20)], 1)
    np.testing.assert_array_equal(seen, ~touched)


@pytest.mark.parametrize(("window", "ratio"), [(2, 2), (3, 2), (1, 3), (4, 3), ((2, 3), (3, 1))])
def test_varying_windows_have_as_many_keys_as_queries(window, ratio):
    layout = Layout.image(13, 17)
    pattern = VaryingWindow(window, ratio)
    mask = pattern.dense_mask(layout)[0]
    keys = np.prod(window) if isinstance(window, tuple) else window**2
    assert (mask[:, 221:].sum(1) == keys).all()
    assert not mask[:, :221].any()
    covered = mask[:, 221:].astype(int) @ members(pattern, layout)[221:].astype(int)
    assert (np.diag(covered) == 1).all(), "a query's own cell is in its context"


def test_varying_windows_of_ratio_one_are_blocks():
    layout = Layout.image(6, 9)
    q, k, v = random_qkv(layout)
    ours, plain = (build_plan(p, layout) for p in (VaryingWindow(3, 1), Blocks(3)))
    torch.testing.assert_close(sparse_attention(q, k, v, ours), sparse_attention(q, k, v, plain))


def test_hilo_gives_each_head_its_half():
    layout = Layout.image(7, 9, text=2)
    pattern = HiLo(2, heads=4, low_heads=(0, 3))
    assert pattern.head_groups == (1, 0, 0, 1)
    assert HiLo(2, 4, 1).head_groups == (0, 0, 0, 1)
    q, k, v = random_qkv(layout, heads=4)
    groups = torch.tensor([pattern.head_groups])
    out = sparse_attention(q, k, v, build_plan(pattern | Text(), layout), groups=groups)
    window = sparse_attention(q, k, v, build_plan(Blocks(2) | Text(), layout))
    torch.testing.assert_close(out[:, :, 1:3], window[:, :, 1:3])
    fine = HiLo(1, heads=4, low_heads=4)
    groups = torch.tensor([fine.head_groups])
    out = sparse_attention(q, k, v, build_plan(fine | Text(), layout), groups=groups)
    torch.testing.assert_close(out, dense(q, k, v, layout), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("bias", "expected"), [("none", 0.0), ("log_count", np.log(4)), ("log_share", 0.0), (0.5, 0.5), (-1, -1.0)]
)
def test_bias_of_a_whole_and_a_ragged_cell(bias, expected):
    """One query, equal keys: the weights of two cells show their bias."""
    layout = Layout.image(2, 3)
    plan = build_plan(Pooled(2, weights="mean", bias=bias), layout)
    ones = torch.ones(1, 6, 1, 4, dtype=torch.float64)
    _, lse = sparse_attention(0 * ones, ones, ones, plan, return_lse=True)
    ragged = expected - (np.log(2) if isinstance(bias, str) and bias != "none" else 0.0)
    assert lse[0, 0, 0].item() == pytest.approx(np.logaddexp(expected, ragged))


@pytest.mark.parametrize(
    ("grid", "cells", "shift"), [((1, 5, 7), (1, 2, 3), (0, 1, 2)), ((3, 4, 1), (2, 4, 1), (1, 0, 0))]
)
def test_shifted_cells_average_the_tokens_they_have(grid, cells, shift):
    tokens = int(np.prod(grid))
    x = torch.randn(2, tokens, 3, 4, dtype=torch.float64)
    place = np.stack(np.unravel_index(np.arange(tokens), grid), -1)
    cell = (place + np.array(cells) - np.array(shift)) // np.array(cells)
    _, label = np.unique(cell, axis=0, return_inverse=True)
    label = label.reshape(-1)
    expected = torch.stack([x[:, label == n].mean(1) for n in range(label.max() + 1)], 1)
    torch.testing.assert_close(pool_keys(x, grid, cells, None, shift), expected)
    assert cell_counts(grid, cells, shift).tolist() == np.bincount(label).tolist()


def test_proxies_ignore_the_order_inside_windows_and_draw_from_their_generator():
    x = torch.randn(2, 4 * 6, 3)
    shuffled = x.view(2, 2, 2, 3, 2, 3).transpose(2, 4).reshape(2, 24, 3)
    first = proxy_tokens(x, (1, 4, 6), (1, 2, 2))
    torch.testing.assert_close(proxy_tokens(shuffled, (1, 4, 6), (1, 2, 2)), first)
    torch.testing.assert_close(proxy_tokens(x, (1, 4, 6), (1, 1, 1)), x)
    before = torch.get_rng_state()
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    drawn = [proxy_tokens(x, (1, 4, 6), (1, 2, 3), mode="random", generator=own) for own in generators]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    for row in drawn[0][0]:
        assert (x[0] == row).all(-1).any()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"window": (1, 3, 2)}, "must divide"),
        ({"window": (1, 2, 2), "scale": (1, 2, 3)}, "must divide"),
        ({"window": (1, 2, 2), "mode": "median"}, "median"),
        ({"window": (1, 2, 2), "mode": "random"}, "generator"),
    ],
)
def test_proxies_refuse_what_they_cannot_do(settings, match):
    with pytest.raises(ValueError, match=match):
        proxy_tokens(torch.zeros(1, 24, 1), (1, 4, 6), **settings)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Pooled(2, bias="log"), "bias='log'"),
        (lambda: Pooled(2, bias=float("nan")), "nan"),
        (lambda: Pooled(2, bias=True), "True"),
        (lambda: Pooled(2, weights="mean", shift=2), "less than"),
        (lambda: Pooled(2, shift=1).dense_mask(Layout.image(4, 4)), "weights='mean'"),
        (lambda: Pooled(2, weights="mean", exclude="others"), "'own' or a pattern"),
        (lambda: Pooled(2, weights="mean", exclude=Pooled(2)).dense_mask(Layout.image(4, 4)), "key sources"),
        (lambda: Pooled(2, weights="mean", exclude=PerHead((Box(1), Box(2)))).dense_mask(Layout.image(4, 4)), "menu"),
        (lambda: Proxy(0), "at least 1"),
        (lambda: Proxy(4, shift=4), "less than"),
        (lambda: Proxy(9).dense_mask(Layout.image(4, 4)), "does not fit"),
        (lambda: Pyramid((2, 4), (1,)), "2 levels of cells and 1 of near"),
        (lambda: Pyramid((), ()), "one entry per level"),
        (lambda: Pyramid(2, 1), "one entry per level"),
        (lambda: Pyramid((2,), (0,)), "at least 1"),
        (lambda: Pyramid((2, 3), (1, 2)).dense_mask(Layout.image(8, 8)), "do not nest"),
        (lambda: Pyramid((8,), (1,)).dense_mask(Layout.image(4, 4)), "does not fit"),
        (lambda: VaryingWindow(2, 0), "at least 1"),
        (lambda: VaryingWindow(2, 9).dense_mask(Layout.image(4, 4)), "does not fit"),
        (lambda: HiLo(2, 4, 5), "from 0 to 4"),
        (lambda: HiLo(2, 4, (4,)), "from 0 to 3"),
        (lambda: HiLo(2, 0, 0), "at least 1"),
    ],
)
def test_settings_that_cannot_be(make, match):
    with pytest.raises(ConfigError, match=match):
        make()
