"""A complete tiny FLUX folder on disk, with the facts a shipped model states about itself."""

import json
import tempfile
from functools import cache
from pathlib import Path

NOTES = {
    "native_size": 32,
    "max_sequence_length": 16,
    "num_inference_steps": 3,
    "true_cfg_scale": 2.0,
    "position_ids": "centre-aligned scene units",
    "attention": "sliding_window:radius=3",
    "dense_below_tokens": 100,
}


@cache
def tiny_folder() -> Path:
    """Saved once per test run: 4 pixels per token, native 32 x 32 pixels (8 x 8 tokens)."""
    from gensparse.testing.tiny import tiny_flux_pipeline

    folder = Path(tempfile.mkdtemp(prefix="tiny-flux-")) / "tiny-flux"
    tiny_flux_pipeline().save_pretrained(folder)
    (folder / "gensparse.json").write_text(json.dumps(NOTES))
    return folder


@cache
def tiny_family(name: str) -> Path:
    """A tiny pipeline of another family, saved once per test run; native 32 x 32 pixels."""
    from gensparse.testing.tiny import tiny_pipeline

    folder = Path(tempfile.mkdtemp(prefix=f"tiny-{name}-")) / f"tiny-{name}"
    tiny_pipeline(name).save_pretrained(folder)
    if name == "qwenimage":  # its scheduler says 64 tokens per side
        (folder / "gensparse.json").write_text(json.dumps({"native_size": 32, "max_sequence_length": 16}))
    return folder
