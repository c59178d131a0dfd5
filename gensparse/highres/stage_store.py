"""Finished stages in a folder: one safetensors file each, written whole or not at all."""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gensparse.highres.stages import StageResult


class FolderStageStore:
    """A `StageStore` in `folder`; a damaged or foreign file counts as a stage that is not there."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def path(self, index: int) -> Path:
        return self.folder / f"stage-{index}.safetensors"

    def load(self, index: int) -> StageResult | None:
        try:
            with safe_open(self.path(index), framework="pt") as file:
                facts = json.loads((file.metadata() or {})["stage"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return _unpack(facts, tensors)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None

    def save(self, index: int, result: StageResult) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        facts = {
            "index": result.index,
            "height": result.height,
            "width": result.width,
            # hexadecimal keeps every bit: a resumed run must continue on exactly the same sigmas
            "sigmas": [sigma.hex() for sigma in result.sigmas],
        }
        tensors = {"latents": result.latents.contiguous()}
        tensors |= {f"x0.{step}": x0.contiguous() for step, x0 in result.history.items()}
        partial = self.path(index).with_suffix(f".{os.getpid()}.partial")
        try:
            save_file(tensors, partial, metadata={"stage": json.dumps(facts)})
            os.replace(partial, self.path(index))
        finally:
            partial.unlink(missing_ok=True)


def _unpack(facts: dict, tensors: dict[str, torch.Tensor]) -> StageResult:
    history = {int(name[3:]): tensor for name, tensor in tensors.items() if name.startswith("x0.")}
    return StageResult(
        index=facts["index"],
        height=facts["height"],
        width=facts["width"],
        sigmas=tuple(float.fromhex(sigma) for sigma in facts["sigmas"]),
        latents=tensors["latents"],
        history=history,
    )
