"""How a size is reached: the way that was asked for, its stages, and what the pipeline is told about it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gensparse.engine.values import Resolved
from gensparse.errors import ConfigError
from gensparse.highres.ways import AUTO, WAYS, Asked, parse_way
from gensparse.models import ModelInfo
from gensparse.request import CustomizeRequest, Request, UpscaleRequest

if TYPE_CHECKING:
    from gensparse.highres.stages import Stage

REGIONAL = "c_upscale"
"""The way that reads prompts of regions."""

SLACK = 1.1  # sides up to so many times the native ones are no large picture


def asked_way(request: Request, info: ModelInfo) -> Asked:
    """The way of a request for a model; `auto` is the choice of its family.

    Raises:
        ConfigError: a way that the family does not have, or settings of a method that it does not know.
    """
    asked = parse_way(request.highres)
    if asked.name == AUTO:
        asked = parse_way(REGIONAL if request.regions else info.row.auto)
    if request.regions:
        _check_regional(asked, info)
    if asked.name not in info.row.ways:
        raise ConfigError(
            f"--highres {asked.name} does not exist for {info.row.title} ({info.alias}); "
            f"it has {', '.join((AUTO, *info.row.ways))}"
        )
    if WAYS[asked.name].method:
        from gensparse.methods import parse_method

        parse_method(asked.text)
        if request.attention not in ("auto", "dense"):
            raise ConfigError(
                f"--highres {asked.name} brings its own attention, and --attention {request.attention} is given; "
                "leave one of both out"
            )
    return asked


def _check_regional(asked: Asked, info: ModelInfo) -> None:
    """ConfigError where nothing reads the prompts of regions."""
    if asked.name != REGIONAL:
        raise ConfigError(
            f"--regions act in --highres {REGIONAL}, and --highres {asked.name} is given; leave one of both out"
        )
    if REGIONAL not in info.row.ways:
        from gensparse.families.checkpoints import CHECKPOINTS

        known = ", ".join(row.title for row in CHECKPOINTS.values() if REGIONAL in row.ways)
        raise ConfigError(
            f"--regions act in --highres {REGIONAL}, which does not exist for {info.row.title} ({info.alias}); use a "
            f"model of {known}"
        )


def is_large(resolved: Resolved) -> bool:
    """Whether the picture is larger than what the model was trained for."""
    return resolved.height * resolved.width > (SLACK * resolved.info.native_size) ** 2


def acting_way(resolved: Resolved) -> Asked:
    """The way that acts: one that only helps large pictures is left out for others."""
    asked = asked_way(resolved.request, resolved.info)
    return parse_way("none") if WAYS[asked.name].method and not is_large(resolved) else asked


def padded(side: int, multiple: int) -> int:
    """The next multiple of `multiple` pixels."""
    return -(-side // multiple) * multiple


def padded_size(resolved: Resolved) -> tuple[int, int]:
    """(height, width) that the pipeline makes: the picture's, rounded up to what the model can do."""
    multiple = resolved.info.architecture.multiple
    return padded(resolved.height, multiple), padded(resolved.width, multiple)


def is_padded(resolved: Resolved) -> bool:
    """Whether the pipeline makes a larger picture than was asked for."""
    return padded_size(resolved) != (resolved.height, resolved.width)


# ------------------------------------------------------------------------------------------------------------- stages
def planned_stages(resolved: Resolved) -> list["Stage"]:
    """Every stage that the pipeline runs, as it would plan them itself; of a given picture those that are left."""
    asked = acting_way(resolved)
    stages = _FAMILY_STAGES[resolved.info.row.levels](resolved, asked)
    if not isinstance(resolved.request, UpscaleRequest):
        return stages
    import torch

    from gensparse.pipelines.cascade import stages_from

    picture = torch.empty(1, 3, *resolved.source_size, device="meta")  # only its size counts
    if not WAYS[asked.name].strength:
        return stages[1:] or stages
    return stages_from(picture, stages, resolved.request.strength, _levels(resolved, stages[0]), planned=True)


def _flow_stages(resolved: Resolved, asked: Asked) -> list["Stage"]:
    from gensparse.highres.stages import Stage, plan_stages

    size, steps = padded_size(resolved), resolved.request.steps or 1
    if WAYS[asked.name].procedure:
        native = (resolved.info.native_size,) * 2
        return procedure(asked).plan(size, native, resolved.info.architecture.multiple, steps)
    if asked.name != "cascade":
        return [Stage(*size, steps, sharpen=0.0)]
    native, multiple = (resolved.info.native_size,) * 2, resolved.info.architecture.multiple
    settings = cascade_settings(resolved.info, asked.settings)
    return plan_stages(*size, native, steps=steps, multiple=multiple, settings=settings)


