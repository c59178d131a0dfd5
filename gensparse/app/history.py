"""The results of a visitor in this session: what there is, small pictures of it, and the settings that made it."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

from gensparse.app.core import App
from gensparse.app.jobs import Job
from gensparse.engine.values import Output, Result
from gensparse.errors import ConfigError, GensparseError
from gensparse.image_io import read_image

THUMBNAIL = 320  # pixels of the longer side
_WORDS = 60  # characters of a prompt below a picture


class Entry(NamedTuple):
    """A picture of a job."""

    job: Job
    index: int

    @property
    def result(self) -> Result:
        return self.job.result

    @property
    def output(self) -> Output:
        return self.result.outputs[self.index]

    @property
    def key(self) -> str:
        """What the page keeps to find it again."""
        return f"{self.job.id}/{self.index}"

    @property
    def caption(self) -> str:
        """Size, seed, and the beginning of the prompt."""
        prompt = " ".join(str(self.result.request.get("prompt") or "").split())
        words = prompt if len(prompt) <= _WORDS else prompt[: _WORDS - 1] + "…"
        return f"{self.output.width} x {self.output.height}, seed {self.output.seed}" + (f": {words}" if words else "")


def entries(app: App, owner: str) -> list[Entry]:
    """The pictures of a visitor that still exist, newest first."""
    return [
        Entry(job, index)
        for job in app.jobs.of(owner)
        if isinstance(job.result, Result)
        for index, output in enumerate(job.result.outputs)
        if output.path is not None and Path(output.path).is_file()
    ]


def find(app: App, owner: str, key: Any) -> Entry:
    """An entry by its key.

    Raises:
        ConfigError: it is gone, or it is somebody else's; the sentence is the same.
    """
    found = next((entry for entry in entries(app, owner) if entry.key == key), None)
    if found is None:
        raise ConfigError("this picture is not here any more; refresh the history")
    return found


def thumbnail(app: App, owner: str, output: Output) -> Path:
    """A small copy of a picture among the visitor's temporary files, made once."""
    source = str(output.path)
    name = hashlib.sha256(source.encode()).hexdigest()[:24]
    path = app.sessions.folder(owner, scratch=True) / f"thumbnail-{name}.jpg"
    if not path.exists():
        small = _small(source, output)
        part = path.with_suffix(".part")
        small.save(part, "JPEG", quality=85)
        part.replace(path)
    return path


def _small(source: str, output: Output) -> Image.Image:
    """The picture, smaller; a grey one with its size where it is too large to be opened again."""
    try:
        image = read_image(source).image
    except (GensparseError, MemoryError):
        image = Image.new("RGB", (THUMBNAIL, THUMBNAIL), (128, 128, 128))
        ImageDraw.Draw(image).text((12, 12), f"{output.width} x {output.height}", "white")
    image.thumbnail((THUMBNAIL, THUMBNAIL), reducing_gap=2.0)
    return image


def settings_of(entry: Entry) -> tuple[str, Mapping[str, Any]]:
    """(kind, fields of the request) that make this picture again."""
    values = {k: v for k, v in entry.result.request.items() if k not in ("kind", "version", "image")}
    kind = str(entry.result.request.get("kind", "generate"))
    return kind, values | {"seed": [entry.output.seed], "num_images": 1}
