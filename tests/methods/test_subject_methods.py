"""Methods for several subjects on tiny models and pipelines: batches, halves, banks, masks, refusals, removal."""

import copy
import pickle
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from torch import Tensor, nn

import gensparse
from gensparse import Concept, Subjects
from gensparse.errors import ConfigError
from gensparse.families import family_of
from gensparse.layout import Layout
from gensparse.methods import (
    At,
    ConsiStory,
    FreeCustom,
    IsolationReposition,
    MagicFace,
    MasaCtrl,
    Method,
    ReferenceOnly,
    StoryDiffusion,
    StyleAligned,
    Subject,
    TokenFlow,
    parse_method,
)
from gensparse.methods.style_aligned import plain_numbers
from gensparse.methods.subject_method import takes
from gensparse.subjects.cast import encode_picture, pack, token_places
from gensparse.subjects.read_masks import box_mask
from gensparse.testing.tiny import tiny_call, tiny_denoiser, tiny_inputs, tiny_pipeline

GRID = (1, 4, 6)
LEFT, RIGHT = box_mask((0, 0, 0.5, 1), (8, 12)), box_mask((0.5, 0, 1, 1), (8, 12))


def one(**more: Any) -> Subjects:
    return Subjects(Concept("cat", **more))


TWO = Subjects(
    Concept("cat", mask=LEFT, region=RIGHT, tokens=(1,)),
    Concept("dog", mask=RIGHT, region=box_mask((0, 0, 0.4, 0.6), (8, 12)), tokens=(2,)),
)

ACTING: dict[str, tuple[Method, Subjects | None]] = {
    "freecustom": (FreeCustom(weights=(3.0, 1.5)), TWO),
    "storydiffusion": (StoryDiffusion(start=0, gate=1.0), None),
    "style_aligned": (StyleAligned(group_norm=False), None),
    "masactrl": (MasaCtrl(start=0), None),
    "reference_only": (ReferenceOnly(adain=False), None),
    "isolation_reposition": (IsolationReposition(), TWO),
    "tokenflow": (TokenFlow(), None),
}
"""Methods for all families that have them, at their first step, with three pictures a half."""

SYMMETRIC = {"storydiffusion", "tokenflow"}


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


def references_of(name: str) -> int:
    return 2 if ACTING[name][1] is TWO else 1


@pytest.mark.parametrize(("model", "halves"), [("sd15", 2), ("sdxl", 1), ("flux", 1), ("sd3", 2), ("pixart", 2)])
@pytest.mark.parametrize("method", ACTING)
def test_generated_pictures_change_and_references_do_not(method: str, model: str, halves: int) -> None:
    """In one batch, with as many halves as are said; nothing is left behind."""
    what, subjects = ACTING[method]
    net, given = denoiser(model), inputs(model, 3 * halves)
    plain = call(net, given)
    handle = gensparse.apply(net, what.from_dict({**what.to_dict(), "halves": halves}), strict=True, subjects=subjects)
    try:
        out = call(net, given)
        report = handle.report()
    finally:
        handle.remove()
    assert report["sparse"] > 0
    assert torch.isfinite(out).all()
    rows = torch.arange(3).repeat(halves) < (0 if method in SYMMETRIC else references_of(method))
    # other layers compute the whole batch at once, so references are equal up to rounding
    torch.testing.assert_close(out[rows], plain[rows], rtol=0, atol=2e-5)
    changed = (out - plain).abs().flatten(1).amax(1) > 1e-4
    told = torch.arange(3 * halves) >= 3 * (halves - 1)  # the conditional half
    expected = ~rows & told if method == "freecustom" else ~rows
    assert torch.equal(changed, expected)
    assert torch.equal(call(net, given), plain)


@pytest.mark.parametrize(
    ("what", "subjects"),
    [
        (FreeCustom(), Subjects()),
        (FreeCustom(), Subjects(Concept("nothing", mask=np.zeros((5, 9))))),
        (FreeCustom(start=1), None),
        (StoryDiffusion(start=0, rate=0.0), None),
        (StoryDiffusion(start=0, gate=0.0), None),
        (MasaCtrl(), None),
        (IsolationReposition(cross=0.0), one(region=np.zeros((4, 4)))),
        (StyleAligned(queries=False, keys=False, share=False), None),
    ],
    ids=repr,
)
@pytest.mark.parametrize("model", ["sd15", "flux"])
def test_nothing_to_share_is_the_plain_model(what: Method, subjects: Subjects | None, model: str) -> None:
    net, given = denoiser(model), inputs(model, 2)
    plain = call(net, given)
    with gensparse.applied(net, what) as handle:
        if subjects is not None:
            handle.use(subjects)
        out = call(net, given)
    exact = not isinstance(what, StyleAligned)
    assert torch.equal(out, plain) if exact else torch.allclose(out, plain, atol=1e-5)


