"""Subjects in tiny pipelines of stages, end to end: who sees what, callbacks, larger stages, refusals, nothing left."""

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from diffusers.callbacks import SDXLCFGCutoffCallback
from PIL import Image

from gensparse import Reference
from gensparse.errors import ConfigError
from gensparse.methods import FreeCustom, ReferenceOnly
from gensparse.pipelines import (
    FluxCustomizePipeline,
    PixArtCustomizePipeline,
    SD3CustomizePipeline,
    SD15CustomizePipeline,
    SDXLCustomizePipeline,
)
from gensparse.pipelines.customize import joined, noise_at, parted, rejoined, settled_method, subject_method
from gensparse.pipelines.unet_stages import noise_levels
from gensparse.subjects.inversion import inverted, seen
from gensparse.subjects.masks import to_grid
from gensparse.subjects.read_masks import box_mask
from gensparse.subjects.rehearsal import box_of
from gensparse.testing.tiny import tiny_pipeline

SIZES = {"sd15": (24, 40), "sdxl": (40, 16), "flux": (24, 40), "sd3": (40, 24), "pixart": (24, 40)}
CLASSES = {
    "sd15": SD15CustomizePipeline,
    "sdxl": SDXLCustomizePipeline,
    "flux": FluxCustomizePipeline,
    "sd3": SD3CustomizePipeline,
    "pixart": PixArtCustomizePipeline,
}
FLOWS = ("flux", "sd3")
OWN = {
    "flux": {"max_sequence_length": 16},
    "sd3": {"max_sequence_length": 16},
    "pixart": {"max_sequence_length": 16, "clean_caption": False},
}


def picture(seed: int, height: int = 30, width: int = 21) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


CAT = Reference("cat", picture(0), mask=box_mask((0, 0, 0.6, 1), (30, 21)), region=(0, 0, 0.5, 1), prompt="a cat")
DOG = Reference("dog", picture(1, 17, 40), region=(0.5, 0.2, 1, 1))

CASES = {
    "freecustom": [CAT, DOG],
    "isolation": [CAT, DOG],
    "storydiffusion:start=0,gate=1.0": [CAT, DOG],
    "reference_only": [CAT],
    "masactrl:start=0": [CAT],
    "style_aligned": [Reference("cat", picture(0))],
}


@pytest.fixture(scope="module", params=CLASSES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def stock(name: str):
    pipe = tiny_pipeline(name)
    if name == "flux":  # native 32 x 32 pixels
        more = {"use_dynamic_shifting": True, "base_image_seq_len": 16, "max_image_seq_len": 64}
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **more)
    if name == "pixart":  # the same native size; steps of first order, which inversion knows
        pipe.transformer.register_to_config(sample_size=16)
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, solver_order=1)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def plain(name: str, stock) -> torch.Tensor:
    """The picture of diffusers' own pipeline."""
    return stock(**call(name), **diffusers_own(name)).images


@pytest.fixture
def pipe(name: str, stock):
    out = CLASSES[name].from_pipe(stock)
    out.set_progress_bar_config(disable=True)
    return out


@pytest.fixture(scope="module")
def sdxl():
    out = SDXLCustomizePipeline.from_pipe(tiny_pipeline("sdxl"))
    out.set_progress_bar_config(disable=True)
    return out


def diffusers_own(name: str) -> dict:
    return {"use_resolution_binning": False} if name == "pixart" else {}


def call(name: str, seed: int = 3, **more) -> dict:
    height, width = SIZES[name]
    return {
        "prompt": "a cat and a dog",
        "height": height,
        "width": width,
        "num_inference_steps": 3,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(seed),
        **OWN.get(name, {}),
        **more,
    }


def state_of(pipe) -> tuple:
    """Everything a call must leave as it was."""
    model = pipe.transformer if getattr(pipe, "transformer", None) is not None else pipe.unet
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    processors = {name: (id(p), type(p)) for name, p in model.attn_processors.items()}
    return hooks, processors, list(model.state_dict()), str(pipe.scheduler.__dict__), pipe._cast


def test_without_subjects_it_is_the_plain_pipeline_to_the_bit(name, plain, pipe) -> None:
    more = {"highres": "none"}
    assert torch.equal(pipe(**call(name), **more).images, plain)
    assert torch.equal(pipe(**call(name), **more, subjects=[]).images, plain)


