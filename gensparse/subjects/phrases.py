"""Noun phrases: where they stand in a prompt, and their encodings as further values (Structured Diffusion, 2212.05032).

Phrases are best given by the user. `noun_phrases` finds plain ones without a tagger; `phrases_of_tree` reads the
constituency tree of any parser.
"""

import re
from collections.abc import Iterable, Sequence

from torch import Tensor

from gensparse.errors import ConfigError, short

Span = tuple[int, int]
"""Tokens from..to of a prompt, half-open, counted without the begin token."""


# ------------------------------------------------------------------------------------------------------------ alignment
def aligned(full: Tensor, phrase: Tensor, span: Span) -> Tensor:
    """The prompt's encoding [B, L, C] with the rows of a phrase replaced by those of the phrase encoded alone."""
    first, last = span
    out = full.clone()
    out[:, first + 1 : last + 1] = phrase[:, 1 : last - first + 1]
    return out


def replaced(full: Tensor, phrases: Tensor, spans: Sequence[Span]) -> Tensor:
    """The prompt's encoding [B, L, C] with the rows of all phrases [k, L, C] replaced; later ones overwrite."""
    for phrase, span in zip(phrases, spans, strict=True):
        full = aligned(full, phrase[None], span)
    return full


def averaged_values(full: Tensor, phrases: Tensor, spans: Sequence[Span]) -> Tensor:
    """Mean of the prompt's encoding and of its alignments to every phrase.

    Values are linear in it, so that one attention with them equals the mean of k + 1 attentions.

    Args:
        full: [B, L, C]; phrases: [k, L, C] encoded alone; spans: k token ranges.
    """
    total = full.clone()
    for phrase, span in zip(phrases, spans, strict=True):
        total = total + aligned(full, phrase[None], span)
    return total / (len(spans) + 1)


# ------------------------------------------------------------------------------------------------------------- places
def normalised(prompt: str) -> str:
    """A prompt as phrases are looked for: lower case, no spaces or dots at the ends."""
    return prompt.lower().strip().strip(".").strip()


def found_in(prompt: str, phrases: Iterable[str]) -> list[Span]:
    """Characters from..to of phrases in a prompt, each looked for behind the begin of the one before.

    A phrase that stands only before it, such as one that holds the next, is looked for from the begin of the prompt.

    Raises:
        ConfigError: a phrase that does not stand in the prompt as whole words.
    """
    spans, start, ends = [], 0, dict[str, int]()
    for phrase in phrases:
        text = re.escape(normalised(phrase))
        pattern = re.compile(rf"(?<!\w){text}(?!\w)") if text else None
        match = pattern and (pattern.search(prompt, ends.get(text, start)) or pattern.search(prompt))
        if not match:
            raise ConfigError(
                f"The phrase {short(phrase)} does not stand in the prompt {short(prompt)}; copy it exactly."
            )
        spans.append(match.span())
        start, ends[text] = match.start(), match.end()
    return spans


def token_span(offsets: Sequence[Span], characters: Span) -> Span | None:
    """Tokens that hold characters from..to of a text; None where some of them have no token (a prompt that was cut).

    Args:
        offsets: characters of every token of the text, special tokens left out.
    """
    first, last = characters
    inside = [number for number, (a, b) in enumerate(offsets) if a < last and b > first and b > a]
    if not inside or offsets[inside[-1]][1] < last:
        return None
    return inside[0], inside[-1] + 1


def piece_offsets(text: str, pieces: Iterable[str], end: str = "</w>") -> list[Span]:
    """Characters of every piece of a text that a byte-pair tokenizer cut; pieces at the end of a word have a mark.

    Raises:
        ConfigError: pieces of another text.
    """
    found, place = [], 0
    for piece in pieces:
        letters = piece.removesuffix(end)
        while place < len(text) and text[place].isspace():
            place += 1
        if not text.startswith(letters, place):
            raise ConfigError(
                f"The piece {short(piece)} does not stand in {short(text)} at {place}; pass its own pieces."
            )
        found.append((place, place + len(letters)))
        place += len(letters)
    return found