@pytest.mark.parametrize("model", ["sd15", "flux", "sd3"])
@pytest.mark.parametrize(
    ("what", "subjects"),
    [
        (FreeCustom(weights=(2.0, 0.5)), TWO),
        (MasaCtrl(start=0), None),
        (MasaCtrl(start=0, union=True), one(mask=LEFT, region=RIGHT)),
        (StyleAligned(queries=False, keys=False, shift=0.3, scale=0.7), None),
        (ReferenceOnly(adain=False, style_fidelity=0.25), None),
        (IsolationReposition(cross=0.0, bias=0.4), TWO),
    ],
    ids=lambda item: getattr(item, "name", ""),
)
def test_a_bank_gives_what_references_in_the_batch_give(what: Method, subjects: Subjects | None, model: str) -> None:
    """References are written by a run of their own, two steps of it, and read by the generated picture alone."""
    count = 2 if subjects is TWO else 1
    net = denoiser(model)
    handle = gensparse.apply(net, what, subjects=subjects)
    try:
        both, steps = [], (0, 1)
        for step in steps:
            both.append(call(net, inputs(model, count + 1, step)))
        handle.restart()
        with handle.writing(keep_on="cpu"):
            for step in steps:
                alone = call(net, rows(inputs(model, count + 1, step), slice(0, count)))
                torch.testing.assert_close(alone, both[step][:count], rtol=0, atol=2e-5)
        handle.restart()
        names = list(subjects.names) if subjects is not None else ["reference0"]
        told = handle.report()
        assert told["bank"]["references"] == names
        assert told["bank"]["bytes"] > 0
        for step in steps:
            out = call(net, rows(inputs(model, count + 1, step), slice(count, count + 1)))
            torch.testing.assert_close(out, both[step][count:], rtol=0, atol=2e-5)
        told = handle.report()["pictures"]
        assert told == {"halves": 1, "references": names, "banked": True, "generated": 1}
        with pytest.raises(ConfigError, match="holds 2 steps"):
            call(net, rows(inputs(model, count + 1, 2), slice(count, count + 1)))
        handle.forget()
        handle.restart()
        torch.testing.assert_close(call(net, inputs(model, count + 1)), both[0], rtol=0, atol=0)
    finally:
        handle.remove()


def rows(arguments: dict[str, Any], part: slice) -> dict[str, Any]:
    """Some pictures of a call."""
    shared = ("img_ids", "txt_ids")

    def cut(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cut(key, item) for key, item in value.items()}
        return value[part] if isinstance(value, Tensor) and name not in shared else value

    return {name: cut(name, value) for name, value in arguments.items()}


def test_weights_masks_and_the_order_of_references() -> None:
    """Heavier references pull more; their order, with masks and weights, does not matter."""
    net, given = denoiser("sd15"), inputs("sd15", 3)
    outs = {}
    for weights in ((0.0, 0.0), (2.0, 0.0), (4.0, 0.0)):
        with gensparse.applied(net, FreeCustom(weights=weights)) as handle:
            handle.use(TWO)
            outs[weights] = call(net, given)[2]
    with gensparse.applied(net, FreeCustom(weights=(0.0, 4.0))) as handle:
        handle.use(Subjects(TWO["dog"], TWO["cat"]))
        swapped = call(net, {name: x[[1, 0, 2]] for name, x in given.items()})[2]
    torch.testing.assert_close(swapped, outs[4.0, 0.0], rtol=0, atol=1e-5)
    plain = call(net, given)[2]
    apart = [float((x - plain).norm()) for x in outs.values()]
    assert apart[0] > 0
    assert len(set(apart)) == 3


@pytest.mark.parametrize("count", [1, 5])
def test_one_and_five_references(count: int) -> None:
    net, given = denoiser("sd15"), inputs("sd15", count + 1)
    plain = call(net, given)
    with gensparse.applied(net, FreeCustom(subjects=count)):
        out = call(net, given)
    torch.testing.assert_close(out[:count], plain[:count], rtol=0, atol=2e-5)
    assert not torch.allclose(out[count], plain[count], atol=1e-3)


def test_fidelity_mixes_the_unconditional_half() -> None:
    net, given = denoiser("sd15"), inputs("sd15", 4)
    layer = "up_blocks.2.attentions.1"

    def of(fidelity: float) -> Tensor:
        with gensparse.applied(net, FreeCustom(style_fidelity=fidelity, halves=2, layers=layer)):
            return call(net, given)

    outs, plain = {share: of(share) for share in (0.0, 0.5, 1.0)}, call(net, given)
    torch.testing.assert_close(outs[1.0][1], plain[1], rtol=0, atol=1e-5)
    assert not torch.allclose(outs[0.5][1], outs[0.0][1], atol=1e-4)
    assert not torch.allclose(outs[0.5][1], plain[1], atol=1e-4)
    torch.testing.assert_close(outs[0.5][3], outs[0.0][3], rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- pipelines
def pipeline(name: str) -> Any:
    pipe = tiny_pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, name: str, prompts: list[str], **more: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    settings = {**tiny_call(name), "prompt": prompts, "output_type": "latent", "generator": generator, **more}
    return pipe(**settings).images


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux", "sd3"])
def test_given_references_are_noised_at_every_step_and_their_own_latents_do_not_matter(name: str) -> None:
    pipe = pipeline(name)
    call_ = tiny_call(name)
    picture = torch.rand(1, 3, call_["height"], call_["width"], generator=torch.Generator().manual_seed(1))
    latents = encode_picture(pipe, picture, call_["height"], call_["width"])
    prompts = ["a cat", "a cat with a hat"]
    before = draw(pipe, name, prompts)
    handle = gensparse.apply(pipe, FreeCustom(seed=3), strict=True, subjects=one(latents=latents, mask=LEFT))
    first = draw(pipe, name, prompts)
    assert handle.report()["sparse"] > 0
    assert torch.equal(draw(pipe, name, prompts), first)
    assert not torch.allclose(first[1], before[1], atol=1e-4)
    other = torch.randn(first.shape, generator=torch.Generator().manual_seed(9)).to(first)
    one_start, another = other.clone(), other.clone()
    another[0] = 3.0
    results = [draw(pipe, name, prompts, latents=start)[1] for start in (one_start, another)]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-5)
    handle.remove()
    assert torch.equal(draw(pipe, name, prompts), before)


