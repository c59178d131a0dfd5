"""Sharpness of a picture without a reference: width of edges, overshoot beside them, straight seams across them.

An edge is looked at along the direction of its gradient with sub-pixel steps, in the colour channel where it is
strongest, from the plateau on one side to the plateau on the other.
"""

from dataclasses import dataclass

import numpy as np

from gensparse.embedded.reader import Picture, as_image

Array = np.ndarray

STRONGEST = 0.05  # share of pixels whose gradient counts
_FLOOR = 0.25  # of the strongest gradients: below it, nothing is an edge however few edges there are
_STEP = 0.25  # pixels between samples of a profile
_EDGES = 3000  # profiles measured at most
_REACH = 64.0  # pixels to either side


@dataclass(frozen=True)
class Edges:
    """Per measured edge: 10-90% width in pixels and overshoot in percent of its height."""

    width: Array
    overshoot: Array


def edge_width(picture: Picture) -> float:
    """Median 10-90% width in pixels over the strongest 5% of gradients; inf where nothing has an edge."""
    widths = measure_edges(picture).width
    return float(np.median(widths)) if len(widths) else float("inf")


def overshoot(picture: Picture) -> float:
    """Mean overshoot beside the strongest 5% of gradients, in percent of the edges' height; 0 without edges."""
    values = measure_edges(picture).overshoot
    return float(values.mean()) if len(values) else 0.0


def measure_edges(picture: Picture, seed: int = 0) -> Edges:
    """Width and overshoot of up to 3000 edges, drawn at random from the strongest gradients."""
    pixels = np.asarray(as_image(picture))
    gradient, channel = _gradient(pixels)
    ys, xs = _strongest(gradient, np.random.default_rng(seed))
    if not len(ys):
        return Edges(np.zeros(0), np.zeros(0))
    reach = min(_REACH, max(8.0, min(pixels.shape[:2]) / 4))
    profiles, kept = _profiles(pixels, channel[ys, xs], ys, xs, reach)
    return _measure(profiles[kept])


def seam(picture: Picture) -> float:
    """Largest step in level (of 255) along a whole row or column boundary: tiles whose colours do not meet.

    Four fifths of the line have to step that far, and the same way: outlines and textures do not.
    """
    pixels = np.asarray(as_image(picture))
    return max(_largest_step(pixels), _largest_step(pixels.transpose(1, 0, 2)))


# ---------------------------------------------------------------- where


def _gradient(pixels: Array) -> tuple[Array, Array]:
    """(magnitude, channel) of the strongest channel's central difference, [H, W] each; 0 on the border."""
    best = np.zeros(pixels.shape[:2], np.float32)
    channel = np.zeros(pixels.shape[:2], np.uint8)
    for index in range(3):
        plane = pixels[..., index].astype(np.float32)
        magnitude = np.zeros_like(best)
        magnitude[1:-1, 1:-1] = np.hypot(plane[2:, 1:-1] - plane[:-2, 1:-1], plane[1:-1, 2:] - plane[1:-1, :-2]) / 2
        channel[magnitude > best] = index
        np.maximum(best, magnitude, out=best)
    return best, channel


