"""Low-frequency guidance: what HiFlow, I-Max and DiffuseHigh mix between a large picture and its smaller original.

All functions take latents or estimates [..., h, w] and work on the two last axes in float32.
"""

import math

import torch
import torch.nn.functional as F

# Daubechies 4 (eight taps), scaling filter of the decomposition; "Ten lectures on wavelets", table 6.1
DB4 = (
    -0.010597401785069032,
    0.0328830116668852,
    0.030841381835560764,
    -0.18703481171909309,
    -0.027983769416859854,
    0.6308807679298589,
    0.7148465705529157,
    0.2303778133088965,
)


def butterworth(
    height: int, width: int, ratio: float, order: int = 4, device: torch.device | str | None = None
) -> torch.Tensor:
    """Butterworth mask [h, w] in FFT order: 1 / (1 + (d^2 / ratio^2)^order), d = frequency as a share of Nyquist."""
    rows = 2 * torch.fft.fftfreq(height, device=device)
    cols = 2 * torch.fft.fftfreq(width, device=device)
    squared = rows[:, None] ** 2 + cols[None, :] ** 2
    return 1 / (1 + (squared / ratio**2) ** order)


def fft_low_pass(x: torch.Tensor, ratio: float, order: int = 4) -> torch.Tensor:
    """Butterworth low-pass of the two last axes."""
    height, width = x.shape[-2:]
    mask = butterworth(height, width, ratio, order, x.device)[:, : width // 2 + 1]
    return torch.fft.irfft2(torch.fft.rfft2(x.float()).mul_(mask), s=(height, width))


def haar_low_pass(x: torch.Tensor) -> torch.Tensor:
    """The approximation band of a one-level Haar transform: the mean of every 2x2 block; sides may be odd."""
    height, width = x.shape[-2:]
    means = F.avg_pool2d(x.float().flatten(0, -3).unsqueeze(0), 2, ceil_mode=True).squeeze(0)
    wide = means.repeat_interleave(2, -2)[..., :height, :].repeat_interleave(2, -1)[..., :width]
    return wide.reshape(x.shape)


def low_pass(x: torch.Tensor, kind: str = "fft", ratio: float = 0.2) -> torch.Tensor:
    """The low frequencies of x: kind "fft" (Butterworth with cut-off `ratio`) or "dwt" (Haar)."""
    return fft_low_pass(x, ratio) if kind == "fft" else haar_low_pass(x)


def guide_estimate(
    x0: torch.Tensor, reference: torch.Tensor, alpha: float, kind: str = "fft", ratio: float = 0.2
) -> torch.Tensor:
    """x0 + alpha * (LP(reference) - LP(x0)), HiFlow's direction guidance; LP is linear, so one transform suffices."""
    return x0 + alpha * low_pass(reference - x0, kind, ratio)


def velocity_towards(z: torch.Tensor, x0: torch.Tensor, sigma: float) -> torch.Tensor:
    """The velocity that leads from z at `sigma` straight to x0."""
    return (z - x0) / (sigma + 1e-6)


Motion = tuple[torch.Tensor, torch.Tensor]  # the final velocity of a step and that of its reference


def guided_velocity(
    z: torch.Tensor,
    velocity: torch.Tensor,
    reference: torch.Tensor,
    sigma: float,
    alpha: float,
    beta: float,
    previous: Motion | None = None,
    kind: str = "fft",
    ratio: float = 0.2,
) -> Motion:
    """One step of HiFlow's guidance (arXiv 2504.06232, section 3); float32 [B, C, h, w].

    Direction pulls the low frequencies of the estimate to the reference; acceleration makes the velocity change from
    the previous step as the reference's did.

    Returns:
        The velocity to follow and the reference's velocity; both are `previous` of the next step.
    """
    guided = velocity_towards(z, guide_estimate(z - sigma * velocity, reference, alpha, kind, ratio), sigma)
    v_ref = velocity_towards(z, reference, sigma)
    if previous is not None and beta > 0:
        before, before_ref = previous
        guided = guided.lerp(before + v_ref - before_ref, beta)
    return guided, v_ref


def imax_velocity(
    velocity: torch.Tensor, z: torch.Tensor, guide: torch.Tensor, t: float, progress: float, mode: str = "cosine_shift"
) -> torch.Tensor:
    """I-Max's corrected velocity (arXiv 2410.07536).

    Args:
        guide: latent of the enlarged native picture; t: timestep in 0..1000; progress: step / steps.
        mode: "cosine_decay", "cosine_shift" or "constant".
    """
    towards = velocity_towards(z, guide, t / 1000)
    low = haar_low_pass(towards - velocity)
    weight = 0.5 * (1 + math.cos(math.pi * progress))
    if mode == "cosine_decay":
        return velocity + weight * low
    if mode == "cosine_shift":
        return velocity + weight * (towards - velocity) + (1 - weight) * low
    return velocity + low


def _symmetric(index: int, length: int) -> int:
    """Half-sample symmetric reflection of an index into 0..length-1."""
    index %= 2 * length
    return index if index < length else 2 * length - 1 - index


def db4_matrices(length: int, device: torch.device | str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Low-pass analysis [m, n] and synthesis [n, m] of db4, level 1, symmetric borders; m = (n + 7) // 2."""
    taps = len(DB4)
    count = (length + taps - 1) // 2
    analysis = torch.zeros(count, length, dtype=torch.float64)
    synthesis = torch.zeros(length, count, dtype=torch.float64)
    for k in range(count):
        for j, tap in enumerate(DB4):
            analysis[k, _symmetric(2 * k + 1 - j, length)] += tap
            if 0 <= (i := 2 * k + 1 - j) < length:
                synthesis[i, k] = tap
    return analysis.float().to(device), synthesis.float().to(device)


def swap_low_band(x: torch.Tensor, guide: torch.Tensor) -> torch.Tensor:
    """x with its db4 LL band replaced by the guide's (DiffuseHigh, arXiv 2406.18459)."""
    rows, rows_back = db4_matrices(x.shape[-2], x.device)
    cols, cols_back = db4_matrices(x.shape[-1], x.device)
    band = rows @ (guide.float() - x.float()) @ cols.T
    return x.float() + rows_back @ band @ cols_back.T
