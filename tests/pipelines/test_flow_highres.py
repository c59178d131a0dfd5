"""Stable Diffusion 3 and QwenImage in stages, end to end on tiny pipelines whose native size is 32 pixels."""

import copy
import inspect

import numpy as np
import pytest
import torch
from diffusers import QwenImageImg2ImgPipeline, StableDiffusion3Img2ImgPipeline
from diffusers.callbacks import SD3CFGCutoffCallback
from peft import LoraConfig

from gensparse.errors import ConfigError, NumericsError
from gensparse.highres import vae_tiles
from gensparse.highres.stage_store import FolderStageStore
from gensparse.highres.stages import Stage
from gensparse.pipelines import (
    FluxHighresPipeline,
    QwenImageHighresPipeline,
    SD3HighresPipeline,
    SD15HighresPipeline,
    SDXLHighresPipeline,
    highres_class,
)
from gensparse.testing.tiny import tiny_pipeline

PIPELINES = {"sd3": SD3HighresPipeline, "qwenimage": QwenImageHighresPipeline}
IMG2IMG = {"sd3": StableDiffusion3Img2ImgPipeline, "qwenimage": QwenImageImg2ImgPipeline}
GUIDED = {
    "sd3": {"guidance_scale": 3.0, "negative_prompt": "red"},
    "qwenimage": {"true_cfg_scale": 2.5, "negative_prompt": "a red thing"},
}
UNGUIDED = {"sd3": {"guidance_scale": 1.0}, "qwenimage": {}}


class MemoryStore(dict):
    def load(self, index):
        return self.get(index)

    def save(self, index, result):
        self[index] = result


def stock_of(name: str):
    """diffusers' own pipeline."""
    pipe = tiny_pipeline(name)
    if name == "qwenimage":
        config = {"use_dynamic_shifting": True, "base_image_seq_len": 16, "max_image_seq_len": 64}
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **config, shift_terminal=0.02)
        statistics = {"latents_mean": [0.3, -0.7, 0.1, -0.2], "latents_std": [1.7, 0.6, 1.2, 2.3]}
        pipe.vae.register_to_config(**statistics)
    else:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=3.0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=PIPELINES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def stock(name):
    return stock_of(name)


@pytest.fixture
def pipe(name, stock):
    return highres(stock)


@pytest.fixture(scope="module")
def sd3():
    return stock_of("sd3")


@pytest.fixture(scope="module")
def qwen():
    return stock_of("qwenimage")


def highres(stock):
    out = highres_class(stock).from_pipe(stock)
    out.set_progress_bar_config(disable=True)
    return out


@pytest.fixture
def call(name):
    """Arguments of a short guided call; every use draws from the same seed."""
    return lambda seed=3, **more: {**arguments(seed), **GUIDED[name], **more}


def arguments(seed: int = 3, **more):
    generator = torch.Generator().manual_seed(seed)
    short = {"prompt": "a cat", "num_inference_steps": 4, "max_sequence_length": 16, "output_type": "pt"}
    return {**short, "generator": generator, **more}


def plain_stages(*sizes: tuple[int, int], steps: int = 4, last: int = 2) -> list[Stage]:
    """Stages without guidance by the smaller picture, sharpening and patch shift."""
    first, *larger = sizes
    return [Stage(*first, steps), *(Stage(*size, last, sharpen=0.0) for size in larger)]


def image_of(height: int, width: int) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(9))


def state_of(pipe) -> tuple:
    """Everything a call must leave as it was."""
    model = pipe.transformer
    own = model.pos_embed
    tables = {k: v.clone() for k, v in vars(own).items() if isinstance(v, torch.Tensor)}
    tables |= {k: v.clone() for k, v in own.state_dict().items()}
    facts = {k: v for k, v in vars(own).items() if isinstance(v, int | float | str | list)}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    processors = {n: (id(p), type(p)) for n, p in model.attn_processors.items()}
    scheduler = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in pipe.scheduler.__dict__.items()}
    return (id(own), facts, hooks, processors, str(scheduler), list(model.state_dict())), tables


def assert_same_state(pipe, before) -> None:
    facts, tables = state_of(pipe)
    assert facts == before[0]
    assert tables.keys() == before[1].keys()
    assert len(tables) >= 1
    assert all(torch.equal(tables[k], before[1][k]) for k in tables)


# --- the native stage


