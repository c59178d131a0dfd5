"""FLUX.1: double and single blocks, packed latents."""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from gensparse.testing.tiny.parts import (
    WIDTH,
    clip_encoder,
    clip_tokenizer,
    normal,
    seeded,
    t5_encoder,
    t5_tokenizer,
    tiny_vae,
    with_noise,
)


def pipeline(*, double_blocks: int = 1, single_blocks: int = 1, seed: int = 0) -> FluxPipeline:
    """A FLUX pipeline of about 0.3 million weights: 4 pixels per token and axis, so 32 x 48 pixels are 8 x 12 tokens.

    Call it with `max_sequence_length=16` and few steps; its pictures are noise.
    """
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(seed=seed),
        text_encoder=clip_encoder(clip, seed=seed),
        tokenizer=clip,
        text_encoder_2=t5_encoder(t5, seed=seed),
        tokenizer_2=t5,
        transformer=denoiser(double_blocks=double_blocks, single_blocks=single_blocks, seed=seed),
    )


def denoiser(*, double_blocks: int = 1, single_blocks: int = 1, seed: int = 0) -> FluxTransformer2DModel:
    """A FLUX denoiser with 2 heads of 16 for packed latents of 16 channels, in eval mode."""
    with seeded(seed):
        model = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=double_blocks,
            num_single_layers=single_blocks,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=(4, 4, 8),
        )
        return with_noise(model).eval()


def inputs(height: int, width: int, *, text: int = 5, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """Arguments of the denoiser for a grid of height x width tokens and `text` text tokens."""
    draw = normal(seed)
    return {
        "hidden_states": draw(batch, height * width, 16),
        "encoder_hidden_states": draw(batch, text, WIDTH),
        "pooled_projections": draw(batch, WIDTH),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": position_ids(height, width),
        "txt_ids": torch.zeros(text, 3),
    }


def position_ids(height: int, width: int, picture: int = 0) -> torch.Tensor:
    """[height * width, 3]: the picture's number, row and column of every token."""
    ids = torch.full((height, width, 3), float(picture))
    ids[..., 1], ids[..., 2] = torch.arange(height)[:, None], torch.arange(width)
    return ids.reshape(-1, 3)


def call() -> dict[str, Any]:
    """Arguments of a cheap call of the pipeline: 8 x 12 tokens, 2 steps."""
    return {
        "prompt": "a cat",
        "height": 32,
        "width": 48,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "max_sequence_length": 16,
        "output_type": "pt",
    }


def tiny_flux_inputs(height: int, width: int, *, text: int = 5, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    """As `inputs`, for a single picture."""
    return inputs(height, width, text=text, batch=batch, seed=seed)
