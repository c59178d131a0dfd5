"""Radial: blocks of video tokens whose band shrinks with the distance in time (Li et al. 2506.19852)."""

import math
from dataclasses import dataclass
from numbers import Real

import numpy as np

from gensparse.errors import ConfigError
from gensparse.layout import Ints, Layout
from gensparse.patterns.base import NO_DATA, RUNS, Bools, Data, Pattern, Rule
from gensparse.patterns.blockmask import BlockMaskRule
from gensparse.patterns.checks import choice, whole_number

_WORDS = ("text", "register")
_THIN = 128  # frames whose share of a row of tokens falls below this are thinned out; a constant, whatever the block


@dataclass(frozen=True)
class Radial(Pattern):
    """Block mask of a video: neighbouring frames see each other wholly, then bands halve when the distance doubles.

    Per pair of frames at distance d, tokens |k - l| <= max(P / 2^bits(d) * decay, block) apart are near, where P is the
    power of two above the tokens of a frame and bits(d) the binary digits of d; where P / 2^bits(d) is below 128, only
    every floor(128 * 2^bits(d) / P)-th distance is kept. A block of tokens is kept when more than 60% of the columns
    that hold a near pair hold them in more than a third of their rows; kept blocks are dense. The mask is defined on
    blocks of `block` tokens in raster order. Text and registers see and are seen by the whole video, wherever they
    stand.

    Args:
        decay: factor of the band, positive; it does not thin the frames.
        block: tokens of a block; 128, or 64 for Wan 2.2.
        sink: every query sees the whole first frame (the authors' code: Wan yes, HunyuanVideo no).
        rule: "fixed" fits any size: blocks at the edge of a frame count the rows they have, and the block that holds
            the ragged end of the video is seen and sees. "upstream" is the authors' code with its losses where the
            block does not divide a frame: it cuts the end of such frames and the last tokens of the sequence, needs
            the video first and only text after it, and is equal where the block divides everything.
        near_window: "full", or "half" for ports of the code before November 2025, whose neighbouring frames see half.

    Raises:
        ConfigError: values of the wrong type or range, or (when bound) a layout that the upstream rule cannot build.
    """

    decay: float = 1.0
    block: int = 128
    sink: bool = True
    rule: str = "fixed"
    near_window: str = "full"

    def __post_init__(self) -> None:
        number = isinstance(self.decay, Real) and not isinstance(self.decay, bool | np.bool_)
        if not number or not math.isfinite(self.decay) or self.decay <= 0:
            raise ConfigError(f"Radial decay={self.decay!r} is not allowed; pass a positive number.")
        object.__setattr__(self, "decay", float(self.decay))
        object.__setattr__(self, "block", whole_number("Radial block", self.block, unit="tokens"))
        choice("Radial sink", self.sink, (False, True))
        choice("Radial rule", self.rule, ("fixed", "upstream"))
        choice("Radial near_window", self.near_window, ("full", "half"))

    def bind(self, layout: Layout, data: Data = NO_DATA) -> Rule:
        frames, height, width = layout.grid
        rank, total = _sequence(layout)
        mask = self._frames(frames, height * width, total)
        video = frames * height * width // self.block
        mask[video:] = True
        mask[:, video:] = True
        if self.rule == "upstream":
            self._require_order(layout)
            rank = np.where(rank < len(mask) * self.block, rank, -1)
        return BlockMaskRule(layout, rank, (self.block, self.block), mask, RUNS)

    def _frames(self, frames: int, tokens: int, total: int) -> Bools:
        """Block mask [n, n] of all pairs of frames; n blocks hold the `total` tokens of video and text."""
        fixed, block = self.rule == "fixed", self.block
        count = -(-total // block) if fixed else total // block
        starts = np.arange(frames) * tokens
        first, offset = np.divmod(starts, block)
        if not fixed and first[-1] - (-tokens // block) > count:
            raise ConfigError(
                f"Radial rule='upstream' with block={block} cannot place the last of {frames} frames of {tokens} "
                f"tokens in {count} blocks; use rule='fixed', or a block that divides the frame."
            )
        mask = np.zeros((count, count), np.bool_)
        for frame in range(frames):
            kept = self._pairs(frame, frames, tokens, offset)
            rows, other, columns = np.nonzero(kept)
            mask[first[frame] + rows, first[other] + columns] = True
        return mask

    def _pairs(self, frame: int, frames: int, tokens: int, offset: Ints) -> Bools:
        """Kept blocks [rows, frames, columns] of one query frame with every key frame.

        The near rows of column l are those from l - w to l + w, so the columns with at least m near rows in a block of
        rows are an interval, and counting them needs no mask of tokens.
        """
        reach, seen = self._reach(frame, frames, tokens)
        reach = reach[:, None]
        top, bottom = self._edges(tokens, offset[frame])
        left, right = self._edges(tokens, offset[:, None])
        top, bottom = top[:, None, None], bottom[:, None, None]
        rows = bottom - top if self.rule == "fixed" else self.block
        need = rows // 3 + 1  # more than a third
        some = np.minimum(right, bottom + reach) - np.maximum(left, top - reach)
        many = np.minimum(right, bottom + reach - need + 1) - np.maximum(left, top - reach + need - 1)
        enough = (bottom - top >= need) & (2 * reach + 1 >= need)
        many = np.where(enough, np.maximum(many, 0), 0)
        return (5 * many > 3 * np.maximum(some, 0)) & seen[:, None]

    def _edges(self, tokens: int, offset: Ints) -> tuple[Ints, Ints]:
        """First and last + 1 token inside a frame of the blocks it touches; a frame starts `offset` tokens into one."""
        most = -(-(tokens + self.block - 1) // self.block) if self.rule == "fixed" else -(-tokens // self.block)
        edge = np.arange(most + 1) * self.block - offset
        edge = np.clip(edge, 0, tokens)
        return edge[..., :-1], edge[..., 1:]

    def _reach(self, frame: int, frames: int, tokens: int) -> tuple[Ints, Bools]:
        """Per key frame, the largest distance of near tokens and whether the pair of frames is seen at all."""
        distance = np.abs(np.arange(frames) - frame)
        power, scale = 1 << tokens.bit_length(), 1 << np.frexp(distance)[1].astype(np.int64)
        band = np.maximum(power / scale * self.decay, self.block)
        reach = np.where(distance <= 1, tokens, np.minimum(band, tokens).astype(np.int64))
        if self.near_window == "half":
            reach[distance == 1] = tokens // 2
        thin = np.where(_THIN * scale > power, _THIN * scale // power, 1)
        seen = distance % thin == 0
        if self.sink:
            reach[0], seen[0] = tokens, True
        return reach, seen

    def _require_order(self, layout: Layout) -> None:
        kinds = [segment.kind for segment in layout.segments]
        if kinds[0] != "target" or any(kind not in _WORDS for kind in kinds[1:]):
            raise ConfigError(
                f"Radial rule='upstream' needs the video first and only text after it, but the layout holds "
                f"{', '.join(kinds)}; use rule='fixed'."
            )


def _sequence(layout: Layout) -> tuple[Ints, int]:
    """Place of every token in the order that is cut into blocks, and how many there are.

    The video comes first, then text and registers; -1 for all others.
    """
    order = [layout.target, *(i for i, segment in enumerate(layout.segments) if segment.kind in _WORDS)]
    rank, total = np.full(sum(segment.length for segment in layout.segments), -1), 0
    for number in order:
        start, length = layout.starts[number], layout.segments[number].length
        rank[start : start + length] = np.arange(total, total + length)
        total += length
    return rank, total
