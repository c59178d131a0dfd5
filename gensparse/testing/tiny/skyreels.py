"""SkyReels V2, text to video: Wan's make with classes of its own."""

from typing import Any

from diffusers import SkyReelsV2Pipeline, SkyReelsV2Transformer3DModel, UniPCMultistepScheduler

from gensparse.testing.tiny import wan
from gensparse.testing.tiny.parts import seeded, with_noise
from gensparse.testing.tiny.wan import inputs

__all__ = ["call", "denoiser", "inputs", "pipeline"]


def pipeline(*, seed: int = 0) -> SkyReelsV2Pipeline:
    """A SkyReels pipeline with Wan's autoencoder: 16 pixels per token and axis."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)
    return SkyReelsV2Pipeline(
        **wan.shared_parts(seed=seed),
        scheduler=scheduler,
        transformer=denoiser(seed=seed),
    )


def denoiser(*, seed: int = 0, **more: Any) -> SkyReelsV2Transformer3DModel:
    """A denoiser of 2 blocks with 2 heads of 12, in eval mode.

    Args:
        more: further or other arguments of `SkyReelsV2Transformer3DModel`, such as `num_frame_per_block=2`, which makes
            the self-attention causal over blocks of 2 frames.
    """
    with seeded(seed):
        return with_noise(SkyReelsV2Transformer3DModel(**{**wan.SIZES, **more})).eval()


def call() -> dict[str, Any]:
    """Arguments of a cheap call of the pipeline: 3 x 4 x 5 tokens, 2 steps."""
    return {**wan.text_embeds(16), **wan.video()}