def test_guidance_is_read_from_the_pipeline() -> None:
    pipe, prompts = pipeline("sd15"), ["a cat", "a cat with a hat"]
    handle = gensparse.apply(pipe, FreeCustom(style_fidelity=1.0), strict=True)
    loaded = handle._attachments[0].loaded
    for scale, halves in ((5.0, (0, 1)), (1.0, (1,))):
        draw(pipe, "sd15", prompts, guidance_scale=scale)
        assert loaded._now.batch.halves == halves
        assert loaded._now.batch.items == 2


def test_the_second_call_of_a_step_is_the_unconditional_half_of_flux() -> None:
    pipe, prompts = pipeline("flux"), ["a cat", "a cat with a hat"]
    handle = gensparse.apply(pipe, FreeCustom(), strict=True)
    loaded, seen = handle._attachments[0].loaded, []
    begin = loaded.started
    loaded.started = lambda batch, arguments: (seen.append(batch.halves), begin(batch, arguments))
    draw(pipe, "flux", prompts)
    assert seen == [(1,), (1,)]
    seen.clear()
    draw(pipe, "flux", prompts, negative_prompt=["", ""], true_cfg_scale=2.0)
    assert seen == [(1,), (0,), (1,), (0,)]
    seen.clear()
    draw(pipe, "flux", prompts, num_inference_steps=1)
    draw(pipe, "flux", prompts, num_inference_steps=1)
    assert seen == [(1,), (1,)]


def test_guidance_that_skips_layers_asks_for_the_conditional_half_once_more() -> None:
    pipe, prompts = pipeline("sd3"), ["a cat", "a cat with a hat"]
    handle = gensparse.apply(pipe, FreeCustom(), strict=True)
    loaded, seen = handle._attachments[0].loaded, []
    begin = loaded.started
    loaded.started = lambda batch, arguments: (seen.append((batch.halves, batch.items)), begin(batch, arguments))
    draw(pipe, "sd3", prompts, skip_guidance_layers=[1], skip_layer_guidance_stop=1.0)
    assert seen == [((0, 1), 2), ((0, 1), 2), ((1,), 2)]


def test_controlnets_see_the_noised_references() -> None:
    pipe = pipeline("sd15")
    torch.manual_seed(0)
    net = ControlNetModel.from_unet(pipe.unet, conditioning_channels=3, load_weights_from_unet=True)
    net.controlnet_cond_embedding = type(net.controlnet_cond_embedding)(16, 3, (8, 16))  # 2 pixels per cell
    for weight in net.parameters():
        weight.data.add_(0.05 * torch.randn_like(weight))
    both = StableDiffusionControlNetPipeline(**pipe.components, controlnet=net.eval(), requires_safety_checker=False)
    both.set_progress_bar_config(disable=True)
    latents = encode_picture(pipe, torch.rand(1, 3, 32, 48), 32, 48)
    seen: list[Tensor] = []
    handle = gensparse.apply(both, FreeCustom.preset("sd1.5-controlnet", layers="auto"), subjects=one(latents=latents))
    watch = [part.register_forward_pre_hook(_note(seen), with_kwargs=True) for part in (net, both.unet)]
    start, outs = torch.randn(2, 4, 16, 24, generator=torch.Generator().manual_seed(2)), []
    for first in (0.0, 5.0):
        given = start.clone()
        given[0] = first
        outs.append(draw(both, "sd15", ["a cat", "a dog"], image=torch.ones(1, 3, 32, 48), latents=given)[1])
    for one_ in watch:
        one_.remove()
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=1e-5)
    for small, large in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(small, large), "the ControlNet and the denoiser see other references"
        assert torch.equal(small[0], small[2]), "both halves see the same"
    assert handle.report()["sparse"] > 0
    handle.remove()
    assert not net._forward_pre_hooks


def _note(seen: list[Tensor]) -> Any:
    def note(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["sample"])

    return note


