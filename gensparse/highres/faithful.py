"""Keeping an enlarged picture to the one it was made from: shrunk again by area, it must be that picture.

Back-projection in pixel space (Irani and Peleg 1991, "Improving resolution by image registration"): the difference
between the given picture and the shrunk result is enlarged and added. Two passes do it:

- *edges*: the difference goes to where the result itself has edges, and no value leaves the range of levels around it,
  so that an edge moves to where the given picture has it, instead of getting a halo;
- *tones*: what is left is added smoothly, until nothing is left that 8 bits could show.

The picture is walked in strips of rows; besides it, only maps of the given picture's size are held.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from gensparse.errors import ConfigError
from gensparse.highres.resample import keys_kernel

EDGE_PASSES = 4
TONE_PASSES = 8
FLAT = 1.0  # levels per pixel of slope that count as no edge
STRIP_PIXELS = 1 << 20
ROUNDING = 0.5  # levels: closer than that, the given picture does not say more
DONE = 0.005  # levels of mean difference beyond rounding at which tones are done
RELAXED = 1.4  # an enlargement shrunk again keeps 0.4 to 1 of a difference, by its frequency

Span = tuple[int, int]


def keep_to(picture: np.ndarray, source: np.ndarray, *, edges: int = EDGE_PASSES, tones: int = TONE_PASSES):
    """The picture uint8 [H, W, C], corrected so that its area means are `source` uint8 [h, w, C].

    Args:
        picture: at least as large as the source on both sides, in any ratio; it is changed in place and returned.
        edges, tones: passes at most.

    Raises:
        ConfigError: a picture smaller than its source, or other channels.
    """
    height, width = source.shape[:2]
    if picture.shape[0] < height or picture.shape[1] < width or picture.shape[2:] != source.shape[2:]:
        raise ConfigError(
            f"A picture of {picture.shape[1]}x{picture.shape[0]} cannot be kept to one of {width}x{height}; give the "
            "enlarged picture and the smaller one it was made from, with as many channels."
        )
    frame = Frame((height, width), (picture.shape[0], picture.shape[1]))
    target = torch.from_numpy(np.array(source)).float()
    work = torch.from_numpy(picture)
    low, high = frame.range_of(work)
    for _ in range(edges):
        error = _beyond_rounding(target - frame.shrunk(work))
        if not error.any():
            return picture
        _move_edges(work, frame, error, low, high)
    left = torch.zeros_like(target)
    base = work.clone() if tones else work
    for _ in range(tones):
        error = _beyond_rounding(target - frame.shrunk(work))
        if float(error.abs().mean()) < DONE:
            break
        left += RELAXED * error
        for rows, strip in frame.strips(base):
            added = strip.float() + frame.enlarged(left, rows)
            work[rows[0] : rows[1]] = added.round_().clamp_(0, 255).to(torch.uint8)
    return picture


def area_mean(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Means of equal rectangles, float32 [h, w, C]: how a picture [H, W, C] looks when it is shrunk to size (h, w)."""
    frame = Frame(size, (picture.shape[0], picture.shape[1]))
    return frame.shrunk(torch.from_numpy(np.array(picture))).numpy()


