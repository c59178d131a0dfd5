"""Captions by a vision-language model from a folder: a tiny LLaVA with random weights, made offline."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from gensparse.errors import ConfigError
from gensparse.subjects.captions import QUESTION, VisionCaptioner
from gensparse.testing.tiny.parts import byte_tokenizer

CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llava")
    tokenizer = byte_tokenizer(special=["<image>"])
    pixels = {"size": {"height": 16, "width": 16}, "crop_size": {"height": 16, "width": 16}}
    processor = LlavaProcessor(
        CLIPImageProcessor(**pixels),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**sizes, image_size=16, patch_size=8),
            text_config=LlamaConfig(**sizes, vocab_size=len(tokenizer), num_key_value_heads=2),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )
    )
    with torch.no_grad():  # every answer is letters
        model.lm_head.weight.mul_(0.1)
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "abcdefgh"]
    model.generation_config.suppress_tokens = [n for n in range(len(tokenizer)) if n not in letters]
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def test_a_region_is_asked_about_and_answered(folder: Path) -> None:
    caption = VisionCaptioner(folder, max_new_tokens=6)
    red, noise = Image.new("RGB", (40, 24), "red"), Image.effect_noise((24, 40), 90)
    said = caption(red, (0, 0, 0.5, 1))
    assert set(said) <= set("abcdefgh")
    assert 1 <= len(said) <= 6
    assert caption(red, (0, 0, 0.5, 1)) == said
    assert isinstance(caption(noise, (0, 0, 1, 1)), str)
    loaded = caption._pipe
    caption.release()
    assert caption._pipe is None
    assert caption(red, (0, 0, 0.5, 1)) == said
    assert caption._pipe is not loaded


def test_the_question_reaches_the_model_and_its_picture(folder: Path) -> None:
    caption, words, pixels = VisionCaptioner(str(folder), question="What grows here?", max_new_tokens=1), [], []
    model = caption._loaded().model
    model.register_forward_pre_hook(lambda _m, _a, given: words.append(given["input_ids"]), with_kwargs=True)
    eyes = next(module for name, module in model.named_modules() if name.endswith("vision_tower"))
    eyes.register_forward_pre_hook(lambda _m, a, g: pixels.extend([*a, *g.values()]), with_kwargs=True)
    caption(Image.new("RGB", (20, 20), "green"), (0, 0, 1, 1))
    text = caption._pipe.tokenizer.decode(words[0][0])
    assert "What grows here?" in text
    assert text.count("<image>") == 4
    assert pixels[0].shape == (1, 3, 16, 16)
    assert "Do not guess" in QUESTION


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "bert"},
        {"model_type": "no-such-model"},
        {"architectures": ["Own"], "model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}},
        {},
    ],
)
def test_what_is_no_vision_language_model_gets_one_sentence(tmp_path: Path, config: dict) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('code of the folder ran')")
    caption = VisionCaptioner(tmp_path)
    with pytest.raises(ConfigError, match="holds no vision-language model") as caught:
        caption(Image.new("RGB", (8, 8)), (0, 0, 1, 1))
    assert "\n" not in str(caught.value)