@pytest.mark.parametrize("first", ["adapter", "apply"])
def test_image_prompts_loaded_before_or_after_stay(first: str) -> None:
    pipe, prompts = pipeline("sd15"), ["a cat", "a dog"]
    embeds = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(5))
    more = {"ip_adapter_image_embeds": [torch.cat([torch.zeros_like(embeds), embeds])]}
    if first == "adapter":
        load_image_prompt(pipe.unet)
    handle = gensparse.apply(pipe, FreeCustom(), strict=True)
    if first == "apply":
        load_image_prompt(pipe.unet)
    shared = draw(pipe, "sd15", prompts, **more)
    crossed = [p for name, p in pipe.unet.attn_processors.items() if name.endswith("attn2.processor")]
    assert all(type(processor) is IPAdapterAttnProcessor2_0 for processor in crossed)
    assert handle.report()["sparse"] == 4
    handle.remove()
    plain = draw(pipe, "sd15", prompts, **more)
    torch.testing.assert_close(shared[0], plain[0], rtol=0, atol=1e-4)
    assert not torch.allclose(shared[1], plain[1], atol=1e-3)


def load_image_prompt(unet: nn.Module) -> None:
    """Random weights of an image-prompt adapter."""
    generator = torch.Generator().manual_seed(4)

    def noise(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator) * 0.3

    context, layers = unet.config.cross_attention_dim, {}
    for number, name in enumerate(key for key in unet.attn_processors if key.endswith("attn2.processor")):
        width = unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
        for part in ("to_k_ip", "to_v_ip"):
            layers[f"{2 * number + 1}.{part}.weight"] = noise(width, context)
    projection = {"proj.weight": noise(4 * context, 8), "proj.bias": noise(4 * context)}
    projection |= {"norm.weight": noise(context) + 1, "norm.bias": noise(context)}
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}], low_cpu_mem_usage=False)


# ------------------------------------------------------------------------------------------------------ single methods
def test_a_phase_of_a_schedule_takes_subjects() -> None:
    net = denoiser("sd15")
    plain = [call(net, inputs("sd15", 3, step)) for step in (0, 1)]
    with gensparse.applied(net, "schedule:0=freecustom:weights=2.0;1=dense") as handle:
        handle.use(TWO)
        outs = [call(net, inputs("sd15", 3, step)) for step in (0, 1)]
    assert not torch.allclose(outs[0][2], plain[0][2], atol=1e-3)
    assert torch.equal(outs[1], plain[1])


def test_story_samples_follow_the_seed_and_the_step_and_are_equal_for_all_readers() -> None:
    net = denoiser("sdxl")
    given = inputs("sdxl", 3)

    def of(seed: int) -> Tensor:
        with gensparse.applied(net, StoryDiffusion(start=0, gate=1.0, seed=seed)):
            return call(net, given)

    assert torch.equal(of(0), of(0))
    assert not torch.allclose(of(0), of(1), atol=1e-4)
    with gensparse.applied(net, StoryDiffusion(start=0, gate=1.0, rate=1.0)) as handle:
        whole = call(net, given)
        call(net, inputs("sdxl", 3, 1))
        assert {key[2] for key in handle._attachments[0].loaded._samples} == {1}
    same = dict(given)
    same["sample"] = given["sample"][:1].expand(3, -1, -1, -1)
    same["encoder_hidden_states"] = given["encoder_hidden_states"][:1].expand(3, -1, -1)
    same["added_cond_kwargs"] = {k: v[:1].expand(3, -1) for k, v in given["added_cond_kwargs"].items()}
    with gensparse.applied(net, StoryDiffusion(start=0, gate=1.0, rate=1.0)):
        alike = call(net, same)
    torch.testing.assert_close(alike, call(net, same), rtol=0, atol=2e-5)
    assert torch.isfinite(whole).all()


def test_two_characters_from_one_bank() -> None:
    net = denoiser("sdxl")
    handle = gensparse.apply(net, StoryDiffusion(start=0, gate=1.0, rate=1.0))
    try:
        for name, seed in (("anna", 1), ("bob", 2)):
            handle.restart()
            with handle.writing(name):
                call(net, inputs("sdxl", 1, seed=seed))
        handle.restart()
        outs = {}
        for names in (("anna",), ("bob",), ("anna", "bob")):
            handle.use(Subjects([Concept(name) for name in names]))
            handle.restart()
            outs[names] = call(net, inputs("sdxl", 1, seed=5))
        assert len({tuple(x.flatten()[:3].tolist()) for x in outs.values()}) == 3
        handle.use(Subjects(Concept("carl")))
        handle.restart()
        with pytest.raises(ConfigError, match="and not carl"):
            call(net, inputs("sdxl", 1, seed=5))
    finally:
        handle.remove()


def test_shared_group_norms_and_plain_layers() -> None:
    net, given = denoiser("sd15"), inputs("sd15", 3)
    plain = call(net, given)
    for what in (StyleAligned(group_norm=True), StyleAligned(plain_layers=0.5)):
        with gensparse.applied(net, what) as handle:
            out = call(net, given)
            assert handle.report()["sparse"] == (7 if what.group_norm else 3)
        torch.testing.assert_close(out[0], plain[0], rtol=0, atol=2e-5)
        assert not torch.allclose(out[1], plain[1], atol=1e-3)
    with gensparse.applied(net, StyleAligned(group_norm=True, shift=0.7)):
        single = call(net, inputs("sd15", 1))
    assert torch.equal(single, call(net, inputs("sd15", 1)))
    alike = {name: x[:1].expand(3, *x.shape[1:]) for name, x in given.items()}
    with gensparse.applied(net, StyleAligned(group_norm=True, shift=0.7)):
        out = call(net, alike)
    torch.testing.assert_close(out, call(net, alike), rtol=0, atol=2e-5)
    assert torch.equal(call(net, given), plain)


