"""Wan VACE: control blocks run beside the first blocks and add to them."""

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, WanVACEPipeline, WanVACETransformer3DModel

from gensparse.testing.tiny import wan
from gensparse.testing.tiny.parts import normal, seeded, with_noise

CONTROL = 2 * wan.LATENTS + 64
"""Channels of the control: kept and changed latents, and the mask's 8 x 8 pixels per latent cell."""


def pipeline(*, seed: int = 0) -> WanVACEPipeline:
    """A VACE pipeline; called without a video it is text to video with an empty control."""
    return WanVACEPipeline(
        **wan.shared_parts(seed=seed),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=denoiser(seed=seed),
    )


def denoiser(*, seed: int = 0, **more: Any) -> WanVACETransformer3DModel:
    """Wan's 2 blocks with a control block beside the first, in eval mode.

    Args:
        more: further or other arguments of `WanVACETransformer3DModel`.
    """
    sizes = {**wan.SIZES, "vace_layers": [0], "vace_in_channels": CONTROL}
    with seeded(seed):
        return with_noise(WanVACETransformer3DModel(**{**sizes, **more})).eval()


def inputs(frames: int, height: int, width: int, *, text: int = 5, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """Arguments of the denoiser for a grid of frames x height x width tokens and a control of the same size."""
    control = normal(seed + 1)(batch, CONTROL, frames, 2 * height, 2 * width)
    return {
        **wan.inputs(frames, height, width, text=text, batch=batch, seed=seed),
        "control_hidden_states": control,
    }


def call() -> dict[str, Any]:
    """Arguments of a cheap call of the pipeline: 3 x 4 x 5 tokens, 2 steps."""
    return {**wan.text_embeds(16), **wan.video()}
