"""Pictures of visitors: only files that were uploaded, judged by their header before anything decodes them."""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gensparse.app.core import App
from gensparse.errors import ConfigError, short
from gensparse.image_io import Header, read_header, read_image

FILE_TYPES = [".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif"]
SMALL = 512  # pixels of the longer side of a copy to draw on


def uploaded(app: App, value: Any, owner: str) -> Path:
    """The path of an uploaded file.

    Args:
        value: what the client sent: a path, or a dictionary with one.

    Raises:
        ConfigError: an address, or a file that this visitor did not upload. Whether it exists is not told.
    """
    path = value.get("path") if isinstance(value, Mapping) else value
    if not isinstance(path, str) or not path:
        raise ConfigError(f"the picture is {short(value)}; upload a PNG, JPEG, WebP, TIFF, BMP or GIF file")
    if "://" in path or "\0" in path or len(path) > 4096:
        raise ConfigError("the picture is an address, which is not fetched; download it and upload the file")
    with contextlib.suppress(OSError):
        real = Path(path).resolve()
        inside = real.is_relative_to(app.sessions.scratch) and app.sessions.may_read(real, owner)
        if inside and real.is_file():
            return real
    raise ConfigError("the picture was not uploaded here; upload it again")


def checked_header(app: App, path: Path) -> Header:
    """Size of an uploaded picture. Raises ConfigError for anything that is no picture, or too large."""
    limits = app.limits
    if path.stat().st_size > limits.upload:
        raise ConfigError(f"the picture has {path.stat().st_size / 1e6:.0f} MB; {limits.upload / 1e6:.0f} MB are read")
    return _named(path, lambda: read_header(path, max_pixels=limits.upload_pixels))


def small_copy(app: App, owner: str, path: Path) -> Path:
    """A small upright copy of an upload among the visitor's temporary files, made once.

    Raises:
        ConfigError: no picture, or a damaged one.
    """
    name = hashlib.sha256(str(path).encode()).hexdigest()[:24]
    copy = app.sessions.folder(owner, scratch=True) / f"small-{name}.png"
    if not copy.exists():
        image = _named(path, lambda: read_image(path, max_pixels=app.limits.upload_pixels)).image
        image.thumbnail((SMALL, SMALL), reducing_gap=2.0)
        part = copy.with_suffix(".part")
        image.save(part, "PNG")
        part.replace(copy)
    return copy


def keep(path: Path, folder: Path, stem: str | None = None) -> Path:
    """A copy of an upload among the files of its job, where nothing deletes it meanwhile.

    Args:
        stem: its name without suffix; None for a random one.
    """
    suffix, stem = path.suffix.lower(), stem or f"input-{secrets.token_hex(4)}"
    copy = folder / f"{stem}{suffix if re.fullmatch(r'[.][a-z]{1,5}', suffix) else ''}"
    try:
        os.link(path, copy)
    except OSError:  # another file system
        shutil.copyfile(path, copy)
    return copy


def _named(path: Path, read: Any) -> Any:
    """The result of `read`; its errors name the file as its visitor knows it, without folders of this machine."""
    try:
        return read()
    except ConfigError as error:
        raise ConfigError(str(error).replace(str(path), path.name)) from None