@pytest.mark.parametrize(
    ("count", "share", "plain"), [(8, 0.25, {0, 4}), (8, 0.75, {1, 2, 3, 5, 6, 7}), (8, 0.0, set())]
)
def test_plain_layers_are_spread_as_published(count: int, share: float, plain: set[int]) -> None:
    names = [f"down_blocks.{n}" for n in range(count)]
    assert plain_numbers(names, share) == plain


def test_statistics_of_the_reference_change_features_and_masactrl_masks_split() -> None:
    net, given = denoiser("sd15"), inputs("sd15", 4)
    plain = call(net, given)
    outs = []
    for adain in (False, True):
        with gensparse.applied(net, ReferenceOnly(adain=adain, halves=2)):
            outs.append(call(net, given))
    torch.testing.assert_close(outs[1][[0, 2]], plain[[0, 2]], rtol=0, atol=2e-5)
    assert not torch.allclose(outs[0][1], outs[1][1], atol=1e-3)
    masked = []
    for subjects in (None, one(mask=LEFT, region=RIGHT), one(mask=np.zeros((3, 3)), region=RIGHT)):
        with gensparse.applied(net, MasaCtrl(start=0)) as handle:
            if subjects is not None:
                handle.use(subjects)
            masked.append(call(net, inputs("sd15", 2))[1])
    assert not torch.allclose(masked[0], masked[1], atol=1e-4)
    torch.testing.assert_close(masked[0], masked[2], rtol=0, atol=2e-5)


def test_masactrl_finds_the_subject_by_its_words() -> None:
    net, outs = denoiser("sd15"), []
    for tokens in ((), (1,), (3,)):
        with gensparse.applied(net, MasaCtrl(start=0, halves=2, layers="up_blocks")) as handle:
            handle.use(one(tokens=tokens))
            outs.append(call(net, inputs("sd15", 6)))
            maps = handle._attachments[0].loaded._maps
            assert len(maps) == (1 if tokens else 0)  # of the middle block
            assert all(x.shape == (3, 2) for x in maps)
    plain = call(net, inputs("sd15", 6))
    for out in outs:
        torch.testing.assert_close(out[[0, 3]], plain[[0, 3]], rtol=0, atol=2e-5)
    assert not torch.allclose(outs[0], outs[1], atol=1e-4)
    with gensparse.applied(denoiser("flux"), MasaCtrl()) as handle, pytest.raises(ConfigError, match="in UNets alone"):
        handle.use(one(tokens=(1,)))


def test_clips_are_no_pictures_but_for_tokenflow() -> None:
    from gensparse.methods.subject_run import pictures

    clip = {"sample": torch.zeros(2, 4, 3, 5, 7)}
    assert pictures(clip, frames=True) == 6
    with pytest.raises(ConfigError, match="take tokenflow"):
        pictures(clip)


def test_isolation_needs_regions_and_the_step_draws_anew() -> None:
    net = denoiser("sd15")
    with gensparse.applied(net, IsolationReposition(halves=1)) as handle:
        with pytest.raises(ConfigError, match="where its subjects are"):
            call(net, inputs("sd15", 2))
        with pytest.raises(ConfigError, match="needs the region of cat"):
            handle.use(one(mask=LEFT))
        handle.use(TWO)
        first = call(net, inputs("sd15", 3))
        handle.restart()
        assert torch.equal(call(net, inputs("sd15", 3)), first)
    with gensparse.applied(net, IsolationReposition(seed=1)) as handle:
        handle.use(TWO)
        assert not torch.allclose(call(net, inputs("sd15", 3))[2], first[2], atol=1e-5)


def test_outside_of_all_regions_cross_attention_is_unchanged() -> None:
    from gensparse.methods.isolation_run import mutual

    out, answers = torch.randn(6, 4), torch.randn(2, 6, 4)
    targets = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0]], dtype=torch.bool)
    mixed = mutual(out, answers, targets, 0.9)
    assert torch.equal(mixed[3:], out[3:])
    torch.testing.assert_close(mixed[1], 0.1 * out[1] + 0.9 * answers[:, 1].mean(0))
    assert torch.equal(mutual(out, answers, targets, 0.0), out)


def test_moved_keys_have_the_rotation_of_their_place() -> None:
    from diffusers.models.embeddings import apply_rotary_emb

    from gensparse.processors.rotation import turned_to

    generator = torch.Generator().manual_seed(0)
    angles = torch.rand(12, 4, generator=generator).repeat_interleave(2, 1)
    rotary = (angles.cos(), angles.sin())
    x = torch.randn(1, 12, 3, 8, generator=generator)
    rotated = apply_rotary_emb(x, rotary, sequence_dim=1)[0]
    source, place = torch.tensor([0, 3, 3, 7]), torch.tensor([5, 3, 11, 0])
    there = torch.zeros(1, 12, 3, 8)
    there[0, place] = x[0, source]
    expected = apply_rotary_emb(there, rotary, sequence_dim=1)[0, place]
    torch.testing.assert_close(turned_to(rotated[source], rotary, source, place), expected)


