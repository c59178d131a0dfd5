import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoencoderTiny, FluxImg2ImgPipeline, FluxPipeline
from PIL import Image

from gensparse.errors import ConfigError, NumericsError
from gensparse.highres.frequency import haar_low_pass
from gensparse.highres.resample import enlarge_sharpened
from gensparse.highres.rope import PositionTable
from gensparse.highres.stage_store import FolderStageStore
from gensparse.highres.stages import Stage
from gensparse.pipelines import FluxHighresPipeline
from gensparse.pipelines.cascade import border_share, choose_attention


class MemoryStore(dict):
    def load(self, index):
        return self.get(index)

    def save(self, index, result):
        self[index] = result


def plain_stages(*sizes: int, steps: int = 4, last: int = 2) -> list[Stage]:
    """Square stages without guidance, sharpening and patch shift."""
    first, *larger = sizes
    return [Stage(first, first, steps), *(Stage(side, side, last, sharpen=0.0) for side in larger)]


def state_of(pipe) -> tuple:
    """Everything a call must leave as it was."""
    processors = {name: (id(p), type(p)) for name, p in pipe.transformer.attn_processors.items()}
    scheduler = copy.deepcopy(pipe.scheduler.__dict__)
    scheduler = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in scheduler.items()}
    hooks = len(pipe.transformer._forward_pre_hooks), len(pipe.transformer._forward_hooks)
    return id(pipe.transformer.pos_embed), processors, str(scheduler), hooks, list(pipe.transformer.state_dict())


# --- stage 0


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 64), (28, 36)])
@pytest.mark.parametrize("output_type", ["pt", "np", "latent"])
def test_native_size_is_flux_pipeline_to_the_bit(stock, pipe, call, height, width, output_type):
    size = {"height": height, "width": width, "output_type": output_type}
    expected = stock(**call(**size)).images
    images = pipe(**call(**size)).images
    assert np.array_equal(np.asarray(images), np.asarray(expected))


def test_native_size_with_true_guidance_and_several_prompts_is_flux_pipeline_to_the_bit(stock, pipe, call):
    size = {"height": 32, "width": 32, "prompt": ["a cat", "two dogs"], "negative_prompt": ["red", "blue"]}
    size |= {"true_cfg_scale": 2.5, "num_images_per_prompt": 2}
    assert torch.equal(pipe(**call(**size)).images, stock(**call(**size)).images)


def test_given_noise_and_sigmas_are_flux_pipelines(stock, pipe, call):
    noise = torch.randn(1, 64, 16)
    more = {"height": 32, "width": 32, "latents": noise, "sigmas": [1.0, 0.6, 0.3], "num_inference_steps": 3}
    assert torch.equal(pipe(**call(**more)).images, stock(**call(**more)).images)


def test_embeddings_can_be_given(pipe, call):
    with torch.no_grad():
        embeds, pooled, _ = pipe.encode_prompt(prompt="a cat", prompt_2=None, max_sequence_length=16)
    expected = pipe(**call(height=64, width=64)).images
    images = pipe(**call(height=64, width=64, prompt=None, prompt_embeds=embeds, pooled_prompt_embeds=pooled)).images
    assert torch.equal(images, expected)


# --- the cascade


@pytest.mark.parametrize("attention", ["dense", "clear:radius=4", "neighborhood:window=5x3"])
@pytest.mark.parametrize(("height", "width"), [(128, 128), (124, 76), (40, 200)])
def test_any_size_comes_out(pipe, call, height, width, attention):
    images = pipe(**call(height=height, width=width, attention=attention)).images
    assert images.shape == (1, 3, height, width)
    assert torch.isfinite(images).all()
    assert images.std() > 0.01
    sizes = [(stage.height, stage.width) for stage in pipe.plan(height, width)]
    assert [(r["height"], r["width"]) for r in pipe.attention_report] == sizes
    assert pipe.attention_report[0]["method"] == "dense"
    for report in pipe.attention_report[1:]:
        if attention == "dense":
            assert report["method"] == "dense"
        else:
            assert report["sparse"] == 2
            assert report["method"]["method"] == attention.split(":")[0]


def test_window_over_the_whole_grid_equals_dense(pipe, call):
    dense = pipe(**call(height=64, width=48, attention="dense")).images
    window = pipe(**call(height=64, width=48, attention="neighborhood:window=99x99")).images
    torch.testing.assert_close(window, dense, rtol=0, atol=1e-4)


