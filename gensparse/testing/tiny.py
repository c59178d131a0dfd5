"""Tiny complete pipelines with random weights, made offline: for tests and for `samples/ --tiny`.

Weights get noise, since zero-initialised gates would hide whatever attention does.
"""

import json
import string
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

ModelT = TypeVar("ModelT", bound=nn.Module)

WIDTH = 32
"""Width of text embeddings and of the denoiser."""


def tiny_flux_pipeline(*, double_blocks: int = 1, single_blocks: int = 1, seed: int = 0) -> FluxPipeline:
    """A FLUX pipeline of about 0.3 million weights: 4 pixels per token and axis, so 32 x 48 pixels are 8 x 12 tokens.

    Call it with `max_sequence_length=16` and few steps; its pictures are noise.
    """
    clip, t5 = _clip_tokenizer(), _t5_tokenizer()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(seed=seed),
        text_encoder=_clip_encoder(clip, seed),
        tokenizer=clip,
        text_encoder_2=_t5_encoder(t5, seed),
        tokenizer_2=t5,
        transformer=tiny_flux_transformer(double_blocks=double_blocks, single_blocks=single_blocks, seed=seed),
    )


def tiny_flux_transformer(*, double_blocks: int = 1, single_blocks: int = 1, seed: int = 0) -> FluxTransformer2DModel:
    """A FLUX denoiser with 2 heads of 16 for packed latents of 16 channels, in eval mode."""
    with _seeded(seed):
        model = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=double_blocks,
            num_single_layers=single_blocks,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=(4, 4, 8),
        )
        return with_noise(model).eval()


def tiny_flux_inputs(height: int, width: int, *, text: int = 5, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    """Arguments of `tiny_flux_transformer` for a grid of height x width tokens and `text` text tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(height, width, 3)
    ids[..., 1], ids[..., 2] = torch.arange(height)[:, None], torch.arange(width)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "hidden_states": noise(batch, height * width, 16),
        "encoder_hidden_states": noise(batch, text, WIDTH),
        "pooled_projections": noise(batch, WIDTH),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(text, 3),
    }


def tiny_vae(*, latent_channels: int = 4, seed: int = 0) -> AutoencoderKL:
    """An autoencoder with 2 pixels per latent cell and axis."""
    with _seeded(seed):
        return AutoencoderKL(
            in_channels=3,
            out_channels=3,
            block_out_channels=(8, 16),
            layers_per_block=1,
            latent_channels=latent_channels,
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            sample_size=32,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.06,
            scaling_factor=1.5,
        ).eval()


def with_noise(model: ModelT, scale: float = 0.08) -> ModelT:
    """The model with Gaussian noise added to every weight, from torch's current seed."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * scale)
    return model


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """A seed for torch's generator inside the block; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _clip_tokenizer() -> CLIPTokenizer:
    """Byte-level tokens without merges: one token per letter."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    end = "<|endoftext|>"
    config = {"model_max_length": 77, "bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end}
    with TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        Path(folder, "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": end}))
        return CLIPTokenizer.from_pretrained(folder)


def _t5_tokenizer() -> PreTrainedTokenizerFast:
    """Unigram over single letters."""
    letters = string.ascii_letters + string.digits + ".,-_!?'\"()"
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("\u2581", -2.0)]
    tokenizer = Tokenizer(models.Unigram([*special, *((letter, -3.0) for letter in letters)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


def _clip_encoder(tokenizer: CLIPTokenizer, seed: int) -> CLIPTextModel:
    # the pooled embedding is the one at the end-of-text token, so its id must be the tokenizer's
    config = CLIPTextConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=3,
        projection_dim=WIDTH,
        max_position_embeddings=77,
    )
    with _seeded(seed):
        return CLIPTextModel(config).eval()


def _t5_encoder(tokenizer: PreTrainedTokenizerFast, seed: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_ff=37,
        d_kv=8,
        num_heads=4,
        num_layers=2,
        is_gated_act=True,
        dense_act_fn="gelu_new",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    with _seeded(seed):
        return T5EncoderModel(config).eval()
