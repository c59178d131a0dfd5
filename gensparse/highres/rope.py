"""Rotary positions beyond the trained size: frequency rules and a drop-in table for FLUX-like transformers.

A rule turns (axis width, theta, trained tokens, tokens now) into frequencies [dim / 2] and one factor for cos and sin.
Maths in float64, tables in float32, as diffusers' FluxPosEmbed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from gensparse.errors import ConfigError


def base_frequencies(dim: int, theta: float) -> torch.Tensor:
    """theta^(-2j/dim), float64 [dim / 2]."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim))


def ntk_theta(theta: float, dim: int, scale: float, power: float = 1.0) -> float:
    """NTK-aware base: theta * scale^(power * dim / (dim - 2)), never below theta."""
    if dim <= 2:  # a single frequency is 1 for every base
        return theta
    return theta * max(1.0, scale ** (power * dim / (dim - 2)))


def correction_band(rotations: tuple[float, float], dim: int, theta: float, native: int) -> tuple[float, float]:
    """Indices (A, B) between which YaRN fades, for the rotation counts (high, low) over `native` positions."""

    def index(count: float) -> float:
        return dim * math.log(native / (count * 2 * math.pi)) / (2 * math.log(theta))

    low = max(0.0, math.floor(index(rotations[0])))
    high = min(dim / 2, math.ceil(index(rotations[1])), dim - 1)
    return low, high + 0.001 if low == high else high


