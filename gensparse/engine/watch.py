"""Watching a pipeline call: cancel, progress with the time that is left, and numbers that broke."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gensparse.engine.values import Event
from gensparse.estimate import Estimate

if TYPE_CHECKING:
    import torch


SKETCH_PAUSE = 0.7  # seconds between two small pictures, at least
SKETCH_SHARE = 12  # and so many times as long as one took
STAGE_SIDE = 1024  # pixels of the picture of a finished stage


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
    """The callbacks of one pipeline call.

    Args:
        expected: sizes and times of the stages.
        emit: takes events.
        check_cancel: raises Cancelled.
        on_stage: called with the pipeline and what a finished stage gave.
        live: whether events bring small pictures; `vae_tile` is then that of the call.
    """

    def __init__(
        self,
        expected: Estimate | None,
        emit: Callable[[Event], None],
        check_cancel: Callable[[], None],
        on_stage: Callable[[Any, Any], None],
        *,
        live: bool = False,
        vae_tile: int | str | None = "auto",
    ) -> None:
        self._shapes = expected.stages if expected else ()
        self._emit, self._check_cancel, self._on_stage = emit, check_cancel, on_stage
        self._eta = Eta(expected)
        self._live, self._tile = live, vae_tile
        self._next_sketch = 0.0
        self._last: Event | None = None
        self.guard = Guard()

    def on_step(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """For `callback_on_step_end`."""
        self._check_cancel()
        stage, steps = int(pipe.stage), int(pipe.num_timesteps)
        stages = max(int(pipe.num_stages), stage + 1)
        self._last = self._event("step", stage, stages, step + 1, steps)
        self._emit(replace(self._last, preview=self._sketch(pipe, tensors) if step + 1 < steps else None))
        if stage + 1 == stages and step + 1 == steps:
            self._emit(self._event("decode", stage, stages, step + 1, steps))
        return {}

    def on_stage(self, pipe: Any, result: Any) -> None:
        """For `callback_on_stage_end`."""
        self._on_stage(pipe, result)
        if self._live and self._last is not None and result.index + 1 < int(pipe.num_stages):
            # the next stage needs this picture anyway; the last one may be too large to exist twice
            self._emit(replace(self._last, preview=pipe.preview(result, STAGE_SIDE, self._tile)[0]))
        self._check_cancel()

    def _sketch(self, pipe: Any, tensors: dict[str, Any]) -> Any:
        """A small picture of what the step estimates, unless the last one is too recent; None without one."""
        start = time.perf_counter()
        if tensors.get("clean") is None or start < self._next_sketch:
            return None
        with self.guard.asleep():  # an estimate may leave the range of half precision where the picture will not
            picture = pipe.sketch(tensors["clean"])
        now = time.perf_counter()
        self._next_sketch = now + max(SKETCH_PAUSE, SKETCH_SHARE * (now - start))
        return picture

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
    sleeping: bool = False

    @contextlib.contextmanager
    def asleep(self) -> Iterator[None]:
        """While something is decoded that is not the result."""
        self.sleeping = True
        try:
            yield
        finally:
            self.sleeping = False


@contextlib.contextmanager
def decode_guard(pipe: Any, check_cancel: Callable[[], None]) -> Iterator[Guard]:
    """Watch the last convolutions of the autoencoder: they run once per tile, and what leaves them must be finite."""
    import torch

    guard, vae = Guard(), getattr(pipe, "vae", None)
    ends = []
    for half in (getattr(vae, "encoder", None), getattr(vae, "decoder", None)):
        layers = () if half is None else half.modules()
        ends += [layer for layer in layers if isinstance(layer, torch.nn.Conv2d | torch.nn.Conv3d)][-1:]

    def look(module: Any, inputs: Any, output: "torch.Tensor") -> None:
        check_cancel()
        if not guard.sleeping:
            guard.broken = guard.broken or not bool(output.isfinite().all())

    hooks = [module.register_forward_hook(look) for module in ends]
    try:
        yield guard
    finally:
        for hook in hooks:
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
