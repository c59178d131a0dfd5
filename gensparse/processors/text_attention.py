"""Attention to text in other hands for a while: every cross-attention call goes to one function, told its grid.

For what belongs to a pipeline's stage rather than to a method. Methods change cross-attention by `processors.stages`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gensparse.errors import ConfigError, LayoutMismatchError
from gensparse.families import Family, TensorMemo, attention_modules, bound_call, family_of
from gensparse.layout import Layout
from gensparse.processors.site import Site, SiteCall
from gensparse.processors.variant import SITE, is_sparse, make_dense, make_sparse


class TextCall(NamedTuple):
    """One call of a cross-attention layer.

    Args:
        name: of the module in its model.
        grid: rows and columns of the queries.
        q: [B, rows * columns, H, D]; k, v: [B, T, H, D] of all text in the call.
        mask: as scaled_dot_product_attention takes it, or None; scale: None is 1/sqrt(D).
    """

    name: str
    grid: tuple[int, int]
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float | None


Attend = Callable[[TextCall], Tensor | None]
"""The output [B, rows * columns, H, D] of a call, or None for the model's own."""


@contextmanager
def text_attention(model: nn.Module, attend: Attend) -> Iterator[None]:
    """Inside the block, `attend` computes the cross-attention that stands beside the self-attention of a denoiser.

    For UNets and PixArt. Projections, norms and image prompts stay diffusers'. Sparse self-attention may be on the
    model before; it is untouched. Afterwards everything is as before, whatever happened.

    Raises:
        ConfigError: a model without such layers.
        UnsupportedProcessorError: a processor that never calls torch's attention.
    """
    model = getattr(model, "_orig_mod", model)
    family = family_of(model)
    modules = attention_modules(model)
    roles = text_sites(family, model, modules)
    if not roles:
        raise ConfigError(f"{type(model).__name__} has no cross-attention beside its self-attention, as UNets have.")
    grids: dict[str, tuple[int, int]] = {}
    before = {name: vars(module).get(SITE) for name, module in modules.items()}
    dense = [module.processor for module in modules.values() if not is_sparse(module.processor)]
    hook = model.register_forward_pre_hook(_Grids(family, grids), with_kwargs=True)
    try:
        for name, role in roles.items():
            make_sparse(modules[name].processor)
            setattr(modules[name], SITE, _TextSite(name, role, grids, attend))
        for name, module in modules.items():  # a fused processor is shared, so that others may have become sparse too
            if is_sparse(module.processor) and name not in roles and before[name] is None:
                setattr(module, SITE, Site(name, None))
        yield
    finally:
        hook.remove()
        for processor in dense:
            make_dense(processor)
        for name, module in modules.items():
            if before[name] is not None:
                setattr(module, SITE, before[name])
            elif SITE in vars(module):
                delattr(module, SITE)


def text_sites(family: Family, model: nn.Module, names: Mapping[str, Any]) -> dict[str, str]:
    """The cross-attention beside every self-attention site, by name -> role of that site."""
    found = {}
    for name, role in family.sites(model, names).items():
        block, _, own = name.rpartition(".")
        if own == "attn1" and f"{block}.attn2" in names:
            found[f"{block}.attn2"] = role
    return found


class _Grids:
    """Pre-hook of the denoiser: the grid of every role in the coming call."""

    def __init__(self, family: Family, grids: dict[str, tuple[int, int]]) -> None:
        self._family, self._grids, self._memo = family, grids, TensorMemo()

    @torch.compiler.disable
    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = bound_call(model, args, kwargs).arguments
        self._grids.clear()
        for role, layout in self._family.read_layouts(model, bound, self._memo).items():
            if not isinstance(layout, Layout) or layout.grid[0] != 1:
                raise LayoutMismatchError(f"{type(model).__name__} was not called for one picture size per batch.")
            self._grids[role] = layout.grid[1:]


class _TextSite(Site):
    """A site whose attention is answered by a function."""

    def __init__(self, name: str, role: str, grids: Mapping[str, tuple[int, int]], attend: Attend) -> None:
        super().__init__(name, None)
        self._role, self._grids, self._answer = role, grids, attend

    @torch.compiler.disable
    def attend(self, call: SiteCall) -> Tensor:
        grid = self._grids.get(self._role)
        if call.refused is not None or call.divided or grid is None or call.q.shape[1] != grid[0] * grid[1]:
            return call.dense()
        out = self._answer(TextCall(self.name, grid, call.q, call.k, call.v, call.mask, call.scale))
        return call.dense() if out is None else out
