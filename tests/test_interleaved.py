"""Layouts in the order of Ulysses sequence parallelism, and biases for valid lengths."""

from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from attention_checks import menu, random_qkv, run, usable
from pattern_cases import COMPOSED, layouts

from gensparse import length_bias
from gensparse.attention import sparse_attention
from gensparse.errors import ConfigError
from gensparse.layout import Layout, Segment
from gensparse.patterns import MSW, Box, Disc, Neighborhood, Pattern, PerHead, Pooled, Stripes, Text
from gensparse.plan import build_plan

PATTERNS: list[Pattern] = [
    Disc(3) | Text(),
    Neighborhood(3, dilation=2) | Text(),
    MSW(1) | Text(),
    Disc(2) | Text() | Pooled(2, weights="mean", bias="log_count"),
    PerHead((Stripes(2), Box(2))) | Text(),
]
# (layout, parts, streams): equal and uneven parts, references with their picture, a video
CASES = [
    (Layout.image(8, 6, text=4), 2, ()),
    (Layout.image(7, 11, text=5), 4, ()),
    (Layout.joint((1, 7, 5), text=7, references=((1, 3, 5),)), 3, (1, 2)),
    (Layout.joint((1, 6, 5), text=4, text_first=False, references=((1, 2, 4),)), 4, ()),
    (Layout.video(3, 5, 4, text=5), 5, ()),
]
ids = [f"{layout.grid}-{layout.tokens}-{parts}" for layout, parts, _ in CASES]


def sharded(x: torch.Tensor, layout: Layout, parts: int, streams: tuple[int, ...]) -> torch.Tensor:
    """x [B, S, ...] as the ranks hold it after the all-to-all, by torch's own split."""
    counts = streams or (1,) * len(layout.segments)
    edges = (*layout.starts, layout.tokens)
    tensors = [x[:, edges[a] : edges[b]] for a, b in pairwise(accumulate(counts, initial=0))]
    shards = [tensor.tensor_split(parts, dim=1) for tensor in tensors]
    return torch.cat([shard[rank] for rank in range(parts) for shard in shards], 1)


@pytest.mark.parametrize(("layout", "parts", "streams"), CASES, ids=ids)
def test_order_is_that_of_sharded_tensors(layout, parts, streams):
    inter = Layout.ulysses(layout, parts, streams=streams)
    numbers = torch.arange(layout.tokens)[None]
    order = sharded(numbers, layout, parts, streams)[0].numpy()
    np.testing.assert_array_equal(inter.order(), order)
    np.testing.assert_array_equal(inter.places()[order], np.arange(layout.tokens))
    plain, coords = layout.coords(), inter.coords()
    np.testing.assert_array_equal(coords.segment, plain.segment[order])
    np.testing.assert_array_equal(coords.position, plain.position[order])
    for number, (start, segment) in enumerate(zip(layout.starts, layout.segments, strict=True)):
        places = np.concatenate([np.arange(*run) for run in inter.runs(number)])
        np.testing.assert_array_equal(order[places], np.arange(start, start + segment.length))


def test_equal_parts_are_those_of_chunk_too():
    inter = Layout.ulysses(Layout.image(4, 6, text=8), 4)
    tensors = torch.arange(32)[:8], torch.arange(32)[8:]
    order = torch.cat([tensor.chunk(4)[rank] for rank in range(4) for tensor in tensors])
    np.testing.assert_array_equal(inter.order(), order.numpy())


def test_one_part_is_the_plain_order():
    layout = Layout.image(3, 5, text=2)
    assert layout.order() is None
    assert layout.places() is None
    assert layout.runs(1) == [(2, 17)]
    assert Layout.ulysses(layout, 1) == layout
    assert Layout.ulysses(layout, 2) != layout
    assert build_plan(Disc(2), layout).places is None


@pytest.mark.parametrize(
    ("parts", "streams"), [(0, ()), (True, ()), (3.0, ()), (3, ()), (2, (1,)), (2, (2, 1)), (2, (0, 2))]
)
def test_impossible_orders_are_named(parts, streams):
    with pytest.raises(ConfigError, match=r"parts|streams"):
        Layout.ulysses(Layout.image(3, 3, text=2), parts, streams=streams)


