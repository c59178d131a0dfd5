"""What a call of a model says of its tokens: their layouts, divided among processes or not, and their product mask."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gensparse.attach.settings import Settings
from gensparse.errors import LayoutMismatchError
from gensparse.families import Layouts, TensorMemo, WithKeys, family_of
from gensparse.layout import Layout
from gensparse.parallel import Team, ulysses
from gensparse.processors.pairs import NO_MASK, ProductMask, last_zero


class Reader:
    """Reads the calls of one model."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self._memo = TensorMemo()
        self._agreed: frozenset[str] = frozenset()

    def layouts(self, bound: Mapping[str, Any], team: Team | None) -> Layouts | str:
        """Layouts by role, or why there are none."""
        try:
            layouts = family_of(self.model).read_layouts(self.model, bound, self._memo)
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

    def product_mask(self, bound: Mapping[str, Any], layouts: Layouts | str) -> ProductMask | None:
        """The product mask of a call, where sites can take it over: its zeros are bools, or numbers of text tokens."""
        given = bound.get(family_of(self.model).product_mask)
        if given is None or isinstance(layouts, str):
            return None
        zeros = self._memo.get(given, last_zero)
        if zeros == NO_MASK or (given.is_floating_point() and zeros > min(map(_leading_text, layouts.values()))):
            return None
        return ProductMask(given, trivial=zeros == 0)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_agreed": frozenset()}


def _samples(bound: Mapping[str, Any]) -> list[float]:
    """A few numbers of the first floating-point input, by which processes see whether they have the same."""
    tensors = (value for value in bound.values() if isinstance(value, torch.Tensor) and value.is_floating_point())
    flat = next(tensors, torch.empty(0)).detach().flatten()
    return flat[:: max(1, len(flat) // 16)][:16].float().nan_to_num().tolist()


def _leading_text(layout: Layout | tuple[Layout, ...] | WithKeys) -> int:
    """Text tokens before all others, where the batch has one layout."""
    first = layout.segments[0] if isinstance(layout, Layout) else None
    return first.length if first is not None and first.kind == "text" else 0
