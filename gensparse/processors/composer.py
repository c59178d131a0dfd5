"""The attention composer of C-Upscale: one prompt for the picture, further ones for regions (2505.16976).

The text of a call is the picture's prompt, then every region's. Rows of the batch are halves of guidance over views of
the picture over pictures; only the last half, the conditional one, is composed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gensparse.attention import sparse_attention
from gensparse.errors import ConfigError
from gensparse.highres.c_upscale import Part, relevance, screen, word_maps
from gensparse.layout import Layout
from gensparse.patterns import Policy, Regions
from gensparse.plan import Plan, build_plan
from gensparse.processors.masks import key_bias
from gensparse.processors.text_attention import TextCall
from gensparse.subjects.masks import to_grid

_READS_TEXT = Policy((("target", "text"),))
_MASKS = "regions"
_TILES = {"q_tile": (1, 8, 16), "k_tile": (1, 8, 8)}  # nothing to search for where all keys are text


class ViewTexts(NamedTuple):
    """One view of the picture in a batch.

    Args:
        part: where it is.
        masks: bool [regions, rows, columns], which of its cells every region covers.
    """

    part: Part
    masks: Tensor


class Scene(NamedTuple):
    """What the rows and the text of the coming calls are.

    Args:
        pictures: of every view.
        words: tokens of the picture's prompt; lengths: of every region's, behind it.
    """

    views: tuple[ViewTexts, ...]
    pictures: int
    words: int
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.words + sum(self.lengths)


class Composer:
    """Computes cross-attention (see `text_attention`) as it is told: record, compose, or leave it to the model.

    A token attends to the picture's prompt, screened by what `recording` saw if it saw anything, and where regions
    cover it also to their prompts, in one softmax over all of them: output = (1 - semantic) * first + semantic *
    second. Where a region's mask cuts through a view the second is one sparse call under `Regions`. That tokens outside
    all regions keep the first, and how regions share tokens, is ours.

    Args:
        semantic: weight of the regions' prompts, 0..1.
        content: bool [pictures, words], the words that are screened.

    Raises:
        ConfigError: a weight outside 0..1.
    """

    def __init__(self, semantic: float, content: Tensor | None = None) -> None:
        if not 0 <= semantic <= 1:
            raise ConfigError(f"The weight of regional prompts is {semantic!r}; give a number from 0 to 1.")
        self._semantic, self._content = semantic, content
        self._maps: dict[str, Tensor] = {}
        self._recording = 0  # pictures in the call that is recorded
        self._scene: Scene | None = None
        self._regions: dict[tuple[Part, tuple[int, int]], _Regional | None] = {}

    @contextmanager
    def recording(self, pictures: int) -> Iterator[None]:
        """Inside, calls see the whole picture under its prompt alone, and their maps screen what is composed later."""
        self._maps, self._recording = {}, pictures
        try:
            yield
        finally:
            self._recording = 0

    @contextmanager
    def composing(self, scene: Scene) -> Iterator[None]:
        """Inside, calls are composed as `scene` says."""
        self._scene = scene
        try:
            yield
        finally:
            self._scene = None

    def __call__(self, call: TextCall) -> Tensor | None:
        if self._recording:
            self._record(call)
            return None
        if self._scene is None or call.k.shape[1] != self._scene.tokens:
            return None  # an image prompt's own call
        return self._compose(call, self._scene)

    def _record(self, call: TextCall) -> None:
        if call.name in self._maps:
            return  # image prompts call once more, behind the text
        bias = None if call.mask is None else _bias(call.mask)[-self._recording :]
        maps = word_maps(call.q[-self._recording :], call.k[-self._recording :], call.scale, bias)
        self._maps[call.name] = maps.unflatten(1, call.grid)

    def _compose(self, call: TextCall, scene: Scene) -> Tensor:
        first = len(call.q) - len(scene.views) * scene.pictures
        words = slice(scene.words)
        out = torch.empty_like(call.q)
        if first:
            out[:first] = _attend(call, slice(first), words)
        for number, view in enumerate(scene.views):
            rows = slice(first + number * scene.pictures, first + (number + 1) * scene.pictures)
            own = _attend(call, rows, words, self._screen(call, view.part))
            regional = self._regional(call, scene, view)
            if regional is not None and self._semantic > 0:
                own = regional.mixed(own, regional.attend(call, rows), self._semantic)
            out[rows] = own
        return out

    def _screen(self, call: TextCall, part: Part) -> Tensor | None:
        maps = self._maps.get(call.name)
        if maps is None or self._content is None:
            return None
        return screen(relevance(maps, part, call.grid), self._content.to(maps.device))

    def _regional(self, call: TextCall, scene: Scene, view: ViewTexts) -> "_Regional | None":
        key = (view.part, call.grid)
        if key not in self._regions:
            self._regions[key] = _Regional.of(view.masks, scene, call)
        return self._regions[key]


class _Regional(NamedTuple):
    """Attention of a view's tokens to the prompts of the regions that reach into it.

    Args:
        texts: (first, last + 1) token of every such prompt in the text of a call.
        plan: who reads which; None where every region covers the whole view.
        covered: bool [tokens] of a plan.
    """

    texts: tuple[tuple[int, int], ...]
    plan: Plan | None
    covered: Tensor | None

    @classmethod
    def of(cls, masks: Tensor, scene: Scene, call: TextCall) -> "_Regional | None":
        if not len(masks):
            return None
        own = to_grid(masks, call.grid, "nearest-exact")
        inside = own.flatten(1).any(1).nonzero().flatten().tolist()
        if not inside:
            return None
        stops = (scene.words + np.cumsum(scene.lengths)).tolist()
        texts = tuple((stops[n] - scene.lengths[n], stops[n]) for n in inside)
        own = own[inside]
        if bool(own.all()):
            return cls(texts, None, None)
        lengths = tuple(stop - start for start, stop in texts)
        layout = Layout.image(*call.grid, text=sum(lengths))
        pattern = Regions(text=lengths, masks=_MASKS) & _READS_TEXT
        plan = build_plan(pattern, layout, data={_MASKS: own.cpu().numpy()}, device=call.q.device, **_TILES)
        assert isinstance(plan, Plan), "made of a pattern"
        return cls(texts, plan, own.flatten(1).any(0).to(call.q.device))

    def attend(self, call: TextCall, rows: slice) -> Tensor:
        """[pictures, N, H, D]; 0 for tokens that no region covers."""
        q = call.q[rows]
        k, v = (torch.cat([x[rows, start:stop] for start, stop in self.texts], 1) for x in (call.k, call.v))
        bias = None
        if call.mask is not None:
            bias = _rows_of(_bias(call.mask), rows)
            bias = torch.cat([bias[..., start:stop] for start, stop in self.texts], -1)
        if self.plan is None:
            return _sdpa(q, k, v, None if bias is None else bias[:, :, None], call.scale)
        # text and picture in one sequence, in which only the picture asks and only the text is read
        words = q.new_zeros(k.shape[0], k.shape[1], *q.shape[2:])
        blank = torch.zeros_like(q)
        if bias is not None:
            bias = F.pad(bias, (0, q.shape[1]))
        out = sparse_attention(
            torch.cat([words, q], 1),
            torch.cat([k, blank], 1),
            torch.cat([v, blank], 1),
            self.plan,
            scale=call.scale,
            key_bias=bias,
        )
        return out[:, k.shape[1] :]

    def mixed(self, own: Tensor, regional: Tensor, weight: float) -> Tensor:
        """(1 - weight) * own + weight * regional where regions are."""
        both = torch.lerp(own, regional, weight)
        return both if self.covered is None else torch.where(self.covered[None, :, None, None], both, own)


def _attend(call: TextCall, rows: slice, words: slice, added: Tensor | None = None) -> Tensor:
    """Attention of some rows to some of the text; `added` [rows, N, T] to its logits."""
    mask = None
    if call.mask is not None:
        mask = _rows_of(_bias(call.mask), rows)[..., words][:, :, None]
    if added is not None:
        mask = added[:, None] if mask is None else mask + added[:, None]
    return _sdpa(call.q[rows], call.k[rows, words], call.v[rows, words], mask, call.scale)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    mask = None if mask is None else mask.to(q.dtype)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2)


def _bias(mask: Tensor) -> Tensor:
    bias = key_bias(mask)
    if bias is None:
        raise ConfigError("Regional prompts need a mask that is the same for every token of the picture; leave it out.")
    return bias


def _rows_of(bias: Tensor, rows: slice) -> Tensor:
    return bias if bias.shape[0] == 1 else bias[rows]
