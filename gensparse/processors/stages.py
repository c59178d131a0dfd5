"""Cross-attention in stages: what may happen to the text, the regions and the image prompts of one call.

A cross-attention site runs the code of whatever processor its module has, IP-Adapter's included, and answers the
attention calls inside it. The first one is attention to the text: its context changes (`Words`, `Phrases`), then it is
summed over regions (`Couple`). The calls after it are those to image prompts (`Merge`, `Drawer`). What no stage touches
is the processor's own call. So weights, scales, masks and projections stay those of diffusers.

Everything a stage holds belongs to one call of the denoiser; nothing is kept on a processor.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gensparse.errors import ConfigError, LayoutMismatchError
from gensparse.processors.confined import Confined
from gensparse.processors.site import SPARSE, Site, SiteCall
from gensparse.subjects.merge import gate, relevance, shares
from gensparse.subjects.phrases import aligned, averaged_values, replaced

Context = tuple[Tensor, Tensor]
"""What keys and what values are made of, [B, L, C] each."""


# --------------------------------------------------------------------------------------------------------------- stages
@dataclass(frozen=True, eq=False)
class Words:
    """Words hidden from the layers of a site (LPA, arXiv 2507.20094).

    Args:
        hidden: bool [P, L], tokens of each of the P prompts of the call.
        mode: "zero": their context is 0, so that they still take part in the softmax, with logit and value 0 (as
            published); "mask": they take no part.
        both: in both halves of guidance (as published), or in the conditional one alone.
    """

    hidden: Tensor
    mode: str = "zero"
    both: bool = True

    def of(self, rows: int, tokens: int) -> Tensor:
        """bool [rows, L]."""
        return _per_row(self.hidden, rows, tokens, "hidden words")


@dataclass(frozen=True, eq=False)
class Phrases:
    """Encodings of noun phrases as further values (Structured Diffusion Guidance, arXiv 2212.05032).

    Args:
        spans: of every prompt, token ranges of its phrases without the begin token.
        encodings: of every prompt, its phrases encoded alone, [k, L, C].
        mode: "values": one key, many values, as the authors' default; "keys": many keys, one value.
    """

    spans: tuple[tuple[tuple[int, int], ...], ...]
    encodings: tuple[Tensor, ...]
    mode: str = "values"

    def contexts(self, context: Tensor) -> list[list[Context]]:
        """Of every row [1, L, C] of the conditional context, the pairs of contexts whose attention is averaged."""
        repeats = _repeats(len(context), len(self.spans), "phrases")
        found = []
        for row, full in enumerate(context.split(1)):
            spans, own = self.spans[row // repeats], _like(self.encodings[row // repeats], context)
            if self.mode == "values":
                found.append([(full, averaged_values(full, own, spans))])
                continue
            value = replaced(full, own, spans)
            keys = [full, *(aligned(full, text[None], span) for text, span in zip(own, spans, strict=True))]
            found.append([(key, value) for key in keys])
        return found


@dataclass(frozen=True, eq=False)
class Couple:
    """Attention to one text per layer, each with a softmax of its own, summed with weights.

    Args:
        weights: [M, N] of every layer at every query.
        texts: M contexts [1 or P, L, C] of the conditional half, texts may differ in length; None is the call's own.
        negatives: the same for the unconditional half; None leaves that half as it is.
        remember: layer whose output image prompts need, see `Drawer`.
    """

    weights: Tensor
    texts: tuple[Tensor | None, ...]
    negatives: tuple[Tensor | None, ...] | None = None
    remember: int | None = None

    def __post_init__(self) -> None:
        counts = {len(self.weights), len(self.texts), len(self.negatives or self.texts)}
        if self.weights.dim() != 2 or len(counts) != 1:
            raise ConfigError(f"weights of {tuple(self.weights.shape)} do not fit {len(self.texts)} texts.")
        # on the host, once per grid: which queries a layer is computed for
        inside = self.weights.detach().cpu() != 0
        rows = [None if bool(mask.all()) else mask.nonzero()[:, 0].to(self.weights.device) for mask in inside]
        object.__setattr__(self, "_rows", tuple(rows))

    def layers(self, conditional: bool) -> Iterator[tuple[int, Tensor | None, Tensor | None]]:
        """(layer, its text, the queries it is for; None for all) of every layer with any weight."""
        texts = self.texts if conditional else self.negatives
        assert texts is not None
        for layer, (text, rows) in enumerate(zip(texts, self._rows, strict=True)):  # type: ignore[attr-defined]
            if rows is None or len(rows) or layer == self.remember:
                yield layer, text, None if layer == self.remember else rows


class Images(Protocol):
    """What becomes of the calls to image prompts."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visit: "Visit", call: "Call") -> Tensor:
        """One such call, [B, N, H, D]; the processor multiplies the result by the adapter's scale."""


