"""Regions of a picture and what is asked for in each: boxes or masks, prompts, negatives, weights.

A layout file is JSON, [{"subject": "cat", "box": [x0, y0, x1, y1]}, ...], in shares of width and height.
"""

import base64
import binascii
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gensparse.errors import ConfigError, short, unknown_name

MAX_REGIONS = 64
MAX_MASK = 1 << 24
"""Pixels of a mask that is read from data, so that a small text cannot become a huge array."""

KEYS = ("subject", "prompt", "negative", "box", "mask", "weight")


@dataclass(frozen=True)
class Mask:
    """A picture of 0..255 that can be compared, hashed and written as JSON.

    Args:
        height, width: in pixels.
        data: one byte per pixel, row by row; 255 is wholly inside.

    Raises:
        ConfigError: sizes below 1, or another number of bytes.
    """

    height: int
    width: int
    data: bytes

    def __post_init__(self) -> None:
        sizes = [n for n in (self.height, self.width) if isinstance(n, int) and not isinstance(n, bool) and n > 0]
        if len(sizes) != 2 or not isinstance(self.data, bytes) or len(self.data) != self.height * self.width:
            raise ConfigError(
                f"A mask of {self.height!r} x {self.width!r} pixels needs as many bytes, and got "
                f"{len(self.data) if isinstance(self.data, bytes) else short(self.data)}; pass one byte per pixel."
            )

    @classmethod
    def of(cls, values: Any) -> "Mask":
        """From an array [H, W] (or a tensor, or a picture in grey) of bools, of 0..1, or of bytes 0..255.

        Raises:
            ConfigError: another shape, no pixels, values outside of these.
        """
        if isinstance(values, Mask):
            return values
        array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
        if array.ndim != 2 or not array.size:
            raise ConfigError(
                f"A mask of shape {array.shape} is not allowed; pass (height, width), one mask at a time."
            )
        if array.dtype != np.uint8:
            share = array.astype(np.float64)
            if not (np.isfinite(share).all() and share.min() >= 0 and share.max() <= 1):
                raise ConfigError("A mask must hold numbers from 0 to 1, or bytes; scale it, 1 is wholly inside.")
            array = np.rint(share * 255).astype(np.uint8)
        return cls(*array.shape, np.ascontiguousarray(array).tobytes())

    @classmethod
    def read(cls, path: Path) -> "Mask":
        """From a picture file, in grey.

        Raises:
            ConfigError: no such file, or no picture.
        """
        from PIL import Image

        try:
            with Image.open(path) as picture:
                if picture.width * picture.height > MAX_MASK:
                    raise ConfigError(
                        f"The mask {path.name} has {picture.width}x{picture.height} pixels; pass at most {MAX_MASK}."
                    )
                return cls.of(np.asarray(picture.convert("L")))
        except OSError as error:
            raise ConfigError(f"The mask {str(path)!r} cannot be read as a picture; check the path.") from error

    def array(self) -> np.ndarray:
        """float32 [height, width] in 0..1."""
        return np.frombuffer(self.data, np.uint8).reshape(self.height, self.width).astype(np.float32) / 255

    def to_dict(self) -> dict[str, Any]:
        """{"size": [height, width], "data": base64 of the compressed bytes}."""
        packed = base64.b64encode(zlib.compress(self.data, 9)).decode("ascii")
        return {"size": [self.height, self.width], "data": packed}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Mask":
        """What `to_dict` gave.

        Raises:
            ConfigError: anything else.
        """
        size, packed = data.get("size"), data.get("data")
        whole = isinstance(size, list | tuple) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
        if not whole or not isinstance(packed, str) or set(data) != {"size", "data"} or math.prod(size) > MAX_MASK:
            raise ConfigError(
                f'mask={short(data)} is not allowed; pass {{"size": [height, width], "data": ...}} as Mask.to_dict '
                "writes it, or the path of a picture."
            )
        try:
            packer = zlib.decompressobj()
            raw = packer.decompress(base64.b64decode(packed, validate=True), math.prod(size) + 1)
        except (binascii.Error, zlib.error, ValueError) as error:
            raise ConfigError("The data of a mask is damaged; write it anew by Mask.to_dict.") from error
        return cls(*size, raw)

    def __repr__(self) -> str:
        return f"Mask({self.height}x{self.width}, {zlib.crc32(self.data):08x})"


