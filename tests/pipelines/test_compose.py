"""An object in a background, in tiny pipelines of stages: the loop around primecomposer, end to end."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler
from PIL import Image

from gensparse import Reference
from gensparse.errors import ConfigError
from gensparse.methods import PrimeComposer
from gensparse.pipelines import SD15CustomizePipeline, SDXLCustomizePipeline
from gensparse.pipelines.unet_compose import UNetComposes
from gensparse.subjects.composition import composition
from gensparse.subjects.inversion import seen
from gensparse.subjects.placing import mask_box
from gensparse.subjects.read_masks import box_mask
from gensparse.testing.tiny import tiny_pipeline

SIZE = (24, 40)
CLASSES = {"sd15": SD15CustomizePipeline, "sdxl": SDXLCustomizePipeline}


def picture(seed: int, height: int = 30, width: int = 21) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


ROOM = Reference("room", picture(0, 31, 47))
CAT = Reference("cat", picture(1, 26, 38), mask=(0.1, 0.2, 0.8, 0.9), region=(0.1, 0.2, 0.7, 0.95))


@pytest.fixture(scope="module", params=CLASSES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipe(name: str):
    return made(name)


@pytest.fixture(scope="module")
def sd15():
    return made("sd15")


def made(name: str) -> Any:
    stock = tiny_pipeline(name)
    stock.scheduler = DPMSolverMultistepScheduler.from_config(stock.scheduler.config)
    pipe = CLASSES[name].from_pipe(stock)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, *, seed: int = 3, method: Any = "primecomposer", **more: Any) -> torch.Tensor:
    settings = {
        "prompt": "a cat in a room",
        "height": SIZE[0],
        "width": SIZE[1],
        "num_inference_steps": 6,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(seed),
        "subjects": [ROOM, CAT],
        "subject_method": method,
        **more,
    }
    return pipe(**settings).images


def state_of(pipe) -> tuple:
    """Everything a call must leave as it was."""
    places = [module for name, module in pipe.text_encoder.named_modules() if name.endswith("position_embedding")]
    modules = [*pipe.unet.modules(), *places]
    assert places
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules]
    processors = {name: (id(p), type(p)) for name, p in pipe.unet.attn_processors.items()}
    return hooks, processors, list(pipe.unet.state_dict()), str(pipe.scheduler.__dict__), pipe._cast, pipe._composing


class Watch:
    """Notes what the UNet gets in every call."""

    def __init__(self, pipe: Any) -> None:
        self.rows: list[int] = []
        self.inputs: list[torch.Tensor] = []
        self._hook = pipe.unet.register_forward_pre_hook(self._note)

    def _note(self, _model: Any, args: tuple[Any, ...]) -> None:
        self.rows.append(len(args[0]))
        self.inputs.append(args[0].clone())

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: Any) -> None:
        self._hook.remove()


def test_pictures_stand_beside_in_the_steered_steps_alone_and_nothing_is_left(pipe) -> None:
    """Two pictures are inverted without guidance; then two more per half for the first steps."""
    before, method = state_of(pipe), PrimeComposer(steer=0.6)
    with Watch(pipe) as watch:
        out = draw(pipe, method=method)
    assert torch.isfinite(out).all()
    ends = method.ends(method.steer, 6)
    assert ends == 2
    assert watch.rows == [2] * 6 + [6] * ends + [2] * (6 - ends)
    (report,) = pipe.attention_report
    assert report["subjects"]["names"] == ["room", "cat"]
    assert report["subjects"]["calls"]["sparse"] > 0
    assert state_of(pipe) == before
    assert torch.equal(out, draw(pipe, method=method))
    assert not torch.allclose(out, draw(pipe, method=method, seed=4), atol=1e-3)


def test_what_stands_beside_is_the_inversion_at_the_noise_of_the_step(sd15, monkeypatch) -> None:
    found = {}
    own = UNetComposes._composed

    def noted(self, *args):
        found["it"] = own(self, *args)
        return found["it"]

    monkeypatch.setattr(UNetComposes, "_composed", noted)
    with Watch(sd15) as watch:
        draw(sd15)
    it = found["it"]
    assert it.path[0].shape == (2, 4, SIZE[0] // sd15.vae_scale_factor, SIZE[1] // sd15.vae_scale_factor)
    assert len(it.path) == 7
    inside = torch.zeros(it.path[0].shape[-2:], dtype=torch.bool)
    inside.view(-1)[it.own.target] = True
    there = torch.zeros_like(inside)
    there.view(-1)[it.own.source] = True
    for step in range(2):
        composite, item, new = watch.inputs[6 + step][3:]
        background, clean = seen(it.path[step], it.levels.sigmas[step])
        torch.testing.assert_close(composite[:, ~inside], background[:, ~inside])
        torch.testing.assert_close(composite[:, inside], clean[:, there])
        torch.testing.assert_close(item[:, ~there], clean[:, ~there])
        torch.testing.assert_close(item[:, there], new[:, inside])
        assert torch.equal(watch.inputs[6 + step][:3], watch.inputs[6 + step][3:])


def test_the_background_is_kept_around_the_box_as_long_as_asked(sd15) -> None:
    """With all steps kept, the picture outside of the box is the background, up to what the autoencoder makes of it."""
    kept = PrimeComposer(keep=1.0, order=1)
    first, second = (draw(sd15, method=kept, seed=seed) for seed in (3, 4))
    own = composition(ROOM, CAT, SIZE).placed(tuple(first.shape[-2:]))
    inside = own.inside(first)
    assert inside.any()
    assert not inside.all()
    assert torch.equal(first[..., ~inside], second[..., ~inside])
    assert not torch.allclose(first[..., inside], second[..., inside], atol=1e-3)
    free = [draw(sd15, method=PrimeComposer(keep=0.0), seed=seed) for seed in (3, 4)]
    assert not torch.equal(free[0][..., ~inside], free[1][..., ~inside])
    other = draw(sd15, method=kept, subjects=[Reference("room", picture(7, 31, 47)), CAT])
    assert not torch.allclose(other[..., ~inside], first[..., ~inside], atol=1e-3)


def test_pasted_in_every_step_it_is_the_object_in_the_background(sd15) -> None:
    pasted = PrimeComposer(paste=1.0, order=1)
    assert torch.equal(draw(sd15, method=pasted), draw(sd15, method=pasted, seed=4))


def test_every_setting_matters(sd15) -> None:
    changes = (
        {},
        {"steer": 0.9},
        {"paste": 0.6},
        {"keep": 0.1},
        {"queries": "object"},
        {"confine": False},
        {"same_domain": True},
        {"layers": "up_blocks"},
    )
    outs = [draw(sd15, method=PrimeComposer(**change)) for change in changes]
    assert all(torch.isfinite(out).all() for out in outs)
    for number, out in enumerate(outs[1:], start=1):
        assert not torch.allclose(out, outs[0], atol=1e-4), changes[number]
    assert torch.equal(draw(sd15, subjects=[CAT, ROOM]), outs[0])  # the object is the one with a box


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, PNDMScheduler])
def test_other_schedulers_guidance_that_is_off_and_callbacks(scheduler: Any) -> None:
    pipe = made("sd15")
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    shapes = []

    def note(pipe: Any, i: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        shapes.append((values["latents"].shape[0], values["prompt_embeds"].shape[0]))
        return {"latents": values["latents"] * 1.0}

    inputs = ["latents", "prompt_embeds"]
    more = {"callback_on_step_end": note, "callback_on_step_end_tensor_inputs": inputs}
    out = draw(pipe, **more)
    assert torch.isfinite(out).all()
    assert set(shapes) == {(1, 2)}
    assert torch.equal(out, draw(pipe))
    with Watch(pipe) as watch:
        assert torch.isfinite(draw(pipe, guidance_scale=1.0)).all()
    assert set(watch.rows) == {1, 2, 3}


def test_larger_stages_go_on_from_the_composed_picture(pipe) -> None:
    side = pipe.native_size
    out = draw(pipe, height=2 * side, width=2 * side, attention="neighborhood:window=4x4")
    assert torch.isfinite(out).all()
    first, second = pipe.attention_report
    assert first["subjects"]["method"]["method"] == "primecomposer"
    assert "subjects" not in second


def test_the_prompt_of_the_inversion_says_the_same_everywhere(pipe) -> None:
    """One token without its place: in a causal encoder without positions every token sees copies of itself."""
    texts = []
    hook = pipe.unet.register_forward_pre_hook(
        lambda _model, _args, kwargs: texts.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    draw(pipe)
    hook.remove()
    first = texts[0]
    assert first.shape[0] == 2
    torch.testing.assert_close(first, first[:1, :1].expand_as(first), rtol=0, atol=1e-5)
    assert not torch.allclose(texts[-1][-1, 0], texts[-1][-1, 1], atol=1e-3)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"subjects": [CAT]}, "takes two pictures.*1 are given, 1 with a box"),
        ({"subjects": [ROOM]}, "1 are given, 0 with a box"),
        ({"subjects": [ROOM, Reference("cat", picture(1))]}, "2 are given, 0 with a box"),
        ({"subjects": [ROOM, CAT, Reference("dog", picture(2))]}, "3 are given"),
        ({"subjects": [Reference("room"), CAT]}, "needs a picture of room"),
        ({"prompt": "a dog in a room"}, "keeps the words 'cat'.*confine=false"),
        ({"prompt": ["a cat", "a cat"]}, "one picture in a call, and 2"),
        ({"num_images_per_prompt": 2}, "one picture in a call, and 2"),
        ({"attention": "neighborhood:window=4x4", "highres": "none"}, "first stage"),
        ({"image": picture(0)}, "image="),
        (
            {"subjects": [ROOM, Reference("cat", picture(1), mask=np.zeros((4, 4)), region=(0, 0, 1, 1))]},
            "keeps nothing",
        ),
        ({"subjects": [ROOM, Reference("cat", picture(1), region=np.zeros((4, 4)))]}, "region of 'cat' is empty"),
    ],
    ids=range(12),
)
def test_what_does_not_fit_is_refused(sd15, more: dict[str, Any], match: str) -> None:
    before = state_of(sd15)
    with pytest.raises(ConfigError, match=match):
        draw(sd15, **more)
    assert state_of(sd15) == before


def test_errors_on_the_way_leave_nothing(sd15) -> None:
    def fail(pipe: Any, i: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError("stop")

    before = state_of(sd15)
    with pytest.raises(RuntimeError, match="stop"):
        draw(sd15, callback_on_step_end=fail)
    assert state_of(sd15) == before


# -------------------------------------------------------------------------------------------------------- the pictures
@pytest.mark.parametrize("own", [(26, 38), (7, 50), (50, 7), (1, 1)])
@pytest.mark.parametrize("region", [(0.1, 0.2, 0.7, 0.95), (0.8, 0.9, 1, 1), (0, 0, 1, 1)])
def test_the_object_fills_its_box_and_keeps_its_ratio(own: tuple[int, int], region: tuple[float, ...]) -> None:
    item = Reference("cat", picture(1, *own), region=region)
    what = composition(ROOM, item, SIZE)
    assert what.background.shape == what.object.shape == what.pasted.shape == (1, 3, *SIZE)
    top, left, bottom, right = mask_box(what.mask)
    low = mask_box(box_mask(region, SIZE))
    room, found = (low[2] - low[0], low[3] - low[1]), (bottom - top, right - left)
    assert any(a == b for a, b in zip(room, found, strict=True))
    assert all(a >= b for a, b in zip(room, found, strict=True))
    scale = min(a / b for a, b in zip(room, own, strict=True))
    assert all(abs(a - max(1, b * scale)) <= 0.5 for a, b in zip(found, own, strict=True))
    assert (what.object[..., ~what.mask] == -1).all()
    own_box = what.placed(SIZE).box
    changed = (what.pasted != what.background).any(1)[0]
    inside = torch.zeros(SIZE, dtype=torch.bool)
    inside[own_box[0] : own_box[2], own_box[1] : own_box[3]] = True
    assert not changed[~inside].any()


def test_backgrounds_fill_the_picture_and_transparency_cuts_out() -> None:
    wide = np.zeros((10, 60, 3), np.uint8)
    wide[:, 20:40] = 255
    what = composition(Reference("room", wide), CAT, (20, 20))
    assert (what.background > 0.9).float().mean() > 0.9
    cut = picture(4, 8, 12).convert("RGBA")
    alpha = np.zeros((8, 12), np.uint8)
    alpha[2:6, 3:11] = 255
    cut.putalpha(Image.fromarray(alpha))
    what = composition(ROOM, Reference("cat", cut, region=(0, 0, 1, 1)), (16, 32))
    assert mask_box(what.mask) == (0, 0, 16, 32)
    assert what.mask.all()
