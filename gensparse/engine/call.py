"""One call of the pipeline: its arguments, the padded input and the finished picture."""

from typing import TYPE_CHECKING, Any

from gensparse.engine.resolve import padded, text_tokens, uses_negative
from gensparse.engine.values import Resolved
from gensparse.image_io import Picture
from gensparse.request import Request, UpscaleRequest

if TYPE_CHECKING:
    from PIL import Image


def call_arguments(resolved: Resolved, request: Request, seed: int) -> dict[str, Any]:
    """Keyword arguments of the pipeline for one picture."""
    import torch

    info, multiple = resolved.info, resolved.info.architecture.multiple
    out: dict[str, Any] = {
        "prompt": request.prompt,
        "height": padded(resolved.height, multiple),
        "width": padded(resolved.width, multiple),
        "num_inference_steps": request.steps,
        # the noise is drawn on the CPU, so that a seed is the same picture on every device
        "generator": torch.Generator("cpu").manual_seed(seed),
        "max_sequence_length": text_tokens(info),
        "attention": request.attention,
        "dense_steps": request.dense_steps,
        "dense_layers": request.dense_layers,
        "vae_tile": None if request.tile == "none" else int(request.tile) if request.tile.isdigit() else request.tile,
    }
    if isinstance(request, UpscaleRequest):
        out["strength"] = request.strength
    if info.guidance_kind == "embedded":
        out["guidance_scale"] = request.guidance
    if uses_negative(info, request.guidance or 0.0):
        out |= {"true_cfg_scale": request.guidance, "negative_prompt": request.negative_prompt}
    if getattr(request, "highres", "auto") == "none":
        out["stages"] = [_single_stage(resolved, request)]
    return out


def _single_stage(resolved: Resolved, request: Request) -> Any:
    from gensparse.highres.stages import Stage

    return Stage(resolved.height, resolved.width, steps=request.steps or 1)


def padded_source(image: "Image.Image", resolved: Resolved) -> "Image.Image":
    """The input with its last row and column repeated so that its sides have the ratio of the padded result."""
    multiple = resolved.info.architecture.multiple
    height = round(image.height * padded(resolved.height, multiple) / resolved.height)
    width = round(image.width * padded(resolved.width, multiple) / resolved.width)
    if (height, width) == (image.height, image.width):
        return image
    import numpy as np
    from PIL import Image

    extra = ((0, max(0, height - image.height)), (0, max(0, width - image.width)), (0, 0))
    return Image.fromarray(np.pad(np.asarray(image), extra, mode="edge"))


def finish_picture(image: "Image.Image", source: Picture | None, resolved: Resolved) -> "Image.Image":
    """Cut the padding off and give back colour profile and alpha channel, which is scaled on its own."""
    from PIL import Image

    if image.size != (resolved.width, resolved.height):
        image = image.crop((0, 0, resolved.width, resolved.height))
    if source is not None and source.icc_profile:
        image.info["icc_profile"] = source.icc_profile
    if source is not None and source.alpha is not None:
        image.putalpha(source.alpha.resize(image.size, Image.Resampling.LANCZOS))
    return image