def test_batch_equals_single_pictures(pipe, call):
    """Two prompts together: each picture is what its prompt gives alone, from the same noise."""
    stages = plain_stages(32, 64)
    generators = [torch.Generator().manual_seed(s) for s in (1, 2)]
    both = pipe(**call(prompt=["a cat", "dogs"], generator=generators, stages=stages, attention="dense")).images
    for k, (prompt, seed) in enumerate([("a cat", 1), ("dogs", 2)]):
        alone = pipe(**call(seed, prompt=prompt, stages=stages, attention="dense")).images
        torch.testing.assert_close(both[k : k + 1], alone, rtol=0, atol=2e-4)


def test_same_seed_gives_the_same_bits_and_another_does_not(pipe, call):
    first, second, other = (pipe(**call(seed, height=64, width=64)).images for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("knob", ["alpha", "beta", "patch_shift", "sharpen", "low_pass"])
def test_every_knob_of_a_stage_changes_the_picture(pipe, call, knob):
    stage = Stage(64, 64, 3, alpha=0.8, beta=0.5, patch_shift=True)
    change = {"alpha": 0.2, "beta": 0.1, "patch_shift": False, "sharpen": 0.0, "low_pass": "dwt"}[knob]
    with_knob = pipe(**call(stages=[Stage(32, 32, 4), stage])).images
    without = pipe(**call(stages=[Stage(32, 32, 4), dataclasses.replace(stage, **{knob: change})])).images
    assert not torch.equal(with_knob, without)


def test_full_direction_guidance_keeps_the_drafts_low_frequencies(pipe, call):
    """The point of the cascade: with alpha = 1 the low frequencies are those of the draft's estimate."""
    store, stage = MemoryStore(), Stage(64, 64, 1, alpha=1.0, low_pass="dwt")
    large = pipe(**call(stages=[Stage(32, 32, 4), stage], stage_store=store, output_type="latent")).images
    large = pipe._unpack_latents(large, 64, 64, pipe.vae_scale_factor)
    draft = torch.nn.functional.interpolate(store[0].history[3], scale_factor=2, mode="bicubic")
    torch.testing.assert_close(haar_low_pass(large), haar_low_pass(draft), rtol=0, atol=1e-4)
    assert (large - draft).abs().mean() > 0.01


@pytest.mark.parametrize("position", ["base", "ntk", "ntk10", "imax_clip", "yarn", "dy_ntk", "dy_yarn", "interpolate"])
def test_position_rules_run_and_matter(pipe, call, position):
    images = pipe(**call(height=64, width=64, position=position)).images
    assert torch.isfinite(images).all()
    if position != "base":
        assert not torch.equal(images, pipe(**call(height=64, width=64, position="base")).images)


def test_later_stages_use_true_guidance_only_when_asked(pipe, call, monkeypatch):
    names = []
    inner = pipe.transformer.cache_context
    monkeypatch.setattr(pipe.transformer, "cache_context", lambda name: names.append(name) or inner(name))
    more = {"negative_prompt": "red", "true_cfg_scale": 2.0, "stages": plain_stages(32, 64)}
    pipe(**call(**more))
    assert (names.count("cond"), names.count("uncond")) == (6, 4)
    names.clear()
    pipe(**call(**more, guidance_stages="all"))
    assert (names.count("cond"), names.count("uncond")) == (6, 6)


def test_dense_steps_and_layers_reach_the_attention(pipe, call):
    more = {"stages": plain_stages(32, 64), "attention": "clear:radius=2"}
    sparse = pipe(**call(**more)).images
    pipe(**call(**more, dense_steps=2))
    assert pipe.attention_report[1]["calls"]["sparse"] == 0
    pipe(**call(**more, dense_layers=[0]))
    assert pipe.attention_report[1]["sparse"] == 1
    dense = pipe(**call(**{**more, "attention": "dense"})).images
    assert torch.equal(pipe(**call(**more, dense_steps=9)).images, dense)
    assert not torch.equal(sparse, dense)


# --- a given picture


def image_of(height: int, width: int) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("strength", [0.6, 0.8, 1.0])
def test_without_guidance_a_picture_is_plain_img2img_from_the_same_noise(stock, pipe, call, strength):
    side, image = 64, image_of(64, 64)
    stages = plain_stages(32, side)
    images = pipe(**call(image=image, strength=strength, stages=stages, attention="dense", position="base")).images

    reference = FluxImg2ImgPipeline.from_pipe(stock, dtype=torch.float32)
    scheduler = pipe._scheduler_factory(stages[0], None, torch.device("cpu"))()
    keep = int((scheduler.sigmas[:-1] <= strength + 1e-6).sum())
    latents = (reference.vae.encode(image * 2 - 1).latent_dist.mode() - 0.06) * 1.5
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
    timestep = scheduler.timesteps[-keep][None]
    z = reference._pack_latents(scheduler.scale_noise(latents, timestep, noise), 1, 4, side // 2, side // 2)
    embeds, pooled, text_ids = reference.encode_prompt("a cat", None, max_sequence_length=16)
    ids = reference._prepare_latent_image_ids(1, side // 4, side // 4, "cpu", torch.float32)
    scheduler.set_begin_index(4 - keep)
    with torch.no_grad():
        for t in scheduler.timesteps[-keep:]:
            v = pipe.transformer(z, embeds, pooled, t[None] / 1000, ids, text_ids, return_dict=False)[0]
            z = scheduler.step(v, t, z, return_dict=False)[0]
        z = reference._unpack_latents(z, side, side, 2) / 1.5 + 0.06
        expected = (reference.vae.decode(z).sample * 0.5 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


def test_strength_zero_only_enlarges(pipe, call):
    image = image_of(32, 32)
    images = pipe(**call(image=image, height=64, width=64, strength=0.0)).images
    sharpened = enlarge_sharpened(image * 2 - 1, (64, 64), (0, 64, 0, 64))
    with torch.no_grad():
        expected = pipe.vae.decode(pipe.vae.encode(sharpened).latent_dist.mode()).sample
    torch.testing.assert_close(images, (expected * 0.5 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


def test_picture_kinds_are_equal(pipe, call):
    pixels = (image_of(24, 40) * 255).byte()
    array = pixels[0].movedim(0, -1).numpy()
    kinds = [Image.fromarray(array), array, pixels.float() / 255, pixels[0].float() / 255]
    outs = [pipe(**call(image=image, height=48, width=80)).images for image in kinds]
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize(("size", "target"), [((100, 30), (128, 40)), ((17, 23), (64, 96)), ((200, 200), (64, 64))])
def test_pictures_of_any_size(pipe, call, size, target):
    images = pipe(**call(image=image_of(*size), height=target[0], width=target[1], strength=0.5)).images
    assert images.shape == (1, 3, *target)
    assert torch.isfinite(images).all()


def test_only_stages_larger_than_the_picture_run(pipe, call):
    seen = []
    note = {"callback_on_stage_end": lambda p, r: seen.append((r.index, r.height))}
    pipe(**call(image=image_of(64, 64), height=128, width=128, **note))
    assert seen == [(0, 128)]
    seen.clear()
    pipe(**call(image=image_of(40, 40), height=128, width=128, **note))
    assert seen == [(0, 64), (1, 128)]


@pytest.mark.parametrize(
    "image",
    [torch.rand(1, 4, 8, 8), torch.rand(3, 3, 8, 8), torch.rand(1, 3, 8, 8) * 3, torch.full((1, 3, 8, 8), float("nan")),
     torch.rand(8, 8)],
)  # fmt: skip
def test_wrong_pictures_are_refused(pipe, call, image):
    with pytest.raises(ConfigError, match="image"):
        pipe(**call(image=image, height=64, width=64))


# --- resume, interrupt, callbacks


def test_resumed_run_gives_the_same_bits(pipe, call):
    store, fresh = MemoryStore(), pipe(**call(height=128, width=128)).images
    assert torch.equal(pipe(**call(height=128, width=128, stage_store=store)).images, fresh)
    assert sorted(store) == [0, 1, 2]
    for finished in ((0,), (0, 1), (1,), (2,)):
        seen = []
        part = MemoryStore({k: store[k] for k in finished})
        note = {"callback_on_stage_end": lambda p, r, seen=seen: seen.append(r.index)}
        assert torch.equal(pipe(**call(height=128, width=128, stage_store=part, **note)).images, fresh)
        assert seen == list(range(max(finished) + 1, 3))


def test_native_draft_is_continued_to_the_same_bits(pipe, call, tmp_path):
    fresh = pipe(**call(height=128, width=128)).images
    store = FolderStageStore(tmp_path)
    pipe(**call(height=32, width=32, stage_store=store))
    seen = []
    note = {"callback_on_stage_end": lambda p, r: seen.append(r.index)}
    assert torch.equal(pipe(**call(height=128, width=128, stage_store=store, **note)).images, fresh)
    assert seen == [1, 2]


def test_store_of_another_run_is_not_used(pipe, call):
    store, seen = MemoryStore(), []
    pipe(**call(height=32, width=32, stage_store=store))
    note = {"callback_on_stage_end": lambda p, r: seen.append(r.index)}
    pipe(**call(height=128, width=128, num_inference_steps=5, stage_store=store, **note))
    assert seen == [0, 1, 2]


def test_interrupt_stops_and_leaves_finished_stages(pipe, call):
    store, steps = MemoryStore(), []

    def stop(p, i, t, values):
        steps.append((p.stage, i))
        p._interrupt = (p.stage, i) == (1, 0)
        return values

    images = pipe(**call(height=128, width=128, stage_store=store, callback_on_step_end=stop)).images
    assert steps[-1] == (1, 0)
    assert images.shape[-1] == 64
    assert sorted(store) == [0]
    fresh = pipe(**call(height=128, width=128)).images
    assert torch.equal(pipe(**call(height=128, width=128, stage_store=store)).images, fresh)


def test_step_callback_sees_and_changes_latents(pipe, call):
    seen = []

    def zero(p, i, t, values):
        seen.append((p.stage, p.num_stages, p.num_timesteps, i, tuple(values["latents"].shape), float(t)))
        return {"latents": torch.zeros_like(values["latents"])} if p.stage == 1 else {}

    images = pipe(**call(stages=plain_stages(32, 64), callback_on_step_end=zero)).images
    assert [s[:4] for s in seen] == [(0, 2, 4, i) for i in range(4)] + [(1, 2, 2, i) for i in range(2)]
    assert {s[4] for s in seen} == {(1, 64, 16), (1, 256, 16)}
    assert [s[5] for s in seen[4:]] == [s[5] for s in seen[2:4]]
    with torch.no_grad():
        blank = pipe.vae.decode(torch.full((1, 4, 32, 32), 0.06)).sample
    torch.testing.assert_close(images, (blank * 0.5 + 0.5).clamp(0, 1))


def test_preview_is_a_small_picture_of_the_stage(pipe, call):
    previews = []
    pipe(**call(height=64, width=48, callback_on_stage_end=lambda p, r: previews.append(p.preview(r, max_side=20))))
    assert [images[0].size for images in previews] == [(16, 20), (15, 20)]


def test_history_holds_only_what_the_next_stage_needs(pipe, call):
    store = MemoryStore()
    pipe(**call(stages=[Stage(32, 32, 4), Stage(64, 64, 3), Stage(128, 128, 1)], stage_store=store))
    assert [sorted(store[k].history) for k in range(3)] == [[1, 2, 3], [3], []]
    assert all(x0.device.type == "cpu" for x0 in store[0].history.values())


# --- nothing is left behind


def test_everything_is_as_before_after_success(pipe, call):
    before, weights = state_of(pipe), {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    pipe(**call(height=64, width=64, attention="clear:radius=4"))
    assert state_of(pipe) == before
    assert all(torch.equal(v, weights[k]) for k, v in pipe.transformer.state_dict().items())


def test_everything_is_as_before_after_an_exception(pipe, call):
    before = state_of(pipe)

    def fail(p, i, t, values):
        if p.stage == 1:
            assert isinstance(p.transformer.pos_embed, PositionTable)
            raise RuntimeError("stop here")
        return values

    with pytest.raises(RuntimeError, match="stop here"):
        pipe(**call(height=64, width=64, attention="clear:radius=4", callback_on_step_end=fail))
    assert state_of(pipe) == before


@pytest.mark.parametrize(("stage", "step"), [(0, 1), (1, 0)])
def test_nan_is_an_error_that_names_stage_and_step(pipe, call, stage, step):
    def spoil(p, i, t, values):
        bad = (p.stage, i) == (stage, step - 1) if stage == 0 else (p.stage, i) == (0, 3)
        return {"latents": values["latents"] * float("nan")} if bad else values

    if stage == 0:
        with pytest.raises(NumericsError, match=r"Stage 0, step 1"):
            pipe(**call(height=64, width=64, callback_on_step_end=spoil))
    else:
        with pytest.raises(NumericsError, match=r"Stage 1, step 0"):
            pipe(**call(height=64, width=64, callback_on_step_end=spoil, attention="dense"))


# --- the autoencoder


def test_tiles_do_not_change_the_picture(pipe, call):
    whole = pipe(**call(height=128, width=96, vae_tile=None, attention="dense")).images
    tiled = pipe(**call(height=128, width=96, vae_tile=64, attention="dense")).images
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-3)
    pictures = pipe(**call(height=128, width=96, vae_tile=64, attention="dense", output_type="pil")).images
    levels = torch.from_numpy(np.asarray(pictures[0])).movedim(-1, 0).float() / 255
    torch.testing.assert_close(levels[None], tiled, rtol=0, atol=1 / 255)
    assert pipe(**call(height=64, width=64, vae_tile="feather")).images.shape == (1, 3, 64, 64)


def test_tiny_autoencoder_serves_both_ways(stock, call):
    torch.manual_seed(0)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=4,
    )  # fmt: skip
    pipe = FluxHighresPipeline.from_pipe(stock, vae=vae.eval())
    pipe.set_progress_bar_config(disable=True)
    whole = pipe(**call(height=64, width=96, vae_tile=None, attention="dense")).images
    tiled = pipe(**call(height=64, width=96, vae_tile=64, attention="dense")).images
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-3)


def test_exact_tiles_refuse_an_autoencoder_that_is_offloaded_piece_by_piece(stock, call):
    parts = {**stock.components, "vae": copy.deepcopy(stock.vae)}
    pipe = FluxHighresPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    cpu_offload(pipe.vae, execution_device=torch.device("cpu"))
    assert next(pipe.vae.parameters()).device.type == "meta"
    images = pipe(**call(height=64, width=64, vae_tile="feather")).images
    assert torch.isfinite(images).all()
    with pytest.raises(ConfigError, match="feather"):
        pipe(**call(height=64, width=64, vae_tile=64))


# --- settings


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"height": 66}, "multiples of 4"),
        ({"stages": [Stage(32, 32, 4), Stage(66, 64, 2)]}, "multiples of 4"),
        ({"stages": [Stage(32, 32, 4), Stage(64, 64, 5)]}, "only 4"),
        ({"strength": 0.5}, "without an image"),
        ({"position": "magic"}, "position"),
        ({"attention": "magic"}, "magic"),
        ({"guidance_stages": "some"}, "guidance_stages"),
        ({"vae_tile": "big"}, "vae_tile"),
        ({"vae_tile": 8}, "vae_tile"),
        ({"output_type": "gif"}, "output_type"),
        ({"image": torch.rand(1, 3, 8, 8), "strength": 2.0}, "strength"),
    ],
)
def test_wrong_settings_are_refused_before_the_first_step(pipe, call, wrong, match, monkeypatch):
    monkeypatch.setattr(pipe.transformer, "forward", lambda *a, **k: pytest.fail("the model ran"))
    with pytest.raises(ConfigError, match=match):
        pipe(**call(**{"height": 64, "width": 64, **wrong}))


