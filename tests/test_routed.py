"""Patterns chosen at run time: choices, their tile lists, and attention by them."""

import numpy as np
import pytest
import torch
from attention_checks import random_qkv
from torch._subclasses.fake_tensor import FakeTensorMode

from gensparse.attention import explain, sparse_attention
from gensparse.errors import BackendError, ConfigError, LayoutMismatchError, PlanTooLargeError
from gensparse.kernels import reference, route
from gensparse.kernels.lists import TileLists
from gensparse.kernels.route import Choice
from gensparse.layout import Layout, Segment
from gensparse.patterns import Clusters, Disc, PyramidBlocks, RoutedPattern, TopRegions
from gensparse.patterns import routed as routed_patterns
from gensparse.plan import RouteContext, build_plan
from gensparse.plan import routed as routed_plans

MIXED = Layout(
    (
        Segment("text", 3),
        Segment("target", 77, (1, 7, 11)),
        Segment("register", 1),
        Segment("reference", 6, (1, 2, 3)),
        Segment("pad", 2),
    )
)
LAYOUTS = [
    Layout.image(7, 11, text=5),
    Layout.video(3, 5, 7, text=2),
    Layout.joint((1, 1, 13)),
    Layout.image(1, 1, text=1),
    MIXED,
    Layout.ulysses(Layout.image(7, 11, text=5), 3),
]
SMALL = {"block": 8, "query_block": 8, "tile": 8}
PATTERNS: list[RoutedPattern] = [
    TopRegions(3, 2),
    TopRegions(2, 3, own=False, per_head=True),
    TopRegions((1, 1, 2), 1),
    PyramidBlocks(**SMALL),
    PyramidBlocks(16, 24, tile=8, ends=(0.2, 0.4, 0.7, 0.9), order="sequence"),
    PyramidBlocks(**SMALL, ends=(0.3, 0.5, 0.6, 0.9), mode="threshold", caps=(0.2, 0.1, 0.0)),
    PyramidBlocks(**SMALL, ends=(0.1, 0.3, 0.6, 0.8), mode="threshold", pad="replicate"),
    PyramidBlocks(64, 5, tile=16, ends=(0.0, 0.0, 0.0, 0.0)),
]


def fitted(pattern: RoutedPattern, layout: Layout, **tiles):
    """The plan of a pattern that fits the layout."""
    return build_plan(pattern.clamped(layout.grid), layout, **tiles)


def oracle(q, k, v, plan, choice, **settings):
    """Dense attention in fp64 under the mask of a choice, over the pooled keys too."""
    keys, values, bias = plan.extend(k.double(), v.double(), settings.pop("key_bias", None))
    return reference.attend(q.double(), keys, values, plan.dense_mask(choice), key_bias=bias, **settings)


