"""Attention profiles: what every head of a model loses under windows of several sizes, measured by `calibrate`."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from pathlib import Path
from typing import Any

from gensparse.errors import ConfigError
from gensparse.layout import Grid

FILE_NAME = "attention_profile.json"
"""Name of a profile that lies in a model's folder."""

VERSION = 1

Radii = tuple[int, int, int]


@dataclass(frozen=True)
class LayerProfile:
    """One attention layer: [heads][windows] tables.

    Args:
        name: full name of the attention module.
        kept: share of a query's attention that falls inside the window, mean over queries.
        error: relative error of the head's output, root mean square over queries.
    """

    name: str
    kept: tuple[tuple[float, ...], ...]
    error: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class GridProfile:
    """What was measured on one grid (F, H, W): windows by their radii per axis, smallest first, and the layers."""

    grid: Grid
    windows: tuple[Radii, ...]
    layers: tuple[LayerProfile, ...]

    def choose(
        self, error: float, shares: Sequence[float], density: float | None = None
    ) -> tuple[tuple[int, ...], ...]:
        """[layers][heads] number of a window for every head; len(windows) for the whole grid.

        The cheapest choice whose error over all heads, as `predicted` has it, is at most `error`: every head begins
        with its cheapest window, and whoever loses most per pair that is added gets the next larger one.

        Args:
            shares: pairs that a window computes, of all pairs, with the whole grid behind the last.
            density: mean share at most; the choice ends there whatever the error.
        """
        alike = [w for w, share in enumerate(shares) if density is None or share <= density]
        choices = [self._grown(error, shares, density)]
        choices += [tuple((w,) * len(layer.error) for layer in self.layers) for w in alike]
        lost = [self.predicted(choice) for choice in choices]
        costs = [sum(shares[w] for row in choice for w in row) for choice in choices]
        number = min(range(len(choices)), key=lambda n: (max(lost[n], error), costs[n]))
        return choices[number]

    def _grown(self, error: float, shares: Sequence[float], density: float | None) -> tuple[tuple[int, ...], ...]:
        """`choose` step by step, which a step that is large may lead past one window for all."""
        losses = [[*(e**2 for e in row), 0.0] for layer in self.layers for row in layer.error]
        cheapest = min(range(len(shares)), key=shares.__getitem__)
        choice = [cheapest] * len(losses)
        budget = math.inf if density is None else len(losses) * (density - shares[cheapest])
        surplus = sum(row[cheapest] for row in losses) - len(losses) * error**2

        def best(head: int) -> tuple[float, int, int]:
            """(minus what is gained per pair, head, window) of its best larger window that the budget allows."""
            now, row = choice[head], losses[head]
            gains = (
                ((row[w] - row[now]) / (shares[w] - shares[now]), head, w)
                for w in range(len(shares))
                if 0 < shares[w] - shares[now] <= budget and row[w] < row[now]
            )
            return min(gains, default=(0.0, head, now))

        waiting = [best(head) for head in range(len(losses))]
        heapify(waiting)
        while surplus > 0 and waiting and waiting[0][0] < 0:
            step = heappop(waiting)
            _, head, window = step
            if step == best(head):  # else the budget has shrunk
                budget -= shares[window] - shares[choice[head]]
                surplus -= losses[head][choice[head]] - losses[head][window]
                choice[head] = window
            heappush(waiting, best(head))
        windows = iter(choice)
        return tuple(tuple(next(windows) for _ in layer.error) for layer in self.layers)

    def predicted(self, choice: Sequence[Sequence[int]]) -> float:
        """Root mean square of the errors of all heads under a choice; the whole grid has none."""
        picked = [
            row[w] ** 2 if w < len(row) else 0.0
            for layer, windows in zip(self.layers, choice, strict=True)
            for row, w in zip(layer.error, windows, strict=True)
        ]
        return math.sqrt(sum(picked) / len(picked))


@dataclass(frozen=True, eq=False)
class Profile:
    """A model's profile.

    Args:
        model: what it was measured on.
        grids: one entry per measured size.
        settings: how it was measured (prompts, steps, rows, seed), for the record.
    """

    model: str
    grids: tuple[GridProfile, ...]
    settings: Mapping[str, Any]

    def nearest(self, grid: Grid) -> GridProfile:
        """The entry whose number of tokens is nearest to that of `grid`, as a ratio."""
        tokens = math.prod(grid)
        return min(self.grids, key=lambda entry: abs(math.log(math.prod(entry.grid) / tokens)))

    def to_json(self) -> str:
        """The text of a profile file."""
        grids = [
            {
                "grid": list(entry.grid),
                "windows": [list(radii) for radii in entry.windows],
                "layers": [
                    {"name": layer.name, "kept": _rounded(layer.kept), "error": _rounded(layer.error)}
                    for layer in entry.layers
                ],
            }
            for entry in self.grids
        ]
        data = {"gensparse_profile": VERSION, "model": self.model, "settings": dict(self.settings), "grids": grids}
        return json.dumps(data, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, source: str = "profile") -> "Profile":
        """Read the text of a profile file.

        Raises:
            ConfigError: no profile, another version, or tables that do not fit together.
        """
        try:
            data = json.loads(text)
            if data["gensparse_profile"] != VERSION:
                raise ValueError(f"version {data['gensparse_profile']!r}")
            grids = tuple(_grid_profile(entry) for entry in data["grids"])
            if not grids:
                raise ValueError("no grids")
            return cls(str(data["model"]), grids, dict(data["settings"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{source} is no attention profile of version {VERSION} ({error}); make one with `gensparse calibrate`."
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> "Profile":
        """Read a profile file.

        Raises:
            ConfigError: the file is missing or no profile.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not text"
            raise ConfigError(
                f"profile={str(path)!r} cannot be read ({reason}); make one with `gensparse calibrate`."
            ) from error
        return cls.from_json(text, str(path))


def _grid_profile(data: Mapping[str, Any]) -> GridProfile:
    windows = tuple(_radii(item) for item in data["windows"])
    layers = tuple(
        LayerProfile(str(layer["name"]), _table(layer["kept"], windows), _table(layer["error"], windows))
        for layer in data["layers"]
    )
    if not layers or not windows:
        raise ValueError("no layers or no windows")
    return GridProfile(_radii(data["grid"]), windows, layers)


def _radii(values: Sequence[Any]) -> Radii:
    frames, rows, columns = (int(value) for value in values)
    if min(frames, rows, columns) < 0:
        raise ValueError(f"{list(values)} is negative")
    return frames, rows, columns


def _table(rows: Sequence[Sequence[Any]], windows: Sequence[Radii]) -> tuple[tuple[float, ...], ...]:
    table = tuple(tuple(float(value) for value in row) for row in rows)
    if not table or any(len(row) != len(windows) for row in table):
        raise ValueError("a table does not have one column per window")
    if not all(math.isfinite(value) and value >= 0 for row in table for value in row):
        raise ValueError("a table holds a number that is negative or not finite")
    return table


def _rounded(table: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[float(f"{value:.3g}") for value in row] for row in table]
