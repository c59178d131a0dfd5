"""Local Prompt Adaptation: style words for some layers, content words for others, in a part of the run (2507.20094)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from gensparse.errors import ConfigError
from gensparse.layout import Layout
from gensparse.methods.base import At, Dense, Loaded, Place, Subject
from gensparse.methods.checks import flag, one_of
from gensparse.methods.cross_method import (
    CrossLoaded,
    CrossMethod,
    PromptCheck,
    encoded,
    offsets,
    prompts_of,
    word_lists,
)

if TYPE_CHECKING:
    from torch import Tensor

    from gensparse.processors.stages import Stages

TAGS: Mapping[str, tuple[str, ...]] = {
    "down1": ("down_blocks.0.attentions.0", "down_blocks.0.attentions.1"),
    "down2": ("down_blocks.1.attentions.0", "down_blocks.1.attentions.1"),
    "mid": ("mid_block.attentions.0",),
    "up1": ("up_blocks.1.attentions.0", "up_blocks.1.attentions.1"),
    "up2": ("up_blocks.2.attentions.0", "up_blocks.2.attentions.1"),
    "sdxl_style": ("up_blocks.1.",),
    "sdxl_content": ("down_blocks.1.", "mid_block."),
}
"""Tag -> what names of its layers begin with. The last two are ours."""

ROUTES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "vanilla": ((), ()),
    "lpa_late_only": (("up2",), ("down1", "mid")),
    "lpa_early_style_late": (("up1", "up2"), ("down1", "down2", "mid")),
    "lpa_mid_only": (("mid",), ("down2", "up1")),
    "lpa_full": (("down1", "down2", "mid", "up1", "up2"), ("down1", "down2", "mid", "up1", "up2")),
    "sdxl": (("sdxl_style",), ("sdxl_content",)),
}
"""Route -> tags of style layers and of content layers."""

MODES = ("zero", "mask")
STYLE, CONTENT, BOTH = "style", "content", "both"


@dataclass(frozen=True)
class LPA(CrossMethod):
    """Style layers do not read the content words of the prompt, and content layers not its style words.

    Only while the timestep is in a window, in the middle of the run as published. Words are looked up as whole words;
    style words are those between "in" and "style" or "aesthetic" unless they are given. Give the prompt here and the
    same one to the pipeline; calls with another prompt stay as they are, and the report says so. A small, cheap
    control: its authors measure less than half a per cent. On XL the published routes reach hardly any layer; "sdxl"
    is ours.

    Args:
        prompt: the prompt of the call, or one per picture of the batch; the pipeline gets the same.
        route: which layers: lpa_late_only (recommended), lpa_early_style_late, lpa_mid_only, lpa_full, vanilla (none),
            or sdxl.
        window: first and last timestep, both included, on the scheduler's scale of 0 to 1000 that falls during a run.
        style_words, content_words: instead of those found in the prompt; with commas, or a list.
        split: which other words are content: "pos" without articles and prepositions, "naive" all of them.
        mode: "zero": hidden words have the context 0 and still take part in the softmax, as published; "mask": they
            take no part, ours.
        cond_only: leave the unconditional half as it is; published code hides the same places there too.
        guided: whether the first half of a batch is the unconditional one; by default the pipeline says it, and a bare
            model has none.

    Raises:
        ConfigError: a setting of another form, or (when applied) a bare model or one that is no UNet.
    """

    name: ClassVar[str] = "lpa"
    paper: ClassVar[str] = "Local Prompt Adaptation for Style-Consistent Multi-Object Generation, arXiv 2507.20094"
    licence: ClassVar[str] = "code MIT; no weights"
    use: ClassVar[str] = (
        "prompts that name a style, on Stable Diffusion 1.5, where the style should not eat the content"
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "sd1.5": {"route": "lpa_late_only", "window": (300, 650)},
        "sdxl": {"route": "lpa_late_only", "window": (300, 650)},
    }

    prompt: str | tuple[str, ...] | None = None
    route: str = "lpa_late_only"
    window: tuple[int, int] = (300, 650)
    style_words: tuple[str, ...] | None = None
    content_words: tuple[str, ...] | None = None
    split: str = "pos"
    mode: str = "zero"
    cond_only: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        prompts = prompts_of(self.name, self.prompt)
        object.__setattr__(self, "prompt", self.prompt if isinstance(self.prompt, str) else prompts or None)
        one_of(self.name, "route", self.route, tuple(ROUTES))
        pair = self.window if isinstance(self.window, tuple | list) else ()
        if len(pair) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) for n in pair) or pair[0] > pair[1]:
            raise ConfigError(
                f"lpa window={self.window!r} is not allowed; pass first and last timestep, as (300, 650)."
            )
        object.__setattr__(self, "window", tuple(pair))
        for name in ("style_words", "content_words"):
            object.__setattr__(self, name, word_lists(self.name, name, getattr(self, name)))
        one_of(self.name, "split", self.split, ("pos", "naive"))
        one_of(self.name, "mode", self.mode, MODES)
        flag(self.name, "cond_only", self.cond_only)

    def kind(self, place: Place) -> str | None:
        """What a routed layer is for: "style", "content" or "both"."""
        style, content = ROUTES[self.route]
        return {(True, False): STYLE, (False, True): CONTENT, (True, True): BOTH}.get(
            (_begins(place.name, style), _begins(place.name, content))
        )

    def words(self, prompt: str) -> tuple[list[str], list[str]]:
        """Style and content words of a prompt."""
        from gensparse.subjects.words import content_words, style_words

        style = list(style_words(prompt) if self.style_words is None else self.style_words)
        content = self.content_words
        return style, list(content_words(prompt, style, self.split) if content is None else content)

    def active_at(self, timestep: float) -> bool:
        """Whether a timestep is in the window."""
        return self.window[0] <= int(timestep) <= self.window[1]

    def load(self, subject: Subject, places: Mapping[str, Place]) -> Loaded:
        prompts = prompts_of(self.name, self.prompt)
        if not prompts:
            raise ConfigError("lpa needs the prompt whose words it hides; pass prompt=.")
        return _Looked(self, subject.owner, prompts)


class _Looked(CrossLoaded):
    """Tokens of the words, and whether the call is in the window."""

    def __init__(self, method: LPA, owner: Any, prompts: tuple[str, ...]) -> None:
        super().__init__(method.guided, owner)
        self._method = method
        self._check = PromptCheck(encoded(method.name, owner, prompts))
        words = [method.words(prompt) for prompt in prompts]
        places = [offsets(method.name, owner, prompt) for prompt in prompts]
        style, content = ([own[side] for own in words] for side in (0, 1))
        self._hidden = {
            STYLE: _tokens(prompts, content, places),
            CONTENT: _tokens(prompts, style, places),
            BOTH: _tokens(prompts, [a + b for a, b in zip(style, content, strict=True)], places),
        }

    def look(self, at: At, arguments: dict[str, Any]) -> None:
        text = arguments["encoder_hidden_states"]
        self._now.where = (text.device, text.dtype)
        self._now.reason = self._check.reason(text, self.guided(at))
        if self._now.reason is None and not self._method.active_at(_number(arguments["timestep"])):
            self._now.reason = "the timestep is outside its window"

    def stages(self, layout: Layout, at: At) -> "Stages | Dense":
        from gensparse.processors.stages import Stages, Words

        if self._now.reason is not None:
            return Dense(f"lpa: {self._now.reason}")
        hidden = self._hidden.get(at.kind) if isinstance(at.kind, str) else None
        if hidden is None:
            return Dense("lpa: its route does not name this layer")
        if not bool(hidden.any()):
            return Dense("lpa: the prompt has no such words")
        device, _ = self._now.where
        hidden = self.made((at.kind, device), lambda: hidden.to(device))
        words = Words(hidden, self._method.mode, both=not self._method.cond_only)
        return Stages(self.guided(at), layout.grid[1:], words=words)


def _tokens(prompts: tuple[str, ...], words: list[list[str]], places: list[list[tuple[int, int]]]) -> "Tensor":
    """bool [P, L]: the tokens of words of every prompt."""
    import torch

    from gensparse.subjects.words import tokens_of

    found = torch.zeros(len(prompts), max(map(len, places)), dtype=torch.bool)
    for row, prompt, own, spans in zip(found, prompts, words, places, strict=True):
        row[tokens_of(prompt, own, spans)] = True
    return found


def _begins(name: str, tags: tuple[str, ...]) -> bool:
    starts = [start for tag in tags for start in TAGS[tag]]
    return any(re.match(rf"{re.escape(start)}(?!\d)", name) for start in starts)


def _number(timestep: Any) -> float:
    """The timestep of a call; of several the largest. Waits for the device."""
    return float(timestep.max()) if hasattr(timestep, "max") else float(timestep)
