"""Subjects: who is in the pictures of a run, where, and from which reference. What methods for several subjects get."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gensparse.errors import ConfigError
from gensparse.subjects.read_masks import read_mask


@dataclass(frozen=True, eq=False, init=False)
class Concept:
    """One subject, and the reference picture that shows it.

    Args:
        name: for messages, and by which a bank knows it.
        mask: where it is in its reference picture, see `read_mask`; None for all of that picture. Any size.
        region: where it is to be in the new picture, likewise; None where the method finds that out or needs none.
        regions: the same, one for each of several new pictures, in the place of `region`.
        latents: of the reference picture, clean, as the denoiser gets them but for its batch: [C, h, w] of UNets and
            Stable Diffusion 3, [tokens, C] of FLUX (`encode_picture` makes them). With latents the picture is
            given, and noised to the level of each step; None for one that is generated along.
        tokens: places of its words in the prompt (0 is the first token of the text encoder's input), for methods that
            look at cross-attention; one tuple for all prompts, or one per picture of the batch.
        subject: whom it shows, where several reference pictures show one: they share its region; by default its name.

    Raises:
        ConfigError: a name that is no text, a mask of another form, or latents or tokens of another form.
    """

    name: str
    mask: Tensor | None = None
    region: Tensor | None = None
    latents: Tensor | None = None
    tokens: tuple[Any, ...] = ()
    subject: str = ""
    regions: tuple[Tensor, ...] = ()

    def __init__(
        self,
        name: str,
        mask: Any = None,
        region: Any = None,
        latents: Tensor | None = None,
        tokens: Sequence[Any] = (),
        subject: str | None = None,
        regions: Sequence[Any] = (),
    ) -> None:
        if not (isinstance(name, str) and name.strip()):
            raise ConfigError(f"Concept name={name!r} is not allowed; pass a name.")
        if latents is not None and not (isinstance(latents, Tensor) and latents.dim() in (2, 3)):
            shape = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            raise ConfigError(f"Concept {name!r} has latents {shape}; pass [C, height, width], or [tokens, C] of FLUX.")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "mask", None if mask is None else read_mask(mask))
        object.__setattr__(self, "region", None if region is None else read_mask(region))
        object.__setattr__(self, "latents", latents)
        object.__setattr__(self, "tokens", _places(name, tokens))
        object.__setattr__(self, "subject", subject or name)
        object.__setattr__(self, "regions", tuple(read_mask(one) for one in regions))
        if region is not None and self.regions:
            raise ConfigError(f"Concept {name!r} has region and regions; pass one of both.")

    def region_of(self, picture: int) -> Tensor | None:
        """Where it is to be in a new picture, by its number among them."""
        return self.regions[picture] if self.regions else self.region

    def places(self, picture: int) -> tuple[int, ...]:
        """Places of its words in the prompt of a picture of the batch."""
        if self.tokens and isinstance(self.tokens[0], tuple):
            return self.tokens[picture] if picture < len(self.tokens) else ()
        return self.tokens


@dataclass(frozen=True, eq=False, init=False)
class Subjects:
    """The subjects of a run, in the order of their reference pictures in the batch.

    `Subjects(Concept("cat", mask="cat.png"), Concept("hat", mask=box_mask((0, 0, 0.5, 0.3), (512, 512))))`

    Raises:
        ConfigError: something that is no `Concept`, two of one name, or references of which only some have latents.
    """

    concepts: tuple[Concept, ...]

    def __init__(self, *concepts: Concept) -> None:
        items = tuple(concepts[0]) if len(concepts) == 1 and isinstance(concepts[0], list | tuple) else concepts
        if not all(isinstance(item, Concept) for item in items):
            raise ConfigError(f"Subjects got {[type(item).__name__ for item in items]}; pass Concept values.")
        names = [item.name for item in items]
        if len(set(names)) != len(names):
            raise ConfigError(f"Subjects are named {names}; give each a name of its own.")
        given = [item.latents is not None for item in items]
        if any(given) and not all(given):
            missing = [item.name for item in items if item.latents is None]
            raise ConfigError(f"Subjects {missing} have no latents and others have; give all of them latents, or none.")
        object.__setattr__(self, "concepts", items)

    def __len__(self) -> int:
        return len(self.concepts)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(item.name for item in self.concepts)

    @property
    def owners(self) -> tuple[int, ...]:
        """Number of the subject that every concept shows, from 0 in the order in which they appear."""
        known = list(dict.fromkeys(item.subject for item in self.concepts))
        return tuple(known.index(item.subject) for item in self.concepts)

    def __getitem__(self, name: str) -> Concept:
        """The concept of a name; ConfigError where there is none."""
        found = next((item for item in self.concepts if item.name == name), None)
        if found is None:
            raise ConfigError(f"There is no subject {name!r}; there are {', '.join(self.names) or 'none'}.")
        return found


def token_places(tokenizer: Any, prompt: str, word: str) -> tuple[int, ...]:
    """Places of the tokens of a word (or words) in a prompt, as `Concept.tokens` wants them; () where it is not there.

    Args:
        tokenizer: of the pipeline, such as `pipe.tokenizer`.

    The last occurrence counts where a word is repeated.
    """
    own = _ids(tokenizer, word)
    own = own[_leading(tokenizer) : len(own) - _trailing(tokenizer)]
    every = _ids(tokenizer, prompt)
    starts = [n for n in range(len(every) - len(own) + 1) if own and every[n : n + len(own)] == own]
    return tuple(range(starts[-1], starts[-1] + len(own))) if starts else ()


def encode_picture(pipe: Any, picture: Any, height: int, width: int) -> Tensor:
    """Clean latents of a reference picture for `Concept.latents`: the mean of the autoencoder, never a sample.

    Args:
        pipe: a diffusers pipeline with `vae` and `image_processor`, of a UNet, Stable Diffusion 3 or FLUX.
        picture: what the pipeline's image processor takes: a PIL picture, an array or a tensor.
        height, width: pixels of the generated picture.

    Raises:
        ConfigError: a pipeline without an autoencoder of pictures.
    """
    vae, processor = getattr(pipe, "vae", None), getattr(pipe, "image_processor", None)
    if vae is None or processor is None or not hasattr(vae, "encode"):
        raise ConfigError(f"{type(pipe).__name__} has no vae and image_processor; encode the picture on your own.")
    pixels = processor.preprocess(picture, height=height, width=width)
    parameter = next(vae.parameters())
    device, dtype = getattr(pipe, "_execution_device", parameter.device), parameter.dtype
    wide = dtype == torch.float16 and bool(getattr(vae.config, "force_upcast", False))  # SDXL's overflows in fp16
    try:
        if wide:
            vae.to(torch.float32)
        with torch.no_grad():
            latents = vae.encode(pixels.to(device, torch.float32 if wide else dtype)).latent_dist.mode()
    finally:
        if wide:
            vae.to(dtype)
    latents = (latents - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor
    return pack(latents)[0] if hasattr(pipe, "_pack_latents") else latents[0]


def pack(latents: Tensor) -> Tensor:
    """Latents [B, C, h, w] as FLUX takes them: [B, h/2 * w/2, 4 C], a token per 2 x 2 cells."""
    batch, channels, height, width = latents.shape
    cells = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 4 * channels)


def of_names(subjects: Subjects | None, count: int, prefix: str = "reference") -> tuple[str, ...]:
    """Names of `count` reference pictures: of the subjects as far as there are any, then numbers."""
    known = () if subjects is None else subjects.names
    return (*known[:count], *(f"{prefix}{number}" for number in range(len(known), count)))


def _places(name: str, tokens: Iterable[Any]) -> tuple[Any, ...]:
    try:
        found = tuple(tuple(entry) if isinstance(entry, list | tuple) else entry for entry in tokens)
    except TypeError:
        found = (None,)
    nested = all(isinstance(entry, tuple) for entry in found)
    flat = [place for entry in found for place in entry] if nested else list(found)
    if not all(isinstance(place, int) and not isinstance(place, bool) and place >= 0 for place in flat):
        raise ConfigError(
            f"Concept {name!r} has tokens={tokens!r}; pass places in the prompt, such as (2, 3), or one such tuple per "
            "picture."
        )
    return found


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text).input_ids)


def _leading(tokenizer: Any) -> int:
    """Tokens that the tokenizer puts before every text."""
    empty = _ids(tokenizer, "")
    return len(empty) - _trailing(tokenizer)


def _trailing(tokenizer: Any) -> int:
    """Tokens that it puts behind every text: those of the empty text from the end-of-text token on."""
    empty = _ids(tokenizer, "")
    end = getattr(tokenizer, "eos_token_id", None)
    return len(empty) - empty.index(end) if end in empty else 0