# -------------------------------------------------------------------------------------------------------------- parsers
_BEGIN = """
a an the this that these those some any every each no another both one two three four five six seven eight nine ten many
several few his her its their my your our
"""
_END = """
and or but nor with without in on at by near of to from into onto over under above below behind beside between inside
outside through across along around against among towards toward upon next front after before during as like for while
who which where when is are was were be been being has have had do does did sits sit sitting stands stand standing wears
wear wearing holds hold holding rides ride riding runs run running looks look looking eats eat eating plays play playing
lies lie lying flies fly flying jumps jump jumping walks walk walking made
"""
_STARTS, _STOPS = frozenset(_BEGIN.split()), frozenset(_END.split())
_WORD = re.compile(r"[\w'-]+")


def noun_phrases(prompt: str) -> list[str]:
    """Flat noun phrases of a prompt, found by word lists alone: no tagger, no download.

    A phrase begins with an article, a number or a possessive, and ends before a comma, a conjunction, a preposition or
    a common verb of captions; those of two words and more count. English, and for captions: "a red car and a white
    sheep" gives both, while a phrase without an article, or a verb that is not in the list, is not told apart. Give
    phrases yourself where it matters.
    """
    text, found = normalised(prompt), []
    start: int | None = None
    last = count = 0

    def close() -> None:
        nonlocal start
        if start is not None and count >= 2:
            found.append(text[start:last])
        start = None

    for match in _WORD.finditer(text):
        word = match.group()
        if start is not None and text[last : match.start()].strip():
            close()
        if word in _STARTS and (start is None or count >= 2):
            close()
            start, count = match.start(), 0
        elif word in _STOPS:
            close()
        if start is not None:
            last, count = match.end(), count + 1
    close()
    return found


def phrases_of_tree(tree: str, least: int = 2) -> list[str]:
    """Noun phrases of a constituency tree in brackets, pre-order, nested ones included.

    The whole sentence comes first even where it is none. Phrases have at least `least` words.

    Raises:
        ConfigError: brackets that do not match.
    """
    whole, phrases = _parsed(tree)
    own = [words for label, words in phrases if label == "NP" and len(words) >= least]
    texts = [" ".join(words) for words in own]
    full = " ".join(whole)
    return texts if texts and texts[0] == full else [full, *texts]


def lowest_phrases(tree: str, least: int = 2) -> list[str]:
    """Noun phrases of a tree that hold no smaller one of at least `least` words."""
    return [text for text, nested in _nested(tree, least) if not nested]


def _nested(tree: str, least: int) -> list[tuple[str, bool]]:
    """(phrase, whether another one is inside), pre-order."""
    spans: list[tuple[int, int, str]] = []
    words: list[str] = []
    stack: list[tuple[str, int, int]] = []
    for token in re.findall(r"\(|\)|[^\s()]+", tree):
        if token == "(":
            stack.append(("", len(words), len(spans)))
            continue
        if token == ")":
            if not stack:
                raise ConfigError("The tree has more closing brackets than opening ones; pass one whole tree.")
            label, first, place = stack.pop()
            if label == "NP" and len(words) - first >= least:
                spans.insert(place, (first, len(words), " ".join(words[first:])))
            continue
        if not stack:
            raise ConfigError(f"The tree begins with {short(token)}; pass it in brackets.")
        label, first, place = stack[-1]
        if label:
            words.append(token)
        else:
            stack[-1] = (token, first, place)
    if stack:
        raise ConfigError("The tree has more opening brackets than closing ones; pass one whole tree.")
    return [(text, any((a, b) != (c, d) and a <= c and d <= b for c, d, _ in spans)) for a, b, text in spans]


def _parsed(tree: str) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The words of a tree, and (label, words) of its noun phrases, pre-order."""
    return re.findall(r"[^\s()]+(?=\s*\))", tree), [("NP", text.split()) for text, _ in _nested(tree, 1)]