def listed_mask(lists: TileLists, tokens: int, keys: int) -> np.ndarray:
    """The mask that tile lists spell out, bool [G, Nq, Nk]; no pair twice, full tiles first, queries once."""
    q_rows, k_rows, row_ptr, key_tile, mask_id, atlas = (x.numpy() for x in lists)
    bits = ((atlas[..., None] >> np.arange(32)) & 1).reshape(*atlas.shape[:2], k_rows.shape[1]).astype(bool)
    assert sorted(q_rows[q_rows >= 0]) == list(range(tokens))
    assert row_ptr.max(initial=0) <= len(key_tile)
    mask = np.zeros((len(row_ptr), tokens, keys), int)
    for group, pointer in enumerate(row_ptr):
        for tile, rows in enumerate(q_rows):
            entries = range(pointer[tile], pointer[tile + 1])
            masks = mask_id[entries.start : entries.stop]
            assert (np.diff((masks >= 0).astype(int)) >= 0).all(), "full tiles come first"
            for entry in entries:
                slots = k_rows[key_tile[entry]]
                seen = np.ones(len(slots), bool) if mask_id[entry] < 0 else bits[mask_id[entry], 0]
                assert mask_id[entry] < 0 or (bits[mask_id[entry]] == seen).all()
                assert (slots[seen] >= 0).all(), "a listed slot holds a key"
                np.add.at(mask[group], (rows[rows >= 0][:, None], slots[seen]), 1)
    assert mask.max(initial=0) <= 1, "a pair is listed twice"
    return mask.astype(bool)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_lists_hold_exactly_the_chosen_pairs(pattern):
    for layout in LAYOUTS:
        plan = fitted(pattern, layout)
        q, k, _ = random_qkv(layout, batch=2, heads=2)
        choice = plan.select(q, k, RouteContext(1, 2, 3))
        for tiles in ({}, {"q_tile": 32, "k_tile": 32}, {"k_tile": 128}):
            lowered = fitted(pattern, layout, **tiles).lower(choice)
            expected = plan.dense_mask(choice).flatten(0, 1).numpy()
            np.testing.assert_array_equal(listed_mask(lowered.lists, plan.tokens, plan.keys), expected)
        useful = expected.sum() / len(expected)
        assert plan.stats(choice)["useful_pairs"] == pytest.approx(useful)
        assert plan.stats(choice)["visited_pairs"] >= useful


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_attention_equals_the_mask_of_the_choice(pattern):
    for number, layout in enumerate(LAYOUTS):
        plan = fitted(pattern, layout)
        q, k, v = random_qkv(layout, batch=2, heads=4, seed=number)
        k, v = k[:, :, :2], v[:, :, :2]  # grouped heads
        ctx = RouteContext(step=number)
        choice = plan.select(q, k, ctx)
        expected, lse_expected = oracle(q, k, v, plan, choice)
        for backend in (None, "plan_loop", "reference"):
            out, lse = sparse_attention(q, k, v, plan, ctx=ctx, backend=backend, return_lse=True)
            torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-6)
            torch.testing.assert_close(lse.double(), lse_expected.double(), rtol=1e-5, atol=2e-6)
        again = sparse_attention(q, k, v, plan, ctx=choice)
        torch.testing.assert_close(again.double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("pattern", PATTERNS[:4], ids=repr)
def test_gradients_flow_through_attention_and_not_through_the_choice(pattern):
    layout = MIXED
    plan = fitted(pattern, layout)
    leaves = [x.requires_grad_() for x in random_qkv(layout, heads=2, dtype=torch.float64)]
    choice = plan.select(leaves[0], leaves[1])
    assert not choice.index.requires_grad
    weights = torch.randn_like(leaves[0])
    grads = torch.autograd.grad((sparse_attention(*leaves, plan) * weights).sum(), leaves)
    expected = torch.autograd.grad((oracle(*leaves, plan, choice)[0] * weights).sum(), leaves)
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_weights_sum_to_one(pattern):
    layout = Layout.image(7, 11, text=5)
    q, k, v = random_qkv(layout, dtype=torch.float64)
    out = sparse_attention(q, k, torch.ones_like(v), fitted(pattern, layout))
    torch.testing.assert_close(out, torch.ones_like(out))


def dense(q, k, v):
    return reference.attend(q, k, v, torch.ones(q.shape[1], q.shape[1], dtype=torch.bool))[0]


@pytest.mark.parametrize("layout", [Layout.image(7, 11, text=5), Layout.video(3, 5, 7), Layout.image(1, 1)], ids=repr)
def test_everything_chosen_is_dense(layout):
    q, k, v = random_qkv(layout)
    patterns = [TopRegions(3, 27).clamped(layout.grid), PyramidBlocks(**SMALL, ends=(1, 1, 1, 1))]
    patterns += [PyramidBlocks(**SMALL, ends=(1, 1, 1, 1), mode="threshold"), TopRegions(1, 1)]
    for pattern in patterns:
        plan = build_plan(pattern, layout)
        torch.testing.assert_close(sparse_attention(q, k, v, plan), dense(q, k, v), rtol=1e-5, atol=1e-5)
        assert plan.stats(plan.select(q, k))["density"] == 1.0


@pytest.mark.parametrize("level", [1, 2, 4, 8])
def test_equal_keys_inside_runs_give_dense_attention(level):
    """Also in the last, short run: it counts the tokens it has."""
    layout = Layout.joint((1, 1, 75))
    plan = build_plan(PyramidBlocks(16, 24, tile=16, order="sequence"), layout)
    q, k, v = random_qkv(layout, dtype=torch.float64)
    first = torch.arange(75) // level * level
    k, v = k[:, first], v[:, first]
    levels = torch.full((1, 2, 4, 5), level)
    out = sparse_attention(q, k, v, plan, ctx=plan.choice(levels))
    torch.testing.assert_close(out, dense(q, k, v))
    useful = plan.stats(plan.choice(levels))["useful_pairs"]
    assert useful == 75 * -(-75 // level)


def test_key_blocks_may_move_together_with_their_levels():
    layout = Layout.joint((1, 1, 64))
    plan = build_plan(PyramidBlocks(16, 16, tile=16, order="sequence"), layout)
    q, k, v = random_qkv(layout)
    levels = torch.tensor([1, 2, 4, 8, 0])[torch.randint(5, (1, 2, 4, 4), generator=torch.Generator().manual_seed(0))]
    levels[..., 0] = 1
    order = torch.tensor([2, 0, 3, 1])
    moved = [x.unflatten(1, (4, 16))[:, order].flatten(1, 2) for x in (k, v)]
    out = sparse_attention(q, k, v, plan, ctx=plan.choice(levels))
    other = sparse_attention(q, *moved, plan, ctx=plan.choice(levels[..., order]))
    torch.testing.assert_close(other, out, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("order", ["gilbert", "sequence"])
def test_text_blocks_are_seen_exactly_wherever_they_are(text_first, order):
    layout = Layout.image(8, 8, text=5, text_first=text_first)
    pattern = PyramidBlocks(**SMALL, ends=(0, 0, 0, 1), order=order, caps=(-1, -1, -1))
    plan = build_plan(pattern, layout)
    q, k, _ = random_qkv(layout)
    levels = plan.levels(q, k, RouteContext())
    blocks = torch.from_numpy(pattern.exact_blocks(layout))
    assert blocks.sum() == 1
    assert bool(blocks[0]) == (text_first and order == "sequence")
    assert (levels[..., blocks] == 1).all()
    assert (levels[..., ~blocks] != 1).all()
    words = np.flatnonzero(layout.coords().segment != layout.target)
    assert plan.dense_mask(plan.select(q, k))[..., words].all()


def test_a_row_without_a_key_sees_its_best_block_exactly():
    layout = Layout.joint((1, 1, 64))
    plan = build_plan(PyramidBlocks(**SMALL, ends=(0, 0, 0, 0), order="sequence"), layout)
    q, k, _ = random_qkv(layout)
    k[:, 24:32] = 9 * q.mean(1, keepdim=True)
    levels = plan.levels(q, k, RouteContext())
    assert (levels > 0).sum(-1).unique().tolist() == [1]
    assert levels.max() == 1
    given = torch.zeros(1, 2, 3, 4)
    best = torch.tensor([0.1, 0.2, 0.6, 0.1]).expand_as(given)
    assert route.settle_levels(given.int(), best)[0, 0].tolist() == [[0, 0, 1, 0]] * 3


def test_caps_keep_unlike_neighbours_apart():
    layout = Layout.joint((1, 1, 64))
    settings = {"ends": (0.0, 0.0, 0.0, 1.0), "order": "sequence"}
    plan = build_plan(PyramidBlocks(**SMALL, **settings, caps=(0.9, 0.9, 0.9)), layout)
    q, k, _ = random_qkv(layout, dim=32)
    k[:, :32] = k[:, :1]  # four blocks of equal keys
    levels = plan.levels(q, k, RouteContext())
    assert (levels[..., :4] == 8).all()
    assert (levels[..., 4:] == 1).all()
    short = route.similarity_caps(k[:, :33], torch.arange(33), 8, (0.5, 0.5, 0.5))
    assert short[0, 0].tolist() == [8, 8, 8, 8, 1], "a block with one token has no pairs to average"


def test_equal_contexts_give_equal_choices_and_no_global_draw():
    layout = Layout.image(16, 16)
    plan = build_plan(PyramidBlocks(64, 64, tile=32, mode="threshold"), layout)
    q, k, v = random_qkv(layout)
    before = torch.get_rng_state()
    first = [plan.select(q, k, RouteContext(7, 1, 2)) for _ in range(2)]
    torch.rand(5)
    third = plan.select(q, k, RouteContext(7, 1, 2))
    torch.set_rng_state(before)
    sparse_attention(q, k, v, plan, ctx=RouteContext(7, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for other in (first[1], third):
        assert all(torch.equal(a, b) for a, b in zip(first[0], other, strict=True))
    drawn = {
        tuple(route.draw(torch.arange(2), 64, 16, numbers).reshape(-1).tolist())
        for numbers in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1 << 40, 0, 0), (-1, 0, 0)]
    }
    assert len(drawn) == 6


def test_heads_on_other_devices_choose_as_in_one_call():
    layout = Layout.image(16, 16)
    plan = build_plan(PyramidBlocks(32, 32, mode="threshold"), layout)
    q, k, _ = random_qkv(layout, batch=2, heads=4)
    whole = plan.levels(q, k, RouteContext(3))
    parts = [plan.levels(q[:, :, h : h + 2], k[:, :, h : h + 2], RouteContext(3, first_head=h)) for h in (0, 2)]
    assert torch.equal(torch.cat(parts, 1), whole)
    assert not torch.equal(plan.levels(q[:, :, 2:], k[:, :, 2:], RouteContext(3)), parts[1])


def test_drawn_offsets_are_distinct_and_even():
    drawn = route.draw(torch.arange(4000), 16, 4, (3, 1, 4))
    assert drawn.shape == (4000, 4)
    assert (drawn.diff(dim=1) > 0).all()
    counts = drawn.flatten().bincount(minlength=16)
    assert ((counts - 1000).abs() < 150).all(), "each of 16 offsets is drawn with probability 1/4"
    assert len({tuple(row) for row in drawn.tolist()}) > 1500, "of 1820 subsets"


def test_a_key_bias_weights_pooled_tokens_and_hides_them():
    layout = Layout.joint((1, 1, 61))
    plan = build_plan(PyramidBlocks(16, 16, tile=16, order="sequence"), layout)
    q, k, v = random_qkv(layout, batch=2, dtype=torch.float64)
    levels = torch.tensor([1, 2, 4, 8]).expand(2, 2, 4, 4)
    bias = torch.zeros(2, 1, 61, dtype=torch.float64)
    bias[0, 0, 17:21] = float("-inf")
    bias[1, 0, 40:] = float("-inf")
    bias[1, 0, 20] = 0.7
    out = sparse_attention(q, k, v, plan, ctx=plan.choice(levels), key_bias=bias)
    assert torch.isfinite(out).all()
    k[0, 17:21], v[0, 17:21], k[1, 40:], v[1, 40:] = 5.0, 7.0, 5.0, 7.0
    hidden = sparse_attention(q, k, v, plan, ctx=plan.choice(levels), key_bias=bias)
    torch.testing.assert_close(hidden, out)
    equal = torch.zeros_like(k)
    uniform = sparse_attention(q, equal, v, plan, ctx=plan.choice(levels), key_bias=bias)
    weights = bias.exp().transpose(1, 2)[..., None]
    expected = (weights * v).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
    torch.testing.assert_close(uniform, expected.expand_as(uniform))


@pytest.mark.parametrize("pattern", [PATTERNS[1], PATTERNS[3]], ids=repr)
def test_heads_in_steps_give_the_same_result(pattern, monkeypatch):
    layout = Layout.image(7, 11, text=5)
    plan = fitted(pattern, layout)
    q, k, v = random_qkv(layout, batch=2, heads=6)
    k, v = k[:, :, :3], v[:, :, :3]
    bias = torch.randn(2, 1, layout.tokens)
    whole = sparse_attention(q, k, v, plan, key_bias=bias, return_lse=True)
    monkeypatch.setattr(routed_plans, "LIST_BYTES", 1)
    assert plan.heads_per_step(2, 3, 6, plan.select(q, k)) == 1
    for got, want in zip(sparse_attention(q, k, v, plan, key_bias=bias, return_lse=True), whole, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_nothing_on_the_way_to_the_lists_waits_for_the_device(pattern):
    """Tensors without data would raise wherever a value is read."""
    layout = Layout.image(7, 11, text=5)
    plan = fitted(pattern, layout)
    real = plan.select(*random_qkv(layout, batch=2)[:2])
    lists = plan.lower(real).lists
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = (torch.empty(2, layout.tokens, 2, 8) for _ in range(3))
        choice = plan.select(q, k, RouteContext(1, 2, 3))
        chosen = plan.lower(choice)
        plan.extend(k, v, None)
        plan.extend(k, v, torch.zeros(2, 1, layout.tokens))
        assert chosen.pieces.pieces.shape == (len(lists.row_ptr), len(lists.q_rows), 5)
    assert [x.shape for x in choice] == [x.shape for x in real]
    assert [x.shape for x in chosen.lists] == [x.shape for x in lists], "shapes depend on the plan alone"


def test_small_pooled_blocks_are_packed_into_full_tiles():
    """Blocks of 32 at level 8 have 4 keys each; eight of them share a tile."""
    layout = Layout.joint((1, 1, 1024))
    plan = build_plan(PyramidBlocks(32, 128, order="sequence"), layout)
    choice = plan.choice(torch.full((1, 1, 8, 32), 8))
    stats = plan.stats(choice)
    assert stats["visited_pairs"] == stats["useful_pairs"] == 1024 * 128
    assert stats["density"] == 1 / 8


def test_pieces_cover_every_list_and_split_off_the_ragged_tile():
    layout = Layout.image(7, 11, text=5)
    plan = build_plan(TopRegions(3, 2, per_head=True), layout)
    q, k, _ = random_qkv(layout, batch=2)
    chosen = plan.lower(plan.select(q, k))
    pieces, joins, slots = chosen.pieces
    assert joins.shape[1] == slots == 0
    for group, row in enumerate(pieces.tolist()):
        assert sorted(piece[0] for piece in row) == list(range(len(chosen.lists.q_rows)))
        for tile, first, middle, end, slot in row:
            pointer = chosen.lists.row_ptr[group, tile : tile + 2].tolist()
            assert [first, end] == pointer
            masks = chosen.lists.mask_id[first:end]
            assert (masks[: middle - first] < 0).all()
            assert (masks[middle - first :] >= 0).all()
            assert slot == -1


def test_regions_differ_by_one_token_and_rank_by_their_means():
    layout = Layout.image(7, 11)
    plan = build_plan(TopRegions((3, 4), 2, own=False), layout)
    sizes = (plan.cut.queries >= 0).sum(1)
    assert len(sizes) == 12
    assert sorted(sizes) == sorted(np.outer([3, 2, 2], [3, 3, 3, 2]).reshape(-1))
    q, k, _ = random_qkv(layout, batch=2, heads=4)
    k = k[:, :, :2]
    means = [torch.stack([x[:, rows[rows >= 0]].mean(1) for rows in plan.cut.queries], 1) for x in (q, k)]
    scores = torch.einsum("brhd,bshd->bhrs", means[0], means[1].repeat_interleave(2, 2))
    for per_head in (False, True):
        ours = build_plan(TopRegions((3, 4), 2, own=False, per_head=per_head), layout).select(q, k).index
        table = scores if per_head else scores.sum(1, keepdim=True)
        assert torch.equal(ours.long(), table.topk(2).indices.sort().values)
    own = build_plan(TopRegions((3, 4), 2), layout).select(q, k).index[:, 0]
    assert (own == torch.arange(12)[:, None]).any(-1).all()


def test_plans_are_cached_and_say_what_they_refuse():
    layout = Layout.image(7, 11, text=5)
    plan = build_plan(TopRegions(2, 1), layout)
    assert build_plan(TopRegions(2, 1), layout) is plan
    q, k, v = random_qkv(layout)
    answers = explain(plan, q)
    assert answers["plan_loop"] is None
    assert "run time" in answers["halo"]
    with pytest.raises(BackendError, match="run time"):
        sparse_attention(q, k, v, plan, backend="partition")
    with pytest.raises(BackendError, match="several tiles"):
        sparse_attention(q.requires_grad_(), k, v, plan, backend="triton")


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"sources": {"a": torch.ones(1)}}, ConfigError, "makes its own keys"),
        ({"groups": torch.zeros(1, 2, dtype=torch.int64)}, ConfigError, "makes its own keys"),
        ({"key_bias": torch.zeros(1, 1, 5)}, ConfigError, "77"),
        ({"ctx": 3}, ConfigError, "RouteContext"),
    ],
)
def test_calls_that_do_not_fit(settings, error, match):
    plan = build_plan(TopRegions(2, 1), Layout.image(7, 11))
    q, k, v = random_qkv(plan.layout)
    with pytest.raises(error, match=match):
        sparse_attention(q, k, v, plan, **settings)
    with pytest.raises(LayoutMismatchError, match="77 tokens"):
        sparse_attention(q[:, 1:], k[:, 1:], v[:, 1:], plan)


