"""Encoded training pictures (made by encode.py), loaded as they appear."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from meaning import LABELS
from text import TOKENIZERS

from gensparse.errors import ConfigError


@dataclass(frozen=True)
class Batch:
    """Pictures of one kind that share their position ids.

    Args:
        latents: [B, N, 32]; ids: [N, 3], on the CPU; labels: see `meaning.describe`.
        words: token ids [B, length] of a caption of each picture, per tokenizer.
    """

    kind: str
    latents: torch.Tensor
    ids: torch.Tensor
    labels: dict[str, torch.Tensor]
    words: dict[str, torch.Tensor]


class Pictures:
    """Shards of one kind, kept on `device`; new ones are picked up while training."""

    def __init__(self, folder: Path, kind: str, rng: np.random.Generator, device: str) -> None:
        self.folder, self.kind, self.rng, self.device = folder, kind, rng, device
        self.shards: list[dict[str, torch.Tensor]] = []
        self.seen: set[str] = set()

    def refresh(self) -> int:
        """Load shards that have appeared; returns how many there are."""
        for path in sorted(self.folder.glob(f"{self.kind}-[0-9][0-9][0-9].npz")):
            if path.name not in self.seen:
                with np.load(path) as data:
                    names = ("latents", *LABELS, *TOKENIZERS)
                    shard = {name: torch.from_numpy(data[name]).to(self.device) for name in names}
                    self.shards.append(shard | {"ids": torch.from_numpy(data["ids"])})
                self.seen.add(path.name)
        return len(self.shards)

    def batch(self, count: int) -> Batch:
        """`count` pictures of one group, or the whole group where it is smaller."""
        shard = self.shards[self.rng.integers(len(self.shards))]
        group = int(self.rng.integers(len(shard["ids"])))
        size = len(shard["latents"]) // len(shard["ids"])
        picks = group * size + self.rng.choice(size, min(count, size), replace=False)
        sayings = self.rng.integers(shard[TOKENIZERS[0]].shape[1], size=len(picks))
        # a GPU must not be waited for here
        rows, said = (torch.from_numpy(part).to(self.device, non_blocking=True) for part in (picks, sayings))
        places = shard["ids"][group]
        return Batch(
            self.kind,
            latents=shard["latents"][rows].float(),
            ids=torch.cat([torch.zeros_like(places[:, :1]), places], 1),
            labels={name: shard[name][rows] for name in LABELS},
            words={name: shard[name][rows, said].long() for name in TOKENIZERS},
        )


class Collection:
    """Pictures of several kinds, of which one is picked at random for every batch."""

    def __init__(self, folder: Path, kinds: Iterable[str], rng: np.random.Generator, device: str) -> None:
        self.folder, self.rng = folder, rng
        self.sources = {kind: Pictures(folder, kind, rng, device) for kind in kinds}
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
