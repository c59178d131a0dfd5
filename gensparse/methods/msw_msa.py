"""MSW-MSA: 2 x 2 windows on a rolled grid in the largest blocks of a UNet (HiDiffusion, Zhang et al. 2311.17528)."""

import hashlib
import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from gensparse.errors import ConfigError
from gensparse.layout import Layout
from gensparse.methods.base import START, At, Dense, Method, Place, Subject
from gensparse.methods.checks import one_of, whole
from gensparse.patterns import MSW, Pattern, Text

_BLOCK = re.compile(r"((?:down|up)_blocks\.\d+)\.attentions\..*")


@dataclass(frozen=True)
class MswMsa(Method):
    """Self-attention of the largest blocks runs in 2 x 2 windows of a grid rolled by 0 to 3 quarters of a window.

    The grid is rolled with wrap-around and without a mask, so opposite borders meet in one window. The roll is drawn
    anew for every step and block, from a stream of its own: the same seed gives the same windows, whatever else draws
    random numbers, and all calls of one step (the halves of guidance) share them. Odd grids have windows that differ by
    a row or column, where the authors resize the features. For UNets only; all other blocks stay dense.

    Args:
        blocks: names of the blocks, joined by "+"; None for the highest resolution with attention, as published.
        draw: "block": a roll per step and block, as the authors' code has it; "step": one per step for all blocks.
        seed: of the rolls, from 0.

    Raises:
        ConfigError: a setting of another form, or (when applied) a model that is no UNet or lacks a block.
    """

    name: ClassVar[str] = "msw_msa"
    paper: ClassVar[str] = (
        "HiDiffusion: Unlocking Higher-Resolution Creativity and Efficiency (Zhang et al.), arXiv 2311.17528"
    )
    licence: ClassVar[str] = "code Apache-2.0; no weights"
    use: ClassVar[str] = "Stable Diffusion 1.5, 2.1 and XL at twice the size of training and above"
    timed: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "sd1.5": {"blocks": "down_blocks.0+up_blocks.3"},
        "sd2.1": {"blocks": "down_blocks.0+up_blocks.3"},
        "sdxl": {"blocks": "down_blocks.1+up_blocks.1"},
    }

    blocks: str | None = None
    draw: str = "block"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.blocks is not None and not _block_names(self.blocks):
            raise ConfigError(
                f"{self.name} blocks={self.blocks!r} is not allowed; pass names of blocks joined by +, such as "
                "down_blocks.1+up_blocks.1, or nothing for those of the highest resolution with attention."
            )
        one_of(self.name, "draw", self.draw, ("block", "step"))
        whole(self.name, "seed", self.seed, low=0)

    def resolved(self, subject: Subject) -> Self:
        found = [_BLOCK.fullmatch(name) for name, _ in subject.model.named_modules()]
        present = list(dict.fromkeys(match[1] for match in found if match))
        if not present:
            raise ConfigError(
                f"{self.name} windows the largest attention blocks of a UNet, and {type(subject.model).__name__} is "
                "none; apply it to Stable Diffusion 1.5, 2.1 or XL, or take another method."
            )
        if self.blocks is None:
            return replace(self, blocks="+".join(_largest(present)))
        missing = sorted(set(self.blocks.split("+")) - set(present))
        if missing:
            raise ConfigError(
                f"{self.name} blocks={self.blocks!r} names {missing[0]}, but the blocks of this "
                f"{type(subject.model).__name__} with attention are {', '.join(present)}."
            )
        return self

    def kind(self, place: Place) -> Hashable:
        match = _BLOCK.fullmatch(place.name)
        if match is None or match[1] not in (self.blocks or "").split("+"):
            return None
        return place.layer if self.draw == "block" else "all"

    def pattern(self, layout: Layout, at: At = START) -> Pattern | Dense:
        if at.kind is None:
            return Dense(f"{self.name} leaves this block dense")
        return MSW(self.index(at)) | Text()

    def index(self, at: At) -> int:
        """How many quarters of a window the grid is rolled, 0 to 3."""
        text = f"{self.seed} {at.kind} {at.step}"  # hashed: equal on every machine and in every release
        return hashlib.sha256(text.encode()).digest()[0] % 4


def _block_names(blocks: Any) -> bool:
    return isinstance(blocks, str) and all(re.fullmatch(r"(down|up)_blocks\.\d+", part) for part in blocks.split("+"))


def _largest(present: list[str]) -> list[str]:
    """The first block on the way down and the last on the way up."""
    number = {name: int(name.rpartition(".")[2]) for name in present}
    down, up = ([name for name in present if name.startswith(side)] for side in ("down", "up"))
    return sorted(down, key=number.__getitem__)[:1] + sorted(up, key=number.__getitem__)[-1:]
