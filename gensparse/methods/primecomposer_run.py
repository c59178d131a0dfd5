"""PrimeComposer on a model: who asks and who answers in the prior pass, and what it steers (2403.05053)."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gensparse.errors import ConfigError
from gensparse.layout import Layout
from gensparse.methods.base import At, Dense, Place, Subject
from gensparse.methods.subject_run import CONDITIONAL, Batch, SharedSite, SubjectRun, plane
from gensparse.processors.confined import Confined
from gensparse.processors.operators import OperatorCall
from gensparse.processors.shared import Seen, View, attend_all, attend_views
from gensparse.processors.stages import Stages
from gensparse.processors.steering import attend_steered
from gensparse.subjects.cast import Concept, Subjects
from gensparse.subjects.placing import Box, Placed, centre_of, mask_box, placed

if TYPE_CHECKING:
    from gensparse.methods.primecomposer import PrimeComposer


class PrimeComposerRun(SubjectRun):
    """The composite and the object first in every half; of the conditional one they are the prior pass."""

    method: "PrimeComposer"
    masked = False

    def __init__(self, method: "PrimeComposer", subject: Subject, places: Mapping[str, Place]) -> None:
        super().__init__(method, subject, places)
        self._placed: dict[Any, Placed] = {}

    def references(self, items: int) -> int:
        return len(self.method.beside)

    def check(self, subjects: Subjects) -> None:
        (concept,) = subjects.concepts
        if concept.mask is None or concept.region is None:
            raise ConfigError(
                f"{self.method.name} needs mask and region of {concept.name!r}, where it is in its own picture and "
                "where it is to be; pass both."
            )
        if concept.latents is not None:
            raise ConfigError(
                f"{self.method.name} sees pictures as their inversion passes them, and {concept.name!r} has latents to "
                "be noised; take SD15CustomizePipeline or SDXLCustomizePipeline, or put them into the batch."
            )
        self.box(concept)
        centre_of(concept.region)

    def box(self, concept: Concept) -> Box:
        """The box of the object, in pixels of its mask."""
        assert concept.mask is not None, "checked when it was given"
        return mask_box(concept.mask)

    def placed(self, layout: Layout, device: torch.device) -> Placed:
        """The object's tokens on the grid of a layout."""
        if self.subjects is None:
            raise ConfigError(
                f"{self.method.name} has to know where the object is and where it is to be; call handle.use(Subjects("
                "Concept(name, mask=..., region=..., tokens=...))) before the run."
            )
        key = (layout.grid, device)
        if key not in self._placed:
            (concept,) = self.subjects.concepts
            assert concept.mask is not None, "checked when it was given"
            assert concept.region is not None, "checked when it was given"
            found = placed(concept.mask, self.box(concept), centre_of(concept.region), plane(layout))
            self._placed[key] = found._replace(source=found.source.to(device), target=found.target.to(device))
        return self._placed[key]

    def use(self, subjects: Subjects) -> None:
        super().use(subjects)
        self._placed = {}

    def writing(self, names: Sequence[str] | None, device: Any) -> AbstractContextManager[None]:
        raise ConfigError(
            f"{self.method.name} takes queries of the composite too, and a bank holds keys; keep both in the batch."
        )

    # ------------------------------------------------------------------------------------------------ self-attention
    def shared(self, site: SharedSite, batch: Batch, q: Tensor, k: Tensor, v: Tensor, call: OperatorCall) -> Tensor:
        if not batch.references or CONDITIONAL not in batch.halves:
            return call.dense()
        own = self.placed(call.layout, q.device)
        if not len(own.source):
            return call.dense()
        parts = []
        for place, half in enumerate(batch.halves):
            rows = slice(batch.row(place, 0), batch.row(place, batch.items))
            bias = call.key_bias
            bias = bias if bias is None or len(bias) == 1 else bias[rows]
            given = (q[rows], k[rows], v[rows])
            if half == CONDITIONAL:
                parts.append(self._steered(*given, batch.references, own, call.layout, call.scale, bias))
            else:
                parts.append(attend_all(*given, call.layout, scale=call.scale, key_bias=bias))
        return torch.cat(parts)

    def _steered(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        count: int,
        own: Placed,
        layout: Layout,
        scale: float | None,
        bias: Tensor | None,
    ) -> Tensor:
        """The conditional half: the prior pass, which sees the object alone, and the pictures that it steers."""
        keys, values = k[count - 1, own.source], v[count - 1, own.source]
        views = [View((Seen(keys, values),), own=False)] * count
        first, last = (bias, bias) if bias is None or len(bias) == 1 else (bias[:count], bias[count:])
        before = [x[:count] for x in (q, k, v)]
        seen = attend_views(*before, views, layout, lambda: before[0], scale=scale, key_bias=first)
        new = [x[count:] for x in (q, k, v)]
        prior = [x.expand(len(new[0]), -1, -1, -1) for x in (q[:1], keys[None])]
        told = attend_steered(*new, *prior, own.target, scale=scale, key_bias=last)
        return torch.cat([seen, told])

    # ----------------------------------------------------------------------------------------------- cross-attention
    def stages(self, layout: Layout, at: At) -> "Stages | Dense":
        batch = self._now.batch
        if at.kind is None or batch is None or self.subjects is None:
            return Dense(f"{self.method.name} leaves this layer as it is")
        if CONDITIONAL not in batch.halves:
            return Dense(f"{self.method.name} acts on the conditional half alone")
        (concept,) = self.subjects.concepts
        words = tuple(concept.places(item) if item >= batch.references else () for item in range(batch.items))
        own = self.placed(layout, torch.device("cpu"))
        if not any(words):
            return Dense(f"{self.method.name} knows no words of {concept.name!r}")
        inside = torch.zeros(layout.segments[layout.target].length, dtype=torch.bool)
        inside[own.target] = True
        return Stages(len(batch.halves) == 2, plane(layout), confined=Confined(words, inside.numpy()))

    def _cast(self, halves: tuple[int, ...], items: int, at: At) -> Batch:
        count = self.references(items)
        if items <= count and self.method.when(at) is not None:  # behind the steered steps they may be left out
            return Batch(halves, items, 0, (), False, at.step, at.steps)
        return super()._cast(halves, items, at)._replace(names=self.method.beside)
