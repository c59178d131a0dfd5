"""Processes that share attention calls: who they are, and whether they agree before they wait for each other."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from gensparse.errors import ConfigError, ParallelError


@dataclass(frozen=True, eq=False)
class Team:
    """Processes that share the attention calls of a model.

    Args:
        group: of torch.distributed.
        rank: of this process in the group.
        size: number of processes.
        uneven: whether parts may differ in length and heads in number.
    """

    group: Any
    rank: int
    size: int
    uneven: bool = False

    @classmethod
    def of(cls, group: Any, *, uneven: bool = False) -> "Team":
        """The team of a process group."""
        return cls(group, dist.get_rank(group), dist.get_world_size(group), uneven)

    def share(self, heads: int, rank: int | None = None) -> slice:
        """Heads of a process (this one by default) where all processes have `heads`; the first ones take the rest.

        Raises:
            ConfigError: the heads cannot be divided.
        """
        if heads < self.size or (heads % self.size and not self.uneven):
            raise ConfigError(
                f"{heads} attention heads cannot be divided among {self.size} processes; use a ulysses_degree that "
                f"divides {heads}."
            )
        rank = self.rank if rank is None else rank
        each, rest = divmod(heads, self.size)
        first = rank * each + min(rank, rest)
        return slice(first, first + each + (rank < rest))

    def agree(self, what: str, numbers: Sequence[float] = (), *, timeout: float = 120.0) -> None:
        """Wait until every process has come here, and compare what they are about to do.

        Messages go through the store that the processes met at, so no collective can hang over it.

        Args:
            what: description that must be equal everywhere.
            numbers: finite samples of the inputs that must be nearly equal.
            timeout: seconds to wait for the others.

        Raises:
            ParallelError: a process is missing, or has another description or other numbers.
        """
        store = dist.distributed_c10d._get_default_store()
        team = "gensparse/" + ",".join(map(str, dist.get_process_group_ranks(self.group)))
        turn = store.add(f"{team}/{self.rank}", 1)
        store.set(f"{team}/{self.rank}/{turn}", json.dumps([what, list(numbers)]))
        for rank in range(self.size):
            key = f"{team}/{rank}/{turn}"
            try:
                store.wait([key], timedelta(seconds=timeout))
            except RuntimeError as error:
                raise ParallelError(
                    f"Process {rank} of {self.size} did not come within {timeout:g} s to where process {self.rank} "
                    "waits for it; see whether it failed, and give all processes the same calls."
                ) from error
            theirs, samples = json.loads(store.get(key))
            if theirs != what:
                raise ParallelError(
                    f"Process {rank} is about to compute {theirs}, but process {self.rank} {what}; give all processes "
                    "the same size, method and settings."
                )
            if not _near(numbers, samples):
                raise ParallelError(
                    f"Processes {rank} and {self.rank} got different inputs of equal shape; use the same seed, prompt "
                    "and picture everywhere."
                )


def _near(some: Iterable[float], others: Iterable[float]) -> bool:
    pairs = list(zip(some, others, strict=True))
    largest = max((abs(number) for pair in pairs for number in pair), default=0.0)
    return all(math.isclose(a, b, abs_tol=0.02 * largest) for a, b in pairs)
