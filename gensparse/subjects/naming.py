"""What can be said about named subjects and their boxes without loading anything."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gensparse.errors import ConfigError, short

MAX_SUBJECTS = 5
"""Every subject is one more picture in each denoiser call."""

MAX_PICTURES = 8
"""Of all subjects together; every one is a reference of its own in each denoiser call."""

Box = tuple[float, float, float, float]


class Shown(NamedTuple):
    """A picture of a subject.

    Args:
        image: its file.
        mask: the file of its mask, or the box "LEFT:TOP:RIGHT:BOTTOM" in shares of its width and height, where the
            subject is; None for all of it.
    """

    image: str
    mask: str | None = None

    @property
    def box(self) -> Box | None:
        """The box that the mask is, or None."""
        return mask_box(self.mask)


def mask_box(mask: str | None) -> Box | None:
    """The box "LEFT:TOP:RIGHT:BOTTOM" that stands in place of the file of a mask; None where it is none.

    Raises:
        ConfigError: a box that is empty or outside of the picture.
    """
    if mask is None or not re.fullmatch(r"\d*\.?\d+(:\d*\.?\d+){3}", mask):
        return None
    return checked_box(mask, [float(number) for number in mask.split(":")])


def check_names(names: Sequence[str]) -> None:
    """ConfigError for more subjects than there may be, or two of one name."""
    if len(names) > MAX_SUBJECTS:
        raise ConfigError(
            f"{len(names)} subjects are given and each is one more picture in every step; give at most {MAX_SUBJECTS}"
        )
    twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if twice is not None:
        raise ConfigError(f"two subjects are named {twice[:60]!r}; give each a name of its own")


def checked_box(name: str, box: Any) -> Box:
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


_SUBJECT = "NAME=IMAGE, NAME=IMAGE@MASK, several of these joined by commas, or NAME alone"


def parse_subject(text: str) -> tuple[str, tuple[Shown, ...]]:
    """The name of a subject and its pictures, from NAME=IMAGE[@MASK][,IMAGE[@MASK]...]; none of NAME alone.

    The last @ of a picture parts its mask; nothing behind it is no mask. A comma in the name of a file is written
    twice, and so is an @ that parts nothing.

    Raises:
        ConfigError: text of another form, too many pictures, or a box that is no mask.
    """
    name, equals, files = text.partition("=")
    items = [part.replace(",,", ",") for part in re.split(r"(?<!,),(?!,)", files)] if equals else []
    shown = []
    for item in items:
        parts = re.split(r"(?<!@)@(?!@)", item)
        files_of = ("@".join(parts[:-1]), parts[-1]) if len(parts) > 1 else (item, "")
        image, mask = (part.replace("@@", "@") for part in files_of)
        if not image:
            raise ConfigError(f"subject {short(text)} is not {_SUBJECT}; write cat=cat.png@cat_mask.png")
        mask_box(mask)
        shown.append(Shown(image, mask or None))
    if not name.strip():
        raise ConfigError(f"subject {short(text)} is not {_SUBJECT}; write cat=cat.png@cat_mask.png")
    return name.strip(), tuple(shown)


def subject_text(name: str, shown: Sequence[Shown]) -> str:
    """What `parse_subject` reads back."""
    parts = []
    for image, mask in shown:
        files = [file.replace("@", "@@").replace(",", ",,") for file in (image, mask) if file is not None]
        parts.append("@".join(files))
    return f"{name}={','.join(parts)}" if parts else name


def check_pictures(counts: Sequence[int]) -> None:
    """ConfigError for more pictures of subjects than there may be."""
    if sum(counts) > MAX_PICTURES:
        raise ConfigError(
            f"{sum(counts)} pictures of subjects are given and each is one more in every step; give at most "
            f"{MAX_PICTURES}"
        )


def parse_prompts(items: Sequence[str], names: Sequence[str], what: str = "prompt") -> dict[str, str]:
    """{name: text} of NAME=TEXT each.

    Args:
        what: the texts are, for messages.

    Raises:
        ConfigError: text of another form, or a name that is no subject's or is there twice.
    """
    found: dict[str, str] = {}
    for item in items:
        name, equals, text = (part.strip() for part in item.partition("="))
        if not (name and equals and text):
            raise ConfigError(f'subject {what} {short(item)} is not NAME=TEXT; write cat="a grey cat"')
        if name not in names:
            raise ConfigError(
                f"a {what} is given for {name[:60]!r}, and subjects are {', '.join(names)[:120]}; use those names"
            )
        if name in found:
            raise ConfigError(f"two {what}s are given for {name[:60]!r}; give every subject one")
        found[name] = text
    return found


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


def layout_names(items: Sequence[Any]) -> list[str]:
    """Names of the subjects that the entries of a layout file place, as far as they have one."""
    names = [item.get("subject") for item in items if isinstance(item, Mapping)]
    return list(dict.fromkeys(name for name in names if isinstance(name, str) and name))


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
