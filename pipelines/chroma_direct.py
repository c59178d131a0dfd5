"""Chroma pictures beyond the trained size in one run, see `gensparse.pipelines.direct`."""

from typing import ClassVar

from diffusers import ChromaPipeline

from gensparse.highres.stretched import Rotary
from gensparse.pipelines.direct import Direct


class ChromaDirectPipeline(Direct, ChromaPipeline):
    r"""
    Text to image for Chroma at any size, in one run. Positions are those of FLUX.1.

    Components are those of [`ChromaPipeline`]: `ChromaDirectPipeline.from_pretrained("lodestones/Chroma1-HD")`, or
    `ChromaDirectPipeline.from_pipe(pipe)`.
    """

    _rotary: ClassVar[Rotary] = Rotary("pos_embed", "ids")
