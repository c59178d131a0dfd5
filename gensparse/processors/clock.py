"""Which step of a run a denoiser call belongs to, from the timesteps the denoiser receives."""

import threading
from typing import Any


class Clock(threading.local):
    """Counts distinct timesteps of a run.

    Calls with the same timestep (the two halves of guidance, both stages of a second-order step) share a step; a
    timestep that jumps up starts a new run, and so does a scheduler whose timesteps were set anew, which an interrupted
    run may be followed by. Pipelines that know better call `restart()`. Every thread has a run of its own.

    `first` is the timestep of step 0, `call` counts the calls of a step from 0.
    """

    def __init__(self) -> None:
        self.step = -1
        self.call = 0
        self.steps: int | None = None
        self.first: float | None = None
        self._last: float | None = None
        self._moment: float | None = None
        self._plan: Any = None

    def restart(self, steps: int | None = None) -> None:
        """The next timestep is step 0, whatever its value, of a run of `steps` steps if that is known."""
        self.step, self.steps, self._last = -1, steps, None

    def tick(self, timestep: Any, moment: float | None = None, plan: Any = None) -> int:
        """Index of the step `timestep` belongs to; reads the device once.

        Args:
            timestep: a number, or a tensor of any shape; tokens or frames with timesteps of their own count by the
                noisiest of them.
            moment: what the scheduler says the time is. Timesteps that the model's precision makes equal (bfloat16 has
                no number between 996 and 1000) are different steps where moments differ.
            plan: the scheduler's timesteps, the same object in all calls of a run; None where there is no scheduler.
        """
        now = float(timestep.max()) if hasattr(timestep, "max") else float(timestep)
        self.call += 1
        if self._last is None or now > self._last or plan is not self._plan:
            self.step, self.call, self.first, self._plan = 0, 0, now, plan
        elif now < self._last or moment != self._moment:
            self.step, self.call = self.step + 1, 0
        self._last, self._moment = now, moment
        return self.step

    def __reduce__(self) -> "tuple[type[Clock], tuple[()]]":
        return Clock, ()