def test_only_auto_chooses_dense_by_size():
    assert choose_attention("auto", 100, automatic="clear", dense_below=100) is None
    assert choose_attention("auto", 101, automatic="clear:radius=8", dense_below=100).radius == 8
    assert choose_attention("clear:radius=3", 1, automatic="clear", dense_below=100).radius == 3
    assert choose_attention("dense", 10**6, automatic="clear", dense_below=100) is None


def test_native_size_comes_from_the_model(stock, pipe):
    assert (pipe.token_size, pipe.native_side, pipe.native_size) == (4, 8, 32)
    own = FluxHighresPipeline.from_pipe(stock, gensparse_config={"native_size": 64})
    assert own.native_size == 64
    assert own.plan()[0].height == 64


def test_facts_of_the_model_are_used(stock, call):
    facts = {
        "native_size": 32, "position_ids": "centre-aligned scene units", "max_sequence_length": 16,
        "num_inference_steps": 5, "attention": "clear:radius=5", "dense_below_tokens": 100,
        "cascade": {"share": [0.4], "alpha": [0.7]},
    }  # fmt: skip
    pipe = FluxHighresPipeline.from_pipe(stock, gensparse_config=facts)
    pipe.set_progress_bar_config(disable=True)
    stages, tables = pipe.plan(64, 64), []
    assert [(s.steps, s.alpha, s.patch_shift) for s in stages] == [(5, 0.0, False), (2, 0.7, False)]

    def look(p, i, t, values):
        tables.append(p.transformer.pos_embed)
        return values

    pipe("a cat", height=64, width=64, output_type="pt", callback_on_step_end=look)
    assert len(tables) == 7
    assert {table.rule for table in tables[5:]} == {"interpolate"}
    assert pipe.attention_report[1]["method"]["radius"] == 5


