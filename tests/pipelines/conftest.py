"""A tiny FLUX pipeline whose native size is 32 pixels, so that 128 pixels are a cascade of three stages."""

import pytest
import torch

from gensparse.pipelines import FluxHighresPipeline
from gensparse.testing.tiny import tiny_flux_pipeline


@pytest.fixture(scope="session")
def stock():
    """diffusers' own pipeline; shares its modules with `pipe`."""
    pipe = tiny_flux_pipeline()
    pipe.scheduler = type(pipe.scheduler).from_config(
        pipe.scheduler.config, use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=64
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(stock):
    out = FluxHighresPipeline.from_pipe(stock)
    out.set_progress_bar_config(disable=True)
    return out


@pytest.fixture
def call():
    """Arguments of a short call; every use draws from the same seed."""

    def arguments(seed: int = 3, **more):
        return {
            "prompt": "a cat",
            "num_inference_steps": 4,
            "max_sequence_length": 16,
            "guidance_scale": 3.0,
            "output_type": "pt",
            "generator": torch.Generator().manual_seed(seed),
            **more,
        }

    return arguments
