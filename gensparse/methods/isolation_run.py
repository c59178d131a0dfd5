"""Isolation, reposition and mutual cross-attention on a model (IR-Diffusion 2411.19261)."""

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
from gensparse.methods.subject_run import CONDITIONAL, Batch, Grid2, SharedSite, SubjectRun, plane
from gensparse.processors.agents import SiteNotes
from gensparse.processors.rotation import Rotary, turned_to
from gensparse.processors.shared import Seen, View, target_part
from gensparse.subjects.cast import Subjects
from gensparse.subjects.masks import apart, token_mask
from gensparse.subjects.reposition import Move, reposition

CROSSED = ("UNet", "PixArt")
"""Families whose blocks have a cross-attention to text behind their self-attention."""

if TYPE_CHECKING:
    from gensparse.methods.isolation_reposition import IsolationReposition


class Masks(NamedTuple):
    """Where the subjects are in their references and in the scene, bool [references, rows, columns].

    Args:
        targets: disjoint between subjects.
        owners: number of the subject of every reference, from 0; by default each has its own.
    """

    sources: Tensor
    targets: Tensor
    owners: tuple[int, ...] | None = None

    @property
    def groups(self) -> np.ndarray:
        """Subject of every token of the scene, from 1; 0 is the background."""
        owners = torch.arange(len(self.targets)) if self.owners is None else torch.tensor(self.owners)
        return (self.targets.flatten(1).long() * (owners + 1)[:, None]).amax(0).numpy()


class Shown(NamedTuple):
    """Of every subject, the queries that see its reference, bool [N], and which of its tokens they see."""

    queries: list[np.ndarray]
    moves: list[Move]


def shown(masks: Masks, kept: Tensor | None, *, moved: bool) -> Shown:
    """What is seen of the references.

    Args:
        kept: bool [N], tokens that dropout leaves, the same for all masks; None for all.
        moved: whether references are resized onto their places.
    """
    sources, targets = masks.sources.flatten(1), masks.targets.flatten(1)
    queries = targets if kept is None else _thinned(targets, kept)
    if moved:
        moves = [reposition(source, target) for source, target in zip(masks.sources, masks.targets, strict=True)]
    else:
        keys = sources if kept is None else _thinned(sources, kept)
        moves = [Move(*(mask.nonzero()[:, 0],) * 2) for mask in keys]
    return Shown([mask.numpy() for mask in queries], moves)


def mutual(out: Tensor, answers: Tensor, targets: Tensor, share: float) -> Tensor:
    """Outputs [N, C] of cross-attention, inside the regions mostly those under the prompts of the references.

    Args:
        answers: [subjects, N, C], attention of the same queries to the text of every reference.
        targets: bool [subjects, N].
        share: of the answers.
    """
    weights = targets.to(answers)[..., None]
    count = weights.sum(0)
    mean = (weights * answers).sum(0) / count.clamp(min=1)
    return torch.where(count > 0, (1 - share) * out + share * mean, out)


