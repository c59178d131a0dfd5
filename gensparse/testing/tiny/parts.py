"""Parts that the tiny pipelines share: seeds, noise, tokenizers, text encoders, an autoencoder; all made offline."""

import json
import string
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

ModelT = TypeVar("ModelT", bound=nn.Module)

WIDTH = 32
"""Width of text embeddings and, where a family allows it, of the denoiser."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A seed for torch's generator inside the block; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def with_noise(model: ModelT, scale: float = 0.08) -> ModelT:
    """The model with Gaussian noise added to every weight, from torch's current seed.

    Without it, gates that start at zero would hide whatever attention does.
    """
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * scale)
    return model


def normal(seed: int) -> Callable[..., torch.Tensor]:
    """A function of sizes that draws Gaussian numbers from a stream of its own."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator)

    return draw


def ragged_lengths(text: int, batch: int) -> list[int]:
    """A number of valid text tokens for each sample: all in the first, 2 less in each further, but at least one."""
    return [max(text - 2 * sample, 1) for sample in range(batch)]


def text_mask(text: int, batch: int, lengths: Sequence[int] | None = None) -> torch.Tensor:
    """bool [batch, text]: which text tokens are valid; `lengths` holds their number for each sample, else all are."""
    counts = torch.full((batch,), text) if lengths is None else torch.tensor(lengths)
    return torch.arange(text) < counts[:, None]


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level tokens without merges: one token per letter."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    end = "<|endoftext|>"
    config = {"model_max_length": 77, "bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end}
    with TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        Path(folder, "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": end}))
        return CLIPTokenizer.from_pretrained(folder)


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """T5's (and UMT5's) kind: Unigram over single letters, `</s>` at the end; pad 0, eos 1, unk 2."""
    letters = string.ascii_letters + string.digits + ".,-_!?'\"()"
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("\u2581", -2.0)]
    tokenizer = Tokenizer(models.Unigram([*special, *((letter, -3.0) for letter in letters)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


def byte_tokenizer(
    *,
    bos: str | None = "<|begin_of_text|>",
    eos: str = "<|end_of_text|>",
    pad: str = "<|pad|>",
    special: Sequence[str] = (),
    template: str = "",
    **more: Any,
) -> PreTrainedTokenizerFast:
    """The kind of Llama, Qwen and GLM: byte-level BPE, one token per byte, `bos` in front where there is one.

    Args:
        special: further special tokens, such as those of a chat template.
        template: text whose words, leading spaces included, are one token each. A pipeline that drops a fixed number
            of tokens of its prompt template needs the template to have as many here as with the real tokenizer.
        more: further arguments of the tokenizer, such as `chat_template` or `padding_side`.
    """
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    marks = list(dict.fromkeys(token for token in (bos, eos, pad, *special) if token))
    # each word grows letter by letter from its start
    whole = [word for word, _ in split.pre_tokenize_str(template)]
    merges = list(dict.fromkeys((word[:end], word[end]) for word in whole for end in range(1, len(word))))
    vocabulary = [*marks, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(start + letter for start, letter in merges)]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    tokenizer.add_special_tokens(marks)
    names = {"bos_token": bos, "eos_token": eos, "pad_token": pad, "model_max_length": 512}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**names, **more})


def clip_encoder(
    tokenizer: CLIPTokenizer, *, width: int = WIDTH, projected: bool = False, seed: int = 0
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """CLIP's text encoder of 3 layers; `projected` for the kind whose pooled embedding has a projection."""
    # the pooled embedding is the one at the end-of-text token, so its id must be the tokenizer's
    config = CLIPTextConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=3,
        projection_dim=width,
        max_position_embeddings=77,
    )
    with seeded(seed):
        return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def t5_encoder(
    tokenizer: PreTrainedTokenizerFast, *, width: int = WIDTH, multilingual: bool = False, seed: int = 0
) -> T5EncoderModel | UMT5EncoderModel:
    """T5's encoder of 2 layers; `multilingual` for UMT5."""
    kind, model = (UMT5Config, UMT5EncoderModel) if multilingual else (T5Config, T5EncoderModel)
    config = kind(
        vocab_size=len(tokenizer),
        d_model=width,
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
    with seeded(seed):
        return model(config).eval()


def tiny_vae(*, latent_channels: int = 4, levels: int = 2, seed: int = 0, **more: Any) -> AutoencoderKL:
    """An autoencoder with 2 pixels per latent cell and axis, or 2^(levels - 1).

    Args:
        more: further or other arguments of `AutoencoderKL`.
    """
    settings = {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8, *(16,) * (levels - 1)),
        "layers_per_block": 1,
        "latent_channels": latent_channels,
        "norm_num_groups": 4,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "sample_size": 32,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "shift_factor": 0.06,
        "scaling_factor": 1.5,
    }
    with seeded(seed):
        return AutoencoderKL(**{**settings, **more}).eval()
