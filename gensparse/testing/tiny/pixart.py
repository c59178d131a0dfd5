"""PixArt Sigma: self-attention of the picture, text by cross-attention."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

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


def pipeline(*, seed: int = 0) -> PixArtSigmaPipeline:
    """A PixArt Sigma pipeline: 4 pixels per token and axis."""
    t5 = t5_tokenizer()
    return PixArtSigmaPipeline(
        tokenizer=t5,
        text_encoder=t5_encoder(t5, seed=seed),
        vae=tiny_vae(seed=seed, use_quant_conv=True, use_post_quant_conv=True, shift_factor=None),
        transformer=denoiser(seed=seed),
        scheduler=DPMSolverMultistepScheduler(),
    )


def denoiser(*, seed: int = 0) -> PixArtTransformer2DModel:
    """Two blocks with 3 heads of 8, patches of 2 x 2 latent cells, mean and variance as output."""
    with seeded(seed):
        model = PixArtTransformer2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            caption_channels=WIDTH,
            in_channels=4,
            cross_attention_dim=24,
            out_channels=8,
            attention_bias=True,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            use_additional_conditions=False,
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
        "encoder_attention_mask": text_mask(text, batch, lengths).float(),
        "timestep": torch.full((batch,), 500),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def call() -> dict[str, Any]:
    """Arguments of a cheap call of the pipeline: 8 x 12 tokens, 2 steps, with guidance."""
    return {
        "prompt": "a cat",
        "height": 32,
        "width": 48,
        "num_inference_steps": 2,
        "max_sequence_length": 16,
        "use_resolution_binning": False,
        "clean_caption": False,
        "output_type": "pt",
    }
