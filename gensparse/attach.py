"""Make a diffusers pipeline sparse and undo it: `apply`, `remove`, `applied`, `make_processors`."""

import inspect
import logging
import math
import re
import threading
import weakref
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from gensparse.errors import ConfigError, LayoutMismatchError, UnsupportedProcessorError
from gensparse.families import CROSS, Family, Layouts, TensorMemo, WithKeys, family_of
from gensparse.layout import KINDS, Layout, Segment
from gensparse.methods import At, Dense, Loaded, Method, Place, Subject, as_method
from gensparse.parallel import Team, ulysses
from gensparse.patterns import Pattern, Policy, Reference, References, RoutedPattern
from gensparse.plan import build_plan
from gensparse.processors import _compat
from gensparse.processors.bank import Bank, Record
from gensparse.processors.clock import Clock
from gensparse.processors.operators import Operator
from gensparse.processors.pairs import NO_MASK, ProductMask, last_zero
from gensparse.processors.site import CACHED, SPARSE, Action, ActionSlot, Extra, Site, Work
from gensparse.processors.stages import CrossSite, Stages
from gensparse.processors.tally import NOT_SET, Tally, merged
from gensparse.processors.variant import SITE, is_sparse, make_dense, make_sparse, sparse_variant

_LOG = logging.getLogger(__name__)

_ATTACHMENT = "_gensparse"
_DENOISERS = ("transformer", "transformer_2", "unet")
_RECENT = 256  # works a model keeps at hand: kinds of sites (layers, at most) times layouts of a run
_TEXT_ALONE = Policy(tuple(("text", kind) for kind in KINDS if kind != "pooled"))


def apply(
    pipe_or_model: Any,
    method: Method | str | Mapping[str, Any],
    *,
    strict: bool = False,
    dense_steps: int = 0,
    dense_last_steps: int = 0,
    dense_layers: Iterable[int] = (),
    audit: int | None = None,
    subjects: Any = None,
) -> "Handle":
    """Make the attention of a pipeline (or of one denoiser) sparse, in place.

    A method that is already on the model is replaced, so applying twice equals applying once. Apply before compiling.

    Args:
        method: `Clear(radius=16)`, "clear", "clear:radius=16", or the dict of `Method.to_dict`.
        strict: raise where a call does not fit its layout, instead of running it dense and reporting why.
        dense_steps: number of first denoising steps that stay dense.
        dense_last_steps: number of last steps that stay dense. A bare model does not know how many there are: apply to
            the pipeline, or say it by `handle.restart(steps=...)`.
        dense_layers: indices of attention layers, in model order, that stay dense; negative ones count from the end.
        audit: picture tokens per attention call whose output is compared with dense attention, exactly and at little
            cost; `report()["error"]` tells the difference. By default as many as the method wants (none, but for auto).
        subjects: of the pictures, a `gensparse.Subjects`, for methods for several subjects; see `Handle.use`.

    Raises:
        ConfigError: an unknown method or setting, or a model of no supported family.
        UnsupportedProcessorError: a processor cannot be made sparse; the model is unchanged then.
    """
    settings = Settings(as_method(method), strict, dense_steps, dense_last_steps, dense_layers, audit)
    _compat.warn_of_other_versions()
    models, clock = _models(pipe_or_model), Clock()  # denoisers that take turns count the steps of one run
    attachments = [Attachment(model, settings, pipe_or_model, clock, len(models)) for model in models]
    for attachment in attachments:
        attachment.check()
    before = [_attachment(model) for model in models]
    try:
        for attachment in attachments:
            attachment.install()
        if subjects is not None:
            for attachment in attachments:
                attachment.taking_subjects().use(subjects)
    except BaseException:
        _put_back(models, before)  # of denoisers that take turns never only some are sparse
        raise
    return Handle(attachments)


def remove(pipe_or_model: Any) -> None:
    """Undo whatever `apply` or `make_processors` changed on a pipeline or model; does nothing where nothing is."""
    for model in _models(pipe_or_model):
        _detach(model)


@contextmanager
def applied(pipe_or_model: Any, method: Method | str | Mapping[str, Any], **settings: Any) -> "Iterator[Handle]":
    """`apply` inside a with block; afterwards the model is as before it, with the method it had or none."""
    models = _models(pipe_or_model)
    before = [_attachment(model) for model in models]
    handle = apply(pipe_or_model, method, **settings)
    try:
        yield handle
    finally:
        _put_back(models, before)


def attached(pipe_or_model: Any) -> "Handle | None":
    """The handle of what is on all denoisers of a pipeline or on a model, None where `apply` put nothing there."""
    found = [attachment for model in _models(pipe_or_model) if (attachment := _attachment(model)) is not None]
    return Handle(found) if found and len(found) == len(_models(pipe_or_model)) else None