def test_consistory_runs_with_plain_queries_masks_rehearsal_and_bank() -> None:
    pipe, prompts = pipeline("sdxl"), ["a dog runs", "a dog sleeps", "the dog"]
    subjects = one(tokens=[(2,), (2,), (2,)])
    handle = gensparse.apply(pipe, ConsiStory(dropout=0.0), strict=True, subjects=subjects)
    settings = {"num_inference_steps": 5}
    with handle.rehearsal():
        first = draw(pipe, "sdxl", prompts, **settings)
    again = draw(pipe, "sdxl", prompts, **settings)
    assert not torch.allclose(first, again, atol=1e-4), "nothing was injected"
    handle.forget()
    without = draw(pipe, "sdxl", prompts, **settings)
    torch.testing.assert_close(without, first, rtol=0, atol=1e-4)
    with handle.writing(keep_on="cpu"):
        draw(pipe, "sdxl", prompts[:2], **settings)
    extra = draw(pipe, "sdxl", prompts[2:], **settings)
    handle.remove()
    assert not torch.allclose(extra, draw(pipe, "sdxl", prompts[2:], **settings), atol=1e-4)


def test_pictures_that_are_no_anchors_influence_nobody() -> None:
    net = denoiser("sdxl")
    outs = []
    for seed in (0, 7):
        with gensparse.applied(net, ConsiStory(dropout=0.0, blend_steps=0.0)) as handle:
            handle.use(one(tokens=(1,)))
            for step in (0, 1):
                given = inputs("sdxl", 3, step)
                given["sample"][2] = inputs("sdxl", 3, step, seed)["sample"][2] + seed
                out = call(net, given)
            outs.append(out)
    torch.testing.assert_close(outs[0][:2], outs[1][:2], rtol=0, atol=2e-5)
    assert not torch.allclose(outs[0][2], outs[1][2], atol=1e-3)


def test_magicface_segments_sets_regions_and_turns_guidance() -> None:
    pipe, prompts = pipeline("sd15"), ["a girl", "a girl with a hat"]
    outs = {}
    for rate in (False, True):
        method = MagicFace(weights=2.0, inject_step=0, rate=rate)
        with gensparse.applied(pipe, method, strict=True) as handle:
            handle.use(one(mask=LEFT, tokens=(2,)))
            outs[rate] = draw(pipe, "sd15", prompts, num_inference_steps=3)
            loaded = handle._attachments[0].loaded
            found = loaded._segments.found
            assert found.shape[:1] == (1,)
            assert found.shape[2:] == (8, 12)
            assert found.any(dim=1).all() or method.damping is not None
    assert torch.isfinite(outs[True]).all()
    assert not torch.allclose(outs[False][1], outs[True][1], atol=1e-4)
    assert torch.equal(outs[False][0], outs[True][0]) or torch.allclose(outs[False][0], outs[True][0], atol=1e-5)


def test_magicface_regions_that_cover_all_equal_its_first_stage_and_empty_ones_are_plain() -> None:
    net = denoiser("sd15")
    plain = call(net, inputs("sd15", 2, 1))
    outs = {}
    for name, region, last in (
        ("all", np.ones((4, 4)), 0),
        ("none", np.zeros((4, 4)), 0),
        ("first", np.ones((4, 4)), 9),
    ):
        with gensparse.applied(net, MagicFace(inject_step=last)) as handle:
            handle.use(one(mask=LEFT, region=region))
            call(net, inputs("sd15", 2, 0))
            outs[name] = call(net, inputs("sd15", 2, 1))
    torch.testing.assert_close(outs["all"], outs["first"], rtol=0, atol=1e-5)
    assert torch.equal(outs["none"], plain)
    assert not torch.allclose(outs["all"][1], plain[1], atol=1e-3)


