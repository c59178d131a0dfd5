"""A training run by the clock: weights, their average, optimizers, random states; stopped and continued at any step."""

import csv
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from muon import Muon

Outcome = tuple[str, torch.Tensor, Sequence[torch.Tensor]]
"""(kind of batch, loss to go down, numbers to write down)"""


class Run:
    """Everything a checkpoint holds, and the clock.

    Args:
        rates: of each optimizer at full height; ema_decay: of the average of the weights.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        rates: Sequence[float],
        path: Path,
        *,
        seed: int,
        ema_decay: float,
    ) -> None:
        self.model, self.optimizers, self.rates, self.path = model, optimizers, rates, path
        self.ema_decay, self.rng = ema_decay, np.random.default_rng(seed)
        self.step, self.spent, self.stopped = 0, 0.0, False
        self.restart_average()

    def restart_average(self) -> None:
        """Take the weights as they are for their average."""
        self.ema = {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def stop(self, *_: object) -> None:
        """Finish the step in hand, save and end."""
        self.stopped = True

    def save(self) -> None:
        """Write the checkpoint beside the old one, then replace it."""
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "rng": self.rng.bit_generator.state,
            "torch_rng": torch.get_rng_state(),
            "step": self.step,
            "spent": self.spent,
        }
        partial = self.path.with_suffix(".part")
        torch.save(state, partial)
        partial.rename(self.path)

    def load(self) -> None:
        """Continue from the checkpoint, if there is one."""
        if not self.path.exists():
            return
        state = torch.load(self.path, weights_only=True, map_location="cpu")
        self.model.load_state_dict(state["model"])
        self.ema = {name: value.to(self.ema[name].device) for name, value in state["ema"].items()}
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.rng.bit_generator.state = state["rng"]
        torch.set_rng_state(state["torch_rng"])
        self.step, self.spent = state["step"], state["spent"]

    def set_rate(self, factor: float) -> None:
        """Learning rates at this share of their full height."""
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor

    @torch.no_grad()
    def average(self) -> None:
        """Exponential moving average of the weights, with a warm-up."""
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        parameters = [p.detach() for p in self.model.parameters()]
        torch._foreach_lerp_(list(self.ema.values()), parameters, 1 - decay)

    def train(
        self, outcome: Callable[[], Outcome], minutes: float, log: Path, save_minutes: float, steps: int | None = None
    ) -> None:
        """Step after step until `minutes` are spent, `steps` done (all restarts together) or the process shall end."""
        signal.signal(signal.SIGTERM, self.stop)
        last_save, rows = time.time(), []
        with log.open("a", newline="") as handle:
            while self.spent < 60 * minutes and self.step != steps and not self.stopped:
                start = time.time()
                kind, loss, numbers = outcome()
                self.model.zero_grad(set_to_none=True)
                loss.backward()
                for optimizer in self.optimizers:
                    optimizer.step()
                self.average()
                self.step += 1
                self.spent += time.time() - start
                rows.append((self.step, round(self.spent, 1), kind, *numbers, loss.detach()))
                if self.step % 20 == 0:
                    rows = write_down(rows, handle)
                if time.time() - last_save > 60 * save_minutes:
                    self.save()
                    last_save = time.time()
            write_down(rows, handle)
        self.save()


def write_down(rows: list[tuple], handle: TextIO) -> list[tuple]:
    """Append rows whose numbers may still be on a GPU, which must not be waited for at every step; returns none."""
    shown = [[round(x.item(), 5) if isinstance(x, torch.Tensor) else x for x in row] for row in rows]
    csv.writer(handle).writerows(shown)
    handle.flush()
    return []


def muon_and_adam(model: torch.nn.Module, lr: float, rest: Sequence[str]) -> list[torch.optim.Optimizer]:
    """Muon at twice the rate for matrices and convolutions, AdamW for vectors and whatever has a word of `rest` in its
    name: embeddings, and layers at which data enters or leaves."""
    inner, outer = [], []
    for name, parameter in model.named_parameters():
        (inner if parameter.ndim > 1 and not any(word in name for word in rest) else outer).append(parameter)
    return [
        Muon(inner, lr=2 * lr, weight_decay=0.01),
        torch.optim.AdamW(outer, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, foreach=True),
    ]
