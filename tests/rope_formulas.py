"""Rotary frequencies as the papers have them, in plain floats: NTK, YaRN with vision constants, DyPE (2510.20766)."""

import math


def frequencies(
    dim: int, theta: float, tokens: int, native: int, time: float = 1.0, rule: str = "yarn"
) -> tuple[list[float], float]:
    """Of an axis of `tokens` tokens, `native` in training, and the factor of its cos and sin."""
    base = [theta ** (-2 * j / dim) for j in range(dim // 2)]
    scale = tokens / native
    if scale <= 1 or rule == "base":
        return base, 1.0
    stretch = 1.0 if dim == 2 else scale ** (dim / (dim - 2) * (2 * time**2 if rule == "dy_ntk" else 1))
    ntk = [(theta * max(1.0, stretch)) ** (-2 * j / dim) for j in range(dim // 2)]
    if rule in ("ntk", "dy_ntk"):
        return ntk, 1.0
    kappa = time**2

    def kept(high: float, low: float) -> list[float]:
        first, last = (dim * math.log(native / (n * kappa * 2 * math.pi)) / (2 * math.log(theta)) for n in (high, low))
        first, last = max(0, math.floor(first)), min(dim / 2, math.ceil(last), dim - 1)
        if first >= dim / 2 or last < first:  # every frequency turns often enough
            return [1.0] * (dim // 2)
        last += 0.001 * (first == last)
        return [1 - min(1.0, max(0.0, (j - first) / (last - first))) for j in range(dim // 2)]

    mixed = [b / scale * (1 - m) + n * m for b, n, m in zip(base, ntk, kept(1.25, 0.75), strict=True)]
    mixed = [f * (1 - m) + b * m for f, b, m in zip(mixed, base, kept(16, 2), strict=True)]
    return mixed, 1 + 0.1 * math.log(scale)


def wave(position: float, found: tuple[list[float], float]) -> list[complex]:
    """factor * exp(i * position * frequency)."""
    return [found[1] * complex(math.cos(position * f), math.sin(position * f)) for f in found[0]]