@pytest.mark.parametrize("method", CASES)
def test_subjects_change_the_picture_and_leave_nothing(name, plain, pipe, method) -> None:
    before = state_of(pipe)
    out = pipe(**call(name), subjects=CASES[method], subject_method=method).images
    assert out.shape == plain.shape == (1, 3, *SIZES[name])
    assert torch.isfinite(out).all()
    assert not torch.equal(out, plain)
    (report,) = pipe.attention_report
    assert report["subjects"]["names"] == [item.name for item in CASES[method]]
    assert report["subjects"]["sparse"] > 0
    assert state_of(pipe) == before


def test_other_pictures_and_masks_of_subjects_make_other_pictures(name, plain, pipe) -> None:
    def made(*subjects: Reference) -> torch.Tensor:
        return pipe(**call(name), subjects=subjects).images

    first = made(CAT)
    assert torch.equal(first, made(CAT))
    assert torch.equal(pipe(**call(name)).images, plain)
    assert not torch.equal(first, made(Reference("cat", picture(5), mask=CAT.mask, prompt="a cat")))
    assert not torch.equal(first, made(Reference("cat", CAT.picture, prompt="a cat")))


def test_methods_that_act_on_no_step_leave_the_picture(name, plain, pipe) -> None:
    """References in the batch alone change no more than rounding."""
    out = pipe(**call(name), subjects=[CAT, DOG], subject_method=FreeCustom(start=50)).images
    torch.testing.assert_close(out, plain, rtol=0, atol=2e-4)


def test_callbacks_see_the_pictures_alone(name, pipe) -> None:
    seen = []

    def note(pipe, i, t, values):
        seen.append({k: tuple(v.shape) for k, v in values.items()})
        return {"latents": values["latents"] * 1.0}

    inputs = ["latents", "prompt_embeds"]
    given = {"callback_on_step_end": note, "callback_on_step_end_tensor_inputs": inputs}
    plain = pipe(**call(name), **given).images
    alone, seen = seen, []
    out = pipe(**call(name), **given, subjects=[CAT, DOG], num_images_per_prompt=1).images
    assert seen == alone
    assert len(seen) == 3
    assert not torch.equal(out, plain)
    assert torch.equal(out, pipe(**call(name), subjects=[CAT, DOG]).images)


def test_inverted_references_are_what_the_model_draws_again(name, stock, monkeypatch) -> None:
    """From the first latents of a refined inversion diffusers' own pipeline comes back to the picture."""
    module = "flow_customize" if name in FLOWS else "unet_customize"
    monkeypatch.setattr(f"gensparse.pipelines.{module}.inverted", partial(inverted, rounds=15))

    class Noting(CLASSES[name]):
        def _inverted(self, *args):
            self.path = super()._inverted(*args)
            return self.path

    pipe = Noting.from_pipe(stock)
    pipe.set_progress_bar_config(disable=True)
    steps = {"num_inference_steps": 12, "output_type": "latent", "prompt": "a cat"}
    pipe(**call(name, **steps), subjects=[CAT], subject_method="masactrl:start=0")
    first, clean = pipe.path[0], pipe.path[-1]
    alone = call(name, **steps, guidance_scale=1.0)
    if name not in FLOWS:
        scheduler = copy.deepcopy(stock.scheduler)
        scheduler.set_timesteps(12)
        sigmas = noise_levels(scheduler).sigmas
        keeps = hasattr(scheduler, "init_noise_sigma") and float(scheduler.init_noise_sigma) == 1
        first = seen(first, sigmas[0]) if keeps else first / scheduler.init_noise_sigma
        clean = seen(clean, sigmas[-1]) if keeps else clean
    again = stock(**alone, latents=first, **diffusers_own(name)).images
    other = stock(**alone, **diffusers_own(name)).images
    assert (again - clean).norm() < 1e-2 * (other - clean).norm()


def test_sketches_are_of_the_picture(name, pipe) -> None:
    shown = []

    def note(pipe, i, t, values):
        shown.append((values["clean"].shape[0], pipe.sketch(values["clean"]).size))
        return {}

    given = {"callback_on_step_end": note, "callback_on_step_end_tensor_inputs": ["clean"]}
    pipe(**call(name), **given, subjects=[CAT, DOG])
    assert shown == [(1, SIZES[name][::-1])] * 3


