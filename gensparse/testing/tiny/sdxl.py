"""Stable Diffusion XL: a UNet without attention at its first level, with sizes and pooled text as conditions."""

from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

from gensparse.testing.tiny.parts import WIDTH, clip_encoder, clip_tokenizer, normal, seeded, tiny_vae, with_noise


def pipeline(*, seed: int = 0) -> StableDiffusionXLPipeline:
    """An SDXL pipeline: 2 pixels per latent cell, so 32 x 48 pixels are 8 x 12 tokens at the first level with any."""
    clip, clip_2 = clip_tokenizer(), clip_tokenizer()
    return StableDiffusionXLPipeline(
        vae=tiny_vae(seed=seed, use_quant_conv=True, use_post_quant_conv=True, shift_factor=None),
        text_encoder=clip_encoder(clip, seed=seed),
        text_encoder_2=clip_encoder(clip_2, projected=True, seed=seed + 1),
        tokenizer=clip,
        tokenizer_2=clip_2,
        unet=denoiser(seed=seed),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
    )


def denoiser(*, seed: int = 0) -> UNet2DConditionModel:
    """Three levels; attention at the second (2 heads, 1 layer) and the third (4 heads, 2 layers)."""
    with seeded(seed):
        model = UNet2DConditionModel(
            block_out_channels=(16, 32, 32),
            layers_per_block=1,
            sample_size=16,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            # the config's name for the number of heads
            attention_head_dim=(2, 2, 4),
            transformer_layers_per_block=(1, 1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=WIDTH + 6 * 8,
            # both text encoders side by side
            cross_attention_dim=2 * WIDTH,
            norm_num_groups=4,
        )
        return with_noise(model).eval()


def inputs(height: int, width: int, *, text: int = 5, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """Arguments of the denoiser for height x width tokens at its second level: twice as many latent cells per axis."""
    draw = normal(seed)
    return {
        "sample": draw(batch, 4, 2 * height, 2 * width),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": draw(batch, text, 2 * WIDTH),
        "added_cond_kwargs": {"text_embeds": draw(batch, WIDTH), "time_ids": draw(batch, 6)},
    }


def call() -> dict[str, Any]:
    """Arguments of a cheap call of the pipeline: 16 x 24 latent cells, 2 steps, with guidance."""
    return {"prompt": "a cat", "height": 32, "width": 48, "num_inference_steps": 2, "output_type": "pt"}
