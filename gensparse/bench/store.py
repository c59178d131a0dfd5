"""Finished items of a measurement that may be interrupted and shared by processes: one folder, one line per item."""

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from gensparse.errors import ConfigError


class Named(Protocol):
    """What is kept: the name of its files."""

    @property
    def file_name(self) -> str: ...


class Store:
    """Finished items in DIR/items.jsonl, one line each, with pictures and features beside them.

    Processes that share a folder write a file each, DIR/items-N.jsonl, and read what all of them have finished before;
    `merge` makes one file of them.

    Args:
        run: the folder; it is made.
        worker: number of this process; None where it is the only one.
    """

    def __init__(self, run: Path, worker: int | None = None):
        self.run = run
        for name in ("pictures", "features"):
            (run / name).mkdir(parents=True, exist_ok=True)
        self._file = run / ("items.jsonl" if worker is None else f"items-{worker}.jsonl")
        self._own = _rows(self._file)
        self.rows: dict[str, dict] = {}
        for path in (run / "items.jsonl", *self._parts()):
            self.rows |= _rows(path)

    def _parts(self) -> list[Path]:
        return sorted(self.run.glob("items-*.jsonl"))

    def add(self, row: dict) -> None:
        """All rows of this process go to a new file that then takes the old one's place."""
        self.rows[row["key"]] = self._own[row["key"]] = row
        _write(self._file, self._own)

    def merge(self) -> None:
        """One file of all; only while no other process writes."""
        if parts := self._parts():
            for path in parts:
                self.rows |= _rows(path)
            self._own = self.rows
            _write(self.run / "items.jsonl", self.rows)
            for path in parts:
                path.unlink()

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Raises ConfigError when the folder holds pictures made with other settings."""
        path = self.run / "settings.json"
        if path.exists() and (old := json.loads(path.read_text(encoding="utf-8"))) != settings:
            raise ConfigError(f"{self.run} holds pictures made with {old}, not {settings}: give another --run folder.")
        path.write_text(json.dumps(settings), encoding="utf-8")

    def picture_path(self, item: Named) -> Path:
        return self.run / "pictures" / f"{item.file_name}.png"

    def save_picture(self, item: Named, picture: Image.Image) -> None:
        path = self.picture_path(item)
        picture.save(path.with_suffix(".new"), "PNG", compress_level=1)
        path.with_suffix(".new").replace(path)

    def features(self, item: Named) -> np.ndarray:
        return np.load(self.run / "features" / f"{item.file_name}.npy")

    def save_features(self, item: Named, features: torch.Tensor) -> None:
        np.save(self.run / "features" / f"{item.file_name}.npy", features.numpy().astype(np.float16))


def _rows(path: Path) -> dict[str, dict]:
    """Rows of a file by their keys; a line cut off by an interruption is not a finished item."""
    found: dict[str, dict] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[row["key"]] = row
    return found


def _write(path: Path, rows: dict[str, dict]) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text("".join(json.dumps(row) + "\n" for row in rows.values()), encoding="utf-8")
    fresh.replace(path)