@dataclass(frozen=True, eq=False)
class Merge:
    """Image prompts of several objects, each where its name is relevant (MIP-Adapter, arXiv 2409.17920).

    Args:
        names: encodings of the objects' names, [1 or B, K, L, C], of the conditional half.
        empty: the same of the unconditional half; None where there is none, or it has these.
        lengths: [1 or B, K] tokens of the names, without begin and end.
        regions: [K, N] weights where each object may be, or None.
        pictures: images of every object, whose tokens are averaged; () for one each.
    """

    names: Tensor
    empty: Tensor | None
    lengths: Tensor
    regions: Tensor | None = None
    pictures: tuple[int, ...] = ()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visit: "Visit", call: "Call") -> Tensor:
        if visit.factors is None:
            visit.factors = self._factors(q, visit, call)
        factors = visit.factors.to(q.dtype)[..., None, None]
        objects = factors.shape[1]
        pictures = self.pictures or (1,) * objects
        if visit.masked:  # diffusers asks for every image alone
            number = visit.images - 1
            if number >= objects or max(pictures) > 1:
                raise ConfigError(
                    f"mip_adapter has {objects} objects of {pictures} images, and ip_adapter_masks want one image and "
                    "one mask per object; pass these, or regions= of the method instead of masks."
                )
            return _plain(q, k, v, None, call.scale) * factors[:, number]
        if visit.images > 1 or k.shape[1] % sum(pictures):
            raise ConfigError(
                f"mip_adapter got {k.shape[1]} image tokens for {sum(pictures)} images of {objects} objects; load one "
                "adapter and pass one image per object, or say pictures=."
            )
        each = [x.unflatten(1, (sum(pictures), -1)).split(pictures, 1) for x in (k, v)]
        total = torch.zeros_like(q)
        for number, (keys, values) in enumerate(zip(*each, strict=True)):
            # keys and values are linear in the tokens, so that their means are those of averaged tokens
            total = total + _plain(q, keys.mean(1), values.mean(1), None, call.scale) * factors[:, number]
        return total

    def _factors(self, q: Tensor, visit: "Visit", call: "Call") -> Tensor:
        """Weight of every object at every query, fp32 [B, K, N]."""
        parts = []
        for rows, conditional in call.halves(len(q)):
            names = self.names if conditional or self.empty is None else self.empty
            queries = q[rows]
            each = []
            for number in range(names.shape[1]):
                context = _like(names[:, number], visit.context).expand(len(queries), -1, -1)
                lengths = self.lengths[:, number].expand(len(queries))
                each.append(relevance(queries, _keys(visit.attn, context, q.shape[2]), lengths, call.scale))
            parts.append(shares(torch.stack(each, 1), self.regions))
        assert visit.text is not None, "attention to the text comes first"
        text = visit.text.flatten(2)
        weight = text.new_zeros(text.shape[-1]) if call.notes is None else _like(call.notes, text).flatten()
        return torch.cat(parts) * gate(text, weight)[:, None]


@dataclass(frozen=True, eq=False)
class Drawer:
    """Image prompts weighted by a layout, beside a `Couple` of the same M layers (AutoStudio, arXiv 2406.01388).

    Args:
        weights: [M, N]: global, background, objects; None: no image prompt acts.
        present: which of the M layers have a reference picture; others have no share in the conditional half.
        lead: how many of the first M layers the adapter has images for: 2, or 0 where images are the objects' alone.
    """

    weights: Tensor | None
    present: tuple[bool, ...] = ()
    lead: int = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visit: "Visit", call: "Call") -> Tensor:
        if self.weights is None:
            return torch.zeros_like(q)
        layers = len(self.weights)
        images = layers - 2 + self.lead
        if visit.masked or visit.images > 1 or images < 1 or k.shape[1] % images:
            raise ConfigError(
                f"autostudio got {k.shape[1]} image tokens for {images} images; load one adapter, pass one image per "
                "object and no ip_adapter_masks."
            )
        keys, values = k.chunk(images, 1), v.chunk(images, 1)
        parts = []
        for rows, conditional in call.halves(len(q)):
            total = torch.zeros_like(q[rows])
            for layer in range(layers):
                if conditional and not self.present[layer]:
                    continue
                if conditional and layer == 1:
                    assert visit.remembered is not None, "the couple remembers the background"
                    own = visit.remembered
                else:
                    number = max(0, layer - 2 + self.lead)
                    own = _plain(q[rows], keys[number][rows], values[number][rows], None, call.scale)
                total = total + own * self.weights[layer].to(q.dtype)[:, None, None]
            parts.append(total)
        return torch.cat(parts)


