"""A space-filling curve through any box: the generalised Hilbert curve (gilbert, J. Cerveny, BSD-2)."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from gensparse.layout import Grid, Ints

_Vector = tuple[int, int, int]


@lru_cache(maxsize=16)
def gilbert(grid: Grid) -> Ints:
    """Raster index of every point of the curve through a grid (F, H, W), each token once; not writable.

    Consecutive tokens are neighbours (on some odd sizes a few steps are diagonal), and runs are compact boxes.
    """
    depth, height, width = grid
    axes = {"w": (width, 0, 0), "h": (0, height, 0), "d": (0, 0, depth)}
    longest = max(grid)
    major = "whd" if width == longest else "hwd" if height == longest else "dwh"
    points = np.array(list(_points((0, 0, 0), *(axes[name] for name in major))), np.int64)
    order = points[:, 0] + width * (points[:, 1] + height * points[:, 2])
    order.setflags(write=False)
    return order


def _points(p: _Vector, a: _Vector, b: _Vector, c: _Vector) -> Iterator[_Vector]:
    """Points from corner p over the box of the axis-aligned vectors a (along which the curve runs), b and c."""
    w, h, d = (abs(sum(v)) for v in (a, b, c))
    da, db, dc = (_sign(v) for v in (a, b, c))
    for length, step, others in ((w, da, (h, d)), (h, db, (w, d)), (d, dc, (w, h))):
        if others == (1, 1):
            yield from (_add(p, _times(step, i)) for i in range(length))
            return
    a2, b2, c2 = (_half(v, length, step) for v, length, step in ((a, w, da), (b, h, db), (c, d, dc)))
    a_rest, b_rest, c_rest = _sub(a, a2), _sub(b, b2), _sub(c, c2)
    a_end, b_end, c_end = _sub(a, da), _sub(b2, db), _sub(c2, dc)
    if 2 * w > 3 * h and 2 * w > 3 * d:
        boxes = [(p, a2, b, c), (_add(p, a2), a_rest, b, c)]
    elif 3 * h > 4 * d:
        boxes = [
            (p, b2, c, a2),
            (_add(p, b2), a, b_rest, c),
            (_add(p, a_end, b_end), _neg(b2), c, _neg(a_rest)),
        ]
    elif 3 * d > 4 * h:
        boxes = [
            (p, c2, a2, b),
            (_add(p, c2), a, b, c_rest),
            (_add(p, a_end, c_end), _neg(c2), _neg(a_rest), b),
        ]
    else:
        far = _sub(c, dc)
        boxes = [
            (p, b2, c2, a2),
            (_add(p, b2), c, a2, b_rest),
            (_add(p, b_end, far), a, _neg(b2), _neg(c_rest)),
            (_add(p, a_end, b2, far), _neg(c), _neg(a_rest), b_rest),
            (_add(p, a_end, b_end), _neg(b2), c2, _neg(a_rest)),
        ]
    for box in boxes:
        yield from _points(*box)


def _half(v: _Vector, length: int, step: _Vector) -> _Vector:
    """Half of a vector rounded down, grown to an even length where the whole is longer than 2."""
    half = (v[0] // 2, v[1] // 2, v[2] // 2)
    return _add(half, step) if abs(sum(half)) % 2 and length > 2 else half


def _sign(v: _Vector) -> _Vector:
    return tuple((x > 0) - (x < 0) for x in v)  # type: ignore[return-value]


def _add(*vectors: _Vector) -> _Vector:
    return tuple(map(sum, zip(*vectors, strict=True)))  # type: ignore[return-value]


def _sub(u: _Vector, v: _Vector) -> _Vector:
    return (u[0] - v[0], u[1] - v[1], u[2] - v[2])


def _neg(v: _Vector) -> _Vector:
    return (-v[0], -v[1], -v[2])


def _times(v: _Vector, n: int) -> _Vector:
    return (v[0] * n, v[1] * n, v[2] * n)