def _strongest(gradient: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Rows and columns of the pixels to measure."""
    sample = gradient.ravel()[:: 1 + 2 * (gradient.size // 2_000_000)]  # an odd step meets every column
    level = max(np.quantile(sample, 1 - STRONGEST), _FLOOR * np.quantile(sample, 0.9999), 2.0)
    ys, xs = np.nonzero(gradient >= level)
    chosen = rng.permutation(len(ys))[:_EDGES]
    return ys[chosen], xs[chosen]


def _profiles(pixels: Array, channel: Array, ys: Array, xs: Array, reach: float) -> tuple[Array, Array]:
    """Rising profiles [N, samples] along the gradient, and which of them stand clear of the border."""
    gy, gx = _direction(pixels, channel, ys, xs)
    offsets = np.arange(-reach, reach + _STEP / 2, _STEP, dtype=np.float32)
    profiles = _bilinear(
        pixels, channel[:, None], ys[:, None] + gy[:, None] * offsets, xs[:, None] + gx[:, None] * offsets
    )
    inside = (ys > 2) & (xs > 2) & (ys < pixels.shape[0] - 3) & (xs < pixels.shape[1] - 3)
    return profiles, inside


def _direction(pixels: Array, channel: Array, ys: Array, xs: Array) -> tuple[Array, Array]:
    """Unit vectors of the gradient, from Sobel differences of the given channels."""
    height, width = pixels.shape[:2]
    rows = np.clip(ys[:, None] + np.arange(-1, 2), 0, height - 1)
    columns = np.clip(xs[:, None] + np.arange(-1, 2), 0, width - 1)
    patch = pixels[rows[:, :, None], columns[:, None, :], channel[:, None, None]].astype(np.float32)
    smooth = np.array([1, 2, 1], np.float32)
    gy = (patch[:, 2] - patch[:, 0]) @ smooth
    gx = (patch[:, :, 2] - patch[:, :, 0]) @ smooth
    length = np.maximum(np.hypot(gy, gx), 1e-6)
    return gy / length, gx / length


def _bilinear(pixels: Array, channel: Array, y: Array, x: Array) -> Array:
    """Values of `channel` at fractional places; the border is repeated."""
    y = np.clip(y, 0, pixels.shape[0] - 1.001)
    x = np.clip(x, 0, pixels.shape[1] - 1.001)
    top, left = y.astype(np.int64), x.astype(np.int64)
    fy, fx = (y - top).astype(np.float32), (x - left).astype(np.float32)
    upper = pixels[top, left, channel] * (1 - fx) + pixels[top, left + 1, channel] * fx
    lower = pixels[top + 1, left, channel] * (1 - fx) + pixels[top + 1, left + 1, channel] * fx
    return upper * (1 - fy) + lower * fy


# ---------------------------------------------------------------- how


def _measure(profiles: Array) -> Edges:
    """Width and overshoot of rising profiles [N, samples] centred on an edge."""
    centre = profiles.shape[1] // 2
    rising, falling = profiles[:, centre:], profiles[:, centre::-1]
    top, top_at = _climb(rising)
    low, low_at = _climb(-falling)
    low = -low
    span = np.maximum(top_at + low_at, 4)
    high_level = _plateau(rising, top, top_at, span)
    low_level = -_plateau(-falling, -low, low_at, span)
    height = np.maximum(high_level - low_level, 1e-3)
    width = _crossing(rising, low_level + 0.9 * height) + _crossing(-falling, -(low_level + 0.1 * height))
    over = np.maximum(top - high_level, low_level - low) / height * 100
    clear = height > 8
    return Edges(width[clear] * _STEP, over[clear])


def _climb(side: Array) -> tuple[Array, Array]:
    """(value, index) of the first summit of each row: the highest point before it falls by 2 levels or 3%."""
    highest = np.maximum.accumulate(side, axis=1)
    tolerance = np.maximum(2.0, 0.03 * (highest - side[:, :1]))
    fallen = side < highest - tolerance
    stop = np.where(fallen.any(1), fallen.argmax(1), side.shape[1])
    masked = np.where(np.arange(side.shape[1]) < stop[:, None], side, -np.inf)
    summit = masked.max(1)
    at = (masked >= summit[:, None] - 0.5).argmax(1)
    return summit, at


def _plateau(side: Array, summit: Array, at: Array, span: Array) -> Array:
    """Level beyond the summit: the median from a half to one and a half edge widths on, unless the picture moves on."""
    last = side.shape[1] - 1
    begin, end = np.minimum(at + span // 2, last), np.minimum(at + span + span // 2, last)
    index = np.arange(side.shape[1])
    window = (index >= begin[:, None]) & (index <= end[:, None])
    level = np.nanmedian(np.where(window, side, np.nan), axis=1)
    steady = np.abs(level - summit) < 0.35 * (summit - side[:, 0])
    return np.where(steady, level, summit)


def _crossing(side: Array, level: Array) -> Array:
    """Index, with fraction, at which each row first reaches its level."""
    reached = side >= level[:, None]
    at = np.maximum(reached.argmax(1), 1)
    rows = np.arange(len(side))
    before, after = side[rows, at - 1], side[rows, at]
    return at - 1 + np.clip((level - before) / np.maximum(after - before, 1e-6), 0, 1)


def _largest_step(pixels: Array) -> float:
    """Over row boundaries and channels: the step that four fifths of the columns reach in one direction."""
    fifth = pixels.shape[1] // 5
    best = 0.0
    for top in range(0, len(pixels) - 1, 64):
        jump = np.diff(pixels[top : top + 65].astype(np.int16), axis=0)
        jump = np.partition(jump, (fifth, jump.shape[1] - 1 - fifth), axis=1)
        best = max(best, float(jump[:, fifth].max()), float(-jump[:, -1 - fifth].min()))
    return best
