"""The run: optimizer, order of the samples, checkpoint, log."""

import argparse
import csv
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from distillation.cache import Sample, SampleCache
from distillation.lesson import Lesson
from distillation.losses import Losses
from distillation.student import Student
from gensparse.errors import ConfigError, NumericsError

COLUMNS = ("step", "seconds", "rate", "loss", "flow", "prediction", "attention", "gradient")
# what a resumed run must share with the one it continues
SETTINGS = (
    *("model", "method", "train", "rank", "batch", "count", "flow", "prediction", "attention", "watch_every", "noise"),
    *("optimizer", "lr", "fall", "accumulate", "mixed_precision", "seed"),
)


class Course:
    """The run: optimizer, checkpoint, log."""

    def __init__(self, options: argparse.Namespace, accelerator: Accelerator, student: Student) -> None:
        self.options, self.accelerator, self.student = options, accelerator, student
        self.optimizer = optimizer_for(options, list(student.parameters.values()))
        self.step, self.seconds = 0, 0.0
        self.checkpoint, self.log = options.out / "checkpoint.pt", options.out / "log.csv"
        self.settings = {key: str(value) for key, value in vars(options).items() if key in SETTINGS}

    def save(self) -> None:
        """Write the checkpoint beside the old one, then replace it."""
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        state = {
            "trained": self.student.state(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "settings": self.settings,
        }
        partial = self.checkpoint.with_suffix(".part")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def load(self) -> None:
        """Continue from the checkpoint.

        Raises:
            ConfigError: it was made with other settings.
        """
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        other = [key for key, value in self.settings.items() if state["settings"].get(key) != value]
        if other:
            raise ConfigError(f"{self.checkpoint} was made with another {', '.join(other)}; resume with the same.")
        self.student.restore(state["trained"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds = state["step"], state["seconds"]

    def lessons(self, cache: SampleCache) -> Iterator[tuple[Sample, torch.Generator]]:
        """Batches of the current step for this process; which they are and their noise depend on the step only."""
        every = cache.lessons
        for part in range(self.options.accumulate):
            place = (self.step * self.options.accumulate + part) * self.accelerator.num_processes
            place += self.accelerator.process_index
            epoch, position = divmod(place, len(every))
            order = torch.randperm(len(every), generator=seeded(self.options.seed, epoch, 0))
            yield cache.read(*every[order[position]]), seeded(self.options.seed, place, 1)

    def train(self, model: nn.Module, lesson: Lesson, cache: SampleCache, stop: Callable[[], bool]) -> None:
        """Until the last step, or until `stop` says so."""
        options, accelerator = self.options, self.accelerator
        rows = Rows(self.log, self.step) if accelerator.is_main_process else None
        while self.step < options.steps and not stop():
            start, terms = time.perf_counter(), []
            factor = warmed_up(self.step, options.steps, options.warmup, options.fall)
            for group in self.optimizer.param_groups:
                group["lr"] = options.lr * factor
            for sample, generator in self.lessons(cache):
                with accelerator.accumulate(model):
                    terms.append(lesson(model, sample, generator))
                    if accelerator.sync_gradients:
                        gradient = accelerator.clip_grad_norm_(list(self.student.parameters.values()), 1.0)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
            mean = torch.stack([torch.stack(term).mean() for term in zip(*terms, strict=True)])
            mean = Losses(*accelerator.reduce(mean, "mean"))
            loss = float(mean.weighted(lesson.weights))
            if loss != loss:
                raise NumericsError(f"The loss of step {self.step} is not a number; resume with a lower --lr.")
            self.step += 1
            self.seconds += time.perf_counter() - start
            if rows is not None:
                rows.add(self.step, self.seconds, options.lr * factor, loss, *map(float, mean), float(gradient))
            if self.step % options.save_every == 0:
                self.save()
        self.save()


class Rows:
    """The log; rows behind the step a run continues from are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        kept = []
        if step and path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                kept = [row for row in csv.reader(file) if row[0].isdecimal() and int(row[0]) <= step]
        self.file = path.open("w", newline="", encoding="utf-8")
        self.writer = csv.writer(self.file)
        self.writer.writerows([COLUMNS, *kept])

    def add(self, step: int, *values: float) -> None:
        self.writer.writerow([step, *(f"{value:.6g}" for value in values)])
        self.file.flush()


def seeded(*numbers: int) -> torch.Generator:
    """A generator that depends on all the numbers."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def optimizer_for(options: argparse.Namespace, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW or Prodigy with the authors' settings."""
    if options.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=options.lr, weight_decay=1e-4)
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        raise ConfigError("--optimizer prodigy needs prodigyopt; install it, or take adamw.") from error
    return Prodigy(
        parameters, lr=options.lr, weight_decay=1e-4, decouple=True, use_bias_correction=True, safeguard_warmup=True
    )


def warmed_up(step: int, steps: int, warmup: int, fall: bool) -> float:
    """Factor on the learning rate: a linear rise over `warmup` steps, then level, or falling like a cosine to zero."""
    rise = min(1.0, (step + 1) / max(1, warmup))
    return rise * (0.5 + 0.5 * math.cos(math.pi * step / steps)) if fall else rise