def test_frames_of_clips_see_their_group() -> None:
    layout = Layout.video(5, 2, 3, text=2)
    mask = TokenFlow(group=2).pattern(layout, At(kind="shared")).dense_mask(layout)[0]
    frames = np.repeat(np.arange(5), 6) // 2
    start = layout.starts[layout.target]
    picture = slice(start, start + 30)
    assert (mask[picture, picture] == (frames[:, None] == frames)).all()
    text = np.ones(32, bool)
    text[picture] = False
    assert mask[text].all()
    assert mask[:, text].all()
    net = denoiser("wan")
    given = tiny_inputs("wan", (3, 4, 6))
    plain = call(net, given)
    with gensparse.applied(net, TokenFlow(group=9), strict=True):
        torch.testing.assert_close(call(net, given), plain, rtol=0, atol=2e-5)
    with gensparse.applied(net, TokenFlow(group=2), strict=True):
        assert not torch.allclose(call(net, given), plain, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("cls", "settings", "words"),
    [
        (FreeCustom, {"subjects": 0}, "subjects=0"),
        (FreeCustom, {"weights": (1.0, 2.0), "subjects": 3}, "weights="),
        (FreeCustom, {"weights": float("nan")}, "weights=nan"),
        (FreeCustom, {"style_fidelity": 1.5}, r"style_fidelity=1\.5"),
        (FreeCustom, {"layers": "15-10"}, "layers='15-10'"),
        (FreeCustom, {"layers": ""}, "layers=''"),
        (FreeCustom, {"halves": 3}, "halves=3"),
        (FreeCustom, {"start": -1}, "start=-1"),
        (StoryDiffusion, {"rate": 2}, "rate=2"),
        (StoryDiffusion, {"start": None}, "start=None"),
        (StyleAligned, {"shift": float("inf")}, "shift=inf"),
        (StyleAligned, {"full": 1}, "full=1"),
        (MasaCtrl, {"union": "yes"}, "union='yes'"),
        (ReferenceOnly, {"feature_weight": 3}, "feature_weight=3"),
        (IsolationReposition, {"dropout": -0.1}, "dropout="),
        (ConsiStory, {"anchors": 0}, "anchors=0"),
        (MagicFace, {"damping": 2}, "damping=2"),
        (TokenFlow, {"group": 0}, "group=0"),
    ],
)
def test_bad_settings_are_refused(cls: type[Method], settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        cls(**settings)


@pytest.mark.parametrize(
    ("what", "model", "words"),
    [
        (FreeCustom(), "wan", "knows UNet"),
        (FreeCustom(layers="99"), "sd15", "takes none of the 7"),
        (FreeCustom(layers="up_blocks.7"), "sd15", "takes none"),
        (ConsiStory(), "flux", "not FLUX.1"),
        (MagicFace(), "sd3", "not Stable Diffusion 3"),
        (StyleAligned(full=True), "flux", "without text"),
        (StyleAligned(group_norm=True), "sd3", "needs a UNet"),
        (TokenFlow(source=True), "flux", "frame by frame"),
        (TokenFlow(), "auraflow", "not AuraFlow"),
        (StyleAligned(plain_layers=1.0), "sd15", "leaves no layer"),
    ],
)
def test_models_that_do_not_fit_are_refused(what: Method, model: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        gensparse.apply(denoiser(model), what)


def test_batches_and_subjects_that_do_not_fit_are_refused() -> None:
    net = denoiser("sd15")
    with gensparse.applied(net, FreeCustom(subjects=3)) as handle:
        with pytest.raises(ConfigError, match=r"has 3 reference picture\(s\).*the call has 3 per half"):
            call(net, inputs("sd15", 3))
        with pytest.raises(ConfigError, match="2 are named"):
            handle.use(TWO)
        with pytest.raises(ConfigError, match=r"pass gensparse\.Subjects"):
            handle.use("cat")
    with gensparse.applied(net, FreeCustom(halves=2)), pytest.raises(ConfigError, match="no 2 equal halves"):
        call(net, inputs("sd15", 3))
    with gensparse.applied(net, FreeCustom(weights=(1.0, 2.0))), pytest.raises(ConfigError, match="2 weights for 1"):
        call(net, inputs("sd15", 2))
    with gensparse.applied(net, MasaCtrl(start=0)) as handle:
        with pytest.raises(ConfigError, match="1 reference"):
            handle.use(TWO)
        with pytest.raises(ConfigError, match="mask and region"):
            handle.use(one(mask=LEFT))
    with gensparse.applied(net, FreeCustom()) as handle:
        handle.use(one(latents=torch.zeros(4, 3, 3)))
        with pytest.raises(ConfigError, match="encode the picture"):
            call(net, inputs("sd15", 2))
        handle.use(one(latents=torch.zeros(4, 4, 6)))
        with pytest.raises(ConfigError, match="apply it to the pipeline"):
            call(net, inputs("sd15", 2))
    with gensparse.applied(net, "agentsd") as handle, pytest.raises(ConfigError, match="no use for subjects"):
        handle.use(TWO)
    with pytest.raises(ConfigError, match="not on the model any more"):
        handle.use(TWO)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Concept(""), "name=''"),
        (lambda: Concept("a", latents=torch.zeros(1, 2, 3, 4)), "latents"),
        (lambda: Concept("a", tokens=(-1,)), "tokens"),
        (lambda: Concept("a", tokens=3), "tokens"),
        (lambda: Subjects(Concept("a"), Concept("a")), "a name of its own"),
        (lambda: Subjects(Concept("a"), Concept("b", latents=torch.zeros(2, 3))), "have no latents"),
        (lambda: Subjects("a"), "pass Concept"),
        (lambda: TWO["bird"], "no subject 'bird'"),
    ],
)
def test_bad_subjects_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_words_are_found_in_prompts() -> None:
    pipe = pipeline("sd15")
    prompt = "a cat and a cat"
    whole = pipe.tokenizer(prompt).input_ids
    word = pipe.tokenizer("cat").input_ids[1:-1]
    places = token_places(pipe.tokenizer, prompt, "cat")
    assert [whole[n] for n in places] == word
    assert max(places) == len(whole) - 2
    assert token_places(pipe.tokenizer, prompt, "dog") == ()
    assert token_places(pipe.tokenizer, prompt, "") == ()


