"""Attention profiles: what every head of a model loses under windows of several sizes, measured by `calibrate`."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

    def choose(self, tolerance: float) -> tuple[tuple[int, ...], ...]:
        """[layers][heads] number of the smallest window whose error is at most `tolerance`; len(windows) for none."""
        return tuple(
            tuple(next((w for w, e in enumerate(row) if e <= tolerance), len(self.windows)) for row in layer.error)
            for layer in self.layers
        )

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
