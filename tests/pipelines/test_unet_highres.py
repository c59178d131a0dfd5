"""SDXL and SD 1.5 in stages, end to end on tiny pipelines whose native size is 32 pixels (16 latent cells)."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)

import gensparse
from gensparse.errors import ConfigError, NumericsError
from gensparse.highres.frequency import haar_low_pass
from gensparse.highres.rectifiedhr import Recipe
from gensparse.highres.stage_store import FolderStageStore
from gensparse.highres.stages import Stage
from gensparse.methods import FreeScale
from gensparse.pipelines import SD15HighresPipeline, SDXLHighresPipeline
from gensparse.pipelines.unet_stages import Draws, noise_levels
from gensparse.pipelines.unet_ways import WAYS, DemoFusion, FreeScaleCascade, RectifiedHR, as_way
from gensparse.testing.tiny import tiny_pipeline

PIPELINES = {"sdxl": SDXLHighresPipeline, "sd15": SD15HighresPipeline}
LARGER = [way for way in WAYS if way != "none"]
STAGED = [way for way in LARGER if way != "hidiffusion"]  # that has one stage
RECTIFIED = RectifiedHR(Recipe(2, switches=(0.5, 1.0, 1.0)))


class MemoryStore(dict):
    def load(self, index):
        return self.get(index)

    def save(self, index, result):
        self[index] = result


@pytest.fixture(scope="module", params=PIPELINES)
def stock(request):
    """diffusers' own pipeline, with a scheduler whose steps are the same in every process."""
    pipe = tiny_pipeline(request.param)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(stock):
    return highres(stock)


@pytest.fixture(scope="module")
def sdxl():
    pipe = tiny_pipeline("sdxl")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def highres(stock):
    cls = SDXLHighresPipeline if hasattr(stock, "text_encoder_2") else SD15HighresPipeline
    out = cls.from_pipe(stock)
    out.set_progress_bar_config(disable=True)
    return out


def call(seed: int = 3, **more):
    generator = torch.Generator().manual_seed(seed)
    return {"prompt": "a cat", "num_inference_steps": 4, "output_type": "pt", "generator": generator, **more}


def with_scheduler(pipe, cls, **settings):
    out = copy.copy(pipe)
    config = {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True, **pipe.scheduler.config}
    out.scheduler = cls.from_config(config, **settings)
    return out


def plain_stages(*sizes: tuple[int, int], steps: int = 4, last: int = 2) -> list[Stage]:
    first, *larger = sizes
    return [Stage(*first, steps), *(Stage(*size, last, sharpen=0.0) for size in larger)]


def image_of(height: int, width: int) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(9))


def state_of(pipe) -> tuple:
    """Everything a call must leave as it was."""
    unet = pipe.unet
    processors = {name: (id(p), type(p)) for name, p in unet.attn_processors.items()}
    scheduler = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in pipe.scheduler.__dict__.items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in unet.modules()]
    plain = [{k: v for k, v in vars(b).items() if isinstance(v, int | float | str)} for b in unet.up_blocks]
    return processors, str(scheduler), hooks, plain, list(unet.state_dict()), pipe.vae.dtype


# --- the native stage


@pytest.mark.parametrize("size", [(32, 32), (24, 56), (40, 16)])
@pytest.mark.parametrize("output_type", ["pt", "latent"])
def test_native_size_is_diffusers_pipeline_to_the_bit(stock, pipe, size, output_type):
    more = {"height": size[0], "width": size[1], "output_type": output_type, "negative_prompt": "red"}
    expected = stock(**call(**more)).images
    assert torch.equal(pipe(**call(**more, highres="none")).images, expected)
    stages = [Stage(*size, 4)]
    assert torch.equal(pipe(**call(**more, stages=stages)).images, expected)


@pytest.mark.parametrize(
    "scheduler",
    [EulerAncestralDiscreteScheduler, PNDMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler, DDIMScheduler],
)
def test_any_scheduler_takes_the_native_steps(sdxl, scheduler):
    stock = with_scheduler(sdxl, scheduler)
    more = {"height": 32, "width": 24, "guidance_rescale": 0.3}
    expected = stock(**call(**more)).images
    assert torch.equal(highres(stock)(**call(**more, highres="none")).images, expected)


