"""Structured diffusion: noun phrases keep their adjectives, by encodings of their own (2212.05032)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from gensparse.errors import ConfigError, short
from gensparse.layout import Layout
from gensparse.methods.base import At, Dense, Loaded, Place, Subject
from gensparse.methods.checks import one_of
from gensparse.methods.cross_method import CrossLoaded, CrossMethod, PromptCheck, encoded, offsets, prompts_of

if TYPE_CHECKING:
    from gensparse.processors.stages import Phrases, Stages

MODES = ("values", "keys")


@dataclass(frozen=True)
class Structured(CrossMethod):
    """Every noun phrase of the prompt is encoded alone, and its words take part in cross-attention once more.

    So "a red car and a white sheep" mixes colours up less often. Give the prompt here and the same one to the pipeline;
    calls with another prompt stay as they are, and the report says so. Phrases are best given. Without them a light
    parser of our own finds those that begin with an article, a number or a possessive; it knows English captions and no
    grammar. The published default costs one attention call as before. All layers, all steps, the conditional half
    alone. Stable Diffusion 1.5 and 2 as published; XL likewise, both encoders side by side.

    Args:
        prompt: the prompt of the call, or one per picture of the batch; the pipeline gets the same.
        phrases: its noun phrases as they stand in it, left to right, nested ones too; of several prompts one list each;
            None looks for them.
        mode: "values": one key and many values, as published; "keys": the conjunction, many keys and one value, which
            costs an attention call per phrase.
        guided: whether the first half of a batch is the unconditional one; by default the pipeline says it, and a bare
            model has none.

    Raises:
        ConfigError: a phrase that is not in the prompt, a setting of another form, or (when applied) a bare model or
            one that is no UNet.
    """

    name: ClassVar[str] = "structured"
    paper: ClassVar[str] = (
        "Training-Free Structured Diffusion Guidance for Compositional Text-to-Image Synthesis (Feng et al.), "
        "arXiv 2212.05032"
    )
    licence: ClassVar[str] = "code MIT; no weights"
    use: ClassVar[str] = "prompts with several things that have colours or other attributes of their own, on UNets"

    prompt: str | tuple[str, ...] | None = None
    phrases: tuple[Any, ...] | None = None
    mode: str = "values"

    def __post_init__(self) -> None:
        super().__post_init__()
        prompts = prompts_of(self.name, self.prompt)
        object.__setattr__(self, "prompt", self.prompt if isinstance(self.prompt, str) else prompts or None)
        if self.phrases is not None:
            object.__setattr__(self, "phrases", _phrases(self.phrases, len(prompts) or 1))
        one_of(self.name, "mode", self.mode, MODES)
        self.spans()

    def spans(self) -> list[list[tuple[str, tuple[int, int]]]]:
        """Of every prompt, its phrases and the characters they are in the normalised prompt.

        Raises:
            ConfigError: a phrase that is not in its prompt.
        """
        from gensparse.subjects.phrases import found_in, normalised, noun_phrases

        found = []
        prompts = prompts_of(self.name, self.prompt)
        for number, prompt in enumerate(prompts):
            text = normalised(prompt)
            own = noun_phrases(text) if self.phrases is None else self.phrases
            if own and isinstance(own[0], tuple):
                own = own[number]
            phrases = [normalised(phrase) for phrase in own if normalised(phrase) != text]
            found.append(list(zip(phrases, found_in(text, phrases), strict=True)))
        return found

    def load(self, subject: Subject, places: Mapping[str, Place]) -> Loaded:
        prompts = prompts_of(self.name, self.prompt)
        if not prompts:
            raise ConfigError("structured needs the prompt whose phrases it encodes; pass prompt=.")
        return _Encoded(self, subject.owner, prompts)


class _Encoded(CrossLoaded):
    """Encodings of prompts and phrases."""

    def __init__(self, method: Structured, owner: Any, prompts: tuple[str, ...]) -> None:
        from gensparse.subjects.phrases import normalised, token_span

        super().__init__(method.guided, owner)
        self._check = PromptCheck(encoded(method.name, owner, prompts))
        spans, texts = [], []
        for prompt, phrases in zip(prompts, method.spans(), strict=True):
            places = offsets(method.name, owner, normalised(prompt))[1:]
            own = [(phrase, token_span(places, characters)) for phrase, characters in phrases]
            kept = [(phrase, span) for phrase, span in own if span is not None]  # others are cut from the prompt
            spans.append(tuple(span for _, span in kept))
            texts.append([phrase for phrase, _ in kept])
        self._spans = tuple(spans)
        self._phrases = self._stage(method, owner, texts)

    def look(self, at: At, arguments: dict[str, Any]) -> None:
        self._now.reason = self._check.reason(arguments["encoder_hidden_states"], self.guided(at))

    def stages(self, layout: Layout, at: At) -> "Stages | Dense":
        from gensparse.processors.stages import Stages

        if self._now.reason is not None:
            return Dense(f"structured: {self._now.reason}")
        if not any(self._spans):
            return Dense("structured found no noun phrase in the prompt; pass phrases=")
        return Stages(self.guided(at), layout.grid[1:], phrases=self._phrases)

    def _stage(self, method: Structured, owner: Any, texts: list[list[str]]) -> "Phrases":
        import torch

        from gensparse.processors.stages import Phrases

        flat = [phrase for own in texts for phrase in own]
        found = iter(encoded(method.name, owner, flat) if flat else [])
        encodings = [[next(found) for _ in own] for own in texts]
        empty = torch.empty(0, 1, 1)
        return Phrases(self._spans, tuple(torch.cat(own) if own else empty for own in encodings), method.mode)


def _phrases(value: Any, prompts: int) -> tuple[Any, ...]:
    nested = isinstance(value, tuple | list) and bool(value) and all(isinstance(item, tuple | list) for item in value)
    lists = [tuple(item) for item in value] if nested else [value]
    if (nested or prompts > 1) and len(lists) != prompts:
        raise ConfigError(
            f"structured has phrases for {len(lists)} prompts and {prompts} prompts; pass a list for each."
        )
    for own in lists:
        if not isinstance(own, tuple | list) or not all(isinstance(item, str) and item.strip() for item in own):
            raise ConfigError(f"structured phrases={short(value)} is not allowed; pass a list of texts.")
    return tuple(lists) if nested else tuple(value)
