"""Lumina Image 2.0: Gemma 2 as text encoder; every sample's picture starts right after its own text."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

from gensparse.testing.tiny.language import gemma_encoder
from gensparse.testing.tiny.parts import WIDTH, byte_tokenizer, normal, seeded, text_mask, tiny_vae, with_noise


def pipeline(*, seed: int = 0) -> Lumina2Pipeline:
    """A Lumina 2 pipeline: 16 pixels per token and axis, since it takes 8 pixels per latent cell for granted."""
    tokenizer = byte_tokenizer(bos="<bos>", eos="<eos>", pad="<pad>")
    return Lumina2Pipeline(
        transformer=denoiser(seed=seed),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(levels=4, seed=seed),
        text_encoder=gemma_encoder(tokenizer, seed=seed),
        tokenizer=tokenizer,
    )


def denoiser(*, seed: int = 0) -> Lumina2Transformer2DModel:
    """Two joint layers and a refiner for each of text and picture, 3 heads of 8 on one key head."""
    with seeded(seed):
        model = Lumina2Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            hidden_size=24,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=3,
            num_kv_heads=1,
            multiple_of=2,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(128, 64, 64),
            cap_feat_dim=WIDTH,
        )
        return with_noise(model).eval()


def inputs(
    height: int, width: int, *, text: int = 5, batch: int = 2, seed: int = 0, lengths: Sequence[int] | None = None
) -> dict[str, Any]:
    """Arguments of the denoiser for a grid of height x width tokens; `lengths` = valid text tokens of each sample."""
    draw = normal(seed)
    return {
        "hidden_states": draw(batch, 4, 2 * height, 2 * width),
        "encoder_hidden_states": draw(batch, text, WIDTH),
        "encoder_attention_mask": text_mask(text, batch, lengths),
        "timestep": torch.full((batch,), 0.5),
    }


def call() -> dict[str, Any]:
    """Arguments of a cheap call of the pipeline: 5 x 7 tokens, 2 steps, a second run for the negative prompt."""
    return {
        "prompt": "a cat",
        "system_prompt": "",
        "height": 80,
        "width": 112,
        "num_inference_steps": 2,
        "max_sequence_length": 32,
        "output_type": "pt",
    }
