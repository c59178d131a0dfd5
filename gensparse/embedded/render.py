"""Draws a scene: any size, any window, antialiased from signed distances.

A pixel's value depends on its place in the scene and on its size only, so a window of a large rendering can be drawn
without the rest of it, and every zoom shows edges one pixel wide.
"""

import numpy as np

from gensparse.embedded.scenes import PALETTE, Scene, Subject
from gensparse.errors import ConfigError

Array = np.ndarray
Window = tuple[float, float, float, float]

WHOLE: Window = (0.0, 0.0, 1.0, 1.0)
FILL_PERIOD = 0.075  # scene units
BACKGROUND_PERIOD = 0.15
_STRIP_PIXELS = 1 << 20


def render(scene: Scene, height: int, width: int, window: Window = WHOLE) -> Array:
    """Pixels of `window` = (y0, x0, y1, x1), fractions of the picture, as uint8 [height, width, 3].

    Raises ConfigError for an empty window or size.
    """
    y0, x0, y1, x1 = window
    if height < 1 or width < 1 or y1 <= y0 or x1 <= x0:
        raise ConfigError(
            f"Window {window} at {height}x{width} is empty: give y0 < y1, x0 < x1 and a size of at least 1."
        )
    extent_y, extent_x = scene.extent
    ys = ((y0 + (np.arange(height) + 0.5) / height * (y1 - y0)) * extent_y).astype(np.float32)
    xs = ((x0 + (np.arange(width) + 0.5) / width * (x1 - x0)) * extent_x).astype(np.float32)
    pixel = ((y1 - y0) * extent_y / height + (x1 - x0) * extent_x / width) / 2
    out = np.empty((height, width, 3), np.uint8)
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        strip = _strip(scene, ys[top : top + rows], xs, np.float32(pixel))
        np.rint(strip, out=strip)
        out[top : top + rows] = strip
    return out


def shades(colour: str, contrast: float) -> tuple[Array, Array]:
    """The colour and the second colour of its textures: lighter, or darker for light colours."""
    base = np.array(PALETTE[colour], np.float32)
    light = base @ np.array([0.299, 0.587, 0.114]) > 165
    return base, base + (np.float32(20.0 if light else 255.0) - base) * np.float32(contrast)


def _strip(scene: Scene, ys: Array, xs: Array, pixel: np.float32) -> Array:
    """Float colours [rows, columns, 3] of the given coordinates (scene units)."""
    base, second = shades(scene.background_colour, 0.28)
    shifted_y = ys[:, None] + np.float32(scene.phase[0] * BACKGROUND_PERIOD)
    shifted_x = xs[None, :] + np.float32(scene.phase[1] * BACKGROUND_PERIOD)
    amount = _texture(scene.background, shifted_y, shifted_x, BACKGROUND_PERIOD, pixel)
    out = _mix(base, second, amount, (len(ys), len(xs)))
    for subject in scene.subjects:
        _draw(out, subject, scene.extent, ys, xs, pixel)
    return out


def _mix(base: Array, second: Array, amount: Array | None, shape: tuple[int, int]) -> Array:
    out = np.empty((*shape, 3), np.float32)
    out[:] = base
    if amount is not None:
        out += amount[..., None] * (second - base)
    return out


def _draw(out: Array, subject: Subject, extent: tuple[float, float], ys: Array, xs: Array, pixel: np.float32) -> None:
    """Lay one subject over `out`, touching only its bounding box."""
    cy, cx = subject.y * extent[0], subject.x * extent[1]
    reach = subject.radius * 1.45 + pixel
    top, bottom = np.searchsorted(ys, (cy - reach, cy + reach))
    left, right = np.searchsorted(xs, (cx - reach, cx + reach))
    if top == bottom or left == right:
        return
    v, u = _own_axes(subject, extent, ys[top:bottom, None], xs[None, left:right])
    cover = _coverage(_edge_distance(subject, v, u), pixel)[..., None]
    base, second = shades(subject.colour, 0.6)
    colour = _mix(base, second, _texture(subject.fill, v, u, FILL_PERIOD, pixel), v.shape)
    area = out[top:bottom, left:right]
    area += cover * (colour - area)


def signed_distance(subject: Subject, extent: tuple[float, float], y: Array, x: Array) -> Array:
    """Distance, in scene units, from the points (y, x) (scene units, broadcast) to the subject's edge; < 0 inside."""
    return _edge_distance(subject, *_own_axes(subject, extent, y, x))


def _own_axes(subject: Subject, extent: tuple[float, float], y: Array, x: Array) -> tuple[Array, Array]:
    """The points relative to the subject's centre, turned against its rotation."""
    angle = np.deg2rad(subject.rotation)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    dy, dx = y - np.float32(subject.y * extent[0]), x - np.float32(subject.x * extent[1])
    return cos * dy - sin * dx, sin * dy + cos * dx


def _edge_distance(subject: Subject, v: Array, u: Array) -> Array:
    scale = np.float32(subject.radius)
    return _DISTANCE[subject.shape](v / scale, u / scale) * scale


def _coverage(distance: Array, pixel: np.float32) -> Array:
    """Share of a pixel inside, from the signed distance (negative inside) of its centre to the edge."""
    return np.clip(np.float32(0.5) - distance / pixel, 0, 1)