class MapBook:
    """Attention probabilities of the text, kept during one call with the graph of their gradients.

    Args:
        grids: (rows, columns) of the layers that are kept.
        conditional: keep the conditional half alone.
        hold_first: stop gradients at key and value of the first token (as DisenDiff does while training).
    """

    def __init__(
        self, grids: frozenset[tuple[int, int]], *, conditional: bool = True, hold_first: bool = False
    ) -> None:
        self.grids, self.conditional, self.hold_first = grids, conditional, hold_first
        self.maps: list[Tensor] = []

    def take(self) -> Tensor:
        """float32 [layers, B, heads, tokens, L], and forget them.

        Raises:
            ConfigError: no layer had such a grid.
        """
        maps, self.maps = self.maps, []
        if not maps:
            raise ConfigError(
                f"No cross-attention layer has a grid of {' or '.join(f'{r}x{c}' for r, c in sorted(self.grids))} "
                "tokens; take another size, or a model with attention there."
            )
        return torch.stack(maps)


@dataclass(frozen=True, eq=False)
class Stages:
    """What the cross-attention sites of one grid do in one call of the denoiser, in this order.

    Args:
        guided: whether the first half of the batch is the unconditional one.
        grid: (rows, columns) of the queries.
        words, phrases: change the text.
        couple: one text per region.
        confined: words that a part of the picture reads alone, in the conditional half.
        images: what becomes of image prompts.
        book: keeps attention maps.
    """

    guided: bool = False
    grid: tuple[int, int] = (1, 1)
    words: Words | None = None
    phrases: Phrases | None = None
    couple: Couple | None = None
    confined: Confined | None = None
    images: Images | None = None
    book: MapBook | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing is enabled, so that calls are the processor's own."""
        return not any((self.words, self.phrases, self.couple, self.confined, self.images, self.book))

    def joined(self, other: "Stages") -> "Stages":
        """Both together.

        Raises:
            ConfigError: both have the same stage.
        """
        changes = {}
        for field in fields(self)[2:]:
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine is not None and theirs is not None:
                raise ConfigError(f"Two methods change the {field.name} of cross-attention; leave one of them out.")
            changes[field.name] = theirs if mine is None else mine
        return replace(self, **changes)

    def touches_text(self, conditional: bool) -> bool:
        """Whether attention to the text is another one in a half."""
        both = self.words is not None and (conditional or self.words.both)
        regional = self.couple is not None and (conditional or self.couple.negatives is not None)
        own = self.phrases is not None or self.confined is not None
        return both or regional or (conditional and own)


# ----------------------------------------------------------------------------------------------------------------- site
class Visit:
    """One call of a processor: its module, its text [B, L, C], and what its attention calls left for later ones."""

    def __init__(self, attn: nn.Module, context: Tensor | None, masked: bool) -> None:
        self.attn, self.masked = attn, masked
        self._context = context
        self.calls = 0
        self.text: Tensor | None = None
        self.remembered: Tensor | None = None
        self.factors: Tensor | None = None

    @property
    def images(self) -> int:
        """Number of the current call among those to image prompts, from 1; 0 for the one to the text."""
        return self.calls - 1

    @property
    def context(self) -> Tensor:
        """The text."""
        if self._context is None:
            raise LayoutMismatchError("A cross-attention module was called without text; pass encoder_hidden_states.")
        return self._context


