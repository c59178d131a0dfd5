"""CLEAR's two stages against diffusers' image-to-image pipeline, Scale-DiT's against three streams written out."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline
from methods.flux_streams import Streams, all_streams, lora, tuned
from safetensors.torch import save_file

import gensparse
from gensparse.errors import ConfigError
from gensparse.highres.rope import PositionTable
from gensparse.highres.stages import Stage
from gensparse.methods import Clear, ScaleDiT
from gensparse.pipelines import ClearStages, FluxHighresPipeline, ScaleDiTStages
from gensparse.pipelines.flux_ways import as_flux_way

SMALL = ScaleDiT(window=4)


class MemoryStore(dict):
    def load(self, index):
        return self.get(index)

    def save(self, index, result):
        self[index] = result


def image_of(height: int, width: int) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(9))


def state_of(pipe) -> tuple:
    model = pipe.transformer
    processors = {name: (id(p), type(p)) for name, p in model.attn_processors.items()}
    hooks = len(model._forward_pre_hooks), len(model._forward_hooks)
    return id(model.pos_embed), processors, str(pipe.scheduler.config), hooks, list(model.state_dict())


# --- the native stage


@pytest.mark.parametrize("highres", ["clear", "scale_dit"])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (28, 36)])
def test_native_size_is_flux_pipeline_to_the_bit(stock, pipe, call, highres, height, width):
    size = {"height": height, "width": width}
    assert torch.equal(pipe(**call(**size, highres=highres)).images, stock(**call(**size)).images)


@pytest.mark.parametrize("highres", ["clear", "scale_dit"])
@pytest.mark.parametrize(("height", "width"), [(124, 76), (40, 100)])
def test_any_size_comes_out(pipe, call, highres, height, width):
    before = state_of(pipe)
    images = pipe(**call(height=height, width=width, highres=highres)).images
    assert images.shape == (1, 3, height, width)
    assert torch.isfinite(images).all()
    stages = pipe.plan(height, width, 4, highres)
    assert [(r["height"], r["width"]) for r in pipe.attention_report] == [(s.height, s.width) for s in stages]
    assert pipe.attention_report[0]["method"] == "dense"
    assert all(r["method"]["method"] == highres and r["dense"] == {} for r in pipe.attention_report[1:])
    assert state_of(pipe) == before


# --- CLEAR


def two_stages(stock, image, steps: int, seed: int, *, clear: Clear | None = None) -> torch.Tensor:
    """The second stage by diffusers: static shift 3, strength 0.7, from the same noise and the mode of the encoder."""
    config = stock.scheduler.config
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, use_dynamic_shifting=False, shift=3.0)
    reference = FluxImg2ImgPipeline.from_pipe(stock, scheduler=scheduler, dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    height, width = image.shape[-2:]
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    first = steps - int(steps * 0.7 + 0.5)
    with torch.no_grad():
        clean = (reference.vae.encode(image * 2 - 1).latent_dist.mode() - 0.06) * 1.5
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    sigma = float(scheduler.sigmas[first])
    z = reference._pack_latents((1 - sigma) * clean + sigma * noise, *clean.shape)
    more = {"image": image, "strength": 0.7, "num_inference_steps": steps, "latents": z, "output_type": "pt"}
    more |= {"height": height, "width": width, "max_sequence_length": 16, "guidance_scale": 7.5}
    if clear is None:
        return reference("a cat", **more).images
    theta = reference.transformer.pos_embed.theta
    reference.transformer.pos_embed.theta = theta * 10
    try:
        with gensparse.applied(reference, clear, strict=True):
            return reference("a cat", **more).images
    finally:
        reference.transformer.pos_embed.theta = theta


@pytest.mark.parametrize("steps", [5, 10])
def test_the_second_stage_is_diffusers_image_to_image(stock, pipe, call, steps):
    image = image_of(64, 48)
    own = {"height": 64, "width": 48, "image": image, "num_inference_steps": steps, "highres": "clear"}
    expected = two_stages(stock, image, steps, 3)
    images = pipe(**call(**own, attention="dense", position="base")).images
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("clear", [Clear(16, proportional=True), Clear(3, proportional=True), Clear(3, 2, True)])
def test_attention_base_and_proportion_are_the_published_ones(stock, pipe, call, clear):
    image = image_of(64, 48)
    own = {"height": 64, "width": 48, "image": image, "num_inference_steps": 5}
    expected = two_stages(stock, image, 5, 3, clear=clear)
    if clear == ClearStages().method:
        images = pipe(**call(**own, highres="clear")).images
    else:
        images = pipe(**call(**own, highres=ClearStages(method=clear))).images
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)
    assert pipe.attention_report[-1]["method"] == clear.to_dict()
    assert (expected - two_stages(stock, image, 5, 3)).abs().max() > 1e-3


def test_clear_numbers_are_those_of_the_notebook(pipe, monkeypatch):
    stages = pipe.plan(128, 128, highres="clear")
    assert [(s.height, s.steps) for s in stages] == [(32, 20), (64, 14), (128, 14)]
    assert [s.guidance_factor * 3.5 for s in stages] == [3.5, 7.5, 7.5]
    assert not any(s.alpha or s.beta or s.sharpen or s.patch_shift for s in stages)
    seen, inner = [], pipe.transformer.forward
    monkeypatch.setattr(pipe.transformer, "forward", lambda **k: seen.append(float(k["timestep"])) or inner(**k))
    pipe("a cat", height=48, width=64, highres="clear", max_sequence_length=16, output_type="latent")
    assert len(seen) == 20 + 14
    s = np.linspace(1, 1 / 20, 20)[6:]
    np.testing.assert_allclose(seen[20:], 3 * s / (1 + 2 * s), atol=1e-6)
    assert seen[20] == pytest.approx(0.875)


def test_clear_settings_act(pipe, call):
    own = {"height": 64, "width": 48}
    base = pipe(**call(**own, highres="clear")).images
    for way in (ClearStages(shift=1.5), ClearStages(strength=0.5), ClearStages(method=Clear(2))):
        assert not torch.equal(pipe(**call(**own, highres=way)).images, base)
    assert not torch.equal(pipe(**call(**own, highres="clear", attention="clear:radius=3")).images, base)


# --- Scale-DiT


def three_streams(pipe, call, method, text: int = 16, *, theta: float = 1.0, weights: bool = False):
    """The large stage written out: native latents, their enlargement, the last steps with anchors as a third stream."""
    store = MemoryStore()
    first, large = pipe.plan(64, 48, 4, ScaleDiTStages(method=method))
    assert (first.height, first.width) == (32, 24)
    pipe(**call(stages=[first], stage_store=store))
    generator = torch.Generator().manual_seed(3)
    torch.randn(1, 4, 16, 12, generator=generator)
    noise = torch.randn(1, 4, 32, 24, generator=generator)
    sigmas = store[0].sigmas
    with torch.no_grad():
        prompt, pooled, words = pipe.encode_prompt("a cat", None, max_sequence_length=text)
        clean = pipe._enlarge(store[0], large, None, torch.device("cpu")).encoded
    begin = 4 - large.steps
    z = pipe._pack_latents(torch.lerp(clean, noise, sigmas[begin]), 1, 4, 32, 24)
    ids = pipe._prepare_latent_image_ids(1, 16, 12, torch.device("cpu"), torch.float32)
    low_ids = pipe._prepare_latent_image_ids(1, 8, 6, torch.device("cpu"), torch.float32)
    mask = all_streams(method, (16, 12), (8, 6), text)
    plain = pipe.transformer
    streams = Streams(plain, tuned(plain) if weights else plain, mask)
    before, plain.pos_embed.theta = plain.pos_embed.theta, plain.pos_embed.theta * theta
    try:
        for k in range(begin, 4):
            call_k = {"hidden_states": z, "img_ids": ids, "encoder_hidden_states": prompt, "txt_ids": words}
            call_k |= {"pooled_projections": pooled, "timestep": torch.tensor([sigmas[k]])}
            low = {"hidden_states": store[0].latents, "img_ids": low_ids}
            velocity, _ = streams.run(call_k, low, 2)
            z = z + (sigmas[k + 1] - sigmas[k]) * velocity
    finally:
        plain.pos_embed.theta = before
    return z


@pytest.mark.parametrize(
    ("method", "position", "theta"),
    [
        (SMALL, "auto", 10.0),
        (ScaleDiT(window=4, text_sees_anchors=True), "base", 1.0),
        (ScaleDiT(window=(2, 6), neighbours="3x3"), "auto", 10.0),
    ],
)
def test_one_call_equals_three_streams_written_out(pipe, call, method, position, theta):
    expected = three_streams(pipe, call, method, theta=theta)
    own = {"height": 64, "width": 48, "highres": ScaleDiTStages(method=method), "position": position}
    images = pipe(**call(**own, output_type="latent")).images
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)


def test_the_lora_is_active_for_the_anchors_alone(pipe, call, tmp_path):
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(lora(pipe.transformer), path)
    before = state_of(pipe)
    method = ScaleDiT(window=4, weights=str(path))
    expected = three_streams(pipe, call, SMALL, theta=10.0, weights=True)
    own = {"height": 64, "width": 48, "output_type": "latent"}
    for more in ({"highres": ScaleDiTStages(method=method)}, {"highres": "scale_dit", "attention": method}):
        images = pipe(**call(**own, **more)).images
        torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)
    plain = pipe(**call(**own, highres=ScaleDiTStages(method=SMALL))).images
    assert (plain - expected).abs().max() > 1e-3
    assert state_of(pipe) == before


def test_anchors_are_recorded_once_and_reported(pipe, call, monkeypatch):
    seen, inner = [], pipe.transformer.forward

    def noted(**arguments):
        seen.append((arguments["hidden_states"].shape[1], float(arguments["timestep"].float().max())))
        return inner(**arguments)

    monkeypatch.setattr(pipe.transformer, "forward", noted)
    pipe(**call(height=64, width=48, num_inference_steps=4, highres="scale_dit"))
    large = pipe.plan(64, 48, 4, "scale_dit")[1].steps
    assert [tokens for tokens, _ in seen] == [8 * 6] * 4 + [8 * 6] + [16 * 12] * large
    assert seen[4][1] == 0
    report = pipe.attention_report[1]
    assert report["recorded"] == {"anchors": {"tokens": 48, "grid": [8, 6], "bytes": 2 * 2 * 48 * 32 * 4}}
    assert report["sparse"] == 2
    assert "recorded" not in pipe.attention_report[0]


def test_anchors_of_a_given_picture(pipe, call):
    own = {"height": 64, "width": 76, "image": image_of(50, 30), "strength": 0.7, "highres": "scale_dit"}
    images = pipe(**call(**own)).images
    assert images.shape == (1, 3, 64, 76)
    assert pipe.attention_report[-1]["recorded"]["anchors"]["grid"] == [8, 9]
    assert not torch.equal(images, pipe(**call(**{**own, "image": image_of(50, 30).flip(-1)})).images)
    kept = pipe(**call(**{**own, "highres": ScaleDiTStages(keep_on="cpu")})).images
    assert torch.equal(kept, images)


def test_batches_have_anchors_of_their_own(pipe, call):
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    own = {"height": 64, "width": 48, "highres": "scale_dit", "num_inference_steps": 3}
    both = pipe(**call(**own, prompt=["a cat", "dogs"], generator=generators)).images
    for k, (prompt, seed) in enumerate([("a cat", 1), ("dogs", 2)]):
        alone = pipe(**call(seed, **own, prompt=prompt)).images
        torch.testing.assert_close(both[k : k + 1], alone, rtol=0, atol=2e-4)


def test_other_attention_leaves_the_anchors_out(pipe, call):
    own = {"height": 64, "width": 48, "highres": "scale_dit", "num_inference_steps": 3}
    pipe(**call(**own, attention="clear:radius=4"))
    assert pipe.attention_report[1]["method"]["method"] == "clear"
    assert "recorded" not in pipe.attention_report[1]
    pipe(**call(**own, attention="dense"))
    assert pipe.attention_report[1]["method"] == "dense"


def test_scale_dit_plans(pipe):
    stages = pipe.plan(128, 128, highres="scale_dit")
    assert [(s.height, s.steps) for s in stages] == [(32, 28), (128, 18)]
    assert [s.guidance_factor * 3.5 for s in stages] == [3.5, pytest.approx(4.5)]
    assert [s.sharpen for s in stages][1:] == [1.0]
    assert [(s.height, s.width) for s in pipe.plan(104, 92, highres="scale_dit")] == [(32, 28), (104, 92)]
    assert [(s.height, s.width) for s in pipe.plan(104, 92, highres=ScaleDiTStages(ratio=2))] == [(52, 44), (104, 92)]
    assert len(pipe.plan(32, 32, highres="scale_dit")) == 1
    with pytest.raises(ConfigError, match="ratio=9"):
        pipe.plan(128, 128, highres=ScaleDiTStages(ratio=9))


# --- resume, interruption, errors


@pytest.mark.parametrize("highres", ["clear", "scale_dit"])
def test_resumed_run_gives_the_same_bits(pipe, call, highres):
    own, store = {"height": 64, "width": 76, "highres": highres}, MemoryStore()
    fresh = pipe(**call(**own, stage_store=store)).images
    assert sorted(store) == [0, 1]
    for finished in (0, 1):
        seen = []
        note = {"callback_on_stage_end": lambda p, r, seen=seen: seen.append(r.index)}
        part = MemoryStore({finished: store[finished]})
        assert torch.equal(pipe(**call(**own, stage_store=part, **note)).images, fresh)
        assert seen == list(range(finished + 1, 2))


def test_a_stage_of_another_shift_is_not_resumed(pipe, call):
    own, store, seen = {"height": 64, "width": 76}, MemoryStore(), []
    pipe(**call(**own, highres="clear", stage_store=store))
    note = {"callback_on_stage_end": lambda p, r: seen.append(r.index)}
    pipe(**call(**own, highres=ClearStages(shift=2.0), stage_store=store, **note))
    assert seen == [1]


@pytest.mark.parametrize("highres", ["clear", "scale_dit"])
def test_an_interrupted_or_failed_run_leaves_no_state(pipe, call, highres):
    before, own = state_of(pipe), {"height": 64, "width": 48, "highres": highres}

    def stop(p, i, t, values):
        p._interrupt = (p.stage, i) == (1, 0)
        return values

    def fail(p, i, t, values):
        if p.stage == 1:
            raise RuntimeError("stop here")
        return values

    assert pipe(**call(**own, callback_on_step_end=stop)).images.shape == (1, 3, 64, 48)
    assert state_of(pipe) == before
    with pytest.raises(RuntimeError, match="stop here"):
        pipe(**call(**own, callback_on_step_end=fail))
    assert state_of(pipe) == before


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"highres": "magic"}, "highres"),
        ({"highres": "scale_dit", "position": "dy_yarn"}, "dy_yarn"),
        ({"highres": "scale_dit", "stages": [Stage(32, 32, 4), Stage(64, 64, 2, patch_shift=True)]}, "patch_shift"),
        (
            {"highres": "scale_dit", "negative_prompt": "red", "true_cfg_scale": 2.0, "guidance_stages": "all"},
            "one prompt",
        ),
    ],
)
def test_wrong_settings_are_refused_before_the_first_step(pipe, call, wrong, match, monkeypatch):
    monkeypatch.setattr(pipe.transformer, "forward", lambda *a, **k: pytest.fail("the model ran"))
    with pytest.raises(ConfigError, match=match):
        pipe(**call(**{"height": 64, "width": 64, **wrong}))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ClearStages(method="clear"), "method='clear'"),
        (lambda: ClearStages(strength=0), "strength=0"),
        (lambda: ClearStages(shift=float("inf")), "shift=inf"),
        (lambda: ClearStages(guidance_factor=-1), "guidance_factor=-1"),
        (lambda: ScaleDiTStages(method=Clear()), "method=Clear"),
        (lambda: ScaleDiTStages(ratio=0), "ratio=0"),
        (lambda: ScaleDiTStages(share=1.5), "share=1.5"),
    ],
)
def test_bad_settings_are_refused(make, match):
    with pytest.raises(ConfigError, match=match):
        make()


def test_settings_come_as_text_too(pipe):
    assert as_flux_way("clear:shift=2,strength=0.5") == ClearStages(shift=2.0, strength=0.5)
    assert as_flux_way("clear:radius=8").method == Clear(8, proportional=True)
    assert as_flux_way(" scale_dit : ratio = 2") == ScaleDiTStages(ratio=2)
    assert as_flux_way("cascade") is as_flux_way(None) is as_flux_way("magic:ratio=2") is None
    assert pipe.plan(128, 128, highres="scale_dit:ratio=2")[0].height == 64
    with pytest.raises(ConfigError, match="shape"):
        as_flux_way("clear:shape=2")


def test_anchors_of_models_that_interpolate_lie_where_their_tokens_do(stock, call):
    """An anchor stands at the first of its target tokens, whatever rule places these."""
    grid, low, ratio = (16, 12), (8, 6), 2
    table = PositionTable((4, 4, 8), 10000, grid, 8, rule="interpolate", native_grid=low)
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(16.0), torch.arange(12.0))
    anchors = torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange(6.0)) * ratio
    cos, _ = table(torch.cat([torch.zeros(3, 3), ids]))
    table.image_tokens = 8 * 6
    own, _ = table(torch.cat([torch.zeros(1, 3), anchors]))
    expected = cos[3:].unflatten(0, grid)[::ratio, ::ratio].flatten(0, 1)
    torch.testing.assert_close(own[1:], expected)
    pipe = FluxHighresPipeline(**stock.components, gensparse_config={"position_ids": "centre-aligned scene units"})
    pipe.set_progress_bar_config(disable=True)
    images = pipe(**call(height=64, width=48, highres="scale_dit")).images
    assert torch.isfinite(images).all()
    assert pipe.attention_report[1]["recorded"]["anchors"]["tokens"] == 48