@dataclass(frozen=True)
class Region:
    """A part of the picture with its own prompt.

    Args:
        prompt: what stands there; by default the subject's name.
        box: x0, y0, x1, y1 in shares of width and height, half-open: the first pixel counts, the last one does not.
            A box without area has no effect.
        mask: the part as a picture in its place, stretched over the whole picture; None for the box.
        negative: what must not stand there; None for the negative prompt of the call.
        weight: of this region where several overlap, above 0.
        subject: name that reference pictures of the region go by.

    Raises:
        ConfigError: neither box nor mask or both, or values of another form.
    """

    prompt: str = ""
    box: tuple[float, float, float, float] | None = None
    mask: Mask | None = None
    negative: str | None = None
    weight: float = 1.0
    subject: str = ""

    def __post_init__(self) -> None:
        for name in ("prompt", "subject"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"Region {name}={short(getattr(self, name))} is not allowed; pass text.")
        if not (self.negative is None or isinstance(self.negative, str)):
            raise ConfigError(f"Region negative={short(self.negative)} is not allowed; pass text, or None.")
        if not (self.prompt or self.subject):
            raise ConfigError("A region needs a prompt or the name of a subject; pass one.")
        if not self.prompt:
            object.__setattr__(self, "prompt", self.subject)
        if (self.box is None) == (self.mask is None):
            raise ConfigError(f"The region {short(self.prompt)} needs a box or a mask, and not both; pass one of them.")
        if self.box is not None:
            object.__setattr__(self, "box", _box(self.box))
        else:
            object.__setattr__(self, "mask", Mask.of(self.mask))
        if not _is_number(self.weight) or self.weight <= 0:
            raise ConfigError(f"Region weight={self.weight!r} is not allowed; pass a number above 0.")
        object.__setattr__(self, "weight", float(self.weight))

    def to_dict(self) -> dict[str, Any]:
        """As a layout file has it; what is not set is left out."""
        data: dict[str, Any] = {"prompt": self.prompt}
        if self.subject:
            data["subject"] = self.subject
        if self.negative is not None:
            data["negative"] = self.negative
        if self.box is not None:
            data["box"] = list(self.box)
        if self.mask is not None:
            data["mask"] = self.mask.to_dict()
        if self.weight != 1:
            data["weight"] = self.weight
        return data


