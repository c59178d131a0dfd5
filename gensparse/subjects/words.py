"""Words of a prompt about content and about style (Local Prompt Adaptation, 2507.20094), and the tokens they are."""

import re
from collections.abc import Iterable, Sequence

from gensparse.errors import ConfigError

SPLITS = ("pos", "naive")

_STYLE = re.compile(r"\bin\s+([A-Za-z0-9, \-]+?)\s+(?:style|aesthetic)\b", re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z0-9']+")
_COMMON = frozenset(("in", "on", "the", "a", "an", "of", "and", "with", "to", "for", "style", "aesthetic"))


def style_words(prompt: str) -> list[str]:
    """The words between "in" and "style" or "aesthetic", of every such place."""
    parts = (part for match in _STYLE.finditer(prompt) for part in re.split(r"[\s,\-]+", match.group(1)))
    return _once(part for part in parts if part)


def content_words(prompt: str, style: Iterable[str], split: str = "pos") -> list[str]:
    """The other words: "pos" without articles, prepositions and the like, "naive" all of them.

    Raises:
        ConfigError: an unknown split.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split!r} is not allowed; pass one of {', '.join(SPLITS)}.")
    taken = {word.lower() for word in style}
    words = (match.group() for match in _WORD.finditer(prompt))
    common = _COMMON if split == "pos" else frozenset()
    return _once(word for word in words if word.lower() not in taken | common)


def tokens_of(prompt: str, words: Iterable[str], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Numbers of the tokens that words are made of, wherever they stand in the prompt as whole words.

    Args:
        offsets: characters from..to of every token; (0, 0) for special tokens.
    """
    found: set[int] = set()
    for word in words:
        for match in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE):
            found |= {
                number
                for number, (first, last) in enumerate(offsets)
                if first < match.end() and last > match.start() and last > first
            }
    return sorted(found)


def _once(words: Iterable[str]) -> list[str]:
    """Words without repetition, by their first spelling."""
    found: dict[str, str] = {}
    for word in words:
        found.setdefault(word.lower(), word)
    return list(found.values())
