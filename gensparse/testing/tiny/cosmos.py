"""Cosmos: self-attention over the video, cross-attention to the text.

There is no tiny pipeline: diffusers' pipelines of this family need the package of a safety checker.
"""

from typing import Any

import torch
from diffusers import CosmosTransformer3DModel

from gensparse.testing.tiny.parts import WIDTH, normal, seeded, with_noise

LATENTS = 4
"""Latent channels."""


def denoiser(*, seed: int = 0, **more: Any) -> CosmosTransformer3DModel:
    """A denoiser of 2 blocks with 2 heads of 12 for at most 16 x 32 x 32 tokens, in eval mode.

    Args:
        more: further or other arguments of `CosmosTransformer3DModel`.
    """
    # a padding mask among the channels would need torchvision
    sizes = {
        "in_channels": LATENTS,
        "out_channels": LATENTS,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "mlp_ratio": 2.0,
        "text_embed_dim": WIDTH,
        "adaln_lora_dim": 8,
        "max_size": (16, 64, 64),
        "concat_padding_mask": False,
    }
    with seeded(seed):
        return with_noise(CosmosTransformer3DModel(**{**sizes, **more})).eval()


def inputs(frames: int, height: int, width: int, *, text: int = 5, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """Arguments of the denoiser for a grid of frames x height x width tokens."""
    draw = normal(seed)
    return {
        "hidden_states": draw(batch, LATENTS, frames, 2 * height, 2 * width),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": draw(batch, text, WIDTH),
        "fps": 24,
    }
