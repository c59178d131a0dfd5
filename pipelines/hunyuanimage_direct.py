"""HunyuanImage 2.1 pictures beyond the trained size in one run, see `gensparse.pipelines.direct`."""

from typing import ClassVar

from diffusers import HunyuanImagePipeline

from gensparse.highres.stretched import Rotary
from gensparse.pipelines.direct import Direct


class HunyuanImageDirectPipeline(Direct, HunyuanImagePipeline):
    r"""
    Text to image for HunyuanImage 2.1 at any size, in one run. Text has no positions in this model, so that it gains
    the rule's factor on one side only.

    Components are those of [`HunyuanImagePipeline`]:
    `HunyuanImageDirectPipeline.from_pretrained("hunyuanvideo-community/HunyuanImage-2.1-Diffusers")`, or
    `HunyuanImageDirectPipeline.from_pipe(pipe)`.
    """

    _rotary: ClassVar[Rotary] = Rotary("rope", "latents")

    @property
    def _patch(self) -> int:
        return self.transformer.config.patch_size[-1]
