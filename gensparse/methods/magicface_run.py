"""MagicFace on a model: the picture segmented by its own attention, regions, guidance per pixel (2408.07433)."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gensparse.errors import ConfigError
from gensparse.families import TensorMemo, family_of
from gensparse.layout import Layout
from gensparse.methods.base import At, Place, Subject
from gensparse.methods.freecustom import weights_of
from gensparse.methods.subject_run import CONDITIONAL, UNCONDITIONAL, Batch, Grid2, SharedSite, SubjectRun, plane
from gensparse.processors.read_maps import given_to, partner, queries_and_keys
from gensparse.processors.shared import Seen, View
from gensparse.subjects.attention_maps import cross_maps, self_times
from gensparse.subjects.cast import Subjects
from gensparse.subjects.masks import apart, to_grid
from gensparse.subjects.segmentation import balanced, foreground_maps, guidance_rate, segment, spread_maps

if TYPE_CHECKING:
    from gensparse.methods.magicface import MagicFace

LEVELS = (1, 2, 3)
"""Levels of a UNet whose attention segments the picture: half, a quarter and an eighth of the latent's side."""


class Segments(NamedTuple):
    """What every generated picture of a half shows: bool [pictures, words, rows, columns], and its foreground."""

    found: Tensor
    front: Tensor


