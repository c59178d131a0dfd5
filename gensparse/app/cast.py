"""The subjects that a visitor sent: names, uploaded pictures, masks and places, checked one by one.

They arrive as JSON, a dictionary for each: `{"name", "image", "mask", "box", "prompt"}`. Image and mask are uploads. A
mask may also be painted, as text: a box "LEFT:TOP:RIGHT:BOTTOM" in shares of the picture, or "WIDTHxHEIGHT:" and the
lengths of runs of pixels, row by row, of which the first is outside and every second one is the subject.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gensparse.app import forms, uploads
from gensparse.app.core import App
from gensparse.errors import ConfigError, short, unknown_name
from gensparse.image_io import write_image
from gensparse.request import CustomizeRequest
from gensparse.subjects.naming import MAX_SUBJECTS, Box, Shown, checked_box, mask_box, subject_text

FIELDS = ("name", "image", "mask", "box", "prompt")
_RUNS = re.compile(r"([1-9]\d{0,3})x([1-9]\d{0,3}):\d{1,8}(,\d{1,8})*")
_LONGEST = 200_000  # characters of a painted mask


def read(app: App, items: Any, owner: str) -> dict[str, Any]:
    """The fields `subject`, `layout` and `subject_prompt` of a request.

    Args:
        items: what the client sent; entries without name, picture, mask and box do not count.

    Raises:
        ConfigError: anything that is not allowed, in a sentence that says which subject it is.
    """
    if not isinstance(items, list | tuple):
        raise ConfigError(f'subjects are {short(items)}; give a list such as [{{"name": "cat", "image": ...}}]')
    kept = [(k, item) for k, item in enumerate(map(_fields, items), 1) if item]
    if len(kept) > MAX_SUBJECTS:
        raise ConfigError(f"{len(kept)} subjects are given; give at most {MAX_SUBJECTS}")
    subject, layout, prompts, pixels = [], [], [], 0
    for number, item in kept:
        name = _name(app, number, item)
        shown, size = _shown(app, name, item, owner)
        pixels += size
        subject.append(subject_text(name, shown))
        if "box" in item:
            layout.append((name, *box_of(name, item["box"])))
        if "prompt" in item:
            prompts.append(f"{name}={forms.checked_text(f'the prompt of {name!r}', item['prompt'], app.limits.prompt)}")
    if pixels > app.limits.upload_pixels:
        raise ConfigError(
            f"the pictures of all subjects have {pixels / 1e6:.0f} megapixels; at most "
            f"{app.limits.upload_pixels / 1e6:.0f} are read, so give smaller ones"
        )
    return {"subject": tuple(subject), "layout": tuple(layout), "subject_prompt": tuple(prompts)}


def box_of(name: str, value: Any) -> Box:
    """A place in the picture to be made: four numbers, or text with them. Raises ConfigError for anything else."""
    if isinstance(value, str) and len(value) <= 200:
        try:
            value = [float(part) for part in re.split(r"[\s,;]+", value.strip())]
        except ValueError:
            value = [value]
    return checked_box(name, value if isinstance(value, list | tuple) else [value])


def keep(request: CustomizeRequest, folder: Path) -> CustomizeRequest:
    """The request with copies of its pictures among the files of its job, where nothing deletes them meanwhile."""

    def copied(file: str | None, stem: str) -> str | None:
        return file if file is None or mask_box(file) else str(uploads.keep(Path(file), folder, stem))

    texts = []
    for number, (name, shown) in enumerate(request.shown.items(), 1):
        stem = f"{number}-{re.sub(r'[^A-Za-z0-9]+', '-', name)[:40].strip('-') or 'subject'}"
        pictures = [Shown(str(copied(image, stem)), copied(mask, f"{stem}-mask")) for image, mask in shown]
        texts.append(subject_text(name, pictures))
    return request.replace(subject=tuple(texts))


def files(request: CustomizeRequest) -> list[Path]:
    """Pictures and masks of a request, in order."""
    named = [file for shown in request.shown.values() for one in shown for file in one]
    return [Path(file) for file in named if file is not None and not mask_box(file)]


# ------------------------------------------------------------------------------------------------------ single subjects
def _fields(item: Any) -> dict[str, Any]:
    """What a client said about a subject, without what he left empty."""
    if not isinstance(item, Mapping):
        raise ConfigError(f'a subject is {short(item)}; give {{"name": "cat", "image": ...}}')
    for key in item:
        if key not in FIELDS:
            raise ConfigError(unknown_name("field of a subject", str(key), FIELDS))
    return {k: v for k, v in item.items() if v is not None and not (isinstance(v, str) and not v.strip())}


def _name(app: App, number: int, item: Mapping[str, Any]) -> str:
    name = item.get("name")
    if name is None:
        given = {"image": "a picture", "mask": "a mask", "box": "a place", "prompt": "a prompt"}
        has = " and ".join(text for key, text in given.items() if key in item)
        raise ConfigError(f"subject {number} has {has} and no name; name it with a word of the prompt")
    if not isinstance(name, str):
        raise ConfigError(f"the name of subject {number} is {short(name)}; give text")
    name = name.strip()
    if len(name) > app.limits.name:
        raise ConfigError(f"the name of subject {number} has {len(name)} characters; give at most {app.limits.name}")
    if "=" in name or not name.isprintable():
        raise ConfigError(f"the name {short(name)} has a character that names cannot have; use letters and digits")
    return name


def _shown(app: App, name: str, item: Mapping[str, Any], owner: str) -> tuple[list[Shown], int]:
    """The picture of a subject with its mask, none for one that is given by its name alone, and the pixels of both."""
    if "image" not in item:
        if "mask" in item:
            raise ConfigError(f"{name!r} has a mask and no picture; upload its picture")
        return [], 0
    path = uploads.uploaded(app, item["image"], owner)
    height, width = uploads.checked_header(app, path).size
    pixels, mask = height * width, item.get("mask")
    if isinstance(mask, str):
        if mask_box(mask) is None:
            file = _painted(app, name, mask, owner)
            mask = None if file is None else str(file)
    elif mask is not None:
        file = uploads.uploaded(app, mask, owner)
        height, width = uploads.checked_header(app, file).size
        pixels, mask = pixels + height * width, str(file)
    return [Shown(str(path), mask)], pixels


def _painted(app: App, name: str, text: str, owner: str) -> Path | None:
    """The file of a painted mask among the visitor's temporary files; None where nothing is painted."""
    image = painting(name, text)
    if image is None:
        return None
    digest = hashlib.sha256(text.encode()).hexdigest()[:24]
    path = app.sessions.folder(owner, scratch=True) / f"mask-{digest}.png"
    if not path.exists():
        write_image(image, path, overwrite=True)
    return path


def painting(name: str, text: str) -> Image.Image | None:
    """A painted mask as a picture, white where the subject is; None where nothing is painted. Raises ConfigError."""
    match = _RUNS.fullmatch(text) if len(text) <= _LONGEST else None
    if match is None:
        raise ConfigError(f"the mask of {name!r} is {short(text)}; upload a file, or paint it on the page")
    width, height = int(match[1]), int(match[2])
    runs = np.array(text.partition(":")[2].split(","), dtype=np.int64)
    if runs.sum() != width * height:
        raise ConfigError(f"the painted mask of {name!r} has {runs.sum()} pixels instead of {width} x {height}")
    pixels = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)
    return Image.fromarray(pixels.astype(np.uint8) * 255).convert("RGB") if pixels.any() else None
