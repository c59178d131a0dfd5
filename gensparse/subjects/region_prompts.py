"""Prompts for parts of a picture: from a file, from data, and where their pixels are."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gensparse.errors import ConfigError, short

FORM = 'a JSON list of {"box": [left, top, right, bottom], "prompt": "..."} with shares of the picture from 0 to 1'

Box = tuple[float, float, float, float]
"""left, top, right, bottom as shares of width and height, half-open."""


@dataclass(frozen=True)
class RegionPrompt:
    """A rectangle of the picture and what it shows.

    Args:
        box: left, top, right, bottom as shares of width and height, 0..1, half-open.
        prompt: what is inside; naming things outside draws them there.

    Raises:
        ConfigError: a box that is empty or leaves the picture, or a prompt without words.
    """

    box: Box
    prompt: str

    def __post_init__(self) -> None:
        box = self.box
        if not isinstance(box, list | tuple) or len(box) != 4 or not all(map(_is_number, box)):
            raise ConfigError(f"The region's box is {short(box)}; give left, top, right, bottom from 0 to 1.")
        left, top, right, bottom = (float(side) for side in box)
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ConfigError(
                f"The region {[left, top, right, bottom]} leaves the picture or is empty; give left < right and "
                "top < bottom as shares of its width and height from 0 to 1."
            )
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ConfigError(f"The prompt of the region {list(box)} is {short(self.prompt)}; give a text.")
        object.__setattr__(self, "box", (left, top, right, bottom))


def as_region_prompts(items: Any, where: str = "") -> tuple[RegionPrompt, ...]:
    """Regions from values, or from mappings with "box" and "prompt".

    Args:
        where: what messages begin with, such as a file's name.

    Raises:
        ConfigError: anything else; says which region is wrong.
    """
    if isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable):
        raise ConfigError(f"{where}Regions are {short(items)}; give {FORM}.")
    found = []
    for number, item in enumerate(items, start=1):
        if isinstance(item, RegionPrompt):
            found.append(item)
            continue
        if not isinstance(item, Mapping) or set(item) != {"box", "prompt"}:
            raise ConfigError(f"{where}Region {number} is {short(item)}; give {FORM}.")
        try:
            found.append(RegionPrompt(**item))
        except ConfigError as error:
            raise ConfigError(f"{where}Region {number}: {error}") from None
    return tuple(found)


def read_region_prompts(path: str | Path) -> tuple[RegionPrompt, ...]:
    """The regions of a JSON file.

    Raises:
        ConfigError: no such file, no JSON, or another form.
    """
    name = Path(path).name
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text"
        raise ConfigError(f"The regions file {name} cannot be read ({reason}); give {FORM}.") from None
    try:
        items = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"The regions file {name} is no JSON ({error}); give {FORM}.") from None
    return as_region_prompts(items, f"{name}: ")


def region_masks(boxes: Iterable[Box], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Cells of every box, bool [regions, rows, columns]: those from the rounded first edge up to the second.

    Args:
        size: rows and columns of the whole picture.
    """
    rows, columns = (np.arange(n) for n in size)
    masks = [
        ((rows >= _edge(top, size[0])) & (rows < _edge(bottom, size[0])))[:, None]
        & ((columns >= _edge(left, size[1])) & (columns < _edge(right, size[1])))
        for left, top, right, bottom in boxes
    ]
    return np.array(masks, bool).reshape(len(masks), *size)


def _edge(share: float, length: int) -> int:
    return math.floor(share * length + 0.5)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
