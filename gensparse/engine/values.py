"""The values that enter and leave the engine."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gensparse.models import ModelInfo
from gensparse.request import CustomizeRequest, Request

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Event:
    """Progress of a running request; `eta` is in seconds for everything that is left, None when unknown."""

    phase: str  # load | start | step | decode | write | warning
    picture: int = 0
    pictures: int = 1
    stage: int = 0
    stages: int = 1
    step: int = 0
    steps: int = 0
    height: int = 0
    width: int = 0
    eta: float | None = None
    text: str = ""  # of a warning
    preview: "Image.Image | None" = field(default=None, repr=False, compare=False)  # a small picture, with live_preview


@dataclass(frozen=True)
class OutputOptions:
    """Where results go and what is written into them.

    Args:
        paths: one file per picture; empty keeps the pictures in the result only.
        stages_dir: folder where finished stages are kept; None keeps them in memory.
        also_read: further folders with finished stages, for instance those of a draft.
        key: of the job, written into the metadata (`gensparse.engine.record.job_key`).
        live_preview: send small pictures with `Event.preview` while a picture is denoised, as often as costs little.
    """

    paths: tuple[Path, ...] = ()
    image_format: str = "png"
    overwrite: bool = False
    metadata: bool = True
    prompt_in_metadata: bool = True
    sidecar: bool = False
    preview_dir: Path | None = None
    stages_dir: Path | None = None
    also_read: tuple[Path, ...] = ()
    key: str | None = None
    live_preview: bool = False


@dataclass(frozen=True)
class Output:
    """One finished picture."""

    path: str | None
    width: int
    height: int
    seed: int
    sha256: str | None
    image: "Image.Image | None" = field(repr=False, compare=False)  # only when it was not written to a file
    metadata: Mapping[str, Any] = field(repr=False, compare=False, default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("path", "width", "height", "seed", "sha256")}


@dataclass(frozen=True)
class Result:
    """What the final JSON of a command says."""

    status: str
    outputs: tuple[Output, ...]
    request: dict[str, Any]
    timings: dict[str, float]
    memory: dict[str, int]
    attention: dict[str, Any]
    versions: dict[str, str]
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        out = {k: getattr(self, k) for k in ("status", "request", "timings", "memory", "attention", "versions")}
        return out | {"outputs": [o.to_dict() for o in self.outputs], "warnings": list(self.warnings)}


@dataclass(frozen=True)
class Resolved:
    """A request in which nothing is left open, and what was changed on the way."""

    request: Request
    info: ModelInfo
    height: int
    width: int
    device: str
    dtype: str
    warnings: tuple[str, ...] = ()
    source_size: tuple[int, int] = (0, 0)  # (height, width) of the picture that is upscaled

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.request.seed

    @property
    def loading(self) -> dict[str, Any]:
        """What decides how weights are loaded: arguments of a `Session`."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "offload": self.request.offload,
            "quantize": self.request.quantize,
            "lora": self.request.lora,
            "subjects": isinstance(self.request, CustomizeRequest),
        }

    def picture(self, seed: int) -> Request:
        """The request of one of the pictures."""
        return self.request.replace(seed=(seed,), num_images=1)
