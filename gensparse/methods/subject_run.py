"""The pictures of a batch as methods for several subjects see them: who is a reference, whose keys are whose.

`SubjectRun` is what these methods put on a model. It reads the batch of every denoiser call, noises given reference
pictures to the level of the step, takes keys of references from the batch or from a bank, and asks the method for the
views of the pictures.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gensparse.errors import ConfigError, LayoutMismatchError
from gensparse.layout import Layout
from gensparse.methods.base import At, Loaded, Place, Subject
from gensparse.processors.bank import StepBank
from gensparse.processors.operators import OperatorCall
from gensparse.processors.shared import View, attend_all, attend_views, target_part
from gensparse.subjects.cast import Concept, Subjects, of_names
from gensparse.subjects.masks import to_grid

if TYPE_CHECKING:
    from gensparse.methods.subject_method import SubjectMethod

UNCONDITIONAL, CONDITIONAL = 0, 1
Grid2 = tuple[int, int]


class Source(NamedTuple):
    """Keys and values [tokens, H, D] of one reference picture, those that its mask keeps."""

    name: str
    k: Tensor
    v: Tensor


class Batch(NamedTuple):
    """The pictures of a denoiser call.

    Args:
        halves: which halves of guidance it holds, 0 the unconditional one, 1 the conditional one.
        items: pictures of a half: `references` references first, then those that are generated.
        names: of the references, in the batch or in the bank.
        banked: whether they are in the bank.
    """

    halves: tuple[int, ...]
    items: int
    references: int
    names: tuple[str, ...]
    banked: bool
    step: int
    steps: int | None = None

    def row(self, half: int, item: int) -> int:
        """Number in the batch of a picture of the half that stands at place `half`."""
        return half * self.items + item


class _Now(threading.local):
    """The batch of the running call, how many calls of its step came before, how large the first was; per thread."""

    def __init__(self) -> None:
        self.batch: Batch | None = None
        self.step = self.call = -1
        self.calls = self.total = 0

    def __reduce__(self) -> "tuple[type[_Now], tuple[()]]":
        return _Now, ()


@dataclass(frozen=True)
class SharedAttention:
    """The operator of all these methods: what a site does is said by its notes."""

    name: str

    def key(self) -> str:
        return self.name

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: OperatorCall) -> Tensor:
        """q, k, v [B, S, H, D] -> [B, S, H, D]."""
        site: SharedSite | None = call.notes
        return call.dense() if site is None else site.run.attend(site, q, k, v, call)


@dataclass(frozen=True, eq=False)
class SharedSite:
    """What the operator of one site knows: the run, and where the site is."""

    run: "SubjectRun"
    place: Place

    @property
    def name(self) -> str:
        return self.place.name


class SubjectRun(Loaded):
    """Base of what the methods put on a model.

    Subclasses give `views`, and where they need it `started`, `prepared`, `shared` and hooks (in `self.hooks`).
    """

    beside = ("controlnet",)
    masked = True
    """Whether the masks of references are static: their keys are gathered at once, also for the bank."""
    symmetric = False
    """Whether all pictures of a half may be references."""
    multiple = 1
    """Lengths of gathered keys are padded to it."""
    frames = False
    """Whether frames of a clip may stand in the place of pictures."""

    def __init__(self, method: "SubjectMethod", subject: Subject, places: Mapping[str, Place]) -> None:
        self.method, self.family = method, subject.family
        self.sites = {name: SharedSite(self, place) for name, place in places.items() if method.kind(place) is not None}
        self.subjects: Subjects | None = None
        self.bank: StepBank | None = None
        self.hooks: list[Any] = []
        self._writing: tuple[str, ...] | None = None
        self._now = _Now()
        self._indices: dict[Any, Tensor | None] = {}

    # ------------------------------------------------------------------------------------------------ for the handle
    def use(self, subjects: Subjects) -> None:
        """Who is in the pictures from now on."""
        if not isinstance(subjects, Subjects):
            raise ConfigError(
                f"{self.method.name} got {type(subjects).__name__}; pass gensparse.Subjects(Concept(...))."
            )
        fixed = self.method.fixed
        if fixed is not None and len(subjects) != fixed:
            raise ConfigError(f"{self.method.name} has {fixed} reference picture(s), and {len(subjects)} are named.")
        self.check(subjects)
        self.subjects, self._indices = subjects, {}

    @contextmanager
    def writing(self, names: Sequence[str] | None, device: Any) -> Iterator[None]:
        """Inside, the references of every call are kept in the bank; what it held of these names is replaced."""
        self.bank = self.bank or StepBank(device)
        self.bank.device = device
        self._writing = tuple(names or ())
        try:
            yield
        finally:
            self._writing = None

    def forget(self) -> None:
        self.bank = None

    def report(self) -> dict[str, Any]:
        """ "pictures": the batch of this thread's last call; "bank": what is kept of references."""
        batch, found = self._now.batch, {}
        if batch is not None:
            found["pictures"] = {
                "halves": len(batch.halves),
                "references": list(batch.names),
                "banked": batch.banked,
                "generated": batch.items - batch.references,
            }
        if self.bank is not None:
            found["bank"] = {"references": list(self.bank.names), "bytes": self.bank.bytes}
        return found

    def undo(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def notes(self, place: Place) -> "SharedSite | None":
        return self.sites.get(place.name)

    # ------------------------------------------------------------------------------------------------- for subclasses
    def check(self, subjects: Subjects) -> None:
        """ConfigError where the method cannot do with these subjects."""

    def references(self, items: int) -> int:
        """Reference pictures among the `items` of a half."""
        if self.method.fixed is not None:
            return self.method.fixed
        return items - 1 if self.subjects is None else len(self.subjects)

    def views(self, site: SharedSite, batch: Batch, k: Tensor, v: Tensor, layout: Layout) -> list[View | None]:
        """What every picture of the batch sees."""
        raise NotImplementedError

    def prepared(
        self, site: SharedSite, batch: Batch, q: Tensor, k: Tensor, v: Tensor, layout: Layout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values before they attend."""
        return q, k, v

    def started(self, batch: Batch, arguments: dict[str, Any]) -> None:
        """Before every denoiser call."""

    def keys_of(self, site: SharedSite, batch: Batch, half: int, k: Tensor, v: Tensor, layout: Layout) -> list[Source]:
        """Keys and values of the references of the half at a place of the batch, from the batch or the bank."""
        if batch.banked:
            assert self.bank is not None, "read from it"
            which = batch.halves[half]
            return [Source(name, *self.bank.pair(batch.step, which, site.name, name, k)) for name in batch.names]
        part, found = target_part(layout), []
        for number, name in enumerate(batch.names):
            row = batch.row(half, number)
            index = self.index(name, layout, k.device) if self.masked else None
            pair = (k[row, part], v[row, part])
            found.append(Source(name, *(pair if index is None else (x[index] for x in pair))))
        return found

    def concept(self, name: str) -> Concept | None:
        """The concept of a reference, where the subjects name it."""
        subjects = self.subjects
        return subjects[name] if subjects is not None and name in subjects.names else None

    def index(self, name: str, layout: Layout, device: torch.device) -> Tensor | None:
        """Tokens that the mask of a reference keeps on a grid, int64; None for all of them."""
        concept = self.concept(name)
        if concept is None or concept.mask is None:
            return None
        key = (name, layout.grid, device)
        if key not in self._indices:
            mask = to_grid(concept.mask, plane(layout)).flatten()
            self._indices[key] = mask.nonzero()[:, 0].to(device)
        return self._indices[key]

    def draw(self, *numbers: int) -> torch.Generator:
        """A generator of random numbers that the seed of the method and `numbers` fix."""
        return torch.Generator().manual_seed(mixed(getattr(self.method, "seed", 0), *numbers))

    # ---------------------------------------------------------------------------------------------- of a denoiser call
    def begin(self, at: At, arguments: dict[str, Any]) -> bool:
        batch = self._batch(at, arguments, counted=True)
        self._now.batch = batch
        self.started(batch, arguments)
        return self._noised(batch, arguments)

    def begin_beside(self, at: At, arguments: dict[str, Any]) -> bool:
        return self._noised(self._batch(at, arguments, counted=False), arguments)

    def attend(self, site: SharedSite, q: Tensor, k: Tensor, v: Tensor, call: OperatorCall) -> Tensor:
        """Attention of one site, [B, S, H, D]."""
        batch = self._now.batch
        if batch is None or len(q) != len(batch.halves) * batch.items:
            raise LayoutMismatchError(
                f"{site.name} got a batch of {len(q)}, and the denoiser another one; {self.method.name} needs all "
                "pictures of the call in every layer."
            )
        plain = q, k, v
        q, k, v = self.prepared(site, batch, q, k, v, call.layout)
        if any(a is not b for a, b in zip(plain, (q, k, v), strict=True)):

            def dense() -> Tensor:
                return attend_all(q, k, v, call.layout, scale=call.scale, key_bias=call.key_bias)

            call = call._replace(dense=dense)
        out = self.shared(site, batch, q, k, v, call)
        if self._writing is not None:
            self._write(site, batch, k, v, call.layout)
        return out

    def shared(self, site: SharedSite, batch: Batch, q: Tensor, k: Tensor, v: Tensor, call: OperatorCall) -> Tensor:
        """Attention under the views; `call.dense` gives plain attention of the same tensors."""
        views = self.views(site, batch, k, v, call.layout)
        return attend_views(
            q, k, v, views, call.layout, call.dense, scale=call.scale, key_bias=call.key_bias, multiple=self.multiple
        )

    def _batch(self, at: At, arguments: dict[str, Any], *, counted: bool) -> Batch:
        from gensparse.methods.subject_method import APART

        total = pictures(arguments, frames=self.frames)
        count = self.method.halves or self._halves(at)
        if not counted and count == 2 and (total % 2 or total // 2 <= self.references(total // 2)):
            count = 1  # a ControlNet that is asked for the conditional half alone
        again = counted and self._is_again(at, total)
        if again and count == 2 and self.method.halves is None and 2 * total == self._now.total:
            count = 1  # guidance that skips layers asks for the conditional half once more
        if total % count:
            raise ConfigError(
                f"{self.method.name} got a batch of {total}, which has no {count} equal halves of guidance; pass "
                "halves=1 where the call holds one."
            )
        apart = count == 1 and self.family in APART and self.pipeline() is not None
        second = counted and apart and self._now.calls % 2 == 1
        halves = (UNCONDITIONAL, CONDITIONAL) if count == 2 else (UNCONDITIONAL if second else CONDITIONAL,)
        return self._cast(halves, total // count, at)

    def _is_again(self, at: At, total: int) -> bool:
        """Whether the step had a call before this one; counts it."""
        now = self._now
        again = at.step == now.step and at.call > now.call
        now.calls, now.total = (now.calls + 1, now.total) if again else (0, total)
        now.step, now.call = at.step, at.call
        return again

    def _halves(self, at: At) -> int:
        """Halves of guidance in a call, as the pipeline tells; 1 for a bare model."""
        from gensparse.methods.subject_method import BATCHED

        pipeline = self.pipeline()
        if self.family not in BATCHED or pipeline is None:
            return 1
        if at.guided is None:
            raise ConfigError(
                f"{type(pipeline).__name__} does not say whether it guides; pass halves=2 where both halves of "
                f"guidance come in one batch, else halves=1, to {self.method.name}."
            )
        return 2 if at.guided else 1

    def _cast(self, halves: tuple[int, ...], items: int, at: At) -> Batch:
        if self.bank is not None and self._writing is None and self.bank.names:
            return Batch(halves, items, 0, self._banked(), True, at.step, at.steps)
        if self._writing is not None:
            named = self._writing or (() if self.subjects is None else self.subjects.names)
            count = min(items, len(named) if named else self.references(items if self.symmetric else items + 1))
            names = (*named[:count], *(f"reference{n}" for n in range(len(named), count)))
            return Batch(halves, items, count, names, False, at.step, at.steps)
        count = self.references(items)
        if count < 0 or count > items or (count == items and not self.symmetric):
            raise ConfigError(
                f"{self.method.name} has {count} reference picture(s), which come first in the batch, and "
                f"needs at least one more that is generated, but the call has {items} per half; pass prompts for all "
                "of them, or fewer subjects."
            )
        return Batch(halves, items, count, of_names(self.subjects, count), False, at.step, at.steps)

    def _banked(self) -> tuple[str, ...]:
        """Names to be read from the bank: of the subjects, else all."""
        assert self.bank is not None, "read from it"
        if self.subjects is None:
            return self.bank.names
        missing = [name for name in self.subjects.names if name not in self.bank.names]
        if missing:
            raise ConfigError(
                f"The bank has {', '.join(self.bank.names)}, and not {', '.join(missing)}; write them, or call "
                "handle.forget() to have references in the batch."
            )
        return self.subjects.names

    def _write(self, site: SharedSite, batch: Batch, k: Tensor, v: Tensor, layout: Layout) -> None:
        assert self.bank is not None, "written to"
        self.bank.steps = batch.steps
        for place, half in enumerate(batch.halves):
            for source in self.keys_of(site, batch, place, k, v, layout):
                self.bank.keep(batch.step, half, site.name, source.name, source.k, source.v)

    def _noised(self, batch: Batch, arguments: dict[str, Any]) -> bool:
        """Given reference pictures at the noise of this step, in place of what the batch holds there."""
        subjects = self.subjects
        clean = [] if subjects is None else [item.latents for item in subjects.concepts[: batch.references]]
        clean = [latents for latents in clean if latents is not None]
        if not clean or batch.banked:
            return False
        key = "sample" if "sample" in arguments else "hidden_states"
        x = arguments[key].clone()
        for number, latents in enumerate(clean):
            if latents.shape != x.shape[1:]:
                raise ConfigError(
                    f"The latents of {batch.names[number]!r} are {tuple(latents.shape)}, and the denoiser gets "
                    f"{tuple(x.shape[1:])}; encode the picture at the size of the generated one."
                )
            noisy = self._at_noise(latents, number, batch, arguments).to(x)
            for place in range(len(batch.halves)):
                x[batch.row(place, number)] = noisy
        arguments[key] = x
        return True

    def _at_noise(self, clean: Tensor, number: int, batch: Batch, arguments: dict[str, Any]) -> Tensor:
        from gensparse.methods.subject_method import FLOWS

        step = batch.step if getattr(self.method, "fresh_noise", True) else 0
        noise = torch.randn(clean.shape, generator=self.draw(step, number, 1))
        clean, time = clean.detach().float().cpu(), torch.as_tensor(arguments["timestep"]).flatten()[:1].cpu()
        if self.family in FLOWS:
            share = float(time) / (1 if self.family == "FLUX.1" else 1000)
            return (1 - share) * clean + share * noise
        scheduler = getattr(self.pipeline(), "scheduler", None)
        if scheduler is None:
            raise ConfigError(
                f"{self.method.name} noises the given reference pictures by the scheduler; apply it to the pipeline "
                "instead of the bare denoiser."
            )
        noisy = scheduler.add_noise(clean[None], noise[None], time)
        return scheduler.scale_model_input(noisy, time[0])[0]


def mixed(*numbers: int) -> int:
    """One seed of several numbers."""
    return int(np.random.SeedSequence([number & 0xFFFFFFFF for number in numbers]).generate_state(1, np.uint64)[0] >> 1)


def plane(layout: Layout) -> Grid2:
    """(rows, columns) of a picture."""
    return layout.grid[1], layout.grid[2]


def pictures(arguments: Mapping[str, Any], *, frames: bool = False) -> int:
    """Pictures of a denoiser call; with `frames` the frames of clips count as pictures.

    Raises:
        ConfigError: no latents, or clips without `frames`.
    """
    x = arguments.get("sample", arguments.get("hidden_states"))
    if not isinstance(x, Tensor):
        raise ConfigError("The denoiser call has no latents; pass sample or hidden_states.")
    if x.dim() == 5 and not frames:
        raise ConfigError("The denoiser call holds clips, whose frames are no pictures of a batch; take tokenflow.")
    return x.shape[0] * (x.shape[2] if x.dim() == 5 else 1)
