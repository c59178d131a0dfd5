"""Stories: several pictures with the same subjects, turn by turn, from a JSON file. Nothing here loads a model.

A subject is known by pictures that are given, or by words alone; then the first turn that shows it decides how it looks
(the image bank of AutoStudio, 2406.01388, that is filled once and never overwritten).
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from gensparse.errors import ConfigError, short, unknown_name
from gensparse.subjects.naming import MAX_SUBJECTS, Place, Shown, check_layout, check_pictures, checked_box

MAX_TURNS = 100
MAX_CAST = 32
"""Subjects of a whole story; a single turn has at most `MAX_SUBJECTS`."""

MAX_BYTES = 1 << 20
MAX_NAME = 60
MAX_SEED = 2**63 - 1

STORY_KEYS = ("subjects", "turns", "method", "seed", "negative_prompt")
SUBJECT_KEYS = ("name", "prompt", "picture", "mask", "box", "pictures")
PICTURE_KEYS = ("picture", "mask", "box")
TURN_KEYS = ("prompt", "subjects", "layout", "seed", "negative_prompt")

T = TypeVar("T")


@dataclass(frozen=True)
class Actor:
    """A subject of a story.

    Args:
        name: a word or words by which prompts and layouts know it.
        prompt: what it looks like, of its pictures and its region; by default the name.
        shown: pictures of it; none where the first turn that has it decides how it looks.
    """

    name: str
    prompt: str = ""
    shown: tuple[Shown, ...] = ()


@dataclass(frozen=True)
class Turn:
    """One picture of a story.

    Args:
        subjects: names of those who are in it.
        layout: (name, left, top, right, bottom) in shares of width and height, of some of them or of none.
        seed, negative_prompt: None where those of the story count.
    """

    prompt: str
    subjects: tuple[str, ...]
    layout: tuple[Place, ...] = ()
    seed: int | None = None
    negative_prompt: str | None = None

    @property
    def boxes(self) -> dict[str, tuple[float, float, float, float]]:
        """Boxes by name."""
        return {name: (left, top, right, bottom) for name, left, top, right, bottom in self.layout}


@dataclass(frozen=True)
class Story:
    """Subjects and turns.

    Args:
        source: name of the file, for messages.
        method: the subject method, with settings; None leaves it to the caller.
        seed: of turns without one; the same for all, as AutoStudio has it.
    """

    actors: tuple[Actor, ...]
    turns: tuple[Turn, ...]
    method: str | None = None
    seed: int | None = None
    negative_prompt: str | None = None
    source: str = "story.json"

    def actor(self, name: str) -> Actor:
        """The subject of a name that turns may have."""
        return next(actor for actor in self.actors if actor.name == name)

    def at(self, turn: int) -> str:
        """How a message begins that is about a turn, counted from 0."""
        return f"{self.source}, turn {turn + 1}: "

    @classmethod
    def read(cls, path: Path) -> Self:
        """A story file. Names of pictures are those of files beside it.

        Raises:
            ConfigError: no such file, no JSON, or a story that is none; one sentence with the file and the turn.
        """
        try:
            with open(path, "rb") as file:
                raw = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise ConfigError(f"story file {path.name!r} cannot be read ({error.strerror}); check its path") from error
        if len(raw) > MAX_BYTES:
            raise ConfigError(f"story file {path.name!r} has more than {MAX_BYTES} bytes; make it shorter")
        try:
            data = json.loads(
                raw.decode("utf-8-sig"), object_pairs_hook=_once(path.name), parse_constant=_no_number(path.name)
            )
        except (ValueError, RecursionError) as error:
            if isinstance(error, ConfigError):
                raise
            where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
            raise ConfigError(f"story file {path.name!r} is no JSON{where}; correct it") from error
        return cls.of(data, folder=path.parent, source=path.name)

    @classmethod
    def of(cls, data: Any, *, folder: Path = Path(), source: str = "story.json") -> Self:
        """A story from the dictionary that a story file holds.

        Args:
            folder: where its pictures lie.
            source: name of the file, for messages.

        Raises:
            ConfigError: as `read`.
        """
        where = f"{source}: "
        data = _object(data, STORY_KEYS, where)
        entries = _list(data.get("subjects"), "subjects", MAX_CAST, where)
        actors = tuple(_actor(item, folder, f"{source}, subject {n}: ") for n, item in enumerate(entries, 1))
        names = [actor.name for actor in actors]
        twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
        if twice is not None:
            raise ConfigError(f"{where}two subjects are named {twice!r}; give each a name of its own")
        items = _list(data.get("turns"), "turns", MAX_TURNS, where)
        turns = tuple(_turn(item, names, f"{source}, turn {n}: ") for n, item in enumerate(items, 1))
        method = data.get("method")
        if not (method is None or (isinstance(method, str) and method.strip())):
            raise ConfigError(f"{where}method is {short(method)}; give the name of a subject method, or leave it out")
        return cls(actors, turns, method, _seed(data, where), _text(data, "negative_prompt", where, empty=True), source)


# --- pure helpers ---------------------------------------------------------------------------------------------------


def _once(source: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """Makes objects of pairs, of which none may come twice: JSON would silently keep the last."""

    def made(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
        if twice is not None:
            raise ConfigError(f"{source}: an object has the key {short(twice)} twice; leave one out")
        return dict(pairs)

    return made


def _no_number(source: str) -> Callable[[str], Any]:
    def refuse(text: str) -> Any:
        raise ConfigError(f"{source}: {text} is no number of JSON; write a number")

    return refuse


def _object(data: Any, keys: Sequence[str], where: str) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}{short(data)} is no object; write {{{', '.join(map(repr, keys))}}}")
    for key in data:
        if key not in keys:
            raise ConfigError(where + unknown_name("key", str(key), keys))
    return dict(data)


def _list(value: Any, name: str, most: int, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{where}{name} is {short(value)}; give a list with at least one")
    if len(value) > most:
        raise ConfigError(f"{where}there are {len(value)} {name}; give at most {most}")
    return value


def _text(data: Mapping[str, Any], name: str, where: str, *, empty: bool = False) -> str | None:
    value = data.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or "\0" in value or not (value.strip() or empty):
        raise ConfigError(f"{where}{name} is {short(value)}; give text, or leave it out")
    return value


def _seed(data: Mapping[str, Any], where: str) -> int | None:
    value = data.get("seed")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_SEED):
        raise ConfigError(f"{where}seed is {short(value)}; give a whole number from 0 to {MAX_SEED}")
    return value


def _actor(item: Any, folder: Path, where: str) -> Actor:
    data = _object(item, SUBJECT_KEYS, where)
    name = data.get("name")
    if not isinstance(name, str) or not name.strip() or len(name) > MAX_NAME or not name.isprintable() or "=" in name:
        raise ConfigError(f"{where}name is {short(name)}; give a word or words of up to {MAX_NAME} letters without =")
    name, where = name.strip(), f"{where[:-2]} ({name.strip()}): "
    if "pictures" in data and any(key in data for key in PICTURE_KEYS):
        raise ConfigError(f"{where}picture and pictures are both given; write all of them into pictures")
    single = {key: data[key] for key in PICTURE_KEYS if key in data}
    entries = data.get("pictures", [single] if single else [])
    if not isinstance(entries, list):
        raise ConfigError(f"{where}pictures is {short(entries)}; give a list of files or of {{'picture', 'mask'}}")
    shown = tuple(_shown(entry, folder, where) for entry in entries)
    with_prefix(where, lambda: check_pictures([len(shown)]))
    return Actor(name, _text(data, "prompt", where) or "", shown)


def _shown(entry: Any, folder: Path, where: str) -> Shown:
    """A picture and its mask or box."""
    data = {"picture": entry} if isinstance(entry, str) else _object(entry, PICTURE_KEYS, where)
    picture, mask, box = data.get("picture"), data.get("mask"), data.get("box")
    for key, value in (("picture", picture), ("mask", mask)):
        if not (value is None or (isinstance(value, str) and value.strip() and "\0" not in value)):
            raise ConfigError(f"{where}{key} is {short(value)}; give the name of a file")
    if picture is None:
        raise ConfigError(f"{where}a mask or box is given without a picture; name the picture it belongs to")
    if mask is not None and box is not None:
        raise ConfigError(f"{where}{picture} has a mask and a box; give one of both")
    if box is not None:
        if not isinstance(box, list):
            raise ConfigError(f"{where}box is {short(box)}; give [left, top, right, bottom] in shares")
        numbers = with_prefix(where, lambda: checked_box(picture, box))
        mask = ":".join(f"{number:.9f}" for number in numbers)
    elif mask is not None:
        mask = str(folder / mask)
    return Shown(str(folder / picture), mask)


def _turn(item: Any, names: Sequence[str], where: str) -> Turn:
    data = _object(item, TURN_KEYS, where)
    prompt = _text(data, "prompt", where)
    if prompt is None:
        raise ConfigError(f"{where}it has no prompt; say what the picture shows")
    layout = data.get("layout", [])
    if not isinstance(layout, list):
        raise ConfigError(f'{where}layout is {short(layout)}; write [{{"subject": "cat", "box": [0, 0, 0.5, 1]}}]')
    given = data.get("subjects")
    if given is None:
        places = with_prefix(where, lambda: check_layout(layout, names))
        placed = {name for name, *_ in places}
        present = [name for name in names if name in placed or says(prompt, name)]
    else:
        present = _present(given, names, where)
        if layout and not present:
            raise ConfigError(f"{where}it has a layout and no subjects; name those that it places under subjects")
        places = with_prefix(where, lambda: check_layout(layout, present))
    if len(present) > MAX_SUBJECTS:
        raise ConfigError(
            f"{where}it has {len(present)} subjects ({', '.join(present)}); name at most {MAX_SUBJECTS} under subjects"
        )
    return Turn(prompt, tuple(present), places, _seed(data, where), _text(data, "negative_prompt", where, empty=True))


def _present(given: Any, names: Sequence[str], where: str) -> list[str]:
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise ConfigError(f"{where}subjects is {short(given)}; give a list of names")
    for number, name in enumerate(given):
        if name not in names:
            raise ConfigError(where + unknown_name("subject", name, names))
        if name in given[:number]:
            raise ConfigError(f"{where}subjects has {name!r} twice; name it once")
    return list(given)


def says(text: str, name: str) -> bool:
    """Whether a text has the name as whole words, in any case."""
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE) is not None


def with_prefix(where: str, work: Callable[[], T]) -> T:
    """What `work` gives; its ConfigError says where it happened."""
    try:
        return work()
    except ConfigError as error:
        raise ConfigError(where + str(error)) from error


def newcomers(turn: Turn, known: Iterable[str]) -> tuple[str, ...]:
    """Names of those in a turn whose look is not decided yet."""
    known = set(known)
    return tuple(name for name in turn.subjects if name not in known)