def test_a_run_can_be_interrupted(name, pipe) -> None:
    steps = []

    def stop(pipe, i, t, values):
        steps.append(i)
        pipe._interrupt = i == 1
        return {}

    before = state_of(pipe)
    out = pipe(**call(name), subjects=[CAT], callback_on_step_end=stop).images
    assert steps == [0, 1]
    assert out.shape == (1, 3, *SIZES[name])
    assert state_of(pipe) == before


def test_errors_on_the_way_leave_nothing(name, pipe) -> None:
    def fail(pipe, i, t, values):
        raise RuntimeError("stop")

    before = state_of(pipe)
    with pytest.raises(RuntimeError, match="stop"):
        pipe(**call(name), subjects=[CAT], callback_on_step_end=fail)
    assert state_of(pipe) == before
    assert pipe._cast is None


def test_larger_stages_go_on_without_references_and_sparse(name, pipe) -> None:
    sizes = []

    def note(pipe, i, t, values):
        sizes.append((pipe.stage, values["latents"].shape[0]))
        return {}

    height, width = (2 * side for side in SIZES[name])
    given = {"height": height, "width": width, "callback_on_step_end": note, "attention": "neighborhood:window=4x4"}
    out = pipe(**call(name, **given), subjects=[CAT, DOG], num_images_per_prompt=2).images
    assert out.shape == (2, 3, height, width)
    assert {count for _, count in sizes} == {2}
    assert {stage for stage, _ in sizes} == {0, 1}
    first, second = pipe.attention_report
    assert first["subjects"]["method"]["method"] == ("isolation_reposition" if name == "flux" else "freecustom")
    assert "subjects" not in second
    assert second["sparse"] > 0


def test_places_that_nobody_gives_come_from_a_rehearsal(name, pipe, monkeypatch) -> None:
    """The same masks given as regions make the same picture, to the bit; every picture of a call has its own."""
    found = []
    placed = type(pipe)._placed

    def noted(self, *given):
        found.append(placed(self, *given).found)
        return placed(self, *given)

    monkeypatch.setattr(type(pipe), "_placed", noted)
    before, nowhere = state_of(pipe), [replace(CAT, region=None), DOG]
    out = pipe(**call(name), subjects=nowhere, subject_method="isolation").images
    assert state_of(pipe) == before
    assert torch.isfinite(out).all()
    (masks,) = found[0].values()
    assert list(found[0]) == ["cat"]
    assert masks[0].any()
    (report,) = pipe.attention_report
    assert set(report["subjects"]["found"]) == {"cat"}
    given = [replace(CAT, region=masks[0]), DOG]
    assert torch.equal(pipe(**call(name), subjects=given, subject_method="isolation").images, out)

    seeds = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    two = pipe(**call(name, generator=seeds, num_images_per_prompt=2), subjects=nowhere, subject_method="isolation")
    (masks,) = found[-1].values()
    assert len(masks) == 2
    torch.testing.assert_close(two.images[:1], out, rtol=0, atol=1e-4)
    alone = pipe(**call(name, seed=4), subjects=[replace(CAT, region=masks[1]), DOG], subject_method="isolation")
    torch.testing.assert_close(two.images[1:], alone.images, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["freecustom", "isolation"])
def test_references_without_a_mask_are_cut_out(name, pipe, method, monkeypatch) -> None:
    """The same masks given make the same picture, to the bit; a mask of everything, or transparency, is left alone."""
    found = []
    cut = type(pipe)._cut_out

    def noted(self, *given):
        found.append(cut(self, *given))
        return found[-1]

    monkeypatch.setattr(type(pipe), "_cut_out", noted)
    out = pipe(**call(name), subjects=[DOG], subject_method=method).images
    ((own,),) = found
    assert own.cut
    assert own.mask.any()
    assert not bool((own.mask & ~to_grid(own.area, tuple(own.mask.shape)).bool()).any()), "borders are not the dog"
    (report,) = pipe.attention_report
    assert report["subjects"]["cut out"] == {"dog": box_of(own.mask)}

    given = [replace(own, cut=False)]
    monkeypatch.setattr(type(pipe), "_cut_out", lambda *_: given)
    assert torch.equal(pipe(**call(name), subjects=[DOG], subject_method=method).images, out)
    assert "cut out" not in pipe.attention_report[0]["subjects"]
    monkeypatch.setattr(type(pipe), "_cut_out", noted)

    clear = picture(1).convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 0, 9, 30))
    for reference in (replace(DOG, mask=(0, 0, 1, 1)), Reference("dog", clear, region=(0.5, 0, 1, 1))):
        pipe(**call(name), subjects=[reference], subject_method=method)
        assert not found[-1][0].cut
        assert "cut out" not in pipe.attention_report[0]["subjects"]


