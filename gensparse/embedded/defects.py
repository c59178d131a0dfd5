"""Planted defects: what each measure of quality has to notice before it may praise anything.

Faults of content change a scene, faults of the picture change pixels.
"""

from dataclasses import replace

import numpy as np
from PIL import Image, ImageFilter

from gensparse.embedded.reader import Box, Picture, as_image
from gensparse.embedded.scenes import COLOURS, FILLS, Scene

TINY = 0.016  # radius of a tiny duplicate, scene units: 65 pixels in a picture of 4096


def missing(scene: Scene) -> Scene:
    """The last subject is not there."""
    return replace(scene, subjects=scene.subjects[:-1])


def extra(scene: Scene, seed: int = 0) -> Scene:
    """The first subject stands there twice, the copy in the freest place."""
    return _with_copy(scene, scene.subjects[0].radius * 0.8, seed)


def tiny_duplicate(scene: Scene, seed: int = 0, radius: float = TINY) -> Scene:
    """A copy of the first subject, far too small for the whole picture's reading."""
    return _with_copy(scene, radius, seed)


def wrong_colour(scene: Scene) -> Scene:
    """The first subject has another colour, not the background's."""
    free = [c for c in COLOURS if c not in (scene.subjects[0].colour, scene.background_colour)]
    return _with_first(scene, colour=free[len(free) // 2])


def wrong_fill(scene: Scene) -> Scene:
    """The first subject has another fill."""
    fill = scene.subjects[0].fill
    return _with_first(scene, fill=FILLS[(FILLS.index(fill) + 1) % len(FILLS)])


def swapped(scene: Scene) -> Scene:
    """The first two subjects stand in each other's places."""
    a, b, *rest = scene.subjects
    return replace(scene, subjects=(replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y), *rest))


def blurred(picture: Picture, sigma: float) -> Image.Image:
    """Gaussian blur; `sigma` in pixels."""
    return as_image(picture).filter(ImageFilter.GaussianBlur(sigma))


def ringing(picture: Picture, sigma: float = 2.0, amount: float = 0.6) -> Image.Image:
    """Halos beside every edge, as over-sharpening leaves them."""
    return as_image(picture).filter(ImageFilter.UnsharpMask(sigma, round(100 * amount), 0))


def seamed(picture: Picture, level: int = 6) -> Image.Image:
    """The right half is lighter or darker by `level` of 255, as tiles decoded apart may be."""
    pixels = np.asarray(as_image(picture)).astype(np.int16)
    half = pixels[:, pixels.shape[1] // 2 :]
    half += level if half.mean() < 128 else -level
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def pasted_reference(picture: Picture, reference: Picture, box: Box) -> Image.Image:
    """The reference's `box`, its background with it, copied into the middle of the picture."""
    image, source = as_image(picture).copy(), as_image(reference)
    margin = 0.25 * (box[2] - box[0])
    corners = (box[1] - margin, box[0] - margin, box[3] + margin, box[2] + margin)
    patch = source.crop(tuple(round(min(max(v, 0.0), 1.0) * s) for v, s in zip(corners, source.size * 2, strict=True)))
    image.paste(patch, ((image.width - patch.width) // 2, (image.height - patch.height) // 2))
    return image


def shifted(picture: Picture, pixels: int = 1) -> Image.Image:
    """Moved by so many pixels to the right and down; the border is repeated."""
    values = np.pad(np.asarray(as_image(picture)), ((pixels, 0), (pixels, 0), (0, 0)), mode="edge")
    return Image.fromarray(values[:-pixels, :-pixels])


def toned(picture: Picture, level: int = 4) -> Image.Image:
    """Every pixel lighter by so many levels of 255; darker where that would leave the range."""
    values = np.asarray(as_image(picture)).astype(np.int16)
    values += np.where(values > 255 - level, -level, level).astype(np.int16)
    return Image.fromarray(values.astype(np.uint8))


def _with_first(scene: Scene, **changes) -> Scene:
    return replace(scene, subjects=(replace(scene.subjects[0], **changes), *scene.subjects[1:]))


def _with_copy(scene: Scene, radius: float, seed: int) -> Scene:
    """A copy of the first subject where it is farthest from every other subject, out of 200 random places."""
    rng = np.random.default_rng(seed)
    height, width = scene.extent
    margin = np.array([radius / height, radius / width]) * 1.1
    places = rng.uniform(margin, 1 - margin, (200, 2))
    gaps = [min(np.hypot((y - s.y) * height, (x - s.x) * width) - s.radius for s in scene.subjects) for y, x in places]
    y, x = places[int(np.argmax(gaps))]
    copy = replace(scene.subjects[0], y=float(y), x=float(x), radius=radius)
    return replace(scene, subjects=(*scene.subjects, copy))
