"""Model families of diffusers: which modules hold attention, and what the tokens of a call are.

A family is a `FAMILY` value in a module of this package. It is found from the class of the model, never from a
checkpoint's name.
"""

from importlib import import_module
from typing import Any

from gensparse.errors import ConfigError
from gensparse.families.base import CROSS, Family, Layouts, TensorMemo, WithKeys, attention_modules, bound_call

FAMILIES = {
    "FluxTransformer2DModel": "gensparse.families.flux",
    "FluxControlNetModel": "gensparse.families.flux",
    "ChromaTransformer2DModel": "gensparse.families.chroma",
    "Flux2Transformer2DModel": "gensparse.families.flux2",
    "QwenImageTransformer2DModel": "gensparse.families.qwenimage",
    "QwenImageControlNetModel": "gensparse.families.qwenimage",
    "Lumina2Transformer2DModel": "gensparse.families.lumina2",
    "ZImageTransformer2DModel": "gensparse.families.zimage",
    "UNet2DConditionModel": "gensparse.families.unet",
    "UNetMotionModel": "gensparse.families.unet",
    "ControlNetModel": "gensparse.families.unet",
    "PixArtTransformer2DModel": "gensparse.families.pixart",
    "SD3Transformer2DModel": "gensparse.families.sd3",
    "SD3ControlNetModel": "gensparse.families.sd3",
    "AuraFlowTransformer2DModel": "gensparse.families.auraflow",
    "CogView4Transformer2DModel": "gensparse.families.cogview4",
    "CogView3PlusTransformer2DModel": "gensparse.families.cogview4",
    "HunyuanImageTransformer2DModel": "gensparse.families.hunyuanimage",
    "HunyuanDiT2DModel": "gensparse.families.hunyuandit",
    "HunyuanDiT2DControlNetModel": "gensparse.families.hunyuandit",
    "HiDreamImageTransformer2DModel": "gensparse.families.hidream",
    "SanaTransformer2DModel": "gensparse.families.sana",
    "SanaControlNetModel": "gensparse.families.sana",
    "SanaVideoTransformer3DModel": "gensparse.families.sana",
    "WanTransformer3DModel": "gensparse.families.wan",
    "WanVACETransformer3DModel": "gensparse.families.wan",
    "SkyReelsV2Transformer3DModel": "gensparse.families.skyreels",
    "HunyuanVideoTransformer3DModel": "gensparse.families.hunyuan_video",
    "HunyuanVideoFramepackTransformer3DModel": "gensparse.families.hunyuan_framepack",
    "HunyuanVideo15Transformer3DModel": "gensparse.families.hunyuan_video15",
    "CogVideoXTransformer3DModel": "gensparse.families.cogvideox",
    "ConsisIDTransformer3DModel": "gensparse.families.cogvideox",
    "MochiTransformer3DModel": "gensparse.families.mochi",
    "LTXVideoTransformer3DModel": "gensparse.families.ltx",
    "LTX2VideoTransformer3DModel": "gensparse.families.ltx",
    "Kandinsky5Transformer3DModel": "gensparse.families.kandinsky5",
    "CosmosTransformer3DModel": "gensparse.families.cosmos",
}
"""Model class name -> module of its family; subclasses of a listed class belong to the same family."""

__all__ = [
    "CROSS",
    "FAMILIES",
    "Family",
    "Layouts",
    "TensorMemo",
    "WithKeys",
    "attention_modules",
    "bound_call",
    "family_named",
    "family_of",
    "notes_of",
]


def family_of(model: Any) -> Family:
    """The family of a denoiser (or of a control net).

    Raises:
        ConfigError: no class of the model is listed in `FAMILIES`.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            return family_named(cls.__name__)
    known = ", ".join(sorted(FAMILIES))
    raise ConfigError(f"{type(model).__name__} belongs to no supported family; supported model classes are {known}.")


def family_named(model_class: str) -> Family:
    """The family of a class of `FAMILIES`."""
    return import_module(FAMILIES[model_class]).FAMILY


def notes_of(model_class: str) -> str:
    """What to know of the family of a class of `FAMILIES`: what its tokens are, and what is special."""
    return " ".join((import_module(FAMILIES[model_class]).__doc__ or "").split())
