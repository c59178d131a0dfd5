"""Tiny language models that serve as text encoders; apart from `parts`, since their classes take long to import."""

from typing import Any

from transformers import (
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from gensparse.testing.tiny.parts import WIDTH, byte_tokenizer, seeded

_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# What QwenImage and HunyuanImage put before the prompt and, as 34 tokens, drop from the embedding.
_TEMPLATE = (
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of "
    "the objects and background:\nuser\nassistant"
)


def decoder_settings(tokenizer: PreTrainedTokenizerFast, *, width: int = WIDTH, layers: int = 3) -> dict[str, Any]:
    """Arguments that the configs of Llama, Qwen, Gemma, GLM and Mistral share: 4 query heads of 8 on 2 key heads."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 40,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def qwen_tokenizer(**more: Any) -> PreTrainedTokenizerFast:
    """Qwen's kind: no start token, chat marks, and the picture pipelines' template in 34 tokens."""
    return byte_tokenizer(
        bos=None,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        special=("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
        template=_TEMPLATE,
        **{"chat_template": _CHAT, **more},
    )


def qwen_vl_encoder(
    tokenizer: PreTrainedTokenizerFast, *, width: int = WIDTH, layers: int = 3, seed: int = 0
) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL with a vision tower of one layer."""
    text = decoder_settings(tokenizer, width=width, layers=layers)
    del text["head_dim"]
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    image, video, start, end = (tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names)
    config = Qwen2_5_VLConfig(
        # sections of half a head: frames, rows and columns turn their own channels
        text_config={**text, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, width // 8 - 2]}},
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": width,
            "fullatt_block_indexes": [0],
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    with seeded(seed):
        return Qwen2_5_VLForConditionalGeneration(config).eval()


def gemma_encoder(tokenizer: PreTrainedTokenizerFast, *, width: int = WIDTH, seed: int = 0) -> Gemma2Model:
    """Gemma 2."""
    settings = decoder_settings(tokenizer, width=width)
    with seeded(seed):
        return Gemma2Model(Gemma2Config(query_pre_attn_scalar=settings["head_dim"], **settings)).eval()