def procedure(asked: Asked) -> Any:
    """A way of FLUX that is a value of its own."""
    from gensparse.pipelines.flux_ways import as_flux_way

    return as_flux_way(asked.text)


def cascade_settings(info: ModelInfo, given: Mapping[str, Any]) -> Any:
    """The family's numbers, then the model's own, then those of the request."""
    from gensparse.highres.stages import CascadeSettings

    own = {name: tuple(value) if isinstance(value, list) else value for name, value in info.cascade.items()}
    return CascadeSettings(**{**info.row.cascade, **own, **given})


def _unet_stages(resolved: Resolved, asked: Asked) -> list["Stage"]:
    from gensparse.pipelines.unet_ways import Native, as_way

    arch = resolved.info.architecture
    native = Native(resolved.info.native_size // arch.vae_factor, arch.vae_factor, arch.patch)
    return as_way(asked.text, resolved.info.cascade).plan(padded_size(resolved), native, resolved.request.steps or 1)


_FAMILY_STAGES = {"dynamic": _flow_stages, "static": _flow_stages, "steps": _unet_stages}


def _levels(resolved: Resolved, native: "Stage") -> list[float]:
    """Shares of the noise range from 1 to 0, one per step and the final 0."""
    from gensparse.highres.shift import flow_sigmas, shift_mu

    info, steps = resolved.info, native.steps
    if info.row.levels == "steps":
        return [(steps - i) / steps for i in range(steps + 1)]
    if info.row.levels == "static":
        return flow_sigmas(steps, shift=info.row.shift).tolist()
    multiple = info.architecture.multiple
    tokens = (native.height // multiple) * (native.width // multiple)
    return flow_sigmas(steps, mu=shift_mu(tokens)).tolist()


# --------------------------------------------------------------------------------------------------------------- calls
def way_arguments(resolved: Resolved, request: Request) -> dict[str, Any]:
    """What a pipeline call is told about the way to its size."""
    asked, info = acting_way(resolved), resolved.info
    if info.row.levels == "steps":
        return {"highres": _with_regions(resolved, request, asked.text)}
    if WAYS[asked.name].procedure:
        return {"highres": procedure(asked)}
    out: dict[str, Any] = {"highres": asked.name}
    if "position" in asked.settings:
        out["position"] = asked.settings["position"]
    elif asked.name == "cascade" and asked.settings:
        stages = _flow_stages(resolved, asked)
        larger = isinstance(request, UpscaleRequest) and len(stages) > 1
        out["stages"] = [stages[0], *planned_stages(resolved)] if larger else stages
    return out


def _with_regions(resolved: Resolved, request: Request, way: str) -> Any:
    """The way with the request's regions, whose boxes are shares of the picture without its padding."""
    if not request.regions:
        return way
    from dataclasses import replace

    from gensparse.pipelines.unet_ways import as_way
    from gensparse.subjects.region_prompts import RegionPrompt

    height, width = padded_size(resolved)
    across, down = resolved.width / width, resolved.height / height

    def share(side: float, scale: float) -> float:
        return 1.0 if side == 1 else side * scale  # what reaches the border reaches the padding's too

    regions = tuple(
        RegionPrompt((left * across, top * down, share(right, across), share(bottom, down)), prompt)
        for left, top, right, bottom, prompt in request.regions
    )
    return replace(as_way(way), regions=regions)


def takes_strength(resolved: Resolved) -> bool:
    """Whether the way can redo a chosen share of a given picture."""
    return WAYS[acting_way(resolved).name].strength


def can_halve(resolved: Resolved) -> bool:
    """Whether both halves of the guidance can run one after the other: they are a batch, and the way allows it."""
    if isinstance(resolved.request, CustomizeRequest):  # subjects read both halves from one batch
        return False
    return resolved.info.architecture.guidance_in_batch and WAYS[acting_way(resolved).name].halves


def guidance_in_halves(resolved: Resolved) -> bool:
    """Whether they do from the start: where weights wait, memory is short."""
    return can_halve(resolved) and resolved.request.offload not in ("auto", "none")