class Frame:
    """A small and a large size, and how pixels of one lie in the other.

    Args:
        small, large: (rows, columns).
    """

    def __init__(self, small: tuple[int, int], large: tuple[int, int]) -> None:
        self.small, self.large = small, large
        self._columns = _taps(small[1], large[1], (0, large[1]))
        self._owner = _owners(small[1], large[1])

    def strips(self, picture: torch.Tensor) -> Iterator[tuple[Span, torch.Tensor]]:
        """Rows (start, stop) of the large picture, and those rows."""
        step = max(1, STRIP_PIXELS // max(1, self.large[1]))
        for top in range(0, self.large[0], step):
            rows = (top, min(top + step, self.large[0]))
            yield rows, picture[rows[0] : rows[1]]

    def shrunk(self, picture: torch.Tensor) -> torch.Tensor:
        """Area means of the large picture [H, W, C], float32 [h, w, C]."""
        return self.shrunk_of(lambda rows: picture[rows[0] : rows[1]].float())

    def shrunk_of(self, read: Callable[[Span], torch.Tensor]) -> torch.Tensor:
        """Area means of what `read` gives for rows (start, stop) of the large picture: float32 [rows, W, C]."""
        rows, columns = (_edges(n, length) for n, length in zip(self.small, self.large, strict=True))
        step = max(1, STRIP_PIXELS * self.small[0] // max(1, self.large[0] * self.large[1]))
        out = []
        for first in range(0, self.small[0], step):
            edges = rows[first : first + step + 1]
            top, bottom = int(edges[0]), min(self.large[0], math.ceil(float(edges[-1])))
            out.append(_boxes(_boxes(read((top, bottom)), columns, 1), edges - top, 0))
        return torch.cat(out).float()

    def enlarged(self, small: torch.Tensor, rows: Span) -> torch.Tensor:
        """Rows of the bicubic enlargement of [h, w, C], float32."""
        index, weight = _taps(self.small[0], self.large[0], rows)
        tall = sum(small[index[:, k]] * weight[:, k, None, None] for k in range(4))
        index, weight = self._columns
        return sum(tall[:, index[:, k]] * weight[:, k, None] for k in range(4))

    def repeated(self, small: torch.Tensor, rows: Span) -> torch.Tensor:
        """Rows of [h, w, C] with every pixel repeated."""
        return small[_owners(self.small[0], self.large[0])[rows[0] : rows[1]]][:, self._owner]

    def range_of(self, picture: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Lowest and highest level of the picture in and around every small pixel, [h, w, C] each."""
        owner = _owners(self.small[0], self.large[0])
        low = torch.full((*self.small, picture.shape[2]), 255, dtype=torch.uint8)
        high = torch.zeros_like(low)
        for rows, strip in self.strips(picture):
            at = owner[rows[0] : rows[1], None, None].expand(-1, self.small[1], picture.shape[2])
            for found, kind in ((low, "amin"), (high, "amax")):
                narrow = torch.empty(len(strip), self.small[1], picture.shape[2], dtype=torch.uint8)
                narrow.fill_(255 if kind == "amin" else 0)
                narrow.scatter_reduce_(1, self._owner[None, :, None].expand(strip.shape), strip, kind)
                found.scatter_reduce_(0, at, narrow, kind)
        return -_neighbours(-low.float()), _neighbours(high.float())


def _beyond_rounding(error: torch.Tensor) -> torch.Tensor:
    """What of a difference is more than the rounding of the given picture."""
    return error - error.clamp(-ROUNDING, ROUNDING)


def _move_edges(work: torch.Tensor, frame: Frame, error: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> None:
    """One pass: the error added where the picture is steep, within the range of levels around."""
    steep = frame.shrunk_of(lambda rows: _steepness(work, rows) + FLAT)
    share = error / steep.clamp_min(FLAT)
    before: torch.Tensor | None = None
    for rows, strip in frame.strips(work):
        slope = _steepness(work, rows, before)
        before = work[rows[1] - 1].clone()
        added = strip.float() + (slope + FLAT) * frame.enlarged(share, rows)
        bounded = torch.minimum(torch.maximum(added, frame.repeated(low, rows)), frame.repeated(high, rows))
        work[rows[0] : rows[1]] = bounded.round_().clamp_(0, 255).to(torch.uint8)


def _steepness(work: torch.Tensor, rows: Span, before: torch.Tensor | None = None) -> torch.Tensor:
    """Size of the central difference of rows of the picture, levels per pixel.

    Args:
        before: the row above, as it was before the rows above changed.
    """
    top, bottom = max(rows[0] - 1, 0), min(rows[1] + 1, len(work))
    part = work[top:bottom].float()
    if before is not None:
        part[0] = before.float()
    if top == rows[0]:
        part = torch.cat([part[:1], part])
    if bottom == rows[1]:
        part = torch.cat([part, part[-1:]])
    down = (part[2:] - part[:-2]).abs()
    inner = part[1:-1]
    across = torch.zeros_like(inner)
    across[:, 1:-1] = (inner[:, 2:] - inner[:, :-2]).abs()
    return torch.maximum(down, across).div_(2)


# --- one axis -----------------------------------------------------------------------------------------------------


def _edges(count: int, length: int) -> torch.Tensor:
    """Borders of `count` equal parts of an axis, float64 [count + 1]."""
    return torch.arange(count + 1, dtype=torch.float64) * length / count


def _boxes(values: torch.Tensor, edges: torch.Tensor, axis: int) -> torch.Tensor:
    """Means between neighbouring edges of an axis (0 or 1), which may lie inside entries."""
    length, count = values.shape[axis], len(edges) - 1
    side = float(edges[-1] - edges[0]) / count
    if float(edges[0]) == 0 and side * count == length and side.is_integer():
        return values.unflatten(axis, (count, int(side))).mean(axis + 1)
    whole = edges.floor().long().clamp_(max=length)
    part = (edges - whole).view(-1, *(1,) * (values.ndim - axis - 1))
    values = values.double()
    sums = torch.cat([torch.zeros_like(values.narrow(axis, 0, 1)), values.cumsum(axis)], axis)
    inside = values.index_select(axis, whole.clamp(max=length - 1))
    upto = sums.index_select(axis, whole) + part * inside
    return upto.diff(dim=axis) / side


def _owners(small: int, large: int) -> torch.Tensor:
    """The small pixel in which the centre of every large one lies, [large]."""
    return ((torch.arange(large, dtype=torch.float64) + 0.5) * (small / large)).long().clamp_(max=small - 1)


def _taps(small: int, large: int, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and weights [n, 4] of bicubic interpolation (a = -0.75, border repeated) at large pixels of a span."""
    centres = (torch.arange(*span, dtype=torch.float64) + 0.5) * (small / large) - 0.5
    first = centres.floor()
    taps = torch.arange(-1, 3, dtype=torch.float64)
    distance = (centres[:, None] - (first[:, None] + taps)).abs()
    index = (first[:, None] + taps).long().clamp_(0, small - 1)
    return index, keys_kernel(distance).float()


def _neighbours(x: torch.Tensor) -> torch.Tensor:
    """Highest of every entry and its eight neighbours, [h, w, C]."""
    return torch.nn.functional.max_pool2d(x.permute(2, 0, 1)[None], 3, 1, 1)[0].permute(1, 2, 0)