@pytest.mark.parametrize("size", [(32, 32), (28, 36), (16, 64)])
@pytest.mark.parametrize("output_type", ["pt", "latent"])
def test_native_size_is_diffusers_pipeline_to_the_bit(stock, pipe, call, size, output_type):
    more = {"height": size[0], "width": size[1], "output_type": output_type}
    expected = stock(**call(**more)).images
    assert torch.equal(pipe(**call(**more)).images, expected)
    assert torch.equal(pipe(**call(**more, highres="none", attention="dense")).images, expected)


def test_several_prompts_are_diffusers_to_the_bit(stock, pipe, call):
    more = {"height": 32, "width": 24, "prompt": ["a cat", "two big dogs"], "negative_prompt": ["red", "blue"]}
    more["num_images_per_prompt"] = 2
    assert torch.equal(pipe(**call(**more)).images, stock(**call(**more)).images)


def test_given_noise_and_sigmas_without_guidance_are_diffusers_to_the_bit(name, stock, pipe):
    shape = (1, 4, 16, 16) if name == "sd3" else (1, 64, 16)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    more = {"height": 32, "width": 32, "latents": noise, "sigmas": [1.0, 0.6, 0.3], "num_inference_steps": 3}
    more |= UNGUIDED[name]
    assert torch.equal(pipe(**arguments(**more)).images, stock(**arguments(**more)).images)


def test_embeddings_can_be_given(name, pipe, call):
    more = {"height": 48, "width": 40, "stages": plain_stages((32, 24), (48, 40))}
    with torch.no_grad():
        if name == "sd3":
            names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
            encoded = pipe.encode_prompt("a cat", None, None, negative_prompt="red", max_sequence_length=16)
            given = dict(zip(names, encoded, strict=True))
        else:
            embeds, mask = pipe.encode_prompt("a cat", max_sequence_length=16)
            negative, negative_mask = pipe.encode_prompt("a red thing", max_sequence_length=16)
            given = {"prompt_embeds": embeds, "prompt_embeds_mask": mask}
            given |= {"negative_prompt_embeds": negative, "negative_prompt_embeds_mask": negative_mask}
    images = pipe(**call(**more, prompt=None, **{**given, "negative_prompt": None})).images
    assert torch.equal(images, pipe(**call(**more)).images)


def test_skipped_layers_and_callbacks_of_diffusers_work_as_there(sd3):
    pipe = highres(sd3)
    skip = {"skip_guidance_layers": [0], "skip_layer_guidance_stop": 0.6}
    for more in (skip, {"callback_on_step_end": SD3CFGCutoffCallback(None, 1)}):
        settings = {**GUIDED["sd3"], "height": 32, "width": 32, **more}
        expected = sd3(**arguments(**settings)).images
        assert torch.equal(pipe(**arguments(**settings)).images, expected)
        assert not torch.equal(expected, sd3(**arguments(**GUIDED["sd3"], height=32, width=32)).images)


def test_guidance_that_a_callback_ended_acts_again_in_the_next_stage(sd3):
    pipe, stages, batches = highres(sd3), plain_stages((32, 32), (48, 48)), []
    look = pipe.transformer.register_forward_pre_hook(
        lambda m, a, k: batches.append(len(k["hidden_states"])), with_kwargs=True
    )
    try:
        callback = SD3CFGCutoffCallback(None, 1)
        pipe(**arguments(**GUIDED["sd3"], stages=stages, attention="dense", callback_on_step_end=callback))
    finally:
        look.remove()
    assert batches == [2, 2, 1, 1, 2, 2]


# --- the cascade


@pytest.mark.parametrize("attention", ["dense", "neighborhood:window=5x3"])
@pytest.mark.parametrize("size", [(124, 76), (40, 100)])
def test_any_size_comes_out(pipe, call, size, attention):
    images = pipe(**call(height=size[0], width=size[1], attention=attention)).images
    assert images.shape == (1, 3, *size)
    assert torch.isfinite(images).all()
    assert images.std() > 0.01
    sizes = [(stage.height, stage.width) for stage in pipe.plan(*size)]
    assert len(sizes) > 1
    assert [(r["height"], r["width"]) for r in pipe.attention_report] == sizes
    assert pipe.attention_report[0]["method"] == "dense"
    for report in pipe.attention_report[1:]:
        assert (report["method"] == "dense") == (attention == "dense")
        assert attention == "dense" or (report["sparse"] == 2 and report["calls"]["sparse"] > 0)