# ---------------------------------------------------------------- textures: share of the second colour, None = none


def _texture(kind: str, y: Array, x: Array, period: float, pixel: np.float32) -> Array | None:
    return _TEXTURE[kind](y, x, np.float32(period), pixel)


def _wave(u: Array) -> Array:
    """Signed distance, in periods, to the edges of bands that cover half of each period (negative inside)."""
    return np.abs(u - np.floor(u) - np.float32(0.5)) - np.float32(0.25)


def _plain(y: Array, x: Array, period: np.float32, pixel: np.float32) -> None:
    return None


def _striped(y: Array, x: Array, period: np.float32, pixel: np.float32) -> Array:
    return _coverage(_wave((x + y) * np.float32(0.70710678) / period) * period, pixel)


def _checkered(y: Array, x: Array, period: np.float32, pixel: np.float32) -> Array:
    a, b = (_coverage(_wave(t / period) * period, pixel) for t in (y, x))
    return a + b - 2 * a * b


def _dotted(y: Array, x: Array, period: np.float32, pixel: np.float32) -> Array:
    v, u = (t / period - np.floor(t / period) - np.float32(0.5) for t in (y, x))
    return _coverage((np.hypot(v, u) - np.float32(0.28)) * period, pixel)


def _wavy(y: Array, x: Array, period: np.float32, pixel: np.float32) -> Array:
    k = np.float32(np.pi) / period
    swing = np.float32(0.3) * period
    slope = np.hypot(1, swing * k * np.cos(k * x))
    return _coverage(_wave((y + swing * np.sin(k * x)) / period) * period / slope, pixel)


_TEXTURE = {"plain": _plain, "striped": _striped, "checkered": _checkered, "dotted": _dotted, "wavy": _wavy}


# ---------------------------------------------------------------- shapes: signed distance at unit radius, y down


def _box(v: Array, u: Array, half_v: float, half_u: float) -> Array:
    return np.maximum(np.abs(v) - np.float32(half_v), np.abs(u) - np.float32(half_u))


def _circle(v: Array, u: Array) -> Array:
    return np.hypot(v, u) - np.float32(0.94)


def _square(v: Array, u: Array) -> Array:
    return _box(v, u, 0.82, 0.82)


def _triangle(v: Array, u: Array) -> Array:
    v = v - np.float32(0.2)
    slant = np.float32(0.8660254) * np.abs(u) - np.float32(0.5) * v
    return np.maximum(slant, v) - np.float32(0.56)


def _star(v: Array, u: Array) -> Array:
    """Five points: fold the angle into half a point, then one straight edge."""
    v = v - np.float32(0.06)
    radius, angle = np.hypot(v, u), np.arctan2(u, -v)
    sector = np.float32(2 * np.pi / 5)
    folded = np.abs(angle - sector * np.rint(angle / sector))
    tip, notch = np.array([1.0, 0.0]), 0.45 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    normal = np.array([notch[1], tip[0] - notch[0]]) / np.hypot(*(tip - notch))
    along, across = radius * np.cos(folded), radius * np.sin(folded)
    return np.float32(normal[0]) * along + np.float32(normal[1]) * across - np.float32(normal[0])


def _heart(v: Array, u: Array) -> Array:
    """Two discs, and the corner between their 45 degree tangents and the radii to the points of contact."""
    v, u = v + np.float32(0.3), np.abs(u)
    root = np.float32(0.70710678)
    disc = np.hypot(v, u - np.float32(0.45)) - np.float32(0.49)
    tangent = root * (u + v - np.float32(0.45)) - np.float32(0.49)
    contact = root * (u - v - np.float32(0.45))
    return np.minimum(disc, np.maximum(np.maximum(tangent, contact), -v))


def _ring(v: Array, u: Array) -> Array:
    return np.abs(np.hypot(v, u) - np.float32(0.7)) - np.float32(0.24)


def _cross(v: Array, u: Array) -> Array:
    return np.minimum(_box(v, u, 0.92, 0.3), _box(v, u, 0.3, 0.92))


def _diamond(v: Array, u: Array) -> Array:
    half_v, half_u = 1.0, 0.62
    norm = np.hypot(1 / half_v, 1 / half_u)
    return (np.abs(v) / np.float32(half_v) + np.abs(u) / np.float32(half_u) - 1) / np.float32(norm)


def _moon(v: Array, u: Array) -> Array:
    u = u + np.float32(0.1)
    return np.maximum(
        np.hypot(v, u) - np.float32(0.92), np.float32(0.76) - np.hypot(v + np.float32(0.12), u - np.float32(0.5))
    )


def _flower(v: Array, u: Array) -> Array:
    """Six petals around a hole."""
    radius, angle = np.hypot(v, u), np.arctan2(v, u)
    sector = np.float32(np.pi / 3)
    folded = angle - sector * np.rint(angle / sector)
    petal = np.hypot(radius * np.cos(folded) - np.float32(0.62), radius * np.sin(folded)) - np.float32(0.34)
    return np.maximum(np.minimum(petal, radius - np.float32(0.5)), np.float32(0.2) - radius)


_DISTANCE = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "ring": _ring,
    "cross": _cross,
    "diamond": _diamond,
    "moon": _moon,
    "flower": _flower,
}
