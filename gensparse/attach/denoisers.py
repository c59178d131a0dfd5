"""What there is to attach to: the denoisers of a pipeline, their sites and repeated blocks."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gensparse.errors import ConfigError
from gensparse.families import Family, family_of
from gensparse.methods import Place
from gensparse.processors import _compat

_DENOISERS = ("transformer", "transformer_2", "unet")


def denoisers(pipe_or_model: Any) -> list[nn.Module]:
    """The denoisers of a pipeline, or the model itself, compiled or not."""
    if isinstance(pipe_or_model, nn.Module):
        return [denoiser(pipe_or_model)]
    found = [getattr(pipe_or_model, name, None) for name in _DENOISERS]
    models = [denoiser(model) for model in found if isinstance(model, nn.Module)]
    if not models:
        raise ConfigError(
            f"{type(pipe_or_model).__name__} has no {', '.join(_DENOISERS)}; pass a diffusers pipeline or its denoiser."
        )
    return models


def denoiser(model: nn.Module) -> nn.Module:
    """A model itself, where torch.compile has wrapped it."""
    return getattr(model, "_orig_mod", model)


def places_of(family: Family, model: nn.Module, modules: Mapping[str, nn.Module], part: str) -> dict[str, Place]:
    """The sites of a model that a method acts on, in its order; those of cross-attention last."""
    roles = {**(family.sites(model, modules) if part != "cross" else {})}
    roles |= family.cross(model, modules) if part != "self" else {}
    return {
        name: Place(role, layer, len(roles), _heads(modules[name]), name)
        for layer, (name, role) in enumerate(roles.items())
    }


def _heads(module: nn.Module) -> int:
    return int(getattr(module, "heads", getattr(module, "num_heads", 0)))


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that are compiled one by one.

    Raises:
        ConfigError: a model of no supported family, or without repeated blocks.
    """
    classes, pattern = _compat.repeated_blocks(model), family_of(model).blocks
    found = [
        module
        for name, module in model.named_modules()
        if (type(module).__name__ in classes if classes else re.fullmatch(pattern, name))
    ]
    if not found:
        raise ConfigError(f"{type(model).__name__} has no repeated blocks; compile the whole model by model.compile().")
    return found


def native_tokens(family: Family, model: nn.Module, owner: Any) -> int | None:
    """Picture tokens at the training size, as model and scheduler of its pipeline tell; None where they do not."""
    scheduler_config = getattr(getattr(owner, "scheduler", None), "config", None)
    try:
        return family.native_tokens(model, scheduler_config)
    except ConfigError:
        return None


def device_of(model: nn.Module, bound: Mapping[str, Any]) -> torch.device:
    """Where the model computes: of the offload hook when it moves the inputs, else where they are."""
    device = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    if device is None:
        return next(value.device for value in bound.values() if isinstance(value, torch.Tensor))
    return torch.device(device)
