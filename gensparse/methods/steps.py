"""The first steps of a run that a method treats apart: given as a number, or as a share of the run."""

from typing import Any

from gensparse.errors import ConfigError
from gensparse.methods.base import At

USUAL_STEPS = 50
"""Length of a run whose length nobody knows, that of most published settings."""


def check_first_steps(method: str, name: str, value: Any) -> None:
    """ConfigError unless `value` is an integer from 0 up (steps) or a share of the run, below 1."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or value < 0 or (isinstance(value, float) and not value < 1):
        raise ConfigError(
            f"{method} {name}={value!r} is not allowed; pass a number of steps from 0 up, or a share of the run from "
            "0.0 to below 1.0."
        )


def first_steps(value: int | float, at: At) -> int:
    """How many first steps `value` means in the run of a call; shares are rounded to whole steps."""
    return value if isinstance(value, int) else round(value * (at.steps or USUAL_STEPS))
