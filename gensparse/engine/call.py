"""One call of the pipeline: its arguments, the padded input and the finished picture."""

from typing import TYPE_CHECKING, Any

from gensparse.engine.plans import is_padded, padded_size, takes_strength, way_arguments
from gensparse.engine.resolve import text_tokens, uses_negative
from gensparse.engine.values import Resolved
from gensparse.image_io import Picture
from gensparse.request import Request, UpscaleRequest

if TYPE_CHECKING:
    from PIL import Image


def call_arguments(resolved: Resolved, request: Request, seed: int) -> dict[str, Any]:
    """Keyword arguments of the pipeline for one picture."""
    import torch

    info, (height, width) = resolved.info, padded_size(resolved)
    out: dict[str, Any] = {
        "prompt": request.prompt,
        "height": height,
        "width": width,
        "num_inference_steps": request.steps,
        # the noise is drawn on the CPU, so that a seed is the same picture on every device
        "generator": torch.Generator("cpu").manual_seed(seed),
        "attention": request.attention,
        "dense_steps": request.dense_steps,
        "dense_layers": request.dense_layers,
        "vae_tile": vae_tile(request.tile),
        **way_arguments(resolved, request),
        **_guidance(resolved, request),
    }
    if info.row.takes_length:
        out["max_sequence_length"] = text_tokens(info)
    if isinstance(request, UpscaleRequest) and takes_strength(resolved):
        out["strength"] = request.strength
    return out


def _guidance(resolved: Resolved, request: Request) -> dict[str, Any]:
    """The scale under the name the family has for it, and the negative prompt where it acts."""
    info, row = resolved.info, resolved.info.row
    if info.guidance_kind == "embedded":
        return {"guidance_scale": request.guidance}
    acts = uses_negative(info, request.guidance or 0.0)
    if row.negative:
        return {row.guidance: request.guidance, "negative_prompt": request.negative_prompt} if acts else {}
    negative = {"negative_prompt": request.negative_prompt or row.unsaid} if acts else {}
    return {row.guidance: request.guidance, **negative}


def vae_tile(tile: str) -> int | str | None:
    """`--tile` as pipelines take it."""
    return None if tile == "none" else int(tile) if tile.isdigit() else tile


def padded_source(image: "Image.Image", resolved: Resolved) -> "Image.Image":
    """The input, its last row and column repeated, so that it covers the padded result as it covers the picture.

    Where the padding is no whole number of its pixels, it is resampled (by less than a pixel per side), so that nothing
    moves.
    """
    if not is_padded(resolved):
        return image
    import numpy as np
    from PIL import Image

    sides = zip((image.height, image.width), padded_size(resolved), (resolved.height, resolved.width), strict=True)
    exact = [side * target / wanted for side, target, wanted in sides]
    whole = [-int(-length // 1) for length in exact]
    extra = ((0, whole[0] - image.height + 1), (0, whole[1] - image.width + 1), (0, 0))
    wider = Image.fromarray(np.pad(np.asarray(image), extra, mode="edge"))
    if exact == [float(length) for length in whole]:
        return wider.crop((0, 0, whole[1], whole[0]))
    return wider.resize((whole[1], whole[0]), Image.Resampling.BICUBIC, box=(0, 0, exact[1], exact[0]))


def finish_picture(image: "Image.Image", source: Picture | None, resolved: Resolved) -> "Image.Image":
    """Cut the padding off, keep to the given picture, and give back its colour profile and alpha channel."""
    from PIL import Image

    if image.size != (resolved.width, resolved.height):
        image = image.crop((0, 0, resolved.width, resolved.height))
    faithful = isinstance(resolved.request, UpscaleRequest) and resolved.request.faithful
    if source is not None and faithful:
        image = _faithful(image, source.image)
    if source is not None and source.mask is not None:
        image = _marked(image, source, faithful=faithful)
    if source is not None and source.icc_profile:
        image.info["icc_profile"] = source.icc_profile
    if source is not None and source.alpha is not None:
        image.putalpha(source.alpha.resize(image.size, Image.Resampling.LANCZOS))
    return image


def result_mask(source: Picture, size: tuple[int, int]) -> Any:
    """The picture's mask at the size (height, width) of the result, see `gensparse.highres.marked.soft_mask`."""
    import numpy as np

    from gensparse.highres.marked import soft_mask

    assert source.mask is not None
    return soft_mask(np.asarray(source.mask.image), size, source.size)


def padded_mask(source: Picture, resolved: Resolved) -> Any:
    """The same, its last row and column repeated over what the pipeline makes beyond the result."""
    import numpy as np

    mask, (height, width) = result_mask(source, (resolved.height, resolved.width)), padded_size(resolved)
    return np.pad(mask, ((0, height - resolved.height), (0, width - resolved.width)), mode="edge")


def _marked(image: "Image.Image", source: Picture, *, faithful: bool) -> "Image.Image":
    """The picture where the mask of its source marks it, and the plain enlargement of the source elsewhere."""
    import numpy as np
    from PIL import Image

    from gensparse.highres.marked import blended, plain_enlargement

    size = (image.height, image.width)
    plain = plain_enlargement(np.asarray(source.image), size)
    if faithful:
        plain = np.asarray(_faithful(Image.fromarray(plain), source.image))
    return Image.fromarray(blended(np.asarray(image), plain, result_mask(source, size)))


def _faithful(image: "Image.Image", source: "Image.Image") -> "Image.Image":
    """The picture, corrected until it shrinks to its source; one that is not larger than that stays as it is."""
    from gensparse.highres.faithful import keep_to

    if image.width < source.width or image.height < source.height:
        return image
    import numpy as np
    from PIL import Image

    return Image.fromarray(keep_to(np.array(image), np.asarray(source)))
