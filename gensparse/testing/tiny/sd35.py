"""Stable Diffusion 3.5 medium: Stable Diffusion 3 whose first block also has an attention of the picture alone."""

from functools import partial

from gensparse.testing.tiny import sd3
from gensparse.testing.tiny.sd3 import call, inputs

__all__ = ["call", "denoiser", "inputs", "pipeline"]

denoiser = partial(sd3.denoiser, dual_layers=(0,))
pipeline = partial(sd3.pipeline, dual_layers=(0,))
