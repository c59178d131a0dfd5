"""Who sees whom in the methods whose references are shown as they are: the views of every picture of a batch."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gensparse.errors import ConfigError
from gensparse.layout import Layout
from gensparse.methods.base import At, Place, Subject
from gensparse.methods.freecustom import weights_of
from gensparse.methods.subject_run import CONDITIONAL, UNCONDITIONAL, Batch, SharedSite, SubjectRun
from gensparse.processors.operators import OperatorCall
from gensparse.processors.shared import Seen, View, alone, attend_together, target_part
from gensparse.subjects.cast import Subjects
from gensparse.subjects.style import adain, shared_group_norm, take_statistics

if TYPE_CHECKING:
    from gensparse.methods.freecustom import FreeCustom
    from gensparse.methods.reference_only import ReferenceOnly
    from gensparse.methods.storydiffusion import StoryDiffusion
    from gensparse.methods.style_aligned import StyleAligned
    from gensparse.methods.tokenflow import TokenFlow

SOURCE = 2
"""The part of a TokenFlow batch that holds the frames of the source clip."""


class FreeCustomRun(SubjectRun):
    """Masked references, with a weight each, for the generated pictures of a half."""

    method: "FreeCustom"

    def references(self, items: int) -> int:
        return super().references(items) if self.method.subjects is None else self.method.subjects

    def check(self, subjects: Subjects) -> None:
        count = self.method.subjects
        if count is not None and len(subjects) != count:
            raise ConfigError(f"{self.method.name} has subjects={count}, and {len(subjects)} are named; pass as many.")
        weights_of(self.method.name, self.method.weights, len(subjects))

    def views(self, site: SharedSite, batch: Batch, k: Tensor, v: Tensor, layout: Layout) -> list[View | None]:
        weights = weights_of(self.method.name, self.method.weights, len(batch.names))
        views: list[View | None] = []
        for place, half in enumerate(batch.halves):
            share = 1.0 if half == CONDITIONAL else 1.0 - self.method.style_fidelity
            found = self.keys_of(site, batch, place, k, v, layout) if share else []
            seen = tuple(Seen(x.k, x.v, bias=weight) for x, weight in zip(found, weights, strict=False))
            views += [None] * batch.references
            views += [View(seen, weight=share)] * (batch.items - batch.references)
        return views


class StoryRun(SubjectRun):
    """A random sample of every other picture's tokens, the same for all that see it."""

    method: "StoryDiffusion"
    masked = False
    symmetric = True
    multiple = 64

    def references(self, items: int) -> int:
        return items

    def views(self, site: SharedSite, batch: Batch, k: Tensor, v: Tensor, layout: Layout) -> list[View | None]:
        at = At(step=batch.step, steps=batch.steps)
        early = self.method.early(at)
        whole = early and batch.banked and self.method.read_early
        if not whole and (early or not self._open(site, at)):
            return [None] * (len(batch.halves) * batch.items)
        sample = None if whole else self._sample(batch, layout, k.device)
        views: list[View | None] = []
        for place in range(len(batch.halves)):
            found = self.keys_of(site, batch, place, k, v, layout)
            kept = [
                Seen(x.k, x.v) if sample is None else Seen(x.k[sample[n]], x.v[sample[n]]) for n, x in enumerate(found)
            ]
            for item in range(batch.items):
                others = kept if batch.banked else [seen for n, seen in enumerate(kept) if n != item]
                views.append(View(tuple(others)))
        return views

    def _open(self, site: SharedSite, at: At) -> bool:
        """Whether a layer shares in a step: drawn, the same for both halves."""
        drawn = torch.rand((), generator=self.draw(at.step, site.place.layer, 2))
        return bool(drawn < self.method.gate_at(at))

    def _sample(self, batch: Batch, layout: Layout, device: torch.device) -> list[Tensor]:
        """Tokens of every reference that are seen in a step, drawn for each grid."""
        key = ("sample", layout.grid, batch.step, batch.names, device)
        if key not in self._samples:
            tokens = layout.segments[layout.target].length
            generator = self.draw(batch.step, *layout.grid, 3)
            kept = torch.rand(len(batch.names), tokens, generator=generator) < self.method.rate
            known = {k: x for k, x in self._samples.items() if k[2] == batch.step}  # those of this step alone
            self._samples = {**known, key: [row.nonzero()[:, 0].to(device) for row in kept]}
        return self._samples[key]

    def __init__(self, method: "StoryDiffusion", subject: Subject, places: Mapping[str, Place]) -> None:
        super().__init__(method, subject, places)
        self._samples: dict[Any, list[Tensor]] = {}


