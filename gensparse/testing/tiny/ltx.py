"""LTX-Video: self-attention over packed video tokens, cross-attention to the text."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)

from gensparse.testing.tiny.parts import (
    WIDTH,
    normal,
    ragged_lengths,
    seeded,
    t5_encoder,
    t5_tokenizer,
    text_mask,
    with_noise,
)

LATENTS = 8
"""Latent channels of the autoencoder."""

PIXELS = 8
"""Pixels per token and axis, and frames per token after the first frame."""


def pipeline(*, seed: int = 0) -> LTXPipeline:
    """An LTX pipeline: 8 pixels per token and axis, 8 frames per token after the first frame."""
    tokenizer = t5_tokenizer()
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(seed),
        text_encoder=t5_encoder(tokenizer, seed=seed),
        tokenizer=tokenizer,
        transformer=denoiser(seed=seed),
    )


def denoiser(*, seed: int = 0, **more: Any) -> LTXVideoTransformer3DModel:
    """A denoiser of 2 blocks with 2 heads of 16, in eval mode.

    Args:
        more: further or other arguments of `LTXVideoTransformer3DModel`.
    """
    sizes = {
        "in_channels": LATENTS,
        "out_channels": LATENTS,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "num_layers": 2,
        "caption_channels": WIDTH,
    }
    with seeded(seed):
        return with_noise(LTXVideoTransformer3DModel(**{**sizes, **more})).eval()


def inputs(
    frames: int,
    height: int,
    width: int,
    *,
    text: int = 5,
    batch: int = 2,
    seed: int = 0,
    lengths: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Arguments of the denoiser for a grid of frames x height x width tokens.

    Args:
        lengths: text tokens of each sample that are not padding; without it, 2 less in the second sample.
    """
    draw = normal(seed)
    return {
        "hidden_states": draw(batch, frames * height * width, LATENTS),
        "encoder_hidden_states": draw(batch, text, WIDTH),
        "timestep": torch.full((batch,), 500.0),
        "encoder_attention_mask": text_mask(text, batch, lengths or ragged_lengths(text, batch)),
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (PIXELS / 25, PIXELS, PIXELS),
    }


def call() -> dict[str, Any]:
    """Arguments of a cheap call of the pipeline: 3 x 4 x 8 tokens, 2 steps, both halves of guidance in one batch."""
    return {
        "prompt": "a cat",
        "height": 32,
        "width": 64,
        "num_frames": 17,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "max_sequence_length": 16,
        "output_type": "latent",
    }


def _vae(seed: int) -> AutoencoderKLLTXVideo:
    with seeded(seed):
        vae = AutoencoderKLLTXVideo(
            latent_channels=LATENTS,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            patch_size=1,
        )
    return vae.eval()
