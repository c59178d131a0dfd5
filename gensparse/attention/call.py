"""One checked attention call, as backends get it."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from gensparse.plan import Plan

Sources = Mapping[str, Tensor | tuple[Tensor, Tensor]]


Result = tuple[Tensor, Tensor | None]


class Call(NamedTuple):
    """The checked arguments of one call; k, v and key_bias cover the sources too."""

    q: Tensor
    k: Tensor
    v: Tensor
    plan: Plan
    groups: Tensor | None
    key_bias: Tensor | None
    scale: float | None
    return_lse: bool