def test_second_attentions_of_dual_blocks_are_sparse_too():
    pipe = highres(stock_of("sd35"))
    images = pipe(**arguments(**GUIDED["sd3"], height=44, width=60, attention="neighborhood:window=5x3")).images
    assert images.shape == (1, 3, 44, 60)
    assert pipe.attention_report[1]["sparse"] == 3


def test_window_over_the_whole_grid_equals_dense(pipe, call):
    dense = pipe(**call(height=64, width=44, attention="dense")).images
    window = pipe(**call(height=64, width=44, attention="neighborhood:window=99x99")).images
    torch.testing.assert_close(window, dense, rtol=0, atol=1e-4)


def test_batch_equals_single_pictures(pipe, call):
    stages = plain_stages((32, 24), (44, 36))
    generators = [torch.Generator().manual_seed(s) for s in (1, 2)]
    more = {"stages": stages, "attention": "dense"}
    both = pipe(**call(prompt=["a cat", "two dogs"], negative_prompt=["red", "blue"], generator=generators, **more))
    for k, (prompt, negative) in enumerate([("a cat", "red"), ("two dogs", "blue")]):
        alone = pipe(**call(k + 1, prompt=prompt, negative_prompt=negative, **more))
        torch.testing.assert_close(both.images[k : k + 1], alone.images, rtol=0, atol=2e-4)