def make_processors(model: nn.Module, method: Method | str | Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    """Sparse copies of a model's attention processors, for `model.set_attn_processor(...)`.

    The model is prepared for them (see `apply`, which takes the same settings); `remove(model)` undoes that and turns
    processors that were set dense again. Sites whose processor is not set stay dense and are reported.

    Returns:
        {"name.of.module.processor": processor} with every processor of the model, those of no site unchanged.
    """
    attachment = Attachment(_denoiser(model), Settings(as_method(method), **settings), None)
    attachment.check()
    attachment.install(swap=False)
    return {f"{name}.processor": attachment.sparse_copy(name, module) for name, module in _attention(model).items()}


def compile_blocks(pipe_or_model: Any, **options: Any) -> int:
    """Compile the repeated blocks of the denoisers, each class of blocks once instead of the whole model.

    Like `model.compile_repeated_blocks`, and also for models that diffusers names no blocks for. A model may be made
    sparse before or after it.

    Args:
        options: of `torch.compile`; docs/processors.md says which methods allow `fullgraph=True`.

    Returns:
        The number of blocks.

    Raises:
        ConfigError: a model of no supported family, or without repeated blocks.
    """
    blocks = [block for model in _models(pipe_or_model) for block in _repeated_blocks(model)]
    for block in blocks:
        block.compile(**options)
    return len(blocks)


def _repeated_blocks(model: nn.Module) -> list[nn.Module]:
    classes, pattern = _compat.repeated_blocks(model), family_of(model).blocks
    found = [
        module
        for name, module in model.named_modules()
        if (type(module).__name__ in classes if classes else re.fullmatch(pattern, name))
    ]
    if not found:
        raise ConfigError(f"{type(model).__name__} has no repeated blocks; compile the whole model by model.compile().")
    return found


@dataclass(frozen=True)
class Settings:
    """How a method is used on a model: the arguments of `apply`, checked.

    Raises:
        ConfigError: a value of the wrong type or range.
    """

    method: Method
    strict: bool = False
    dense_steps: int = 0
    dense_last_steps: int = 0
    dense_layers: Iterable[int] = ()
    audit: int | None = None

    def __post_init__(self) -> None:
        for name in ("dense_steps", "dense_last_steps"):
            steps = getattr(self, name)
            if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
                raise ConfigError(f"{name}={steps!r} is not allowed; pass a number of steps from 0 up.")
        layers = tuple(self.dense_layers) if isinstance(self.dense_layers, Iterable) else (None,)
        if not all(isinstance(index, int) and not isinstance(index, bool) for index in layers):
            raise ConfigError(f"dense_layers={self.dense_layers!r} is not allowed; pass indices of attention layers.")
        object.__setattr__(self, "dense_layers", layers)
        rows = self.method.audit if self.audit is None else self.audit
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 0:
            raise ConfigError(f"audit={rows!r} is not allowed; pass a number of tokens from 0 up.")
        object.__setattr__(self, "audit", rows)

    @property
    def timed(self) -> bool:
        """Whether the step of a call matters."""
        return bool(self.dense_steps or self.dense_last_steps or self.method.timed)

    def dense_at(self, now: At) -> bool:
        """Whether a step is dense altogether.

        Raises:
            ConfigError: last steps are to be dense, but nobody knows how many steps there are.
        """
        if self.dense_last_steps and now.steps is None:
            raise ConfigError(
                f"dense_last_steps={self.dense_last_steps} needs the number of steps, which a model without its "
                "pipeline does not know; apply to the pipeline, or call handle.restart(steps=...) before each run."
            )
        last = (now.steps or 0) - self.dense_last_steps
        return now.step < self.dense_steps or (self.dense_last_steps > 0 and now.step >= last)

    def pinned(self, layers: int) -> dict[int, str]:
        """Index of every layer that always runs dense -> why, for a model of `layers` attention layers."""
        for index in self.dense_layers:
            if not -layers <= index < layers:
                raise ConfigError(
                    f"dense_layers holds {index}, but the model has {layers} attention layers; pass indices from "
                    f"{-layers} to {layers - 1}."
                )
        return {index % layers: "dense layer" for index in self.dense_layers}


class Handle:
    """What `apply` changed on one pipeline or model: counts, and the way back."""

    def __init__(self, attachments: "Sequence[Attachment]") -> None:
        self._attachments = tuple(attachments)

    @property
    def active(self) -> bool:
        """Whether the changes are in place: not removed, not replaced by another `apply`."""
        return all(attachment.active for attachment in self._attachments)

    @property
    def method(self) -> Method:
        """What acts on the model, with its settings; of several denoisers the first one's."""
        return self._attachments[0].method

    def report(self) -> dict[str, Any]:
        """What the attention sites did.

        Returns:
            "sparse": number of sites, by their last call (before the first: as set up); "dense": {reason: sites};
            "calls": the same two, counted by call; "backend": those of the last sparse calls; "density": share of
            the query-key pairs that is computed, mean over the sites of what each did in its last sparse call.
            Both are None before a sparse call. "method": its settings as data; "family": of the model. "error":
            {"measured": relative error of the attention outputs against dense ones, root mean square over the tokens
            that `audit` looked at; "predicted": what the method expected}, each None where it is not known. "recorded",
            after `record`: {source: tokens, grid and bytes of what the sites keep}. Methods may add entries of their
            own.
        """
        attached = self._attachments
        densities = [density for attachment in attached for density in attachment.tally.densities()]
        return {
            **merged(attachment.tally.report() for attachment in attached),
            "backend": _listed(backend for attachment in attached for backend in attachment.backends),
            "density": sum(densities) / len(densities) if densities else None,
            "method": attached[0].method.to_dict(),
            "family": _listed(attachment.family.name for attachment in attached),
            "error": _error_of(attached),
            **_recorded_by(attached),
            **{name: value for one in attached if one.loaded for name, value in one.loaded.report().items()},
        }

    def restart(self, steps: int | None = None) -> None:
        """The next denoiser call of this thread starts a new run; pipelines of several stages call it before each.

        Args:
            steps: of the new run; needed only where no pipeline tells it.
        """
        for attachment in self._attachments:
            attachment.clock.restart(steps)

    def record(self, *, keep_on: torch.device | str | None = None, **call: Any) -> None:
        """Run the denoiser once so that its sites keep keys and values, which later calls see beside their own.

        For methods with `records = True`, such as ScaleDiT, whose low-resolution picture is recorded before the
        high-resolution steps. What was recorded before is forgotten.

        Args:
            call: arguments of the denoiser's forward; `recorded` of the method says which.
            keep_on: device to keep them on, such as "cpu", from where they are copied at every use; None keeps them
                where they are computed.

        Raises:
            ConfigError: the method records nothing, is not on the model any more, or needs other arguments.
            LayoutMismatchError: the call does not say what its tokens are.
        """
        for attachment in self._attachments:
            attachment.record(call, keep_on)

    def use(self, subjects: Any) -> None:
        """Who is in the pictures to come: a `gensparse.Subjects`, for methods for several subjects.

        May be called between runs and between steps.

        Raises:
            ConfigError: the method has no use for subjects, or not for these.
        """
        for attachment in self._attachments:
            attachment.taking_subjects().use(subjects)

    @contextmanager
    def rehearsal(self) -> "Iterator[None]":
        """Around a first run that a method learns from (consistory notes what shows the same in its pictures).

        Raises:
            ConfigError: the method has no rehearsal.
        """
        with ExitStack() as stack:
            for attachment in self._attachments:
                stack.enter_context(attachment.taking_subjects().rehearsal())
            yield

    @contextmanager
    def writing(self, *names: str, keep_on: torch.device | str | None = None) -> "Iterator[None]":
        """Inside, the reference pictures of every call are kept in a bank, by step and layer, for later runs.

        Afterwards references come from the bank, and batches hold generated pictures alone, until `forget`.

        Args:
            names: of the references in the order of the batch; by default those of `use`, else numbers.
            keep_on: device to keep them on, such as "cpu", from where they are copied at every use.

        Raises:
            ConfigError: the method has no references.
        """
        with ExitStack() as stack:
            for attachment in self._attachments:
                stack.enter_context(attachment.taking_subjects().writing(names, keep_on))
            yield

    def forget(self) -> None:
        """Drop what was recorded, and what a bank holds of references."""
        for attachment in self._attachments:
            attachment.forget()

    def start(self, pipe: Any, latents: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """The latents that a run is to begin with, for methods that move latents between steps.

        Set the timesteps of the scheduler first, and pass the result to the pipeline as `latents`.

        Args:
            latents: noise [B, C, h, w] as the pipeline takes it.
            arguments: further ones of the denoiser's conditional call, such as `encoder_hidden_states`.
        """
        for attachment in self._attachments:
            if attachment.active and attachment.loaded is not None:
                latents = attachment.loaded.start(pipe, latents, dict(arguments))
        return latents

    def maps(self) -> torch.Tensor:
        """Attention maps [layers, B, heads, tokens, L] of the last call, with their gradients, and forget them.

        Raises:
            ConfigError: the method keeps none, or was removed.
        """
        loaded = self._attachments[0].loaded
        if loaded is None or not self._attachments[0].active:
            raise ConfigError("No method that keeps attention maps is on the model; apply disendiff for that.")
        return loaded.maps()

    def on_step_end(self, pipe: Any, index: int, timestep: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """For `callback_on_step_end` of a pipeline, with methods that change its latents between steps.

        Args:
            arguments: the pipeline's tensors by name, "latents" among them.

        Returns:
            Those that are to go on.
        """
        changed = dict(arguments)
        for attachment in self._attachments:
            if attachment.active and attachment.loaded is not None:
                changed |= attachment.loaded.step_end(pipe, index, timestep, changed)
        return changed

    def remove(self) -> None:
        """Undo everything, bit for bit; does nothing where it is undone or replaced already.

        Raises:
            ConfigError: weights of the method cannot be taken off where the model's are now; the method stays then.
        """
        for attachment in self._attachments:
            attachment.remove()
            attachment.forget()


class Attachment:
    """Everything changed on one model: an attribute per attention module, processor classes, one forward pre-hook.

    It lives on the model, so a copy of the model carries its own, and no saved checkpoint shows it.
    """

    def __init__(
        self, model: nn.Module, settings: Settings, owner: Any, clock: Clock | None = None, denoisers: int = 1
    ) -> None:
        self.model, self.settings = model, settings
        native = _native_tokens(self.family, model, _scheduler_config(owner))
        self.subject = Subject(self.family.name, model, native, denoisers)
        self.method = settings.method.resolved(self.subject)
        self.modules = _attention(model)
        self.places = _places(self.family, model, self.modules, self.method.part(self.family.name))
        if not self.places:
            raise ConfigError(f"{type(model).__name__} has no attention layer to make sparse; pass a whole denoiser.")
        pinned = settings.pinned(len(self.places))
        self.slots: dict[SlotKey, ActionSlot] = {}
        self.sites = {name: self._site(name, pinned) for name in self.modules}
        self.clock, self.memo, self.run = clock or Clock(), TensorMemo(), _Run(owner)
        self.tally = Tally(self.counted)
        self.loaded: Loaded | None = None
        self.bank, self._recorder = Bank(), 0  # the thread that records
        self._works: dict[Any, Work] = {}
        self._agreed: frozenset[str] = frozenset()
        self._hooks: list[Any] = []
        self._warned = False

    def _site(self, name: str, pinned: Mapping[int, str]) -> Site:
        place = self.places.get(name)
        if place is None:
            return Site(name, None)
        key = SlotKey(place.role, self.method.kind(place), place.heads)
        kind = CrossSite if place.role.startswith(CROSS) else Site
        return kind(name, self.slots.setdefault(key, ActionSlot()), place.layer, pinned.get(place.layer))

    @property
    def family(self) -> Family:
        """The family of the model; looked up, because a copy of the model finds its own."""
        return family_of(self.model)

    @property
    def counted(self) -> list[Site]:
        return [site for site in self.sites.values() if site.slot is not None]

    @property
    def active(self) -> bool:
        """Whether this is the attachment on its model."""
        return _attachment(self.model) is self

    @property
    def backends(self) -> set[str]:
        """Names of the backends of the sites' last sparse calls."""
        return {site.backend for site in self.counted if site.backend is not None}

    def predicted_errors(self) -> list[float]:
        """What the method predicts for every layout of the last call."""
        actions = [slot.get() for slot in self.slots.values()]
        layouts = {work.layout for action in actions if action is not None for work in action.works}
        found = (self.method.predicted_error(layout) for layout in layouts)
        return [value for value in found if value is not None]

    def check(self) -> None:
        """UnsupportedProcessorError, with the name of the module, when a processor cannot be made sparse."""
        for name in self.places:
            self._checked(name)

    def _checked(self, name: str) -> Any:
        """The processor of a site, if it can be made sparse."""
        processor = self.modules[name].processor
        try:
            sparse_variant(type(processor))
        except UnsupportedProcessorError as error:
            raise UnsupportedProcessorError(f"{type(self.model).__name__} {name}: {error}") from None
        return processor

    def install(self, *, swap: bool = True) -> None:
        """Put everything in place instead of what was there; with `swap` the processors become sparse at once."""
        _detach(self.model)
        self.loaded = self.method.load(self.subject._replace(owner=self.run.owner), self.places)
        if self.loaded is not None:
            self.loaded.pipeline = self.run.pipeline
        for name, module in self.modules.items():
            site = self.sites[name]
            setattr(module, SITE, site)
            if site.slot is None:
                continue
            site.held = swap
            site.sources = self.loaded.sources(self.places[name]) if self.loaded else None
            site.notes = self.loaded.notes(self.places[name]) if self.loaded else None
            if swap:
                make_sparse(module.processor)
        self.tally = Tally(self.counted)
        self._hooks = [self.model.register_forward_pre_hook(self.begin, with_kwargs=True)]
        for module in self.run.models(self.loaded.beside if self.loaded else ()):
            self._hooks.append(module.register_forward_pre_hook(_Beside(self), with_kwargs=True))
        setattr(self.model, _ATTACHMENT, self)

    def remove(self) -> None:
        """Take everything off the model, if this attachment is the one on it."""
        if not self.active:
            return
        self.tally.collect()
        if self.loaded is not None:
            self.loaded.undo()  # first, since it may refuse
        for hook in self._hooks:
            hook.remove()
        for module in self.modules.values():
            make_dense(module.processor)
            delattr(module, SITE)
        for processor in _compat.set_aside(self.model):
            make_dense(processor)
        delattr(self.model, _ATTACHMENT)

    def record(self, call: Mapping[str, Any], keep_on: torch.device | str | None) -> None:
        """See `Handle.record`."""
        if not self.method.records:
            raise ConfigError(f"{self.method.name} records nothing; it needs no call but those of the denoising steps.")
        if not self.active:
            raise ConfigError(f"{self.method.name} is not on the model any more; apply it again before recording.")
        self.forget()
        arguments, self.bank = self.method.recorded(dict(call)), Bank(keep_on)
        self._recorder = threading.get_ident()
        adapters = self.loaded.recording() if self.loaded is not None else nullcontext()
        try:
            # once is not worth compiling, and what is kept would have to leave the graph
            with torch.no_grad(), torch.compiler.set_stance("force_eager"), adapters:
                self.model(**arguments)
        except BaseException:
            self.forget()
            raise
        finally:
            self._recorder = 0
        for site in self.counted:
            site.recorded = self.bank.sources(site.name) or None

    def forget(self) -> None:
        """Drop what was recorded."""
        self.bank = Bank()
        for site in self.counted:
            site.recorded = None
        if self.loaded is not None:
            self.loaded.forget()

    def taking_subjects(self) -> Loaded:
        """What the method put on the model, if it takes subjects.

        Raises:
            ConfigError: it does not, or is not on the model any more.
        """
        if not self.active:
            raise ConfigError(f"{self.method.name} is not on the model any more; apply it again.")
        if self.loaded is None or not self.method.casts:
            raise ConfigError(
                f"{self.method.name} has no use for subjects and reference pictures; take a method such as freecustom."
            )
        return self.loaded

    def _recording(self, key: "SlotKey", layouts: Layouts | str, bound: Mapping[str, Any], team: Any) -> Action:
        """What sites do, and keep, in a call that is recorded."""
        layout = layouts if isinstance(layouts, str) else layouts[key.role]
        if team is not None or not isinstance(layout, Layout):
            why = layout if isinstance(layout, str) else "its tokens are divided, or differ from sample to sample"
            raise LayoutMismatchError(f"{type(self.model).__name__} cannot record: {why}")
        what = self.method.recording(layout, At(key.kind, key.role))
        if what is None:
            return Action(reason=f"{self.method.name} records nothing here")
        work = self._work(what.pattern, layout, None, _device(self.model, bound), False, None)
        target = layout.segments[layout.target]
        segment = Segment("reference", target.length, target.shape, what.name)
        record = Record(self.bank, key.role, segment, layout.starts[layout.target])
        return Action((work,), strict=True, record=record)

    def sparse_copy(self, name: str, module: nn.Module) -> Any:
        """The processor of a module, for a site a sparse copy that shares its weights."""
        if name not in self.places:
            return module.processor
        processor = copy(module.processor)
        make_sparse(processor)
        return processor

    def forecast(self, layouts: Layouts, now: At) -> dict[str, tuple[str, float | None]]:
        """What every site would do in a call with these layouts, by name: ("sparse" or why not, density).

        Nothing is put on the model, which may be without weights.
        """
        here = {"": torch.empty(0)}
        actions = {key: self._action(key, now, layouts, here) for key in self.slots}
        found = {}
        for name, place in self.places.items():
            action = actions[SlotKey(place.role, self.method.kind(place), place.heads)]
            outcome = self.sites[name].pinned or (SPARSE if action.works or action.stages else action.reason)
            known = [work.density for work in action.works if work.density is not None]
            found[name] = (outcome, sum(known) / len(known) if known and outcome == SPARSE else None)
        return found

    @torch.compiler.disable
    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the model: decide what its sites do in this call.

        Returns:
            None, or other (args, kwargs): for a model whose product mask the sites take over, or whose arguments the
            method changes.
        """
        self.tally.collect()
        self._heal()
        call = _signature(type(model)).bind(model, *args, **kwargs)
        bound = call.arguments
        team = _compat.team_of(model)
        recording = self._recorder == threading.get_ident()
        now = At() if recording else self._now(bound)
        changed = self.loaded is not None and not recording and self.loaded.begin(now, bound)
        layouts = self._layouts(bound, team)  # behind begin(), which may change the text
        pairs = None if team else self._product_mask(bound, layouts)
        for key, slot in self.slots.items():
            extra = None if isinstance(layouts, str) else _extra(layouts[key.role.removeprefix(CROSS)])
            added = pairs is not None and pairs.added
            if recording:
                action = self._recording(key, layouts, bound, team)
            else:
                action = self._action(key, now, layouts, bound, added=added, team=team)
            slot.put(replace(action, pairs=pairs, extra=extra))
        if pairs is not None:
            bound[self.family.product_mask] = None
        return (call.args[1:], call.kwargs) if changed or pairs is not None else None

    @torch.compiler.disable
    def begin_beside(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the models beside this one."""
        call = _signature(type(model)).bind(model, *args, **kwargs)
        changed = self.loaded is not None and self.loaded.begin_beside(self._now(call.arguments), call.arguments)
        return (call.args[1:], call.kwargs) if changed else None

    def _heal(self) -> None:
        """Make sites sparse again whose processor was exchanged (image-prompt adapters, resets)."""
        for name in self.places:
            module, site = self.modules[name], self.sites[name]
            if is_sparse(module.processor):
                site.held = True
            elif site.held:
                make_sparse(self._checked(name))
                self._warn_once(site.name)
            else:
                site.outcome = NOT_SET

    def _warn_once(self, name: str) -> None:
        if not self._warned:
            _LOG.warning("The processor of %s was exchanged after apply(); such sites are made sparse again.", name)
        self._warned = True

    def _now(self, bound: Mapping[str, Any]) -> At:
        """The step, and how many there are; looked up where it matters only, since the device has to answer."""
        guided = self.run.guided
        if not self.settings.timed:
            return At(guided=guided)
        step = self.clock.tick(self.family.timestep(bound), self.run.moment(), self.run.plan())
        steps = self.clock.steps or self.run.steps(self.clock.first)
        return At(step=step, steps=steps, guided=guided, call=self.clock.call)

    def _layouts(self, bound: Mapping[str, Any], team: Team | None) -> Layouts | str:
        """Layouts by role, or why there are none."""
        try:
            layouts = self.family.read_layouts(self.model, bound, self.memo)
        except LayoutMismatchError as error:
            return str(error)
        return layouts if team is None else self._divided(layouts, bound, team)

    def _divided(self, layouts: Layouts, bound: Mapping[str, Any], team: Team) -> Layouts | str:
        """Layouts of tokens that a team divides, once all of it agree on them."""
        if not all(isinstance(layout, Layout) for layout in layouts.values()):
            return "samples of different lengths and cached references are not divided among processes"
        what = f"{self.settings} on {layouts}"
        if what not in self._agreed:
            team.agree(what, _samples(bound))
            self._agreed = self._agreed | {what}
        return {role: ulysses.divided(layout, team.size) for role, layout in layouts.items()}

    def _product_mask(self, bound: Mapping[str, Any], layouts: Layouts | str) -> ProductMask | None:
        """The product mask of a call, where sites can take it over: its zeros are bools, or numbers of text tokens."""
        given = bound.get(self.family.product_mask)
        whole = all(is_sparse(self.modules[name].processor) for name in self.places)
        if given is None or isinstance(layouts, str) or not whole:  # a processor that was not set needs the mask
            return None
        zeros = self.memo.get(given, last_zero)
        if zeros == NO_MASK or (given.is_floating_point() and zeros > min(map(_leading_text, layouts.values()))):
            return None
        return ProductMask(given, trivial=zeros == 0)

    def _action(
        self,
        key: "SlotKey",
        now: At,
        layouts: Layouts | str,
        bound: Mapping[str, Any],
        *,
        added: bool = False,
        team: Team | None = None,
    ) -> Action:
        """What sites do; `added` says that a product mask is added to their logits."""
        if self.settings.dense_at(now):
            return Action(reason="dense step")
        coarseness, recorded = self.family.coarseness(key.role), self.bank.segments(key.role)
        at = now._replace(kind=key.kind, role=key.role, coarseness=coarseness, recorded=recorded)
        active = self.method.active(at)
        if isinstance(active, Dense):
            return Action(reason=active.reason)
        method, at = active
        if isinstance(layouts, str):
            return self._dense(layouts)
        if key.role.startswith(CROSS):
            return self._staged(method, layouts[key.role.removeprefix(CROSS)], at)
        own, extra = layouts[key.role], _extra(layouts[key.role])
        own = own.layout if isinstance(own, WithKeys) else own
        own = own if isinstance(own, tuple) else (own,)
        if self.loaded is not None:
            own = tuple(self.loaded.layout(layout, at) for layout in own)
        reason = next(filter(None, (method.why_not(layout, key.role) for layout in own)), None)
        if reason is not None:
            return self._dense(reason)
        chosen = [method.pattern(layout, at) for layout in own]
        stop = next((item for item in chosen if isinstance(item, Dense)), None)
        if stop is not None:
            return Action(reason=stop.reason)
        if team is not None and not all(isinstance(what, Pattern | RoutedPattern) for what in chosen):
            return self._dense(f"{method.name} computes in its own way, which is not divided among processes")
        masks = [self.family.own_mask(self.model, layout) for layout in own]
        masked = any(mask is not None for mask in masks)
        if masked and not all(isinstance(what, Pattern) for what in chosen):
            return self._dense(f"{method.name} cannot keep to the mask that the model has of its own")
        chosen = [what if mask is None else what & mask for what, mask in zip(chosen, masks, strict=True)]
        if extra is not None:
            if not all(isinstance(what, Pattern) for what in chosen):
                return self._dense(f"{method.name} has no rule for cached references")
            chosen = [_with_cached(what, extra) for what in chosen]
        device = _device(self.model, bound)
        heads = [method.heads(at._replace(layout=layout), key.heads) for layout in own]
        works = [self._work(*item, device, added, team) for item in zip(chosen, own, heads, strict=True)]
        if masked and any(work.plan is not None and work.plan.sources for work in works):
            return self._dense("the model's own mask does not say who sees pooled keys")
        native = self.family.native_at(key.role, self.subject.native_tokens)
        gain, seed = method.logit_gain(own[0], native), getattr(method, "seed", 0)
        strict = self.settings.strict
        more = {"step": at.step, "seed": seed, "masked": masked, "audit": self.settings.audit or 0}
        if self.family.prompted in layouts and team is None:
            more["alone"] = self._alone(method, at, layouts[self.family.prompted], key.heads, device)
        shard = None if team else _compat.heads_of(self.model, key.heads)
        return Action(tuple(works), gain=gain, strict=strict, team=team, heads=shard, **more)

    def _staged(self, method: Method, layout: Any, at: At) -> Action:
        """What cross-attention sites do."""
        if self.loaded is None:  # a forecast
            return Action(stages=Stages())
        stages = self.loaded.stages(layout, at)
        if isinstance(stages, Dense):
            return Action(reason=stages.reason)
        return Action(stages=stages, strict=self.settings.strict, step=at.step)

    def _alone(self, method: Method, at: At, layout: Any, heads: int, device: torch.device) -> Work | None:
        """What the sites do over the picture alone; None where that is no pattern of its own keys."""
        what = method.pattern(layout, at)
        if not isinstance(what, Pattern):
            return None
        work = self._work(what, layout, method.heads(at._replace(layout=layout), heads), device, False, None)
        return None if work.plan is None or work.plan.sources else work

    def _dense(self, reason: str) -> Action:
        if self.settings.strict:
            raise LayoutMismatchError(
                f"{type(self.model).__name__} cannot run sparse: {reason.rstrip('.')}; pass strict=False to run such "
                "calls dense."
            )
        return Action(reason=reason)

    def _work(
        self,
        what: Pattern | RoutedPattern | Operator,
        layout: Layout,
        entries: tuple[int, ...] | None,
        device: torch.device,
        added: bool,
        team: Team | None,
    ) -> Work:
        """What the sites do on a layout; `entries` of the pattern's menu, one per head."""
        if entries is not None:
            shard = team.share(len(entries)) if team else _compat.heads_of(self.model, len(entries))
            entries = entries if shard is None else entries[shard]
        key = (what, layout, entries, device, added)
        work = self._works.get(key)
        if work is None:
            added = added and isinstance(what, Pattern)
            if isinstance(what, Pattern | RoutedPattern):
                groups = None if entries is None else torch.tensor([entries], dtype=torch.int32, device=device)
                plan = build_plan(what, layout, device=device)
                text = build_plan(what & _TEXT_ALONE, layout, device=device) if added else None
                # the plan's layout, since compiled blocks tell equal layouts apart
                parts = plan.layout.shares() if team else ()
                work = Work(plan.layout, plan=plan, groups=groups, unbiased=text, parts=parts)
            else:
                work = Work(layout, operator=what)
            recent = list(self._works.items())[1 - _RECENT :]
            self._works = {**dict(recent), key: work}
        return work

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recorder": 0, "_works": {}, "_agreed": frozenset()}


def _samples(bound: Mapping[str, Any]) -> list[float]:
    """A few numbers of the first floating-point input, by which processes see whether they have the same."""
    tensors = (value for value in bound.values() if isinstance(value, torch.Tensor) and value.is_floating_point())
    flat = next(tensors, torch.empty(0)).detach().flatten()
    return flat[:: max(1, len(flat) // 16)][:16].float().nan_to_num().tolist()


def _extra(layout: Layout | tuple[Layout, ...] | WithKeys) -> Extra | None:
    return Extra(layout.start, layout.keys) if isinstance(layout, WithKeys) else None


def _with_cached(what: Pattern, extra: Extra) -> Pattern:
    """A pattern under which target and text see cached references too."""
    cached = Reference(CACHED, length=extra.keys)
    return what | References((cached,), "target") | References((cached,), "text")


def _leading_text(layout: Layout | tuple[Layout, ...] | WithKeys) -> int:
    """Text tokens before all others, where the batch has one layout."""
    first = layout.segments[0] if isinstance(layout, Layout) else None
    return first.length if first is not None and first.kind == "text" else 0


class SlotKey(NamedTuple):
    """What makes sites act alike."""

    role: str
    kind: Hashable
    heads: int


class _Run:
    """How many steps the pipeline of a model takes; the pipeline is not kept alive, nor copied with the model."""

    def __init__(self, owner: Any) -> None:
        self._owner = weakref.ref(owner) if hasattr(owner, "scheduler") else None
        self._memo = TensorMemo()

    @property
    def owner(self) -> Any:
        """The pipeline; None for a bare model, or where it is gone."""
        return self._owner and self._owner()

    def pipeline(self) -> Any:
        """The same, as a function that may be kept."""
        return self.owner

    @property
    def guided(self) -> bool | None:
        """Whether the pipeline puts both halves of guidance into a call; None where nothing tells."""
        found = getattr(self.owner, "do_classifier_free_guidance", None)
        return None if found is None else bool(found)

    def models(self, names: Iterable[str]) -> list[nn.Module]:
        """Models of the pipeline by name, each part of those that are several, such as of a list of ControlNets."""
        found = [getattr(self._owner and self._owner(), name, None) for name in names]
        parts = [part for one in found if isinstance(one, nn.Module) for part in getattr(one, "nets", [one])]
        return [_denoiser(part) for part in parts]

    def steps(self, first: float | None = None) -> int | None:
        """Distinct timesteps of the pipeline's scheduler from where the run begins; None for a bare model.

        Args:
            first: timestep of the first step, by which the beginning is found where the scheduler does not know it.
        """
        timesteps, scheduler = self._timesteps(), self._scheduler()
        if timesteps is None:
            return None
        begin = getattr(scheduler, "begin_index", None) or 0  # later than 0 where a picture is changed
        if not hasattr(scheduler, "begin_index") and first in timesteps:
            begin = timesteps.index(first)
        return len(set(timesteps[begin:]))

    def plan(self) -> Any:
        """The tensor of the scheduler's timesteps, another one for every run; None for a bare model."""
        return getattr(self._scheduler(), "timesteps", None)

    def moment(self) -> float | None:
        """The scheduler's own timestep of the step it is at; None for a bare model."""
        timesteps, scheduler = self._timesteps(), self._scheduler()
        index = getattr(scheduler, "step_index", None)
        index = getattr(scheduler, "begin_index", None) if index is None else index
        return timesteps[index or 0] if timesteps and (index or 0) < len(timesteps) else None

    def _timesteps(self) -> list[float] | None:
        timesteps = getattr(self._scheduler(), "timesteps", None)
        return self._memo.get(timesteps, torch.Tensor.tolist) if isinstance(timesteps, torch.Tensor) else None

    def _scheduler(self) -> Any:
        return getattr(self._owner and self._owner(), "scheduler", None)

    def __reduce__(self) -> "tuple[type[_Run], tuple[None]]":
        return _Run, (None,)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Run":
        copied = _Run(None)
        copied._owner = _copied(self._owner, memo)
        return copied


class _Beside:
    """Pre-hook of a model beside the denoiser, such as a ControlNet. A copy of that model alone is free of it."""

    def __init__(self, attachment: Attachment | None) -> None:
        self._attachment = None if attachment is None else weakref.ref(attachment)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        attachment = self._attachment and self._attachment()
        return None if attachment is None else attachment.begin_beside(model, args, kwargs)

    def __reduce__(self) -> "tuple[type[_Beside], tuple[None]]":
        return _Beside, (None,)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Beside":
        copied = _Beside(None)
        copied._attachment = _copied(self._attachment, memo)
        return copied


def _copied(reference: "weakref.ref[Any] | None", memo: dict[int, Any]) -> "weakref.ref[Any] | None":
    """A reference to the copy of what is copied together with it, else to nothing."""
    copied = None if reference is None else memo.get(id(reference()))
    return None if copied is None else weakref.ref(copied)


def _models(pipe_or_model: Any) -> list[nn.Module]:
    """The denoisers of a pipeline, or the model itself, compiled or not."""
    if isinstance(pipe_or_model, nn.Module):
        return [_denoiser(pipe_or_model)]
    found = [getattr(pipe_or_model, name, None) for name in _DENOISERS]
    models = [_denoiser(model) for model in found if isinstance(model, nn.Module)]
    if not models:
        raise ConfigError(
            f"{type(pipe_or_model).__name__} has no {', '.join(_DENOISERS)}; pass a diffusers pipeline or its denoiser."
        )
    return models


def _denoiser(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)


def _places(family: Family, model: nn.Module, modules: Mapping[str, nn.Module], part: str) -> dict[str, Place]:
    """The sites of a model that a method acts on, in its order; those of cross-attention last."""
    roles = {**(family.sites(model, modules) if part != "cross" else {})}
    roles |= family.cross(model, modules) if part != "self" else {}
    return {
        name: Place(role, layer, len(roles), _heads(modules[name]), name)
        for layer, (name, role) in enumerate(roles.items())
    }


def _heads(module: nn.Module) -> int:
    return int(getattr(module, "heads", getattr(module, "num_heads", 0)))


def _put_back(models: Iterable[nn.Module], before: "Iterable[Attachment | None]") -> None:
    """Take off what is on the models now and put on what was, or nothing."""
    for model, attachment in zip(models, before, strict=True):
        _detach(model)
        if attachment is not None:
            attachment.install()


def _attachment(model: nn.Module) -> Attachment | None:
    return model.__dict__.get(_ATTACHMENT)


def _detach(model: nn.Module) -> None:
    attachment = _attachment(model)
    if attachment is not None:
        attachment.remove()


def _attention(model: nn.Module) -> dict[str, nn.Module]:
    """Every module with an attention processor, by name; some models have no `attn_processors`."""
    return {name: module for name, module in model.named_modules() if getattr(module, "processor", None) is not None}


def _error_of(attached: "Sequence[Attachment]") -> dict[str, float | None]:
    """Relative error of the attention outputs: as measured by audits, and as the method predicted it."""
    sums = [site.audited for attachment in attached for site in attachment.counted if site.audited is not None]
    lost, norm = torch.stack([x.double().cpu() for x in sums]).sum(0).tolist() if sums else (0.0, 0.0)
    predicted = [value for attachment in attached for value in attachment.predicted_errors()]
    return {
        "measured": math.sqrt(lost / norm) if norm else None,
        "predicted": max(predicted) if predicted else None,
    }


def _recorded_by(attached: "Sequence[Attachment]") -> dict[str, Any]:
    found = {name: facts for attachment in attached for name, facts in attachment.bank.facts().items()}
    return {"recorded": found} if found else {}


def _listed(names: Iterable[str]) -> str | None:
    """Different names in one text, None for no name."""
    return ", ".join(sorted(set(names))) or None


def _scheduler_config(pipe_or_model: Any) -> Mapping[str, Any] | None:
    return getattr(getattr(pipe_or_model, "scheduler", None), "config", None)


def _native_tokens(family: Family, model: nn.Module, scheduler_config: Mapping[str, Any] | None) -> int | None:
    try:
        return family.native_tokens(model, scheduler_config)
    except ConfigError:
        return None


@cache
def _signature(model_class: type) -> inspect.Signature:
    return inspect.signature(model_class.forward)


def _device(model: nn.Module, bound: Mapping[str, Any]) -> torch.device:
    """Where the model computes: of the offload hook when it moves the inputs, else where they are."""
    device = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    if device is None:
        return next(value.device for value in bound.values() if isinstance(value, torch.Tensor))
    return torch.device(device)
