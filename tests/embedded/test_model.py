"""The shipped pipeline: complete, small, whitened, within its cost, and it shows what the prompt says."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from diffusers.utils import logging as diffusers_logging

from gensparse.embedded import embedded_notes, embedded_path, load_embedded
from gensparse.embedded.render import render
from gensparse.embedded.scenes import PALETTE, random_scene


@pytest.fixture(scope="module")
def pipe():
    return load_embedded()


@pytest.fixture(scope="module")
def pictures():
    return torch.stack([to_tensor(render(random_scene(seed), 256, 256)) for seed in range(8_000_000, 8_000_008)])


def to_tensor(picture):
    return torch.from_numpy(picture).permute(2, 0, 1).float() / 127.5 - 1


def close_ups(zoom):
    start = np.random.default_rng(zoom).uniform(0, 1 - 1 / zoom, (8, 2))
    scenes = [random_scene(seed) for seed in range(8_100_000, 8_100_008)]
    windows = [(y, x, y + 1 / zoom, x + 1 / zoom) for y, x in start]
    return torch.stack([to_tensor(render(s, 256, 256, w)) for s, w in zip(scenes, windows, strict=True)])


def psnr(vae, target):
    with torch.no_grad():
        out = vae.decode(vae.encode(target).latents).sample.clamp(-1, 1)
    return float(-10 * ((out - target) / 2).square().mean((1, 2, 3)).log10().mean())


def test_the_folder_is_small_and_safe():
    files = [f for f in embedded_path().rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 25e6
    assert not {f.suffix for f in files} & {".bin", ".pt", ".pkl", ".ckpt", ".py"}


def test_plain_diffusers_loads_the_folder():
    pipe = FluxPipeline.from_pretrained(embedded_path())
    assert pipe.transformer.config.guidance_embeds is False
    assert pipe.vae_scale_factor == 8
    assert pipe.transformer.config.in_channels == 4 * pipe.vae.config.latent_channels


def test_loading_says_nothing():
    script = "from gensparse.embedded import load_embedded; load_embedded()"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == ""
    assert "AutoencoderTiny" not in run.stderr
    assert "Loading" not in run.stderr


def test_loading_leaves_the_logging_settings_alone():
    before = (diffusers_logging.get_verbosity(), diffusers_logging.is_progress_bar_enabled())
    load_embedded()
    assert (diffusers_logging.get_verbosity(), diffusers_logging.is_progress_bar_enabled()) == before


def test_configs_name_no_local_folder():
    assert not [f for f in embedded_path().rglob("*.json") if "_name_or_path" in f.read_text()]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_the_dtype_is_the_one_asked_for(dtype):
    pipe = load_embedded(dtype)
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder):  # transformers keeps some of a T5 in float32
        assert {p.dtype for p in part.parameters()} == {dtype or torch.float32}


def test_whole_pictures_survive_the_autoencoder(pipe, pictures):
    assert psnr(pipe.vae, pictures) >= 30


@pytest.mark.parametrize("zoom", [2, 4, 8, 16])
def test_close_ups_survive_the_autoencoder(pipe, zoom):
    assert psnr(pipe.vae, close_ups(zoom)) >= 33


def test_latents_are_white(pipe, pictures):
    with torch.no_grad():
        latents = pipe.vae.encode(torch.cat([pictures, close_ups(4)])).latents
    assert latents.mean((0, 2, 3)).abs().max() < 0.35
    assert latents.std((0, 2, 3)).sub(1).abs().max() < 0.35
    assert (pipe.vae.config.scaling_factor, pipe.vae.config.shift_factor) == (1.0, 0.0)


def test_decoding_costs_at_most_300_kiloflops_per_pixel(pipe):
    flops = 0

    def count(module, inputs, output):
        nonlocal flops
        kernel = module.weight[0].numel()
        flops += 2 * kernel * output.numel()

    hooks = [m.register_forward_hook(count) for m in pipe.vae.decoder.modules() if isinstance(m, torch.nn.Conv2d)]
    with torch.no_grad():
        pipe.vae.decode(torch.zeros(1, pipe.vae.config.latent_channels, 8, 8))
    for hook in hooks:
        hook.remove()
    assert flops / 64**2 <= 300e3


def test_decoding_shrugs_off_small_noise(pipe, pictures):
    with torch.no_grad():
        latents = pipe.vae.encode(pictures).latents
        clean = pipe.vae.decode(latents).sample
        noisy = pipe.vae.decode(latents + 0.05 * torch.randn(latents.shape, generator=torch.manual_seed(0))).sample
    assert (clean - noisy).abs().mean() < 0.03


def generate(pipe, prompt, **kwargs):
    settings = {"height": 256, "width": 256, "num_inference_steps": 16, "output_type": "np", "true_cfg_scale": 3.5}
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt,
        negative_prompt="",
        max_sequence_length=embedded_notes()["max_sequence_length"],
        generator=torch.Generator().manual_seed(0),
        **{**settings, **kwargs},
    ).images[0]


def share_near(picture, colour, tolerance=45):
    """Share of pixels within `tolerance` (0-255, per channel) of a palette colour."""
    return float((np.abs(picture * 255 - np.array(PALETTE[colour])).max(-1) < tolerance).mean())


def test_the_prompt_decides_the_colours(pipe):
    """One seed, four pairs of colours: each picture shows its own subject and background and no other picture's."""
    pairs = [("red", "white"), ("blue", "yellow"), ("green", "pink"), ("purple", "black")]
    prompts = [
        f"a large {subject} plain circle in the center on a {ground} plain background" for subject, ground in pairs
    ]
    pipe.set_progress_bar_config(disable=True)
    pictures = pipe(
        prompts,
        negative_prompt=[""] * len(prompts),
        true_cfg_scale=3.5,
        height=256,
        width=256,
        num_inference_steps=10,
        max_sequence_length=embedded_notes()["max_sequence_length"],
        generator=[torch.Generator().manual_seed(0) for _ in prompts],
        output_type="np",
    ).images
    for picture, (subject, ground) in zip(pictures, pairs, strict=True):
        others = {colour for pair in pairs for colour in pair} - {subject, ground}
        assert share_near(picture, ground) > 0.4
        assert share_near(picture[64:192, 64:192], subject) > 0.2
        assert max(share_near(picture, colour) for colour in others) < 0.05


def test_the_same_seed_gives_the_same_picture_and_other_sizes_work(pipe):
    prompt = "a yellow star on a purple plain background"
    first, second = (generate(pipe, prompt, num_inference_steps=2) for _ in range(2))
    assert np.array_equal(first, second)
    assert generate(pipe, prompt, height=208, width=320, num_inference_steps=2).shape == (208, 320, 3)


def test_an_empty_prompt_still_gives_a_picture(pipe):
    picture = generate(pipe, "", num_inference_steps=4)
    assert np.isfinite(picture).all()
    assert picture.std() > 0.01