def test_folder_with_facts_survives_loading_saving_and_sharing(stock, tmp_path):
    stock.save_pretrained(tmp_path / "a")
    facts = {"native_size": 48, "position_ids": "centre-aligned scene units"}
    (tmp_path / "a" / "gensparse.json").write_text(json.dumps(facts))
    loaded = FluxHighresPipeline.from_pretrained(tmp_path / "a")
    assert loaded.gensparse_config == facts
    loaded.save_pretrained(tmp_path / "b")
    assert FluxHighresPipeline.from_pretrained(tmp_path / "b").gensparse_config == facts
    plain = FluxPipeline.from_pretrained(tmp_path / "a")
    assert FluxHighresPipeline.from_pipe(plain).gensparse_config == facts
    assert FluxHighresPipeline.from_pipe(FluxPipeline.from_pipe(loaded)).gensparse_config == facts
    assert FluxHighresPipeline.from_pipe(stock).gensparse_config == {}


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_broken_facts_are_an_error(tmp_path, stock, text):
    stock.save_pretrained(tmp_path)
    (tmp_path / "gensparse.json").write_text(text)
    with pytest.raises(ConfigError, match=r"gensparse\.json"):
        FluxHighresPipeline.from_pretrained(tmp_path)


def test_sharing_a_pipeline_keeps_the_weights_type(stock):
    half = FluxPipeline(**{k: copy.deepcopy(v) for k, v in stock.components.items()}).to(torch.bfloat16)
    pipe = FluxHighresPipeline.from_pipe(half)
    assert pipe.transformer is half.transformer
    assert pipe.transformer.dtype == torch.bfloat16
    pipe.set_progress_bar_config(disable=True)
    images = pipe("a cat", height=64, width=64, num_inference_steps=2, max_sequence_length=16, output_type="pt").images
    assert torch.isfinite(images.float()).all()


