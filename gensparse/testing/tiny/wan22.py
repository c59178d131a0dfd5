"""Wan 2.2, text to video: one denoiser for the noisy steps, another for the rest."""

from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

from gensparse.testing.tiny.wan import call, denoiser, inputs, shared_parts

__all__ = ["call", "denoiser", "inputs", "pipeline"]


def pipeline(*, seed: int = 0) -> WanPipeline:
    """A Wan 2.2 pipeline; `call` takes its first step with `transformer`, its second with `transformer_2`."""
    return WanPipeline(
        **shared_parts(seed=seed),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=denoiser(seed=seed),
        transformer_2=denoiser(seed=seed + 1),
        boundary_ratio=0.875,
    )
