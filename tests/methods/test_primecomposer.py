"""PrimeComposer: exact factorisation of the replaced logits, and the method on tiny UNets and pipelines."""

import copy
import pickle
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gensparse
from gensparse import Concept, Subjects
from gensparse.errors import ConfigError, LayoutMismatchError
from gensparse.methods import At, PrimeComposer, Schedule, Together
from gensparse.processors.confined import Confined
from gensparse.processors.steering import attend_steered
from gensparse.subjects.read_masks import box_mask
from gensparse.testing.tiny import tiny_call, tiny_denoiser, tiny_inputs, tiny_pipeline
from gensparse.testing.tiny.adapters import image_embeds, load_image_adapter

GRID = (1, 6, 10)
MASK, REGION = box_mask((0.2, 0.3, 0.7, 0.9), (24, 40)), box_mask((0, 0, 0.6, 0.7), (24, 40))
CAT = Subjects(Concept("cat", mask=MASK, region=REGION, tokens=(1, 2)))


# ------------------------------------------------------------------------------------------------------------ attention
def tensors(count: int, tokens: int, heads: int = 3, dim: int = 8, batch: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, tokens, heads, dim, generator=generator) for _ in range(count)]


def by_matrix(
    q: Tensor, k: Tensor, v: Tensor, prior: Tensor, target: Tensor, scale: float, bias: Tensor | None = None
) -> Tensor:
    """As published: logits of all pairs, columns replaced, then rows."""
    logits = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale
    logits[..., target] = prior
    logits[:, :, target] = prior.transpose(-1, -2)
    if bias is not None:
        logits = logits + bias[:, :, None]
    return torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), v)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("tokens", "count"), [(1, 1), (1, 0), (13, 0), (13, 1), (13, 13), (97, 30), (64, 63)])
def test_steering_is_replaced_logits_without_their_matrix(tokens: int, count: int, biased: bool) -> None:
    q, k, v, prior_q, keys = tensors(5, tokens)
    target = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))[:count]
    prior_k = keys[:, :count]
    bias = torch.randn(1, 3, tokens, generator=torch.Generator().manual_seed(2)) if biased else None
    prior = torch.einsum("bnhd,bmhd->bhnm", prior_q, prior_k) * 0.4
    out = attend_steered(q, k, v, prior_q, prior_k, target, scale=0.4, key_bias=bias)
    torch.testing.assert_close(out, by_matrix(q, k, v, prior, target, 0.4, bias), rtol=0, atol=1e-5)
    order = torch.arange(count).flip(0)  # the object's tokens in another order, in both lists
    again = attend_steered(q, k, v, prior_q, prior_k[:, order], target[order], scale=0.4, key_bias=bias)
    torch.testing.assert_close(again, out, rtol=0, atol=1e-5)
    if not count:
        plain = nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), None if bias is None else bias[:, :, None], scale=0.4
        )
        torch.testing.assert_close(out, plain.transpose(1, 2), rtol=0, atol=1e-5)


def test_the_own_logits_as_prior_change_the_rows_alone_and_a_constant_prior_gives_the_mean() -> None:
    q, k, v = tensors(3, 31)
    target = torch.tensor([4, 2, 30, 17])
    plain = nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    out = attend_steered(q, k, v, q, k[:, target], target)
    rest = torch.ones(31, dtype=torch.bool)
    rest[target] = False
    torch.testing.assert_close(out[:, rest], plain[:, rest], rtol=0, atol=1e-5)
    swapped = nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (k[:, target], q, v)))
    torch.testing.assert_close(out[:, target], swapped.transpose(1, 2), rtol=0, atol=1e-5)
    flat = attend_steered(q, k, v, torch.ones_like(q), torch.ones_like(k[:, target]), target)
    torch.testing.assert_close(flat[:, target], v.mean(1, keepdim=True).expand(-1, 4, -1, -1), rtol=0, atol=1e-5)


def test_half_precision_and_large_logits_stay_finite() -> None:
    q, k, v, prior_q, prior_k = (x.to(torch.bfloat16) for x in tensors(5, 29))
    target = torch.arange(5, 14)
    prior_k = prior_k[:, :9]
    out = attend_steered(q, k, v, prior_q, prior_k, target)
    whole = attend_steered(*(x.float() for x in (q, k, v, prior_q, prior_k)), target)
    assert out.dtype == torch.bfloat16
    assert (out.float() - whole).abs().max() < 2e-2 * whole.abs().max()
    assert torch.isfinite(attend_steered(q * 100, k * 100, v, prior_q * 100, prior_k * 100, target)).all()


