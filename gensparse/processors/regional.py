"""Regions in one sequence of text and picture: each reads its own prompt (Regional-Prompting-FLUX, 2411.02395)."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gensparse.attention import sparse_attention
from gensparse.layout import Layout
from gensparse.patterns import Pattern, Regions
from gensparse.plan import build_plan
from gensparse.processors.operators import OperatorCall
from gensparse.subjects.areas import Regions as Areas

REGION, BASE = "region", "base prompt"
"""Names of the text segments of one region each, and of the call's own prompt behind them."""

MASKS = "regions"


@dataclass(frozen=True)
class RegionalAttention:
    """Masked attention to the regions' texts, blended with plain attention to the base prompt.

    The text is that of every region, of the background where some token is in no region, then the base prompt. Regions'
    texts and picture attend under `patterns.Regions`. The base prompt and the picture attend plainly, and picture
    tokens take `blend` of that. Texts go on by the attention they take part in. In the unconditional half of a batch
    only the second counts.

    Args:
        areas: the regions.
        size: (height, width) of the picture in pixels that their boxes are rounded to.
        texts: text tokens of every region, the background's last.
        background: whether the last text is the background's.
        base: text tokens of the base prompt, 0 without it; then nothing is blended.
        blend: share of plain attention in picture tokens, 0..1.
        guided: whether the first half of the batch is the unconditional one.
        within, within_base: what else limits the masked and the plain attention; None for nothing.
    """

    areas: Areas
    size: tuple[int, int]
    texts: tuple[int, ...]
    background: bool
    base: int
    blend: float
    guided: bool = False
    within: Pattern | None = None
    within_base: Pattern | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: OperatorCall) -> Tensor:
        words, text = sum(self.texts), sum(self.texts) + self.base
        first = call.layout.segments[0].kind == "text"
        start = 0 if first else call.layout.tokens - text
        regional, own = slice(start, start + words), slice(start + words, start + text)
        picture = slice(text, None) if first else slice(0, start)
        out = torch.zeros_like(q)
        conditional = slice(len(q) // 2 if self.guided else 0, None)
        masked = self._masked(*(_parts(x[conditional], regional, picture) for x in (q, k, v)), call, regional, picture)
        out[conditional, regional], out[conditional, picture] = masked[:, :words], masked[:, words:]
        if self.base:
            plain = self._plain(*(_parts(x, own, picture) for x in (q, k, v)), call, own, picture)
            out[:, own] = plain[:, : self.base]
            share = torch.ones(len(q), 1, 1, 1, dtype=q.dtype, device=q.device)
            share[conditional] = self.blend
            out[:, picture] = (1 - share) * out[:, picture] + share * plain[:, self.base :]
        return out

    def key(self) -> str:
        return repr(self)

    def density(self, layout: Layout) -> float:
        """Pairs that both parts compute, as a share of all pairs of the sequence."""
        masked = build_plan(self.pattern, self._layout(layout, sum(self.texts)), data=self._data(layout))
        pairs = masked.density * (sum(self.texts) + _picture(layout)) ** 2
        if self.base:
            plain = 1.0
            if self.within_base is not None:
                plain = build_plan(self.within_base, self._layout(layout, self.base)).density
            pairs += plain * (self.base + _picture(layout)) ** 2
        return pairs / layout.tokens**2

    @property
    def pattern(self) -> Pattern:
        """Who sees whom among the regions' texts and the picture."""
        pattern = Regions(self.texts, MASKS, self.background)
        return pattern if self.within is None else pattern & self.within

    def _masked(self, q: Tensor, k: Tensor, v: Tensor, call: OperatorCall, text: slice, picture: slice) -> Tensor:
        layout = self._layout(call.layout, sum(self.texts))
        plan = build_plan(self.pattern, layout, data=self._data(call.layout), device=q.device)
        return sparse_attention(q, k, v, plan, scale=call.scale, key_bias=_bias(call, text, picture))

    def _plain(self, q: Tensor, k: Tensor, v: Tensor, call: OperatorCall, text: slice, picture: slice) -> Tensor:
        bias = _bias(call, text, picture)
        if self.within_base is not None:
            plan = build_plan(self.within_base, self._layout(call.layout, self.base), device=q.device)
            return sparse_attention(q, k, v, plan, scale=call.scale, key_bias=bias)
        mask = None if bias is None else bias[:, :, None].to(q.dtype)
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), mask, scale=call.scale)
        return out.transpose(1, 2)

    def _layout(self, layout: Layout, text: int) -> Layout:
        return Layout.image(*layout.grid[1:], text=text)

    def _data(self, layout: Layout) -> dict[str, np.ndarray]:
        return {MASKS: token_masks(self.areas, self.size, layout.grid[1:])}


@lru_cache(maxsize=32)
def token_masks(areas: Areas, size: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """bool [R, rows, columns]: which tokens every region covers; of masks those from half on."""
    masks = np.stack([plane >= 0.5 * item.weight for plane, item in zip(areas.masks(size, grid), areas, strict=True)])
    masks.setflags(write=False)
    return masks


def _parts(x: Tensor, text: slice, picture: slice) -> Tensor:
    """Text and picture of x [B, S, H, D] next to each other, text first."""
    return torch.cat([x[:, text], x[:, picture]], 1)


def _bias(call: OperatorCall, text: slice, picture: slice) -> Tensor | None:
    bias = call.key_bias
    return None if bias is None else torch.cat([bias[..., text], bias[..., picture]], -1)


def _picture(layout: Layout) -> int:
    return layout.segments[layout.target].length