def test_half_precision_autoencoders_that_overflow_encode_in_full_precision() -> None:
    pipe, picture = pipeline("sd15"), torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    full = encode_picture(pipe, picture, 32, 48)
    assert full.shape == (4, 16, 24)
    assert pipe.vae.config.force_upcast
    pipe.vae.half()
    weights = [x.clone() for x in pipe.vae.parameters()]
    half = encode_picture(pipe, picture, 32, 48)
    torch.testing.assert_close(half.float(), full, rtol=0, atol=2e-2)
    assert all(
        torch.equal(a, b) and b.dtype == torch.float16 for a, b in zip(weights, pipe.vae.parameters(), strict=True)
    )
    with pytest.raises(ConfigError, match="has no vae"):
        encode_picture(nn.Module(), picture, 32, 48)


def test_packing_is_that_of_flux() -> None:
    from diffusers import FluxPipeline

    x = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    assert torch.equal(pack(x), FluxPipeline._pack_latents(x, 2, 3, 4, 6))


@pytest.mark.parametrize(
    ("layers", "taken"),
    [
        ("all", {0, 1, 2}),
        ("1", {1}),
        ("0-1", {0, 1}),
        ("up_blocks", {2}),
        ("down_blocks.0+2", {0, 2}),
        ("attentions.1", {1}),
    ],
)
def test_layers_by_number_and_by_name(layers: str, taken: set[int]) -> None:
    names = ["down_blocks.0.attentions.0.attn1", "mid_block.attentions.1.attn1", "up_blocks.1.attentions.0.attn1"]
    assert {n for n, name in enumerate(names) if takes(layers, n, name)} == taken


def test_published_layers_of_models() -> None:
    """By name on models of the published depth, whose numbers are in the order of the calls: down, middle, up."""

    def blocks(count: int, of: str, per: int) -> list[str]:
        return [f"{of}.{b}.attentions.{a}.transformer_blocks.0.attn1" for b in range(count) for a in range(per)]

    sd15 = [*blocks(3, "down_blocks", 2), "mid_block.attentions.0.transformer_blocks.0.attn1"]
    sd15 += blocks(4, "up_blocks", 3)[3:]
    subject = Subject("UNet", nn.Module())
    assert len(sd15) == 16
    auto = FreeCustom().auto_layers(subject, sd15)
    assert auto == "up_blocks.2+up_blocks.3"
    assert [n for n, name in enumerate(sd15) if takes(auto, n, name)] == list(range(10, 16))
    assert MasaCtrl().auto_layers(subject, sd15) == "10-15"
    sdxl = ["down"] * 24 + ["mid"] * 10 + ["up_blocks.0.attentions.0"] * 30 + ["up_blocks.1.attentions.0"] * 6
    assert MasaCtrl().auto_layers(subject, sdxl) == "44-69"
    assert IsolationReposition().auto_layers(subject, sdxl) == "36-69"
    assert StoryDiffusion().auto_layers(subject, sdxl) == "up_blocks.0+up_blocks.1"


# ------------------------------------------------------------------------------------------------------------ survival
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize(
    "what", [StoryDiffusion(start=0, gate=1.0), StyleAligned(group_norm=True), ReferenceOnly()], ids=repr
)
def test_copies_carry_the_method(how: str, what: Method) -> None:
    net, given = tiny_denoiser("sd15"), inputs("sd15", 3)
    plain = call(net, given)
    gensparse.apply(net, what)
    out = call(net, given)
    other = copy.deepcopy(net) if how == "deepcopy" else pickle.loads(pickle.dumps(net))
    gensparse.remove(net)
    assert torch.equal(call(net, given), plain)
    torch.testing.assert_close(call(other, given), out, rtol=0, atol=1e-6)
    gensparse.remove(other)
    assert torch.equal(call(other, given), plain)


@pytest.mark.parametrize(
    ("model", "weight", "dropout", "both"),
    [("flux", 1.0, 0.0, False), ("sd15", 3.0, 0.5, True), ("sd3", 3.0, 0.5, True)],
)
def test_weights_that_are_left_out_are_published_ones_or_those_of_the_family(model, weight, dropout, both) -> None:
    net = denoiser(model)
    subject = Subject(family_of(net).name, net)
    assert FreeCustom().resolved(subject).weights == weight
    assert FreeCustom(weights=(2.0, 0.0)).resolved(subject).weights == (2.0, 0.0)
    resolved = IsolationReposition().resolved(subject)
    assert (resolved.dropout, resolved.unconditional) == (dropout, both)
    resolved = IsolationReposition(dropout=0.25, unconditional=not both).resolved(subject)
    assert (resolved.dropout, resolved.unconditional) == (0.25, not both)
    assert parse_method("freecustom:weights=none") == FreeCustom()
    assert parse_method("isolation_reposition:dropout=none,unconditional=none") == IsolationReposition()


def test_weights_that_are_left_out_act_like_those_that_are_given() -> None:
    net, given = denoiser("flux"), inputs("flux", 3)
    outs = []
    for method in (
        FreeCustom(layers="all"),
        FreeCustom(layers="all", weights=1.0),
        FreeCustom(layers="all", weights=3),
    ):
        with gensparse.applied(net, method, subjects=TWO):
            outs.append(call(net, given))
    assert torch.equal(outs[0], outs[1])
    assert not torch.allclose(outs[0], outs[2], atol=1e-4)
