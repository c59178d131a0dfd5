"""CogView3 Plus: T5 as text encoder, text first, position embeddings instead of rotations."""

from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler, CogView3PlusPipeline, CogView3PlusTransformer2DModel

from gensparse.testing.tiny.parts import WIDTH, normal, seeded, t5_encoder, t5_tokenizer, tiny_vae, with_noise


def pipeline(*, seed: int = 0) -> CogView3PlusPipeline:
    """A CogView3 Plus pipeline: 4 pixels per token and axis."""
    t5 = t5_tokenizer()
    return CogView3PlusPipeline(
        tokenizer=t5,
        text_encoder=t5_encoder(t5, seed=seed),
        vae=tiny_vae(seed=seed, shift_factor=None),
        transformer=denoiser(seed=seed),
        scheduler=CogVideoXDDIMScheduler(),
    )


def denoiser(*, seed: int = 0) -> CogView3PlusTransformer2DModel:
    """Two blocks with 2 heads of 16, patches of 2 x 2 latent cells."""
    with seeded(seed):
        model = CogView3PlusTransformer2DModel(
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            out_channels=4,
            text_embed_dim=WIDTH,
            time_embed_dim=32,
            condition_dim=8,
            pos_embed_max_size=32,
            sample_size=16,
        )
        return with_noise(model).eval()


def inputs(height: int, width: int, *, text: int = 5, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """Arguments of the denoiser for a grid of height x width tokens, at most 32 per axis."""
    draw = normal(seed)
    size = torch.tensor([[4.0 * height, 4.0 * width]]).repeat(batch, 1)
    return {
        "hidden_states": draw(batch, 4, 2 * height, 2 * width),
        "encoder_hidden_states": draw(batch, text, WIDTH),
        "timestep": torch.full((batch,), 500),
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros(batch, 2),
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