def test_a_key_bias_covers_own_tokens_only():
    plan = build_plan(PyramidBlocks(**SMALL), Layout.image(7, 11))
    with pytest.raises(ConfigError, match="77 own tokens"):
        sparse_attention(*random_qkv(plan.layout), plan, key_bias=torch.zeros(1, 1, plan.keys))


def test_a_context_needs_a_plan_that_chooses():
    layout = Layout.image(4, 4)
    with pytest.raises(ConfigError, match="leave ctx out"):
        sparse_attention(*random_qkv(layout), build_plan(Disc(2), layout), ctx=RouteContext())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: TopRegions(0), "at least 1"),
        (lambda: TopRegions(2, top=0), "at least 1"),
        (lambda: TopRegions(2, own=1), "True"),
        (lambda: build_plan(TopRegions(8, 1), Layout.image(7, 11)), "does not fit"),
        (lambda: build_plan(TopRegions(2, 5), Layout.image(7, 11)), "the 4 regions"),
        (lambda: PyramidBlocks(12), "multiple of tile=32 and of 8"),
        (lambda: PyramidBlocks(12, tile=12), "multiple of tile=12 and of 8"),
        (lambda: PyramidBlocks(query_block=0), "at least 1"),
        (lambda: PyramidBlocks(ends=(0.1, 0.2, 0.3)), "4 numbers"),
        (lambda: PyramidBlocks(ends=(0.2, 0.1, 0.3, 0.4)), "rising"),
        (lambda: PyramidBlocks(ends=(0.2, 0.3, 0.3, 1.4)), "rising"),
        (lambda: PyramidBlocks(mode="best"), "'threshold'"),
        (lambda: PyramidBlocks(caps=(0.5,)), "3 numbers"),
        (lambda: PyramidBlocks(order="hilbert"), "'sequence'"),
        (lambda: PyramidBlocks(pad="zero"), "'replicate'"),
        (lambda: Clusters(0, 2), "at least 1"),
        (lambda: Clusters(2, 2, eps=-1), "from 0"),
        (lambda: build_plan(Clusters(2, 78), Layout.image(7, 11)), "the 77 tokens"),
        (lambda: build_plan(Clusters(2, 2), MIXED), "padding"),
        (lambda: build_plan(TopRegions(2, 1), Layout.image(7, 11), k_tile=48), "k_tile=48"),
        (lambda: build_plan(TopRegions(2, 1), Layout.image(7, 11)).choice(torch.zeros(1, 1, 4, 4)), "has no levels"),
    ],
)
def test_settings_that_cannot_be(make, match):
    with pytest.raises(ConfigError, match=match):
        make()


