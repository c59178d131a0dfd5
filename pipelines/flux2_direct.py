"""FLUX.2 pictures beyond the trained size in one run, see `gensparse.pipelines.direct`."""

from typing import ClassVar

from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from gensparse.highres.stretched import Rotary
from gensparse.pipelines.direct import Direct


class _Flux2(Direct):
    """Whose time shift is a measured function of tokens and steps, not the scheduler's line."""

    _rotary: ClassVar[Rotary] = Rotary("pos_embed", "ids")

    def _largest_shift(self, tokens: int, steps: int) -> float:
        return compute_empirical_mu(tokens, steps)


class Flux2DirectPipeline(_Flux2, Flux2Pipeline):
    r"""
    Text to image for FLUX.2 at any size, in one run. Pictures to edit (`image=`) are turned by the same frequencies as
    the new one.

    Components are those of [`Flux2Pipeline`]: `Flux2DirectPipeline.from_pretrained("black-forest-labs/FLUX.2-dev")`, or
    `Flux2DirectPipeline.from_pipe(pipe)`.
    """


class Flux2KleinDirectPipeline(_Flux2, Flux2KleinPipeline):
    r"""
    Text to image for FLUX.2 Klein at any size, in one run. Pictures to edit (`image=`) are turned by the same
    frequencies as the new one.

    Components are those of [`Flux2KleinPipeline`]:
    `Flux2KleinDirectPipeline.from_pretrained("black-forest-labs/FLUX.2-klein-base-9B")`, or
    `Flux2KleinDirectPipeline.from_pipe(pipe)`.
    """