def test_methods_that_see_whole_pictures_cut_nothing_out(name, pipe) -> None:
    pipe(**call(name), subjects=[replace(DOG, region=None)], subject_method="reference_only")
    assert "cut out" not in pipe.attention_report[0]["subjects"]


def test_a_rehearsal_can_be_stopped(name, pipe) -> None:
    def stop(pipe, i, t, values):
        pipe._interrupt = True
        return {}

    before = state_of(pipe)
    pipe(**call(name, callback_on_step_end=stop), subjects=[replace(CAT, region=None)], subject_method="isolation")
    assert state_of(pipe) == before
    assert "subjects" not in pipe.attention_report[0]


@pytest.mark.parametrize(
    ("family", "unplaced", "prompts", "usual"),
    [
        ("FLUX.1", ["cat"], ["a Cat on a mat"], "isolation_reposition"),
        ("FLUX.1", [], None, "isolation_reposition"),
        ("FLUX.1", ["cat"], None, "freecustom"),
        ("FLUX.1", ["cat"], ["a cat", "a caterpillar"], "freecustom"),
        ("UNet", [], ["a cat"], "freecustom"),
    ],
)
def test_what_auto_stands_for(family, unplaced, prompts, usual) -> None:
    assert settled_method("auto", family, unplaced, prompts) == usual
    assert settled_method("magicface", family, unplaced, prompts) == "magicface"


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler])
@pytest.mark.parametrize("method", ["freecustom", "masactrl:start=0"])
def test_schedulers_of_either_form(sdxl, scheduler, method) -> None:
    pipe = SDXLCustomizePipeline.from_pipe(sdxl)
    pipe.scheduler = scheduler.from_config(sdxl.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    out = pipe(**call("sdxl"), subjects=[CAT], subject_method=method).images
    assert torch.isfinite(out).all()
    assert not torch.equal(out, pipe(**call("sdxl")).images)


def test_schedulers_without_levels_are_refused(sdxl) -> None:
    pipe = SDXLCustomizePipeline.from_pipe(sdxl)
    pipe.scheduler = HeunDiscreteScheduler.from_config(sdxl.scheduler.config)
    with pytest.raises(ConfigError, match="calls per step"):
        pipe(**call("sdxl"), subjects=[CAT])


def test_guidance_that_ends_and_generators_of_every_picture(sdxl) -> None:
    more = {"callback_on_step_end": SDXLCFGCutoffCallback(None, 1)}
    out = sdxl(**call("sdxl", **more), subjects=[CAT, DOG]).images
    assert torch.isfinite(out).all()
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    pair = {"generator": generators, "num_images_per_prompt": 2, "eta": 0.5, "guidance_scale": 1.0}
    assert sdxl(**call("sdxl", **pair), subjects=[CAT]).images.shape[0] == 2


@pytest.mark.parametrize(
    "more",
    [{"guidance_stages": ()}, {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 1.0}],
    ids=["unguided stage", "skipped layers"],
)
def test_calls_of_one_half_are_read_as_such(more) -> None:
    pipe = SD3CustomizePipeline.from_pipe(tiny_pipeline("sd3"))
    pipe.set_progress_bar_config(disable=True)
    out = pipe(**call("sd3", **more), subjects=[CAT, DOG]).images
    assert torch.isfinite(out).all()
    pictures = pipe.attention_report[0]["subjects"]["pictures"]  # of the last call
    assert pictures == {"halves": 1, "references": ["cat", "dog"], "banked": False, "generated": 1}


def test_magicface_finds_words_in_the_prompt(sdxl) -> None:
    plain = sdxl(**call("sdxl")).images
    free = [Reference("cat", picture(0)), Reference("dog", picture(1))]
    assert not torch.equal(sdxl(**call("sdxl"), subjects=free, subject_method="magicface:inject_step=0").images, plain)
    with pytest.raises(ConfigError, match="hat"):
        sdxl(**call("sdxl"), subjects=[Reference("hat", picture(0))], subject_method="magicface")


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"subjects": [CAT, CAT]}, "two subjects are named 'cat'"),
        ({"subjects": [Reference(str(n), picture(n)) for n in range(6)]}, "at most 5"),
        ({"subjects": ["cat.png"]}, "Reference"),
        ({"subjects": [Reference("cat", "none.png")]}, "none.png"),
        ({"subjects": [Reference("cat", picture(0), mask=np.zeros((4, 4)))]}, "keeps nothing"),
        ({"subjects": [CAT, DOG], "subject_method": "reference_only"}, "1 subject"),
        ({"subjects": [Reference("hat", picture(0))], "subject_method": "isolation"}, "where hat is to be"),
        ({"subjects": [CAT], "subject_method": "freecustm"}, "did you mean freecustom"),
        ({"subjects": [CAT], "subject_method": "clear"}, "unknown subject method"),
        ({"subjects": [CAT], "image": picture(0)}, "image="),
        ({"subjects": [CAT], "attention": "neighborhood:window=4x4", "highres": "none"}, "first stage"),
    ],
)
def test_wrong_subjects_are_refused(name, pipe, more, match) -> None:
    before = state_of(pipe)
    with pytest.raises(ConfigError, match=match):
        pipe(**call(name), **more)
    assert state_of(pipe) == before


