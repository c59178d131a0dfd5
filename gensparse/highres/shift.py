"""The time shift of flow models: how the number of image tokens moves the sigma list, and where that must stop."""

import math

import torch


def shift_mu(
    tokens: int,
    *,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    capped: bool = True,
) -> float:
    """mu for `tokens` image tokens: the line FLUX uses, capped at `max_shift`.

    Uncapped, the line runs away beyond the trained size: at 65,536 tokens mu is 11.55, all sigmas lie above 0.999 and
    28 steps are in effect one. All five numbers come from the scheduler's config.
    """
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    mu = tokens * slope + (base_shift - slope * base_tokens)
    # at max_tokens the line hits max_shift up to rounding; leave those bits as the stock pipeline has them
    return mu if not capped or mu <= max_shift * (1 + 1e-9) else max_shift


def exponential_shift(sigmas: torch.Tensor, mu: float) -> torch.Tensor:
    """e^mu / (e^mu + 1/sigma - 1), elementwise on sigmas in (0, 1]."""
    return math.exp(mu) / (math.exp(mu) + (1 / sigmas - 1))


def static_shift(sigmas: torch.Tensor, shift: float) -> torch.Tensor:
    """shift * sigma / (1 + (shift - 1) * sigma), elementwise."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def flow_sigmas(steps: int, *, mu: float | None = None, shift: float | None = None) -> torch.Tensor:
    """The sigma list of `steps` steps, linear from 1 to 1/steps, shifted by mu or by a static shift; [steps + 1]."""
    sigmas = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).float()
    if mu is not None:
        sigmas = exponential_shift(sigmas, mu)
    elif shift is not None:
        sigmas = static_shift(sigmas, shift)
    return torch.cat([sigmas, sigmas.new_zeros(1)])
