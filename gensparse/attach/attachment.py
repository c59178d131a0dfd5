"""Everything changed on one model: put on and taken off, and what its forward pre-hook does at every call."""

import logging
import threading
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from gensparse.attach.actions import Actions, SlotKey, extra_of
from gensparse.attach.denoisers import native_tokens, places_of
from gensparse.attach.reading import Reader
from gensparse.attach.run import Run
from gensparse.attach.settings import Settings
from gensparse.attach.weak import Weak
from gensparse.errors import ConfigError, UnsupportedProcessorError
from gensparse.families import CROSS, Family, Layouts, attention_modules, bound_call, family_of
from gensparse.methods import At, Loaded, Subject
from gensparse.processors import _compat
from gensparse.processors.bank import Bank
from gensparse.processors.clock import Clock
from gensparse.processors.pairs import ProductMask
from gensparse.processors.site import SPARSE, ActionSlot, Site
from gensparse.processors.stages import CrossSite
from gensparse.processors.tally import NOT_SET, Tally
from gensparse.processors.variant import SITE, is_sparse, make_dense, make_sparse, sparse_variant

_LOG = logging.getLogger(__name__)

_ATTACHMENT = "_gensparse"


class Attachment:
    """Everything changed on one model: an attribute per attention module, processor classes, one forward pre-hook.

    It lives on the model, so a copy of the model carries its own, and no saved checkpoint shows it.
    """

    def __init__(
        self, model: nn.Module, settings: Settings, owner: Any, clock: Clock | None = None, denoisers: int = 1
    ) -> None:
        self.model, self.settings = model, settings
        native = native_tokens(self.family, model, owner)
        self.subject = Subject(self.family.name, model, native, denoisers)
        self.method = settings.method.resolved(self.subject)
        self.modules = attention_modules(model)
        self.places = places_of(self.family, model, self.modules, self.method.part(self.family.name))
        if not self.places:
            raise ConfigError(f"{type(model).__name__} has no attention layer to make sparse; pass a whole denoiser.")
        pinned = settings.pinned(len(self.places))
        self.slots: dict[SlotKey, ActionSlot] = {}
        self.sites = {name: self._site(name, pinned) for name in self.modules}
        self.actions = Actions(model, self.method, settings, native)
        self.reader = Reader(model, settings)
        self.clock, self.run = clock or Clock(), Run(owner)
        self.tally = Tally(self.counted)
        self.loaded: Loaded | None = None
        self.bank, self._recorder = Bank(), 0  # the thread that records
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
        return attachment_of(self.model) is self

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
        detach(self.model)
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

    def sparse_copy(self, name: str, module: nn.Module) -> Any:
        """The processor of a module, for a site a sparse copy that shares its weights."""
        if name not in self.places:
            return module.processor
        processor = copy(module.processor)
        make_sparse(processor)
        return processor

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

    def forecast(self, layouts: Layouts, now: At) -> dict[str, tuple[str, float | None]]:
        """What every site would do in a call with these layouts, by name: ("sparse" or why not, density).

        Nothing is put on the model, which may be without weights.
        """
        here = {"": torch.empty(0)}
        actions = {key: self.actions.choose(key, now, layouts, here) for key in self.slots}
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
        call = bound_call(model, args, kwargs)
        bound = call.arguments
        team = _compat.team_of(model)
        recording = self._recorder == threading.get_ident()
        now = At() if recording else self._now(bound)
        changed = self.loaded is not None and not recording and self.loaded.begin(now, bound)
        layouts = self.reader.layouts(bound, team)  # behind begin(), which may change the text
        pairs = None if team else self._product_mask(bound, layouts)
        for key, slot in self.slots.items():
            extra = None if isinstance(layouts, str) else extra_of(layouts[key.role.removeprefix(CROSS)])
            added = pairs is not None and pairs.added
            if recording:
                action = self.actions.recording(key, layouts, bound, team, self.bank)
            else:
                kept = self.bank.segments(key.role)
                action = self.actions.choose(
                    key, now, layouts, bound, loaded=self.loaded, recorded=kept, added=added, team=team
                )
            slot.put(replace(action, pairs=pairs, extra=extra))
        if pairs is not None:
            bound[self.family.product_mask] = None
        return (call.args[1:], call.kwargs) if changed or pairs is not None else None

    @torch.compiler.disable
    def begin_beside(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the models beside this one."""
        call = bound_call(model, args, kwargs)
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

    def _product_mask(self, bound: Mapping[str, Any], layouts: Layouts | str) -> ProductMask | None:
        """The product mask of a call, to be taken out of it; None while a processor that was not set needs it."""
        whole = all(is_sparse(self.modules[name].processor) for name in self.places)
        return self.reader.product_mask(bound, layouts) if whole else None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recorder": 0}


class _Beside:
    """Pre-hook of a model beside the denoiser, such as a ControlNet. A copy of that model alone is free of it."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = Weak(attachment)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        attachment = self._attachment()
        return None if attachment is None else attachment.begin_beside(model, args, kwargs)


def attachment_of(model: nn.Module) -> Attachment | None:
    """What is on a model."""
    return model.__dict__.get(_ATTACHMENT)


def detach(model: nn.Module) -> None:
    """Take off what is on a model, if anything."""
    attachment = attachment_of(model)
    if attachment is not None:
        attachment.remove()


def put_back(models: Iterable[nn.Module], before: Iterable[Attachment | None]) -> None:
    """Take off what is on the models now and put on what was, or nothing."""
    for model, attachment in zip(models, before, strict=True):
        detach(model)
        if attachment is not None:
            attachment.install()