def test_several_prompts_without_guidance_and_given_noise_are_diffusers(stock, pipe):
    noise = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    more = {"height": 32, "width": 32, "prompt": ["a cat", "two dogs"], "num_images_per_prompt": 2, "latents": noise}
    more["guidance_scale"] = 1.0
    assert torch.equal(pipe(**call(**more)).images, stock(**call(**more)).images)


@pytest.mark.parametrize("cls", [EulerDiscreteScheduler, DDIMScheduler], ids=["euler", "ddim"])
def test_callbacks_see_what_a_step_estimates(stock, cls):
    """Behind the last step nothing is left of the noise: the estimate is the picture itself."""
    pipe, seen, sizes = highres(with_scheduler(stock, cls, set_alpha_to_one=True)), [], []

    def look(p, i, t, values):
        if i + 1 == p.num_timesteps:
            seen.append((values["latents"], values["clean"]))
        sizes.append(p.sketch(values["clean"], max_side=16).size)
        return {}

    names = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": ["latents", "clean"]}
    watched = pipe(**call(stages=plain_stages((32, 24), (60, 44))), **names).images
    assert torch.equal(watched, pipe(**call(stages=plain_stages((32, 24), (60, 44)))).images)
    assert sizes == [(12, 16)] * 6
    for latents, clean in seen:
        assert torch.allclose(clean.float(), latents.float(), atol=1e-4 * float(latents.abs().max()))
    assert [tuple(clean.shape) for _, clean in seen] == [(1, 4, 16, 12), (1, 4, 30, 22)]


def test_callbacks_see_no_estimate_where_the_noise_is_not_known(stock):
    pipe, seen = highres(with_scheduler(stock, HeunDiscreteScheduler)), []
    look = lambda p, i, t, values: seen.append(values["clean"]) or {}  # noqa: E731
    names = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": ["clean"]}
    pipe(**call(height=32, width=32, highres="none", **names))
    assert set(seen) == {None}


def test_callbacks_of_diffusers_see_what_they_know(sdxl):
    from diffusers.callbacks import SDXLCFGCutoffCallback

    more = {"height": 32, "width": 32, "callback_on_step_end": SDXLCFGCutoffCallback(None, 1)}
    expected = sdxl(**call(**more)).images
    assert torch.equal(highres(sdxl)(**call(**more)).images, expected)
    images = highres(sdxl)(**call(**{**more, "height": 64, "width": 64})).images
    assert torch.isfinite(images).all()


# --- every way at every size


@pytest.mark.parametrize("way", LARGER)
@pytest.mark.parametrize(("family", "size"), [("sdxl", (88, 56)), ("sd15", (24, 72))])
def test_any_size_comes_out(family, way, size):
    pipe = highres(tiny_pipeline(family))
    chosen = RECTIFIED if way == "rectifiedhr" else way
    before = state_of(pipe)
    images = pipe(**call(height=size[0], width=size[1], num_inference_steps=3, highres=chosen)).images
    assert images.shape == (1, 3, *size)
    assert torch.isfinite(images).all()
    assert images.std() > 0.01
    assert state_of(pipe) == before
    stages = pipe.plan(*size, 3, chosen)
    assert [(r["height"], r["width"]) for r in pipe.attention_report] == [(s.height, s.width) for s in stages]
    assert (stages[-1].height, stages[-1].width) == size


@pytest.mark.parametrize("way", LARGER)
@pytest.mark.parametrize("size", [(100, 36), (33, 51)])
def test_pictures_of_any_size_are_enlarged(sdxl, way, size):
    chosen = RECTIFIED if way == "rectifiedhr" else way
    more = {"height": 48, "width": 64, "image": image_of(*size), "num_inference_steps": 3}
    images = highres(sdxl)(**call(**more, highres=chosen)).images
    assert images.shape == (1, 3, 48, 64)
    assert torch.isfinite(images).all()


