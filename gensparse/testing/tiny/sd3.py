"""Stable Diffusion 3: joint blocks with the picture first."""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

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


def pipeline(*, dual_layers: tuple[int, ...] = (), seed: int = 0) -> StableDiffusion3Pipeline:
    """A Stable Diffusion 3 pipeline: 4 pixels per token and axis."""
    clip, clip_2, t5 = clip_tokenizer(), clip_tokenizer(), t5_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=denoiser(dual_layers=dual_layers, seed=seed),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(seed=seed),
        text_encoder=clip_encoder(clip, projected=True, seed=seed),
        tokenizer=clip,
        text_encoder_2=clip_encoder(clip_2, projected=True, seed=seed + 1),
        tokenizer_2=clip_2,
        # as wide as both CLIP encoders side by side
        text_encoder_3=t5_encoder(t5, width=2 * WIDTH, seed=seed),
        tokenizer_3=t5,
    )


def denoiser(*, dual_layers: tuple[int, ...] = (), seed: int = 0) -> SD3Transformer2DModel:
    """Two blocks with 4 heads of 8, patches of 2 x 2 latent cells.

    Args:
        dual_layers: blocks with a second attention, of the picture alone; such models normalise queries and keys.
    """
    with seeded(seed):
        model = SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=32,
            pooled_projection_dim=2 * WIDTH,
            out_channels=4,
            pos_embed_max_size=32,
            dual_attention_layers=dual_layers,
            qk_norm="rms_norm" if dual_layers else None,
        )
        return with_noise(model).eval()


def inputs(height: int, width: int, *, text: int = 5, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """Arguments of the denoiser for a grid of height x width tokens, at most 32 per axis."""
    draw = normal(seed)
    return {
        "hidden_states": draw(batch, 4, 2 * height, 2 * width),
        "encoder_hidden_states": draw(batch, text, 2 * WIDTH),
        "pooled_projections": draw(batch, 2 * WIDTH),
        "timestep": torch.full((batch,), 500.0),
    }


def call() -> dict[str, Any]:
    """Arguments of a cheap call of the pipeline: 8 x 12 tokens, 2 steps, with guidance."""
    return {
        "prompt": "a cat",
        "height": 32,
        "width": 48,
        "num_inference_steps": 2,
        "max_sequence_length": 16,
        "output_type": "pt",
    }
