"""What methods that act on cross-attention have in common: sites, halves of guidance, encodings of further prompts."""

import inspect
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from gensparse.errors import ConfigError, short
from gensparse.layout import Layout
from gensparse.methods.base import START, At, Dense, Loaded, Method, Subject
from gensparse.methods.settings_text import JsonSettings

if TYPE_CHECKING:  # methods are listed and described without torch
    from torch import Tensor

    from gensparse.patterns import Pattern, RoutedPattern
    from gensparse.processors.operators import Operator

VAE_SCALE = 8
"""Pixels per latent cell of a model without its pipeline."""

SAME = 0.2
"""Largest relative difference of two encodings that count as one prompt: dtypes and batches differ by less."""


@dataclass(frozen=True)
class CrossMethod(JsonSettings, Method):
    """Base of methods that change what cross-attention of a UNet reads. Self-attention stays as it is.

    Args:
        guided: whether the first half of a batch is the unconditional one. By default the pipeline says it, and a bare
            model has no such half.
    """

    guided: bool | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.guided not in (None, True, False):
            raise ConfigError(f"{self.name} guided={self.guided!r} is not allowed; pass true, false or none.")

    def part(self, family: str) -> str:
        return "cross"

    def pattern(self, layout: Layout, at: At = START) -> "Pattern | RoutedPattern | Operator | Dense":
        return Dense(f"{self.name} acts on cross-attention alone")

    def resolved(self, subject: Subject) -> Self:
        if subject.family != "UNet":
            raise ConfigError(
                f"{self.name} changes cross-attention and knows UNets such as SDXL, not {subject.family}; take another "
                "method for this model."
            )
        reads_text(self.name, subject)
        return self


class Now(threading.local):
    """Of the call that the running thread is in.

    `size` is the picture's (height, width) in pixels, `where` device and dtype of the text, `reason` why the method
    does not act, `prompted` whether there are image prompts.
    """

    size: tuple[int, int] = (1, 1)
    where: Any = None
    reason: str | None = None
    prompted: bool = False

    def __reduce__(self) -> "tuple[type[Now], tuple[()]]":
        return Now, ()


class CrossLoaded(Loaded):
    """What a cross-attention method keeps beside its settings: encodings, and what was made of them per grid.

    Args:
        guided: see `CrossMethod`.
        owner: the pipeline, which is asked for its size of latent cells and is not kept.
    """

    sample: ClassVar[str] = "sample"

    def __init__(self, guided: bool | None, owner: Any) -> None:
        self._guided = guided
        self._cell = int(getattr(owner, "vae_scale_factor", None) or VAE_SCALE)
        self._now = Now()
        self._made: dict[Any, Any] = {}

    def begin(self, at: At, arguments: dict[str, Any]) -> bool:
        height, width = arguments[self.sample].shape[-2:]
        self._now.size = int(height) * self._cell, int(width) * self._cell
        self.look(at, arguments)
        return False

    def look(self, at: At, arguments: dict[str, Any]) -> None:
        """Before every denoiser call: note what `stages` needs of its arguments."""

    def guided(self, at: At) -> bool:
        """Whether the first half of the batch is the unconditional one."""
        return bool(at.guided if self._guided is None else self._guided)

    def made(self, key: Any, make: Any) -> Any:
        """`make()`, remembered; one entry per picture size and grid."""
        if key not in self._made:
            if len(self._made) >= 64:
                self._made.clear()
            self._made[key] = make()
        return self._made[key]

    def undo(self) -> None:
        self._made.clear()


def reads_text(method: str, subject: Subject) -> None:
    """ConfigError for a UNet that does not read encodings as they are: one that projects them, or reads pictures."""
    model = subject.model
    kind = model.config.get("encoder_hid_dim_type")
    if kind not in (None, "ip_image_proj") or getattr(model, "text_encoder_hid_proj", None) is not None:
        raise ConfigError(
            f"{method} encodes prompts for cross-attention, and this {type(model).__name__} puts them through a layer "
            f"of its own first ({kind}, as Kolors and Kandinsky do); take a model such as SDXL."
        )


