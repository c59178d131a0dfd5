"""Pipelines in diffusers' manner, one readable file each; they load on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "ChromaDirectPipeline": "gensparse.pipelines.chroma_direct",
    "Flux2DirectPipeline": "gensparse.pipelines.flux2_direct",
    "Flux2KleinDirectPipeline": "gensparse.pipelines.flux2_direct",
    "HunyuanImageDirectPipeline": "gensparse.pipelines.hunyuanimage_direct",
    "Lumina2DirectPipeline": "gensparse.pipelines.lumina2_direct",
    "ZImageDirectPipeline": "gensparse.pipelines.zimage_direct",
    "CUpscale": "gensparse.pipelines.c_upscale",
    "ClearStages": "gensparse.pipelines.flux_ways",
    "FluxCustomizePipeline": "gensparse.pipelines.flux_customize",
    "FluxHighresPipeline": "gensparse.pipelines.flux_highres",
    "MultiDiffusion": "gensparse.pipelines.multidiffusion",
    "PixArtCustomizePipeline": "gensparse.pipelines.pixart_customize",
    "PixArtHighresPipeline": "gensparse.pipelines.pixart_highres",
    "QwenImageHighresPipeline": "gensparse.pipelines.qwenimage_highres",
    "SD15CustomizePipeline": "gensparse.pipelines.sd15_customize",
    "SD15HighresPipeline": "gensparse.pipelines.sd15_highres",
    "SD3CustomizePipeline": "gensparse.pipelines.sd3_customize",
    "SD3HighresPipeline": "gensparse.pipelines.sd3_highres",
    "SDXLCustomizePipeline": "gensparse.pipelines.sdxl_customize",
    "SDXLHighresPipeline": "gensparse.pipelines.sdxl_highres",
    "ScaleDiTStages": "gensparse.pipelines.flux_ways",
    "VisionCaptioner": "gensparse.subjects.captions",
    "highres_class": "gensparse.pipelines.registry",
}

__all__ = [
    "CUpscale",
    "ChromaDirectPipeline",
    "ClearStages",
    "Flux2DirectPipeline",
    "Flux2KleinDirectPipeline",
    "FluxCustomizePipeline",
    "FluxHighresPipeline",
    "HunyuanImageDirectPipeline",
    "Lumina2DirectPipeline",
    "MultiDiffusion",
    "PixArtCustomizePipeline",
    "PixArtHighresPipeline",
    "QwenImageHighresPipeline",
    "SD3CustomizePipeline",
    "SD3HighresPipeline",
    "SD15CustomizePipeline",
    "SD15HighresPipeline",
    "SDXLCustomizePipeline",
    "SDXLHighresPipeline",
    "ScaleDiTStages",
    "VisionCaptioner",
    "ZImageDirectPipeline",
    "highres_class",
]

if TYPE_CHECKING:
    from gensparse.pipelines.c_upscale import CUpscale
    from gensparse.pipelines.chroma_direct import ChromaDirectPipeline
    from gensparse.pipelines.flux2_direct import Flux2DirectPipeline, Flux2KleinDirectPipeline
    from gensparse.pipelines.flux_customize import FluxCustomizePipeline
    from gensparse.pipelines.flux_highres import FluxHighresPipeline
    from gensparse.pipelines.flux_ways import ClearStages, ScaleDiTStages
    from gensparse.pipelines.hunyuanimage_direct import HunyuanImageDirectPipeline
    from gensparse.pipelines.lumina2_direct import Lumina2DirectPipeline
    from gensparse.pipelines.multidiffusion import MultiDiffusion
    from gensparse.pipelines.pixart_customize import PixArtCustomizePipeline
    from gensparse.pipelines.pixart_highres import PixArtHighresPipeline
    from gensparse.pipelines.qwenimage_highres import QwenImageHighresPipeline
    from gensparse.pipelines.registry import highres_class
    from gensparse.pipelines.sd3_customize import SD3CustomizePipeline
    from gensparse.pipelines.sd3_highres import SD3HighresPipeline
    from gensparse.pipelines.sd15_customize import SD15CustomizePipeline
    from gensparse.pipelines.sd15_highres import SD15HighresPipeline
    from gensparse.pipelines.sdxl_customize import SDXLCustomizePipeline
    from gensparse.pipelines.sdxl_highres import SDXLHighresPipeline
    from gensparse.pipelines.zimage_direct import ZImageDirectPipeline
    from gensparse.subjects.captions import VisionCaptioner


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'gensparse.pipelines' has no attribute {name!r}")
