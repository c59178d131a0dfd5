"""The scene grammar of the embedded model: what a picture contains, how it is said, and how a prompt is read back.

A `Scene` is 1-3 `Subject`s on a background. `random_scene(seed)` draws one, `caption(scene, seed)` says it (with
words left out now and then), `parse_caption(text)` reads any sentence of the grammar into a `Request`: exactly what was
asked, which the reader of finished pictures can check.

Units: positions are fractions of the picture (0..1, y down). Lengths (radius, texture periods) are scene units, in
which every picture has area 1: a picture of aspect ratio a = width/height is sqrt(a) wide and 1/sqrt(a) high.
"""

import math
import re
from dataclasses import dataclass

import numpy as np

from gensparse.errors import ConfigError

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond", "moon", "flower")
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (245, 130, 30),
    "yellow": (250, 210, 50),
    "green": (56, 142, 60),
    "teal": (0, 150, 150),
    "blue": (30, 100, 220),
    "purple": (126, 60, 180),
    "pink": (244, 130, 180),
    "brown": (121, 75, 45),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
    "gray": (140, 140, 140),
}
COLOURS = tuple(PALETTE)
FILLS = ("plain", "striped", "dotted", "checkered")
BACKGROUNDS = ("plain", "striped", "checkered", "dotted", "wavy")
SIZES: dict[str, float] = {"small": 0.125, "medium": 0.175, "large": 0.24}
# relation -> direction (dy, dx) from the second subject to the first
RELATIONS: dict[str, tuple[int, int]] = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
# place -> (row, column) of a 3 x 3 division of the picture
PLACES: dict[str, tuple[int, int]] = {
    "in the top left corner": (0, 0),
    "at the top": (0, 1),
    "in the top right corner": (0, 2),
    "on the left": (1, 0),
    "in the center": (1, 1),
    "on the right": (1, 2),
    "in the bottom left corner": (2, 0),
    "at the bottom": (2, 1),
    "in the bottom right corner": (2, 2),
}
OPENINGS = ("", "", "", "a picture of ", "an image of ")
ASPECTS = (1.0, 1.5, 1 / 1.5, 16 / 9, 9 / 16)
MARGIN = 0.025  # scene units kept free at the border and between subjects


@dataclass(frozen=True)
class Subject:
    """One shape. `x`, `y`: centre as fractions of the picture; `radius`: scene units; `rotation`: degrees clockwise."""

    shape: str
    colour: str
    fill: str
    size: str
    x: float
    y: float
    radius: float
    rotation: float = 0.0


@dataclass(frozen=True)
class Scene:
    """A picture to draw. `phase`: shift of the background texture in periods; `aspect`: width / height."""

    subjects: tuple[Subject, ...]
    background: str
    background_colour: str
    aspect: float = 1.0
    phase: tuple[float, float] = (0.0, 0.0)
    relations: tuple[tuple[int, str, int], ...] = ()
    places: tuple[str | None, ...] = ()

    @property
    def extent(self) -> tuple[float, float]:
        """(height, width) in scene units; their product is 1."""
        return 1 / math.sqrt(self.aspect), math.sqrt(self.aspect)

    def box(self, index: int) -> tuple[float, float, float, float]:
        """(y0, x0, y1, x1) of subject `index` as fractions of the picture."""
        subject, (height, width) = self.subjects[index], self.extent
        dy, dx = subject.radius / height, subject.radius / width
        return subject.y - dy, subject.x - dx, subject.y + dy, subject.x + dx


@dataclass(frozen=True)
class SubjectRequest:
    """What a prompt says of one subject; None where it says nothing."""

    shape: str
    colour: str | None = None
    fill: str | None = None
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Request:
    """What a prompt asks for; `relations` are (first subject, relation, second subject) by index."""

    subjects: tuple[SubjectRequest, ...]
    relations: tuple[tuple[int, str, int], ...] = ()
    background: str | None = None
    background_colour: str | None = None


# ---------------------------------------------------------------- drawing a scene


def random_scene(seed: int, aspect: float = 1.0) -> Scene:
    """The scene of `seed`: the same seed and aspect always give the same scene."""
    rng = np.random.default_rng([seed, 0])
    background = _pick(rng, BACKGROUNDS, (0.36, 0.16, 0.16, 0.16, 0.16))
    background_colour = _pick(rng, COLOURS)
    colours = [c for c in COLOURS if c != background_colour]
    count = int(_pick(rng, (1, 2, 3), (0.3, 0.45, 0.25)))
    extent = (1 / math.sqrt(aspect), math.sqrt(aspect))
    relations, places, sizes, centres = _arrange(rng, count, extent)
    subjects = tuple(
        Subject(
            shape=_pick(rng, SHAPES),
            colour=_pick(rng, colours),
            fill=_pick(rng, FILLS, (0.55, 0.15, 0.15, 0.15)),
            size=size,
            x=float(x / extent[1]),
            y=float(y / extent[0]),
            radius=SIZES[size],
            rotation=float(rng.uniform(-20, 20)) if rng.random() < 0.5 else 0.0,
        )
        for size, (y, x) in zip(sizes, centres, strict=True)
    )
    phase = (float(rng.random()), float(rng.random()))
    return Scene(subjects, background, background_colour, aspect, phase, relations, places)


