"""Inversion: the noise from which a deterministic sampler draws a given picture, and the way there.

DDIM (Song et al., arXiv 2010.02502) on x = picture + sigma * noise, and Euler's method on
z = (1 - sigma) * picture + sigma * noise of flow models, are one rule: x_next = x + (sigma_next - sigma) * slope, where
the slope is the predicted noise, or the velocity. Inversion walks the same levels from the picture up. A step up has to
know the slope at its upper end; it takes that of its lower end's latents first, and refines it by fixed-point rounds
(AIDI, arXiv 2309.04907), after which sampling gives the picture back.

DPM-Solver++ (Lu et al., arXiv 2211.01095), the multistep solver of second order, is another rule for models of noise,
which is also walked upwards: `solved` and `inverted_by_solver`.
"""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from gensparse.errors import ConfigError

Slope = Callable[[Tensor, int], Tensor]
"""(x, number of the level) -> predicted noise, or velocity, of x there; the last level is never asked for."""


def sampled(start: Tensor, sigmas: Sequence[float], slope: Slope) -> list[Tensor]:
    """Latents at every level, from `start` at `sigmas[0]` down.

    Args:
        start: [B, ...], in the form that steps by sigma: x = picture + sigma * noise, or z of flow models.
        sigmas: noise levels that never rise, the final one included.
        slope: asked at level k for the step from k to k + 1.

    Raises:
        ConfigError: fewer than two levels, or levels that rise.
    """
    _check(sigmas)
    path = [start]
    for k in range(len(sigmas) - 1):
        path.append(path[-1] + (sigmas[k + 1] - sigmas[k]) * slope(path[-1], k))
    return path


def inverted(picture: Tensor, sigmas: Sequence[float], slope: Slope, *, rounds: int = 0) -> list[Tensor]:
    """Latents at every level that `sampled` passes on its way to a picture; the first are the noise to begin with.

    Args:
        picture: clean latents [B, ...] at the final level, in the form of `sampled`.
        sigmas, slope: as of `sampled`.
        rounds: refinements of every step, each a call of the denoiser more; 0 is plain DDIM inversion.

    Returns:
        as many latents as there are levels, that of `sigmas[0]` first and the picture last.

    Raises:
        ConfigError: as `sampled`, or a negative number of rounds.
    """
    _check(sigmas)
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 0:
        raise ConfigError(f"inverted rounds={rounds!r} is not allowed; pass a number from 0 up.")
    path = [picture]
    for k in range(len(sigmas) - 2, -1, -1):
        lower, width = path[-1], sigmas[k + 1] - sigmas[k]
        upper = lower
        for _ in range(rounds + 1):
            upper = lower - width * slope(upper, k)
        path.append(upper)
    return path[::-1]


def solved(start: Tensor, sigmas: Sequence[float], slope: Slope) -> list[Tensor]:
    """`sampled` by the multistep DPM-Solver++ of second order, for models of noise: x = picture + sigma * noise.

    The first step, and one to a level of 0, are of first order.

    Args:
        start, sigmas, slope: as of `sampled`.

    Raises:
        ConfigError: as `sampled`.
    """
    _check(sigmas)
    path, walk = [start], _Multistep()
    for k in range(len(sigmas) - 1):
        path.append(walk.step(path[-1], path[-1] - sigmas[k] * slope(path[-1], k), sigmas[k], sigmas[k + 1]))
    return path


def inverted_by_solver(picture: Tensor, sigmas: Sequence[float], slope: Slope) -> list[Tensor]:
    """Latents at every level from a picture up, by the multistep DPM-Solver++ of second order (TF-ICON 2307.12493).

    Every step takes the slope at its lower end. At the last level nothing can be asked, so the first step up takes the
    slope of the picture at the level above, as plain inversion does; the second one is of first order.

    Args:
        picture: clean latents [B, ...] at the final level, in the form of `sampled`.
        sigmas: as of `sampled`, all but the final one above 0.
        slope: predicted noise; as of `sampled`.

    Returns:
        as many latents as there are levels, that of `sigmas[0]` first and the picture last.

    Raises:
        ConfigError: as `sampled`, or a level of 0 before the final one.
    """
    _check(sigmas)
    if sigmas[-2] <= 0:
        raise ConfigError(f"sigmas[-2]={sigmas[-2]} is not allowed; pass levels above 0, but for the final one.")
    last, walk = len(sigmas) - 2, _Multistep()
    path = [picture, picture + (sigmas[last] - sigmas[last + 1]) * slope(picture, last)]
    for k in range(last, 0, -1):
        path.append(walk.step(path[-1], path[-1] - sigmas[k] * slope(path[-1], k), sigmas[k], sigmas[k - 1]))
    return path[::-1]


class _Multistep:
    """Steps of DPM-Solver++(2M) on x = picture + sigma * noise, up or down: it remembers the last estimate."""

    def __init__(self) -> None:
        self._before: tuple[Tensor, float] | None = None

    def step(self, x: Tensor, clean: Tensor, sigma: float, sigma_next: float) -> Tensor:
        """x at the next level, from x and the estimate of the picture at this one."""
        estimate = clean
        if self._before is not None and min(sigma, sigma_next, self._before[1]) > 0 and sigma != sigma_next:
            earlier, sigma_before = self._before
            share = math.log(sigma_next / sigma) / math.log(sigma / sigma_before) if sigma != sigma_before else 0.0
            estimate = clean + share / 2 * (clean - earlier)
        self._before = clean, sigma
        ratio = 1.0 if sigma == 0 else sigma_next / sigma
        return ratio * x + (1 - ratio) * estimate


def seen(x: Tensor, sigma: float) -> Tensor:
    """x = picture + sigma * noise as models of noise are given it: of unit variance, as DDIM keeps it."""
    return x / math.sqrt(1 + sigma**2)


def unseen(z: Tensor, sigma: float) -> Tensor:
    """The reverse of `seen`."""
    return z * math.sqrt(1 + sigma**2)


def _check(sigmas: Sequence[float]) -> None:
    falls = all(first >= second for first, second in zip(sigmas, list(sigmas)[1:], strict=False))
    if len(sigmas) < 2 or not falls or not all(math.isfinite(sigma) and sigma >= 0 for sigma in sigmas):
        raise ConfigError(
            f"sigmas={list(sigmas)[:4]}... are not allowed; pass two or more finite levels that never rise, the final "
            "one included."
        )
