"""Scale fusion: attention in overlapping windows and over the whole map, fused by frequency (FreeScale, 2412.09626)."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from gensparse.attention import sparse_attention
from gensparse.highres.freescale import TokenWindows, fused
from gensparse.highres.views import Size, View, jittered, windows
from gensparse.layout import Layout
from gensparse.patterns import Blocks, Pattern
from gensparse.plan import build_plan
from gensparse.processors.operators import OperatorCall


@dataclass(frozen=True)
class ScaleFusion:
    """Low frequencies of attention in windows, high ones of attention over the whole map.

    Tokens in several windows get the mean of their outputs. Windows that jitter moves over the border of the map end
    there; the authors pad the map with zeros, which their windows then attend to.

    Args:
        windows: their size, stride and jitter in tokens.
        scale: the zoom of the longer axis, which sets the width of the filter; with 1 only the windows count.
        whole: what a token sees in the whole map; None is the model's own dense attention.
        fusion: "spatial", or "reference", which also blurs neighbouring channels of the heads' outputs.
        seed: of the jitter, drawn anew for every layer and step.
    """

    windows: TokenWindows
    scale: int
    whole: Pattern | None = None
    fusion: str = "spatial"
    seed: int = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: OperatorCall) -> Tensor:
        local = self._local(q, k, v, call)
        if self.scale == 1:
            return local
        whole = call.dense() if self.whole is None else self._masked(q, k, v, call)
        size = call.layout.grid[1:]
        maps = (x.flatten(2).unflatten(1, size) for x in (local, whole.to(local.dtype)))
        return fused(*maps, self.scale, self.fusion).flatten(1, 2).unflatten(-1, q.shape[2:])

    def views(self, size: Size, layer: int, step: int) -> list[View]:
        """The windows of a layer at a step, as parts of the map padded by the jitter."""
        plain = windows(size, self.windows.window, self.windows.stride)
        if not any(self.windows.jitter):
            return plain
        text = f"{self.seed} {layer} {step}"  # hashed: equal on every machine and in every release
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
        return jittered(plain, size, self.windows.jitter, torch.Generator().manual_seed(seed))

    def key(self) -> str:
        return repr(self)

    def density(self, layout: Layout) -> float:
        """Pairs that both parts compute, as a share of all pairs; above 1 where the whole map is dense."""
        size = layout.grid[1:]
        found = windows(size, self.windows.window, self.windows.stride)
        local = len(found) * prod(map(min, size, self.windows.window)) ** 2 / prod(size) ** 2
        if self.scale == 1:
            return local
        return local + (1.0 if self.whole is None else build_plan(self.whole, layout).density)

    def _masked(self, q: Tensor, k: Tensor, v: Tensor, call: OperatorCall) -> Tensor:
        assert self.whole is not None
        plan = build_plan(self.whole, call.layout, device=q.device)
        return sparse_attention(q, k, v, plan, scale=call.scale, key_bias=call.key_bias)

    def _local(self, q: Tensor, k: Tensor, v: Tensor, call: OperatorCall) -> Tensor:
        """Mean of the windows' outputs, [B, S, H, D]."""
        batch, tokens, heads, channels = q.shape
        size, reach = call.layout.grid[1:], self.windows.jitter
        views = self.views(size, call.layer, call.step)
        maps = [_padded(x.unflatten(1, size), reach) for x in (q, k, v)]
        bias = _padded_bias(call.key_bias, size, reach, q)
        inner = View(reach[0], reach[0] + size[0], reach[1], reach[1] + size[1])
        shape = tuple(map(min, size, self.windows.window))
        plan = build_plan(Blocks(shape), Layout.image(*shape), device=q.device)
        total = torch.zeros(maps[0].shape, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        count = total.new_zeros(*total.shape[1:3], 1, 1)
        most = max(1, tokens // prod(shape))  # as many tokens at a time as the map has
        for group, masked in _groups(views, inner, most, masked=call.key_bias is not None):
            parts = [torch.cat([_cut(x, view) for view in group]).flatten(1, 2) for x in maps]
            own = torch.cat([_cut_bias(bias, view, batch) for view in group]) if masked and bias is not None else None
            out = sparse_attention(*parts, plan, scale=call.scale, key_bias=own)
            for view, part in zip(group, out.split(batch), strict=True):
                _cut(total, view).add_(part.unflatten(1, shape))
                _cut(count[None], view).add_(1)
        mean = _cut(total, inner) / _cut(count[None], inner)
        return mean.to(q.dtype).reshape(batch, tokens, heads, channels)


def _groups(views: list[View], inner: View, most: int, masked: bool) -> Iterator[tuple[list[View], bool]]:
    """Windows in groups of at most `most`, and whether their keys are masked: those over the border, or all."""
    over = [view for view in views if masked or not _inside(view, inner)]
    rest = [view for view in views if not masked and _inside(view, inner)]
    for part, hidden in ((over, True), (rest, False)):
        for first in range(0, len(part), most):
            yield part[first : first + most], hidden


def _inside(view: View, inner: View) -> bool:
    rows = inner.top <= view.top and view.bottom <= inner.bottom
    return rows and inner.left <= view.left and view.right <= inner.right


def _cut(x: Tensor, view: View) -> Tensor:
    """Rows and columns of x [B, rows, columns, H, D]."""
    return x[:, view.top : view.bottom, view.left : view.right]


def _cut_bias(bias: Tensor, view: View, batch: int) -> Tensor:
    """Bias of a window's keys for every sample, [B, H|1, tokens], from that of the map [B|1, H|1, rows, columns]."""
    return view.of(bias).flatten(2).expand(batch, -1, -1)


def _padded(x: Tensor, reach: Size) -> Tensor:
    """x [B, rows, columns, H, D] with zeros around the map."""
    return F.pad(x, (0, 0, 0, 0, reach[1], reach[1], reach[0], reach[0])) if any(reach) else x


def _padded_bias(bias: Tensor | None, size: Size, reach: Size, q: Tensor) -> Tensor | None:
    """Bias of the keys of the padded map [B|1, H|1, rows, columns], -inf beyond the map; None where none is needed."""
    if bias is None and not any(reach):
        return None
    own = q.new_zeros(1, 1, *size) if bias is None else bias.unflatten(-1, size)
    return F.pad(own, (reach[1], reach[1], reach[0], reach[0]), value=float("-inf")) if any(reach) else own
