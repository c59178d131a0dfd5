"""HunyuanVideo: double and single blocks over video and text together, text last and of each sample's own length."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from gensparse.testing.tiny.language import decoder_settings
from gensparse.testing.tiny.parts import (
    WIDTH,
    byte_tokenizer,
    clip_encoder,
    clip_tokenizer,
    normal,
    ragged_lengths,
    seeded,
    text_mask,
    with_noise,
)

LATENTS = 4
"""Latent channels of the autoencoder."""


def pipeline(*, seed: int = 0) -> HunyuanVideoPipeline:
    """A HunyuanVideo pipeline: 16 pixels per token and axis, 4 frames per token after the first frame."""
    llama, clip = byte_tokenizer(), clip_tokenizer()
    return HunyuanVideoPipeline(
        text_encoder=_llama(llama, seed),
        tokenizer=llama,
        transformer=denoiser(seed=seed),
        vae=hunyuan_vae(seed=seed),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=clip_encoder(clip, seed=seed),
        tokenizer_2=clip,
    )


def denoiser(*, seed: int = 0, **more: Any) -> HunyuanVideoTransformer3DModel:
    """A denoiser of one double and one single block with 2 heads of 16, in eval mode.

    Args:
        more: further or other arguments of `HunyuanVideoTransformer3DModel`.
    """
    sizes = {
        "in_channels": LATENTS,
        "out_channels": LATENTS,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "text_embed_dim": WIDTH,
        "pooled_projection_dim": WIDTH,
        "rope_axes_dim": (4, 6, 6),
    }
    with seeded(seed):
        return with_noise(HunyuanVideoTransformer3DModel(**{**sizes, **more})).eval()


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
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": draw(batch, text, WIDTH),
        "encoder_attention_mask": text_mask(text, batch, lengths or ragged_lengths(text, batch)),
        "pooled_projections": draw(batch, WIDTH),
        "guidance": torch.full((batch,), 6000.0),
    }


def call() -> dict[str, Any]:
    """Arguments of a cheap call of the pipeline: 3 x 4 x 5 tokens, 2 steps."""
    return {
        "prompt": "a cat",
        "prompt_template": {"template": "{}", "crop_start": 0},
        "height": 64,
        "width": 80,
        "num_frames": 9,
        "num_inference_steps": 2,
        "guidance_scale": 6.0,
        "max_sequence_length": 16,
        "output_type": "latent",
    }


def hunyuan_vae(*, seed: int = 0) -> AutoencoderKLHunyuanVideo:
    """An autoencoder with 8 pixels per latent cell and axis, 4 frames per latent frame after the first."""
    with seeded(seed):
        vae = AutoencoderKLHunyuanVideo(
            latent_channels=LATENTS, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        )
    return vae.eval()


def _llama(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaModel:
    # the pipeline leaves out the last 2 layers
    config = LlamaConfig(**decoder_settings(tokenizer, layers=3))
    with seeded(seed):
        return LlamaModel(config).eval()
