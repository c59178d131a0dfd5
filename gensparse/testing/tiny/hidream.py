"""HiDream: four text encoders, experts, picture first; every layer sees its own layer of Llama."""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HiDreamImagePipeline, HiDreamImageTransformer2DModel
from transformers import LlamaConfig, LlamaForCausalLM

from gensparse.testing.tiny.language import decoder_settings
from gensparse.testing.tiny.parts import (
    WIDTH,
    byte_tokenizer,
    clip_encoder,
    clip_tokenizer,
    normal,
    seeded,
    t5_encoder,
    t5_tokenizer,
    tiny_vae,
    with_noise,
)

_LLAMA_LAYERS = 3


def pipeline(*, seed: int = 0) -> HiDreamImagePipeline:
    """A HiDream pipeline: 4 pixels per token and axis; it scales every size to the area of 32 x 32 pixels."""
    clip, clip_2, t5, llama = clip_tokenizer(), clip_tokenizer(), t5_tokenizer(), byte_tokenizer()
    # the pipeline asks for the attention maps, which only eager attention can give
    config = LlamaConfig(attn_implementation="eager", **decoder_settings(llama, layers=_LLAMA_LAYERS))
    with seeded(seed):
        text_encoder_4 = LlamaForCausalLM(config).eval()
    pipe = HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(seed=seed),
        text_encoder=clip_encoder(clip, projected=True, seed=seed),
        tokenizer=clip,
        text_encoder_2=clip_encoder(clip_2, projected=True, seed=seed + 1),
        tokenizer_2=clip_2,
        text_encoder_3=t5_encoder(t5, seed=seed),
        tokenizer_3=t5,
        text_encoder_4=text_encoder_4,
        tokenizer_4=llama,
        transformer=denoiser(seed=seed),
    )
    # the pipeline has no argument for the size it scales to
    pipe.default_sample_size = 16
    return pipe


def denoiser(*, seed: int = 0) -> HiDreamImageTransformer2DModel:
    """A double and a single block with 2 of 3 experts, 2 heads of 16, patches of 2 x 2 cells, at most 256 tokens."""
    with seeded(seed):
        model = HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_channels=[WIDTH, WIDTH],
            text_emb_dim=2 * WIDTH,
            num_routed_experts=3,
            num_activated_experts=2,
            axes_dims_rope=(8, 4, 4),
            max_resolution=(32, 32),
            llama_layers=[0, _LLAMA_LAYERS - 1],
        )
        return with_noise(model).eval()


def inputs(height: int, width: int, *, text: int = 5, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """Arguments of the denoiser for a grid of height x width tokens, `text` of T5 and as many of Llama.

    The model pads pictures that are not square to its largest number of tokens, 256.
    """
    draw = normal(seed)
    return {
        "hidden_states": draw(batch, 4, 2 * height, 2 * width),
        "timesteps": torch.full((batch,), 500.0),
        "encoder_hidden_states_t5": draw(batch, text, WIDTH),
        "encoder_hidden_states_llama3": draw(_LLAMA_LAYERS, batch, text, WIDTH),
        "pooled_embeds": draw(batch, 2 * WIDTH),
    }


def call() -> dict[str, Any]:
    """Arguments of a cheap call of the pipeline: 8 x 8 tokens, 2 steps, with guidance."""
    return {
        "prompt": "a cat",
        "height": 32,
        "width": 32,
        "num_inference_steps": 2,
        "max_sequence_length": 16,
        "output_type": "pt",
    }
