"""Mochi: video and text together, text last; attention runs sample by sample, without the padding of the text."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel

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

LATENTS = 12
"""Latent channels of the autoencoder."""


def pipeline(*, seed: int = 0) -> MochiPipeline:
    """A Mochi pipeline: 16 pixels per token and axis, 6 frames per token after the first frame."""
    tokenizer = t5_tokenizer()
    with seeded(seed):
        # the group norms have 32 groups whatever the width
        vae = AutoencoderKLMochi(
            latent_channels=LATENTS,
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
        ).eval()
    return MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=vae,
        text_encoder=t5_encoder(tokenizer, seed=seed),
        tokenizer=tokenizer,
        transformer=denoiser(seed=seed),
    )


def denoiser(*, seed: int = 0, **more: Any) -> MochiTransformer3DModel:
    """A denoiser of 2 blocks with 2 heads of 16, in eval mode.

    Args:
        more: further or other arguments of `MochiTransformer3DModel`.
    """
    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "pooled_projection_dim": 16,
        "in_channels": LATENTS,
        "text_embed_dim": WIDTH,
        "time_embed_dim": 16,
        "max_sequence_length": 16,
    }
    with seeded(seed):
        return with_noise(MochiTransformer3DModel(**{**sizes, **more})).eval()


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
        "hidden_states": draw(batch, LATENTS, frames, 2 * height, 2 * width),
        "encoder_hidden_states": draw(batch, text, WIDTH),
        "timestep": torch.full((batch,), 500.0),
        "encoder_attention_mask": text_mask(text, batch, lengths or ragged_lengths(text, batch)),
    }


def call() -> dict[str, Any]:
    """Arguments of a cheap call of the pipeline: 3 x 4 x 5 tokens, 2 steps, both halves of guidance in one batch."""
    return {
        "prompt": "a cat",
        "height": 64,
        "width": 80,
        "num_frames": 13,
        "num_inference_steps": 2,
        "guidance_scale": 4.5,
        "max_sequence_length": 16,
        "output_type": "latent",
    }