@pytest.mark.parametrize("box", [(0, 0, 1.2, 1), (0.5, 0, 0.5, 1), (0, 0, 1), ("a", 0, 1, 1)])
def test_boxes_lie_in_the_picture(box) -> None:
    with pytest.raises(ConfigError, match="box of 'cat'"):
        Reference("cat", picture(0), region=box)


@pytest.mark.parametrize(("own", "size"), [((30, 21), (24, 56)), ((7, 40), (40, 16)), ((1, 1), (16, 24))])
def test_pictures_keep_their_ratio(own, size) -> None:
    fitted = Reference("cat", picture(4, *own), mask=np.ones((5, 5), dtype=bool)).fitted(size)
    assert fitted.pixels.shape == (1, 3, *size)
    assert fitted.mask.shape == fitted.area.shape == size
    rows, columns = fitted.area.any(1).sum(), fitted.area.any(0).sum()
    assert int(rows) == size[0] or int(columns) == size[1]
    scale = min(size[0] / own[0], size[1] / own[1])
    assert abs(float(rows) - own[0] * scale) <= 1
    assert abs(float(columns) - own[1] * scale) <= 1
    assert torch.equal(fitted.mask, fitted.area)


def test_what_is_transparent_is_no_subject() -> None:
    cut = picture(4, 8, 12).convert("RGBA")
    cut.putalpha(Image.fromarray(np.repeat(np.array([[0, 255]], dtype=np.uint8), 6, 1).repeat(8, 0)))
    fitted = Reference("cat", cut).fitted((16, 24))
    assert fitted.mask is None
    assert not fitted.shown[:, :12].any()
    assert fitted.shown[:, 12:].all()
    assert (fitted.pixels[..., :7] > 0.99).all()
    cut.putalpha(200)
    assert Reference("cat", cut).fitted((16, 24)).shown is None


def test_noise_of_references_follows_step_and_setting() -> None:
    assert subject_method("isolation").name == "isolation_reposition"
    clean = torch.zeros(2, 3, 5)
    for method, fresh in ((FreeCustom(), True), (ReferenceOnly(fresh_noise=False), False)):
        cast = type("Cast", (), {"method": method, "seed": 4})()
        first, second = noise_at(clean, cast, 0), noise_at(clean, cast, 1)
        assert torch.equal(first, second) != fresh
        assert not torch.equal(first[0], first[1])


def test_rows_of_halves() -> None:
    references, own = torch.arange(4.0)[:, None], 10 + torch.arange(6.0)[:, None]
    whole = joined(references, own, 2)
    assert whole.flatten().tolist() == [0, 1, 10, 11, 12, 2, 3, 13, 14, 15]
    assert torch.equal(parted(whole, 2, 3), own)
    assert torch.equal(rejoined(whole, own, 2, 3), whole)
    assert rejoined(whole, own[3:] + 1, 2, 3).flatten().tolist() == [2, 3, 14, 15, 16]