def test_masks_over_the_limit_are_refused(monkeypatch):
    monkeypatch.setattr(routed_patterns, "DENSE_MASK_LIMIT", 10)
    plan = build_plan(TopRegions(2, 1), Layout.image(7, 11))
    with pytest.raises(PlanTooLargeError, match="over the limit"):
        plan.dense_mask(Choice(torch.zeros(1, 1, 4, 1), torch.ones(1, 1, 4)))


def test_one_cluster_of_everything_is_dense_attention():
    layout = Layout.image(5, 7)
    q, k, v = random_qkv(layout, heads=4)
    plan = build_plan(Clusters(1, 35), layout)
    k, v = k[:, :, :2], v[:, :, :2]
    torch.testing.assert_close(sparse_attention(q, k, v, plan), dense(q, k, v) / (1 + 1e-5))
    with pytest.raises(ConfigError, match="log-sum-exp"):
        sparse_attention(q, k, v, plan, return_lse=True)
    with pytest.raises(ConfigError, match="centroids have shape"):
        sparse_attention(q, k, v, plan, ctx=RouteContext(centroids=torch.zeros(4, 2, 8)))


def test_fitted_centroids_find_separate_groups():
    x = torch.eye(3)[torch.arange(30) % 3][None, :, None] + 0.01 * torch.randn(1, 30, 2, 3)
    plan = build_plan(Clusters(3, 10, eps=0.0), Layout.joint((1, 1, 30)))
    before = torch.get_rng_state()
    choices = [plan.select(x, x, RouteContext(seed)) for seed in (0, 0)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(choices[0].q_index, choices[1].q_index)
    found = [plan.select(x, x, RouteContext(seed)).q_index for seed in range(8)]
    apart = [sorted(sorted(group) for group in index[0, 0].tolist()) for index in found]
    assert [list(range(n, 30, 3)) for n in range(3)] in apart
