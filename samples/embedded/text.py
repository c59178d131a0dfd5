"""Tokenizers and text encoders of the embedded model, built offline from the grammar."""

import json
import math
import tempfile
from collections import Counter
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from gensparse.embedded.scenes import caption, random_scene, vocabulary

CLIP_LENGTH = 40
T5_LENGTH = 32
PAIR_LENGTH = 77  # of both tokenizers of the UNet, as SDXL has it
PAIR_WIDTHS = (96, 192)  # of its text encoders
POOLED = 128  # width of the pooled embedding of the second
START, END = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer(length: int = CLIP_LENGTH, **more: str) -> CLIPTokenizer:
    """Byte-level BPE in which every word of the grammar is one token."""
    ids, merges = shipped_pairs() or learned_pairs()
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=length, **more)


Pairs = tuple[dict[str, int], list[tuple[str, str]]]
"""(token -> id, merges)"""


def shipped_pairs() -> Pairs | None:
    """Tokens of the models that ship, to which weights that are trained further have to fit; None without them."""
    path = Path(str(files("gensparse.embedded").joinpath("model", "tokenizer", "tokenizer.json")))
    if not path.is_file():
        return None
    model = json.loads(path.read_text(encoding="utf-8"))["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def learned_pairs() -> Pairs:
    """Merges learned from the grammar's words until none is left; equally frequent ones come in no fixed order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=4096, min_frequency=1, show_progress=False, initial_alphabet=alphabet, end_of_word_suffix="</w>"
    )
    tokenizer.train_from_iterator([w for w in vocabulary() for _ in range(2)], trainer)
    merges = [tuple(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = alphabet + [a + "</w>" for a in alphabet] + ["".join(m) for m in merges]
    return {token: i for i, token in enumerate(dict.fromkeys([*tokens, START, END]))}, merges


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """Unigram over whole words, lower-casing, with a byte fallback for everything outside the grammar."""
    counts = Counter(w for s in range(4000) for w in caption(random_scene(s), s).replace(",", " ,").split())
    total = sum(counts.values())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -30.0), ("▁", -12.0), (",", -3.0)]
    pieces += [("▁" + w, math.log(max(counts[w], 1) / total)) for w in vocabulary()]
    pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Lowercase(), normalizers.Strip(), normalizers.Replace(Regex(r"\s+"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=T5_LENGTH,
        padding_side="right",
    )


def clip_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers of width 96; its pooled output (at the end token) steers the modulation."""
    return CLIPTextModel(clip_config(tokenizer, width=96, inner=256, layers=2, projection=96))


def clip_config(tokenizer: CLIPTokenizer, *, width: int, inner: int, layers: int, projection: int) -> CLIPTextConfig:
    """A text encoder for this tokenizer, with heads of 32 channels."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=projection,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_encoder(tokenizer: PreTrainedTokenizerFast) -> T5EncoderModel:
    """Two layers of width 192: the words the transformer attends to."""
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=192,
            d_ff=512,
            d_kv=32,
            num_heads=6,
            num_layers=2,
            dropout_rate=0.0,
            is_gated_act=True,
            dense_act_fn="gelu_new",
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )
    see_order(encoder)
    return encoder


NEIGHBOURS = (-1, 1, -2, 2, -4, 4)  # the word each head of the T5 looks at first


@torch.no_grad()
def see_order(encoder: T5EncoderModel) -> None:
    """Let every head start with a place of its own to look at, relative to the word it reads for.

    Nothing else tells a T5, or FLUX behind it, the order of words, and its attention is not scaled: left at its random
    start the table stays small beside what words say, and "a red star left of a blue ring" is read as a bag of words.
    """
    attention = encoder.encoder.block[0].layer[0].SelfAttention
    distances = torch.arange(-127, 128)
    buckets = attention._relative_position_bucket(
        distances,
        bidirectional=True,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    table = attention.relative_attention_bias.weight
    for bucket in buckets.unique():
        own = distances[buckets == bucket].float()
        nearest = own[own.abs().argmin()]  # of a bucket of many distances: the one that short captions have
        for head, wanted in enumerate(NEIGHBOURS):
            table[bucket, head] = 6.0 - 3.0 * (nearest - wanted).abs().clamp(max=4.0)


def round_trip(tokenizer, cls):
    """The tokenizer as it will be after loading from a folder."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return cls.from_pretrained(Path(folder))


class Captions:
    """Token ids of captions, padded exactly as FluxPipeline pads them."""

    def __init__(self) -> None:
        self.clip = round_trip(clip_tokenizer(), CLIPTokenizer)
        self.t5 = round_trip(t5_tokenizer(), PreTrainedTokenizerFast)

    def __call__(self, texts: list[str], t5_length: int = T5_LENGTH) -> tuple[torch.Tensor, torch.Tensor]:
        """(CLIP ids [B, 40], T5 ids [B, t5_length])."""
        clip = self.clip(texts, padding="max_length", max_length=CLIP_LENGTH, truncation=True, return_tensors="pt")
        t5 = self.t5(texts, padding="max_length", max_length=t5_length, truncation=True, return_tensors="pt")
        return clip.input_ids, t5.input_ids


class CaptionPair:
    """Token ids of captions for both text encoders of the UNet, padded as StableDiffusionXLPipeline pads them."""

    def __init__(self) -> None:
        self.first = round_trip(clip_tokenizer(PAIR_LENGTH), CLIPTokenizer)
        self.second = round_trip(clip_tokenizer(PAIR_LENGTH, pad_token="!"), CLIPTokenizer)

    def __call__(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids of the first, ids of the second tokenizer), [B, 77] each."""
        settings = {"padding": "max_length", "max_length": PAIR_LENGTH, "truncation": True, "return_tensors": "pt"}
        return self.first(texts, **settings).input_ids, self.second(texts, **settings).input_ids


TOKENIZERS = ("clip", "t5", "first", "second")


class Tokens:
    """Captions as all four tokenizers have them."""

    def __init__(self) -> None:
        self.captions, self.pair = Captions(), CaptionPair()

    def __call__(self, texts: list[str]) -> dict[str, np.ndarray]:
        """Token ids [B, length] int16 per name of `TOKENIZERS`."""
        ids = (*self.captions(texts), *self.pair(texts))
        return {name: part.numpy().astype(np.int16) for name, part in zip(TOKENIZERS, ids, strict=True)}


def encoder_pair(captions: CaptionPair) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """The text encoders of the UNet; SDXL reads their last layer but one, and the second's pooled embedding."""
    first, second = PAIR_WIDTHS
    pair = (
        CLIPTextModel(clip_config(captions.first, width=first, inner=256, layers=2, projection=first)),
        CLIPTextModelWithProjection(clip_config(captions.second, width=second, inner=512, layers=3, projection=POOLED)),
    )
    for encoder in pair:  # the gradient of fused attention is slower on CPUs at these sizes
        encoder.set_attn_implementation("eager")
    return pair


@torch.no_grad()
def take_weights(encoder: CLIPTextModel, trained: CLIPTextModel) -> None:
    """Copy weights of equal shape, and of longer tables (positions) the first rows."""
    own = encoder.state_dict()
    for name, value in trained.state_dict().items():
        own[name][: len(value)] = value
