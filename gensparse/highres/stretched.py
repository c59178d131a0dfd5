"""Rotary positions of image transformers on grids beyond training: what takes the place of the model's own.

The rules are those of `gensparse.highres.rope`. Models keep their tables in three forms: a module that turns token ids
into cos and sin (FLUX-like, `PositionTable`), a list of tables by axis in which ids are looked up, and a module that
makes cos and sin from the latents' size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from gensparse.errors import ConfigError
from gensparse.highres.rope import RULES, PositionTable, axis_table, base_frequencies, spatial_frequencies

POSITIONS = ("base", "ntk", "yarn", "dy_ntk", "dy_yarn")
"""Rules that stand alone: the others of `RULES` come with proportional attention, or move ids."""

Size = tuple[int, int]


class StandIn(Protocol):
    """Positions of one grid."""

    def at(self, time: float) -> Any:
        """What the model is given for a step of noise level `time`, 1 = pure noise; only the dy_ rules depend on it."""
        ...


@dataclass(frozen=True)
class Rotary:
    """Where a transformer has its rotary positions, and in which form.

    Args:
        path: attribute of the transformer, or of one of its parts ("rope_embedder.freqs_cis").
        kind: "ids" for a module of token ids whose columns 1 and 2 are row and column; "lookup" for a list of tables
            [positions, dim / 2] by axis, of which 1 and 2 are rows and columns; "latents" for a module of the latents.
        isotropic: one scale, the larger, for rows and columns.
    """

    path: str
    kind: str
    isotropic: bool = False

    def place(self, model: Any) -> tuple[Any, str]:
        """The object and the name of its attribute."""
        *parts, name = self.path.split(".")
        for part in parts:
            model = getattr(model, part)
        return model, name

    def stand_in(self, model: Any, grid: Size, native: int, rule: str) -> StandIn:
        """Positions for a grid of image tokens (rows, columns), `native` tokens per side in training.

        Raises:
            ConfigError: a rule that does not stand alone.
        """
        check_rule(rule)
        owner, name = self.place(model)
        own = getattr(owner, name)
        if self.kind == "ids":
            table = PositionTable(own.axes_dim, own.theta, grid, native, rule=rule, isotropic=self.isotropic)
            return _Module(table)
        if self.kind == "latents":
            return _Module(LatentPositions(own.rope_dim, own.theta, grid, native, rule, self.isotropic))
        dims = getattr(owner, "axes_dims", None) or owner.axes_dim
        return LookupPositions(_filled(owner, name, len(dims)), dims, owner.theta, grid, native, rule, self.isotropic)


def check_rule(rule: str) -> None:
    """ConfigError for a rule that does not stand alone."""
    if rule not in POSITIONS:
        more = " (it belongs to the stages of FLUX.1)" if rule in RULES else ""
        raise ConfigError(f"The position rule is {rule!r}{more}; choose 'auto' or one of {', '.join(POSITIONS)}.")


class _Module:
    """A module that is told the time."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def at(self, time: float) -> Any:
        self.table.set_time(time)
        return self.table


class LookupPositions:
    """Tables by axis, complex [positions, dim / 2]; those of rows and columns follow a rule, others are the model's.

    Args:
        own: the model's tables; dims, theta: channels per axis, and the base.
    """

    def __init__(
        self,
        own: Sequence[torch.Tensor],
        dims: Sequence[int],
        theta: float,
        grid: Size,
        native: int,
        rule: str,
        isotropic: bool = False,
    ) -> None:
        self.own, self.dims, self.theta, self.grid, self.native = list(own), tuple(dims), theta, tuple(grid), native
        self.rule, self.isotropic = rule, isotropic
        self._made: tuple[float, list[torch.Tensor]] | None = None

    def at(self, time: float) -> list[torch.Tensor]:
        time = time if self.rule.startswith("dy_") else 1.0
        if self._made is None or self._made[0] != time:
            self._made = (time, self._tables(time))
        return self._made[1]

    def _tables(self, time: float) -> list[torch.Tensor]:
        out = list(self.own)
        found = spatial_frequencies(
            self.rule, self.dims[1:3], self.theta, self.grid, self.native, time, isotropic=self.isotropic
        )
        for axis, (side, (frequencies, mscale)) in enumerate(zip(self.grid, found, strict=True), start=1):
            own = self.own[axis]
            # as long as the model's own, since further pictures of a call may be longer than the target
            angles = torch.outer(torch.arange(max(side, len(own)), dtype=torch.float64), frequencies)
            out[axis] = torch.polar(torch.full_like(angles, mscale), angles).to(own.device, own.dtype)
        return out


class LatentPositions(torch.nn.Module):
    """Takes the place of a module that makes cos and sin [tokens, D] from latents [B, C, (F,) H, W].

    Args:
        dims: channels per axis: rows and columns, behind frames where there are three.
    """

    def __init__(
        self, dims: Sequence[int], theta: float, grid: Size, native: int, rule: str, isotropic: bool = False
    ) -> None:
        super().__init__()
        self.dims, self.theta, self.grid, self.native = tuple(dims), theta, tuple(grid), native
        self.rule, self.isotropic = rule, isotropic
        self.time = 1.0
        self._made: tuple[float, int, torch.device, tuple[torch.Tensor, torch.Tensor]] | None = None

    def set_time(self, sigma: float) -> None:
        self.time = sigma if self.rule.startswith("dy_") else 1.0

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        frames, device = hidden_states.shape[2] if hidden_states.ndim == 5 else 1, hidden_states.device
        if self._made is None or self._made[:3] != (self.time, frames, device):
            self._made = (self.time, frames, device, self._tables(frames, device))
        return self._made[3]

    def _tables(self, frames: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        found = spatial_frequencies(
            self.rule, self.dims[-2:], self.theta, self.grid, self.native, self.time, isotropic=self.isotropic
        )
        sides: tuple[int, ...] = self.grid
        if len(self.dims) == 3:  # frames are never stretched
            found = [(base_frequencies(self.dims[0], self.theta), 1.0), *found]
            sides = (frames, *self.grid)
        places = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in sides), indexing="ij")
        parts = [axis_table(p.flatten(), *axis) for p, axis in zip(places, found, strict=True)]
        cos, sin = (torch.cat(wave, dim=1).to(device) for wave in zip(*parts, strict=True))
        return cos, sin


def _filled(owner: Any, name: str, axes: int) -> list[torch.Tensor]:
    """The model's tables; models that make them at their first call are called."""
    if getattr(owner, name) is None:
        owner(torch.zeros(1, axes, dtype=torch.long))
    return getattr(owner, name)
