"""Z-Image: Qwen 3 as text encoder; picture first, then text, each padded to a multiple of 32 tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from gensparse.testing.tiny.language import decoder_settings, qwen_tokenizer
from gensparse.testing.tiny.parts import WIDTH, normal, seeded, tiny_vae, with_noise


def pipeline(*, seed: int = 0) -> ZImagePipeline:
    """A Z-Image pipeline: 4 pixels per token and axis."""
    tokenizer = qwen_tokenizer()
    with seeded(seed):
        text_encoder = Qwen3Model(Qwen3Config(**decoder_settings(tokenizer))).eval()
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(seed=seed),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=denoiser(seed=seed),
    )


def denoiser(*, seed: int = 0) -> ZImageTransformer2DModel:
    """Two joint layers and a refiner for each of picture and text, 2 heads of 16, patches of 2 x 2 latent cells."""
    with seeded(seed):
        model = ZImageTransformer2DModel(
            all_patch_size=(2,),
            all_f_patch_size=(1,),
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=WIDTH,
            axes_dims=[8, 4, 4],
            axes_lens=[256, 64, 64],
        )
        return with_noise(model).eval()


def inputs(
    height: int, width: int, *, text: int = 5, batch: int = 2, seed: int = 0, lengths: Sequence[int] | None = None
) -> dict[str, Any]:
    """Arguments of the denoiser for a grid of height x width tokens; `lengths` = text tokens of each sample."""
    draw = normal(seed)
    return {
        "x": [draw(4, 1, 2 * height, 2 * width) for _ in range(batch)],
        "t": torch.full((batch,), 0.5),
        "cap_feats": [draw(length, WIDTH) for length in (lengths or [text] * batch)],
    }


def call() -> dict[str, Any]:
    """Arguments of a cheap call of the pipeline: 8 x 12 tokens, 2 steps, with guidance."""
    return {
        "prompt": "a cat",
        "height": 32,
        "width": 48,
        "num_inference_steps": 2,
        "max_sequence_length": 32,
        "output_type": "pt",
    }
