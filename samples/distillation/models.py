"""The pipelines and prompts a run may name."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import nn

import gensparse
from gensparse.embedded.scenes import caption, random_scene
from gensparse.errors import ConfigError
from gensparse.families import family_of
from gensparse.testing.tiny import tiny_call, tiny_pipeline

EMBEDDED, TINY = "embedded", "tiny"
# scenes of these seeds took part in no training of the embedded model
TRAINING_SEEDS, HELD_OUT_SEEDS = 9_000_000, 9_500_000


def load_pipeline(name: str, dtype: torch.dtype) -> Any:
    """A diffusers folder or hub name in `dtype`; the embedded model, or a tiny FLUX of random weights, in fp32."""
    if name == EMBEDDED:
        pipe = gensparse.load_embedded()
    elif name == TINY:
        pipe = tiny_pipeline("flux", double_blocks=1, single_blocks=3)
    else:
        pipe = DiffusionPipeline.from_pretrained(name, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_trainable(pipe: Any) -> nn.Module:
    """The denoiser of a pipeline.

    Raises:
        ConfigError: it is not one flow-matching transformer whose time falls.
    """
    model = getattr(pipe, "transformer", None)
    flow = isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
    if model is None or not flow or family_of(model).ascending_time or getattr(pipe, "transformer_2", None) is not None:
        raise ConfigError(
            f"{type(pipe).__name__} cannot be distilled here; pass a pipeline of one transformer that predicts noise "
            "minus data and runs on FlowMatchEulerDiscreteScheduler, as FLUX.1, Chroma and SD3 do."
        )
    return model


def default_call(name: str) -> dict[str, Any]:
    """Arguments of the pipeline besides prompts, before the user's own."""
    if name == EMBEDDED:
        return {
            "height": 256,
            "width": 256,
            "max_sequence_length": 32,
            "negative_prompt": "",
            "true_cfg_scale": 3.5,
            "num_inference_steps": 20,
        }
    if name == TINY:
        return {key: value for key, value in tiny_call("flux").items() if key not in ("prompt", "output_type")}
    return {}


def parse_call(items: Sequence[str]) -> dict[str, Any]:
    """Pipeline arguments from KEY=VALUE texts; values are JSON, anything else is text.

    Raises:
        ConfigError: an item without a key or a value.
    """
    call = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not key or not equals:
            raise ConfigError(f"--call {item!r} is not allowed; write KEY=VALUE, such as guidance_scale=3.5.")
        try:
            call[key] = json.loads(value)
        except json.JSONDecodeError:
            call[key] = value
    return call


def prompts_for(name: str, count: int, file: Path | None = None, *, held_out: bool = False) -> list[str]:
    """`count` prompts: lines of a file, over and over, or sentences of the embedded model's grammar.

    More prompts begin with the same ones.

    Args:
        held_out: sentences of other scenes than those for training; without effect on a file.

    Raises:
        ConfigError: no file for a model that needs one, or one without a line of text.
    """
    if file is not None:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not lines:
            raise ConfigError(f"{file} holds no prompt; write one per line.")
        return [lines[i % len(lines)] for i in range(count)]
    if name == TINY:
        return ["a cat"] * count
    if name != EMBEDDED:
        raise ConfigError(f"model {name!r} needs --prompts FILE with one prompt per line.")
    found: list[str] = []
    seed = HELD_OUT_SEEDS if held_out else TRAINING_SEEDS
    while len(found) < count:
        if text := caption(random_scene(seed), seed):
            found.append(text)
        seed += 1
    return found


def run_pipeline(pipe: Any, prompts: Sequence[str], call: Mapping[str, Any], seeds: Sequence[int], output: str) -> Any:
    """Pictures (output "pil") or latents ("latent") of prompts, each with noise of its own seed."""
    given = dict(call)
    if isinstance(given.get("negative_prompt"), str):
        given["negative_prompt"] = [given["negative_prompt"]] * len(prompts)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(prompt=list(prompts), generator=generators, output_type=output, return_dict=False, **given)[0]
