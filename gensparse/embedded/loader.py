"""Loads the embedded model: a complete FLUX pipeline folder that ships inside the package.

The folder works with plain diffusers too: `FluxPipeline.from_pretrained(embedded_path())`, called with
`max_sequence_length=32` (the text length it was trained with; FLUX does not mask padding) and `true_cfg_scale` about
3.5 with an empty negative prompt.

Native size: 256 x 256 pixels, 256 tokens. Position ids are scene coordinates in native tokens, centre-aligned: token i
of a grid with spacing s lies at (i + 0.5) * s - 0.5. Spacing is 1 at the native size and 1/z for a picture z times as
large, z up to 16; the model has seen close-ups of such pictures. `model/gensparse.json` holds these facts as data.
"""

import difflib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gensparse.embedded.scenes import vocabulary
from gensparse.errors import ModelError

if TYPE_CHECKING:
    import torch
    from diffusers import FluxPipeline


def embedded_path() -> Path:
    """Folder of the embedded pipeline. Raises ModelError when the installation lacks it."""
    path = Path(str(files("gensparse.embedded").joinpath("model")))
    if not (path / "model_index.json").is_file():
        raise ModelError(
            f"The embedded model is not at {path}: install gensparse again from a complete wheel or checkout."
        )
    return path


def embedded_notes() -> dict[str, Any]:
    """Facts no diffusers config holds: native_size (pixels), max_sequence_length, position_ids, zooms."""
    return json.loads((embedded_path() / "gensparse.json").read_text(encoding="utf-8"))


def load_embedded(dtype: "torch.dtype | None" = None) -> "FluxPipeline":
    """The embedded model as a FluxPipeline on the CPU; float32 unless `dtype` says otherwise."""
    import torch
    from diffusers import AutoencoderTiny, FluxPipeline

    path, dtype = embedded_path(), dtype or torch.float32
    with _quiet():
        vae = AutoencoderTiny.from_pretrained(path, subfolder="vae", dtype=dtype, local_files_only=True)
        return FluxPipeline.from_pretrained(path, vae=vae, dtype=dtype, local_files_only=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and no warning that an AutoencoderTiny sits in a FluxPipeline: that is intended."""
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
