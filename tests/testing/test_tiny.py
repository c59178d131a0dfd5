"""The tiny picture families: whole pipelines, and denoisers in which attention and text count."""

import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from gensparse.errors import ConfigError
from gensparse.testing.tiny import (
    IMAGES,
    PIPELINES,
    TINY,
    tiny_call,
    tiny_denoiser,
    tiny_flux_pipeline,
    tiny_inputs,
    tiny_pipeline,
)

GRID = (1, 7, 5)

# families that are told which of their text is padding
MASKED = ["chroma", "hunyuanimage", "lumina2", "pixart", "qwenimage", "sana"]

# families that get other pictures as tokens of the same sequence
WITH_REFERENCES = {
    "flux_kontext": {"reference": (2, 3)},
    "flux2": {"references": ((2, 3), (1, 4))},
    "qwenimage": {"references": ((2, 3),)},
}


@cache
def denoiser(name: str) -> nn.Module:
    return tiny_denoiser(name)


def output(name: str, arguments: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        out = denoiser(name)(**arguments, return_dict=False)[0]
    return torch.stack(out) if isinstance(out, list) else out


def with_changed_corner(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with another value in the first cell of the first sample's picture."""
    key = next(iter(arguments))
    samples = [sample.clone() for sample in arguments[key]]
    samples[0].view(-1)[0] += 5.0
    return {**arguments, key: samples if isinstance(arguments[key], list) else torch.stack(samples)}


def run(pipe: Any, name: str, **more: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(**{**tiny_call(name), **more}, generator=torch.Generator().manual_seed(0)).images


@pytest.mark.parametrize("grid", [GRID, (1, 3, 11), (1, 4, 1)], ids=lambda grid: "x".join(map(str, grid[1:])))
@pytest.mark.parametrize("name", IMAGES)
def test_denoiser_takes_any_grid(name: str, grid: tuple[int, int, int]) -> None:
    out = output(name, tiny_inputs(name, grid, text=3, batch=3))
    assert len(out) == 3
    assert out.isfinite().all()


@pytest.mark.parametrize("name", IMAGES)
def test_tokens_hear_each_other_but_not_other_samples(name: str) -> None:
    arguments = tiny_inputs(name, GRID)
    one, other = output(name, arguments), output(name, with_changed_corner(arguments))
    assert (one[0] - other[0]).abs().median() > 5e-4 * one.std()
    torch.testing.assert_close(one[1], other[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", MASKED)
def test_padding_of_the_text_is_not_heard(name: str) -> None:
    arguments = tiny_inputs(name, GRID, text=6, lengths=(6, 4))
    text = arguments["encoder_hidden_states"].clone()
    text[1, 4:] += 3.0
    one, padding = output(name, arguments), output(name, {**arguments, "encoder_hidden_states": text})
    torch.testing.assert_close(one, padding, atol=1e-5, rtol=0)
    text[1, 3] += 3.0
    assert (output(name, {**arguments, "encoder_hidden_states": text})[1] - one[1]).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "options"), WITH_REFERENCES.items(), ids=WITH_REFERENCES)
def test_references_follow_the_target_and_are_heard(name: str, options: dict[str, Any]) -> None:
    arguments = tiny_inputs(name, GRID, **options)
    changed = arguments["hidden_states"].clone()
    assert changed.shape[1] > 7 * 5
    changed[:, 7 * 5 :] += 3.0
    one, other = output(name, arguments), output(name, {**arguments, "hidden_states": changed})
    assert (one[:, : 7 * 5] - other[:, : 7 * 5]).abs().amin() > 0


def test_texts_of_other_kinds_are_heard() -> None:
    arguments = tiny_inputs("hunyuanimage", GRID, quoted=4)
    other = {**arguments, "encoder_hidden_states_2": -arguments["encoder_hidden_states_2"]}
    assert (output("hunyuanimage", arguments) - output("hunyuanimage", other)).abs().max() > 1e-4

    lengths = (3, 40)
    arguments = tiny_inputs("zimage", GRID, lengths=lengths)
    assert tuple(map(len, arguments["cap_feats"])) == lengths
    assert output("zimage", arguments).isfinite().all()


@pytest.mark.parametrize("name", sorted(PIPELINES & IMAGES.keys()))
def test_pipeline_makes_a_picture_that_follows_its_text(name: str) -> None:
    pipe, call = tiny_pipeline(name), tiny_call(name)
    picture = run(pipe, name)
    assert picture.shape == (1, 3, call["height"], call["width"])
    assert picture.isfinite().all()
    assert picture.std() > 0.01
    assert (run(pipe, name, prompt=call["prompt"].replace("cat", "dog")) - picture).abs().max() > 1e-3
    # the pipeline has the family's own denoiser, so what holds for one holds for the other
    model = getattr(pipe, "transformer", None) or pipe.unet
    weights = denoiser(name).state_dict()
    assert all(torch.equal(weight, weights[key]) for key, weight in model.state_dict().items())


@pytest.mark.parametrize("name", ["flux", "qwenimage", "sdxl"])
def test_pipeline_survives_saving_and_loading(name: str, tmp_path: Path) -> None:
    pipe = tiny_pipeline(name)
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is type(pipe)
    torch.testing.assert_close(run(again, name), run(pipe, name), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["hunyuanimage", "qwenimage"])
def test_tokens_the_pipeline_drops_are_its_template(name: str) -> None:
    pipe = tiny_pipeline(name)
    before_prompt = pipe.prompt_template_encode.split("{}")[0]
    tokens = pipe.tokenizer(before_prompt).input_ids
    assert len(tokens) == pipe.prompt_template_encode_start_idx
    assert pipe.tokenizer.decode(tokens) == before_prompt


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    pipes = [tiny_flux_pipeline(seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.rand(3), expected)
    for part in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        one, same, other = (getattr(pipe, part).state_dict() for pipe in pipes)
        assert all(torch.equal(weight, same[name]) for name, weight in one.items())
        assert any(not torch.equal(weight, other[name]) for name, weight in one.items())


@pytest.mark.parametrize("name", TINY)
def test_no_weight_is_left_at_zero(name: str) -> None:
    assert all(weight.abs().min() > 0 for weight in denoiser(name).parameters())


@pytest.mark.parametrize("name", TINY)
def test_modules_have_what_the_lists_say(name: str) -> None:
    module = import_module(TINY[name])
    assert TINY[name].rpartition(".")[2] == name
    for member in ("denoiser", "inputs"):
        assert callable(getattr(module, member))
    for member in ("pipeline", "call"):
        assert hasattr(module, member) == (name in PIPELINES)


def test_unknown_families_and_frames_of_pictures_are_refused() -> None:
    for make in (tiny_pipeline, tiny_denoiser, tiny_call):
        with pytest.raises(ConfigError, match=r"no tiny family 'fluxx'; known ones are .*flux.*wan"):
            make("fluxx")
    with pytest.raises(ConfigError, match=r"3 frames, but 'flux' makes pictures; pass \(1, H, W\)"):
        tiny_inputs("flux", (3, 7, 5))
    for name in TINY.keys() - PIPELINES:
        with pytest.raises(ConfigError, match=f"'{name}' has a tiny denoiser but no tiny pipeline"):
            tiny_pipeline(name)


def test_importing_the_package_is_light(tmp_path: Path) -> None:
    code = "import sys, gensparse.testing.tiny; print({'diffusers', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