def test_odd_numbers_of_latent_cells(sdxl):
    """Sides that only the VAE's factor divides: 23 x 31 latent cells, which no level of the UNet halves evenly."""
    pipe = highres(sdxl)
    for way in ("cascade", "freescale", DemoFusion(view_batch=3)):
        images = pipe(**call(height=46, width=62, highres=way, num_inference_steps=2)).images
        assert images.shape == (1, 3, 46, 62)
        assert torch.isfinite(images).all()


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_other_kinds_of_prediction_run(sdxl, kind):
    pipe = highres(with_scheduler(sdxl, DDIMScheduler, prediction_type=kind))
    assert torch.isfinite(pipe(**call(height=64, width=48)).images).all()


# --- the cascade


def img2img(stock, image, strength, steps, seed, size):
    """Plain img2img by diffusers' scheduler and UNet, from the same noise, with the mode of the encoder."""
    kind = StableDiffusionXLImg2ImgPipeline if hasattr(stock, "text_encoder_2") else StableDiffusionImg2ImgPipeline
    reference = kind.from_pipe(stock, dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    with torch.no_grad():
        latents = reference.vae.encode(image * 2 - 1).latent_dist.mode() * reference.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))

    def prepare(image, timestep, *args, **kwargs):
        return reference.scheduler.add_noise(latents, noise, timestep)

    reference.prepare_latents = prepare
    more = {"image": image, "strength": strength, "num_inference_steps": steps, "output_type": "pt"}
    return reference(prompt="a cat", guidance_scale=5.0, **more).images


@pytest.mark.parametrize(
    ("strength", "scheduler"), [(0.5, DDIMScheduler), (0.8, EulerDiscreteScheduler), (1.0, DDIMScheduler)]
)
def test_without_guidance_a_picture_is_plain_img2img_from_the_same_noise(stock, strength, scheduler):
    given = with_scheduler(stock, scheduler)
    size, image = (64, 48), image_of(64, 48)
    more = {"image": image, "strength": strength, "num_inference_steps": 5, "guidance_scale": 5.0, "attention": "dense"}
    expected = img2img(given, image, strength, 5, 3, size)
    images = highres(given)(**call(**more, stages=plain_stages((32, 24), size, steps=5))).images
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)
    single = highres(given)(**call(**more, height=64, width=48, highres="none")).images
    torch.testing.assert_close(single, expected, rtol=0, atol=1e-4)


