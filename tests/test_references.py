"""Properties of reference attention: what must not change the result, and what must."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from attention_checks import random_qkv, run, usable
from torch import Tensor

from gensparse.kernels import reference
from gensparse.kernels.merge import merge_lse
from gensparse.layout import Layout, Segment
from gensparse.patterns import (
    Box,
    Isolation,
    KeyMask,
    Pattern,
    PerHead,
    Policy,
    QueryMask,
    Reference,
    References,
    Text,
)
from gensparse.plan import build_plan
from gensparse.subjects.masks import gather_keys

GRIDS = [(1, 1, 13), (1, 7, 11), (3, 4, 5)]
OWN = Policy((("target", "target"),))
ITSELF = Policy((("reference", "itself"),))
BACKENDS = ("partition", "halo", "plan_loop")
SIZES = {"fox": 11, "owl": 6, "elk": 17}


def noise(shape, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < 0.5


def picture(grid, seed: int = 0, batch: int = 2) -> tuple[Layout, list[Tensor], dict]:
    """The target alone, its q, k, v, and arrays for every name."""
    layout = Layout.joint(grid)
    data = {name: noise(size, seed + size) for name, size in SIZES.items()} | {"left": noise(grid, seed)}
    data |= {"none": np.zeros(grid, bool), "nothing": np.zeros(SIZES["owl"], bool), "right": ~data["left"]}
    data["subjects"] = np.random.default_rng(seed).integers(0, 4, grid)
    return layout, random_qkv(layout, batch=batch, seed=seed), data


def keys_of(name: str, like: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + SIZES[name])
    shape = (like.shape[0], SIZES[name], *like.shape[2:])
    return tuple(torch.randn(shape, generator=generator) for _ in range(2))


def ref(name: str, **settings) -> Reference:
    return Reference(name, length=SIZES[name], **settings)


def results(tensors, pattern: Pattern, layout: Layout, data=None, **settings) -> list[tuple[Tensor, Tensor]]:
    """out and lse of every backend that takes the plan, and of the oracle."""
    plan = build_plan(pattern, layout, data=data)
    names = usable(plan, tensors[0])
    assert "plan_loop" in names
    return [run(name, *tensors, plan=plan, **settings) for name in (*names, "reference")]


def agree(found, expected) -> None:
    for out, lse in found:
        torch.testing.assert_close(out, expected[0].to(out.dtype), rtol=1e-5, atol=5e-6)
        torch.testing.assert_close(lse, expected[1].to(lse.dtype), rtol=1e-5, atol=5e-6)


def dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return reference.attend(q.double(), k.double(), v.double(), torch.ones(q.shape[1], k.shape[1], dtype=torch.bool))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_no_reference_is_dense_attention(grid):
    """None at all, or none visible; isolation keeps it while there is one group."""
    layout, tensors, data = picture(grid)
    sources = {"owl": keys_of("owl", tensors[1])}
    expected = dense(*tensors)
    agree(results(tensors, OWN, layout), expected)
    for hidden in (ref("owl", keys="nothing"), ref("owl", bias=3.0, keys="nothing"), ref("owl", queries="none")):
        agree(results(tensors, OWN | References((hidden,)), layout, data, sources=sources), expected)
    agree(results(tensors, OWN & Isolation("one"), layout, {"one": np.full(grid, 5)}), expected)
    alone = results(tensors, OWN & Isolation("subjects"), layout, data)[0][0]
    assert not torch.allclose(alone.double(), expected[0], atol=1e-2)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_target_that_does_not_see_itself_sees_nothing_without_references(grid):
    layout, tensors, data = picture(grid)
    sources = {"owl": keys_of("owl", tensors[1])}
    for out, lse in results(tensors, References((ref("owl", keys="nothing"),)), layout, data, sources=sources):
        assert bool((out == 0).all())
        assert bool(torch.isneginf(lse).all())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_hidden_reference_is_exactly_neutral(grid):
    """Not one bit, and whatever is in it."""
    layout, tensors, data = picture(grid)
    plain = run("plan_loop", *tensors, plan=build_plan(OWN, layout))
    for value in (1.0, 1e38, float("inf"), float("nan")):
        hidden = {"owl": tuple(torch.full_like(x, value) for x in keys_of("owl", tensors[1]))}
        for entry in (ref("owl", bias=2.0, keys="nothing"), ref("owl", queries="none")):
            plan = build_plan(OWN | References((entry,)), layout, data=data)
            out, lse = run("plan_loop", *tensors, plan=plan, sources=hidden)
            assert torch.equal(out, plain[0])
            assert torch.equal(lse, plain[1])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_order_of_references_and_of_keys_does_not_matter(grid):
    layout, tensors, data = picture(grid)
    entries = [ref("fox", bias=1.5, keys="fox"), ref("owl", queries="left"), ref("elk", bias=-0.5, keys="elk")]
    sources = {name: keys_of(name, tensors[1]) for name in SIZES}
    base = OWN & Isolation("subjects")
    first = results(tensors, base | References(entries), layout, data, sources=sources)
    agree(results(tensors, References(entries[::-1]) | base, layout, data, sources=sources), first[-1])
    order = torch.randperm(SIZES["elk"], generator=torch.Generator().manual_seed(0))
    moved = sources | {"elk": tuple(x[:, order] for x in sources["elk"])}
    shuffled = data | {"elk": data["elk"][order.numpy()]}
    agree(results(tensors, base | References(entries), layout, shuffled, sources=moved), first[-1])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_references_in_the_sequence_never_change(grid):
    """They see themselves only, whatever the target sees of them."""
    cats = [(1, 3, 5), (2, 2, 3)]
    layout = Layout.joint(grid, references=cats)
    data = {"left": noise(grid, 1), "keys": noise(cats[0], 2)}
    tensors = random_qkv(layout, batch=2)
    entries = (Reference("reference0", keys="keys"), Reference("reference1", queries="left"))
    for pattern in (OWN | References(entries) | ITSELF, References(entries) | ITSELF):
        found = results(tensors, pattern, layout, data)
        agree(found, oracle_of(tensors, pattern, layout, data))
        for segment, start in zip(layout.segments[1:], layout.starts[1:], strict=True):
            own = slice(start, start + segment.length)
            expected = dense(*(x[:, own] for x in tensors))
            agree([(out[:, own], lse[:, own]) for out, lse in found], expected)


def oracle_of(tensors, pattern, layout, data) -> tuple[Tensor, Tensor]:
    allowed = torch.from_numpy(pattern.dense_mask(layout, data))
    return reference.attend(*(x.double() for x in tensors), allowed)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_split_reference_merges_to_one_call(grid):
    layout, tensors, data = picture(grid)
    k, v = keys_of("elk", tensors[1])
    whole = References((ref("elk", bias=1.5, keys="elk", queries="left"),))
    expected = results(tensors, OWN | whole, layout, data, sources={"elk": (k, v)})[-1]
    for cut in (1, 7):
        parts = {"front": slice(None, cut), "back": slice(cut, None)}
        split = data | {name: data["elk"][part] for name, part in parts.items()}
        entries = {
            name: Reference(name, length=len(split[name]), bias=1.5, keys=name, queries="left") for name in parts
        }
        tensors_of = {name: (k[:, part], v[:, part]) for name, part in parts.items()}
        both = OWN | References(tuple(entries.values()))
        agree(results(tensors, both, layout, split, sources=tensors_of), expected)
        first = OWN | References((entries["front"],))
        second = References((entries["back"],))
        merged = [
            merge_lse(torch.stack([a[0], b[0]]), torch.stack([a[1], b[1]]))
            for a, b in zip(
                results(tensors, first, layout, split, sources={"front": tensors_of["front"]}),
                results(tensors, second, layout, split, sources={"back": tensors_of["back"]}),
                strict=False,
            )
        ]
        agree(merged, expected)


@pytest.mark.parametrize("bias", [0.0, 2.5, -40.0, 60.0])
def test_the_own_keys_as_a_reference_change_nothing(bias):
    for grid in GRIDS:
        layout, tensors, _ = picture(grid)
        copy = Reference("copy", grid, bias=bias)
        found = results(tensors, OWN | References((copy,)), layout, sources={"copy": tuple(tensors[1:])})
        out, lse = dense(*tensors)
        agree(found, (out, lse + np.logaddexp(0, bias)))


def test_weight_on_a_reference_grows_with_its_bias():
    layout, tensors, _ = picture((1, 7, 11))
    k, _ = keys_of("owl", tensors[1])
    q, own, _ = tensors
    mass = []
    for bias in (-3.0, 0.0, 1.0, 3.0):
        pattern = OWN | References((ref("owl", bias=bias),))
        values = (q, own, torch.zeros_like(own))
        mass.append(results(values, pattern, layout, sources={"owl": (k, torch.ones_like(k))})[0][0])
    assert all(bool((low < high).all()) for low, high in pairwise(mass))


def test_regions_see_their_own_reference_only():
    """MagicFace: tokens of one region do not depend on the reference of the other."""
    layout, tensors, data = picture((1, 7, 11))
    pattern = OWN | References((ref("fox", queries="left"), ref("owl", queries="right")))
    sources = {name: keys_of(name, tensors[1]) for name in ("fox", "owl")}
    changed = sources | {"owl": keys_of("owl", tensors[1], seed=9)}
    left = torch.from_numpy(data["left"].reshape(-1))
    pairs = zip(
        results(tensors, pattern, layout, data, sources=sources),
        results(tensors, pattern, layout, data, sources=changed),
        strict=True,
    )
    for (before, _), (after, _) in pairs:
        assert torch.equal(before[:, left], after[:, left])
        assert not torch.isclose(before[:, ~left], after[:, ~left]).all(dim=-1).any()


def test_isolated_subjects_do_not_depend_on_each_other():
    layout, (q, k, v), data = picture((1, 7, 11))
    group = torch.from_numpy(data["subjects"].reshape(-1))
    other = [x.clone() for x in (k, v)]
    for x in other:
        x[:, group == 2] += 1
    for pattern in (OWN & Isolation("subjects"), (Box(3) | Text()) & Isolation("subjects")):
        first = results((q, k, v), pattern, layout, data)
        second = results((q, *other), pattern, layout, data)
        for (before, _), (after, _) in zip(first, second, strict=True):
            for number in (1, 3):
                assert torch.equal(before[:, group == number], after[:, group == number])
            assert not torch.equal(before[:, group == 0], after[:, group == 0])


def test_halves_and_samples_pick_their_references_from_a_menu():
    """Without references in the unconditional half, with others for every sample and head in the conditional one."""
    layout, tensors, data = picture((1, 7, 11), batch=4)
    sources = {name: keys_of(name, tensors[1]) for name in ("fox", "owl")}
    fox, owl = ref("fox", bias=1.0, keys="fox"), ref("owl", queries="left")
    pattern = PerHead((OWN, OWN | References((fox,)), (OWN & Isolation("subjects")) | References((fox, owl))))
    groups = torch.tensor([[0, 0], [0, 0], [1, 2], [2, 1]])
    found = results(tensors, pattern, layout, data, sources=sources, groups=groups)
    plain = dense(*tensors)
    agree([(out[:2], lse[:2]) for out, lse in found], (plain[0][:2], plain[1][:2]))
    for entry in range(3):
        alone = torch.full((4, 2), entry)
        own = groups == entry
        expected = results(tensors, pattern, layout, data, sources=sources, groups=alone)[-1]
        for out, lse in found:
            torch.testing.assert_close(out.transpose(1, 2)[own], expected[0].transpose(1, 2)[own], rtol=1e-5, atol=5e-6)
            torch.testing.assert_close(lse.transpose(1, 2)[own], expected[1].transpose(1, 2)[own], rtol=1e-5, atol=5e-6)


def test_rows_without_keys_give_zero_and_minus_infinity():
    layout, tensors, data = picture((1, 7, 11))
    left = torch.from_numpy(data["left"].reshape(-1))
    for pattern in (OWN & QueryMask("left"), OWN & QueryMask("left") & KeyMask("left")):
        plan = build_plan(pattern, layout, data=data)
        assert plan.useful[0] in (int(left.sum()) * 77, int(left.sum()) ** 2)
        for out, lse in results(tensors, pattern, layout, data):
            assert bool((out[:, ~left] == 0).all())
            assert bool(torch.isneginf(lse[:, ~left]).all())
            assert bool(torch.isfinite(lse[:, left]).all())


def test_gathered_keys_equal_masked_ones():
    """Another number of kept keys in every sample, one of them none; the plan depends on none of it."""
    layout, tensors, _ = picture((1, 7, 11), batch=3)
    k, v = keys_of("elk", tensors[1])
    keep = torch.from_numpy(noise((3, SIZES["elk"]), 5))
    keep[1] = False
    kept_k, kept_v, bias = gather_keys(k, v, keep, multiple=4)
    assert kept_k.shape[1] % 4 == 0
    assert kept_k.shape[1] < SIZES["elk"] + 4
    pattern = OWN | References((Reference("kept", length=kept_k.shape[1]),))
    key_bias = torch.cat([bias.new_zeros(3, 1, layout.tokens), bias], -1)
    found = results(tensors, pattern, layout, sources={"kept": (kept_k, kept_v)}, key_bias=key_bias)
    for sample in range(3):
        data = {"elk": keep[sample].numpy()}
        own = [x[sample : sample + 1] for x in tensors]
        sources = {"elk": (k[sample : sample + 1], v[sample : sample + 1])}
        masked = results(own, OWN | References((ref("elk", keys="elk"),)), layout, data, sources=sources)[-1]
        agree([(out[sample : sample + 1], lse[sample : sample + 1]) for out, lse in found], masked)


def test_half_precision_stays_close_to_the_oracle():
    layout = Layout((Segment("text", 5), *Layout.joint((1, 13, 9), references=[(1, 6, 7)]).segments))
    data = {"keys": noise((6, 7), 1), "left": noise((13, 9), 2), "subjects": noise((13, 9), 3) + 1}
    entry = Reference("reference0", keys="keys", queries="left")
    pattern = (OWN & Isolation("subjects")) | References((entry,)) | ITSELF | Text()
    for dtype in (torch.float16, torch.bfloat16):
        tensors = random_qkv(layout, dtype=dtype)
        expected, _ = oracle_of(tensors, pattern, layout, data)
        for out, _ in results(tensors, pattern, layout, data):
            torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)


def test_replaced_logits_are_two_merged_calls_and_a_third():
    """PrimeComposer: columns of object tokens take logits from a second pass, their rows the transposed ones."""
    layout, (q, k, v), data = picture((1, 7, 11))
    inside = torch.from_numpy(data["left"].reshape(-1))
    prior_q, _, _ = random_qkv(layout, batch=2, seed=7)
    generator = torch.Generator().manual_seed(8)
    prior_k = torch.randn(2, int(inside.sum()), *k.shape[2:], generator=generator)
    logits = torch.einsum("bihd,bjhd->bhij", q, k)
    prior = torch.einsum("bihd,bmhd->bhim", prior_q, prior_k)
    logits[..., inside] = prior
    logits[..., inside, :] = prior.transpose(-1, -2)
    expected = torch.einsum("bhij,bjhd->bihd", torch.softmax(logits * q.shape[-1] ** -0.5, -1), v)

    rows, keys = data | {"rows": data["right"]}, int(inside.sum())
    around = results((q, k, v), OWN & QueryMask("rows") & KeyMask("right"), layout, rows)
    prior_keys = References((Reference("prior", length=keys, queries="rows"),))
    sources = {"prior": (prior_k, v[:, inside])}
    columns = results((prior_q, k, v), prior_keys, layout, rows, sources=sources)
    queries = torch.zeros_like(q)
    queries[:, inside] = prior_k
    turned = results((queries, prior_q, v), OWN & QueryMask("left"), layout, rows)
    for parts in zip(around, columns, turned, strict=False):
        out, _ = merge_lse(torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts]))
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
