"""How a method is used on a model: the arguments of `apply`, checked."""

from collections.abc import Iterable
from dataclasses import dataclass

from gensparse.errors import ConfigError
from gensparse.methods import At, Method


@dataclass(frozen=True)
class Settings:
    """How a method is used on a model: the arguments of `apply`, checked.

    Raises:
        ConfigError: a value of the wrong type or range.
    """

    method: Method
    strict: bool = False
    dense_steps: int = 0
    dense_last_steps: int = 0
    dense_layers: Iterable[int] = ()
    audit: int | None = None

    def __post_init__(self) -> None:
        for name in ("dense_steps", "dense_last_steps"):
            steps = getattr(self, name)
            if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
                raise ConfigError(f"{name}={steps!r} is not allowed; pass a number of steps from 0 up.")
        layers = tuple(self.dense_layers) if isinstance(self.dense_layers, Iterable) else (None,)
        if not all(isinstance(index, int) and not isinstance(index, bool) for index in layers):
            raise ConfigError(f"dense_layers={self.dense_layers!r} is not allowed; pass indices of attention layers.")
        object.__setattr__(self, "dense_layers", layers)
        rows = self.method.audit if self.audit is None else self.audit
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 0:
            raise ConfigError(f"audit={rows!r} is not allowed; pass a number of tokens from 0 up.")
        object.__setattr__(self, "audit", rows)

    @property
    def timed(self) -> bool:
        """Whether the step of a call matters."""
        return bool(self.dense_steps or self.dense_last_steps or self.method.timed)

    def dense_at(self, now: At) -> bool:
        """Whether a step is dense altogether.

        Raises:
            ConfigError: last steps are to be dense, but nobody knows how many steps there are.
        """
        if self.dense_last_steps and now.steps is None:
            raise ConfigError(
                f"dense_last_steps={self.dense_last_steps} needs the number of steps, which a model without its "
                "pipeline does not know; apply to the pipeline, or call handle.restart(steps=...) before each run."
            )
        last = (now.steps or 0) - self.dense_last_steps
        return now.step < self.dense_steps or (self.dense_last_steps > 0 and now.step >= last)

    def pinned(self, layers: int) -> dict[int, str]:
        """Index of every layer that always runs dense -> why, for a model of `layers` attention layers."""
        for index in self.dense_layers:
            if not -layers <= index < layers:
                raise ConfigError(
                    f"dense_layers holds {index}, but the model has {layers} attention layers; pass indices from "
                    f"{-layers} to {layers - 1}."
                )
        return {index % layers: "dense layer" for index in self.dense_layers}
