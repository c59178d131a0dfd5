"""Stable Diffusion 1.5: a UNet with attention at its first two levels and in the middle."""

from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from gensparse.testing.tiny.parts import WIDTH, clip_encoder, clip_tokenizer, normal, seeded, tiny_vae, with_noise


def pipeline(*, seed: int = 0) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline: 2 pixels per latent cell, so 32 x 48 pixels are 16 x 24 tokens at most."""
    clip = clip_tokenizer()
    return StableDiffusionPipeline(
        vae=tiny_vae(seed=seed, use_quant_conv=True, use_post_quant_conv=True, shift_factor=None),
        text_encoder=clip_encoder(clip, seed=seed),
        tokenizer=clip,
        unet=denoiser(seed=seed),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def denoiser(*, seed: int = 0) -> UNet2DConditionModel:
    """Three levels; attention of 2 heads at the first, the second and, as the middle block, the third."""
    with seeded(seed):
        model = UNet2DConditionModel(
            block_out_channels=(16, 32, 32),
            layers_per_block=1,
            sample_size=16,
            in_channels=4,
            out_channels=4,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            # the config's name for the number of heads
            attention_head_dim=2,
            cross_attention_dim=WIDTH,
            norm_num_groups=4,
        )
        return with_noise(model).eval()


def inputs(height: int, width: int, *, text: int = 5, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """Arguments of the denoiser for height x width tokens at its first level, which are the latent cells."""
    draw = normal(seed)
    return {
        "sample": draw(batch, 4, height, width),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": draw(batch, text, WIDTH),
    }


def call() -> dict[str, Any]:
    """Arguments of a cheap call of the pipeline: 16 x 24 latent cells, 2 steps, with guidance."""
    return {"prompt": "a cat", "height": 32, "width": 48, "num_inference_steps": 2, "output_type": "pt"}
