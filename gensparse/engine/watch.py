"""Watching a pipeline call: cancel, progress with the time that is left, and numbers that broke."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gensparse.engine.values import Event
from gensparse.estimate import Estimate

if TYPE_CHECKING:
    import torch


class Eta:
    """Time left of one picture: the estimate, scaled by how long the work so far really took."""

    def __init__(self, expected: Estimate | None) -> None:
        stages = expected.stages if expected else ()
        self._enter = [s.enter_seconds or 0.0 for s in stages]
        self._step = [(s.seconds or 0.0) / max(1, s.steps) for s in stages]
        self._steps = [s.steps for s in stages]
        self._decode = (expected.decode_seconds or 0.0) if expected else 0.0
        self._start = time.perf_counter()
        self._skipped: float | None = None

    def after(self, stage: int, step: int, steps: int) -> float | None:
        """Seconds left after `step` of `steps` steps of a stage; None without an estimate."""
        if stage >= len(self._steps) or not sum(self._step):
            return None
        self._steps[stage] = steps or self._steps[stage]
        total = sum(e + s * n for e, s, n in zip(self._enter, self._step, self._steps, strict=True)) + self._decode
        done = sum(e + s * n for e, s, n in zip(self._enter[:stage], self._step, self._steps, strict=False))
        done += self._enter[stage] + self._step[stage] * step
        if self._skipped is None:  # a resumed run starts in the middle
            self._skipped = done - self._enter[stage] - self._step[stage] * step
        spent = time.perf_counter() - self._start
        return max(0.0, total - done) * spent / max(done - self._skipped, 1e-9)


class StepWatch:
    """The callbacks of one pipeline call."""

    def __init__(
        self,
        expected: Estimate | None,
        emit: Callable[[Event], None],
        check_cancel: Callable[[], None],
        on_stage: Callable[[Any, Any], None],
    ) -> None:
        self._shapes = expected.stages if expected else ()
        self._emit, self._check_cancel, self._on_stage = emit, check_cancel, on_stage
        self._eta = Eta(expected)

    def on_step(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """For `callback_on_step_end`."""
        self._check_cancel()
        stage, steps = int(pipe.stage), int(pipe.num_timesteps)
        stages = max(int(pipe.num_stages), stage + 1)
        self._emit(self._event("step", stage, stages, step + 1, steps))
        if stage + 1 == stages and step + 1 == steps:
            self._emit(self._event("decode", stage, stages, step + 1, steps))
        return {}

    def on_stage(self, pipe: Any, result: Any) -> None:
        """For `callback_on_stage_end`."""
        self._on_stage(pipe, result)
        self._check_cancel()

    def _event(self, phase: str, stage: int, stages: int, step: int, steps: int) -> Event:
        shape = self._shapes[stage] if stage < len(self._shapes) else None
        return Event(
            phase,
            stage=stage,
            stages=stages,
            step=step,
            steps=steps,
            height=shape.height if shape else 0,
            width=shape.width if shape else 0,
            eta=self._eta.after(stage, step, steps),
        )


@dataclass
class Guard:
    """What a watched decoder gave."""

    broken: bool = False


@contextlib.contextmanager
def decode_guard(pipe: Any, check_cancel: Callable[[], None]) -> Iterator[Guard]:
    """Watch the last convolution of the decoder: it runs once per tile, and what leaves it must be finite."""
    import torch

    guard = Guard()
    decoder = getattr(getattr(pipe, "vae", None), "decoder", None)
    convolutions = [m for m in decoder.modules() if isinstance(m, torch.nn.Conv2d)] if decoder is not None else []

    def look(module: Any, inputs: Any, output: "torch.Tensor") -> None:
        check_cancel()
        guard.broken = guard.broken or not bool(output.isfinite().all())

    hook = convolutions[-1].register_forward_hook(look) if convolutions else None
    try:
        yield guard
    finally:
        if hook is not None:
            hook.remove()


@contextlib.contextmanager
def float32_vae(pipe: Any) -> Iterator[bool]:
    """Run with the autoencoder in float32, whatever the latents are; yields False when it already was."""
    import torch

    vae = pipe.vae
    before = vae.dtype
    if before == torch.float32:
        yield False
        return
    entries = [m for m in (getattr(vae, "post_quant_conv", None), vae.decoder) if m is not None]
    hooks = [m.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(), *inputs[1:])) for m in entries]
    torch.nn.Module.to(vae, torch.float32)
    try:
        yield True
    finally:
        torch.nn.Module.to(vae, before)
        for hook in hooks:
            hook.remove()
