"""Helpers of the attention tests: random tensors, the fp64 oracle, and fresh memory filled with NaN."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from gensparse.attention import explain, sparse_attention
from gensparse.kernels import reference
from gensparse.layout import Layout
from gensparse.patterns import Pattern
from gensparse.plan import Plan

BACKENDS = ("partition", "halo", "plan_loop")


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Tensors made by torch.empty hold NaN, so that results nobody wrote show."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def random_qkv(
    layout: Layout, *, batch: int = 1, heads: int = 2, dim: int = 8, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    """q, k, v [B, S, H, D]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, layout.tokens, heads, dim)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def menu(plan: Plan, batch: int, heads: int) -> Tensor | None:
    """Every entry of the menu on some head, differently for each sample."""
    if plan.groups == 1:
        return None
    return (torch.arange(heads) + torch.arange(batch)[:, None]) % plan.groups


def oracle(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, layout: Layout, **settings) -> tuple[Tensor, Tensor]:
    """Dense attention in fp64 under the pattern's dense mask."""
    allowed = torch.from_numpy(pattern.dense_mask(layout))
    return reference.attend(q.double(), k.double(), v.double(), allowed, **settings)


def usable(plan: Plan, q: Tensor) -> list[str]:
    """Backends that take the plan on CPU."""
    return [name for name in BACKENDS if explain(plan, q)[name] is None]


def run(name: str, *tensors: Tensor, plan: Plan, **settings) -> tuple[Tensor, Tensor]:
    """out and lse of one backend; the output without lse must be the same up to rounding."""
    with poisoned_memory():
        out, lse = sparse_attention(*tensors, plan, backend=name, return_lse=True, **settings)
        alone = sparse_attention(*tensors, plan, backend=name, **settings)
    assert out.dtype == alone.dtype == tensors[0].dtype
    assert alone.shape == out.shape == tensors[0].shape
    torch.testing.assert_close(alone, out, rtol=2e-2, atol=2e-2 if out.dtype == torch.bfloat16 else 5e-6)
    return out, lse
