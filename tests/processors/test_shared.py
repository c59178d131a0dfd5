"""Views of pictures: the five checks of reference attention, masks, halves and text, against a dense oracle."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gensparse.errors import LayoutMismatchError
from gensparse.kernels.merge import merge_lse
from gensparse.layout import Layout
from gensparse.plan import build_plan
from gensparse.processors import shared
from gensparse.processors.shared import Seen, View, attend_all, attend_together, attend_views, shared_calls, target_part

HEADS, DIM = 3, 8
LAYOUTS = {
    "5x7": Layout.image(5, 7),
    "1x11": Layout.image(1, 11),
    "text first": Layout.image(3, 5, text=4),
    "text last": Layout.image(5, 3, text=2, text_first=False),
}


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Layout:
    return LAYOUTS[request.param]


def tensors(layout: Layout, batch: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, layout.tokens, HEADS, DIM, generator=generator, dtype=dtype) for _ in range(3)]


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def no_dense() -> Tensor:
    raise AssertionError("plain attention was not needed")


def of(x: Tensor, row: int, layout: Layout, kept: Tensor | None = None) -> Tensor:
    part = x[row, target_part(layout)]
    return part if kept is None else part[kept]


def seen(k: Tensor, v: Tensor, row: int, layout: Layout, kept: Tensor | None = None, **more) -> Seen:
    return Seen(of(k, row, layout, kept), of(v, row, layout, kept), **more)


def oracle(q: Tensor, k: Tensor, v: Tensor, row: int, view: View, layout: Layout) -> Tensor:
    """One picture under its view, by a whole matrix of logits."""
    part = target_part(layout)
    target = torch.zeros(layout.tokens, dtype=torch.bool)
    target[part] = True
    keys, values = [k[row]], [v[row]]
    visible = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
    if not view.own:
        visible &= ~(target[:, None] & target)
    if view.groups is not None:
        group = torch.zeros(layout.tokens, dtype=torch.long)
        group[part] = torch.from_numpy(view.groups)
        visible &= (group[:, None] == 0) | (group == 0) | (group[:, None] == group)
    columns, biases = [visible], [torch.zeros(layout.tokens, dtype=q.dtype)]
    for item in view.seen:
        looks = target.clone()
        if item.queries is not None:
            looks[part] = torch.from_numpy(np.array(item.queries, bool))
        keys.append(item.k)
        values.append(item.v)
        columns.append(looks[:, None].expand(-1, len(item.k)))
        biases.append(torch.full((len(item.k),), item.bias, dtype=q.dtype))
    logits = torch.einsum("qhd,khd->hqk", q[row], torch.cat(keys)) * DIM**-0.5 + torch.cat(biases)
    logits = logits.masked_fill(~torch.cat(columns, 1), float("-inf"))
    out = torch.einsum("hqk,khd->qhd", logits.softmax(-1), torch.cat(values))
    return view.weight * out + (1 - view.weight) * dense(q[row : row + 1], k[row : row + 1], v[row : row + 1])[0]


def masks(layout: Layout, count: int, seed: int = 1) -> list[Tensor]:
    """Tokens kept of `count` pictures: none, all, and random ones that overlap."""
    tokens = layout.segments[layout.target].length
    generator = torch.Generator().manual_seed(seed)
    drawn = [(torch.rand(tokens, generator=generator) < 0.4).nonzero()[:, 0] for _ in range(count)]
    return [torch.arange(0), torch.arange(tokens), *drawn][:count]


def test_no_references_are_plain_attention_and_nothing_is_computed_anew(layout: Layout) -> None:
    q, k, v = tensors(layout, 4)
    plain = dense(q, k, v)
    empty = [None, View(), View((seen(k, v, 0, layout, torch.arange(0)),)), View((seen(k, v, 0, layout),), weight=0.0)]
    assert shared_calls(empty, layout, q) == []
    assert attend_views(q, k, v, empty, layout, lambda: plain) is plain
    one_group = View(groups=np.ones(layout.segments[layout.target].length, np.int64))
    assert shared_calls([one_group], layout, q) == []


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("halves", [1, 2])
def test_masked_weighted_references_of_both_halves(layout: Layout, count: int, halves: int) -> None:
    q, k, v = tensors(layout, halves * (count + 1))
    kept = masks(layout, count)
    views: list[View | None] = []
    for half in range(halves):
        first = half * (count + 1)
        runs = tuple(seen(k, v, first + n, layout, kept[n], bias=0.5 * n) for n in range(count))
        views += [None] * count + [View(runs, weight=1.0 if half else 0.7)]
    out = attend_views(q, k, v, views, layout, lambda: dense(q, k, v))
    plain = dense(q, k, v)
    for row, view in enumerate(views):
        if view is None:
            assert torch.equal(out[row], plain[row]), "a reference changed"
        else:
            torch.testing.assert_close(out[row], oracle(q, k, v, row, view, layout))


def test_permuting_references_and_their_tokens_changes_nothing(layout: Layout) -> None:
    q, k, v = tensors(layout, 4)
    kept = masks(layout, 5)[2:5]
    generator = torch.Generator().manual_seed(3)
    views, shuffled = [], []
    for order in itertools.permutations(range(3)):
        runs = tuple(seen(k, v, n, layout, kept[n], bias=float(n)) for n in order)
        views = [None, None, None, View(runs)]
        mixed = tuple(
            seen(k, v, n, layout, kept[n][torch.randperm(len(kept[n]), generator=generator)], bias=float(n))
            for n in order
        )
        for given in (views, [None, None, None, View(mixed)]):
            shuffled.append(attend_views(q, k, v, given, layout, lambda: dense(q, k, v)))
    for out in shuffled[1:]:
        torch.testing.assert_close(out, shuffled[0])


def test_splitting_a_reference_and_merging_gives_one_call(layout: Layout) -> None:
    q, k, v = tensors(layout, 2)
    tokens = layout.segments[layout.target].length
    cut = tokens // 3
    halves = tuple(seen(k, v, 0, layout, part, bias=0.4) for part in (torch.arange(cut), torch.arange(cut, tokens)))
    whole = [None, View((seen(k, v, 0, layout, bias=0.4),))]
    out = attend_views(q, k, v, whole, layout, lambda: dense(q, k, v))
    torch.testing.assert_close(attend_views(q, k, v, [None, View(halves)], layout, lambda: dense(q, k, v)), out)
    parts = []
    for own, run in ((True, halves[:1]), (False, halves[1:])):
        (call,) = shared_calls([View(run, own=own)], layout, q)
        plan = build_plan(call.pattern, layout, data=call.data)
        more = {"sources": call.sources, "key_bias": call.bias, "return_lse": True}
        parts.append(shared.sparse_attention(q[1:], k[1:], v[1:], plan, **more))
    picture = target_part(layout)
    if len(layout.segments) > 1:  # text that is seen in both calls would count twice
        return
    merged = merge_lse(torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts]))[0]
    torch.testing.assert_close(merged[:, picture], out[1:, picture])


@pytest.mark.parametrize("bias", [0.0, 1.7, -2.0])
def test_the_own_tokens_as_reference_change_nothing(bias: float) -> None:
    """Where no text is: text that is seen once would lose weight."""
    layout = LAYOUTS["5x7"]
    q, k, v = tensors(layout, 1)
    out = attend_views(q, k, v, [View((seen(k, v, 0, layout, bias=bias),))], layout, no_dense)
    torch.testing.assert_close(out, dense(q, k, v))


def test_a_picture_without_its_own_tokens(layout: Layout) -> None:
    q, k, v = tensors(layout, 2)
    view = View((seen(k, v, 0, layout, masks(layout, 3)[2]),), own=False)
    out = attend_views(q, k, v, [None, view], layout, lambda: dense(q, k, v))
    torch.testing.assert_close(out[1], oracle(q, k, v, 1, view, layout))


def test_regions_isolation_and_overlap(layout: Layout) -> None:
    q, k, v = tensors(layout, 6)
    tokens = layout.segments[layout.target].length
    left, right = np.arange(tokens) < tokens // 2, np.arange(tokens) >= tokens // 3
    groups = np.where(left, 1, np.where(np.arange(tokens) % 3 == 0, 0, 2))
    views: list[View | None] = [None, None]
    for run in ((left, right), (left, None), (np.zeros(tokens, bool), right), (left, left)):
        items = tuple(
            seen(k, v, n, layout, masks(layout, 4)[n + 2], bias=0.3 * n, queries=queries)
            for n, queries in enumerate(run)
        )
        views.append(View(items, groups=groups))
    out = attend_views(q, k, v, views, layout, lambda: dense(q, k, v))
    for row in range(2, 6):
        view = views[row]
        assert view is not None
        torch.testing.assert_close(out[row], oracle(q, k, v, row, view, layout))
    assert len(shared_calls(views, layout, q)) == 4


def test_isolated_subjects_do_not_depend_on_each_other() -> None:
    layout = LAYOUTS["5x7"]
    q, k, v = tensors(layout, 1)
    groups = np.array([1] * 12 + [0] * 11 + [2] * 12)
    first = attend_views(q, k, v, [View(groups=groups)], layout, no_dense)
    k[0, 23:], v[0, 23:] = 7.0, -7.0
    second = attend_views(q, k, v, [View(groups=groups)], layout, no_dense)
    assert torch.equal(first[0, :12], second[0, :12])
    assert not torch.allclose(first[0, 12:], second[0, 12:])


def test_views_of_one_form_share_a_call_whatever_they_keep(layout: Layout) -> None:
    q, k, v = tensors(layout, 3)
    kept = masks(layout, 5)
    views = [View((seen(k, v, (n + 1) % 3, layout, kept[n + 2], bias=float(n)),)) for n in range(3)]
    (call,) = shared_calls(views, layout, q, multiple=8)
    assert call.rows == (0, 1, 2)
    assert call.sources["seen0"][0].shape[1] % 8 == 0
    out = attend_views(q, k, v, views, layout, no_dense, multiple=8)
    for row, view in enumerate(views):
        torch.testing.assert_close(out[row], oracle(q, k, v, row, view, layout))


def test_cost_falls_with_the_area_of_masks_and_of_isolated_subjects() -> None:
    layout = Layout.image(32, 48)
    q, k, v = tensors(layout, 2, dtype=torch.float32)

    def pairs(view: View) -> float:
        (call,) = shared_calls([view], layout, q)
        return build_plan(call.pattern, layout, data=call.data).stats()["visited_pairs"]

    tokens = layout.tokens
    full, half = (pairs(View((seen(k, v, 0, layout, torch.arange(n)),))) for n in (tokens, tokens // 4))
    assert full == 2 * tokens**2
    assert half == 1.25 * tokens**2
    groups = np.repeat([1, 2, 3, 4], tokens // 4)
    assert pairs(View(groups=groups)) == tokens**2 / 4


def test_key_bias_of_the_call_joins_weights(layout: Layout) -> None:
    q, k, v = tensors(layout, 3)
    bias = torch.zeros(3, 1, layout.tokens, dtype=torch.float64)
    bias[:, :, 1] = float("-inf")
    bias[2, :, 2] = 0.8
    views = [None, View((seen(k, v, 0, layout, bias=0.6),)), View((seen(k, v, 0, layout),))]
    mask = bias[:, :, None]
    plain = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(1, 2)
    out = attend_views(q, k, v, views, layout, lambda: plain, key_bias=bias)
    for row in (1, 2):
        view = views[row]
        assert view is not None
        keys, values = torch.cat([k[row], view.seen[0].k]), torch.cat([v[row], view.seen[0].v])
        part = target_part(layout)
        extra = torch.full((layout.tokens, len(view.seen[0].k)), float("-inf"), dtype=torch.float64)
        extra[part] = view.seen[0].bias
        logits = torch.einsum("qhd,khd->hqk", q[row], keys) * DIM**-0.5
        logits = logits + torch.cat([bias[row, 0].expand(layout.tokens, -1), extra], 1)
        torch.testing.assert_close(out[row], torch.einsum("hqk,khd->qhd", logits.softmax(-1), values))
    assert torch.equal(out[0], plain[0])


def test_pictures_together_see_all_tokens_of_all() -> None:
    layout = LAYOUTS["5x7"]
    q, k, v = tensors(layout, 6)
    out = attend_together(q, k, v, 2, layout)
    for row in range(6):
        others = [n for n in range(row // 3 * 3, row // 3 * 3 + 3) if n != row]
        view = View(tuple(seen(k, v, n, layout) for n in others))
        torch.testing.assert_close(out[row], oracle(q, k, v, row, view, layout))
    partly = attend_together(q, k, v, 2, layout, together=[False, True], dense=lambda: dense(q, k, v))
    assert torch.equal(partly[:3], dense(q, k, v)[:3])
    torch.testing.assert_close(partly[3:], out[3:])


def test_plain_attention_by_a_plan(layout: Layout) -> None:
    q, k, v = tensors(layout, 2)
    torch.testing.assert_close(attend_all(q, k, v, layout), dense(q, k, v))


def test_another_number_of_views_is_refused() -> None:
    layout = LAYOUTS["5x7"]
    q, k, v = tensors(layout, 2)
    with pytest.raises(LayoutMismatchError, match="3 views for a batch of 2"):
        attend_views(q, k, v, [None] * 3, layout, no_dense)


def test_gradients_reach_references() -> None:
    layout = LAYOUTS["5x7"]
    q, k, v = (x.requires_grad_() for x in tensors(layout, 2))
    view = View((seen(k, v, 0, layout, masks(layout, 3)[2], bias=0.4),))
    attend_views(q, k, v, [None, view], layout, lambda: dense(q, k, v))[1].square().sum().backward()
    found = [x.grad.clone() for x in (q, k, v)]
    for x in (q, k, v):
        x.grad = None
    oracle(q, k, v, 1, View((seen(k, v, 0, layout, masks(layout, 3)[2], bias=0.4),)), layout).square().sum().backward()
    for x, grad in zip((q, k, v), found, strict=True):
        torch.testing.assert_close(x.grad, grad)
