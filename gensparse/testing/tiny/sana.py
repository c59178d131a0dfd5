"""Sana: linear self-attention, which no sparse pattern can replace; text by ordinary cross-attention."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel

from gensparse.testing.tiny.language import gemma_encoder
from gensparse.testing.tiny.parts import WIDTH, byte_tokenizer, normal, seeded, text_mask, with_noise


def pipeline(*, seed: int = 0) -> SanaPipeline:
    """A Sana pipeline: 4 pixels per token and axis."""
    tokenizer = byte_tokenizer(bos="<bos>", eos="<eos>", pad="<pad>")
    with seeded(seed):
        vae = AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), (5,)),
            decoder_qkv_multiscales=((), (), (5,)),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            scaling_factor=0.4,
        ).eval()
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=gemma_encoder(tokenizer, seed=seed),
        vae=vae,
        transformer=denoiser(seed=seed),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def denoiser(*, seed: int = 0) -> SanaTransformer2DModel:
    """Two blocks with 2 heads of 8, one latent cell per token."""
    with seeded(seed):
        model = SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=WIDTH,
            sample_size=32,
        )
        return with_noise(model).eval()


def inputs(
    height: int, width: int, *, text: int = 5, batch: int = 2, seed: int = 0, lengths: Sequence[int] | None = None
) -> dict[str, Any]:
    """Arguments of the denoiser for a grid of height x width tokens; `lengths` = valid text tokens of each sample."""
    draw = normal(seed)
    return {
        "hidden_states": draw(batch, 4, height, width),
        "encoder_hidden_states": draw(batch, text, WIDTH),
        "encoder_attention_mask": text_mask(text, batch, lengths).float(),
        "timestep": torch.full((batch,), 500.0),
    }


def call() -> dict[str, Any]:
    """Arguments of a cheap call of the pipeline: 8 x 16 tokens, 2 steps, with guidance."""
    return {
        "prompt": "a cat",
        "height": 32,
        "width": 64,
        "num_inference_steps": 2,
        "max_sequence_length": 16,
        "complex_human_instruction": None,
        "use_resolution_binning": False,
        "clean_caption": False,
        "output_type": "pt",
    }