@pytest.mark.parametrize("masked", [False, True])
def test_confined_words_are_hidden_outside_of_the_place(masked: bool) -> None:
    (q,) = tensors(1, 23, batch=3)
    k, v = tensors(2, 7, batch=3, seed=1)
    inside = np.zeros(23, bool)
    inside[3:11] = True
    words = ((1, 4), (), (1, 4))
    allowed = torch.ones(3, 1, 23, 7, dtype=torch.bool)
    for row, own in enumerate(words):
        allowed[row, :, ~torch.from_numpy(inside)[:, None] & torch.isin(torch.arange(7), torch.tensor(own))] = False
    mask = None
    if masked:
        mask = torch.ones(3, 1, 1, 7, dtype=torch.bool)
        mask[1, ..., 5:] = mask[2, ..., 6:] = False
        allowed = allowed & mask
    expected = nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), allowed)
    out = Confined(words, inside).attend(q, k, v, mask, None)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=0, atol=1e-5)
    with pytest.raises(LayoutMismatchError, match="from query to query"):
        Confined(words, inside).attend(q, k, v, allowed, None)


# --------------------------------------------------------------------------------------------------------------- models
@cache
def denoiser(name: str) -> nn.Module:
    return tiny_denoiser(name)


def inputs(name: str, batch: int, step: int = 0, seed: int = 0) -> dict[str, Any]:
    given = tiny_inputs(name, GRID, batch=batch, seed=seed)
    time = given["timestep"]
    return {**given, "timestep": (time * (1 - step / 50)).to(time.dtype)}


@torch.no_grad()
def call(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    return model(**arguments, return_dict=False)[0]


@pytest.mark.parametrize("queries", ["composite", "object"])
@pytest.mark.parametrize(("model", "halves"), [("sd15", 2), ("sdxl", 1)])
def test_the_conditional_half_is_steered_and_nothing_is_left(model: str, halves: int, queries: str) -> None:
    net = denoiser(model)
    method = PrimeComposer(queries=queries, halves=halves)
    count = len(method.beside)
    given = inputs(model, halves * (count + 2))
    plain = call(net, given)
    handle = gensparse.apply(net, method, strict=True, subjects=CAT)
    try:
        out = call(net, given)
        report = handle.report()
    finally:
        handle.remove()
    assert report["dense"] == {}
    assert report["pictures"]["references"] == list(method.beside)
    assert report["pictures"]["generated"] == 2
    assert torch.isfinite(out).all()
    told = torch.arange(len(out)) >= (halves - 1) * (count + 2)
    torch.testing.assert_close(out[~told], plain[~told], rtol=0, atol=2e-5)
    assert ((out - plain).abs().flatten(1).amax(1) > 1e-4).equal(told)
    assert torch.equal(call(net, given), plain)


def test_the_prior_pass_does_not_look_at_what_it_steers() -> None:
    net, outs = denoiser("sd15"), []
    for seed in (0, 7):
        given, other = inputs("sd15", 3), inputs("sd15", 3, seed=seed)
        given["sample"] = torch.cat([given["sample"][:2], other["sample"][2:]])
        with gensparse.applied(net, PrimeComposer(halves=1), subjects=CAT):
            outs.append(call(net, given))
    torch.testing.assert_close(outs[0][:2], outs[1][:2], rtol=0, atol=2e-5)
    assert not torch.allclose(outs[0][2], outs[1][2], atol=1e-3)


def test_steps_behind_are_plain_but_for_the_words_and_may_stand_alone() -> None:
    net, method = denoiser("sd15"), PrimeComposer(order=1, steer=0.0, halves=1)
    assert [method.when(At(step=step, steps=20)) is None for step in range(3)] == [True, False, False]
    given = inputs("sd15", 3, 1)
    alone = {name: x[2:] if isinstance(x, Tensor) and x.dim() else x for name, x in given.items()}
    plain = call(net, given)[2:]
    for own, same in ((method, False), (PrimeComposer(order=1, steer=0.0, halves=1, confine=False), True)):
        with gensparse.applied(net, own, subjects=CAT) as handle:
            call(net, inputs("sd15", 3, 0))
            whole = call(net, given)[2:]
            handle.restart()
            call(net, inputs("sd15", 3, 0))
            single = call(net, alone)
            sparse = handle.report()["sparse"]
        torch.testing.assert_close(single, whole, rtol=0, atol=2e-5)
        assert torch.allclose(whole, plain, atol=2e-5) == same
        assert (sparse == 0) == same


def test_an_object_without_a_token_is_the_plain_model() -> None:
    """A tiny object between the tokens of every level, and no words."""
    mask = torch.zeros(480, 800, dtype=torch.bool)
    mask[81:83, 401:404] = True
    net, given = denoiser("sd15"), inputs("sd15", 6)
    plain = call(net, given)
    with gensparse.applied(net, PrimeComposer(halves=2)) as handle:
        handle.use(Subjects(Concept("cat", mask=mask, region=REGION)))
        out = call(net, given)
        assert handle.report()["dense"]
    torch.testing.assert_close(out, plain, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "share"), [({}, 0.4), ({"steer": 0.3}, 0.3), ({"steer": 0.6}, 0.6), ({"steer": 1.0}, 1.0)]
)
def test_shares_of_a_run_end_as_published(change: dict[str, float], share: float) -> None:
    """int(share * steps + 1 - order), and never before the first calls of the solver."""
    method = PrimeComposer(**change)
    for steps in (1, 2, 5, 20, 50):
        ends = max(0, int(share * steps + 1 - 2))
        assert method.ends(share, steps) == ends
        steered = [step for step in range(steps) if method.when(At(step=step, steps=steps)) is None]
        assert steered == list(range(min(steps, max(2, ends))))


