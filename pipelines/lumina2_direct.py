"""Lumina Image 2.0 pictures beyond the trained size in one run, see `gensparse.pipelines.direct`."""

from typing import ClassVar

from diffusers import Lumina2Pipeline

from gensparse.highres.stretched import Rotary
from gensparse.pipelines.direct import Direct


class Lumina2DirectPipeline(Direct, Lumina2Pipeline):
    r"""
    Text to image for Lumina Image 2.0 at any size, in one run. Rows and columns are stretched alike, as a port of DyPE
    to this model advises (wildminder/ComfyUI-DyPE).

    Components are those of [`Lumina2Pipeline`]: `Lumina2DirectPipeline.from_pretrained("Alpha-VLLM/Lumina-Image-2.0")`,
    or `Lumina2DirectPipeline.from_pipe(pipe)`.
    """

    _rotary: ClassVar[Rotary] = Rotary("rope_embedder.freqs_cis", "lookup", isotropic=True)

    @property
    def _patch(self) -> int:
        return self.transformer.config.patch_size