def _pick(rng: np.random.Generator, options, weights=None):
    """One of `options`."""
    return options[int(rng.choice(len(options), p=weights))]


def _arrange(rng: np.random.Generator, count: int, extent: tuple[float, float]):
    """(relations, places, sizes, centres in scene units) of `count` subjects that do not touch."""
    placed = count == 1 or (count == 2 and rng.random() < 0.25)  # keeps captions within 32 tokens
    while True:
        sizes = [_pick(rng, tuple(SIZES), (0.3, 0.4, 0.3)) for _ in range(count)]
        relations: tuple = ()
        places: tuple = (None,) * count
        if placed:
            places, centres = _at_places(rng, sizes, extent)
        else:
            relations, centres = _related(rng, sizes, extent)
        if centres is not None and _apart(sizes, centres):
            return relations, places, sizes, centres


def _at_places(rng: np.random.Generator, sizes: list[str], extent: tuple[float, float]):
    """Subjects at distinct absolute places; a single one is in the center half of the time."""
    names = list(PLACES)
    if len(sizes) == 1 and rng.random() < 0.5:
        chosen = ["in the center"]
    else:
        chosen = [names[i] for i in rng.permutation(len(names))[: len(sizes)]]
    centres = []
    for name, size in zip(chosen, sizes, strict=True):
        free = [e / 2 - SIZES[size] - MARGIN for e in extent]
        if min(free) < 0:
            return tuple(chosen), None
        jitter = rng.uniform(-0.03, 0.03, 2)
        offset = [(cell - 1) * f * 0.88 for cell, f in zip(PLACES[name], free, strict=True)]
        centres.append(
            [e / 2 + float(np.clip(o + j, -f, f)) for e, o, j, f in zip(extent, offset, jitter, free, strict=True)]
        )
    return tuple(chosen), centres


def _related(rng: np.random.Generator, sizes: list[str], extent: tuple[float, float]):
    """Subject 0 stands in a stated relation to each of the others, each in a direction of its own."""
    words = [list(RELATIONS)[i] for i in rng.permutation(4)[: len(sizes) - 1]]
    radii = [SIZES[s] for s in sizes]
    centres = [np.zeros(2)]
    for word, radius in zip(words, radii[1:], strict=True):
        gap = MARGIN + float(rng.uniform(0.02, 0.14))
        along = np.array(RELATIONS[word], dtype=float)
        across = along[::-1] * rng.uniform(-0.04, 0.04)
        centres.append(centres[0] - along * (radii[0] + radius + gap) + across)
    low = np.min([c - r for c, r in zip(centres, radii, strict=True)], axis=0) - MARGIN
    high = np.max([c + r for c, r in zip(centres, radii, strict=True)], axis=0) + MARGIN
    slack = np.array(extent) - (high - low)
    if slack.min() < 0:
        return (), None
    start = slack * rng.uniform(0.25, 0.75, 2) - low
    relations = tuple((0, word, i + 1) for i, word in enumerate(words))
    return relations, [c + start for c in centres]


def _apart(sizes: list[str], centres) -> bool:
    """No two bounding boxes come closer than the margin."""
    for i in range(len(sizes)):
        for j in range(i):
            reach = SIZES[sizes[i]] + SIZES[sizes[j]] + MARGIN
            if max(abs(centres[i][0] - centres[j][0]), abs(centres[i][1] - centres[j][1])) < reach:
                return False
    return True


# ---------------------------------------------------------------- saying a scene

_INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def caption(scene: Scene, seed: int | None = None) -> str:
    """A sentence for `scene`.

    With `seed`, wording varies, colour or fill is left out 30% of the time and 10% of the captions are empty. Without,
    everything is said in the plainest order.
    """
    if seed is None:
        return _sentence(scene, None)
    rng = np.random.default_rng([seed, 1])
    if rng.random() < 0.1:
        return ""
    return _sentence(scene, rng)


def _sentence(scene: Scene, rng: np.random.Generator | None) -> str:
    phrases = [_subject_phrase(s, rng) for s in scene.subjects]
    places = scene.places or (None,) * len(phrases)
    if scene.relations:
        body = _related_phrase(scene, phrases, rng)
    elif any(places):
        said = [
            p if not place or _chance(rng, 0.2) else f"{p} {place}" for p, place in zip(phrases, places, strict=True)
        ]
        body = _listing(said)
    else:
        body = _listing(phrases)
    opening = "" if rng is None else _pick(rng, OPENINGS)
    return opening + body + _background_phrase(scene, rng)


