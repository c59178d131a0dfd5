"""Scale-DiT: windows, and a clean low-resolution picture as global anchor of every layer (2510.16325)."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from gensparse.errors import ConfigError
from gensparse.layout import Layout
from gensparse.methods.base import START, At, Dense, Loaded, Method, Place, Recording, Subject
from gensparse.methods.checks import whole
from gensparse.methods.lora import LoRA
from gensparse.methods.weights import find, opened, place_of
from gensparse.patterns import Anchors, AnchorStream, Pattern
from gensparse.patterns.anchors import ANCHORS

FILE = "pytorch_lora_weights.safetensors"
"""Name of the published LoRA."""

_FAMILIES = ("FLUX.1", "FLUX.2")


@dataclass(frozen=True)
class ScaleDiT(Method):
    """Picture tokens see text, a box around themselves, and anchors: a small version of the picture, free of noise.

    The anchors go through the whole network as a stream of their own, at timestep 0, and see only each other. So their
    keys and values are the same in all steps, and are recorded once, before the high-resolution steps:

        handle = gensparse.apply(pipe, ScaleDiT(weights="pytorch_lora_weights.safetensors"))
        handle.record(hidden_states=low, img_ids=low_ids, encoder_hidden_states=prompt_embeds, txt_ids=text_ids,
                      pooled_projections=pooled, guidance=guidance)

    where `low` are the packed latents of the picture at 1/ratio of the size, and `low_ids` its position ids as for a
    picture of that size. Calls before the recording run dense, which is how that picture is made. Record again for
    another prompt, guidance, picture or rotary base: the anchors depend on them. They take 2 x layers x anchors x width
    numbers (3 GB for FLUX at 4096 x 4096 in bf16); `keep_on="cpu"` spares the GPU.
    `FluxHighresPipeline` does all of it in one call, highres="scale_dit".

    The LoRA is active for the anchors alone. Without it they are what the model makes of a clean picture, untrained:
    an experiment. The published pipeline also raises the rotary base by 10 while anchors are used.

    Args:
        window: target tokens per axis, one value or (H, W); tokens see half of it to each side.
        ratio: target tokens per anchor and axis.
        neighbours: "faithful": the anchors of the own window and of the previous and next one in raster order, as the
            weights were trained. "3x3": those of the windows around it.
        text_sees_anchors: whether text queries see the anchors.
        closure: (query block, key block) of the authors' kernel, which computes every block with a visible pair wholly;
            None: the table exactly.
        weights: the LoRA: a safetensors file, a folder with `pytorch_lora_weights.safetensors`, or
            owner/name[@revision] of a hub repository with that file.

    Raises:
        ConfigError: a setting of the wrong type or range, or (when applied) another model than FLUX, or a LoRA that
            does not fit it.
        ModelError: (when applied) weights that are missing, gated, offline or damaged.
    """

    name: ClassVar[str] = "scale_dit"
    records: ClassVar[bool] = True
    paper: ClassVar[str] = "Scale-DiT, renamed UltraImageGen (Zhang, Tai), arXiv 2510.16325"
    licence: ClassVar[str] = "code MIT; the LoRAs follow the terms of FLUX.1-dev and FLUX.2-klein"
    use: ClassVar[str] = "FLUX pictures of 4K from a 1K picture of the same prompt, with the published LoRA"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "flux.1-dev": {"window": 16, "ratio": 4, "closure": (128, 64)},
        "flux.2-klein": {"window": 16, "ratio": 4, "closure": (128, 64)},
    }

    window: int | tuple[int, int] = 16
    ratio: int = 4
    neighbours: str = "faithful"
    text_sees_anchors: bool = False
    closure: tuple[int, int] | None = None
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.neighbours == (3, 3):  # what the text "3x3" is read as
            object.__setattr__(self, "neighbours", "3x3")
        checked = Anchors(self.window, self.neighbours, self.text_sees_anchors, self.closure)
        object.__setattr__(self, "window", checked.window)
        object.__setattr__(self, "closure", checked.closure)
        whole(self.name, "ratio", self.ratio)
        place_of(self.name, self.weights)

    def resolved(self, subject: Subject) -> Self:
        if subject.family not in _FAMILIES:
            raise ConfigError(
                f"scale_dit needs text and picture in one sequence of a model of the {' or '.join(_FAMILIES)} family, "
                f"and {type(subject.model).__name__} is of {subject.family}; take clear or neighborhood there."
            )
        return self

    def pattern(self, layout: Layout, at: At = START) -> Pattern | Dense:
        low = next((segment.shape for segment in at.recorded if segment.name == ANCHORS), None)
        if low is None:
            return Dense("no anchors were recorded; call handle.record() with the low-resolution picture first")
        (_, height, width), (_, rows, columns) = layout.grid, low
        if (height // rows, width // columns) != (self.ratio, self.ratio):
            return Dense(
                f"the anchors of {rows} x {columns} tokens are not 1/{self.ratio} of {height} x {width}; record them "
                "for this size"
            )
        return Anchors(
            self.window, self.neighbours, self.text_sees_anchors, self.closure, low=(int(rows), int(columns))
        )

    def recorded(self, call: dict[str, Any]) -> dict[str, Any]:
        """Timestep 0, positions of the high-resolution picture, and one text token, which the anchors do not see."""
        import torch

        needed = ("hidden_states", "encoder_hidden_states", "img_ids", "txt_ids")
        missing = [name for name in needed if not isinstance(call.get(name), torch.Tensor)]
        if missing:
            raise ConfigError(
                f"scale_dit records a call with {', '.join(needed)}, and {', '.join(missing)} is missing; pass the "
                "arguments of the denoiser for the low-resolution picture."
            )
        picture, ids, words = call["hidden_states"], call["img_ids"].float(), call["txt_ids"]
        scale = torch.ones(ids.shape[-1], device=ids.device)
        scale[1:3] = self.ratio
        return {
            **call,
            "timestep": torch.zeros(picture.shape[0], dtype=picture.dtype, device=picture.device),
            "img_ids": ids * scale,
            "txt_ids": words[..., :1, :],
            "encoder_hidden_states": call["encoder_hidden_states"][:, :1],
        }

    def recording(self, layout: Layout, at: At = START) -> Recording:
        return Recording(AnchorStream(self.closure), ANCHORS)

    def load(self, subject: Subject, places: Mapping[str, Place]) -> Loaded | None:
        if self.weights is None:
            return None
        path = find(self.name, self.weights, FILE)
        with opened(self.name, path) as file:
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        return _Adapter(LoRA(subject.model, self.name, weights, path.name))


class _Adapter(Loaded):
    """The LoRA of the anchors."""

    def __init__(self, lora: LoRA) -> None:
        self._lora = lora

    def recording(self) -> AbstractContextManager[None]:
        return self._lora.on()

    def undo(self) -> None:
        self._lora.undo()
