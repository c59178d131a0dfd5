"""Pictures of subjects on their way into a pipeline: read, checked against the model, and noted in the metadata."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gensparse import image_io
from gensparse.errors import ConfigError
from gensparse.highres.ways import WAYS, Asked
from gensparse.models import ModelInfo
from gensparse.request import CustomizeRequest, Request
from gensparse.subjects.naming import parse_subject

if TYPE_CHECKING:
    from gensparse.subjects.references import Reference

CLASSES = {
    "FluxHighresPipeline": "FluxCustomizePipeline",
    "SDXLHighresPipeline": "SDXLCustomizePipeline",
    "SD15HighresPipeline": "SD15CustomizePipeline",
}
"""Pipeline of stages -> the same with subjects, both in `gensparse.pipelines`."""

AT_ONCE = ("none", "direct")
"""Ways that have no stage beyond the first."""


@dataclass(frozen=True, eq=False)
class Cast:
    """The subjects of a request.

    Args:
        facts: for the metadata: {name: {"picture": sha256, "mask": sha256}}.
    """

    references: "tuple[Reference, ...]"
    facts: dict[str, dict[str, str]]


def read_cast(request: Request) -> Cast | None:
    """The pictures and masks of a request with subjects; None for other requests.

    Raises:
        ConfigError: a file that is missing, no picture, damaged or too large.
    """
    if not isinstance(request, CustomizeRequest):
        return None
    from gensparse.subjects.references import Reference

    boxes = {name: box for name, *box in request.layout}
    references, facts = [], {}
    for text in request.subject:
        name, image, mask = parse_subject(text)
        picture = image_io.read_image(image)
        facts[name] = {"picture": picture.sha256}
        pixels = picture.image
        if picture.alpha is not None:
            pixels = pixels.copy()
            pixels.putalpha(picture.alpha)
        if mask is not None:
            facts[name]["mask"] = image_io.read_image(mask).sha256
        references.append(Reference(name, pixels, None if mask is None else Path(mask), boxes.get(name)))
    return Cast(tuple(references), facts)


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
            f"customize works with FLUX.1, Stable Diffusion XL and Stable Diffusion 1.5, not with {row.title} "
            f"({info.alias}); choose another -m"
        )
    if WAYS[asked.name].method:
        raise ConfigError(
            f"--highres {asked.name} has attention of its own where subjects act; use --highres cascade or none"
        )
    if asked.name in AT_ONCE and request.attention not in ("auto", "dense"):
        raise ConfigError(
            f"--attention {request.attention} would act in the first stage, where subjects do; use --highres cascade, "
            "whose larger stages take it, or leave --attention out"
        )
    from gensparse.pipelines.customize import check_subjects, subject_method

    family = "FLUX.1" if row.highres == "FluxHighresPipeline" else "UNet"
    names = [parse_subject(text)[0] for text in request.subject]
    placed = [name for name, *_ in request.layout]
    check_subjects(subject_method(request.subject_method), family, names, placed, request.prompt)


def pictures_beside(request: Request) -> int:
    """Pictures that every call of the native stage computes for each that is made, itself included."""
    return 1 + len(request.subject) if isinstance(request, CustomizeRequest) else 1


def arguments_of(request: Request, cast: Cast | None) -> dict[str, Any]:
    """What the pipeline is told about subjects."""
    if cast is None or not isinstance(request, CustomizeRequest):
        return {}
    return {"subjects": list(cast.references), "subject_method": request.subject_method}
