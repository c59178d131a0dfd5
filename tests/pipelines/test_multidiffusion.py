"""MultiDiffusion with regions in tiny pipelines: what it equals, who acts where, windows, larger stages, refusals."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FirstBlockCacheConfig,
    HeunDiscreteScheduler,
)
from diffusers.callbacks import SD3CFGCutoffCallback, SDXLCFGCutoffCallback

from gensparse import Reference, Region
from gensparse.errors import ConfigError
from gensparse.pipelines import (
    FluxCustomizePipeline,
    MultiDiffusion,
    PixArtCustomizePipeline,
    SD3CustomizePipeline,
    SD15CustomizePipeline,
    SDXLCustomizePipeline,
)
from gensparse.pipelines.multidiffusion import Fusion
from gensparse.subjects.areas import Mask, Regions
from gensparse.subjects.multidiffusion import coloured, fused, latent_masks
from gensparse.testing.tiny import tiny_pipeline

CLASSES = {
    "sd15": SD15CustomizePipeline,
    "sdxl": SDXLCustomizePipeline,
    "pixart": PixArtCustomizePipeline,
    "flux": FluxCustomizePipeline,
    "sd3": SD3CustomizePipeline,
}
SIZES = {"sd15": (24, 40), "sdxl": (40, 16), "pixart": (24, 40), "flux": (24, 40), "sd3": (40, 24)}
OWN = {
    "sd15": {"guidance_scale": 3.0},
    "sdxl": {"guidance_scale": 3.0},
    "pixart": {"guidance_scale": 3.0, "max_sequence_length": 16, "clean_caption": False},
    "flux": {"true_cfg_scale": 2.0, "max_sequence_length": 16},
    "sd3": {"guidance_scale": 3.0, "max_sequence_length": 16},
}
FULL = (0, 0, 1, 1)
LEFT, RIGHT = (0, 0, 0.5, 1), (0.5, 0, 1, 1)
FLOWS = ("flux", "sd3")


@pytest.fixture(scope="module", params=CLASSES)
def name(request) -> str:
    return request.param


def made(name: str):
    stock = tiny_pipeline(name)
    if name == "flux":
        more = {"use_dynamic_shifting": True, "base_image_seq_len": 16, "max_image_seq_len": 64}
        stock.scheduler = type(stock.scheduler).from_config(stock.scheduler.config, **more)
    if name == "pixart":
        stock.transformer.register_to_config(sample_size=16)
    out = CLASSES[name].from_pipe(stock)
    out.set_progress_bar_config(disable=True)
    return out


@pytest.fixture(scope="module")
def pipe(name: str):
    """32 x 32 pixels are native."""
    return made(name)


@pytest.fixture(scope="module")
def sd15():
    return made("sd15")


@pytest.fixture(scope="module")
def flux():
    return made("flux")


def call(name: str, seed: int = 3, **more) -> dict:
    height, width = SIZES[name]
    return {
        "prompt": "a lawn",
        "negative_prompt": "red",
        "height": height,
        "width": width,
        "num_inference_steps": 2 if more.get("height", 0) > 40 else 3,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(seed),
        **OWN[name],
        **more,
    }


def test_one_region_of_all_is_the_plain_pipeline_to_the_bit(name, pipe) -> None:
    plain = pipe(**call(name, prompt="a cat")).images
    whole = pipe(**call(name), regions=[Region("a cat", box=FULL)]).images
    assert torch.equal(whole, plain)
    other = pipe(**call(name, prompt="a cat", negative_prompt="a blue dog")).images
    negative = pipe(**call(name), regions=[Region("a cat", box=FULL, negative="a blue dog")]).images
    assert torch.equal(negative, other)
    assert not torch.equal(plain, other)


def test_regions_of_one_prompt_are_the_plain_pipeline(name, pipe) -> None:
    """Without plain colours every call sees the same, so whatever overlaps or weighs, the mean is what each gives."""
    plain = pipe(**call(name)).images
    regions = [Region("a lawn", box=(0, 0, 0.6, 1), weight=2.5), Region("a lawn", box=(0.3, 0.2, 1, 1))]
    out = pipe(**call(name), regions=regions, subject_method="multidiffusion:bootstrap=0").images
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)


def test_regions_act_and_their_order_does_not(name, pipe) -> None:
    plain = pipe(**call(name)).images
    regions = [Region("a cat", box=LEFT), Region("a blue dog", box=(0.3, 0.5, 1, 1))]
    out = pipe(**call(name), regions=regions, subject_method="multidiffusion:bootstrap=0").images
    back = pipe(**call(name), regions=regions[::-1], subject_method="multidiffusion:bootstrap=0").images
    assert not torch.allclose(out, plain, atol=1e-3)
    torch.testing.assert_close(out, back, rtol=1e-5, atol=1e-5)
    (report,) = pipe.attention_report
    assert report["regions"] == {**MultiDiffusion(bootstrap=0).to_dict(), "regions": 2, "views": 1}
    assert pipe._fusion is None
    assert torch.equal(pipe(**call(name)).images, plain)


def test_plain_colours_act_in_the_first_steps_alone(name, pipe) -> None:
    regions = [Region("a cat", box=LEFT)]

    def drawn(**settings) -> torch.Tensor:
        return pipe(**call(name), regions=regions, subject_method=MultiDiffusion(**settings)).images

    first = 2 if name in FLOWS else 1  # flows begin as noise alone, in which no colour is seen
    none, coloured = drawn(bootstrap=first - 1), drawn(bootstrap=first)
    assert not torch.equal(none, coloured)
    assert torch.equal(coloured, drawn(bootstrap=first / 3))
    assert not torch.equal(coloured, drawn(bootstrap=first, seed=5))


def test_larger_stages_have_regions_unless_they_should_not(name, pipe) -> None:
    height, width = (2 * side for side in SIZES[name])
    given = {"height": height, "width": width, "num_images_per_prompt": 2}
    regions = [Region("a cat", box=LEFT), Region("a blue dog", box=RIGHT)]
    out = pipe(**call(name, **given), regions=regions).images
    assert ["regions" in report for report in pipe.attention_report] == [True, True]
    small = pipe(**call(name, **given), regions=regions, subject_method="multidiffusion:larger=false").images
    assert ["regions" in report for report in pipe.attention_report] == [True, False]
    assert len(out) == len(small) == 2
    assert torch.isfinite(out).all()
    assert not torch.equal(out, small)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_larger_stages_with_one_region_are_plain(name, request) -> None:
    pipe = request.getfixturevalue(name)
    height, width = (2 * side for side in SIZES[name])
    plain = pipe(**call(name, prompt="a cat", height=height, width=width)).images
    whole = pipe(**call(name, height=height, width=width), regions=[Region("a cat", box=FULL)]).images
    assert torch.equal(whole, plain)


def test_beyond_the_trained_size_it_sees_windows(name, pipe, monkeypatch) -> None:
    height, width = (2 * side for side in SIZES[name])
    model = pipe.transformer if getattr(pipe, "transformer", None) is not None else pipe.unet
    inner, shapes = model.forward, []

    def noted(*args, **kwargs):
        x = next((kwargs[key] for key in ("hidden_states", "sample") if key in kwargs), args[0] if args else None)
        shapes.append(tuple(x.shape))
        return inner(*args, **kwargs)

    monkeypatch.setattr(model, "forward", noted)
    given = call(name, height=height, width=width, num_inference_steps=1)
    settings = MultiDiffusion(window=12, stride=8)
    regions = [Region("a cat", box=(0, 0, 0.1, 0.1)), Region("a blue dog", box=(0.5, 0, 1, 1))]
    out = pipe(**given, highres="none", regions=regions, subject_method=settings).images
    assert torch.isfinite(out).all()
    cells = (144 if name == "flux" else 12 * 12) // (4 if name == "flux" else 1)
    area = {shape[1] if name == "flux" else shape[-1] * shape[-2] for shape in shapes}
    assert area == {cells}
    (report,) = pipe.attention_report
    views = report["regions"]["views"]
    scale = pipe.vae_scale_factor
    assert views == len(settings.views((height // scale, width // scale), 16, 2))
    halves = 2 if name == "flux" else 1
    assert views * halves < len(shapes) < 3 * views * halves  # regions are asked for where they are


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("sdxl", {"callback_on_step_end": SDXLCFGCutoffCallback(None, 1)}),
        ("sd3", {"callback_on_step_end": SD3CFGCutoffCallback(None, 1)}),
        ("sd3", {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 1.0}),
        ("sd3", {"guidance_stages": ()}),
    ],
    ids=["sdxl cutoff", "sd3 cutoff", "sd3 skipped layers", "sd3 unguided stage"],
)
def test_regions_follow_the_guidance_of_the_call(family, more) -> None:
    pipe = made(family)
    plain = pipe(**call(family, prompt="a cat", num_inference_steps=2, **more)).images
    whole = pipe(**call(family, num_inference_steps=2, **more), regions=[Region("a cat", box=FULL)]).images
    assert torch.equal(whole, plain)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_the_mean_of_predictions_is_that_of_steps(sd15, scheduler) -> None:
    """One step of the published algorithm, written down: a scheduler step per prompt, then the mean."""
    pipe = SD15CustomizePipeline.from_pipe(sd15)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler.from_config({**sd15.scheduler.config, "clip_sample": False})
    regions = Regions.of([Region("a cat", box=(0, 0, 0.6, 1)), Region("a blue dog", box=(0.4, 0.3, 1, 0.9))])
    noise = torch.randn(1, 4, 12, 20, generator=torch.Generator().manual_seed(1))
    got = []

    def note(pipe, i, t, values):
        got.append(values["latents"])
        return {}

    given = {"latents": noise, "num_inference_steps": 2, "callback_on_step_end": note}
    pipe(**call("sd15", **given), regions=regions, subject_method=MultiDiffusion(bootstrap=0))

    masks = latent_masks(torch.from_numpy(regions.masks((24, 40))), (12, 20))
    steps = []
    for text in ("a lawn", "a cat", "a blue dog"):
        got_here = len(got)
        pipe(**call("sd15", **given, prompt=text))
        steps.append(got[got_here])
    del got[2:]
    expected, count = fused(lambda view, prompt: steps[prompt], [(0, 12, 0, 20)], masks)
    assert count.min() >= 1
    torch.testing.assert_close(got[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, HeunDiscreteScheduler])
def test_schedulers_with_a_memory(sd15, scheduler) -> None:
    pipe = SD15CustomizePipeline.from_pipe(sd15)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler.from_config(sd15.scheduler.config)
    plain = pipe(**call("sd15", prompt="a cat"), highres="none").images
    given = {"regions": [Region("a cat", box=FULL)], "highres": "none"}
    settings = MultiDiffusion(bootstrap=0)
    assert torch.equal(pipe(**call("sd15"), **given, subject_method=settings).images, plain)


def test_plain_colours_need_noise_levels(sd15) -> None:
    pipe = SD15CustomizePipeline.from_pipe(sd15)
    pipe.scheduler = HeunDiscreteScheduler.from_config(sd15.scheduler.config)
    with pytest.raises(ConfigError, match="calls per step"):
        pipe(**call("sd15"), regions=[Region("a cat", box=LEFT)])


def test_what_a_region_sees_outside_is_a_colour_with_the_noise_of_the_start(flux, monkeypatch) -> None:
    seen = []
    inner = FluxCustomizePipeline._scene

    def noted(self, *args):
        scene = inner(self, *args)
        seen.append(scene)
        return scene

    monkeypatch.setattr(FluxCustomizePipeline, "_scene", noted)
    flux(**call("flux", num_inference_steps=5), regions=[Region("a cat", box=LEFT), Region("a dog", box=RIGHT)])
    (scene,) = seen
    assert scene.first == 2
    drawn = {scene.draw(step, region) for step in (0, 1) for region in (1, 2)}
    assert set(scene.colours) == drawn
    assert all(colour.shape == (1, 4, 12, 20) for colour in scene.colours.values())
    part, mask = torch.ones(1, 4, 12, 20), torch.zeros(1, 12, 20)
    mask[..., :10] = 1.5
    out = scene.seen(part, mask, 1, 1, (0, 12, 0, 20))
    assert torch.equal(out[..., :10], part[..., :10])
    expected = scene.noised(scene.colours[scene.draw(1, 1)], scene.noise, 1)
    assert torch.equal(out[..., 10:], expected[..., 10:])
    assert scene.seen(part, mask, 1, 2, (0, 12, 0, 20)) is part
    assert torch.equal(coloured(part, mask > 0, expected), out)


def test_subjects_by_words_are_regions(sd15) -> None:
    regions = [Region("a grey cat", box=LEFT, negative="a dog"), Region("dog", box=RIGHT)]
    words = [Reference("cat", region=LEFT, prompt="a grey cat", negative="a dog"), Reference("dog", region=RIGHT)]
    first = sd15(**call("sd15"), regions=regions).images
    assert torch.equal(sd15(**call("sd15"), subjects=words, subject_method="multidiffusion").images, first)
    with pytest.raises(ConfigError, match="where dog is to be"):
        sd15(**call("sd15"), subjects=[words[0], Reference("dog")], subject_method="multidiffusion")
    picture = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ConfigError, match="by words"):
        sd15(**call("sd15"), subjects=[Reference("cat", picture, region=LEFT)], subject_method="multidiffusion")


def test_caches_of_the_transformer_are_refused(flux) -> None:
    flux.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    try:
        with pytest.raises(ConfigError, match="disable_cache"):
            flux(**call("flux"), regions=[Region("a cat", box=LEFT)])
    finally:
        flux.transformer.disable_cache()


def test_masks_overlap_are_weighed_and_leave_nothing_uncovered() -> None:
    soft = np.full((8, 12), 0.4, np.float32)  # two of them are neither inside nor outside
    soft[:, :8] = 1
    regions = [Region("a", mask=Mask.of(soft)), Region("a", mask=Mask.of(soft)), Region("b", box=LEFT, weight=3)]
    masks = Fusion(Regions.of(regions), MultiDiffusion()).masks((4, 6), 2, torch.device("cpu"))
    assert masks.shape == (4, 1, 4, 6)
    assert masks[0, 0, 0].tolist() == [0, 0, 0, 0, 1, 1]
    assert masks[1, 0, 0].tolist() == [1, 1, 1, 1, 0, 0]
    assert masks[3, 0, 0].tolist() == [3, 3, 3, 0, 0, 0]
    none = Regions.of([Region("a", box=(0.2, 0, 0.2, 1))])
    assert Fusion(none, MultiDiffusion()).masks((4, 6), 2, torch.device("cpu"))[:, 0, 0, 0].tolist() == [1, 0]


def test_regions_without_area_have_no_effect(sd15) -> None:
    plain = sd15(**call("sd15")).images
    assert torch.equal(sd15(**call("sd15"), regions=[Region("a cat", box=(0.3, 0, 0.3, 1))]).images, plain)


def test_settings_are_read_and_written() -> None:
    assert MultiDiffusion.of("multidiffusion") == MultiDiffusion()
    given = MultiDiffusion.of("multidiffusion:bootstrap=0.25, window=96,stride=32,larger=false,seed=2")
    assert given == MultiDiffusion(bootstrap=0.25, window=96, stride=32, larger=False, seed=2)
    assert MultiDiffusion.of(given.to_dict()) == given
    assert MultiDiffusion.of("regional") is None
    assert [MultiDiffusion(bootstrap=value).first(50) for value in (0.4, 7, 99, 1.0, 0)] == [20, 7, 50, 50, 0]


def test_windows_follow_the_trained_size() -> None:
    assert MultiDiffusion().views((64, 64), 64, 1) == [(0, 64, 0, 64)]
    assert MultiDiffusion().views((48, 88), 64, 2) == [(0, 48, 0, 88)]  # about as large
    wide = MultiDiffusion().views((64, 128), 64, 1)
    assert wide == [(0, 64, start, start + 64) for start in range(0, 65, 8)]  # as published
    tokens = MultiDiffusion(stride=24).views((96, 128), 64, 2)
    assert all(number % 2 == 0 for view in tokens for number in view)
    assert {view[:2] for view in tokens} == {(0, 64), (24, 88), (32, 96)}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("bootstrap=-1", "bootstrap=-1"),
        ("bootstrap=1.5", "bootstrap=1.5"),
        ("bootstrap=true", "bootstrap=True"),
        ("colours=0", "colours=0"),
        ("window=8,stride=16", "leaves gaps"),
        ("windows=8", "did you mean window"),
        ("window", "another form"),
        ("seed=1,seed=2", "another form"),
    ],
)
def test_wrong_settings_are_refused(text, match) -> None:
    with pytest.raises(ConfigError, match=match):
        MultiDiffusion.of(f"multidiffusion:{text}")


CAT = Region("a cat", box=LEFT)


@pytest.mark.parametrize(
    ("family", "more", "match"),
    [
        ("sd15", {"regions": [Region("a cat", box=(0, 0, 0.01, 0.01))]}, "covers no cell"),
        ("flux", {"regions": [Region("a cat", box=(0, 0, 0.01, 0.01))]}, "covers no cell"),
        ("sd15", {"regions": [Region("a", box=LEFT, negative="b")], "guidance_scale": 1.0}, "guidance_scale above 1"),
        ("flux", {"regions": [Region("a", box=LEFT, negative="b")], "true_cfg_scale": 1.0}, "true_cfg_scale above 1"),
        ("sd15", {"regions": [CAT], "highres": "demofusion"}, "demofusion"),
        ("sd15", {"regions": [CAT], "subject_method": "regional"}, "regions= are for"),
        ("sd15", {"regions": [CAT], "subjects": [Reference("cat", region=LEFT)]}, "leave one out"),
        ("sd15", {"regions": []}, "0 regions"),
        ("sd15", {"regions": "none.json"}, "none.json"),
        ("flux", {"regions": [CAT], "subject_method": MultiDiffusion(window=11), "highres": "none"}, "multiples of 2"),
        (
            "sd15",
            {"regions": [CAT], "subject_method": "multidiffusion:larger=false", "image": np.zeros((8, 8, 3), np.uint8)},
            "larger=False",
        ),
    ],
)
def test_wrong_regions_are_refused_before_the_first_step(family, more, match, request, monkeypatch) -> None:
    pipe = request.getfixturevalue(family)
    model = pipe.transformer if family == "flux" else pipe.unet
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    with pytest.raises(ConfigError, match=match):
        pipe(**call(family, **more))
    assert pipe._fusion is None
