"""CogView4: GLM as text encoder, text first, padded to a multiple of 16 tokens."""

from typing import Any

import torch
from diffusers import CogView4Pipeline, CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import GlmConfig, GlmModel

from gensparse.testing.tiny.language import decoder_settings
from gensparse.testing.tiny.parts import WIDTH, byte_tokenizer, normal, seeded, tiny_vae, with_noise


def pipeline(*, seed: int = 0) -> CogView4Pipeline:
    """A CogView4 pipeline: 4 pixels per token and axis."""
    tokenizer = byte_tokenizer(bos="[gMASK]", eos="<|endoftext|>", pad="<|endoftext|>", padding_side="left")
    with seeded(seed):
        text_encoder = GlmModel(GlmConfig(**decoder_settings(tokenizer))).eval()
    return CogView4Pipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=tiny_vae(seed=seed, shift_factor=None),
        transformer=denoiser(seed=seed),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def denoiser(*, seed: int = 0) -> CogView4Transformer2DModel:
    """Two blocks with 2 heads of 16, patches of 2 x 2 latent cells."""
    with seeded(seed):
        model = CogView4Transformer2DModel(
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            out_channels=4,
            text_embed_dim=WIDTH,
            time_embed_dim=32,
            condition_dim=8,
            rope_axes_dim=(16, 16),
            sample_size=16,
        )
        return with_noise(model).eval()


def inputs(height: int, width: int, *, text: int = 5, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """Arguments of the denoiser for a grid of height x width tokens."""
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
    """Arguments of a cheap call of the pipeline: 8 x 12 tokens, 2 steps, a second run for the negative prompt."""
    return {
        "prompt": "a cat",
        "height": 32,
        "width": 48,
        "num_inference_steps": 2,
        "max_sequence_length": 16,
        "output_type": "pt",
    }
