"""One batch for teacher and student."""

import argparse
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

import gensparse
from distillation.cache import Sample
from distillation.losses import Losses, Watch, losses, noise_levels, noised, watched_sites
from distillation.student import Student
from gensparse.errors import ConfigError


class Lesson:
    """One batch for teacher and student: the losses of the student, with gradients."""

    def __init__(self, options: argparse.Namespace, pipe: Any, student: Student, accelerator: Accelerator) -> None:
        self.pipe, self.student, self.accelerator = pipe, student, accelerator
        self.noise, self.weights = options.noise, (options.flow, options.prediction, options.attention)
        watched = watched_sites(pipe.transformer, options.watch_every) if options.attention else []
        self.watch = Watch(pipe.transformer, watched)

    def __call__(self, model: nn.Module, sample: Sample, generator: torch.Generator) -> Losses:
        """Compute the losses of one sample and their gradients."""
        level = noise_levels(len(sample.latents), sample.levels, self.noise, generator)
        noise = torch.randn(sample.latents.shape, generator=generator).to(sample.latents)
        sample, level, noise = (x.to(self.accelerator.device) for x in (sample, level, noise))
        given = {
            **sample.call,
            "hidden_states": noised(sample.latents, level, noise),
            "timestep": (level * sample.time_unit).to(sample.latents.dtype),
            "return_dict": False,
        }
        with torch.no_grad(), self.student.teacher(), self.watch as wanted:
            taught = self.pipe.transformer(**given)[0]
        with gensparse.applied(self.pipe, self.student.method, strict=True) as handle:
            with self.watch as seen:
                velocity = model(**given)[0]
            self._check(handle)
            found = losses(velocity, noise - sample.latents, taught, seen, wanted)
            self.accelerator.backward(found.weighted(self.weights))
        return Losses(*(term.detach() for term in found))

    def _check(self, handle: gensparse.Handle) -> None:
        report = handle.report()
        if not report["sparse"]:
            raise ConfigError(
                f"The method leaves every layer dense ({', '.join(report['dense'])}), so there is nothing to learn; "
                "pass a window smaller than the picture, without dense steps."
            )
