"""Properties of every pattern on every layout, tried on generated ones; the examples are the same in each run."""

import numpy as np
import torch
import torch.nn.functional as F
from attention_checks import menu, random_qkv, usable
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from plan_checks import lowered_mask

from gensparse.attention import sparse_attention
from gensparse.layout import Layout
from gensparse.patterns import (
    MSW,
    Blocks,
    Box,
    CrissCross,
    Disc,
    Grid,
    Halo,
    LongDistance,
    Neighborhood,
    Pattern,
    PerHead,
    Pooled,
    Stripes,
    Text,
)
from gensparse.plan import build_plan
from gensparse.testing.pattern_checks import check_backends, check_plan, check_rule

PRIMES = (1, 2, 3, 5, 7, 11, 13, 17)


def examples(count: int):
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(derandomize=True, database=None, deadline=None, max_examples=count, suppress_health_check=quiet)


def grids() -> st.SearchStrategy[tuple[int, int, int]]:
    """1 x n, n x 1, primes, and videos; at most about 300 tokens."""
    line = st.integers(1, 150)
    prime = st.sampled_from(PRIMES)
    small = st.integers(1, 7)
    return st.one_of(
        st.tuples(st.just(1), st.just(1), line),
        st.tuples(st.just(1), line, st.just(1)),
        st.tuples(st.just(1), prime, prime),
        st.tuples(st.integers(2, 5), small, small),
    )


@st.composite
def layouts(draw, references: bool = True, interleaved: bool = True) -> Layout:
    extra = (
        draw(st.lists(st.tuples(st.just(1), st.integers(1, 3), st.integers(1, 5)), max_size=2)) if references else []
    )
    text = draw(st.sampled_from([0, 1, 2, 5, 33, 70]))
    layout = Layout.joint(draw(grids()), text=text, text_first=draw(st.booleans()), references=extra)
    most = min(segment.length for segment in layout.segments)
    return Layout.ulysses(layout, draw(st.integers(1, min(4, most)))) if interleaved else layout


def windows() -> st.SearchStrategy[int]:
    return st.integers(1, 9)


def geometric() -> st.SearchStrategy[Pattern]:
    def neighborhood(window: int, stride: int, dilation: int, causal: bool) -> Pattern:
        return Neighborhood(window, stride=min(stride, window), dilation=dilation, causal=causal)

    return st.one_of(
        st.builds(Disc, st.integers(1, 20)),
        st.builds(Box, windows()),
        st.builds(neighborhood, windows(), windows(), st.integers(1, 3), st.booleans()),
        st.builds(lambda w, s, wrap: Blocks(w, shift=s % w, wrap=wrap), windows(), windows(), st.booleans()),
        st.builds(Halo, windows(), st.integers(0, 4)),
        st.builds(Grid, windows()),
        st.builds(LongDistance, windows(), windows()),
        st.builds(Stripes, windows(), st.sampled_from(["horizontal", "vertical"])),
        st.builds(MSW, st.integers(0, 3)),
        st.just(CrissCross()),
    )


def joined() -> st.SearchStrategy[Pattern]:
    """One geometric pattern, or a union or intersection of them, with and without text and pooled keys."""
    several = st.one_of(
        geometric(),
        st.builds(lambda a, b: a | b, geometric(), geometric()),
        st.builds(lambda a, b: a & b, geometric(), geometric()),
        st.builds(lambda a, b, c: (a | b) & c, geometric(), geometric(), geometric()),
    )
    pooled = st.builds(
        lambda c, b: Pooled(c, weights="mean", bias=b), windows(), st.sampled_from(["none", "log_count"])
    )
    return st.one_of(
        several,
        st.builds(lambda a: a | Text(), several),
        st.builds(lambda a, b: a | Text() | b, several, pooled),
    )


def patterns() -> st.SearchStrategy[Pattern]:
    """Also menus."""
    return st.one_of(joined(), joined(), st.builds(lambda *parts: PerHead(parts), joined(), joined()))


