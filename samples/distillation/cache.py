"""Samples a model makes of itself, kept on disk: clean latents, and what its denoiser was told about them.

A file holds one batch as the pipeline ran it: the final latents, and every argument that the denoiser got in the first
step besides latents and time (text, position ids, guidance). Nothing of it depends on the family of the model.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from distillation.models import run_pipeline
from gensparse.errors import ConfigError

Call = dict[str, Any]
_LATENTS, _TIME = "hidden_states", "timestep"


class Sample(NamedTuple):
    """One denoiser call without its noise.

    Args:
        latents: clean ones, as the denoiser takes them.
        call: all other arguments of the denoiser besides the time.
        time_unit: what the denoiser calls noise level 1.
        levels: noise levels of the pipeline's steps, falling, 0 at the end.
    """

    latents: Tensor
    call: Call
    time_unit: float
    levels: tuple[float, ...]

    def to(self, device: torch.device) -> "Sample":
        call = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in self.call.items()}
        return self._replace(latents=self.latents.to(device), call=call)


class FirstCalls:
    """Records the arguments of a denoiser's calls during the first step, in a `with` block."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.calls: list[Call] = []

    def __enter__(self) -> "FirstCalls":
        self._hook = self.model.register_forward_pre_hook(self._keep, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _keep(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
        call = {key: value for key, value in bound.items() if key != "self" and value is not None}
        if not self.calls or torch.equal(call[_TIME].max(), self.calls[0][_TIME].max()):
            self.calls.append(call)


class SampleCache:
    """Batches of samples in a folder.

    Args:
        settings: what the samples depend on; a folder holds samples of one kind only.
        batches: how many are used; a folder may hold more.

    Raises:
        ConfigError: the folder was filled with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], batches: int) -> None:
        self.folder, self.batches = folder, batches
        folder.mkdir(parents=True, exist_ok=True)
        note, wanted = folder / "settings.json", json.loads(json.dumps(settings))
        if note.exists() and (found := json.loads(note.read_text(encoding="utf-8"))) != wanted:
            other = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
            raise ConfigError(f"{folder} holds samples of other settings ({', '.join(other)}); name another --data.")
        note.write_text(json.dumps(wanted), encoding="utf-8")

    def path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.safetensors"

    def make(self, pipe: Any, index: int, prompts: Sequence[str], call: Mapping[str, Any], first_seed: int) -> None:
        """Write batch `index`, unless it is there."""
        if self.path(index).exists():
            return
        seeds = [first_seed + i for i in range(len(prompts))]
        with torch.no_grad(), FirstCalls(pipe.transformer) as seen:
            latents = run_pipeline(pipe, prompts, call, seeds, "latent")
        write_batch(self.path(index), latents, seen.calls, pipe.scheduler.sigmas.tolist())

    @cached_property
    def lessons(self) -> list[tuple[int, int]]:
        """(batch, call) of everything there is: two calls per batch under guidance with a negative prompt."""
        found = []
        for index in range(self.batches):
            with safe_open(self.path(index), "pt") as file:
                found += [(index, call) for call in range(len(json.loads(file.metadata()["calls"])))]
        return found

    def read(self, index: int, call: int) -> Sample:
        """Call number `call` of a batch."""
        with safe_open(self.path(index), "pt") as file:
            notes = file.metadata()
            latents, prefix = file.get_tensor("latents"), f"{call}."
            names = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118 - no mapping
            told: Call = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
        told |= json.loads(notes["calls"])[call]
        copies = json.loads(notes["copies"])[call]
        return Sample(
            latents.repeat(copies, *[1] * (latents.ndim - 1)),
            told,
            float(notes["time_unit"]),
            tuple(json.loads(notes["levels"])),
        )


def write_batch(path: Path, latents: Tensor, calls: Sequence[Call], levels: Sequence[float]) -> None:
    """Write one batch; an interrupted write leaves nothing under the final name.

    Raises:
        ConfigError: the denoiser takes other latents than the pipeline returns, or arguments that are neither tensors
            nor plain values.
    """
    tensors, plain, copies = {"latents": latents.cpu().contiguous()}, [], []
    for number, call in enumerate(calls):
        shape = call[_LATENTS].shape
        if shape[1:] != latents.shape[1:] or shape[0] % latents.shape[0]:
            raise ConfigError(
                f"The denoiser takes latents {tuple(shape)}, but the pipeline returns {tuple(latents.shape)}; models "
                "that change their latents on the way cannot be distilled here."
            )
        copies.append(shape[0] // latents.shape[0])
        told = {key: value for key, value in call.items() if key not in (_LATENTS, _TIME, "return_dict")}
        tensors |= {f"{number}.{k}": v.cpu().clone().contiguous() for k, v in told.items() if isinstance(v, Tensor)}
        plain.append({key: value for key, value in told.items() if not isinstance(value, Tensor)})
    unit = float(calls[0][_TIME].max()) / levels[0]
    notes = {"calls": plain, "copies": copies, "time_unit": unit, "levels": list(levels)}
    try:
        metadata = {key: json.dumps(value) for key, value in notes.items()}
    except TypeError as error:
        raise ConfigError(f"The denoiser gets an argument that cannot be kept ({error}); leave it out.") from error
    partial = path.with_suffix(".part")
    save_file(tensors, partial, metadata)
    partial.replace(path)
