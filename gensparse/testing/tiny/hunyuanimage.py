"""HunyuanImage 2.1: Qwen2.5-VL and, for quoted words, ByT5 as text encoders; picture first, then text."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanImage,
    FlowMatchEulerDiscreteScheduler,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
)
from transformers import ByT5Tokenizer

from gensparse.testing.tiny.language import qwen_tokenizer, qwen_vl_encoder
from gensparse.testing.tiny.parts import WIDTH, normal, seeded, t5_encoder, text_mask, with_noise


def pipeline(*, seed: int = 0) -> HunyuanImagePipeline:
    """A HunyuanImage pipeline: 4 pixels per token and axis; 24 text tokens and 8 for quoted words."""
    qwen, byt5 = qwen_tokenizer(), ByT5Tokenizer()
    with seeded(seed):
        vae = AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(32, 32, 32),
            layers_per_block=1,
            spatial_compression_ratio=4,
            sample_size=32,
            scaling_factor=0.75,
        ).eval()
    pipe = HunyuanImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=qwen_vl_encoder(qwen, seed=seed),
        tokenizer=qwen,
        text_encoder_2=t5_encoder(byt5, seed=seed),
        tokenizer_2=byt5,
        transformer=denoiser(seed=seed),
    )
    # the pipeline has no arguments for these, which are 1000 and 128
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = 24, 8
    return pipe


def denoiser(*, seed: int = 0) -> HunyuanImageTransformer2DModel:
    """A double and a single block and a text refiner, 2 heads of 16, one latent cell per token."""
    with seeded(seed):
        model = HunyuanImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=(1, 1),
            text_embed_dim=WIDTH,
            text_embed_2_dim=WIDTH,
            rope_axes_dim=(8, 8),
        )
        return with_noise(model).eval()


def inputs(
    height: int,
    width: int,
    *,
    text: int = 5,
    batch: int = 2,
    seed: int = 0,
    lengths: Sequence[int] | None = None,
    quoted: int = 0,
) -> dict[str, Any]:
    """Arguments of the denoiser for a grid of height x width tokens.

    Args:
        lengths: valid text tokens of each sample.
        quoted: further text tokens from ByT5, which the model puts in front of the others.
    """
    draw = normal(seed)
    arguments = {
        "hidden_states": draw(batch, 4, height, width),
        "encoder_hidden_states": draw(batch, text, WIDTH),
        "encoder_attention_mask": text_mask(text, batch, lengths).long(),
        "timestep": torch.full((batch,), 500.0),
    }
    if quoted:
        arguments["encoder_hidden_states_2"] = draw(batch, quoted, WIDTH)
        arguments["encoder_attention_mask_2"] = text_mask(quoted, batch).long()
    return arguments


def call() -> dict[str, Any]:
    """Arguments of a cheap call of the pipeline: 8 x 12 tokens, 2 steps."""
    return {"prompt": 'a "cat"', "height": 32, "width": 48, "num_inference_steps": 2, "output_type": "pt"}
