"""AgentSD: similar tokens are merged, and a few agent tokens stand between queries and keys (Han et al. 2312.08874)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from gensparse.errors import ConfigError
from gensparse.layout import Layout
from gensparse.methods.base import START, At, Dense, Loaded, Method, Place, Subject
from gensparse.methods.checks import flag, one_of, whole
from gensparse.methods.steps import check_first_steps, first_steps

if TYPE_CHECKING:  # methods are listed and described without torch
    from gensparse.processors.agents import AgentAttention, SiteNotes

_PLAIN = ("UNet", "PixArt", "Stable Diffusion 3", "AuraFlow")
_ROTATED = ("FLUX.1",)


@dataclass(frozen=True)
class AgentSD(Method):
    """Agent attention for Stable Diffusion: first few tokens read all keys, then all queries read those few.

    One token of every cell is a destination, all others are sources, and the sources most like a destination are merged
    into it; the output of a destination is that of all that is in it. In early steps so many are merged into the agents
    that only the destinations are left; in late steps there are no agents, and merged tokens attend as usual (ToMe).
    Published for Stable Diffusion 1.5 and 2.1; for XL only which layers are large enough is known. PixArt works alike.
    Where the sequence holds text (Stable Diffusion 3, AuraFlow, FLUX.1) only picture queries are merged, all keys are
    read, and text stays dense: an extension of ours. The published speed-up is over attention without fused kernels.

    Args:
        ratio: share of the picture tokens merged in early steps.
        agent_ratio: share merged for the agents; with 0.95 and cells of 4 x 4 the destinations are left.
        cell: rows and columns of a cell, one value or both, in tokens; smaller pictures have one cell.
        late_ratio, late_agent_ratio, late_cell: the same for late steps.
        early_steps: first steps that count as early, a number or a share of the run; published as 20 of 50.
        k_scale2: exponent of the logits' scale in the second softmax; below 1 makes it sharper.
        k_shortcut: share of the own values that is added to the output of agents.
        max_downsample: attention layers up to so many times coarser than the latent take part, the others stay dense.
        metric: what tokens are compared by: "hidden", the input of the block, as published, or "normed", that of the
            attention module.
        random: draw destinations from (seed, step, layer); false takes the top-left token of every cell.
        seed: of the draw, from 0.

    Raises:
        ConfigError: a setting of the wrong type or range, or (when applied) a model of another family, or one without
            an attention layer as fine as max_downsample.
    """

    name: ClassVar[str] = "agentsd"
    paper: ClassVar[str] = (
        "Agent Attention: On the Integration of Softmax and Linear Attention (Han et al.), arXiv 2312.08874"
    )
    licence: ClassVar[str] = "code without a licence, none of it used; no weights"
    use: ClassVar[str] = "Stable Diffusion 1.5 and 2.1 at their own size, where attention without fused kernels is slow"
    timed: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "sd1.5": {"max_downsample": 1},
        "sd2.1": {"max_downsample": 1},
        "sdxl": {"max_downsample": 2},
    }

    ratio: float = 0.4
    agent_ratio: float = 0.95
    cell: int | tuple[int, ...] = 4
    late_ratio: float = 0.4
    late_agent_ratio: float = 0.5
    late_cell: int | tuple[int, ...] = 2
    early_steps: int | float = 0.4
    k_scale2: float = 0.3
    k_shortcut: float = 0.075
    max_downsample: int = 1
    metric: str = "hidden"
    random: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("ratio", "agent_ratio", "late_ratio", "late_agent_ratio"):
            _number(name, getattr(self, name), 1.0, "a share of the tokens from 0 to 1")
        for name in ("k_scale2", "k_shortcut"):
            _number(name, getattr(self, name), float("inf"), "a number from 0 up")
        for name in ("cell", "late_cell"):
            _cell(name, getattr(self, name))
        check_first_steps(self.name, "early_steps", self.early_steps)
        whole(self.name, "max_downsample", self.max_downsample)
        one_of(self.name, "metric", self.metric, ("hidden", "normed"))
        flag(self.name, "random", self.random)
        whole(self.name, "seed", self.seed, low=0)

    def resolved(self, subject: Subject) -> Self:
        if subject.family not in _PLAIN + _ROTATED:
            raise ConfigError(
                f"agentsd merges tokens of pictures and knows {', '.join(_PLAIN + _ROTATED)}, not {subject.family}; "
                "take another method for this model."
            )
        return self

    def load(self, subject: Subject, places: Mapping[str, Place]) -> "Hooks | None":
        from gensparse.families import family_of

        coarseness = {name: family_of(subject.model).coarseness(place.role) for name, place in places.items()}
        finest = min(coarseness.values(), default=1)
        if finest > self.max_downsample:
            raise ConfigError(
                f"agentsd max_downsample={self.max_downsample} leaves no layer: the finest attention of this "
                f"{type(subject.model).__name__} is {finest} times coarser than its latent; pass that."
            )
        taken = [name for name, value in coarseness.items() if value <= self.max_downsample]
        rotated = subject.family in _ROTATED
        return Hooks(subject, taken, self.metric == "hidden", rotated) if rotated or self.metric == "hidden" else None

    def pattern(self, layout: Layout, at: At = START) -> "AgentAttention | Dense":
        if at.coarseness > self.max_downsample:
            return Dense(f"agentsd: the layer is coarser than max_downsample={self.max_downsample}")
        early = at.step < first_steps(self.early_steps, at)
        return self.attention(layout, early)

    def attention(self, layout: Layout, early: bool) -> "AgentAttention":
        """The attention of early or late steps on a layout."""
        from gensparse.processors.agents import AgentAttention, clamped_cell

        ratio, agent_ratio, cell = (
            (self.ratio, self.agent_ratio, self.cell)
            if early
            else (self.late_ratio, self.late_agent_ratio, self.late_cell)
        )
        return AgentAttention(
            clamped_cell(_cell("cell", cell), layout.grid),
            float(ratio),
            float(agent_ratio),
            float(self.k_scale2),
            float(self.k_shortcut),
            hidden=self.metric == "hidden",
            random=self.random,
            seed=self.seed,
        )

    def why_not(self, layout: Layout, role: str = "joint") -> str | None:
        if layout.grid[0] > 1:
            return f"agentsd merges tokens of one picture, and this call has {layout.grid[0]} frames"
        if layout.parts > 1:
            return "agentsd cannot merge tokens of a sequence that is spread over devices"
        if any(segment.kind == "pad" for segment in layout.segments):
            return "agentsd has no rule for padding in the sequence"
        return super().why_not(layout, role)


class Hooks(Loaded):
    """Forward pre-hooks that note the input of every block, and the rotary embedding of every attention module."""

    def __init__(self, subject: Subject, names: list[str], hidden: bool, rotary: bool) -> None:
        from gensparse.processors.agents import SiteNotes

        self._notes: dict[str, SiteNotes] = {name: SiteNotes() for name in names}
        self._handles = []
        for name, notes in self._notes.items():
            attention = subject.model.get_submodule(name)
            block = subject.model.get_submodule(name.rpartition(".")[0])
            if hidden:
                self._handles.append(block.register_forward_pre_hook(notes.block, with_kwargs=True))
            if rotary:
                self._handles.append(attention.register_forward_pre_hook(notes.attention, with_kwargs=True))

    def notes(self, place: Place) -> "SiteNotes | None":
        return self._notes.get(place.name)

    def undo(self) -> None:
        for handle in self._handles:
            handle.remove()


def _number(name: str, value: Any, high: float, allowed: str) -> None:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if not plain or not 0 <= value <= high or value == float("inf"):
        raise ConfigError(f"agentsd {name}={value!r} is not allowed; pass {allowed}.")


def _cell(name: str, value: Any) -> tuple[int, int]:
    """Rows and columns of a cell."""
    sides = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(sides) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sides):
        raise ConfigError(
            f"agentsd {name}={value!r} is not allowed; pass a positive integer, or one for rows and one for columns."
        )
    return sides