# ------------------------------------------------------------------------------------------------------------ encodings
def encoded(method: str, owner: Any, prompts: Sequence[str], max_tokens: int | None = None) -> "list[Tensor]":
    """Prompts as the pipeline's text encoders give them to the denoiser, [1, L, C] each.

    Args:
        max_tokens: of encoders that can read any number (T5); None leaves it to the pipeline.

    Raises:
        ConfigError: a bare model, or a pipeline that cannot encode.
    """
    import torch

    encode = getattr(owner, "encode_prompt", None)
    if encode is None:
        raise ConfigError(
            f"{method} encodes prompts of its own and needs text encoders; call gensparse.apply(pipe, ...) with the "
            "whole pipeline."
        )
    known = inspect.signature(encode).parameters
    texts = list(prompts)
    given = {
        "prompt": texts,
        "prompt_2": texts,
        "prompt_3": texts,
        "device": getattr(owner, "_execution_device", None) or "cpu",
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": False,
        "max_sequence_length": max_tokens,
    }
    with torch.no_grad():
        found = encode(**{key: value for key, value in given.items() if key in known and value is not None})
    found = found[0] if isinstance(found, tuple | list) else found
    return list(found.detach().split(1))


def offsets(method: str, owner: Any, prompt: str) -> list[tuple[int, int]]:
    """Characters from..to of every token of a prompt, begin and end included with (0, 0), cut to what is encoded.

    Raises:
        ConfigError: a bare model, or a tokenizer that does not tell them.
    """
    tokenizer = getattr(owner, "tokenizer", None)
    if tokenizer is None:
        raise ConfigError(
            f"{method} looks up words of the prompt and needs a tokenizer; call gensparse.apply(pipe, ...) with the "
            "whole pipeline."
        )
    try:
        found = tokenizer(prompt, return_offsets_mapping=True, truncation=True, max_length=tokenizer.model_max_length)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{method} needs a fast tokenizer, which tells where its tokens are; load the pipeline with one."
        ) from error
    return [tuple(span) for span in found["offset_mapping"]]


def image_prompts(arguments: Mapping[str, Any]) -> int:
    """Images of the first adapter in a UNet's call; 0 without image prompts."""
    found = (arguments.get("added_cond_kwargs") or {}).get("image_embeds")
    if found is None:
        return 0
    first = found[0] if isinstance(found, list | tuple) else found
    return int(first.shape[1]) if first.dim() > 2 else 1


class PromptCheck:
    """Whether a call's text is that of prompts known beforehand.

    Args:
        prompts: encodings [1, L, C] of the prompts of the batch.
    """

    def __init__(self, prompts: "Sequence[Tensor]") -> None:
        from gensparse.families import TensorMemo

        self._prompts, self._memo = list(prompts), TensorMemo()

    def reason(self, text: Any, guided: bool) -> str | None:
        """Why a call's text [B, L, C] is another one, or None; compared once for a text that stays."""
        return self._memo.get(text, lambda given: self._compare(given, guided))

    def _compare(self, text: "Tensor", guided: bool) -> str | None:
        import torch

        rows = text[len(text) // 2 :] if guided else text
        known = torch.cat(self._prompts).to(rows)
        if len(rows) % len(known):
            return f"it was made for {len(known)} prompts, and the call has {len(rows)} pictures"
        known = known.repeat_interleave(len(rows) // len(known), 0)
        if rows.shape[2] != known.shape[2] or rows.shape[1] < known.shape[1]:
            return "the call's text has another size than its prompt"
        lost = (rows[:, : known.shape[1]] - known).float().norm() / known.float().norm()
        return None if float(lost) <= SAME else "the call's prompt is another one than its own"


def prompts_of(name: str, value: Any) -> tuple[str, ...]:
    """One prompt or several, as a tuple; () for None.

    Raises:
        ConfigError: something else than text.
    """
    if value is None:
        return ()
    given = (value,) if isinstance(value, str) else value
    if not isinstance(given, tuple | list) or not given or not all(isinstance(item, str) for item in given):
        raise ConfigError(f"{name} prompt={short(value)} is not allowed; pass the prompt, or one per picture.")
    return tuple(given)


def word_lists(name: str, setting: str, value: Any) -> tuple[str, ...] | None:
    """Words or phrases, from a text with commas or a list; None stays.

    Raises:
        ConfigError: something else than texts.
    """
    if value is None:
        return None
    given = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    if not isinstance(given, tuple | list) or not all(isinstance(item, str) and item.strip() for item in given):
        raise ConfigError(f"{name} {setting}={short(value)} is not allowed; pass words, as a list or with commas.")
    return tuple(item.strip() for item in given)
