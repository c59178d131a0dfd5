"""ConsiStory on a model: masks from cross-attention, shared keys, mixed queries, injected features (2402.03286)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gensparse.errors import ConfigError
from gensparse.families import TensorMemo, family_of
from gensparse.layout import Layout
from gensparse.methods.base import At, Place, Subject
from gensparse.methods.subject_run import CONDITIONAL, Batch, Grid2, SharedSite, Source, SubjectRun, plane
from gensparse.processors.read_maps import given_to, partner, queries_and_keys
from gensparse.processors.shared import Seen, View
from gensparse.subjects.attention_maps import cross_maps
from gensparse.subjects.cast import Subjects
from gensparse.subjects.similarity import inject, nearest_tokens, smoothed, subject_masks

if TYPE_CHECKING:
    from gensparse.methods.consistory import ConsiStory


class ConsiStoryRun(SubjectRun):
    """Anchors first in every half."""

    method: "ConsiStory"
    masked = False
    symmetric = True

    def __init__(self, method: "ConsiStory", subject: Subject, places: Mapping[str, Place]) -> None:
        super().__init__(method, subject, places)
        self._model = model = subject.model
        levels = {place.role for place in places.values()}
        self._coarse, self._fine = max(levels), min(levels)
        self._grids: dict[str, Grid2] = {}
        self._step, self._time = -1, 0.0
        self._sums: list[Tensor] = []  # maps of the running step, one per layer
        self._history: list[Tensor] = []
        self._masks: dict[Grid2, Tensor] = {}
        self._dropped: dict[tuple[Grid2, int], list[Tensor]] = {}
        self._plain = False  # inside the plain call
        self._queries: dict[str, Tensor] = {}
        self._rehearsing = False
        self._features: tuple[float, Tensor] | None = None
        self._nearest: tuple[Any, Any] = (None, None)
        for name, place in places.items():
            cross = partner(model, name)
            if place.role == self._coarse and cross is not None:
                self.hooks.append(cross.register_forward_pre_hook(self._note_maps, with_kwargs=True))
            if place.role == self._fine and not name.startswith("mid_block") and method.inject:
                self.hooks.append(model.get_submodule(name).register_forward_hook(partial(self._injected, place.role)))
        self.hooks.append(model.up_blocks[0].register_forward_hook(self._note_features))

    # ------------------------------------------------------------------------------------------------ for the handle
    def check(self, subjects: Subjects) -> None:
        without = [item.name for item in subjects.concepts if not item.tokens]
        if without:
            raise ConfigError(
                f"{self.method.name} finds {', '.join(without)} by words; pass Concept(name, tokens=token_places("
                "pipe.tokenizer, prompt, word))."
            )

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Inside, features are noted for the run after it."""
        self._features, self._rehearsing = None, True
        try:
            yield
        finally:
            self._rehearsing = False

    def forget(self) -> None:
        super().forget()
        self._features = None

    def references(self, items: int) -> int:
        return min(self.method.anchors, items)

    # ------------------------------------------------------------------------------------------- of a denoiser call
    def begin(self, at: At, arguments: dict[str, Any]) -> bool:
        if self._plain:  # the call that gives plain queries; it changes nothing
            return False
        changed = super().begin(at, arguments)
        self._queries = {}
        batch = self._now.batch
        if batch is not None and not batch.banked and self.method.share_of_plain(at) and self._masks_known:
            self._plain = True
            try:
                with torch.no_grad():
                    self._model(**{name: value for name, value in arguments.items() if name != "self"})
            finally:
                self._plain = False
                self._now.batch = batch
        return changed

    @property
    def _masks_known(self) -> bool:
        return bool(self._history)

    def started(self, batch: Batch, arguments: dict[str, Any]) -> None:
        if self.subjects is None and not batch.banked:
            raise ConfigError(
                f"{self.method.name} has to know the words of its subjects; call handle.use(Subjects(Concept(name, "
                "tokens=...))) before the run."
            )
        if batch.step == 0:
            self._history, self._sums = [], []
        elif batch.step != self._step and self._sums:
            self._history = [*self._history, torch.stack(self._sums).mean(0)][-self.method.window :]
            self._sums = []
        if batch.step != self._step or batch.step == 0:
            self._masks, self._dropped, self._nearest = {}, {}, (None, None)
        time = arguments.get("timestep", 0)
        self._time = float(time.flatten()[0]) if isinstance(time, Tensor) else float(time)
        self._step = batch.step
        layouts = family_of(self._model).read_layouts(self._model, arguments, TensorMemo())
        self._grids = {role: plane(layout) for role, layout in layouts.items() if isinstance(layout, Layout)}

    def masks(self, grid: Grid2, items: int) -> Tensor:
        """Where the subjects are in every picture of a half, bool [items, N]; nowhere before the first step is over."""
        if grid not in self._masks:
            if self._history:
                assert self.subjects is not None, "checked when the run began"
                places = [[next(iter(c.places(n)), -1) for n in range(items)] for c in self.subjects.concepts]
                maps = torch.stack(self._history)
                (self._masks[grid],) = subject_masks(maps, places, self._grids[self._coarse], [grid])
            else:
                self._masks[grid] = torch.zeros(items, grid[0] * grid[1], dtype=torch.bool)
        return self._masks[grid]

    def kept(self, grid: Grid2, batch: Batch) -> list[Tensor]:
        """Tokens of the subjects that are seen in a step, int64 per picture."""
        key = (grid, batch.step)
        if key not in self._dropped:
            masks = self.masks(grid, batch.items)
            drawn = torch.rand(masks.shape, generator=self.draw(batch.step, *grid, 5)) >= self.method.dropout
            self._dropped[key] = [row.nonzero()[:, 0] for row in masks & drawn.to(masks.device)]
        return self._dropped[key]

    def keys_of(self, site: SharedSite, batch: Batch, half: int, k: Tensor, v: Tensor, layout: Layout) -> list[Source]:
        found = super().keys_of(site, batch, half, k, v, layout)
        if batch.banked:
            return found
        kept = [index.to(k.device) for index in self.kept(plane(layout), batch)]
        return [Source(x.name, x.k[kept[n]], x.v[kept[n]]) for n, x in enumerate(found)]

    def prepared(
        self, site: SharedSite, batch: Batch, q: Tensor, k: Tensor, v: Tensor, layout: Layout
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self._plain:
            self._queries[site.name] = q.detach()
            return q, k, v
        plain = self._queries.pop(site.name, None)
        share = self.method.share_of_plain(At(step=batch.step, steps=batch.steps))
        return (q if plain is None or not share else torch.lerp(q, plain.to(q), share)), k, v

    def views(self, site: SharedSite, batch: Batch, k: Tensor, v: Tensor, layout: Layout) -> list[View | None]:
        count = len(batch.halves) * batch.items
        if self._plain or (not batch.banked and not self._masks_known):
            return [None] * count
        views: list[View | None] = []
        for place in range(len(batch.halves)):
            seen = [Seen(x.k, x.v) for x in self.keys_of(site, batch, place, k, v, layout)]
            for item in range(batch.items):
                views.append(View(tuple(x for n, x in enumerate(seen) if batch.banked or self.sees(item, n))))
        return views

    def sees(self, picture: int, anchor: int) -> bool:
        """Whether a picture of the batch sees the subject's tokens of an anchor: of all but itself."""
        return picture != anchor

    # -------------------------------------------------------------------------------------------------------- hooks
    def _rows(self, batch: Batch) -> slice | None:
        """The conditional half of a batch."""
        if CONDITIONAL not in batch.halves:
            return None
        place = batch.halves.index(CONDITIONAL)
        return slice(batch.row(place, 0), batch.row(place, batch.items))

    @torch.compiler.disable
    def _note_maps(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch, given = self._now.batch, given_to(args, kwargs)
        if self._plain or batch is None or batch.banked or given is None or given.text is None:
            return
        rows = self._rows(batch)
        if rows is None or len(given.hidden) != len(batch.halves) * batch.items:
            return
        with torch.no_grad():
            q, k = queries_and_keys(module, given.hidden[rows], given.text[rows])
            self._sums.append(cross_maps(q, k, scale=getattr(module, "scale", None)))

    @torch.compiler.disable
    def _note_features(self, _module: nn.Module, _args: Any, out: Any) -> None:
        batch = self._now.batch
        if not self._rehearsing or self._plain or batch is None:
            return
        rows, x = self._rows(batch), out if isinstance(out, Tensor) else out[0]
        apart = abs(self._time - self.method.feature_time)
        if rows is not None and (self._features is None or apart < self._features[0]):
            self._features = apart, x[rows].detach()

    @torch.compiler.disable
    def _injected(self, role: str, _module: nn.Module, _args: Any, out: Tensor) -> Tensor | None:
        batch, features = self._now.batch, self._features
        if self._plain or self._rehearsing or features is None or batch is None or batch.banked or batch.items < 2:
            return None
        rows, grid = self._rows(batch), self._grids.get(role)
        if rows is None or grid is None or not self.method.injects(At(step=batch.step, steps=batch.steps)):
            return None
        masks = self.masks(grid, batch.items).to(out.device)
        if len(features[1]) != batch.items or out.shape[1] != grid[0] * grid[1]:
            return None
        if self._nearest[0] != (grid, batch.step):
            numbers = torch.arange(batch.items)
            mapping = (numbers[None] < self.method.anchors).expand(batch.items, -1)
            found = nearest_tokens(smoothed(features[1].float()), masks, mapping, grid)
            self._nearest = (grid, batch.step), found
        index, distance = self._nearest[1]
        changed = out.clone()
        changed[rows] = inject(out[rows], index, distance, masks, self.method.inject)
        return changed
