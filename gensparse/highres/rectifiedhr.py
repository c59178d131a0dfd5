"""RectifiedHR: the resolution rises in the middle of one run, with fresh noise and more guidance each time.

Yang et al., arXiv 2503.02537. One schedule of N steps is shared by K sizes; with x = k / (K - 1) for size k, every
quantity is low + (high - low) x^power. The authors' numbers belong to runs of 50 steps; here they are shares of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from gensparse.errors import ConfigError


@dataclass(frozen=True)
class Recipe:
    """How a run is divided among sizes.

    Args:
        count: sizes K, the native one among them.
        guidance: guidance scale of the first and the last size, and its power.
        switches: share of the steps after which the second size begins, after which the last one ends, and the power.

    Raises:
        ConfigError: no size, or switches that are no rising shares.
    """

    count: int
    guidance: tuple[float, float, float] = (5.0, 30.0, 1.0)
    switches: tuple[float, float, float] = (0.6, 1.0, 1.0)

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            raise ConfigError(f"Recipe count={self.count!r} is not allowed; pass how many sizes there are, from 1.")
        first, last, power = self.switches
        if not 0 < first <= last <= 1 or not power > 0:
            raise ConfigError(
                f"Recipe switches={self.switches!r} are not allowed; pass two rising shares of the run and a power."
            )


SDXL_2K = Recipe(2)
SDXL_4K = Recipe(3, guidance=(5.0, 50.0, 0.5), switches=(0.8, 1.0, 0.5))
"""As published for 1024 -> 4096; also for 768 x 1536 -> 2048 x 4096."""


def recipe_for(zoom: float, slack: float = 1.1) -> Recipe:
    """The published recipe for sides that grow by `zoom`; one size where that is hardly more than native."""
    if zoom <= slack:
        return Recipe(1)
    return SDXL_2K if zoom <= 2 * slack else SDXL_4K


def shares(count: int, power: float) -> list[float]:
    """x^power at every size."""
    return [(k / (count - 1)) ** power if count > 1 else 1.0 for k in range(count)]


def sizes(
    base: tuple[int, int], target: tuple[int, int], count: int, *, multiple: int = 8, power: float = 1.0
) -> list[tuple[int, int]]:
    """(height, width) in pixels of every size: the shorter side grows from base to target, rounded up to `multiple`.

    The longer one follows by the target's ratio, also rounded up; the first and the last are `base` and `target`
    themselves, which may differ a little in their ratio.
    """
    short = min(target)
    between = [
        math.ceil((min(base) + (short - min(base)) * x) / multiple - 1e-9) * multiple for x in shares(count, power)
    ]

    def side(length: int, value: int) -> int:
        return math.ceil(value * length / short / multiple - 1e-9) * multiple

    grown = [(side(target[0], value), side(target[1], value)) for value in between]
    return [target] if count == 1 else [base, *grown[1:-1], target]


def guidance_scales(recipe: Recipe) -> list[float]:
    """Guidance scale of every size; the first one's where there is only one."""
    low, high, power = recipe.guidance
    return [low] if recipe.count == 1 else [low + (high - low) * x for x in shares(recipe.count, power)]


def switch_steps(recipe: Recipe, steps: int) -> list[int]:
    """0, then the step at which every size ends, the last one `steps`; size k runs from entry k up to entry k + 1.

    Raises:
        ConfigError: so few steps that a size gets none.
    """
    low, high, power = recipe.switches
    ends = [int(steps * (low + (high - low) * x) + 1e-9) for x in shares(recipe.count, power)]
    found = [0, *ends[:-1], steps]
    if any(a >= b for a, b in pairwise(found)):
        raise ConfigError(
            f"{steps} steps are too few for {recipe.count} sizes with switches at {found[1:-1]}; take more steps."
        )
    return found


def segment_lengths(switches: Sequence[int]) -> list[int]:
    """Steps of every size."""
    return [b - a for a, b in pairwise(switches)]
