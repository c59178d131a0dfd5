"""Training pictures of the embedded model: whole scenes, and close-ups cut from large renderings."""

import numpy as np

from gensparse.embedded.render import WHOLE, Window, render
from gensparse.embedded.scenes import Scene, random_scene

NATIVE = 256  # pixels: side of a square picture of area 1


def crop_window(scene: Scene, zoom: float, side: int, rng: np.random.Generator, align: int = 1) -> Window:
    """A window of `side` pixels in the rendering `zoom` times the native size, at a random multiple of `align`."""
    height, width = (round(e * NATIVE * zoom / 16) * 16 for e in scene.extent)
    top = int(rng.integers(0, (height - side) // align + 1)) * align
    left = int(rng.integers(0, (width - side) // align + 1)) * align
    return top / height, left / width, (top + side) / height, (left + side) / width


def subject_window(scene: Scene, zoom: float, side: int, rng: np.random.Generator, align: int = 1) -> Window:
    """Like `crop_window`, but the best of a few tries: windows that cut a subject's box are preferred."""
    for _ in range(4):
        window = crop_window(scene, zoom, side, rng, align)
        if any(overlap(window, scene.box(i)) for i in range(len(scene.subjects))):
            break
    return window


def overlap(window: Window, box: Window) -> bool:
    """The two rectangles overlap."""
    return window[0] < box[2] and box[0] < window[2] and window[1] < box[3] and box[1] < window[3]


def autoencoder_picture(seed: int, side: int = 128) -> np.ndarray:
    """One training picture [side, side, 3]: whole, native crop, or a close-up at zoom 2 to 16."""
    rng = np.random.default_rng([seed, 7])
    scene = random_scene(seed)
    kind = rng.random()
    if kind < 0.15:
        return render(scene, side, side, WHOLE)
    zoom = 1.0 if kind < 0.6 else float(2.0 ** rng.uniform(0.5, 4))
    return render(scene, side, side, subject_window(scene, zoom, side, rng))
