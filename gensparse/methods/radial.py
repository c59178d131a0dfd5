"""Radial attention: video frames see less of each other the farther apart they are (Li et al. 2506.19852)."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from gensparse import patterns
from gensparse.layout import Layout
from gensparse.methods.base import START, At, Dense, Method, Place, Subject
from gensparse.methods.checks import flag, whole
from gensparse.methods.steps import check_first_steps, first_steps
from gensparse.patterns import Pattern

_DENSE_LAYER = "dense layer"

_PAPER = {"decay": 1.0, "block": 128, "sink": True, "dense_layers": 0, "dense_steps": 0.24}
_WAN = {"decay": 0.2, "block": 128, "sink": True, "dense_layers": 1, "dense_steps": 0.24}
_WAN22 = {"decay": 0.8, "block": 64, "sink": True, "dense_layers": 1, "dense_steps": 0.275}
_HUNYUAN = {"decay": 0.95, "block": 128, "sink": False, "dense_layers": 0, "dense_steps": 0.24}
_BY_FAMILY: Mapping[str, Mapping[str, Any]] = {"Wan": _WAN, "SkyReels V2": _WAN, "HunyuanVideo": _HUNYUAN}


@dataclass(frozen=True)
class Radial(Method):
    """Neighbouring frames see each other wholly; the band of a frame halves whenever the distance in time doubles.

    Blocks of tokens are kept or left out as a whole, for all heads alike; text sees and is seen by all. Any size works.
    The first steps, and in Wan the first layer, stay dense. Settings that are left out (None) are those published for
    the model: Wan 2.1 and models built like it, Wan 2.2 (a pipeline with two denoisers, whose steps are counted
    together) and HunyuanVideo; all other models get the paper's, with the warm-up named for Mochi. As a share of the
    run the published warm-ups (12 of 50 steps, 2 of 8, 1 of 4; Wan 2.2: 11 of 40) are one number.

    Args:
        decay: factor of the bands, above 0; Wan 2.1 0.2, Wan 2.2 0.8, HunyuanVideo 0.95, else 1.
        block: tokens of a block; 128, Wan 2.2 64.
        sink: every frame sees the whole first frame; the authors' code has it for Wan, not for HunyuanVideo. The paper
            names it for every model.
        dense_steps: first steps that stay dense, a number or a share of the run; 0.24, Wan 2.2 0.275.
        dense_layers: first layers that stay dense; Wan 1, else 0. HunyuanVideo counts its double blocks, then its
            single ones.
        rule: "fixed" for any size, or "upstream", which is the authors' code with what it loses where blocks do not
            divide frames; it needs the video before the text.
        near_window: "full", or "half" for ports of the authors' code before November 2025.

    Raises:
        ConfigError: a setting of the wrong type or range.
    """

    name: ClassVar[str] = "radial"
    paper: ClassVar[str] = (
        'Li et al.: "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation", '
        "arXiv 2506.19852, NeurIPS 2025"
    )
    licence: ClassVar[str] = "code Apache-2.0; training-free at native length. LoRAs for longer videos are not released"
    use: ClassVar[str] = "Long videos (Wan, HunyuanVideo, Mochi); it does nothing for pictures."
    timed: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "wan2.1-t2v-14b": {**_WAN, "dense_steps": 12},
        "wan2.1-t2v-14b-2x": {**_WAN, "decay": 1.0, "dense_layers": 2, "dense_steps": 2},
        "wan2.1-t2v-14b-fusionx": {**_WAN, "dense_steps": 2},
        "wan2.1-t2v-14b-lightx2v": {**_WAN, "dense_steps": 1},
        "wan2.2-t2v-a14b": {**_WAN22, "dense_steps": 11},
        "hunyuan_video": {**_HUNYUAN, "dense_steps": 12},
        "hunyuan_video-4x": {**_HUNYUAN, "decay": 1.0, "dense_layers": 2, "dense_steps": 2},
        "mochi-1": {**_PAPER, "dense_steps": 12},
    }

    decay: float | None = None
    block: int | None = None
    sink: bool | None = None
    dense_steps: int | float | None = None
    dense_layers: int | None = None
    rule: str = "fixed"
    near_window: str = "full"

    def __post_init__(self) -> None:
        checked = self._geometry()
        if self.decay is not None:
            object.__setattr__(self, "decay", checked.decay)
        if self.sink is not None:
            flag(self.name, "sink", self.sink)
        if self.dense_steps is not None:
            check_first_steps(self.name, "dense_steps", self.dense_steps)
        if self.dense_layers is not None:
            whole(self.name, "dense_layers", self.dense_layers, low=0)

    def resolved(self, subject: Subject) -> Self:
        published = _BY_FAMILY.get(subject.family, _PAPER)
        if published is _WAN and subject.denoisers > 1:
            published = _WAN22
        return replace(self, **{name: self._setting(name, published) for name in published})

    def kind(self, place: Place) -> Hashable:
        return _DENSE_LAYER if place.layer < self._setting("dense_layers") else None

    def pattern(self, layout: Layout, at: At = START) -> Pattern | Dense:
        if at.kind == _DENSE_LAYER:
            return Dense("radial: the first layers stay dense")
        if at.step < first_steps(self._setting("dense_steps"), at):
            return Dense("radial: the first steps stay dense")
        return self._geometry()

    def why_not(self, layout: Layout, role: str = "joint") -> str | None:
        if layout.grid[0] == 1:
            return "radial thins out pairs of frames, and this call has one frame"
        return super().why_not(layout, role)

    def _setting(self, name: str, published: Mapping[str, Any] = _PAPER) -> Any:
        value = getattr(self, name)
        return published[name] if value is None else value

    def _geometry(self) -> patterns.Radial:
        decay, block, sink = (self._setting(name) for name in ("decay", "block", "sink"))
        return patterns.Radial(decay, block, sink=sink, rule=self.rule, near_window=self.near_window)
