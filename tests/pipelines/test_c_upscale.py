"""C-Upscale end to end on tiny pipelines: SD 1.5 and SDXL (16 native cells) and PixArt (8)."""

import json

import pytest
import torch
from PIL import Image

from gensparse.errors import ConfigError
from gensparse.highres.frequency import fft_low_pass
from gensparse.highres.stages import Stage, StageResult
from gensparse.pipelines import CUpscale, PixArtHighresPipeline, SD15HighresPipeline, SDXLHighresPipeline
from gensparse.processors.composer import Composer
from gensparse.testing.tiny import tiny_pipeline

PIPELINES = {"sd15": SD15HighresPipeline, "sdxl": SDXLHighresPipeline, "pixart": PixArtHighresPipeline}
NEUTRAL = {"structure": 0.0, "screening": False, "semantic": 0.0}
TOP = [{"box": [0, 0, 1, 0.5], "prompt": "a red roof"}, {"box": [0.3, 0.2, 0.8, 1], "prompt": "moss"}]


@pytest.fixture(scope="module")
def pipes():
    found = {}
    for name, cls in PIPELINES.items():
        found[name] = cls.from_pipe(tiny_pipeline(name))
        found[name].set_progress_bar_config(disable=True)
    return found


@pytest.fixture(params=PIPELINES)
def pipe(pipes, request):
    return pipes[request.param]


def call(pipe, seed: int = 3, **more):
    own = {"clean_caption": False, "max_sequence_length": 16} if isinstance(pipe, PixArtHighresPipeline) else {}
    generator = torch.Generator().manual_seed(seed)
    return pipe(
        **{"prompt": "a cat", "num_inference_steps": 2, "output_type": "pt", **own, "generator": generator, **more}
    )


def large(pipe, **more) -> dict:
    """A size of two stages, whose sides are no multiples of 64 (nor of the native size)."""
    native = pipe.native_size
    return {"height": native + native // 2 + 4, "width": native + native // 4, **more}


def once(pipe, **more) -> dict:
    """One step at that size from a picture, without the native stage."""
    return large(pipe, image=image_of(24, 24), num_inference_steps=1, **more)


def image_of(height: int, width: int) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(9))


def state_of(model) -> tuple:
    modules = {n: m for n, m in model.named_modules() if getattr(m, "processor", None) is not None}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return {n: (id(m.processor), type(m.processor), sorted(vars(m))) for n, m in modules.items()}, hooks


# --- neutral settings are the plain run


def test_neutral_settings_with_one_window_are_the_plain_run_bit_for_bit(pipe):
    """Without priors and in one window it is plain image to image: a cascade without guidance, and "none"."""
    way, size = CUpscale(**NEUTRAL, window=64), (52, 36)
    own = {"image": image_of(24, 24), "strength": 0.7, "height": size[0], "width": size[1]}
    plain = call(pipe, **own, highres="none").images
    assert torch.equal(call(pipe, **own, highres=way, stages=[Stage(*size, 2, sharpen=0.0)]).images, plain)
    stages = [Stage(16, 16, 2), Stage(*size, 1, sharpen=0.0)]
    expected = call(pipe, stages=stages, attention="dense").images
    assert torch.equal(call(pipe, stages=stages, highres=way).images, expected)
    assert not torch.equal(call(pipe, stages=stages, highres=CUpscale(window=64)).images, expected)


