"""QwenImage: Qwen2.5-VL as text encoder, text first, several pictures in a row when editing."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)

from gensparse.testing.tiny.language import qwen_tokenizer, qwen_vl_encoder
from gensparse.testing.tiny.parts import WIDTH, normal, seeded, text_mask, with_noise


def pipeline(*, seed: int = 0) -> QwenImagePipeline:
    """A QwenImage pipeline: 4 pixels per token and axis."""
    tokenizer = qwen_tokenizer()
    with seeded(seed):
        vae = AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ).eval()
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=qwen_vl_encoder(tokenizer, seed=seed),
        tokenizer=tokenizer,
        transformer=denoiser(seed=seed),
    )


def denoiser(*, seed: int = 0) -> QwenImageTransformer2DModel:
    """Two blocks with 2 heads of 16, packed latents of 16 channels."""
    with seeded(seed):
        model = QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(8, 4, 4),
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
    references: tuple[tuple[int, int], ...] = (),
) -> dict[str, Any]:
    """Arguments of the denoiser for a grid of height x width tokens.

    Args:
        lengths: valid text tokens of each sample.
        references: sizes in tokens of the pictures that follow the target.
    """
    draw = normal(seed)
    shapes = [(1, height, width), *((1, *size) for size in references)]
    return {
        "hidden_states": draw(batch, sum(rows * columns for _, rows, columns in shapes), 16),
        "encoder_hidden_states": draw(batch, text, WIDTH),
        "encoder_hidden_states_mask": None if lengths is None else text_mask(text, batch, lengths).long(),
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [shapes] * batch,
    }


def call() -> dict[str, Any]:
    """Arguments of a cheap call of the pipeline: 8 x 12 tokens, 2 steps, a second run for the negative prompt."""
    return {
        "prompt": "a cat",
        "negative_prompt": "rain",
        "true_cfg_scale": 3.0,
        "height": 32,
        "width": 48,
        "num_inference_steps": 2,
        "max_sequence_length": 16,
        "output_type": "pt",
    }