@dataclass(frozen=True, eq=False)
class Call:
    """What the stages of one attention call may use besides tensors."""

    guided: bool
    scale: float | None
    notes: Any = None

    def halves(self, batch: int) -> list[tuple[slice, bool]]:
        """(rows, whether they are conditional) of every half: the unconditional one first.

        Raises:
            LayoutMismatchError: a batch of guidance that has no halves.
        """
        if not self.guided:
            return [(slice(0, batch), True)]
        if batch % 2:
            raise LayoutMismatchError(f"A batch of {batch} has no halves; pass both, the unconditional one first.")
        return [(slice(0, batch // 2), False), (slice(batch // 2, batch), True)]


class CrossSite(Site):
    """State of one cross-attention module."""

    def visit(self, attn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Visit | None:
        context = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
        context = context[0] if isinstance(context, tuple) else context
        return Visit(attn, context, kwargs.get("ip_adapter_masks") is not None)

    def attend(self, call: SiteCall) -> Tensor:
        """Attention of q [B, N, H, D] to the text, or to image prompts, in the stages of the current action."""
        action = None if self.slot is None else self.slot.get()
        stages = None if action is None else action.stages
        if call.visit is None or stages is None or self.pinned is not None or call.refused is not None:
            reason = action.reason if action is not None else "called outside the model's forward"
            self.outcome = self.pinned or call.refused or reason
            return call.dense()
        return self._staged(call, call.visit, stages)

    @torch.compiler.disable  # what a call does depends on tensors that are not in the graph
    def _staged(self, site_call: SiteCall, visit: Visit, stages: Stages) -> Tensor:
        q, k, v, mask, scale, dense = site_call[:6]
        visit.calls += 1
        call = Call(stages.guided, scale, self.notes)
        if visit.images:
            return dense() if stages.images is None else stages.images.attend(q, k, v, visit, call)
        self.outcome = SPARSE
        if stages.couple is not None and stages.couple.weights.shape[1] != q.shape[1]:
            raise LayoutMismatchError(
                f"{self.name}: got {q.shape[1]} tokens, but its regions were made for {stages.couple.weights.shape[1]}."
            )
        if stages.book is not None:
            k, v = _noted(stages.book, stages.grid, q, k, v, mask, scale, call)
        touched = any(stages.touches_text(conditional) for _, conditional in call.halves(len(q)))
        if touched:
            out = _text(q, k, v, mask, visit, stages, call)
        elif stages.book is not None and stages.book.hold_first:
            out = _plain(q, k, v, mask, scale)
        else:
            out = dense()
        if stages.images is not None:
            visit.text = out
        return out


# ----------------------------------------------------------------------------------------------------------------- text
def _text(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, visit: Visit, stages: Stages, call: Call) -> Tensor:
    """Attention to the text, half by half."""
    outs = []
    for rows, conditional in call.halves(len(q)):
        own = None if mask is None else mask if mask.shape[0] == 1 else mask[rows]
        half = _Half(
            q[rows], k[rows], v[rows], own, visit.context[rows, : k.shape[1]], visit, stages, call, conditional
        )
        outs.append(half.attend())
    return torch.cat(outs)


@dataclass(eq=False)
class _Half:
    """One half of guidance in attention to the text."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    context: Tensor
    visit: Visit
    stages: Stages
    call: Call
    conditional: bool

    def attend(self) -> Tensor:
        couple = self.stages.couple
        if couple is None or not (self.conditional or couple.negatives is not None):
            return self.base(self.q)
        total = torch.zeros_like(self.q)
        for layer, text, rows in couple.layers(self.conditional):
            q = self.q if rows is None else self.q[:, rows]
            out = self.base(q) if text is None else self.of(q, text)
            if self.conditional and layer == couple.remember:
                self.visit.remembered = out
            weight = couple.weights[layer].to(q.dtype)
            share = out * (weight if rows is None else weight[rows])[:, None, None]
            total = total + share if rows is None else total.index_add(1, rows, share)
        return total

    def of(self, q: Tensor, text: Tensor) -> Tensor:
        """Attention to another text than the call's."""
        repeats = _repeats(len(q), len(text), "texts of a region")
        text = _like(text, self.context).repeat_interleave(repeats, 0)
        attn, heads = self.visit.attn, q.shape[2]
        return _plain(q, _keys(attn, text, heads), _values(attn, text, heads), None, self.call.scale)

    def base(self, q: Tensor) -> Tensor:
        """Attention to the call's own text, after what the first stages do to it."""
        words = (
            self.stages.words
            if self.stages.words is not None and (self.conditional or self.stages.words.both)
            else None
        )
        phrases = self.stages.phrases if self.conditional else None
        hidden = None if words is None else words.of(len(q), self.context.shape[1])
        mask = self.mask
        if words is not None and words.mode == "mask":
            assert hidden is not None
            mask, hidden = _hiding(mask, hidden, q), None
        if phrases is None:
            if self.conditional and self.stages.confined is not None:
                return self.stages.confined.attend(q, self.k, self.v, mask, self.call.scale)
            if hidden is None:
                return _plain(q, self.k, self.v, mask, self.call.scale)
            return self.attended(q, [(self.context, self.context)], hidden, mask)
        rows = []
        for row, contexts in enumerate(phrases.contexts(self.context)):
            one = slice(row, row + 1)
            own = mask if mask is None or mask.shape[0] == 1 else mask[one]
            rows.append(self.attended(q[one], contexts, None if hidden is None else hidden[one], own))
        return torch.cat(rows)

    def attended(self, q: Tensor, contexts: list[Context], hidden: Tensor | None, mask: Tensor | None) -> Tensor:
        """Mean of attention over pairs of contexts, some of whose tokens may be set to 0."""
        attn, heads, outs = self.visit.attn, q.shape[2], []
        for pair in contexts:
            key, value = (x if hidden is None else x.masked_fill(hidden[:, :, None], 0) for x in pair)
            outs.append(_plain(q, _keys(attn, key, heads), _values(attn, value, heads), mask, self.call.scale))
        return outs[0] if len(outs) == 1 else torch.stack(outs).mean(0)


def _noted(
    book: MapBook,
    grid: tuple[int, int],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    call: Call,
) -> Context:
    """Keep the probabilities of a call; its keys and values, the first token's without gradient where asked for."""
    if book.hold_first:
        k, v = (torch.cat([x[:, :1].detach(), x[:, 1:]], 1) for x in (k, v))
    if grid in book.grids:
        rows = call.halves(len(q))[-1][0] if book.conditional else slice(None)
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        logits = torch.einsum("bnhd,blhd->bhnl", q[rows].float() * factor, k[rows].float())
        if mask is not None:
            own = mask if mask.shape[0] == 1 else mask[rows]
            logits = logits.masked_fill(~own, float("-inf")) if own.dtype is torch.bool else logits + own.float()
        book.maps.append(logits.softmax(-1))
    return k, v


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Attention of q, k, v [B, S, H, D] as the processors call it."""
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), mask, scale=scale)
    return out.transpose(1, 2)


def _keys(attn: Any, context: Tensor, heads: int) -> Tensor:
    """[B, L, H, D] of a context [B, L, C], by the module's own layers."""
    keys = attn.to_k(_normed(attn, context)).unflatten(-1, (heads, -1))
    return keys if getattr(attn, "norm_k", None) is None else attn.norm_k(keys)


def _values(attn: Any, context: Tensor, heads: int) -> Tensor:
    return attn.to_v(_normed(attn, context)).unflatten(-1, (heads, -1))


def _normed(attn: Any, context: Tensor) -> Tensor:
    return attn.norm_encoder_hidden_states(context) if getattr(attn, "norm_cross", None) else context


def _hiding(mask: Tensor | None, hidden: Tensor, q: Tensor) -> Tensor:
    """A mask [B, 1, 1, L] added to the logits that also hides tokens."""
    added = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill(hidden, float("-inf"))[:, None, None]
    if mask is None:
        return added
    if mask.dtype is torch.bool:
        return added.masked_fill(~mask, float("-inf"))
    return added + mask


def _per_row(values: Tensor, rows: int, tokens: int, what: str) -> Tensor:
    """[rows, tokens] of values [P, L] given per prompt; tokens beyond L are False."""
    repeats = _repeats(rows, len(values), what)
    return F.pad(values, (0, max(0, tokens - values.shape[1])))[:, :tokens].repeat_interleave(repeats, 0)


def _repeats(rows: int, prompts: int, what: str) -> int:
    if not prompts or rows % prompts:
        raise ConfigError(
            f"{what} are given for {prompts} prompts, but the call has {rows} pictures; give those of every prompt."
        )
    return rows // prompts


def _like(values: Tensor, other: Tensor) -> Tensor:
    return values.to(other.device, other.dtype)
