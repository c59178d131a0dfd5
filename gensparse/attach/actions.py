"""What the sites of a model do in one call of it: from layouts and step, by the method, to an `Action`."""

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from gensparse.attach.denoisers import device_of
from gensparse.attach.settings import Settings
from gensparse.errors import LayoutMismatchError
from gensparse.families import CROSS, Layouts, WithKeys, family_of
from gensparse.layout import KINDS, Layout, Segment
from gensparse.methods import At, Dense, Loaded, Method
from gensparse.parallel import Team
from gensparse.patterns import Pattern, Policy, Reference, References, RoutedPattern
from gensparse.plan import build_plan
from gensparse.processors import _compat
from gensparse.processors.bank import Bank, Record
from gensparse.processors.operators import Operator
from gensparse.processors.site import CACHED, Action, Extra, Work
from gensparse.processors.stages import Stages

_RECENT = 256  # works a model keeps at hand: kinds of sites (layers, at most) times layouts of a run
_TEXT_ALONE = Policy(tuple(("text", kind) for kind in KINDS if kind != "pooled"))


class SlotKey(NamedTuple):
    """What makes sites act alike."""

    role: str
    kind: Hashable
    heads: int


class Actions:
    """Chooses what the sites of one model do, by its method."""

    def __init__(self, model: nn.Module, method: Method, settings: Settings, native_tokens: int | None) -> None:
        self.model, self.method, self.settings, self.native_tokens = model, method, settings, native_tokens
        self._works: dict[Any, Work] = {}

    def choose(
        self,
        key: SlotKey,
        now: At,
        layouts: Layouts | str,
        bound: Mapping[str, Any],
        *,
        loaded: Loaded | None = None,
        recorded: tuple[Segment, ...] = (),
        added: bool = False,
        team: Team | None = None,
    ) -> Action:
        """What sites do in a call.

        Args:
            layouts: of the call by role, or why there are none.
            bound: arguments of the call by name.
            loaded: what the method put on the model; None for a forecast.
            recorded: the key sources that the sites have kept.
            added: whether a product mask is added to the sites' logits.
        """
        if self.settings.dense_at(now):
            return Action(reason="dense step")
        family = family_of(self.model)
        coarseness = family.coarseness(key.role)
        at = now._replace(kind=key.kind, role=key.role, coarseness=coarseness, recorded=recorded)
        active = self.method.active(at)
        if isinstance(active, Dense):
            return Action(reason=active.reason)
        method, at = active
        if isinstance(layouts, str):
            return self._dense(layouts)
        if key.role.startswith(CROSS):
            return self._staged(method, layouts[key.role.removeprefix(CROSS)], at, loaded)
        own, extra = layouts[key.role], extra_of(layouts[key.role])
        own = own.layout if isinstance(own, WithKeys) else own
        own = own if isinstance(own, tuple) else (own,)
        if loaded is not None:
            own = tuple(loaded.layout(layout, at) for layout in own)
        reason = next(filter(None, (method.why_not(layout, key.role) for layout in own)), None)
        if reason is not None:
            return self._dense(reason)
        chosen = [method.pattern(layout, at) for layout in own]
        stop = next((item for item in chosen if isinstance(item, Dense)), None)
        if stop is not None:
            return Action(reason=stop.reason)
        if team is not None and not all(isinstance(what, Pattern | RoutedPattern) for what in chosen):
            return self._dense(f"{method.name} computes in its own way, which is not divided among processes")
        masks = [family.own_mask(self.model, layout) for layout in own]
        masked = any(mask is not None for mask in masks)
        if masked and not all(isinstance(what, Pattern) for what in chosen):
            return self._dense(f"{method.name} cannot keep to the mask that the model has of its own")
        chosen = [what if mask is None else what & mask for what, mask in zip(chosen, masks, strict=True)]
        if extra is not None:
            if not all(isinstance(what, Pattern) for what in chosen):
                return self._dense(f"{method.name} has no rule for cached references")
            chosen = [_with_cached(what, extra) for what in chosen]
        device = device_of(self.model, bound)
        heads = [method.heads(at._replace(layout=layout), key.heads) for layout in own]
        works = [self._work(*item, device, added, team) for item in zip(chosen, own, heads, strict=True)]
        if masked and any(work.plan is not None and work.plan.sources for work in works):
            return self._dense("the model's own mask does not say who sees pooled keys")
        native = family.native_at(key.role, self.native_tokens)
        gain, seed = method.logit_gain(own[0], native), getattr(method, "seed", 0)
        strict = self.settings.strict
        more = {"step": at.step, "seed": seed, "masked": masked, "audit": self.settings.audit or 0}
        if family.prompted in layouts and team is None:
            more["alone"] = self._alone(method, at, layouts[family.prompted], key.heads, device)
        shard = None if team else _compat.heads_of(self.model, key.heads)
        return Action(tuple(works), gain=gain, strict=strict, team=team, heads=shard, **more)

    def recording(
        self, key: SlotKey, layouts: Layouts | str, bound: Mapping[str, Any], team: Team | None, bank: Bank
    ) -> Action:
        """What sites do, and keep in `bank`, in a call that is recorded."""
        layout = layouts if isinstance(layouts, str) else layouts[key.role]
        if team is not None or not isinstance(layout, Layout):
            why = layout if isinstance(layout, str) else "its tokens are divided, or differ from sample to sample"
            raise LayoutMismatchError(f"{type(self.model).__name__} cannot record: {why}")
        what = self.method.recording(layout, At(key.kind, key.role))
        if what is None:
            return Action(reason=f"{self.method.name} records nothing here")
        work = self._work(what.pattern, layout, None, device_of(self.model, bound), False, None)
        target = layout.segments[layout.target]
        segment = Segment("reference", target.length, target.shape, what.name)
        record = Record(bank, key.role, segment, layout.starts[layout.target])
        return Action((work,), strict=True, record=record)

    def _staged(self, method: Method, layout: Any, at: At, loaded: Loaded | None) -> Action:
        """What cross-attention sites do."""
        if loaded is None:  # a forecast
            return Action(stages=Stages())
        stages = loaded.stages(layout, at)
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
        return {**self.__dict__, "_works": {}}


def extra_of(layout: Layout | tuple[Layout, ...] | WithKeys) -> Extra | None:
    """The keys without queries in a call with this layout."""
    return Extra(layout.start, layout.keys) if isinstance(layout, WithKeys) else None


def _with_cached(what: Pattern, extra: Extra) -> Pattern:
    """A pattern under which target and text see cached references too."""
    cached = Reference(CACHED, length=extra.keys)
    return what | References((cached,), "target") | References((cached,), "text")
