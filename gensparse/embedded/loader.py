"""Loads the embedded models: complete pipeline folders that ship inside the package.

`model/` is a FLUX pipeline and works with plain diffusers too: `FluxPipeline.from_pretrained(embedded_path())`, called
with `max_sequence_length=32` (the text length it was trained with; FLUX does not mask padding) and `true_cfg_scale`
about 3.5 with an empty negative prompt. Its position ids are scene coordinates in native tokens, centre-aligned: token
i of a grid with spacing s lies at (i + 0.5) * s - 0.5. Spacing is 1 at the native size and 1/z for a picture z times as
large, z up to 16; the model has seen close-ups of such pictures.

`unet_model/` is a Stable Diffusion XL pipeline with the same autoencoder and words:
`StableDiffusionXLPipeline.from_pretrained(embedded_path("unet"))`.

Both: 256 x 256 pixels natively. The `gensparse.json` of each folder holds these facts as data.
"""

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gensparse.embedded.scenes import vocabulary
from gensparse.errors import ConfigError, ModelError, unknown_name

if TYPE_CHECKING:
    import torch
    from diffusers import FluxPipeline, StableDiffusionXLPipeline

ALIASES: Mapping[str, str] = {"flux": "embedded", "unet": "embedded-unet"}
"""Kind of embedded model -> its name for `-m`."""

_FOLDERS = {"flux": "model", "unet": "unet_model"}
_MISSING = {
    "flux": "install gensparse again from a complete wheel or checkout.",
    "unet": "train it with samples/embedded/train.py --model unet, or use the embedded FLUX model (-m embedded).",
}


def embedded_path(kind: str = "flux") -> Path:
    """Folder of an embedded pipeline.

    Args:
        kind: "flux" or "unet".

    Raises:
        ConfigError: another kind.
        ModelError: the installation lacks it.
    """
    if kind not in _FOLDERS:
        raise ConfigError(unknown_name("embedded model", kind, _FOLDERS))
    index = _index_of(kind)
    if not index.is_file():
        raise ModelError(f"The model {ALIASES[kind]} is not at {index.parent}: {_MISSING[kind]}")
    return index.parent


def _index_of(kind: str) -> Path:
    return Path(str(files("gensparse.embedded").joinpath(_FOLDERS[kind], "model_index.json")))


SHIPPED: Mapping[str, Callable[[], Path]] = {alias: partial(embedded_path, kind) for kind, alias in ALIASES.items()}
"""Name for `-m` -> its folder."""


def is_shipped(alias: str) -> bool:
    """Whether a name for `-m` is that of an embedded model which this installation has."""
    kind = next((kind for kind, own in ALIASES.items() if own == alias), None)
    return kind is not None and _index_of(kind).is_file()


def embedded_notes(kind: str = "flux") -> dict[str, Any]:
    """Facts no diffusers config holds: native_size (pixels), max_sequence_length, num_inference_steps and others."""
    return json.loads((embedded_path(kind) / "gensparse.json").read_text(encoding="utf-8"))


def load_embedded(dtype: "torch.dtype | None" = None, kind: str = "flux") -> "FluxPipeline | StableDiffusionXLPipeline":
    """An embedded model as a diffusers pipeline on the CPU: a FluxPipeline, or with "unet" Stable Diffusion XL's.

    Args:
        dtype: of the weights; float32 without.

    Raises:
        ConfigError: another kind.
        ModelError: the installation lacks it.
    """
    return load_folder(embedded_path(kind), dtype)


def load_folder(path: Path, dtype: "torch.dtype | None" = None) -> "FluxPipeline | StableDiffusionXLPipeline":
    """A pipeline folder with an AutoencoderTiny, which diffusers would warn of, without bars; float32 without dtype."""
    import torch
    from diffusers import AutoencoderTiny, DiffusionPipeline

    dtype = dtype or torch.float32
    with _quiet():
        vae = AutoencoderTiny.from_pretrained(path, subfolder="vae", dtype=dtype, local_files_only=True)
        return DiffusionPipeline.from_pretrained(path, vae=vae, dtype=dtype, local_files_only=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and no warning that an AutoencoderTiny stands for the VAE: that is intended."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (level, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(level)
            if bars:
                library.enable_progress_bar()


def unknown_words(prompt: str) -> dict[str, list[str]]:
    """Words of `prompt` the model never saw -> up to three known words that look alike."""
    known = vocabulary()
    words = dict.fromkeys(re.findall(r"\w+", prompt.lower()))
    return {word: difflib.get_close_matches(word, known, n=3, cutoff=0.6) for word in words if word not in known}
