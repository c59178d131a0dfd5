"""Chroma: FLUX.1's blocks with modulation from one approximator and a mask for the text."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

from gensparse.testing.tiny.flux import position_ids
from gensparse.testing.tiny.parts import (
    WIDTH,
    normal,
    seeded,
    t5_encoder,
    t5_tokenizer,
    text_mask,
    tiny_vae,
    with_noise,
)


def pipeline(*, seed: int = 0) -> ChromaPipeline:
    """A Chroma pipeline: 4 pixels per token and axis."""
    t5 = t5_tokenizer()
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(seed=seed),
        text_encoder=t5_encoder(t5, seed=seed),
        tokenizer=t5,
        transformer=denoiser(seed=seed),
    )


def denoiser(*, seed: int = 0) -> ChromaTransformer2DModel:
    """A double and a single block, 2 heads of 16, packed latents of 16 channels."""
    with seeded(seed):
        model = ChromaTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 4, 8),
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        )
        return with_noise(model).eval()


def inputs(
    height: int, width: int, *, text: int = 5, batch: int = 2, seed: int = 0, lengths: Sequence[int] | None = None
) -> dict[str, Any]:
    """Arguments of the denoiser for a grid of height x width tokens; `lengths` = valid text tokens of each sample."""
    draw, tokens = normal(seed), height * width
    return {
        "hidden_states": draw(batch, tokens, 16),
        "encoder_hidden_states": draw(batch, text, WIDTH),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": position_ids(height, width),
        "txt_ids": torch.zeros(text, 3),
        "attention_mask": torch.cat([text_mask(text, batch, lengths), torch.ones(batch, tokens, dtype=torch.bool)], 1),
    }


def call() -> dict[str, Any]:
    """Arguments of a cheap call of the pipeline: 8 x 12 tokens, 2 steps, with a negative prompt."""
    return {
        "prompt": "a cat",
        "negative_prompt": "rain",
        "height": 32,
        "width": 48,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "max_sequence_length": 16,
        "output_type": "pt",
    }
