"""AuraFlow: text first, with 8 learned register tokens in front of it."""

from typing import Any

import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

from gensparse.testing.tiny.parts import WIDTH, normal, seeded, t5_encoder, t5_tokenizer, tiny_vae, with_noise


def pipeline(*, seed: int = 0) -> AuraFlowPipeline:
    """An AuraFlow pipeline: 4 pixels per token and axis."""
    t5 = t5_tokenizer()
    return AuraFlowPipeline(
        tokenizer=t5,
        text_encoder=t5_encoder(t5, multilingual=True, seed=seed),
        vae=tiny_vae(seed=seed, use_quant_conv=True, use_post_quant_conv=True, shift_factor=None),
        transformer=denoiser(seed=seed),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def denoiser(*, seed: int = 0) -> AuraFlowTransformer2DModel:
    """A joint and a single block, 4 heads of 8, patches of 2 x 2 latent cells."""
    with seeded(seed):
        model = AuraFlowTransformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=WIDTH,
            out_channels=4,
            pos_embed_max_size=32 * 32,
        )
        return with_noise(model).eval()


def inputs(height: int, width: int, *, text: int = 5, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """Arguments of the denoiser for a grid of height x width tokens, at most 32 per axis."""
    draw = normal(seed)
    return {
        "hidden_states": draw(batch, 4, 2 * height, 2 * width),
        "encoder_hidden_states": draw(batch, text, WIDTH),
        "timestep": torch.full((batch,), 0.5),
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
