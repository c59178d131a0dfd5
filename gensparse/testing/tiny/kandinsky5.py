"""Kandinsky 5, text to video: self-attention over the video, cross-attention to the text, channels last."""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Kandinsky5T2VPipeline, Kandinsky5Transformer3DModel

from gensparse.testing.tiny.hunyuan_video import LATENTS, hunyuan_vae
from gensparse.testing.tiny.language import qwen_tokenizer, qwen_vl_encoder
from gensparse.testing.tiny.parts import WIDTH, clip_encoder, clip_tokenizer, normal, seeded, with_noise


def pipeline(*, seed: int = 0) -> Kandinsky5T2VPipeline:
    """A Kandinsky 5 pipeline: 16 pixels per token and axis, 4 frames per token after the first frame."""
    qwen, clip = qwen_tokenizer(), clip_tokenizer()
    pipe = Kandinsky5T2VPipeline(
        transformer=denoiser(seed=seed),
        vae=hunyuan_vae(seed=seed),
        text_encoder=qwen_vl_encoder(qwen, seed=seed),
        tokenizer=qwen,
        text_encoder_2=clip_encoder(clip, seed=seed),
        tokenizer_2=clip,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )
    # one token per letter would make the instruction to the text encoder most of the text
    pipe.prompt_template, pipe.prompt_template_encode_start_idx = "{}", 0
    return pipe


def denoiser(*, seed: int = 0, **more: Any) -> Kandinsky5Transformer3DModel:
    """A denoiser of one text block and 2 video blocks with 2 heads of 24, in eval mode.

    Args:
        more: further or other arguments of `Kandinsky5Transformer3DModel`.
    """
    sizes = {
        "in_visual_dim": LATENTS,
        "in_text_dim": WIDTH,
        "in_text_dim2": WIDTH,
        "time_dim": 32,
        "out_visual_dim": LATENTS,
        "model_dim": 48,
        "ff_dim": 32,
        "num_text_blocks": 1,
        "num_visual_blocks": 2,
        "axes_dims": (8, 8, 8),
    }
    with seeded(seed):
        return with_noise(Kandinsky5Transformer3DModel(**{**sizes, **more})).eval()


def inputs(frames: int, height: int, width: int, *, text: int = 5, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """Arguments of the denoiser for a grid of frames x height x width tokens."""
    draw = normal(seed)
    return {
        "hidden_states": draw(batch, frames, 2 * height, 2 * width, LATENTS),
        "encoder_hidden_states": draw(batch, text, WIDTH),
        "timestep": torch.full((batch,), 500.0),
        "pooled_projections": draw(batch, WIDTH),
        "visual_rope_pos": [torch.arange(frames), torch.arange(height), torch.arange(width)],
        "text_rope_pos": torch.arange(text),
    }


def call() -> dict[str, Any]:
    """Arguments of a cheap call of the pipeline: 3 x 4 x 5 tokens, 2 steps."""
    return {
        "prompt": "a cat",
        "negative_prompt": "blurred",
        "height": 64,
        "width": 80,
        "num_frames": 9,
        "num_inference_steps": 2,
        "guidance_scale": 5.0,
        "max_sequence_length": 16,
        "output_type": "latent",
    }
