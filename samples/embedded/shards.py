"""Encoded training pictures (made by encode.py), loaded as they appear."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from meaning import LABELS, describe

from gensparse.embedded.scenes import caption, random_scene
from gensparse.errors import ConfigError


class Pictures:
    """Shards of one kind; new ones are picked up while training."""

    def __init__(self, folder: Path, kind: str, rng: np.random.Generator) -> None:
        self.folder, self.kind, self.rng = folder, kind, rng
        self.shards: list[dict] = []
        self.seen: set[str] = set()

    def refresh(self) -> int:
        """Load shards that have appeared; returns how many there are."""
        for path in sorted(self.folder.glob(f"{self.kind}-[0-9][0-9][0-9].npz")):
            if path.name not in self.seen:
                with np.load(path) as data:
                    shard = {name: data[name] for name in data.files}
                shard["scenes"] = [random_scene(int(s), float(shard["aspect"])) for s in shard["seeds"]]
                shard |= describe(shard)
                self.shards.append(shard)
                self.seen.add(path.name)
        return len(self.shards)

    def batch(self, count: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], list[str]]:
        """(latents [B, N, 32], ids [N, 3], labels, captions); pictures of a batch share their position ids."""
        shard = self.shards[self.rng.integers(len(self.shards))]
        groups, total = len(shard["ids"]), len(shard["seeds"])
        group = int(self.rng.integers(groups))
        size = total // groups
        picks = group * size + self.rng.choice(size, min(count, size), replace=False)
        latents = torch.from_numpy(shard["latents"][picks]).float()
        ids = torch.zeros(latents.shape[1], 3)
        ids[:, 1:] = torch.from_numpy(shard["ids"][group])
        labels = {name: torch.from_numpy(shard[name][picks]) for name in LABELS}
        return latents, ids, labels, [caption(shard["scenes"][i], int(self.rng.integers(1 << 31))) for i in picks]


class Collection:
    """Pictures of several kinds, of which one is picked at random for every batch."""

    def __init__(self, folder: Path, kinds: Iterable[str], rng: np.random.Generator) -> None:
        self.folder, self.rng = folder, rng
        self.sources = {kind: Pictures(folder, kind, rng) for kind in kinds}
        self.ready: set[str] = set()

    def pick(self, wanted: Mapping[str, float], *, look: bool) -> Pictures:
        """A kind, drawn with these weights from those that are there; `look`: load shards that have appeared.

        Raises:
            ConfigError: no shard of any wanted kind.
        """
        if look or not self.ready:
            self.ready = {kind for kind in wanted if self.sources[kind].refresh()}
        kinds = {kind: weight for kind, weight in wanted.items() if kind in self.ready}
        if not kinds:
            raise ConfigError(f"no shards of {', '.join(wanted)} in {self.folder}; make some with encode.py first")
        kind = self.rng.choice(list(kinds), p=np.array(list(kinds.values())) / sum(kinds.values()))
        return self.sources[str(kind)]