@dataclass(frozen=True)
class Regions:
    """Regions of a picture, in any order; they may overlap and need not cover it.

    Args:
        items: the regions.

    Raises:
        ConfigError: no region, more than 64, or something else than regions.
    """

    items: tuple[Region, ...]

    def __post_init__(self) -> None:
        given = self.items
        if not isinstance(given, list | tuple) or not all(isinstance(item, Region) for item in given):
            raise ConfigError(f"Regions items={short(given)} is not allowed; pass a list of Region.")
        if not 1 <= len(given) <= MAX_REGIONS:
            raise ConfigError(f"{len(given)} regions are not allowed; pass 1 to {MAX_REGIONS}.")
        object.__setattr__(self, "items", tuple(given))

    @classmethod
    def of(cls, value: Any, folder: Path | None = None) -> "Regions":
        """From regions, their dicts, or the path of a layout file.

        Args:
            value: Regions, a Region, a list of Region or of dicts as in a layout file, or a path.
            folder: that paths of masks are relative to.

        Raises:
            ConfigError: anything else; says which region of a list.
        """
        if isinstance(value, Regions):
            return value
        if isinstance(value, Region):
            return cls((value,))
        if isinstance(value, str | Path):
            return cls.read(Path(value))
        if not isinstance(value, Sequence):
            raise ConfigError(f"regions={short(value)} is not allowed; pass a list of regions or a layout file.")
        return cls(tuple(_region(number, item, folder) for number, item in enumerate(value, start=1)))

    @classmethod
    def read(cls, path: Path) -> "Regions":
        """From a layout file, which may name mask pictures beside it.

        Raises:
            ConfigError: no such file, no JSON, or no list of regions.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"The layout file {str(path)!r} cannot be read; check the path.") from error
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(
                f'The layout file {path.name} is no JSON ({error}); write [{{"subject": "cat", "box": [0, 0, 1, 1]}}].'
            ) from error
        return cls.of(data, path.parent)

    def to_list(self) -> list[dict[str, Any]]:
        """As JSON data of a layout file."""
        return [item.to_dict() for item in self.items]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Region]:
        return iter(self.items)

    def masks(self, size: tuple[int, int], grid: tuple[int, int] | None = None) -> np.ndarray:
        """float32 [R, rows, columns]: the weight of every region at every cell of a grid over the picture, 0 outside.

        A cell has the weight of the pixel under its centre. A pixel is inside a box from round(x0 * width) on up to,
        without, round(x1 * width).

        Args:
            size: (height, width) of the picture in pixels.
            grid: (rows, columns); None for the pixels themselves.
        """
        places = [_centres(count, pixels) for count, pixels in zip(grid or size, size, strict=True)]
        planes = np.zeros((len(self.items), *map(len, places)), np.float32)
        for plane, item in zip(planes, self.items, strict=True):
            if item.box is not None:
                x0, y0, x1, y1 = item.box
                inside = [
                    (round(low * pixels) <= place) & (place < round(high * pixels))
                    for place, pixels, low, high in zip(places, size, (y0, x0), (y1, x1), strict=True)
                ]
                plane[np.ix_(*inside)] = item.weight
            elif item.mask is not None:
                own = item.mask.array()
                picked = [
                    _centres(pixels, length)[place]
                    for place, pixels, length in zip(places, size, own.shape, strict=True)
                ]
                plane[:] = own[np.ix_(*picked)] * item.weight
        return planes


def _region(number: int, item: Any, folder: Path | None) -> Region:
    if isinstance(item, Region):
        return item
    if not isinstance(item, Mapping):
        raise ConfigError(f'Region {number} is {short(item)}; write {{"subject": "cat", "box": [0, 0, 0.5, 1]}}.')
    for key in item:
        if key not in KEYS:
            raise ConfigError(f"Region {number}: {unknown_name('key', str(key), KEYS)}.")
    settings = {key: value for key, value in item.items() if value is not None}
    mask = settings.get("mask")
    try:
        if isinstance(mask, str):
            settings["mask"] = Mask.read(_beside(folder, mask))
        elif isinstance(mask, Mapping):
            settings["mask"] = Mask.from_dict(mask)
        return Region(**settings)
    except ConfigError as error:
        raise ConfigError(f"Region {number}: {error}") from None


def _beside(folder: Path | None, name: str) -> Path:
    """A picture in the folder of a layout file, or below it."""
    path = None if folder is None else (folder / name).resolve()
    if folder is None or path is None or not path.is_relative_to(folder.resolve()):
        raise ConfigError(
            f"mask={short(name)} is not allowed; only a layout file may name pictures, those beside it. Pass "
            "Mask.read(path) in Python."
        )
    return path


def _centres(count: int, pixels: int) -> np.ndarray:
    """Of every one of `count` cells along an axis of so many pixels, the pixel under its centre."""
    return np.floor((np.arange(count, dtype=np.float32) + 0.5) * np.float32(pixels / count)).astype(np.int64)


def _box(value: Any) -> tuple[float, float, float, float]:
    numbers = isinstance(value, list | tuple) and len(value) == 4 and all(map(_is_number, value))
    if not numbers or not (0 <= value[0] <= value[2] <= 1 and 0 <= value[1] <= value[3] <= 1):
        raise ConfigError(
            f"box={short(value)} is not allowed; pass x0, y0, x1, y1 with 0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1."
        )
    x0, y0, x1, y1 = map(float, value)
    return x0, y0, x1, y1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