def test_without_guidance_a_picture_is_diffusers_img2img(name, stock, call):
    """From the same noise, with the model's own positions, one static time shift and no sharpening."""
    own = copy.copy(stock)
    own.scheduler = type(stock.scheduler).from_config(
        stock.scheduler.config, use_dynamic_shifting=False, shift=3.0, shift_terminal=None
    )
    pipe, image, side = highres(own), image_of(60, 44), {"height": 60, "width": 44}
    stages = plain_stages((32, 32), (60, 44))
    images = pipe(**call(image=image, stages=stages, attention="dense", position="base")).images
    reference = IMG2IMG[name].from_pipe(own, dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    with torch.no_grad():
        latents = pipe._model_latents(vae_tiles.encoded(pipe.vae, image * 2 - 1))
    expected = reference(**call(image=latents, strength=0.5, **side)).images
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


def test_stages_without_weights_never_look_at_the_smaller_run(pipe, call):
    """alpha = beta = 0: whatever estimates the native stage left behind, the bits are the same."""
    stages = plain_stages((32, 32), (60, 44))
    store = MemoryStore()
    expected = pipe(**call(stages=stages, stage_store=store)).images
    spoiled = MemoryStore({0: store[0]})
    for x0 in spoiled[0].history.values():
        x0.fill_(float("inf"))
    assert len(spoiled[0].history) == 2
    assert torch.equal(pipe(**call(stages=stages, stage_store=spoiled)).images, expected)
    led = [stages[0], Stage(60, 44, 2, alpha=0.8, sharpen=0.0)]
    assert not torch.equal(pipe(**call(stages=led)).images, expected)


def test_stages_without_the_negative_prompt_are_unguided_to_the_bit(name, pipe, call):
    stages = plain_stages((32, 32), (44, 36))
    free = pipe(**call(stages=stages, guidance_stages=())).images
    assert torch.equal(free, pipe(**arguments(**UNGUIDED[name], stages=stages)).images)
    every, first = (pipe(**call(stages=stages, guidance_stages=which)).images for which in ("all", (0,)))
    assert torch.equal(every, pipe(**call(stages=stages)).images)
    assert not torch.equal(first, every)
    assert not torch.equal(first, free)


def test_every_knob_changes_the_picture(pipe, call):
    store, own = MemoryStore(), {"alpha": 0.8, "beta": 0.5, "patch_shift": True}

    def picture(stage, **more):
        stages = [Stage(32, 32, 4), Stage(60, 44, 3, **{**own, **stage})]
        kept = MemoryStore({k: v for k, v in store.items() if k == 0})  # the native stage is the same for all
        out = pipe(**call(stages=stages, stage_store=kept, **{"attention": "dense", **more})).images
        store.update(kept)
        return out

    first = picture({})
    for knob in ({"alpha": 0.2}, {"beta": 0.1}, {"patch_shift": False}, {"sharpen": 0.0}):
        assert not torch.equal(picture(knob), first), knob
    for knob in ({"position": "base"}, {"attention": "neighborhood:window=3x3"}):
        assert not torch.equal(picture({}, **knob), first), knob
    assert torch.equal(picture({}), first)


@pytest.mark.parametrize("position", ["ntk", "ntk10", "imax_clip", "yarn", "dy_ntk", "dy_yarn", "interpolate"])
def test_rotary_rules_run_and_matter(qwen, position):
    pipe, more = highres(qwen), {"stages": plain_stages((32, 32), (60, 44)), "attention": "dense"}
    images = pipe(**arguments(**more, position=position)).images
    assert torch.isfinite(images).all()
    assert not torch.equal(images, pipe(**arguments(**more, position="base")).images)


def test_sd3_goes_beyond_the_end_of_its_table(sd3):
    """The table has 32 entries per side, the picture 37 tokens."""
    pipe, stages = highres(sd3), plain_stages((32, 24), (148, 92))
    assert pipe.transformer.config.pos_embed_max_size == 32
    images = pipe(**arguments(**GUIDED["sd3"], stages=stages, attention="dense")).images
    assert images.shape == (1, 3, 148, 92)
    for wrong in ({"stages": stages, "position": "base"}, {"height": 148, "width": 92, "highres": "none"}):
        with pytest.raises(ConfigError, match="37 tokens"):
            pipe(**arguments(**wrong))


# --- a given picture


def test_strength_zero_only_enlarges(pipe, call):
    image = image_of(60, 44)
    images = pipe(**call(image=image, height=60, width=44, strength=0.0)).images
    with torch.no_grad():
        expected = pipe.vae(vae_input(pipe, image)).sample.reshape(image.shape)
    torch.testing.assert_close(images, (expected * 0.5 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


def vae_input(pipe, image: torch.Tensor) -> torch.Tensor:
    pixels = image * 2 - 1
    return pixels[:, :, None] if isinstance(pipe, QwenImageHighresPipeline) else pixels


def test_pictures_of_any_size_and_strength(pipe, call):
    weak, strong = (pipe(**call(image=image_of(17, 23), height=64, width=84, strength=s)).images for s in (0.3, 1.0))
    assert weak.shape == strong.shape == (1, 3, 64, 84)
    assert torch.isfinite(weak).all()
    assert not torch.equal(weak, strong)


# --- resume, interrupt, callbacks


def test_resumed_run_gives_the_same_bits(pipe, call, tmp_path):
    size, store = {"height": 124, "width": 76}, MemoryStore()
    fresh = pipe(**call(**size)).images
    assert torch.equal(pipe(**call(**size, stage_store=store)).images, fresh)
    assert sorted(store) == [0, 1, 2]
    for finished in ((0,), (1,), (2,)):
        folder = FolderStageStore(tmp_path / str(finished[0]))
        for k in finished:
            folder.save(k, store[k])
        seen = []
        note = {"callback_on_stage_end": lambda p, r, seen=seen: seen.append(r.index)}
        assert torch.equal(pipe(**call(**size, stage_store=folder, **note)).images, fresh)
        assert seen == list(range(max(finished) + 1, 3))


def test_what_a_callback_changes_lasts_as_long_as_its_stage(pipe, call):
    """So that a resumed run sees what the first one saw."""

    def mute(p, i, t, values):
        return {"prompt_embeds": values["prompt_embeds"] * 0} if p.stage == 0 else {}

    more = {"callback_on_step_end": mute, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    stages, store = plain_stages((32, 32), (44, 36)), MemoryStore()
    fresh = pipe(**call(stages=stages, stage_store=store, **more)).images
    assert not torch.equal(fresh, pipe(**call(stages=stages)).images)
    assert torch.equal(pipe(**call(stages=stages, stage_store=MemoryStore({0: store[0]}), **more)).images, fresh)


def test_interrupted_run_leaves_no_state(pipe, call):
    before, store, steps = state_of(pipe), MemoryStore(), []

    def stop(p, i, t, values):
        steps.append((p.stage, i, p.transformer.pos_embed is not own))
        p._interrupt = (p.stage, i) == (1, 0)
        return values

    own = pipe.transformer.pos_embed
    more = {"height": 76, "width": 60, "attention": "neighborhood:window=5x5"}
    images = pipe(**call(**more, stage_store=store, callback_on_step_end=stop)).images
    assert steps[0] == (0, 0, False)
    assert steps[-1] == (1, 0, True)
    assert images.shape[-2:] == tuple(getattr(pipe.plan(76, 60)[1], side) for side in ("height", "width"))
    assert sorted(store) == [0]
    assert_same_state(pipe, before)
    fresh = pipe(**call(**more)).images
    assert torch.equal(pipe(**call(**more, stage_store=store)).images, fresh)
    assert_same_state(pipe, before)


def test_everything_is_as_before_after_an_exception(pipe, call):
    before = state_of(pipe)

    def fail(p, i, t, values):
        if p.stage == 1:
            raise RuntimeError("stop here")
        return values

    with pytest.raises(RuntimeError, match="stop here"):
        pipe(**call(height=60, width=44, attention="neighborhood:window=5x5", callback_on_step_end=fail))
    assert_same_state(pipe, before)


def test_nan_is_an_error_that_names_stage_and_step(pipe, call):
    def spoil(p, i, t, values):
        return {"latents": values["latents"] * float("nan")} if (p.stage, i) == (0, 3) else values

    with pytest.raises(NumericsError, match=r"Stage 1, step 0"):
        pipe(**call(height=60, width=44, callback_on_step_end=spoil, attention="dense"))


def test_previews_and_sketches(pipe, call):
    seen = []

    def step(p, i, t, values):
        seen.append(p.sketch(values["clean"], max_side=16).size)
        return {}

    def stage(p, result):
        seen.append(p.preview(result, max_side=24)[0].size)

    names = {"callback_on_step_end": step, "callback_on_step_end_tensor_inputs": ["latents", "clean"]}
    pipe(**call(stages=plain_stages((32, 24), (60, 44)), **names, callback_on_stage_end=stage))
    assert seen == [(12, 16)] * 4 + [(18, 24)] + [(12, 16)] * 2 + [(18, 24)]


# --- weights


def test_lora_is_kept_and_scaled(name, call):
    stock = stock_of(name)
    plain = highres(stock)(**call(height=60, width=44)).images
    stock.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights="gaussian"))
    with torch.no_grad():
        for key, weight in stock.transformer.named_parameters():
            if "lora_B" in key:
                weight.fill_(0.3)
    pipe = highres(stock)
    assert not torch.equal(pipe(**call(height=60, width=44)).images, plain)
    key = "joint_attention_kwargs" if name == "sd3" else "attention_kwargs"
    silent = pipe(**call(height=60, width=44, **{key: {"scale": 0.0}})).images
    torch.testing.assert_close(silent, plain, rtol=0, atol=1e-4)


def test_facts_survive_saving_loading_and_sharing(name, stock, tmp_path):
    cls, facts = PIPELINES[name], {"native_size": 48, "num_inference_steps": 5, "cascade": {"alpha": [0.7]}}
    pipe = cls.from_pipe(stock, gensparse_config=facts)
    assert pipe.transformer is stock.transformer
    assert (pipe.token_size, pipe.native_side, pipe.native_size) == (4, 12, 48)
    stages = pipe.plan(96, 72)
    assert [stage.steps for stage in stages] == [5, 3]
    assert (stages[1].alpha, stages[1].guidance_factor, stages[1].patch_shift) == (0.7, 1.0, True)
    pipe.save_pretrained(tmp_path)
    assert cls.from_pretrained(tmp_path).gensparse_config == facts


@torch.no_grad()
def test_latents_of_qwens_autoencoder_go_both_ways(qwen):
    pipe, image = highres(qwen), image_of(32, 48) * 2 - 1
    latents = pipe._model_latents(vae_tiles.encoded(pipe.vae, image))
    reference = QwenImageImg2ImgPipeline.from_pipe(qwen, dtype=torch.float32)
    deterministic = copy.copy(reference.vae.encode(image[:, :, None]).latent_dist)
    mean = torch.tensor(pipe.vae.config.latents_mean).view(1, 4, 1, 1)
    std = torch.tensor(pipe.vae.config.latents_std).view(1, 4, 1, 1)
    torch.testing.assert_close(latents, (deterministic.mode()[:, :, 0] - mean) / std, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(pipe._unscaled(latents), deterministic.mode()[:, :, 0], rtol=1e-5, atol=1e-5)
    stage = Stage(32, 48, 0)
    assert torch.equal(pipe._unpack(pipe._pack(latents), stage), latents)


def test_tiles_do_not_change_the_picture(pipe, call):
    more = {"stages": plain_stages((32, 24), (124, 76)), "attention": "dense"}
    whole = pipe(**call(**more, vae_tile=None)).images
    torch.testing.assert_close(pipe(**call(**more, vae_tile=64)).images, whole, rtol=0, atol=1e-3)
    bytes_ = np.asarray(pipe(**call(**more, vae_tile=64, output_type="pil")).images[0])
    torch.testing.assert_close(
        torch.from_numpy(bytes_.copy()).movedim(-1, 0)[None].float() / 255, whole, rtol=0, atol=3e-3
    )
    feathered = pipe(**call(**more, vae_tile="feather:64")).images
    assert feathered.shape == whole.shape
    assert torch.isfinite(feathered).all()


# --- what is refused


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"height": 66}, "multiples of 4"),
        ({"height": 66, "highres": "none"}, "multiples of 4"),
        ({"stages": [Stage(32, 32, 4), Stage(66, 64, 2)]}, "multiples of 4"),
        ({"stages": [Stage(32, 32, 4), Stage(64, 64, 5)]}, "only 4"),
        ({"stages": plain_stages((32, 32), (64, 64)), "highres": "none"}, "at once"),
        ({"strength": 0.5}, "without an image"),
        ({"position": "magic"}, "position"),
        ({"attention": "magic"}, "magic"),
        ({"highres": "magic"}, "magic"),
        ({"guidance_stages": "some"}, "guidance_stages"),
        ({"vae_tile": 8}, "vae_tile"),
        ({"output_type": "gif"}, "output_type"),
        ({"image": torch.rand(1, 3, 8, 8), "strength": 2.0}, "strength"),
    ],
)
def test_wrong_settings_are_refused_before_the_first_step(pipe, call, wrong, match, monkeypatch):
    monkeypatch.setattr(pipe.transformer, "forward", lambda *a, **k: pytest.fail("the model ran"))
    with pytest.raises(ConfigError, match=match):
        pipe(**call(**{"height": 64, "width": 64, **wrong}))