def test_windows_without_priors_are_the_mean_of_their_own_denoising(pipes, monkeypatch):
    pipe, seen = pipes["sdxl"], []
    forward = pipe.unet.forward

    def noted(*args, **kwargs):
        seen.append((args[0].shape, kwargs["added_cond_kwargs"]["time_ids"], kwargs["encoder_hidden_states"].shape[1]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipe.unet, "forward", noted)
    call(pipe, stages=[Stage(32, 32, 2), Stage(64, 48, 1, sharpen=0.0)], highres=CUpscale(**NEUTRAL))
    windows = seen[-1]
    assert windows[0] == (12, 4, 16, 16)  # both halves of guidance over three rows and two columns of windows
    assert windows[1][6:, 2:4].tolist() == [[r, c] for r in (0, 16, 32) for c in (0, 16)]
    assert {words for _, _, words in seen} == {77}


def test_one_region_over_everything_with_the_same_prompt_is_the_plain_run(pipe):
    stages = [Stage(16, 16, 2), Stage(28, 40, 1, sharpen=0.0)]
    plain = call(pipe, stages=stages, highres=CUpscale(**NEUTRAL)).images
    for semantic in (0.5, 1.0):
        way = CUpscale([{"box": [0, 0, 1, 1], "prompt": "a cat"}], **{**NEUTRAL, "semantic": semantic})
        torch.testing.assert_close(call(pipe, stages=stages, highres=way).images, plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["sd15", "pixart"])
def test_one_region_over_everything_replaces_the_prompt_at_full_weight(pipes, name):
    """Where prompts reach the model by cross-attention alone (SDXL also has their pooled embedding)."""
    pipe, image = pipes[name], image_of(24, 24)
    own = {"image": image, "height": 28, "width": 40, "strength": 0.7}
    plain = CUpscale(**NEUTRAL)
    other = CUpscale([{"box": [0, 0, 1, 1], "prompt": "two dogs"}], **{**NEUTRAL, "semantic": 1.0})
    expected = call(pipe, **own, prompt="two dogs", highres=plain).images
    torch.testing.assert_close(call(pipe, **own, highres=other).images, expected, rtol=0, atol=1e-4)
    assert (call(pipe, **own, highres=plain).images - expected).abs().max() > 1e-3


# --- every prior acts


@pytest.mark.parametrize("name", ["sd15", "pixart"])
def test_every_prior_and_setting_changes_the_picture(pipes, name):
    pipe = pipes[name]
    own = once(pipe)
    base = call(pipe, **own, highres=CUpscale(TOP)).images
    assert base.shape == (1, 3, own["height"], own["width"])
    assert torch.isfinite(base).all()
    changes = [
        {"regions": ()},
        {"regions": TOP[:1]},
        {"semantic": 0.2},
        {"structure": 0.3},
        {"screening": False},
        {"merge": "hann"},
        {"window": pipe.native.cells * 3 // 4},
    ]
    for change in changes:
        other = call(pipe, **own, highres=CUpscale(**{"regions": TOP, **change})).images
        assert (other - base).abs().max() > 1e-4, change
    again = call(pipe, **own, highres=CUpscale(TOP)).images
    assert torch.equal(again, base)
    batched = call(pipe, **own, highres=CUpscale(TOP, view_batch=2)).images
    torch.testing.assert_close(batched, base, rtol=0, atol=1e-4)


def test_low_frequencies_follow_the_smaller_picture(pipes):
    """With full structure in one step the low frequencies of the result are those of the enlargement."""
    pipe, seen = pipes["sd15"], []
    stages = [Stage(32, 32, 2), Stage(48, 40, 1, alpha=1.0, sharpen=0.0)]

    def look(p, r):
        seen.append(r.latents)

    large = call(pipe, stages=stages, highres=CUpscale(), output_type="latent", callback_on_stage_end=look).images
    with torch.no_grad():
        draft = StageResult(0, 32, 32, (), seen[0])
        clean = pipe._enlarge(draft, stages[1], None, torch.device("cpu")).encoded
    torch.testing.assert_close(fft_low_pass(large, 0.05), fft_low_pass(clean, 0.05), rtol=0, atol=2e-3)
    assert (large - clean).abs().mean() > 0.01


def test_rectangles_reach_the_windows_that_they_cover(pipes, monkeypatch):
    """Each window's masks are its part of the picture's, and its text is the prompt and both regions'."""
    pipe, scenes = pipes["sd15"], []
    inner = Composer.composing

    def noted(self, scene):
        scenes.append(scene)
        return inner(self, scene)

    monkeypatch.setattr(Composer, "composing", noted)
    stages = [Stage(32, 32, 2), Stage(64, 48, 1, sharpen=0.0)]
    call(pipe, stages=stages, highres=CUpscale(TOP, screening=False))
    (scene,) = scenes
    assert (scene.words, scene.lengths, scene.pictures) == (77, (77, 77), 1)
    whole = torch.zeros(2, 32, 24, dtype=torch.bool)
    whole[0, :16], whole[1, 6:, 7:19] = True, True
    found = [view.masks for view in scene.views]
    expected = [whole[:, r : r + 16, c : c + 16] for r in (0, 8, 16) for c in (0, 8)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert scene.views[3].part == (8 / 32, 24 / 32, 8 / 24, 1.0)


def test_captions_belong_to_their_windows_and_pictures(pipe):
    seen = []

    def caption(image, box):
        assert isinstance(image, Image.Image)
        seen.append((image.size, box))
        return f"part {len(seen)}"

    native = pipe.native.cells * pipe.native.scale
    stages = [Stage(native, native, 1), Stage(2 * native, native, 1, sharpen=0.0)]
    own = {"stages": stages, "prompt": ["a cat", "two dogs"], "num_inference_steps": 1}
    images = call(pipe, **own, highres=CUpscale(caption)).images
    assert [box for _, box in seen] == [box for top in (0, 0.25, 0.5) for box in [(0.0, top, 1.0, top + 0.5)] * 2]
    assert {size for size, _ in seen} == {(native, native)}
    seen.clear()
    assert torch.equal(call(pipe, **own, highres=CUpscale(caption)).images, images)
    other = call(pipe, **own, highres=CUpscale(lambda image, box: "moss")).images
    assert (other - images).abs().amax((1, 2, 3)).min() > 1e-4


def test_a_captioner_with_memory_gives_it_back_before_the_picture_is_drawn(pipes):
    pipe, order = pipes["sd15"], []

    class Model:
        def __call__(self, image, box):
            order.append("caption")
            return "moss"

        def release(self):
            order.append("release")

    def look(p, i, t, values):
        order.append(p.stage)
        return values

    call(pipe, height=48, width=32, highres=CUpscale(Model()), callback_on_step_end=look)
    assert order.count("release") == 1
    assert order.index("release") < order.index(1)
    for bad in ("", None, 3):
        with pytest.raises(ConfigError, match="captioner gave"):
            call(pipe, height=48, width=32, highres=CUpscale(lambda image, box, bad=bad: bad))


def test_batch_equals_single_pictures(pipe):
    own = large(pipe, num_inference_steps=1, highres=CUpscale(TOP, screening=False))
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    both = call(pipe, **own, prompt=["a cat", "dogs"], generator=generators).images
    for k, (prompt, seed) in enumerate([("a cat", 1), ("dogs", 2)]):
        alone = call(pipe, seed, **own, prompt=prompt).images
        torch.testing.assert_close(both[k : k + 1], alone, rtol=0, atol=5e-4)


def test_without_guidance_all_rows_are_conditional(pipe):
    own = once(pipe, guidance_scale=1.0)
    images = call(pipe, **own, highres=CUpscale(TOP)).images
    assert not torch.equal(images, call(pipe, **own, highres=CUpscale()).images)


def test_sparse_windows_and_regions_together(pipes):
    pipe = pipes["sd15"]
    own = once(pipe, highres=CUpscale(TOP))
    dense = call(pipe, **own).images
    full = call(pipe, **own, attention="neighborhood:window=99x99").images
    torch.testing.assert_close(full, dense, rtol=0, atol=1e-4)
    assert pipe.attention_report[-1]["dense"] == {}
    assert not torch.equal(call(pipe, **own, attention="neighborhood:window=3x3").images, dense)


# --- nothing is left, nothing is guessed


def test_an_interrupted_or_failed_run_leaves_no_state(pipe):
    before = state_of(pipe._denoiser)
    own = large(pipe, highres=CUpscale(TOP))

    def stop(p, i, t, values):
        p._interrupt = (p.stage, i) == (1, 0)
        return values

    def fail(p, i, t, values):
        if p.stage == 1:
            raise RuntimeError("stop here")
        return values

    images = call(pipe, **own, callback_on_step_end=stop).images
    assert images.shape == (1, 3, own["height"], own["width"])
    assert state_of(pipe._denoiser) == before
    with pytest.raises(RuntimeError, match="stop here"):
        call(pipe, **own, callback_on_step_end=fail)
    assert state_of(pipe._denoiser) == before


def test_regions_come_from_a_file(pipes, tmp_path):
    path = tmp_path / "regions.json"
    path.write_text(json.dumps(TOP))
    assert CUpscale(str(path)) == CUpscale(path) == CUpscale(TOP)
    path.write_text(json.dumps([{"box": [0, 0, 2, 1], "prompt": "a roof"}]))
    with pytest.raises(ConfigError, match=r"regions\.json: Region 1: .*leaves the picture"):
        CUpscale(path)
    with pytest.raises(ConfigError, match=r"other\.json"):
        CUpscale(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"semantic": 1.1}, "semantic=1.1"),
        ({"structure": -1}, "structure=-1"),
        ({"share": True}, "share=True"),
        ({"screening": 1}, "screening=1"),
        ({"merge": "max"}, "merge='max'"),
        ({"window": 0}, "window=0"),
        ({"view_batch": 1.5}, "view_batch=1.5"),
        ({"regions": 3}, "Regions are 3"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        CUpscale(**settings)


def test_screening_needs_words_before_the_first_step(pipe, monkeypatch):
    with torch.no_grad():
        if isinstance(pipe, PixArtHighresPipeline):
            embeds, mask, *_ = pipe.encode_prompt("a cat", False, clean_caption=False, max_sequence_length=16)
            own = {"prompt_embeds": embeds, "prompt_attention_mask": mask, "negative_prompt": None}
            own |= {"negative_prompt_embeds": embeds, "negative_prompt_attention_mask": mask}
        else:
            made = pipe.encode_prompt("a cat", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
            names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
            own = dict(zip(names, made, strict=False))
    own |= once(pipe, prompt=None)
    assert torch.isfinite(call(pipe, **own, highres=CUpscale(TOP, screening=False)).images).all()
    monkeypatch.setattr(pipe._denoiser, "forward", lambda *a, **k: pytest.fail("the model ran"))
    with pytest.raises(ConfigError, match="words of the prompt"):
        call(pipe, **own, highres=CUpscale(TOP))


def test_plan_is_one_jump(pipes):
    stages = pipes["sdxl"].plan(128, 96, 10, CUpscale(structure=0.8))
    assert [(s.steps, s.alpha, s.beta) for s in stages] == [(10, 0.0, 0.0), (7, 0.8, 0.0)]
    assert (stages[1].height, stages[1].width) == (128, 96)
    assert 0.75 < stages[0].height * stages[0].width / 32**2 < 1.25
    assert len(pipes["sdxl"].plan(32, 32, 10, "c_upscale")) == 1
