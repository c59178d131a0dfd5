"""PSA: keys at full, half, quarter or eighth resolution, or left out, by what a query needs (Li et al. 2512.04025)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gensparse.layout import Layout
from gensparse.methods.base import START, At, Dense, Method
from gensparse.methods.checks import whole
from gensparse.methods.steps import check_first_steps, first_steps
from gensparse.patterns import PyramidBlocks, RoutedPattern

_CAPS = (0.7, 0.65, 0.6)


@dataclass(frozen=True)
class PSA(Method):
    """Pyramid sparse attention: the more a block of queries needs a block of keys, the finer it sees it.

    What a block needs is judged at run time from a sample of its tokens, for every head. All resolutions are keys of
    one softmax: means of 2, 4 or 8 tokens with the logarithm of their number. Blocks that hold text are seen exactly by
    all, wherever the text stands. The defaults are those of the authors' plug-in module; their models are presets, each
    with its warm-up of dense first steps.

    Args:
        block: tokens per key block, a multiple of `tile` and of 8.
        query_block: tokens per query block.
        ends: where resolutions 1, 1/2, 1/4 and 1/8 end, rising shares of the key blocks (mode "topk") or of all
            importance ("threshold").
        mode: "topk" or "threshold".
        caps: None, or how similar neighbours must be to be averaged by 2, 4 and 8 (the authors: 0.7, 0.65, 0.6).
        order: "gilbert" cuts blocks along a space-filling curve through the clip, "sequence" in raster order.
        pad: "mean" or, as the authors have it, "replicate" for the last block.
        tile: pooled keys that a resolution is rounded to.
        dense_steps: first steps that stay dense, a number or a share of the run.
        seed: of the samples, from 0; they also depend on layer and step, and on no global generator.

    Raises:
        ConfigError: a setting of the wrong type or range.
    """

    name: ClassVar[str] = "psa"
    paper: ClassVar[str] = 'Li, Gu, Lin, Wang, Zhuang: "Pyramid Sparse Attention", arXiv 2512.04025, 2025'
    licence: ClassVar[str] = (
        "Apache-2.0 by its pyproject, without a licence file; training-free. The licence of the LoRA for "
        "CogVideoX-5b was not seen"
    )
    use: ClassVar[str] = (
        "Video models (Wan, CogVideoX) where the layout of what matters is not known beforehand; every query block "
        "decides at run time."
    )
    timed: ClassVar[bool] = True
    edits: ClassVar[bool] = True  # what a block needs is measured, whatever it holds: references are keys like others
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "wan2.1-t2v-14b": {
            "block": 128, "mode": "threshold", "ends": (0.4, 0.5, 0.6, 0.8), "order": "gilbert", "dense_steps": 15,
        },
        "wan2.1-t2v-1.3b": {
            "block": 128, "mode": "threshold", "ends": (0.5, 0.6, 0.7, 0.8), "order": "gilbert", "dense_steps": 15,
            "caps": _CAPS,
        },
        "wan2.1-t2v-1.3b-topk": {
            "block": 32, "mode": "topk", "ends": (0.05, 0.1, 0.15, 0.25), "order": "gilbert", "dense_steps": 15,
        },
        "wan2.2-t2v-a14b": {
            "block": 32, "mode": "threshold", "ends": (0.5, 0.6, 0.6, 0.8), "order": "gilbert", "dense_steps": 12,
        },
        "wan2.2-ti2v-5b": {
            "block": 32, "mode": "threshold", "ends": (0.6, 0.7, 0.7, 0.8), "order": "gilbert", "dense_steps": 15,
        },
        "cogvideox1.5-5b": {
            "block": 32, "mode": "topk", "ends": (0.1, 0.15, 0.15, 0.35), "order": "gilbert", "dense_steps": 15,
        },
        "cogvideox-5b": {
            "block": 128, "mode": "topk", "ends": (0.1, 0.15, 0.15, 0.35), "order": "sequence", "dense_steps": 15,
        },
        "cogvideox-5b-4step": {
            "block": 128, "mode": "topk", "ends": (0.05, 0.15, 0.25, 0.5), "order": "sequence", "dense_steps": 0,
        },
    }  # fmt: skip

    block: int = 64
    query_block: int = 128
    ends: tuple[float, ...] = (0.1, 0.15, 0.15, 0.35)
    mode: str = "topk"
    caps: tuple[float, ...] | None = None
    order: str = "sequence"
    pad: str = "mean"
    tile: int = 32
    dense_steps: int | float = 0
    seed: int = 0

    def __post_init__(self) -> None:
        checked = self._blocks()
        for name in ("block", "query_block", "ends", "caps", "tile"):
            object.__setattr__(self, name, getattr(checked, name))
        check_first_steps(self.name, "dense_steps", self.dense_steps)
        whole(self.name, "seed", self.seed, low=0)

    def pattern(self, layout: Layout, at: At = START) -> RoutedPattern | Dense:
        if at.step < first_steps(self.dense_steps, at):
            return Dense("psa: the first steps stay dense")
        return self._blocks()

    def _blocks(self) -> PyramidBlocks:
        return PyramidBlocks(
            self.block,
            self.query_block,
            self.ends,
            mode=self.mode,
            caps=self.caps,
            order=self.order,
            pad=self.pad,
            tile=self.tile,
        )
