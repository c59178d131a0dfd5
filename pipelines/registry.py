"""Which pipelines have stages here, and what to say of the others."""

import logging
import re
from importlib import import_module
from inspect import signature
from typing import Any

from gensparse.errors import ConfigError

_LOG = logging.getLogger(__name__)

BY_DENOISER = {
    "FluxTransformer2DModel": "FluxHighresPipeline",
    "SD3Transformer2DModel": "SD3HighresPipeline",
    "QwenImageTransformer2DModel": "QwenImageHighresPipeline",
    "PixArtTransformer2DModel": "PixArtHighresPipeline",
}
"""Class of the denoiser -> pipeline of stages."""

AT_ONCE = {
    "ChromaTransformer2DModel": "ChromaDirectPipeline",
    "Flux2Transformer2DModel": "Flux2DirectPipeline",
    "Lumina2Transformer2DModel": "Lumina2DirectPipeline",
    "ZImageTransformer2DModel": "ZImageDirectPipeline",
    "HunyuanImageTransformer2DModel": "HunyuanImageDirectPipeline",
}
"""Class of the denoiser -> pipeline that makes the size at once, with stretched positions."""

NOT_AT_ONCE = {
    "CogView4Transformer2DModel": "its positions are shares of the picture, the same at every size",
    "HiDreamImageTransformer2DModel": "its pipeline makes every size one of the trained area",
    "HunyuanDiT2DModel": "its pipeline puts every size on the positions of training",
    "AuraFlowTransformer2DModel": "its positions are a learned table without rotary frequencies",
    "CogView3PlusTransformer2DModel": "its positions are a table without rotary frequencies",
    "SanaTransformer2DModel": "it has no positions",
}
"""Class of a denoiser of pictures -> why there is nothing to stretch."""

OTHER_TASKS = r"Edit|Layered|Fill|Kontext|Control(?!Net)"
"""In the names of pipelines whose models take pictures beside the one they make, which no stages have."""


def highres_name(pipeline: Any) -> str:
    """Name of the pipeline of stages, in `gensparse.pipelines`, that takes over the parts of a diffusers pipeline.

    Raises:
        ConfigError: there is none for its family, or for what it does.
    """
    kind = type(pipeline).__name__
    names = [cls.__name__ for cls in type(_denoiser(pipeline)).__mro__]
    if re.search(OTHER_TASKS, kind):
        raise ConfigError(
            f"{kind} takes pictures beside the one it makes, which no stages have yet; make the picture with it, and "
            "enlarge it with the text-to-image model of its family (image=...)."
        )
    for name in names:
        if name in BY_DENOISER:
            return BY_DENOISER[name]
        if name in AT_ONCE:
            found = AT_ONCE[name]
            return found.replace("Flux2", "Flux2Klein") if "Klein" in kind else found
    if "UNet2DConditionModel" in names:
        return "SDXLHighresPipeline" if getattr(pipeline, "text_encoder_2", None) is not None else "SD15HighresPipeline"
    why = next((f", and {NOT_AT_ONCE[name]}" for name in names if name in NOT_AT_ONCE), "")
    raise ConfigError(
        f"{kind} ({names[0]}) has no stages yet{why}; FLUX.1, Stable Diffusion 3, QwenImage, PixArt, Stable Diffusion "
        "XL and 1.5 have. Use gensparse.apply(pipe, method) with its own pipeline, or enlarge its picture with one of "
        "those (image=...)."
    )


def highres_class(pipeline: Any) -> type:
    """The pipeline of stages for a diffusers pipeline: `highres_class(pipe).from_pipe(pipe)`.

    Raises:
        ConfigError: as `highres_name`.
    """
    return getattr(import_module("gensparse.pipelines"), highres_name(pipeline))


def check_source(pipeline: Any, cls: type) -> None:
    """ConfigError unless `cls.from_pipe(pipeline)` makes sense."""
    name = highres_name(pipeline)
    if name not in [base.__name__ for base in cls.__mro__]:
        raise ConfigError(
            f"{cls.__name__} cannot take the parts of {type(pipeline).__name__}; use {name}.from_pipe(pipe)."
        )
    say_left_out(pipeline, cls)


def say_left_out(pipeline: Any, cls: type) -> None:
    """Log what `cls.from_pipe(pipeline)` does not take over."""
    if getattr(pipeline, "controlnet", None) is not None and "controlnet" not in signature(cls.__init__).parameters:
        _LOG.warning("The ControlNet of %s is left out: %s has none.", type(pipeline).__name__, cls.__name__)


def _denoiser(pipeline: Any) -> Any:
    found = getattr(pipeline, "transformer", None)
    found = getattr(pipeline, "unet", None) if found is None else found
    return getattr(found, "_orig_mod", found)
