"""Pictures of subjects on their way into a pipeline: read, checked against the model, and noted in the metadata."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gensparse import image_io
from gensparse.errors import ConfigError
from gensparse.highres.ways import WAYS, Asked
from gensparse.models import ModelInfo
from gensparse.request import CustomizeRequest, Request
from gensparse.subjects.naming import Shown, parse_prompts

if TYPE_CHECKING:
    from gensparse.subjects.references import Reference

CLASSES = {
    "FluxHighresPipeline": "FluxCustomizePipeline",
    "SDXLHighresPipeline": "SDXLCustomizePipeline",
    "SD15HighresPipeline": "SD15CustomizePipeline",
    "SD3HighresPipeline": "SD3CustomizePipeline",
    "PixArtHighresPipeline": "PixArtCustomizePipeline",
}
"""Pipeline of stages -> the same with subjects, both in `gensparse.pipelines`."""

FAMILIES = {
    "FluxHighresPipeline": "FLUX.1",
    "SD3HighresPipeline": "Stable Diffusion 3",
    "PixArtHighresPipeline": "PixArt",
}
"""Pipeline of stages -> family of its model, as `gensparse.families` names it; the others are UNets."""

AT_ONCE = ("none", "direct")
"""Ways that have no stage beyond the first."""


FUSED = "multidiffusion"
"""The method with a call of the denoiser per subject, and one for the rest."""


@dataclass(frozen=True, eq=False)
class Cast:
    """The subjects of a request.

    Args:
        facts: for the metadata: {name: {"picture": sha256, "mask": sha256 or "box": numbers}}, a list of these for
            subjects with several pictures or none.
    """

    references: "tuple[Reference, ...]"
    facts: dict[str, Any]


def read_cast(request: Request) -> Cast | None:
    """The pictures and masks of a request with subjects; None for other requests.

    Raises:
        ConfigError: a file that is missing, no picture, damaged or too large.
    """
    if not isinstance(request, CustomizeRequest):
        return None
    from gensparse.subjects.references import Reference

    boxes = {name: tuple(box) for name, *box in request.layout}
    prompts = parse_prompts(request.subject_prompt, list(request.shown))
    negatives = parse_prompts(request.subject_negative, list(request.shown), "negative prompt")
    references: list[Reference] = []
    facts: dict[str, Any] = {}
    for name, shown in request.shown.items():
        read = [_read(one) for one in shown]
        found = [own for _, _, own in read]
        facts[name] = found[0] if len(found) == 1 else found
        pictures, masks = [pixels for pixels, _, _ in read], [mask for _, mask, _ in read]
        one = len(read) == 1
        references.append(
            Reference(
                name,
                None if not read else pictures[0] if one else pictures,
                None if not read else masks[0] if one else masks,
                boxes.get(name),
                prompts.get(name),
                negatives.get(name),
            )
        )
    return Cast(tuple(references), facts)


def _read(shown: Shown) -> tuple[Any, Any, dict[str, Any]]:
    """Pixels of a picture, its mask as `Reference` takes it, and what the metadata say of both."""
    picture = image_io.read_image(shown.image)
    facts: dict[str, Any] = {"picture": picture.sha256}
    pixels = picture.image
    if picture.alpha is not None:
        pixels = pixels.copy()
        pixels.putalpha(picture.alpha)
    if shown.box is not None:
        return pixels, shown.box, {**facts, "box": list(shown.box)}
    if shown.mask is None:
        return pixels, None, facts
    return pixels, Path(shown.mask), {**facts, "mask": image_io.read_image(shown.mask).sha256}


def check_customize(request: Request, info: ModelInfo, asked: Asked) -> None:
    """Refuse what a model or a method cannot do, before any weight is read; nothing for requests without subjects.

    Args:
        asked: the way to the size.

    Raises:
        ConfigError: a family without a pipeline for subjects, an unknown method, subjects without what it needs, or
            attention that would act where subjects do.
    """
    if not isinstance(request, CustomizeRequest):
        return
    row = info.row
    if row.highres not in CLASSES:
        raise ConfigError(
            "customize works with FLUX.1, Stable Diffusion 1.5, XL and 3, and PixArt, not with "
            f"{row.title} ({info.alias}); choose another -m"
        )
    from gensparse.pipelines.customize import check_subjects
    from gensparse.pipelines.unet_multidiffusion import WINDOWED

    family, method = FAMILIES.get(row.highres, "UNet"), method_of(request, info)
    if WAYS[asked.name].method:
        raise ConfigError(
            f"--highres {asked.name} has attention of its own where subjects act; use --highres cascade or none"
        )
    if asked.name in AT_ONCE and request.attention not in ("auto", "dense"):
        raise ConfigError(
            f"--attention {request.attention} would act in the first stage, where subjects do; use --highres cascade, "
            "whose larger stages take it, or leave --attention out"
        )
    if method.name == FUSED and asked.name in WINDOWED:
        raise ConfigError(
            f"--highres {asked.name} denoises windows on their own, and {FUSED} has regions; use --highres cascade"
        )
    shown = request.shown
    check_subjects(
        method,
        family,
        [name for name, own in shown.items() for _ in own or (None,)],
        [name for name, *_ in request.layout],
        request.prompt,
        pictured=[name for name, own in shown.items() if own],
        prompts=_prompts(request),
        negatives=list(parse_prompts(request.subject_negative, list(shown), "negative prompt")),
    )
    empty = next((number for number, text in enumerate(request.prompts, 1) if not text.strip()), None)
    if empty is not None and request.more_prompts:
        raise ConfigError(f"prompt {empty} of {len(request.prompts)} is empty; say what it is to show")


def pictures_beside(request: Request) -> int:
    """Pictures that every call of the native stage computes for each that is made, itself included."""
    if not isinstance(request, CustomizeRequest):
        return 1
    return drawn_at_once(request) + sum(len(shown) for shown in request.shown.values())


def drawn_at_once(request: Request) -> int:
    """Pictures that are made in one call of the pipeline."""
    together = isinstance(request, CustomizeRequest) and request.together
    return max(len(request.seed), request.num_images) if together else 1


def method_of(request: CustomizeRequest, info: ModelInfo) -> Any:
    """The subject method of a request on a model.

    Raises:
        ConfigError: an unknown one.
    """
    from gensparse.pipelines.customize import settled_method, subject_method

    family = FAMILIES.get(info.row.highres, "UNet")
    return subject_method(settled_method(request.subject_method, family, _unplaced(request), _prompts(request)))


def _unplaced(request: CustomizeRequest) -> list[str]:
    """Subjects without a box."""
    placed = {name for name, *_ in request.layout}
    return [name for name in request.shown if name not in placed]


def _prompts(request: CustomizeRequest) -> tuple[str, ...]:
    """Of all pictures."""
    return request.prompts if request.more_prompts else (request.prompt,) * max(len(request.seed), request.num_images)


def native_runs(request: Request, info: ModelInfo) -> int:
    """How often the native stage runs, in calls of the denoiser per step."""
    return _runs(request, info, native=True)


def larger_runs(request: Request, info: ModelInfo) -> int:
    """The same of the stages beyond it."""
    return _runs(request, info, native=False)


def _runs(request: Request, info: ModelInfo, *, native: bool) -> int:
    if not isinstance(request, CustomizeRequest):
        return 1
    from gensparse.pipelines.customize import REHEARSED

    method = method_of(request, info)
    if method.name == FUSED:
        return 1 + len(request.shown) if native or method.larger else 1
    rehearsed = getattr(method, "inject", 0) or (method.name in REHEARSED and _unplaced(request))
    return 2 if native and rehearsed else 1


def arguments_of(request: Request, cast: Cast | None) -> dict[str, Any]:
    """What the pipeline is told about subjects."""
    if cast is None or not isinstance(request, CustomizeRequest):
        return {}
    return {"subjects": list(cast.references), "subject_method": request.subject_method}


def together_arguments(request: CustomizeRequest, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments for all pictures of a set in one call, from those for the first."""
    import torch

    count = drawn_at_once(request)
    out = {
        **arguments,
        "prompt": list(request.prompts) if request.more_prompts else [request.prompt] * count,
        "generator": [torch.Generator("cpu").manual_seed(seed) for seed in request.seed],
    }
    if isinstance(out.get("negative_prompt"), str):
        out["negative_prompt"] = [out["negative_prompt"]] * count
    return out