def _chance(rng: np.random.Generator | None, probability: float) -> bool:
    return rng is not None and rng.random() < probability


def _subject_phrase(subject: Subject, rng: np.random.Generator | None) -> str:
    left_out = int(rng.integers(2)) if _chance(rng, 0.3) else -1
    words = []
    if rng is not None and rng.random() < 0.3:
        words.append(subject.size)
    adjectives = [] if left_out == 0 else [subject.colour]
    say_plain = rng is None or rng.random() < 0.35
    if left_out != 1 and (subject.fill != "plain" or say_plain):
        adjectives.append(subject.fill)
    if _chance(rng, 0.3):
        adjectives.reverse()
    return _article([*words, *adjectives, subject.shape])


def _article(words: list[str]) -> str:
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def _listing(phrases: list[str]) -> str:
    if len(phrases) == 1:
        return phrases[0]
    return ", ".join(phrases[:-1]) + " and " + phrases[-1]


def _related_phrase(scene: Scene, phrases: list[str], rng: np.random.Generator | None) -> str:
    if _chance(rng, 0.08):
        return _listing(phrases)
    relations = list(scene.relations)
    if len(relations) == 1 and _chance(rng, 0.5):
        _, word, _ = relations[0]
        return f"{phrases[1]} {_INVERSE[word]} {phrases[0]}"
    if _chance(rng, 0.5):
        relations.reverse()
    return f"{phrases[0]} " + " and ".join(f"{word} {phrases[j]}" for _, word, j in relations)


def _background_phrase(scene: Scene, rng: np.random.Generator | None) -> str:
    if _chance(rng, 0.08):
        return ""
    colour = [] if _chance(rng, 0.12) else [scene.background_colour]
    kind = [] if _chance(rng, 0.12) or (scene.background == "plain" and _chance(rng, 0.5)) else [scene.background]
    words = kind + colour if _chance(rng, 0.3) else colour + kind
    if not words:
        return ""
    return " on " + _article([*words, "background"])


# ---------------------------------------------------------------- reading a prompt

_WORD = re.compile(r"[a-z]+|,")
_GLUE = ("a", "an", "the", "and", "on", "in", "at", "of", "with", ",")


def vocabulary() -> tuple[str, ...]:
    """Every word the model was trained on, sorted; a prompt may use no other."""
    phrases = [
        *RELATIONS,
        *PLACES,
        *OPENINGS,
        *SHAPES,
        *COLOURS,
        *FILLS,
        *BACKGROUNDS,
        *SIZES,
        "background",
        "and on a",
    ]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))


def parse_caption(text: str) -> Request:
    """What `text` asks for.

    "A REL1 B and REL2 C" reads as A REL1 B, A REL2 C. Words outside the grammar are passed over (see `unknown_words`).
    Raises ConfigError when a colour, fill or size stands without a shape or "background" after it.
    """
    words = [w for w in _WORD.findall(text.lower()) if w not in _GLUE or w in ("on", "in", "at")]
    subjects: list[SubjectRequest] = []
    relations: list[tuple[int, str, int]] = []
    background: dict[str, str] = {}
    adjectives: dict[str, str] = {}
    pending: str | None = None
    i = 0
    while i < len(words):
        place, step = _place_at(words, i)
        word = words[i]
        if place and subjects and not adjectives:
            subjects[-1] = SubjectRequest(**{**vars(subjects[-1]), "place": place})
            i += step
            continue
        if word in ("left", "right", "above", "below") and subjects:
            pending = word + " of" if word in ("left", "right") else word
        elif word in SHAPES:
            subjects.append(SubjectRequest(word, **adjectives))
            adjectives = {}
            if pending:
                relations.append((0, pending, len(subjects) - 1))
                pending = None
        elif word == "background":
            background, adjectives = adjectives, {}
        else:
            _collect(word, adjectives)
        i += 1
    if adjectives:
        given = " ".join(adjectives.values())
        raise ConfigError(f"'{given}' describes nothing in the prompt: put a shape or the word background after it.")
    return Request(tuple(subjects), tuple(relations), background.get("fill"), background.get("colour"))


def _place_at(words: list[str], i: int) -> tuple[str | None, int]:
    """The absolute place that starts at word `i`, and how many words it takes."""
    for name in sorted(PLACES, key=len, reverse=True):
        tokens = [w for w in name.split() if w != "the"]
        if words[i : i + len(tokens)] == tokens:
            return name, len(tokens)
    return None, 1


def _collect(word: str, adjectives: dict[str, str]) -> None:
    if word in PALETTE:
        adjectives["colour"] = word
    elif word in FILLS or word in BACKGROUNDS:
        adjectives["fill"] = word
    elif word in SIZES:
        adjectives["size"] = word