def test_published_modes_are_presets() -> None:
    found = {
        name: (own.steer, own.paste, own.keep, own.same_domain)
        for name in PrimeComposer.presets
        if (own := PrimeComposer.preset(name))
    }
    assert found == {
        "same_domain": (0.3, 0.1, 0.8, True),
        "painting": (0.3, 0.2, 0.8, False),
        "cartoon": (0.4, 0.3, 0.8, False),
        "sketch": (0.6, 0.3, 0.8, False),
    }


def test_guidance_is_read_from_the_pipeline_of_diffusers() -> None:
    """Pictures generated along: a room, a cat, and a cat in the room."""
    pipe = tiny_pipeline("sd15")
    pipe.set_progress_bar_config(disable=True)
    settings = {**tiny_call("sd15"), "prompt": ["a room", "a cat", "a cat in a room"], "output_type": "latent"}

    def made() -> np.ndarray:
        return pipe(**settings, generator=torch.Generator().manual_seed(0)).images

    plain = made()
    with gensparse.applied(pipe, "primecomposer", strict=True, subjects=CAT) as handle:
        out = made()
        assert handle.report()["pictures"]["halves"] == 2
    assert torch.isfinite(out).all()
    assert not torch.allclose(out[2], plain[2], atol=1e-3)
    assert torch.equal(made(), plain)


def test_image_prompts_stay_beside_confined_words() -> None:
    net = tiny_denoiser("sdxl")
    load_image_adapter(net)
    given = inputs("sdxl", 6)
    given["added_cond_kwargs"] |= {"image_embeds": [x[:1].expand(6, *x.shape[1:]) for x in image_embeds(2)]}
    plain = call(net, given)
    with gensparse.applied(net, PrimeComposer(halves=2), strict=True, subjects=CAT) as handle:
        out = call(net, given)
        assert handle.report()["dense"] == {}
    torch.testing.assert_close(out[:3], plain[:3], rtol=0, atol=2e-5)
    assert not torch.allclose(out[5], plain[5], atol=1e-3)
    assert torch.equal(call(net, given), plain)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_carry_the_method(how: str) -> None:
    net = tiny_denoiser("sd15")
    gensparse.apply(net, PrimeComposer(halves=1), subjects=CAT)
    twin = copy.deepcopy(net) if how == "deepcopy" else pickle.loads(pickle.dumps(net))
    assert torch.equal(call(twin, inputs("sd15", 3)), call(net, inputs("sd15", 3)))


# ------------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steer": 1.2}, r"steer=1\.2"),
        ({"paste": -0.1}, "paste="),
        ({"keep": True}, "keep=True"),
        ({"order": 0}, "order=0"),
        ({"queries": "both"}, "queries='both'"),
        ({"confine": 1}, "confine=1"),
        ({"same_domain": None}, "same_domain=None"),
        ({"layers": "9-3"}, "layers='9-3'"),
    ],
    ids=["steer", "paste", "keep", "order", "queries", "confine", "same_domain", "layers"],
)
def test_bad_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PrimeComposer(**settings)


def test_what_it_cannot_do_is_refused() -> None:
    net = denoiser("sd15")
    for model in ("flux", "sd3"):
        with pytest.raises(ConfigError, match="knows UNet"):
            gensparse.apply(denoiser(model), "primecomposer")
    for make in (lambda: Together(("primecomposer",)), lambda: Schedule(((0, "primecomposer"),))):
        with pytest.raises(ConfigError, match="on its own"):
            make()
    with gensparse.applied(net, PrimeComposer(halves=1)) as handle:
        with pytest.raises(ConfigError, match="where the object is"):
            call(net, inputs("sd15", 3))
        bad = [
            (Concept("cat"), "mask and region"),
            (Concept("cat", mask=MASK), "mask and region"),
            (Concept("cat", mask=MASK, region=REGION, latents=torch.zeros(4, 3, 5)), "latents to be noised"),
            (Concept("cat", mask=np.zeros((3, 3)), region=REGION), "keeps nothing"),
        ]
        for concept, words in bad:
            with pytest.raises(ConfigError, match=words):
                handle.use(Subjects(concept))
        with pytest.raises(ConfigError, match="1 reference"):
            handle.use(Subjects(CAT["cat"], Concept("dog", mask=MASK, region=REGION)))
        handle.use(CAT)
        with pytest.raises(ConfigError, match=r"has 2 reference picture\(s\)"):
            call(net, inputs("sd15", 2))
        with pytest.raises(ConfigError, match="a bank holds keys"), handle.writing():
            pass
