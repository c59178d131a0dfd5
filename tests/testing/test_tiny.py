"""The tiny pipelines are complete, repeatable, and leave the caller's random state alone."""

from pathlib import Path

import torch
from diffusers import FluxPipeline

from gensparse.testing.tiny import tiny_flux_pipeline, tiny_flux_transformer


def latents(pipe: FluxPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    call = {"height": 32, "width": 48, "num_inference_steps": 1, "max_sequence_length": 16, "output_type": "latent"}
    return pipe("a cat", generator=generator, **call).images


def test_pipeline_survives_saving_and_loading(tmp_path: Path) -> None:
    pipe = tiny_flux_pipeline()
    pipe.save_pretrained(tmp_path)
    torch.testing.assert_close(latents(FluxPipeline.from_pretrained(tmp_path)), latents(pipe), atol=1e-5, rtol=0)


def test_pipeline_hears_its_prompt() -> None:
    pipe = tiny_flux_pipeline()
    embeds = [pipe.encode_prompt(words, words, max_sequence_length=16)[:2] for words in ("a cat", "a dog")]
    assert all(not torch.equal(one, other) for one, other in zip(*embeds, strict=True))


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    models = [tiny_flux_transformer(seed=seed).state_dict() for seed in (0, 0, 1)]
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(weight, models[1][name]) for name, weight in models[0].items())
    assert not torch.equal(models[0]["proj_out.weight"], models[2]["proj_out.weight"])


def test_no_weight_is_left_at_zero() -> None:
    assert all(weight.abs().min() > 0 for weight in tiny_flux_transformer().parameters())
