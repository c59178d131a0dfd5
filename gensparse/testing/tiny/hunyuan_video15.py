"""HunyuanVideo 1.5: double blocks over video and three kinds of text, each sample's padding last."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from diffusers.guiders import ClassifierFreeGuidance
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

from gensparse.testing.tiny.language import decoder_settings, qwen_tokenizer
from gensparse.testing.tiny.parts import WIDTH, normal, ragged_lengths, seeded, t5_encoder, text_mask, with_noise

LATENTS = 4
"""Latent channels of the autoencoder."""

GLYPHS, IMAGE = 4, 3
"""Tokens of quoted words and of the image, besides the text's."""

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""The chat template: what the messages say and nothing else."""


def pipeline(*, seed: int = 0) -> HunyuanVideo15Pipeline:
    """A HunyuanVideo 1.5 pipeline: 4 pixels per token and axis, 2 frames per token after the first frame."""
    qwen, byt5 = qwen_tokenizer(chat_template=TEMPLATE), ByT5Tokenizer()
    pipe = HunyuanVideo15Pipeline(
        text_encoder=_qwen(qwen, seed),
        tokenizer=qwen,
        transformer=denoiser(seed=seed),
        vae=_vae(seed),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=t5_encoder(byt5, seed=seed),
        tokenizer_2=byt5,
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    )
    # one token per letter would make the instruction to the text encoder most of the text
    pipe.system_message, pipe.prompt_template_encode_start_idx = "", 0
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length, pipe.vision_num_semantic_tokens = 24, 16, IMAGE
    return pipe


def denoiser(*, seed: int = 0, **more: Any) -> HunyuanVideo15Transformer3DModel:
    """A denoiser of 2 blocks with 2 heads of 16, in eval mode.

    Args:
        more: further or other arguments of `HunyuanVideo15Transformer3DModel`.
    """
    sizes = {
        "in_channels": 2 * LATENTS + 1,
        "out_channels": LATENTS,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "text_embed_dim": WIDTH,
        "text_embed_2_dim": WIDTH,
        "image_embed_dim": WIDTH,
        "rope_axes_dim": (4, 6, 6),
        "target_size": 16,
        "task_type": "t2v",
    }
    with seeded(seed):
        return with_noise(HunyuanVideo15Transformer3DModel(**{**sizes, **more})).eval()


def inputs(
    frames: int,
    height: int,
    width: int,
    *,
    text: int = 5,
    batch: int = 2,
    seed: int = 0,
    image: bool = False,
    lengths: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Arguments of the denoiser for a grid of frames x height x width tokens.

    After the grid come `text` + 4 (quoted words) + 3 (image) tokens; the second sample has 2 text tokens and 2 of the
    quoted words less, which are padding.

    Args:
        image: whether there is an image; its tokens are padding otherwise.
        lengths: text tokens of each sample that are not padding, instead of 2 less in the second.
    """
    draw = normal(seed)
    return {
        "hidden_states": draw(batch, 2 * LATENTS + 1, frames, height, width),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": draw(batch, text, WIDTH),
        "encoder_attention_mask": text_mask(text, batch, lengths or ragged_lengths(text, batch)),
        "encoder_hidden_states_2": draw(batch, GLYPHS, WIDTH),
        "encoder_attention_mask_2": text_mask(GLYPHS, batch, ragged_lengths(GLYPHS, batch)),
        "image_embeds": draw(batch, IMAGE, WIDTH) if image else torch.zeros(batch, IMAGE, WIDTH),
    }


def call() -> dict[str, Any]:
    """Arguments of a cheap call of the pipeline: 3 x 4 x 5 tokens, 2 steps; the quoted word is read on its own."""
    return {
        "prompt": 'a cat says "hi"',
        "height": 16,
        "width": 20,
        "num_frames": 5,
        "num_inference_steps": 2,
        "output_type": "latent",
    }


def _vae(seed: int) -> AutoencoderKLHunyuanVideo15:
    with seeded(seed):
        vae = AutoencoderKLHunyuanVideo15(
            latent_channels=LATENTS,
            block_out_channels=(16, 16),
            layers_per_block=1,
            spatial_compression_ratio=4,
            temporal_compression_ratio=2,
            downsample_match_channel=False,
            upsample_match_channel=False,
        )
    return vae.eval()


def _qwen(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2_5_VLTextModel:
    # the pipeline leaves out the last 2 layers
    settings = decoder_settings(tokenizer, layers=3)
    rope = {"rope_type": "default", "mrope_section": [1, 1, settings.pop("head_dim") // 2 - 2]}
    config = Qwen2_5_VLTextConfig(**settings, rope_parameters=rope)
    with seeded(seed):
        return Qwen2_5_VLTextModel(config).eval()
