"""MasaCtrl on a model: the source's keys instead of the own ones, inside and outside of masks apart (2304.08465)."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gensparse.errors import ConfigError
from gensparse.families import TensorMemo, family_of
from gensparse.layout import Layout
from gensparse.methods.base import Place, Subject
from gensparse.methods.subject_run import CONDITIONAL, Batch, Grid2, SharedSite, SubjectRun, plane
from gensparse.processors.read_maps import given_to, partner, queries_and_keys
from gensparse.processors.shared import Seen, View
from gensparse.subjects.attention_maps import cross_maps, token_map
from gensparse.subjects.cast import Subjects
from gensparse.subjects.masks import to_grid

if TYPE_CHECKING:
    from gensparse.methods.masactrl import MasaCtrl

LEVEL = 2
"""Level of a UNet whose cross-attention makes masks: 16 x 16 tokens of 512 x 512 pixels."""

THRESHOLD = 0.1


class MasaCtrlRun(SubjectRun):
    """The source first in every half."""

    method: "MasaCtrl"
    masked = False

    def __init__(self, method: "MasaCtrl", subject: Subject, places: Mapping[str, Place]) -> None:
        super().__init__(method, subject, places)
        self._model, self._maps, self._grids = subject.model, [], {}
        self._maps: list[Tensor]  # of the running call, words summed: [items, N] of every layer
        self._grids: dict[str, Grid2]
        self._role = ""
        if subject.family == "UNet":
            levels = sorted({place.role for place in places.values()})
            self._role = f"level{LEVEL}" if f"level{LEVEL}" in levels else levels[-1]
            for name, place in places.items():
                cross = partner(subject.model, name)
                if place.role == self._role and cross is not None:
                    self.hooks.append(cross.register_forward_pre_hook(self._note_maps, with_kwargs=True))

    def check(self, subjects: Subjects) -> None:
        for item in subjects.concepts:
            if (item.mask is None) != (item.region is None):
                raise ConfigError(
                    f"{self.method.name} needs mask and region of {item.name!r}, where it is in the source and where "
                    "in the picture; pass both or neither."
                )
            if item.mask is None and item.tokens and self.family != "UNet":
                raise ConfigError(
                    f"{self.method.name} finds {item.name!r} by its words in UNets alone; pass its mask and region."
                )

    def started(self, batch: Batch, arguments: dict[str, Any]) -> None:
        self._maps = []
        if self._by_words:
            layouts = family_of(self._model).read_layouts(self._model, arguments, TensorMemo())
            self._grids = {role: plane(layout) for role, layout in layouts.items() if isinstance(layout, Layout)}

    @property
    def _by_words(self) -> bool:
        """Whether masks come from the words of the subject."""
        concepts = () if self.subjects is None else self.subjects.concepts
        return any(item.mask is None and item.tokens for item in concepts)

    def views(self, site: SharedSite, batch: Batch, k: Tensor, v: Tensor, layout: Layout) -> list[View | None]:
        masks = self._masks(batch, plane(layout))
        views: list[View | None] = []
        for place in range(len(batch.halves)):
            (source,) = self.keys_of(site, batch, place, k, v, layout)
            views += [None] * batch.references
            for item in range(batch.references, batch.items):
                sides = (Seen(source.k, source.v),)
                if masks is not None:
                    sides = _sides(source.k, source.v, masks[0], masks[1][item])
                views.append(View(sides, own=self.method.union))
        return views

    def _masks(self, batch: Batch, grid: Grid2) -> tuple[Tensor, Sequence[Tensor]] | None:
        """The source's mask, and that of every picture of a half, bool [N]; None where there is no mask (yet)."""
        if self.subjects is None:
            return None
        (concept,) = self.subjects.concepts
        if concept.mask is not None and concept.region is not None:
            keys, queries = (to_grid(mask, grid).flatten() for mask in (concept.mask, concept.region))
            return keys, [queries] * batch.items
        if not self._maps or batch.banked:
            return None
        mean = torch.stack(self._maps).mean(0)
        planes = token_map(mean[..., None], [0]).unflatten(1, self._grids[self._role])
        found = (to_grid(planes.cpu(), grid) >= THRESHOLD).flatten(1)
        return found[0], list(found)

    @torch.compiler.disable
    def _note_maps(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch, given = self._now.batch, given_to(args, kwargs)
        if not self._by_words or batch is None or batch.banked or given is None or given.text is None:
            return
        if CONDITIONAL not in batch.halves or len(given.hidden) != len(batch.halves) * batch.items:
            return
        assert self.subjects is not None, "it has words"
        (concept,) = self.subjects.concepts
        place = batch.halves.index(CONDITIONAL)
        rows = slice(batch.row(place, 0), batch.row(place, batch.items))
        with torch.no_grad():
            q, k = queries_and_keys(module, given.hidden[rows], given.text[rows])
            maps = cross_maps(q, k)
            sums = [maps[n][:, list(concept.places(n))].sum(-1) for n in range(batch.items)]
        self._maps.append(torch.stack(sums))


def _sides(k: Tensor, v: Tensor, keys: Tensor, queries: Tensor) -> tuple[Seen, ...]:
    """What is seen inside and outside of a mask; a side without a key is not restricted."""
    sides = []
    for inside in (True, False):
        kept = (keys == inside).nonzero()[:, 0].to(k.device)
        part = (k[kept], v[kept]) if len(kept) else (k, v)
        sides.append(Seen(*part, queries=(queries == inside).numpy()))
    return tuple(sides)