class MagicFaceRun(SubjectRun):
    """Masked references first in every half; regions from the step before."""

    method: "MagicFace"

    def __init__(self, method: "MagicFace", subject: Subject, places: Mapping[str, Place]) -> None:
        super().__init__(method, subject, places)
        self._model = model = subject.model
        self._grids: dict[str, Grid2] = {}
        self._queries: dict[str, tuple[Tensor, Tensor]] = {}
        self._sums: dict[int, list[Tensor]] = {UNCONDITIONAL: [], CONDITIONAL: []}
        self._segments: Segments | None = None
        for name, place in places.items():
            cross = partner(model, name)
            if cross is None or int(place.role.removeprefix("level")) not in LEVELS:
                continue
            own = model.get_submodule(name)
            self.hooks.append(own.register_forward_pre_hook(partial(self._note_own, name), with_kwargs=True))
            noted = partial(self._note_cross, name, place.role)
            self.hooks.append(cross.register_forward_pre_hook(noted, with_kwargs=True))
        self.hooks.append(model.register_forward_hook(self._answered))

    def references(self, items: int) -> int:
        if self.subjects is None:
            raise ConfigError(
                f"{self.method.name} has to know its references and their words; call handle.use(Subjects(Concept("
                "name, mask=..., tokens=...), ...)) before the run."
            )
        return len(self.subjects)

    def check(self, subjects: Subjects) -> None:
        count = self.method.subjects
        if count is not None and len(subjects) != count:
            raise ConfigError(f"{self.method.name} has subjects={count}, and {len(subjects)} are named; pass as many.")
        weights_of(self.method.name, self.method.weights, len(subjects))
        without = [item.name for item in subjects.concepts if not item.tokens and item.region is None]
        if without:
            raise ConfigError(
                f"{self.method.name} needs the word or the region of {', '.join(without)}; pass Concept(name, "
                "tokens=token_places(pipe.tokenizer, prompt, word))."
            )

    def started(self, batch: Batch, arguments: dict[str, Any]) -> None:
        self._sums = {UNCONDITIONAL: [], CONDITIONAL: []}
        self._queries = {}
        if batch.step == 0:
            self._segments = None
        layouts = family_of(self._model).read_layouts(self._model, arguments, TensorMemo())
        self._grids = {role: plane(layout) for role, layout in layouts.items() if isinstance(layout, Layout)}

    @property
    def _words(self) -> list[int]:
        """The word of every reference; -1 for those with a region instead."""
        assert self.subjects is not None, "checked when the batch was read"
        return [item.places(0)[0] if item.tokens else -1 for item in self.subjects.concepts]

    def regions(self, picture: int, grid: Grid2) -> list[np.ndarray]:
        """Tokens of a generated picture that see each reference, bool [N]; of several the last."""
        assert self.subjects is not None, "checked when the batch was read"
        planes = []
        for word, concept in zip(self._words, self.subjects.concepts, strict=True):
            if concept.region is not None:
                planes.append(to_grid(concept.region, grid))
            elif self._segments is not None:
                planes.append(to_grid(self._segments.found[picture, word].cpu(), grid))
            else:
                planes.append(torch.zeros(grid, dtype=torch.bool))
        return [mask.flatten().numpy() for mask in apart(torch.stack(planes), self.subjects.owners)]

    def views(self, site: SharedSite, batch: Batch, k: Tensor, v: Tensor, layout: Layout) -> list[View | None]:
        weights = weights_of(self.method.name, self.method.weights, len(batch.names))
        regional = self.method.regional(At(step=batch.step, steps=batch.steps))
        views: list[View | None] = []
        for place, half in enumerate(batch.halves):
            if half != CONDITIONAL:
                views += [None] * batch.items
                continue
            views += [None] * batch.references
            found = self.keys_of(site, batch, place, k, v, layout)
            for picture in range(batch.items - batch.references):
                shown = self.regions(picture, plane(layout)) if regional else [None] * len(found)
                seen = [Seen(x.k, x.v, w, queries) for x, w, queries in zip(found, weights, shown, strict=True)]
                views.append(View(tuple(seen)))
        return views

    # -------------------------------------------------------------------------------------------------------- hooks
    def _generated(self, batch: Batch) -> dict[int, slice]:
        """Rows of the generated pictures of every half."""
        return {
            half: slice(batch.row(place, batch.references), batch.row(place, batch.items))
            for place, half in enumerate(batch.halves)
        }

    @torch.compiler.disable
    def _note_own(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch, given = self._now.batch, given_to(args, kwargs)
        if batch is None or given is None or len(given.hidden) != len(batch.halves) * batch.items:
            return
        rows = torch.cat([torch.arange(part.start, part.stop) for part in self._generated(batch).values()])
        with torch.no_grad():
            self._queries[name] = queries_and_keys(module, given.hidden[rows])

    @torch.compiler.disable
    def _note_cross(
        self, name: str, role: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        batch, given, own = self._now.batch, given_to(args, kwargs), self._queries.pop(name, None)
        if batch is None or given is None or given.text is None or own is None or role not in self._grids:
            return
        generated = self._generated(batch)
        rows = torch.cat([torch.arange(part.start, part.stop) for part in generated.values()])
        grid, size = self._grids[role], self._grids[f"level{LEVELS[0]}"]
        with torch.no_grad():
            q, k = queries_and_keys(module, given.hidden[rows], given.text[rows])
            maps = spread_maps(partial(self_times, *own), cross_maps(q, k))
            for half, part in zip(generated, maps.chunk(len(generated)), strict=True):
                reduced = balanced if half == CONDITIONAL else foreground_maps
                self._sums[half].append(reduced(part, grid, size))

    @torch.compiler.disable
    def _answered(self, _model: nn.Module, _args: Any, out: Any) -> Any:
        """Behind the denoiser: segment the pictures, and turn guidance up or down in the conditional answer."""
        batch = self._now.batch
        if batch is None or not self._sums[CONDITIONAL]:
            return None
        x = out if isinstance(out, Tensor) else out[0]
        self._segments = self._segmented(batch)
        guidance = float(getattr(self.pipeline(), "guidance_scale", None) or 0)
        if not self.method.rate or len(batch.halves) < 2 or guidance <= 1:
            return None
        generated, changed = self._generated(batch), x.clone()
        plain, told = (x[generated[half]] for half in (UNCONDITIONAL, CONDITIONAL))
        rates = [
            guidance_rate(a, b, self._segments.found[n], self._segments.front[n], guidance)
            for n, (a, b) in enumerate(zip(plain, told, strict=True))
        ]
        changed[generated[CONDITIONAL]] = plain + torch.stack(rates)[:, None].to(x) * (told - plain)
        if isinstance(out, Tensor):
            return changed
        return (changed, *out[1:]) if isinstance(out, tuple) else type(out)(sample=changed)

    def _segmented(self, batch: Batch) -> Segments:
        maps = torch.stack(self._sums[CONDITIONAL]).mean(0)
        front = self._sums[UNCONDITIONAL]
        # without an unconditional half nothing tells the background: all of the picture counts
        fronts = (
            torch.stack(front).mean(0)
            if front
            else torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).to(maps).expand(len(maps), 2, *maps.shape[2:])
        )
        damping = self.method.damping
        assert self.subjects is not None, "checked when the batch was read"
        damping = (0.9 if max(self.subjects.owners) == 0 else 0.5) if damping is None else damping
        words = list(dict.fromkeys(word for word in self._words if word >= 0))
        parts = [segment(a, b, words, damping) for a, b in zip(maps, fronts, strict=True)]
        found, front_masks = zip(*parts, strict=True)
        return Segments(torch.stack(found), torch.stack(front_masks))
