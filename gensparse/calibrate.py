"""Measure what windows of several sizes would lose in every head of a model: the profile that `auto` reads."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from gensparse.attach import applied
from gensparse.errors import ConfigError
from gensparse.layout import Coords, Grid, Layout
from gensparse.methods import START, At, Method
from gensparse.methods.profile import GridProfile, LayerProfile, Profile, Radii
from gensparse.patterns import Box, Text
from gensparse.processors.operators import OperatorCall
from gensparse.processors.rows import outputs_of, sample_rows, weights_of

_LADDER = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # radii in tokens


def calibrate(
    pipe_or_model: Any,
    run: Callable[[], Any] | Iterable[Callable[[], Any]],
    *,
    rows: int = 32,
    radii: Sequence[int] = _LADDER,
    seed: int = 0,
    model: str | None = None,
) -> Profile:
    """Profile a pipeline or denoiser while it runs dense.

    At every attention call, `rows` queries of the picture are compared exactly, over all keys: how much of their
    attention falls inside each window, and how far the output of the window alone is from the whole. Costs a few
    percent of a dense run. Every grid that the run visits gets an entry of its own.

    Args:
        run: makes a picture (or several, one per callable) with the pipeline; a few steps are enough.
        rows: sampled queries per call.
        radii: candidate windows |dy|, |dx| <= radius, in tokens; those that cover a grid are left out. On clips every
            radius is tried on all frames.
        seed: of the sampling.
        model: name written into the profile, by default the class of the denoiser.

    Raises:
        ConfigError: a setting out of range, or a run without any attention call that could be measured.
    """
    meter = _Meter(_positive("rows", rows), tuple(sorted({_positive("radii", r) for r in radii})), seed)
    runs = (run,) if callable(run) else tuple(run)
    with applied(pipe_or_model, _Measure(meter=meter)) as handle, torch.no_grad():
        for item in runs:
            handle.restart()
            item()
    if not meter.sums:
        reasons = "; ".join(handle.report()["dense"]) or "no attention site was called"
        raise ConfigError(f"The run gave nothing to measure ({reasons}); run the pipeline that is calibrated.")
    name = model or type(getattr(pipe_or_model, "transformer", None) or pipe_or_model).__name__
    return Profile(name, meter.grids(), {"rows": rows, "seed": seed, "runs": len(runs)})


@dataclass(frozen=True, eq=False)
class _Meter:
    """An operator that runs dense and measures."""

    rows: int
    radii: tuple[int, ...]
    seed: int
    sums: dict[tuple[Grid, str], "_Sums"] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)

    def key(self) -> str:
        return "calibration"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: OperatorCall) -> Tensor:
        layout = call.layout
        windows = _windows(layout.grid, self.radii)
        if windows:
            first, count = layout.starts[layout.target], layout.segments[layout.target].length
            rows = sample_rows(first, count, self.rows, self.seed + call.step, q.device)
            weights = weights_of(q, k, rows, call.scale, call.key_bias)
            whole = outputs_of(weights, v)
            sums = self.sums.setdefault((layout.grid, self.names[call.layer]), _Sums(windows, q.shape[2]))
            sums.norm += whole.square().sum((0, 2, 3)).double().cpu()
            sums.count += weights.shape[0] * len(rows)
            for index, seen in enumerate(_seen(layout, windows, rows.cpu())):
                inside = weights * seen.to(weights.device)
                mass = inside.sum(-1, keepdim=True)
                part = outputs_of(inside / mass.clamp_min(1e-20), v)
                sums.kept[:, index] += mass.sum((0, 2, 3)).double().cpu()
                sums.lost[:, index] += (part - whole).square().sum((0, 2, 3)).double().cpu()
        return call.dense()

    def grids(self) -> tuple[GridProfile, ...]:
        """What was measured, smallest grid first, layers in the order of the model."""
        order = {name: layer for layer, name in self.names.items()}
        found = sorted({grid for grid, _ in self.sums}, key=lambda grid: (np.prod(grid), grid))
        return tuple(
            GridProfile(
                grid,
                _windows(grid, self.radii),
                tuple(
                    self.sums[grid, name].layer(name)
                    for name in sorted((n for g, n in self.sums if g == grid), key=order.__getitem__)
                ),
            )
            for grid in found
        )


class _Sums:
    """Running sums of one layer on one grid, [heads, windows]."""

    def __init__(self, windows: Sequence[Radii], heads: int) -> None:
        self.kept = torch.zeros(heads, len(windows), dtype=torch.float64)
        self.lost = torch.zeros_like(self.kept)
        self.norm = torch.zeros(heads, dtype=torch.float64)
        self.count = 0

    def layer(self, name: str) -> LayerProfile:
        kept = self.kept / self.count
        error = (self.lost / self.norm[:, None].clamp_min(1e-30)).sqrt()
        return LayerProfile(name, tuple(map(tuple, kept.tolist())), tuple(map(tuple, error.tolist())))


@dataclass(frozen=True)
class _Measure(Method):
    """Every site runs the meter."""

    name: ClassVar[str] = "calibration"
    timed: ClassVar[bool] = True

    meter: _Meter

    def pattern(self, layout: Layout, at: At = START) -> Any:
        return self.meter

    def kind(self, place: Any) -> None:
        self.meter.names[place.layer] = place.name

    def why_not(self, layout: Layout, role: str = "joint") -> str | None:
        return None


def _windows(grid: Grid, radii: Sequence[int]) -> tuple[Radii, ...]:
    """Candidate windows on a grid, smallest first; none that covers it."""
    frames, rows, columns = grid
    return tuple((frames, r, r) for r in radii if 2 * r + 1 < max(rows, columns))


def _seen(layout: Layout, windows: Sequence[Radii], rows: Tensor) -> Iterable[Tensor]:
    """bool [R, S] per window: the keys that the queries `rows` see, text included."""
    coords = layout.coords()
    queries = Coords(*(part[rows.numpy()][:, None] for part in coords))
    for radii in windows:
        pattern = Box(tuple(max(1, min(r, n)) for r, n in zip(radii, layout.grid, strict=True))) | Text()
        yield torch.from_numpy(pattern.bind(layout).allowed(queries, coords))


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"calibrate {name} holds {value!r}; pass integers from 1 up.")
    return value
