"""CogVideoX: every block attends over text and video together, text first; with rotary or with added positions."""

from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed

from gensparse.testing.tiny.parts import WIDTH, normal, seeded, t5_encoder, t5_tokenizer, with_noise

LATENTS, HEAD_DIM, TEXT = 4, 16, 16
"""Latent channels of the autoencoder, size of a head, text tokens of the pipeline."""


def pipeline(*, rotary: bool = True, seed: int = 0) -> CogVideoXPipeline:
    """A CogVideoX pipeline: 16 pixels per token and axis, 4 frames per token after the first frame.

    Args:
        rotary: rotary positions as in the 5b model; False adds them to the tokens as in 2b.
    """
    tokenizer = t5_tokenizer()
    with seeded(seed):
        vae = AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=LATENTS,
            layers_per_block=1,
            norm_num_groups=2,
        ).eval()
    return CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=t5_encoder(tokenizer, seed=seed),
        vae=vae,
        transformer=denoiser(rotary=rotary, text=TEXT, seed=seed),
        scheduler=CogVideoXDDIMScheduler(),
    )


def denoiser(*, rotary: bool = True, text: int = 5, seed: int = 0, **more: Any) -> CogVideoXTransformer3DModel:
    """A denoiser of 2 blocks with 2 heads of 16, in eval mode.

    Args:
        rotary: as in `pipeline`.
        text: text tokens that it takes; without rotary positions it takes exactly these.
        more: further or other arguments of `CogVideoXTransformer3DModel`.
    """
    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": HEAD_DIM,
        "in_channels": LATENTS,
        "out_channels": LATENTS,
        "time_embed_dim": 16,
        "text_embed_dim": WIDTH,
        "num_layers": 2,
        "sample_width": 10,
        "sample_height": 8,
        "sample_frames": 9,
        "max_text_seq_length": text,
        "use_rotary_positional_embeddings": rotary,
    }
    with seeded(seed):
        return with_noise(CogVideoXTransformer3DModel(**{**sizes, **more})).eval()


def inputs(
    frames: int, height: int, width: int, *, text: int = 5, batch: int = 2, seed: int = 0, rotary: bool = True
) -> dict[str, Any]:
    """Arguments of the denoiser for a grid of frames x height x width tokens.

    Args:
        rotary: as in `denoiser`.
    """
    draw = normal(seed)
    grid = {"crops_coords": ((0, 0), (height, width)), "grid_size": (height, width), "temporal_size": frames}
    return {
        "hidden_states": draw(batch, frames, LATENTS, 2 * height, 2 * width),
        "encoder_hidden_states": draw(batch, text, WIDTH),
        "timestep": torch.full((batch,), 500),
        "image_rotary_emb": get_3d_rotary_pos_embed(HEAD_DIM, **grid) if rotary else None,
    }


def call() -> dict[str, Any]:
    """Arguments of a cheap call of the pipeline: 3 x 4 x 5 tokens, 2 steps."""
    return {
        "prompt": "a cat",
        "height": 64,
        "width": 80,
        "num_frames": 9,
        "num_inference_steps": 2,
        "guidance_scale": 6.0,
        "max_sequence_length": TEXT,
        "output_type": "latent",
    }
