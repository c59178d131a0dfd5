"""What can be said about named subjects and their boxes without loading anything."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gensparse.errors import ConfigError, short

MAX_SUBJECTS = 5
"""Every subject is one more picture in each denoiser call."""


def check_names(names: Sequence[str]) -> None:
    """ConfigError for more subjects than there may be, or two of one name."""
    if len(names) > MAX_SUBJECTS:
        raise ConfigError(
            f"{len(names)} subjects are given and each is one more picture in every step; give at most {MAX_SUBJECTS}"
        )
    twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if twice is not None:
        raise ConfigError(f"two subjects are named {twice[:60]!r}; give each a name of its own")


def checked_box(name: str, box: Any) -> tuple[float, float, float, float]:
    """A box in shares of width and height.

    Raises:
        ConfigError: other than four numbers of 0..1 with left < right and top < bottom.
    """
    numbers = [float(n) for n in box if isinstance(n, int | float) and not isinstance(n, bool)]
    if (
        len(numbers) != 4
        or len(box) != 4
        or not (0 <= numbers[0] < numbers[2] <= 1 and 0 <= numbers[1] < numbers[3] <= 1)
    ):
        raise ConfigError(
            f"the box of {name[:60]!r} is {short(list(box))}; give [left, top, right, bottom] in shares of width and "
            "height, with 0 <= left < right <= 1 and 0 <= top < bottom <= 1"
        )
    return numbers[0], numbers[1], numbers[2], numbers[3]


def parse_subject(text: str) -> tuple[str, str, str | None]:
    """(name, file of its picture, file of its mask or None) of NAME=IMAGE[@MASK]; the last @ parts the mask.

    Raises:
        ConfigError: text of another form.
    """
    name, equals, files = text.partition("=")
    image, at, mask = files.rpartition("@") if "@" in files else (files, "", "")
    if not (equals and name.strip() and image and (mask or not at)):
        raise ConfigError(f"subject {short(text)} is not NAME=IMAGE or NAME=IMAGE@MASK; write cat=cat.png@cat_mask.png")
    return name.strip(), image, mask or None


def read_layout(path: Path) -> list[Any]:
    """A layout file, [{"subject": name, "box": [left, top, right, bottom]}, ...], as the list that it holds.

    Raises:
        ConfigError: no such file, no JSON, or no list.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"layout file {path.name!r} cannot be read ({error.strerror}); check its path") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"layout file {path.name!r} is no JSON; write {_LAYOUT}") from error
    if not isinstance(data, list):
        raise ConfigError(f"layout file {path.name!r} holds no list; write {_LAYOUT}")
    return data


_LAYOUT = '[{"subject": "cat", "box": [0, 0, 0.5, 1]}]'

Place = tuple[str, float, float, float, float]


def check_layout(items: Any, names: Sequence[str]) -> tuple[Place, ...]:
    """Boxes of subjects, from the entries of a layout file or from what this function gave.

    Raises:
        ConfigError: entries of another form, a box outside of the picture, or a subject that is not there or twice.
    """
    if not isinstance(items, list | tuple):
        raise ConfigError(f"layout is {short(items)}; write {_LAYOUT}")
    places: dict[str, Place] = {}
    for item in items:
        name, box = _entry(item)
        if name not in names:
            raise ConfigError(
                f"the layout has {name[:60]!r}, and subjects are {', '.join(names)[:120]}; use those names"
            )
        if name in places:
            raise ConfigError(f"the layout has {name[:60]!r} twice; give every subject one box")
        places[name] = (name, *checked_box(name, box))
    return tuple(places.values())


def _entry(item: Any) -> tuple[str, Any]:
    """Name and box of an entry."""
    if isinstance(item, Mapping) and set(item) == {"subject", "box"}:
        name, box = item["subject"], item["box"]
    elif isinstance(item, list | tuple) and item:
        name, box = item[0], item[1:]
    else:
        raise ConfigError(f"a layout has the entry {short(item)}; write {_LAYOUT}")
    if not isinstance(name, str) or not isinstance(box, list | tuple):
        raise ConfigError(f"a layout has the entry {short(item)}; write {_LAYOUT}")
    return name, box