class IsolationRun(SubjectRun):
    """Portraits first in every half, then scenes."""

    method: "IsolationReposition"
    masked = False

    def __init__(self, method: "IsolationReposition", subject: Subject, places: Mapping[str, Place]) -> None:
        super().__init__(method, subject, places)
        self._masks: dict[tuple[Grid2, int], Masks] = {}
        self._shown: dict[tuple[Grid2, int, int], Shown] = {}
        self._grids: dict[str, Grid2] = {}
        self._model, self._rotary = subject.model, {}
        self._crosses = subject.family in CROSSED and method.cross > 0
        if self._crosses:
            self.hooks = [
                module.register_forward_hook(partial(self._mutual, places[name].role), with_kwargs=True)
                for name, module in _cross_modules(subject.model, places)
            ]
        if subject.family == "FLUX.1" and method.reposition:
            self._rotary = {name: SiteNotes() for name in self.sites}
            self.hooks += [
                subject.model.get_submodule(name).register_forward_pre_hook(notes.attention, with_kwargs=True)
                for name, notes in self._rotary.items()
            ]

    def references(self, items: int) -> int:
        if self.subjects is None:
            raise ConfigError(
                f"{self.method.name} has to know where its subjects are; call handle.use(Subjects(Concept(name, "
                "mask=..., region=...), ...)) before the run."
            )
        return len(self.subjects)

    def check(self, subjects: Subjects) -> None:
        missing = [item.name for item in subjects.concepts if item.region is None and not item.regions]
        if missing:
            raise ConfigError(
                f"{self.method.name} needs the region of {', '.join(missing)} in the scene; pass Concept(name, "
                "region=...)."
            )
        self._masks, self._shown = {}, {}

    def started(self, batch: Batch, arguments: dict[str, Any]) -> None:
        self._check_pictures(batch)
        self._shown = {key: value for key, value in self._shown.items() if key[2] in (-1, batch.step)}
        layouts = family_of(self._model).read_layouts(self._model, arguments, TensorMemo()) if self._crosses else {}
        self._grids = {role: plane(layout) for role, layout in layouts.items() if isinstance(layout, Layout)}

    def _check_pictures(self, batch: Batch) -> None:
        """ConfigError where regions are of another number of pictures."""
        assert self.subjects is not None, "checked when the batch was read"
        count = batch.items - batch.references
        for item in self.subjects.concepts:
            if item.regions and len(item.regions) != count:
                raise ConfigError(
                    f"{item.name!r} has regions of {len(item.regions)} pictures, and {count} are drawn; pass one for "
                    "each, or one region for all."
                )

    def masks(self, grid: Grid2, picture: int = 0) -> Masks:
        """The subjects on a grid, in one of the new pictures."""
        assert self.subjects is not None, "checked when the batch was read"
        concepts, owners = self.subjects.concepts, self.subjects.owners
        key = (grid, picture if any(item.regions for item in concepts) else 0)
        if key not in self._masks:
            whole = torch.ones(1, 1, dtype=torch.bool)
            sources = [token_mask(whole if item.mask is None else item.mask, grid) for item in concepts]
            regions = [item.region_of(picture) for item in concepts]
            targets = [token_mask(region, grid) for region in regions if region is not None]
            self._masks[key] = Masks(torch.stack(sources), apart(torch.stack(targets), owners), owners)
        return self._masks[key]

    def shown(self, grid: Grid2, picture: int, step: int) -> Shown:
        """What is seen of the references on a grid, in a step where there is dropout."""
        dropout, masks = self.method.dropout, self.masks(grid, picture)
        key = (grid, picture, step if dropout else -1)
        if key not in self._shown:
            kept = torch.rand(grid[0] * grid[1], generator=self.draw(step, *grid, 4)) >= dropout if dropout else None
            self._shown[key] = shown(masks, kept, moved=self.method.reposition)
        return self._shown[key]

    def views(self, site: SharedSite, batch: Batch, k: Tensor, v: Tensor, layout: Layout) -> list[View | None]:
        grid, shared = plane(layout), self.method.kind(site.place) == "shared"
        views: list[View | None] = []
        rotary = self._rotary_of(site, layout)
        for place, half in enumerate(batch.halves):
            views += [None] * batch.references
            sees = shared and (self.method.unconditional or half == CONDITIONAL)
            found = self.keys_of(site, batch, place, k, v, layout) if sees else []
            for picture in range(batch.items - batch.references):
                seen: tuple[Seen, ...] = ()
                if sees:
                    given = self.shown(grid, picture, batch.step)
                    seen = tuple(
                        self._seen(source.k, source.v, move, queries, rotary)
                        for source, move, queries in zip(found, given.moves, given.queries, strict=True)
                    )
                groups = self.masks(grid, picture).groups if self.method.isolation else None
                views.append(View(seen, groups=groups))
        return views

    def _seen(self, k: Tensor, v: Tensor, move: Move, queries: np.ndarray, rotary: Rotary | None) -> Seen:
        source, place = move.source.to(k.device), move.place.to(k.device)
        keys = k[source] if rotary is None else turned_to(k[source], rotary, source, place)
        return Seen(keys, v[source], bias=self.method.bias, queries=queries)

    def _rotary_of(self, site: SharedSite, layout: Layout) -> Rotary | None:
        notes = self._rotary.get(site.name)
        rotary = None if notes is None else notes.take().rotary
        part = target_part(layout)
        return None if rotary is None else (rotary[0][part], rotary[1][part])

    def _mutual(
        self, role: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
    ) -> Tensor | None:
        """Hook of a cross-attention module whose queries are on the grid of `role`."""
        batch, grid = self._now.batch, self._grids.get(role)
        hidden = args[0] if args else kwargs.get("hidden_states")
        text = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
        if batch is None or grid is None or batch.references == 0 or text is None or not isinstance(hidden, Tensor):
            return None
        if hidden.shape[:2] != (len(batch.halves) * batch.items, grid[0] * grid[1]):
            return None
        if self.method.when(At(step=batch.step, steps=batch.steps)) is not None:
            return None
        rest = {name: value for name, value in kwargs.items() if name not in ("hidden_states", "encoder_hidden_states")}
        mixed = out.clone()
        for place in range(len(batch.halves)):
            portraits = [batch.row(place, number) for number in range(batch.references)]
            for picture in range(batch.items - batch.references):
                row, answers = batch.row(place, batch.references + picture), []
                targets = self.masks(grid, picture).targets.flatten(1).to(out.device)
                for n in portraits:  # their text, and which of its tokens are padding
                    told = {key: n if key == "attention_mask" else row for key in rest}
                    own = {key: _row(value, told[key], len(hidden)) for key, value in rest.items()}
                    words = _row(text, n, len(hidden))
                    answers.append(module.forward(hidden[row : row + 1], encoder_hidden_states=words, **own)[0])
                mixed[row] = mutual(out[row], torch.stack(answers), targets, self.method.cross)
        return mixed


def _thinned(masks: Tensor, kept: Tensor) -> Tensor:
    """Masks [subjects, N] without what a common draw drops; those that it would empty stay whole."""
    thinned = masks & kept
    return torch.where(thinned.any(dim=1, keepdim=True), thinned, masks)


def _cross_modules(model: nn.Module, places: Mapping[str, Place]) -> list[tuple[str, nn.Module]]:
    """Cross-attention behind the sites: (name of the site, module), where both are in one block."""
    found = []
    for name in places:
        block = model.get_submodule(name.rpartition(".")[0])
        cross = getattr(block, "attn2", None)
        if cross is not None and getattr(cross, "processor", None) is not None:
            found.append((name, cross))
    return found


def _row(value: Any, row: int, batch: int) -> Any:
    """One sample of an argument that has one per sample; text may come with image prompts."""
    if isinstance(value, tuple | list):
        return type(value)(_row(part, row, batch) for part in value)
    one = isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch
    return value[row : row + 1] if one else value