def tiles() -> st.SearchStrategy[dict]:
    size = st.sampled_from([None, 32, 64, 128, (1, 4, 8), (1, 5, 7), (2, 3, 5)])
    return st.fixed_dictionaries({"q_tile": size, "k_tile": size})


@examples(120)
@given(joined(), layouts(), tiles(), st.integers(0, 1 << 16))
def test_relations_boxes_signatures_and_plans_say_what_the_mask_says(pattern, layout, tile, seed):
    pattern = pattern.clamped(layout.grid)
    check_rule(pattern.bind(layout), pattern, seed)
    plan = build_plan(pattern, layout, **tile)
    mask = pattern.dense_mask(layout)
    check_plan(plan, mask)
    assert plan.density == plan.stats()["density"] == mask.mean()


@examples(70)
@given(patterns(), layouts())
def test_lowered_forms_hold_the_pairs_of_the_mask(pattern, layout):
    pattern = pattern.clamped(layout.grid)
    plan = build_plan(pattern, layout)
    expected = pattern.dense_mask(layout)
    if layout.parts > 1:
        places = layout.places()
        keys = np.concatenate([places, np.arange(layout.tokens, plan.keys)])
        expected = expected[:, places][:, :, keys]
    forms = [works for works in (plan.halo(), plan.partition()) if works is not None]
    assert len(forms) + len(plan.refused) == 2
    for works in forms:
        np.testing.assert_array_equal(lowered_mask(works, plan), expected)


@examples(40)
@given(patterns(), layouts(), st.integers(0, 1 << 16))
def test_every_backend_equals_the_fp64_oracle(pattern, layout, seed):
    check_backends(build_plan(pattern.clamped(layout.grid), layout), seed=seed)


@examples(30)
@given(st.sampled_from([Disc(200), Box(200), Neighborhood(200), Blocks(200), Halo(200, 3)]), layouts(references=False))
def test_a_window_over_the_whole_grid_is_dense_attention(pattern, layout):
    pattern = pattern.clamped(layout.grid) | Text()
    plan = build_plan(pattern, layout)
    q, k, v = random_qkv(layout)
    want = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    assert plan.density == 1
    for name in usable(plan, q):
        torch.testing.assert_close(sparse_attention(q, k, v, plan, backend=name), want, atol=2e-6, rtol=1e-5)


@examples(30)
@given(patterns(), layouts(), st.permutations(range(4)), st.permutations(range(3)))
def test_permuting_heads_or_samples_permutes_the_output(pattern, layout, heads, samples):
    plan = build_plan(pattern.clamped(layout.grid), layout)
    q, k, v = random_qkv(layout, batch=3, heads=4)
    groups = menu(plan, 3, 4)
    for name in usable(plan, q):
        out = sparse_attention(q, k, v, plan, backend=name, groups=groups)
        moved = [x[samples][:, :, heads] for x in (q, k, v)]
        picked = None if groups is None else groups[samples][:, heads]
        again = sparse_attention(*moved, plan, backend=name, groups=picked)
        torch.testing.assert_close(again, out[samples][:, :, heads], atol=2e-6, rtol=1e-5)


@examples(40)
@given(joined(), grids())
def test_clamped_patterns_fit_and_clamping_again_changes_nothing(pattern, grid):
    fitting = pattern.clamped(grid)
    fitting.bind(Layout.joint(grid, text=2))
    assert fitting.clamped(grid) == fitting


@examples(40)
@given(geometric(), geometric(), grids())
def test_joined_masks_are_or_and_and_of_their_parts(first, second, grid):
    layout = Layout.joint(grid)
    assume(layout.tokens <= 200)
    first, second = first.clamped(grid), second.clamped(grid)
    one, two = first.dense_mask(layout), second.dense_mask(layout)
    np.testing.assert_array_equal((first | second).dense_mask(layout), one | two)
    np.testing.assert_array_equal((first & second).dense_mask(layout), one & two)
