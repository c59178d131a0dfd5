"""Z-Image pictures beyond the trained size in one run, see `gensparse.pipelines.direct`."""

from typing import ClassVar

from diffusers import ZImagePipeline

from gensparse.highres.stretched import Rotary
from gensparse.pipelines.direct import Direct


class ZImageDirectPipeline(Direct, ZImagePipeline):
    r"""
    Text to image for Z-Image at any size, in one run. Rows and columns are stretched alike, as a port of DyPE to this
    model advises (wildminder/ComfyUI-DyPE).

    Components are those of [`ZImagePipeline`]: `ZImageDirectPipeline.from_pretrained("Tongyi-MAI/Z-Image-Turbo")`, or
    `ZImageDirectPipeline.from_pipe(pipe)`.
    """

    _rotary: ClassVar[Rotary] = Rotary("rope_embedder.freqs_cis", "lookup", isotropic=True)

    @property
    def _patch(self) -> int:
        return self.transformer.config.all_patch_size[0]