def test_strength_zero_only_enlarges(pipe):
    image = image_of(48, 32)
    images = pipe(**call(image=image, height=48, width=32, strength=0.0, highres="none")).images
    with torch.no_grad():
        expected = pipe.vae.decode(pipe.vae.encode(image * 2 - 1).latent_dist.mode()).sample
    torch.testing.assert_close(images, (expected * 0.5 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


def test_full_guidance_keeps_the_drafts_low_frequencies(sdxl):
    pipe, store = highres(sdxl), MemoryStore()
    stages = [Stage(32, 32, 4), Stage(64, 64, 1, alpha=1.0, low_pass="dwt")]
    large = pipe(**call(stages=stages, stage_store=store, output_type="latent")).images
    draft = torch.nn.functional.interpolate(store[0].history[3], scale_factor=2, mode="bicubic")
    torch.testing.assert_close(haar_low_pass(large), haar_low_pass(draft), rtol=1e-4, atol=1e-4)
    assert (large - draft).abs().mean() > 0.01


def test_clean_estimates_are_those_of_the_scheduler(sdxl):
    """What the native stage notes is what the scheduler itself calls the clean picture."""
    for cls in (EulerDiscreteScheduler, DDIMScheduler):
        pipe, store, seen = highres(with_scheduler(sdxl, cls)), MemoryStore(), []

        def noted(self, *args, _step=cls.step, _seen=seen, **kwargs):
            _seen.append(_step(copy.deepcopy(self), *args, **{**kwargs, "return_dict": True}).pred_original_sample)
            return _step(self, *args, **kwargs)

        pipe.scheduler = type(cls.__name__, (cls,), {"step": noted}).from_config(pipe.scheduler.config)
        pipe(**call(height=32, width=32, stage_store=store))
        assert len(seen) == 4
        for i, x0 in enumerate(seen):
            torch.testing.assert_close(store[0].history[i], x0.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["dense", "neighborhood:window=5x3", "hidiffusion:raunet=false"])
def test_attention_of_larger_stages(sdxl, attention):
    pipe = highres(sdxl)
    pipe(**call(height=64, width=88, attention=attention))
    assert pipe.attention_report[0]["method"] == "dense"
    for report in pipe.attention_report[1:]:
        if attention == "dense":
            assert report["method"] == "dense"
        else:
            assert report["method"]["method"] == attention.split(":")[0]
            assert report["sparse"] > 0


def test_a_method_acts_at_once_where_no_stages_are_wanted(sdxl):
    pipe = highres(sdxl)
    pipe(**call(height=64, width=88, attention="neighborhood:window=5x3", highres="none"))
    assert len(pipe.attention_report) == 1
    assert pipe.attention_report[0]["dense"] == {}


def test_window_over_the_whole_grid_equals_dense(sdxl):
    pipe = highres(sdxl)
    dense = pipe(**call(height=64, width=48, attention="dense")).images
    window = pipe(**call(height=64, width=48, attention="neighborhood:window=99x99")).images
    torch.testing.assert_close(window, dense, rtol=0, atol=1e-4)


# --- the other ways


def test_freescale_dilates_in_its_part_of_the_run_and_leaves_freeu_to_the_native_stage(sdxl):
    pipe = highres(sdxl)
    pipe(**call(height=64, width=64, num_inference_steps=10, highres="freescale"))
    native, larger = pipe.attention_report
    assert native["method"] == "dense"
    assert larger["method"]["method"] == "freescale"
    assert larger["method"]["dilated_steps"] == 7 - 3
    assert larger["dense"] == {}
    seen = []

    def look(p, i, t, values):
        seen.append((p.stage, getattr(p.unet.up_blocks[0], "b1", None)))
        return values

    pipe(**call(height=48, width=48, num_inference_steps=2, highres="freescale", callback_on_step_end=look))
    assert {b1 for stage, b1 in seen if stage == 0} == {1.1}
    assert {b1 for stage, b1 in seen if stage == 1} == {None}


@pytest.mark.parametrize("attention", ["fast", "neighborhood:window=5x5"])
def test_freescale_attends_over_the_whole_map_as_told(sdxl, attention):
    pipe = highres(sdxl)
    more = {"height": 48, "width": 48, "num_inference_steps": 2, "highres": "freescale"}
    dense = pipe(**call(**more)).images
    images = pipe(**call(**more, attention=attention)).images
    assert pipe.attention_report[1]["method"]["whole"].startswith(attention)
    assert not torch.equal(images, dense)


def test_ways_take_settings(sdxl):
    pipe = highres(sdxl)
    size = {"height": 48, "width": 40, "num_inference_steps": 2}
    plain = pipe(**call(**size, highres="freescale")).images
    own = FreeScaleCascade(cosine_scale=1.0, freeu=None, method=FreeScale(jitter=False))
    assert not torch.equal(pipe(**call(**size, highres=own)).images, plain)
    plain = pipe(**call(**size, highres="demofusion")).images
    assert torch.equal(pipe(**call(**size, highres=DemoFusion(jitter=True))).images, plain)
    for change in ({"jitter": False}, {"sigma": 0.5}, {"scales": (3.0, 1.0, 2.0)}):
        assert not torch.equal(pipe(**call(**size, highres=DemoFusion(**change))).images, plain)
    batched = pipe(**call(**size, highres=DemoFusion(view_batch=2))).images
    torch.testing.assert_close(batched, plain, rtol=0, atol=1e-4)


def test_demofusion_of_one_window_is_the_plain_step(sdxl):
    """At the native size there is one window and one dilated view, the picture itself."""
    pipe, image = highres(sdxl), image_of(32, 24)
    more = {"image": image, "height": 32, "width": 24, "strength": 1.0, "output_type": "latent"}
    way = DemoFusion(scales=(1e9, 1.0, 1.0))  # a guide without weight
    ours = pipe(**call(**more, highres=way)).images
    plain = pipe(**call(**more, highres="none")).images
    scale = (plain - plain.mean()) / plain.std()
    torch.testing.assert_close((ours - ours.mean()) / ours.std(), scale, rtol=0, atol=2e-3)


def test_demofusion_windows_are_told_where_they_are(sdxl, monkeypatch):
    pipe, seen = highres(sdxl), []
    forward = pipe.unet.forward

    def noted(*args, **kwargs):
        seen.append((args[0].shape, kwargs["added_cond_kwargs"]["time_ids"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipe.unet, "forward", noted)
    pipe(**call(height=64, width=48, num_inference_steps=1, highres=DemoFusion(jitter=False)))
    native, windows, dilated = seen
    assert native[0][-2:] == (16, 12)
    assert windows[0] == (12, 4, 16, 16)  # both halves of guidance over three rows and two columns of windows
    own = windows[1][6:]
    assert torch.equal(own, windows[1][:6])
    assert own[:, :2].unique(dim=0).tolist() == own[:, 4:].unique(dim=0).tolist() == [[64, 48]]
    assert own[:, 2:4].tolist() == [[r, c] for r in (0, 16, 32) for c in (0, 16)]
    assert dilated[0] == (8, 4, 16, 12)


def test_demofusion_keeps_the_moments_of_the_native_latents(sdxl):
    pipe, store = highres(sdxl), MemoryStore()
    pipe(**call(height=80, width=40, num_inference_steps=1, highres="demofusion", stage_store=store))
    native = store[0].latents
    assert len(store) == 3
    for k in (1, 2):
        torch.testing.assert_close(store[k].latents.mean(), native.mean(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(store[k].latents.std(), native.std(), rtol=1e-4, atol=1e-5)


def test_rectified_run_has_as_many_steps_as_a_plain_one_and_more_guidance_at_the_end(sdxl):
    pipe, seen = highres(sdxl), []

    def look(p, i, t, values):
        seen.append((p.stage, tuple(values["latents"].shape[-2:]), float(t)))
        return values

    pipe(**call(height=64, width=64, num_inference_steps=10, highres="rectifiedhr", callback_on_step_end=look))
    assert [stage for stage, _, _ in seen] == [0] * 6 + [1] * 4
    assert {size for stage, size, _ in seen if stage == 1} == {(32, 32)}
    assert [t for _, _, t in seen] == sorted((t for _, _, t in seen), reverse=True)
    assert len({t for _, _, t in seen}) == 10
    assert [s.guidance_factor for s in pipe.plan(64, 64, 10, "rectifiedhr")] == [1, 6]


def test_rectified_run_of_one_size_is_the_plain_sampler(stock, pipe):
    more = {"height": 32, "width": 24}
    assert torch.equal(pipe(**call(**more, highres="rectifiedhr")).images, stock(**call(**more)).images)


def test_after_a_switch_the_latents_are_the_noised_estimate(sdxl):
    pipe, seen, store = highres(sdxl), [], MemoryStore()
    inner = pipe._noise_at

    def noted(t, sigma, conditions, stage, run, x, crops=None):
        seen.append((sigma, x))
        return inner(t, sigma, conditions, stage, run, x, crops)

    pipe._noise_at = noted
    more = {"num_inference_steps": 10, "highres": "rectifiedhr", "stage_store": store, "guidance_scale": 2.0}
    pipe(**call(height=64, width=64, **more))
    sigma, x = seen[0]
    with torch.no_grad():
        clean = pipe._enlarge(store[0], Stage(64, 64, 4, sharpen=0.0), None, torch.device("cpu")).encoded
    noise = (x - clean) / sigma
    assert abs(float(noise.mean())) < 0.1
    assert abs(float(noise.std()) - 1) < 0.1


# --- resume, interrupt, errors


@pytest.mark.parametrize(("way", "ancestral"), [*((way, False) for way in STAGED), ("cascade", True)])
def test_resumed_run_gives_the_same_bits(sdxl, way, ancestral, tmp_path):
    stock = with_scheduler(sdxl, EulerAncestralDiscreteScheduler) if ancestral else sdxl
    pipe, size = highres(stock), {"height": 72, "width": 48, "num_inference_steps": 2, "highres": way}
    if way == "rectifiedhr":
        size |= {"highres": RectifiedHR(Recipe(3, switches=(0.5, 1.0, 1.0))), "num_inference_steps": 4}
    store = FolderStageStore(tmp_path)
    fresh = pipe(**call(**size, stage_store=store)).images
    count = len(pipe.plan(72, 48, size["num_inference_steps"], size["highres"]))
    assert count == {"rectifiedhr": 3}.get(way, 2)
    for finished in range(count):
        part = MemoryStore({finished: store.load(finished)})
        seen = []
        note = {"callback_on_stage_end": lambda p, r, seen=seen: seen.append(r.index)}
        assert torch.equal(pipe(**call(**size, stage_store=part, **note)).images, fresh)
        assert seen == list(range(finished + 1, count))


@pytest.mark.parametrize("way", STAGED)
def test_an_interrupted_run_leaves_no_state(sdxl, way):
    pipe, size = highres(sdxl), {"height": 48, "width": 56, "highres": RECTIFIED if way == "rectifiedhr" else way}
    size["num_inference_steps"] = 4 if way == "rectifiedhr" else 3
    before, fresh, store = state_of(pipe), pipe(**call(**size)).images, MemoryStore()

    def stop(p, i, t, values):
        p._interrupt = (p.stage, i) == (1, 0)
        return values

    images = pipe(**call(**size, callback_on_step_end=stop, stage_store=store)).images
    assert images.shape == fresh.shape
    assert sorted(store) == [0]
    assert state_of(pipe) == before
    assert torch.equal(pipe(**call(**size, stage_store=store)).images, fresh)

    def fail(p, i, t, values):
        if p.stage == 1:
            raise RuntimeError("stop here")
        return values

    with pytest.raises(RuntimeError, match="stop here"):
        pipe(**call(**size, callback_on_step_end=fail))
    assert state_of(pipe) == before


def test_nan_is_an_error_that_names_stage_and_step(sdxl):
    def spoil(p, i, t, values):
        return {"latents": values["latents"] * float("nan")} if (p.stage, i) == (1, 0) else values

    with pytest.raises(NumericsError, match=r"Stage 1, step 1"):
        highres(sdxl)(**call(height=64, width=64, callback_on_step_end=spoil))


def test_random_numbers_of_a_stage_are_its_own():
    generator = torch.Generator().manual_seed(5)
    draws = Draws(generator)
    assert draws.of(0) is generator
    later = [torch.randn(64, generator=draws.of(k)) for k in (1, 2)]
    torch.randn(7, generator=generator)
    assert torch.equal(torch.randn(64, generator=draws.of(2)), later[1])
    assert abs(float((later[0] * later[1]).mean())) < 0.5
    assert not torch.equal(*later)
    state = torch.random.get_rng_state()
    draws.windows(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    lists = Draws([torch.Generator().manual_seed(5), torch.Generator().manual_seed(6)])
    assert torch.equal(torch.randn(64, generator=lists.of(1)[0]), later[0])


# --- schedulers and sizes


def test_noise_levels_are_the_schedulers(sdxl):
    config = sdxl.scheduler.config
    for cls, options in [
        (EulerDiscreteScheduler, {}),
        (DDIMScheduler, {}),
        (PNDMScheduler, {"skip_prk_steps": True}),
        (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    ]:
        scheduler = cls.from_config(config, **options)
        scheduler.set_timesteps(6)
        levels = noise_levels(scheduler)
        assert len(levels.timesteps) == len(levels.sigmas) - 1 == 6
        assert all(a > b for a, b in zip(levels.sigmas, levels.sigmas[1:], strict=False))
        x = torch.ones(1)
        for t, sigma in zip(levels.timesteps, levels.sigmas, strict=False):
            if not options.get("use_karras_sigmas"):
                abar = float(scheduler.alphas_cumprod[round(float(t))])
                assert sigma == pytest.approx(math.sqrt((1 - abar) / abar), rel=1e-4)
        assert torch.equal(x, torch.ones(1))


def test_schedulers_that_do_not_fit_are_refused(sdxl):
    heun = highres(with_scheduler(sdxl, HeunDiscreteScheduler))
    with pytest.raises(ConfigError, match="Heun"):
        heun(**call(height=64, width=64))
    edm = highres(with_scheduler(sdxl, EDMEulerScheduler))
    with pytest.raises(ConfigError, match="EDMEuler"):
        edm(**call(height=64, width=64))


def test_plans(pipe):
    assert [(s.height, s.width) for s in pipe.plan(128, 128)] == [(32, 32), (64, 64), (128, 128)]
    assert [(s.height, s.width, s.steps) for s in pipe.plan(128, 128, 50, "freescale")] == [
        (32, 32, 50), (64, 64, 35), (128, 128, 35),
    ]  # fmt: skip
    assert [(s.height, s.width) for s in pipe.plan(48, 96, 50, "demofusion")] == [(16, 32), (32, 64), (48, 96)]
    assert [(s.height, s.steps) for s in pipe.plan(128, 128, 50, "rectifiedhr")] == [(32, 40), (80, 7), (128, 3)]
    assert [(s.height, s.width, s.steps) for s in pipe.plan(200, 120, 9, "none")] == [(200, 120, 9)]
    assert pipe.native_size == 32


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"height": 65}, "multiples of 2"),
        ({"stages": [Stage(32, 32, 4), Stage(66, 63, 2)]}, "multiples of 2"),
        ({"stages": [Stage(32, 32, 4), Stage(64, 64, 5)]}, "only 4"),
        ({"strength": 0.5}, "without an image"),
        ({"image": torch.rand(1, 3, 8, 8), "strength": 2.0}, "strength"),
        ({"image": torch.rand(1, 3, 8, 8), "strength": 0.5, "highres": RECTIFIED}, "no meaning"),
        ({"highres": "magic"}, "highres"),
        ({"attention": "magic"}, "magic"),
        ({"attention": "fast"}, "fast"),
        ({"vae_tile": "big"}, "vae_tile"),
        ({"output_type": "gif"}, "output_type"),
        ({"image": torch.rand(1, 4, 8, 8)}, "shape"),
        ({"highres": "rectifiedhr", "num_inference_steps": 1}, "too few"),
    ],
)
def test_wrong_settings_are_refused_before_the_first_step(pipe, wrong, match, monkeypatch):
    monkeypatch.setattr(pipe.unet, "forward", lambda *a, **k: pytest.fail("the model ran"))
    with pytest.raises(ConfigError, match=match):
        pipe(**call(**{"height": 64, "width": 64, **wrong}))


# --- the autoencoder, loading and sharing


def test_tiles_do_not_change_the_picture(sdxl):
    pipe = highres(sdxl)
    more = {"height": 88, "width": 72, "attention": "dense", "num_inference_steps": 1}
    whole = pipe(**call(**more, vae_tile=None)).images
    torch.testing.assert_close(pipe(**call(**more, vae_tile=64)).images, whole, rtol=0, atol=1e-3)
    pictures = pipe(**call(**more, vae_tile=64, output_type="pil")).images
    levels = torch.from_numpy(np.array(pictures[0])).movedim(-1, 0).float() / 255
    torch.testing.assert_close(levels[None], whole, rtol=0, atol=1 / 255 + 1e-3)


def test_preview_is_a_small_picture_of_the_stage(pipe):
    previews = []
    note = {"callback_on_stage_end": lambda p, r: previews.append((p.stage, p.num_stages, p.preview(r, max_side=20)))}
    pipe(**call(height=64, width=48, num_inference_steps=2, **note))
    assert [(stage, count) for stage, count, _ in previews] == [(0, 2), (1, 2)]
    assert [images[0].size for _, _, images in previews] == [(15, 20), (15, 20)]


def test_half_precision_is_upcast_for_the_autoencoder_and_back(sdxl):
    parts = {k: copy.deepcopy(v) for k, v in sdxl.components.items()}
    parts["vae"] = parts["vae"].to(torch.float16)
    parts["vae"].register_to_config(force_upcast=True)
    pipe = SDXLHighresPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    weights, seen = {k: v.clone() for k, v in pipe.vae.state_dict().items()}, []
    inner = pipe.vae.decode
    pipe.vae.decode = lambda z, **kwargs: seen.append(z.dtype) or inner(z, **kwargs)
    images = pipe(**call(height=64, width=64, num_inference_steps=2, vae_tile=None)).images
    assert torch.isfinite(images).all()
    assert set(seen) == {torch.float32}
    assert all(v.dtype == torch.float16 and torch.equal(v, weights[k]) for k, v in pipe.vae.state_dict().items())


def test_tiny_autoencoder_may_stand_for_the_vae(stock):
    torch.manual_seed(0)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=4,
    )  # fmt: skip
    pipe = type(highres(stock)).from_pipe(stock, vae=vae.eval())
    pipe.set_progress_bar_config(disable=True)
    assert torch.isfinite(pipe(**call(height=64, width=40)).images).all()


def test_loading_saving_and_sharing(stock, tmp_path):
    pipe = highres(stock)
    assert pipe.unet is stock.unet
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    more = {"height": 64, "width": 64, "num_inference_steps": 2}
    torch.testing.assert_close(loaded(**call(**more)).images, pipe(**call(**more)).images, rtol=0, atol=1e-5)


def test_batch_equals_single_pictures(sdxl):
    pipe, more = highres(sdxl), {"height": 64, "width": 48, "num_inference_steps": 2, "attention": "dense"}
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    for way in ("cascade", DemoFusion(jitter=False)):
        both = pipe(**call(**{**more, "prompt": ["a cat", "dogs"], "generator": generators, "highres": way})).images
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        for k, (prompt, seed) in enumerate([("a cat", 1), ("dogs", 2)]):
            alone = pipe(**call(seed, **{**more, "prompt": prompt, "highres": way})).images
            torch.testing.assert_close(both[k : k + 1], alone, rtol=0, atol=5e-4)


def test_every_way_is_a_value():
    for name, cls in WAYS.items():
        assert as_way(name) == cls()
        assert dataclasses.is_dataclass(cls)


def test_what_was_applied_before_stays_unless_a_method_is_asked_for(pipe):
    def run(**settings):
        drawn = pipe(
            "a",
            height=64,
            width=72,
            num_inference_steps=3,
            output_type="latent",
            **settings,
            generator=torch.Generator().manual_seed(0),
        ).images
        return drawn, [report["method"] for report in pipe.attention_report]

    plain, _ = run()
    handle = gensparse.apply(pipe, "sliding_window:radius=1")
    kept, used = run()
    assert [own["method"] for own in used] == ["sliding_window"] * len(used)
    assert handle.active
    assert handle.report()["calls"]["sparse"] > 0
    assert not torch.equal(kept, plain)
    _, used = run(attention="neighborhood:window=3")
    assert [own["method"] for own in used] == ["sliding_window", *["neighborhood"] * (len(used) - 1)]
    assert torch.equal(run()[0], kept)
    handle.remove()
    assert torch.equal(run()[0], plain)


def test_borders_stay_those_of_the_enlarged_picture(pipe) -> None:
    outs = {}
    for name, steps, border in (("enlarged", 0, 0), ("kept", 2, 4)):
        stages = [Stage(32, 32, 4), Stage(64, 48, steps, sharpen=0.0, border=border)]
        outs[name] = pipe(**call(height=64, width=48, stages=stages, output_type="latent")).images.float()
    ring = torch.ones(outs["kept"].shape[-2:], dtype=torch.bool)
    ring[2:-2, 2:-2] = False
    rest = noise_levels(pipe.scheduler).sigmas[-1]  # that some schedulers leave
    torch.testing.assert_close(outs["kept"][..., ring], outs["enlarged"][..., ring], rtol=0, atol=1e-5 + 5 * rest)
    assert (outs["kept"] - outs["enlarged"])[..., 4:-4, 4:-4].abs().mean() > 1e-3