def fade_mask(rotations: tuple[float, float], dim: int, theta: float, native: int) -> torch.Tensor:
    """1 before the correction band, 0 behind it, linear inside; float64 [dim / 2].

    Near the end of sampling DyPE's band leaves the spectrum; the published code then inverts the ramp. A band that
    starts behind the last frequency means that every frequency is kept.
    """
    low, high = correction_band(rotations, dim, theta, native)
    if low >= dim / 2 or high < low:
        return torch.ones(dim // 2, dtype=torch.float64)
    return 1 - ((torch.arange(dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)


def yarn_frequencies(dim: int, theta: float, scale: float, native: int, time: float = 1.0) -> torch.Tensor:
    """YaRN with vision constants; `time` < 1 is DyYaRN (DyPE, arXiv 2510.20766), which tends to the base rule at 0."""
    base = base_frequencies(dim, theta)
    kappa = max(time, 1e-4) ** 2
    stretched = fade_mask((1.25 * kappa, 0.75 * kappa), dim, theta, native)
    kept = fade_mask((16 * kappa, 2 * kappa), dim, theta, native)
    ntk = base_frequencies(dim, ntk_theta(theta, dim, scale))
    mixed = base / scale * (1 - stretched) + ntk * stretched
    return mixed * (1 - kept) + base * kept


def yarn_mscale(scale: float) -> float:
    """Factor on cos and sin: 1 + 0.1 ln(scale); logits on that axis grow by its square."""
    return 1 + 0.1 * math.log(scale)


@dataclass(frozen=True)
class Axis:
    """One rotary axis: channels, base, tokens per side in training and now, all image tokens, time of the step."""

    dim: int
    theta: float
    native: int
    tokens: int
    image_tokens: int
    native_tokens: int
    time: float = 1.0

    @property
    def scale(self) -> float:
        """How far the axis reaches beyond training, at least 1."""
        return max(1.0, self.tokens / self.native)


Rule = Callable[[Axis], tuple[torch.Tensor, float]]


def _base(axis: Axis) -> tuple[torch.Tensor, float]:
    return base_frequencies(axis.dim, axis.theta), 1.0


def _ntk(axis: Axis) -> tuple[torch.Tensor, float]:
    return base_frequencies(axis.dim, ntk_theta(axis.theta, axis.dim, axis.scale)), 1.0


def _dy_ntk(axis: Axis) -> tuple[torch.Tensor, float]:
    theta = ntk_theta(axis.theta, axis.dim, axis.scale, 2 * axis.time**2)
    return base_frequencies(axis.dim, theta), 1.0


def _yarn(axis: Axis, time: float = 1.0) -> tuple[torch.Tensor, float]:
    if axis.scale <= 1:
        return _base(axis)
    return yarn_frequencies(axis.dim, axis.theta, axis.scale, axis.native, time), yarn_mscale(axis.scale)


def _dy_yarn(axis: Axis) -> tuple[torch.Tensor, float]:
    return _yarn(axis, axis.time)


def _ntk10(axis: Axis) -> tuple[torch.Tensor, float]:
    return base_frequencies(axis.dim, 10 * axis.theta), 1.0


def _imax_clip(axis: Axis) -> tuple[torch.Tensor, float]:
    floor = base_frequencies(axis.dim, axis.theta) / math.sqrt(axis.image_tokens / axis.native_tokens)
    return torch.maximum(base_frequencies(axis.dim, 10 * axis.theta), floor), 1.0


# "interpolate" keeps the base frequencies and moves the positions instead (see PositionTable)
RULES: dict[str, Rule] = {
    "base": _base,
    "interpolate": _base,
    "ntk": _ntk,
    "ntk10": _ntk10,
    "imax_clip": _imax_clip,
    "yarn": _yarn,
    "dy_ntk": _dy_ntk,
    "dy_yarn": _dy_yarn,
}


DYPE_NOTICE = (
    "DyPE (position rules dy_ntk and dy_yarn; arXiv 2510.20766) is patent pending according to its authors, who ask "
    "commercial users to contact them; the static rules 'ntk' and 'yarn' are free of it."
)


def axis_frequencies(rule: str, axis: Axis) -> tuple[torch.Tensor, float]:
    """Frequencies float64 [dim / 2] of one axis and the factor for its cos and sin.

    Raises:
        ConfigError: an unknown rule.
    """
    if rule not in RULES:
        raise ConfigError(f"The position rule is {rule!r}; choose one of {', '.join(RULES)}.")
    return RULES[rule](axis)


def spatial_frequencies(
    rule: str,
    axes_dim: Sequence[int],
    theta: float,
    grid: tuple[int, int],
    native: int,
    time: float = 1.0,
    isotropic: bool = False,
) -> list[tuple[torch.Tensor, float]]:
    """`axis_frequencies` of rows and of columns, for a grid of image tokens and `native` tokens per side in training.

    Args:
        axes_dim: channels of rows and of columns.
        isotropic: one scale, the larger, for both axes.
    """
    count, trained = grid[0] * grid[1], native**2
    sides = (max(grid),) * 2 if isotropic else grid
    return [
        axis_frequencies(rule, Axis(dim, theta, native, side, count, trained, time))
        for dim, side in zip(axes_dim, sides, strict=True)
    ]


def proportional_scale(tokens: int, native_tokens: int) -> float:
    """Factor on all logits, sqrt(ln tokens / ln native_tokens): attention stays as sharp as in training (I-Max)."""
    return math.sqrt(math.log(tokens) / math.log(native_tokens))


def interpolated(ids: torch.Tensor, zoom: float, offset: float = 0.0) -> torch.Tensor:
    """Positions in native units, centre-aligned: (id + offset + 0.5) / zoom - 0.5."""
    return (ids + offset + 0.5) / zoom - 0.5


class PositionTable(torch.nn.Module):
    """Takes the place of FluxTransformer2DModel.pos_embed: token ids [S, 3] -> (cos, sin), each float32 [S, D].

    Columns 1 and 2 of the ids are row and column; FLUX.2 has a fourth one.

    The last `grid[0] * grid[1]` rows of the ids are the image in raster order, everything before is text and keeps its
    ids. Ids stay integers, so whoever reads the grid from them still can.

    Args:
        axes_dim, theta: of the module it replaces.
        grid: image tokens (rows, columns).
        native: tokens per side in training.
        rule: a key of RULES.
        native_grid: tokens (rows, columns) of this picture at native size; used by "interpolate".
        offset: tokens by which the image grid is shifted (a padded patch grid: -0.5); used by "interpolate".
        isotropic: one scale, the larger, for both axes.
        logit_scale: further factor on every logit, put into the table (proportional attention).
    """

    def __init__(
        self,
        axes_dim: tuple[int, ...],
        theta: float,
        grid: tuple[int, int],
        native: int,
        *,
        rule: str = "ntk10",
        native_grid: tuple[int, int] | None = None,
        offset: float = 0.0,
        isotropic: bool = False,
        logit_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if rule == "interpolate" and native_grid is None:
            raise ConfigError(
                "The position rule 'interpolate' needs native_grid, the picture's token grid at native size."
            )
        self.axes_dim, self.theta, self.grid, self.native = tuple(axes_dim), theta, grid, native
        self.rule, self.native_grid, self.offset = rule, native_grid, offset
        self.isotropic, self.logit_scale = isotropic, logit_scale
        self.image_tokens = grid[0] * grid[1]  # of the ids, at their end; another number for a call on other tokens
        self.time = 1.0
        self._frequencies(1.0)  # an unknown rule raises here, not in the middle of a step
        self._cache: tuple[torch.Tensor, float, tuple[torch.Tensor, torch.Tensor]] | None = None

    def set_time(self, sigma: float) -> None:
        """Noise level of the coming step, 1 = pure noise; only the dy_ rules depend on it."""
        self.time = sigma if self.rule.startswith("dy_") else 1.0

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._cache is None or self._cache[1] != self.time or not _same(self._cache[0], ids):
            self._cache = (ids, self.time, self._table(ids))
        return self._cache[2]

    def _table(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        positions = self._positions(ids)
        parts = [
            axis_table(positions[:, i], frequencies, mscale * math.sqrt(self.logit_scale))
            for i, (frequencies, mscale) in enumerate(self._frequencies(self.time))
        ]
        return torch.cat([cos for cos, _ in parts], dim=-1), torch.cat([sin for _, sin in parts], dim=-1)

    def _positions(self, ids: torch.Tensor) -> torch.Tensor:
        positions = ids.float()
        if self.rule != "interpolate" or self.native_grid is None:
            return positions
        positions = positions.clone()
        image = positions[-self.image_tokens :]
        # a shifted grid has one token more than the picture it covers
        sides = [side + round(2 * self.offset) for side in self.grid]
        for axis, (side, native) in enumerate(zip(sides, self.native_grid, strict=True), start=1):
            image[:, axis] = interpolated(image[:, axis], side / native, self.offset)
        return positions

    def _frequencies(self, time: float) -> list[tuple[torch.Tensor, float]]:
        spatial = spatial_frequencies(
            self.rule, self.axes_dim[1:3], self.theta, self.grid, self.native, time, self.isotropic
        )
        # others (constant ids, the reference's number in Kontext, the place in FLUX.2's text) are never rescaled
        first, *more = ((base_frequencies(dim, self.theta), 1.0) for dim in (self.axes_dim[0], *self.axes_dim[3:]))
        return [first, *spatial, *more]


def axis_table(positions: torch.Tensor, frequencies: torch.Tensor, mscale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of positions x frequencies, every value twice in a row, times mscale; float32 [S, 2 * F]."""
    angles = torch.outer(positions, frequencies.to(positions.device))
    cos, sin = (
        wave.repeat_interleave(2, dim=1, output_size=2 * angles.shape[1]).float()
        for wave in (angles.cos(), angles.sin())
    )
    return (cos, sin) if mscale == 1 else (cos * mscale, sin * mscale)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.device == b.device and torch.equal(a, b))
