"""Extended attention: frames see the tokens of all frames of their group (TokenFlow, Geyer et al. 2307.10373)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from gensparse.errors import ConfigError
from gensparse.layout import Layout
from gensparse.methods.base import START, At, Dense, Loaded, Method, Place, Subject
from gensparse.methods.checks import flag, whole
from gensparse.methods.subject_method import (
    AUTO,
    Steps,
    SubjectMethod,
    check_layers,
    check_steps,
    outside,
    site_names,
)
from gensparse.patterns import Blocks, Pattern, Policy

if TYPE_CHECKING:  # methods are listed and described without torch
    from gensparse.methods.subject_run import SharedAttention

CLIPS = (
    "CogVideoX",
    "Cosmos",
    "HunyuanVideo",
    "HunyuanVideo 1.5",
    "Kandinsky 5",
    "LTX",
    "Mochi",
    "SkyReels V2",
    "Wan",
)
"""Families of models of clips."""


@dataclass(frozen=True)
class TokenFlow(SubjectMethod):
    """Frames of a clip attend to all frames of their group, so that what is drawn in them agrees.

    In a UNet that draws the frames one by one (a batch of pictures, or AnimateDiff) every half is a group: each frame
    sees all tokens of all of them. Models of clips, whose frames see each other anyhow, are cut into groups of `group`
    frames instead; text sees and is seen by all. With `source` the batch holds the frames of the source clip first,
    which stay plain, and in the first steps their queries and keys replace those of both other halves (plug-and-play).

    Published for Stable Diffusion 2.1 on key frames; the propagation from key frames to all frames, which needs the
    inverted source clip, is not part of this method. Everything but UNets is an extension of ours without measurements.

    Args:
        group: frames of a group in models of clips.
        source: whether frames of the source clip come first in the batch, so that it has one more part.
        inject: the step, as a number or share of the run, before which the source's queries and keys are used.
        start, stop: first step, and the step before which it ends, as numbers or as shares of the run; none for the
            end.
        inject_layers: those that use the source's queries and keys, as numbers in the order of the computation or
            names, joined by +; "auto" for the up blocks from up_blocks.1.attentions.1 on, as published.
        layers: those whose frames see each other, likewise; "auto" for all.
        halves: 2 where both halves of guidance come in one batch, 1 where not; none asks the pipeline.

    Raises:
        ConfigError: a setting of the wrong type or range, or (when applied) a source for a model of clips.
    """

    name: ClassVar[str] = "tokenflow"
    casts: ClassVar[bool] = False
    paper: ClassVar[str] = (
        "TokenFlow: Consistent Diffusion Features for Consistent Video Editing (Geyer et al.), arXiv 2307.10373"
    )
    licence: ClassVar[str] = "code MIT, none of it used; no weights"
    use: ClassVar[str] = "frames drawn one by one by a picture model that should show the same things"

    group: int = 8
    source: bool = False
    inject: Steps = 0.5
    start: Steps = 0
    stop: Steps = None
    inject_layers: str | int = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self.name, "group", self.group)
        flag(self.name, "source", self.source)
        for name in ("inject", "start", "stop"):
            check_steps(self.name, name, getattr(self, name))
        check_layers(self.name, self.inject_layers)
        object.__setattr__(self, "inject_layers", str(self.inject_layers))

    def resolved(self, subject: Subject) -> Self:
        if not self.knows(subject.family):
            raise ConfigError(
                f"{self.name} lets frames see each other and knows {', '.join(self.families)} and models of clips, not "
                f"{subject.family}; take a model of these."
            )
        settled = super().resolved(subject)
        if self.source and subject.family != "UNet":
            raise ConfigError(f"{self.name} source=True needs a UNet that draws frame by frame, not {subject.family}.")
        if settled.inject_layers != AUTO:
            return settled
        names = site_names(subject)
        first = next(
            (n for n, name in enumerate(names) if name.startswith("up_blocks.1.attentions.1.")), len(names) - 1
        )
        return replace(settled, inject_layers=f"{first}-{len(names) - 1}")

    def knows(self, family: str) -> bool:
        return family in self.families + CLIPS

    def when(self, at: At) -> str | None:
        return outside(self.name, self.start, self.stop, at)

    def injects(self, at: At) -> bool:
        """Whether a step uses the source's queries and keys."""
        return self.source and outside(self.name, 0, self.inject, at) is None

    def pattern(self, layout: Layout, at: At = START) -> "Pattern | SharedAttention | Dense":
        found = super().pattern(layout, at)
        if layout.grid[0] == 1 or isinstance(found, Dense):
            return found
        return frames_together(layout, self.group)

    def why_not(self, layout: Layout, role: str = "joint") -> str | None:
        return Method.why_not(self, layout, role)

    def load(self, subject: Subject, places: Mapping[str, Place]) -> Loaded | None:
        if subject.family in CLIPS:
            return None
        from gensparse.methods.subject_views import TokenFlowRun

        return TokenFlowRun(self, subject, places)


def frames_together(layout: Layout, group: int) -> Pattern:
    """Frames of a clip in groups of `group`: every token sees all frames of its group, and text sees and is seen."""
    frames, rows, columns = layout.grid
    kinds = tuple(dict.fromkeys(segment.kind for segment in layout.segments))
    blocks = Blocks((min(group, frames), rows, columns))
    pairs = tuple((a, b) for a in kinds for b in kinds if (a, b) != ("target", "target"))
    return blocks | Policy(pairs) if pairs else blocks
