"""The shipped tokenizers: a word of the grammar is one token, anything else survives as bytes."""

import pytest
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from gensparse.embedded import embedded_notes, embedded_path, unknown_words, vocabulary
from gensparse.embedded.scenes import caption, random_scene


@pytest.fixture(scope="module")
def clip():
    return CLIPTokenizer.from_pretrained(embedded_path() / "tokenizer")


@pytest.fixture(scope="module")
def t5():
    return PreTrainedTokenizerFast.from_pretrained(embedded_path() / "tokenizer_2")


@pytest.mark.parametrize("word", vocabulary())
def test_every_word_is_one_token(clip, t5, word):
    assert len(clip(word).input_ids) == 3  # start, word, end
    assert len(t5(word).input_ids) == 2  # word, end
    assert len(clip(f"a {word}, {word.upper()}").input_ids) == 6
    assert len(t5(f"a {word}, {word.upper()}").input_ids) == 5


def test_every_caption_fits(clip, t5):
    captions = [caption(random_scene(seed), seed) for seed in range(1500)]
    assert max(len(ids) for ids in clip(captions).input_ids) <= clip.model_max_length
    assert max(len(ids) for ids in t5(captions).input_ids) <= embedded_notes()["max_sequence_length"]


@pytest.mark.parametrize("text", ["zebra", "größe", "日本", "a red 🦓 circle", "\t a  red\ncircle "])
def test_unknown_text_survives_as_bytes(clip, t5, text):
    clean = " ".join(text.lower().split())
    assert t5.decode(t5(text).input_ids, skip_special_tokens=True) == clean
    assert t5.unk_token_id not in t5(text).input_ids
    assert clip.decode(clip(text).input_ids, skip_special_tokens=True).split() == clean.split()


def test_padding_is_what_the_encoders_expect(clip, t5):
    ids = clip("a red circle", padding="max_length").input_ids
    assert ids.index(clip.eos_token_id) == 4
    assert set(ids[4:]) == {clip.eos_token_id}
    ids = t5("a red circle", padding="max_length", max_length=32).input_ids
    assert ids[3:] == [t5.eos_token_id] + [t5.pad_token_id] * 28


def test_unknown_words_are_named_with_suggestions():
    assert unknown_words("a red circle on a green striped background") == {}
    found = unknown_words("A crimson Circl above a zebra")
    assert list(found) == ["crimson", "circl", "zebra"]
    assert "circle" in found["circl"]
    assert found["zebra"] == []
