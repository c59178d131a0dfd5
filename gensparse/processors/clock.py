"""Which step of a run a denoiser call belongs to, from the timesteps the denoiser receives."""

from typing import Any


class Clock:
    """Counts distinct timesteps of a run.

    Calls with the same timestep (the two halves of guidance, both stages of a second-order step) share a step; a
    timestep that jumps up starts a new run. Pipelines that know better call `restart()`.
    """

    def __init__(self) -> None:
        self.step = -1
        self._last: float | None = None

    def restart(self) -> None:
        """The next timestep is step 0, whatever its value."""
        self.step, self._last = -1, None

    def tick(self, timestep: Any) -> int:
        """Index of the step `timestep` (a number, or a tensor of any shape) belongs to; reads the device once."""
        now = float(timestep.max()) if hasattr(timestep, "max") else float(timestep)
        if self._last is None or now > self._last:
            self.step = 0
        elif now < self._last:
            self.step += 1
        self._last = now
        return self.step
