"""Wan 2.1, text to video: self-attention over the video, cross-attention to the text."""

from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

from gensparse.testing.tiny.parts import WIDTH, normal, seeded, t5_encoder, t5_tokenizer, with_noise

LATENTS = 16
"""Latent channels of Wan's autoencoder."""

SIZES: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": LATENTS,
    "out_channels": LATENTS,
    "text_dim": WIDTH,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
}
"""What all denoisers of Wan's make have in common."""


def pipeline(*, seed: int = 0) -> WanPipeline:
    """A Wan pipeline: 16 pixels per token and axis, 4 frames per token after the first frame."""
    return WanPipeline(
        **shared_parts(seed=seed),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=denoiser(seed=seed),
    )


def denoiser(*, seed: int = 0, **more: Any) -> WanTransformer3DModel:
    """A denoiser of 2 blocks with 2 heads of 12, in eval mode.

    Args:
        more: further or other arguments of `WanTransformer3DModel`.
    """
    with seeded(seed):
        return with_noise(WanTransformer3DModel(**{**SIZES, **more})).eval()


def inputs(
    frames: int, height: int, width: int, *, text: int = 5, batch: int = 2, seed: int = 0, channels: int = LATENTS
) -> dict[str, Any]:
    """Arguments of the denoiser for a grid of frames x height x width tokens.

    Args:
        channels: of the latents, for denoisers that take a condition in further ones.
    """
    draw = normal(seed)
    return {
        "hidden_states": draw(batch, channels, frames, 2 * height, 2 * width),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": draw(batch, text, WIDTH),
    }


def call() -> dict[str, Any]:
    """Arguments of a cheap call of the pipeline: 3 x 4 x 5 tokens, 2 steps."""
    return {"prompt": "a cat", "max_sequence_length": 16, **video()}


def video() -> dict[str, Any]:
    """The part of `call` without the text."""
    return {
        "height": 64,
        "width": 80,
        "num_frames": 9,
        "num_inference_steps": 2,
        "guidance_scale": 5.0,
        "output_type": "latent",
    }


def text_embeds(text: int) -> dict[str, torch.Tensor]:
    """Text for pipelines of Wan's make that clean a prompt with ftfy whether or not it is installed."""
    draw = normal(0)
    return {"prompt_embeds": draw(1, text, WIDTH), "negative_prompt_embeds": draw(1, text, WIDTH)}


def shared_parts(*, seed: int = 0) -> dict[str, Any]:
    """Tokenizer, text encoder and autoencoder: 8 pixels per latent cell and axis, 4 frames per latent frame."""
    tokenizer = t5_tokenizer()
    with seeded(seed):
        vae = AutoencoderKLWan(base_dim=3, z_dim=LATENTS, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
    return {
        "tokenizer": tokenizer,
        "text_encoder": t5_encoder(tokenizer, multilingual=True, seed=seed),
        "vae": vae,
    }
