"""PixArt in stages: diffusers' own loop at the native size, every way that is no UNet's beyond it."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

from gensparse.errors import ConfigError
from gensparse.highres.stage_store import FolderStageStore
from gensparse.highres.stages import Stage
from gensparse.pipelines import CUpscale, PixArtHighresPipeline
from gensparse.testing.tiny import tiny_pipeline, with_noise

WAYS = ["cascade", "demofusion", "c_upscale", "none"]


@pytest.fixture(scope="module")
def stock():
    pipe = tiny_pipeline("pixart")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(stock):
    return highres(stock)


def highres(stock):
    out = PixArtHighresPipeline.from_pipe(stock)
    out.set_progress_bar_config(disable=True)
    return out


def call(seed: int = 3, **more):
    own = {"prompt": "a cat", "num_inference_steps": 3, "clean_caption": False, "max_sequence_length": 16}
    return {**own, "output_type": "pt", "generator": torch.Generator().manual_seed(seed), **more}


@pytest.mark.parametrize(
    ("scheduler", "size", "output_type"),
    [(None, (16, 16), "pt"), (EulerDiscreteScheduler, (24, 40), "pt"), (DDIMScheduler, (40, 24), "latent")],
)
def test_native_stage_is_diffusers_pipeline_to_the_bit(stock, scheduler, size, output_type):
    if scheduler is not None:
        own = copy.copy(stock)
        own.scheduler = scheduler.from_config({**stock.scheduler.config, "clip_sample": False})
        stock = own
    more = {"height": size[0], "width": size[1], "output_type": output_type, "negative_prompt": "red"}
    expected = stock(**call(**more), use_resolution_binning=False).images
    assert torch.equal(highres(stock)(**call(**more, highres="none")).images, expected)
    more["guidance_scale"] = 1.0
    expected = stock(**call(**more), use_resolution_binning=False).images
    assert torch.equal(highres(stock)(**call(**more, stages=[Stage(*size, 3)])).images, expected)


def test_several_prompts_are_diffusers(stock, pipe):
    more = {"height": 16, "width": 24, "prompt": ["a cat", "two dogs"], "num_images_per_prompt": 2}
    expected = stock(**call(**more), use_resolution_binning=False).images
    assert torch.equal(pipe(**call(**more)).images, expected)


def test_alpha_is_told_the_size_of_what_it_sees(stock, monkeypatch):
    config = {**stock.transformer.config, "use_additional_conditions": True}
    torch.manual_seed(0)
    model = with_noise(PixArtTransformer2DModel.from_config(config)).eval()
    parts = {**stock.components, "transformer": model}
    alpha, pipe, seen = PixArtAlphaPipeline(**parts), PixArtHighresPipeline(**parts), []
    alpha.set_progress_bar_config(disable=True)
    pipe.set_progress_bar_config(disable=True)
    forward = model.forward

    def noted(z, *args, added_cond_kwargs, **kwargs):
        seen.append((tuple(z.shape[-2:]), {k: v.tolist() for k, v in added_cond_kwargs.items()}))
        return forward(z, *args, added_cond_kwargs=added_cond_kwargs, **kwargs)

    monkeypatch.setattr(model, "forward", noted)
    pipe(**call(height=32, width=20, num_inference_steps=2, highres=CUpscale(screening=False)))
    assert {size for size, _ in seen} == {(10, 6), (8, 8)}
    for (rows, columns), added in seen:
        assert all(row == [2.0 * rows, 2.0 * columns] for row in added["resolution"])
        assert all(row == [pytest.approx(rows / columns)] for row in added["aspect_ratio"])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [(44, 28), (20, 52)])
def test_any_size_comes_out(pipe, way, size):
    images = pipe(**call(height=size[0], width=size[1], num_inference_steps=2, highres=way)).images
    assert images.shape == (1, 3, *size)
    assert torch.isfinite(images).all()
    assert images.std() > 0.01
    sizes = [(s.height, s.width) for s in pipe.plan(*size, 2, way)]
    assert [(r["height"], r["width"]) for r in pipe.attention_report] == sizes
    assert all(side % 4 == 0 for own in sizes for side in own)


def test_pictures_are_enlarged_with_a_method(pipe):
    image = torch.rand(1, 3, 30, 18, generator=torch.Generator().manual_seed(9))
    more = {"height": 40, "width": 24, "image": image, "strength": 0.6}
    dense = pipe(**call(**more, attention="dense")).images
    full = pipe(**call(**more, attention="neighborhood:window=99x99")).images
    torch.testing.assert_close(full, dense, rtol=0, atol=1e-4)
    assert pipe.attention_report[-1]["dense"] == {}


def test_resumed_run_gives_the_same_bits(pipe, tmp_path):
    more = {"height": 40, "width": 24, "highres": "c_upscale"}
    store, seen = FolderStageStore(tmp_path), []
    fresh = pipe(**call(**more, stage_store=store)).images
    store.path(1).unlink()
    note = {"callback_on_stage_end": lambda p, r: seen.append(r.index)}
    assert torch.equal(pipe(**call(**more, stage_store=store, **note)).images, fresh)
    assert seen == [1]


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"height": 42}, "multiples of 4"),
        ({"highres": "freescale"}, "PixArt has not"),
        ({"attention": "magic"}, "magic"),
        ({"strength": 0.5}, "without an image"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
    ],
)
def test_wrong_settings_are_refused_before_the_first_step(pipe, wrong, match, monkeypatch):
    monkeypatch.setattr(pipe.transformer, "forward", lambda *a, **k: pytest.fail("the model ran"))
    with pytest.raises(ConfigError, match=match):
        pipe(**call(**{"height": 44, "width": 28, **wrong}))


def test_loading_saving_and_sharing(stock, pipe, tmp_path):
    assert pipe.transformer is stock.transformer
    pipe.save_pretrained(tmp_path)
    loaded = PixArtHighresPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    more = {"height": 28, "width": 36, "num_inference_steps": 2}
    torch.testing.assert_close(loaded(**call(**more)).images, pipe(**call(**more)).images, rtol=0, atol=1e-5)