class StyleRun(SubjectRun):
    """Statistics and keys of the first picture of a half for the others."""

    method: "StyleAligned"
    symmetric = True  # the reference alone is what it is without the method

    def __init__(self, method: "StyleAligned", subject: Subject, places: Mapping[str, Place]) -> None:
        super().__init__(method, subject, places)
        if method.group_norm:
            norms = [module for module in subject.model.modules() if isinstance(module, nn.GroupNorm)]
            self.hooks = [norm.register_forward_hook(self._norm) for norm in norms]

    def prepared(
        self, site: SharedSite, batch: Batch, q: Tensor, k: Tensor, v: Tensor, layout: Layout
    ) -> tuple[Tensor, Tensor, Tensor]:
        method, items = self.method, batch.items
        flags = (method.queries, method.keys, method.values)
        if batch.banked and any(flags) and not method.full:
            raise ConfigError(
                f"{method.name} takes statistics from a reference in the batch, and a bank holds none; pass "
                "queries=False, keys=False, values=False, or call handle.forget()."
            )
        if method.full or items == 1 or not any(flags):
            return q, k, v
        parts = [_styled(x, items, layout) if flag else x for x, flag in zip((q, k, v), flags, strict=True)]
        return parts[0], parts[1], parts[2]

    def views(self, site: SharedSite, batch: Batch, k: Tensor, v: Tensor, layout: Layout) -> list[View | None]:
        views: list[View | None] = []
        for place in range(len(batch.halves)):
            view = None
            if self.method.share:
                (style,) = self.keys_of(site, batch, place, k, v, layout)
                view = View((Seen(style.k * self.method.scale, style.v, bias=self.method.shift),))
            # with its own copy the reference gives what it gives alone
            views += [None] * batch.references + [view] * (batch.items - batch.references)
        return views

    def shared(self, site: SharedSite, batch: Batch, q: Tensor, k: Tensor, v: Tensor, call: OperatorCall) -> Tensor:
        if self.method.full:
            return attend_together(q, k, v, len(batch.halves), call.layout, scale=call.scale)
        return super().shared(site, batch, q, k, v, call)

    def check(self, subjects: Subjects) -> None:
        if any(item.mask is not None or item.region is not None for item in subjects.concepts):
            raise ConfigError(f"{self.method.name} has no use for masks and regions; leave them out.")

    def _norm(self, norm: nn.GroupNorm, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        batch = self._now.batch
        x = args[0]
        if batch is None or batch.banked or batch.items == 1 or len(x) != len(batch.halves) * batch.items:
            return None
        return shared_group_norm(x, batch.items, norm.num_groups, norm.weight, norm.bias, norm.eps)


class ReferenceRun(SubjectRun):
    """The reference beside the own tokens, and its statistics behind the blocks of a UNet."""

    method: "ReferenceOnly"

    def __init__(self, method: "ReferenceOnly", subject: Subject, places: Mapping[str, Place]) -> None:
        super().__init__(method, subject, places)
        if method.adain and subject.family == "UNet":
            modules = statistics_modules(subject.model, method.feature_weight)
            self.hooks = [module.register_forward_hook(self._statistics) for module in modules]

    def views(self, site: SharedSite, batch: Batch, k: Tensor, v: Tensor, layout: Layout) -> list[View | None]:
        views: list[View | None] = []
        for place, half in enumerate(batch.halves):
            share = 1.0 if half == CONDITIONAL else 1.0 - self.method.style_fidelity
            seen = tuple(Seen(x.k, x.v) for x in self.keys_of(site, batch, place, k, v, layout)) if share else ()
            views += [None] * batch.references + [View(seen, weight=share)] * (batch.items - batch.references)
        return views

    def started(self, batch: Batch, arguments: dict[str, Any]) -> None:
        if batch.banked and self.hooks:
            raise ConfigError(
                f"{self.method.name} takes statistics from a reference in the batch, and a bank holds none; pass "
                "adain=False, or call handle.forget()."
            )

    def _statistics(self, _module: nn.Module, _args: Any, out: Any) -> Any:
        batch = self._now.batch
        x = out if isinstance(out, Tensor) else out[0]
        if batch is None or batch.banked or self.method.when(At(step=batch.step, steps=batch.steps)) is not None:
            return None
        if len(x) != len(batch.halves) * batch.items:
            return None
        shares = [1.0 if half == CONDITIONAL else 1.0 - self.method.style_fidelity for half in batch.halves]
        styled = take_statistics(x, batch.items, shares)
        if isinstance(out, Tensor):
            return styled
        if isinstance(out, tuple):
            return (styled, *out[1:])
        return type(out)(sample=styled)


def statistics_modules(model: Any, weight: float) -> list[nn.Module]:
    """Modules of a UNet behind which features get the statistics of the reference.

    After every resnet, or the attention behind it, of a block whose weight is at most `weight`: 0 the middle block,
    2 (1 - w / W) down block w of W, 2 w / W up block w.
    """
    found: list[nn.Module] = []
    for blocks, of in ((model.down_blocks, lambda w, n: 2 * (1 - w / n)), (model.up_blocks, lambda w, n: 2 * w / n)):
        for number, block in enumerate(blocks):
            if of(number, len(blocks)) <= weight:
                found += list(getattr(block, "attentions", None) or block.resnets)
    middle = getattr(model, "mid_block", None)
    return found if middle is None else [*found, middle]


class TokenFlowRun(SubjectRun):
    """All frames of a half for each of its frames; with a source clip, its queries and keys in the first steps."""

    method: "TokenFlow"
    masked = False
    symmetric = True
    frames = True

    def __init__(self, method: "TokenFlow", subject: Subject, places: Mapping[str, Place]) -> None:
        from gensparse.methods.subject_method import takes

        super().__init__(method, subject, places)
        layers = method.inject_layers
        self._injecting = {name for name, place in places.items() if takes(layers, place.layer, place.name)}

    def references(self, items: int) -> int:
        return items

    def _batch(self, at: At, arguments: dict[str, Any], *, counted: bool) -> Batch:
        if not self.method.source:
            return super()._batch(at, arguments, counted=counted)
        from gensparse.methods.subject_run import pictures

        total = pictures(arguments, frames=True)
        halves = self.method.halves or (1 if at.guided is False else 2)
        if total % (halves + 1):
            raise ConfigError(
                f"{self.method.name} source=True got a batch of {total}, which has no {halves + 1} equal parts: the "
                "source frames and every half of guidance."
            )
        parts = (SOURCE, UNCONDITIONAL, CONDITIONAL)[: halves + 1] if halves == 2 else (SOURCE, CONDITIONAL)
        items = total // len(parts)
        return Batch(parts, items, items, tuple(f"frame{n}" for n in range(items)), False, at.step, at.steps)

    def prepared(
        self, site: SharedSite, batch: Batch, q: Tensor, k: Tensor, v: Tensor, layout: Layout
    ) -> tuple[Tensor, Tensor, Tensor]:
        at = At(step=batch.step, steps=batch.steps)
        if site.name not in self._injecting or not self.method.injects(at):
            return q, k, v
        q, k = (x[: batch.items].repeat(len(batch.halves), 1, 1, 1) for x in (q, k))
        return q, k, v

    def shared(self, site: SharedSite, batch: Batch, q: Tensor, k: Tensor, v: Tensor, call: OperatorCall) -> Tensor:
        if batch.items == 1:
            return call.dense()
        if not alone(call.layout) or call.key_bias is not None:
            return super().shared(site, batch, q, k, v, call)
        together = [half != SOURCE for half in batch.halves]
        return attend_together(
            q, k, v, len(batch.halves), call.layout, scale=call.scale, together=together, dense=call.dense
        )

    def views(self, site: SharedSite, batch: Batch, k: Tensor, v: Tensor, layout: Layout) -> list[View | None]:
        part = target_part(layout)
        views: list[View | None] = []
        for place, half in enumerate(batch.halves):
            frames = [Seen(k[batch.row(place, n), part], v[batch.row(place, n), part]) for n in range(batch.items)]
            for item in range(batch.items):
                others = tuple(seen for n, seen in enumerate(frames) if n != item)
                views.append(None if half == SOURCE else View(others))
        return views


def _styled(x: Tensor, items: int, layout: Layout) -> Tensor:
    """The picture's tokens of x [B, S, H, D] with the statistics of the first picture of their half."""
    part = target_part(layout)
    if part == slice(0, x.shape[1]):
        return adain(x, items)
    return torch.cat([x[:, : part.start], adain(x[:, part], items), x[:, part.stop :]], 1)