# --- borders


def test_the_share_of_what_stays_falls_from_the_border():
    share = border_share(9, 13, 4)
    assert share[:, 6].tolist() == [1, 1, 1, 0.5, 0, 0.5, 1, 1, 1]
    assert share[4, :5].tolist() == [1, 1, 1, 0.5, 0]
    assert torch.equal(share, share.flip(0))
    assert torch.equal(border_share(1, 3, 4), torch.ones(1, 3))
    assert border_share(50, 50, 1)[1:-1, 1:-1].abs().sum() == 0


def test_borders_stay_those_of_the_enlarged_picture(pipe, call):
    """The outer half of the border is the enlargement when the stage is done; without a border nothing is."""
    outs = {}
    for name, steps, border in (("enlarged", 0, 0), ("free", 2, 0), ("kept", 2, 4)):
        stages = [Stage(32, 32, 4), Stage(64, 48, steps, sharpen=0.0, border=border)]
        packed = pipe(**call(height=64, width=48, stages=stages, output_type="latent")).images
        outs[name] = pipe._unpack(packed, stages[1]).float()
    inner = (..., slice(4, -4), slice(4, -4))
    ring = torch.ones(outs["kept"].shape[-2:], dtype=torch.bool)
    ring[2:-2, 2:-2] = False
    torch.testing.assert_close(outs["kept"][..., ring], outs["enlarged"][..., ring], rtol=0, atol=1e-5)
    assert (outs["free"][..., ring] - outs["enlarged"][..., ring]).abs().mean() > 1e-3
    assert (outs["kept"][inner] - outs["enlarged"][inner]).abs().mean() > 1e-3


@pytest.mark.parametrize("border", [-1, 1.5, True])
def test_borders_are_whole_numbers(border):
    with pytest.raises(ConfigError, match="border"):
        Stage(32, 32, 2, border=border)
