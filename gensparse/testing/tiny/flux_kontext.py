"""FLUX.1 Kontext: the denoiser of FLUX.1 with the tokens of a reference picture after the target's."""

from typing import Any

import torch
from diffusers import FluxKontextPipeline

from gensparse.testing.tiny import flux
from gensparse.testing.tiny.flux import denoiser
from gensparse.testing.tiny.parts import normal

__all__ = ["call", "denoiser", "inputs", "pipeline"]


def pipeline(*, seed: int = 0) -> FluxKontextPipeline:
    """A Kontext pipeline: 4 pixels per token and axis."""
    return FluxKontextPipeline(**flux.pipeline(seed=seed).components)


def inputs(
    height: int, width: int, *, text: int = 5, batch: int = 2, seed: int = 0, reference: tuple[int, int] = (3, 4)
) -> dict[str, Any]:
    """Arguments of the denoiser for a grid of height x width tokens and a reference picture of `reference` tokens."""
    target = flux.inputs(height, width, text=text, batch=batch, seed=seed)
    tokens = normal(seed + 1)(batch, reference[0] * reference[1], target["hidden_states"].shape[-1])
    return {
        **target,
        "hidden_states": torch.cat([target["hidden_states"], tokens], dim=1),
        "img_ids": torch.cat([target["img_ids"], flux.position_ids(*reference, picture=1)]),
    }


def call() -> dict[str, Any]:
    """Arguments of a cheap call of the pipeline: 8 x 12 tokens with a reference picture of 6 x 10."""
    picture = torch.linspace(0, 1, 24 * 40 * 3).reshape(1, 3, 24, 40)
    return {**flux.call(), "image": picture, "max_area": 32 * 48, "_auto_resize": False}