def test_sd3_has_no_direct_way_and_no_rotary_rules(sd3):
    pipe = highres(sd3)
    for wrong, words in (({"highres": "direct"}, "table of positions"), ({"position": "yarn"}, "interpolate, base")):
        with pytest.raises(ConfigError, match=words):
            pipe(**arguments(height=64, width=64, **wrong))


def test_families_without_stages_are_named(sd3, qwen):
    expected = {"sd3": SD3HighresPipeline, "qwenimage": QwenImageHighresPipeline, "flux": FluxHighresPipeline}
    expected |= {"sdxl": SDXLHighresPipeline, "sd15": SD15HighresPipeline}
    for name, cls in expected.items():
        assert highres_class(tiny_pipeline(name)) is cls
    cogview = tiny_pipeline("cogview4")
    for meet in (highres_class, SD3HighresPipeline.from_pipe, FluxHighresPipeline.from_pipe):
        with pytest.raises(ConfigError, match=r"CogView4Pipeline .* no stages yet, .*; FLUX.1, Stable Diffusion 3"):
            meet(cogview)
    with pytest.raises(ConfigError, match=r"use QwenImageHighresPipeline\.from_pipe"):
        SD3HighresPipeline.from_pipe(qwen)
    edit = type("QwenImageEditPipeline", (type(qwen),), {})(**qwen.components)
    with pytest.raises(ConfigError, match="QwenImageEditPipeline takes pictures beside"):
        QwenImageHighresPipeline.from_pipe(edit)


@pytest.mark.parametrize("cls", PIPELINES.values())
def test_signatures_are_uniform(cls):
    """What is new comes in the same order behind diffusers' own arguments, as in FluxHighresPipeline, which alone has
    ControlNets."""

    def own(pipeline):
        call = inspect.signature(pipeline.__call__).parameters.values()
        return [p.name for p in call if p.kind is p.KEYWORD_ONLY]

    assert own(cls) == [name for name in own(FluxHighresPipeline) if not name.startswith("control")]
    stock = next(base for base in cls.__mro__ if base.__module__.startswith("diffusers.pipelines"))
    names = [n for n, p in inspect.signature(cls.__call__).parameters.items() if p.kind is not p.KEYWORD_ONLY]
    assert names == list(inspect.signature(stock.__call__).parameters)