@pytest.mark.parametrize("pattern", [*PATTERNS, *COMPOSED[3:5]], ids=repr)
@pytest.mark.parametrize(("layout", "parts", "streams"), CASES, ids=ids)
def test_sharded_calls_equal_the_call_in_segment_order(pattern, layout, parts, streams):
    """Outputs, log-sum-exp, masks and counts; key_bias stands in the order of the sequence."""
    inter = Layout.ulysses(layout, parts, streams=streams)
    pattern = pattern.clamped(layout.grid)
    plan, plain = build_plan(pattern, inter), build_plan(pattern, layout)
    assert plan.useful == plain.useful
    order = inter.order()
    keys = np.concatenate([order, np.arange(layout.tokens, plan.keys)])
    np.testing.assert_array_equal(pattern.dense_mask(inter), pattern.dense_mask(layout)[:, order][:, :, keys])
    q, k, v = random_qkv(layout, batch=2)
    groups = menu(plan, 2, 2)
    bias = torch.randn(2, 1, layout.tokens)
    bias[:, :, ::7] = -torch.inf
    want, want_lse = run("plan_loop", q, k, v, plan=plain, groups=groups, key_bias=bias)
    mine = [sharded(x, layout, parts, streams) for x in (q, k, v)]
    shuffled = sharded(bias.transpose(1, 2), layout, parts, streams).transpose(1, 2)
    for name in [*usable(plan, q), "reference"]:
        out, lse = run(name, *mine, plan=plan, groups=groups, key_bias=shuffled)
        torch.testing.assert_close(out, sharded(want, layout, parts, streams), atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(lse, sharded(want_lse, layout, parts, streams), atol=3e-6, rtol=1e-5)


def test_lowered_forms_exist_for_interleaved_layouts():
    inter = Layout.ulysses(Layout.image(9, 8, text=4), 2)
    assert build_plan(Disc(3) | Text(), inter).halo() is not None
    assert build_plan(MSW(1) | Text(), inter).partition() is not None


def test_gradients_flow_through_the_reordering():
    layout = Layout.image(6, 5, text=4)
    inter = Layout.ulysses(layout, 3)
    plan = build_plan(Disc(3) | Text(), inter)
    tensors = [x.double().requires_grad_() for x in random_qkv(layout)]
    want = torch.autograd.grad(sparse_attention(*tensors, plan, backend="reference").square().sum(), tensors)
    for name in usable(plan, tensors[0]):
        got = torch.autograd.grad(sparse_attention(*tensors, plan, backend=name).square().sum(), tensors)
        for mine, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_learned_pools_take_the_tokens_of_their_segment():
    layout = Layout.image(4, 6, text=5)
    inter = Layout.ulysses(layout, 4)
    q, k, v = random_qkv(layout)
    weights = torch.rand(2, 2)
    plans = [build_plan(Disc(2) | Text() | Pooled(2), x) for x in (layout, inter)]
    name = plans[0].sources[0].name
    want = sparse_attention(q, k, v, plans[0], sources={name: weights})
    mine = [sharded(x, layout, 4, ()) for x in (q, k, v)]
    torch.testing.assert_close(sparse_attention(*mine, plans[1], sources={name: weights}), sharded(want, layout, 4, ()))


MIXED = layouts((1, 5, 7))[1]


@pytest.mark.parametrize("layout", [MIXED, Layout.ulysses(Layout.image(5, 7, text=9), 4)], ids=["plain", "ulysses"])
def test_length_bias_equals_shorter_text(layout):
    """Hidden text keys have the effect of a sample without them."""
    lengths = torch.tensor([0, 2, 3, 9], dtype=torch.int32)
    bias = length_bias(lengths, layout, 0)
    coords = layout.coords()
    hidden = torch.from_numpy((coords.segment == 0) & (coords.position[:, 2] >= lengths[:, None].numpy()))
    assert bias.shape == (4, 1, layout.tokens)
    assert bias.dtype == torch.float32
    torch.testing.assert_close(bias[:, 0], torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf))
    plan = build_plan(Disc(2) | Text(), layout)
    q, k, v = random_qkv(layout, batch=4)
    for name in usable(plan, q):
        out = sparse_attention(q, k, v, plan, key_bias=bias, backend=name)
        junk = [torch.where(hidden[..., None, None], 50 * x.flip(1), x) for x in (k, v)]
        torch.testing.assert_close(sparse_attention(q, *junk, plan, key_bias=bias, backend=name), out)


def test_length_bias_never_waits_for_the_device():
    """On the meta device nothing can be read back."""
    lengths = torch.zeros(3, dtype=torch.int64, device="meta")
    bias = length_bias(lengths, Layout.ulysses(Layout.image(4, 4, text=6), 3), 0)
    assert (bias.device.type, bias.shape) == ("meta", (3, 1, 22))


@pytest.mark.parametrize(
    ("lengths", "segment"),
    [
        (torch.tensor([1.0]), 0),
        (torch.tensor([[1]]), 0),
        (torch.tensor([True]), 0),
        (torch.tensor([1]), 2),
        (torch.tensor([1]), -1),
        (torch.tensor([1]), True),
    ],
    ids=str,
)
def test_lengths_that_do_not_fit_are_named(lengths, segment):
    with pytest.raises(ConfigError, match="length_bias"):
        length_bias(lengths, Layout.image(3, 3, text=2), segment)


def test_streams_keep_kinds_apart():
    """A tensor of several segments is cut as a whole, so a part may hold tokens of both."""
    layout = Layout((Segment("text", 2), Segment("target", 4), Segment("reference", 2)))
    assert Layout.ulysses(layout, 2, streams=(1, 2)).coords().segment.tolist() == [0, 1, 1, 1, 0, 1, 2, 2]
    assert Layout.ulysses(layout, 2).coords().segment.tolist() == [0, 1, 1, 2, 0, 1, 1, 2]
