"""What the pipeline of a model says of a run: its steps, and whether guidance doubles the batch."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from gensparse.attach.denoisers import denoiser
from gensparse.attach.weak import Weak
from gensparse.families import TensorMemo


class Run:
    """How many steps the pipeline of a model takes; the pipeline is not kept alive, nor copied with the model."""

    def __init__(self, owner: Any) -> None:
        self._owner = Weak(owner if hasattr(owner, "scheduler") else None)
        self._memo = TensorMemo()

    @property
    def owner(self) -> Any:
        """The pipeline; None for a bare model, or where it is gone."""
        return self._owner()

    def pipeline(self) -> Any:
        """The same, as a function that may be kept."""
        return self.owner

    @property
    def guided(self) -> bool | None:
        """Whether the pipeline puts both halves of guidance into a call; None where nothing tells."""
        found = getattr(self.owner, "do_classifier_free_guidance", None)
        return None if found is None else bool(found)

    def models(self, names: Iterable[str]) -> list[nn.Module]:
        """Models of the pipeline by name, each part of those that are several, such as of a list of ControlNets."""
        found = [getattr(self.owner, name, None) for name in names]
        parts = [part for one in found if isinstance(one, nn.Module) for part in getattr(one, "nets", [one])]
        return [denoiser(part) for part in parts]

    def steps(self, first: float | None = None) -> int | None:
        """Distinct timesteps of the pipeline's scheduler from where the run begins; None for a bare model.

        Args:
            first: timestep of the first step, by which the beginning is found where the scheduler does not know it.
        """
        timesteps, scheduler = self._timesteps(), self._scheduler()
        if timesteps is None:
            return None
        begin = getattr(scheduler, "begin_index", None) or 0  # later than 0 where a picture is changed
        if not hasattr(scheduler, "begin_index") and first in timesteps:
            begin = timesteps.index(first)
        return len(set(timesteps[begin:]))

    def plan(self) -> Any:
        """The tensor of the scheduler's timesteps, another one for every run; None for a bare model."""
        return getattr(self._scheduler(), "timesteps", None)

    def moment(self) -> float | None:
        """The scheduler's own timestep of the step it is at; None for a bare model."""
        timesteps, scheduler = self._timesteps(), self._scheduler()
        index = getattr(scheduler, "step_index", None)
        index = getattr(scheduler, "begin_index", None) if index is None else index
        return timesteps[index or 0] if timesteps and (index or 0) < len(timesteps) else None

    def _timesteps(self) -> list[float] | None:
        timesteps = getattr(self._scheduler(), "timesteps", None)
        return self._memo.get(timesteps, torch.Tensor.tolist) if isinstance(timesteps, torch.Tensor) else None

    def _scheduler(self) -> Any:
        return getattr(self.owner, "scheduler", None)
