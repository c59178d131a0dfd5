"""Stages that draw a given picture anew only where a mask marks it."""

import numpy as np
import pytest
import torch

from gensparse.pipelines import highres_class
from gensparse.testing.tiny import tiny_pipeline

SHORT = {"prompt": "a cat", "num_inference_steps": 3, "output_type": "latent", "height": 64, "width": 48}
MORE = {"flux": {"max_sequence_length": 16}, "qwenimage": {"max_sequence_length": 16}, "sdxl": {}}


@pytest.fixture(scope="module", params=MORE)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(name):
    stock = tiny_pipeline(name)
    facts = {"gensparse_config": {"native_size": 32}} if name in ("flux", "qwenimage") else {}
    out = highres_class(stock).from_pipe(stock, **facts)
    out.set_progress_bar_config(disable=True)
    return out


def latents(pipe, name: str, strength: float) -> torch.Tensor:
    image = np.random.default_rng(0).integers(0, 256, (40, 28, 3), dtype=np.uint8)
    out = pipe(**SHORT, **MORE[name], image=image, strength=strength, generator=torch.Generator().manual_seed(1)).images
    if out.ndim == 4:
        return out
    return pipe._unpack(out, pipe.plan(64, 48)[-1])


def test_latents_without_a_marked_pixel_stay_those_of_the_enlargement(pipe, name):
    mask = np.zeros((64, 48), np.uint8)
    mask[20:37, 10:30] = 1
    kept, free = latents(pipe, name, 0.0), latents(pipe, name, 0.8)
    with pipe.changing_only(mask):
        part = latents(pipe, name, 0.8)
    rows, columns = (n // m for n, m in zip((64, 48), kept.shape[-2:], strict=True))
    cells = torch.nn.functional.max_pool2d(torch.from_numpy(mask)[None].float(), (rows, columns))[0] > 0
    assert torch.equal(part[..., ~cells], kept[..., ~cells])
    assert (part[..., cells] != kept[..., cells]).float().mean() > 0.9
    assert torch.equal(latents(pipe, name, 0.8), free)  # and nothing of the mask is left


def test_a_mask_that_marks_everything_changes_nothing(pipe, name):
    free = latents(pipe, name, 0.8)
    with pipe.changing_only(np.full((64, 48), 255, np.uint8)):
        assert torch.equal(latents(pipe, name, 0.8), free)
