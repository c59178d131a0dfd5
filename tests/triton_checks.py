"""Helpers of the tests that run the Triton kernels in the interpreter."""

import torch
from attention_checks import menu, oracle, poisoned_memory, random_qkv
from torch import Tensor

from gensparse.attention.sources import with_sources
from gensparse.kernels import ops
from gensparse.kernels.lists import Schedule
from gensparse.layout import Layout
from gensparse.patterns import Pattern
from gensparse.plan import Plan, build_plan
from gensparse.plan.schedule import cut_pieces

# error of out against fp64: rounding of inputs is shared, so products and the result remain
ATOL = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def schedule_of(plan: Plan, most: int | None = None) -> Schedule:
    """The schedule of a plan with pieces of at most `most` entries."""
    return Schedule(
        cut_pieces(plan.lists.row_ptr, plan.lists.mask_id, most=most),
        plan.turned,
        cut_pieces(plan.turned.col_ptr, plan.turned.mask_id, most=most),
    )


def run_triton(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, most: int | None = None, **settings
) -> tuple[Tensor, Tensor]:
    """out and lse of the kernels, in memory that holds NaN beforehand."""
    with poisoned_memory():
        return ops.attend(q, k, v, plan.lists, schedule_of(plan, most), engine="triton", **settings)


def check_forward(
    pattern: Pattern,
    layout: Layout,
    *,
    dim: int = 8,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    heads: int = 2,
    tiles: tuple[int, int] = (32, 32),
    most: int | None = None,
    **settings,
) -> None:
    """out and lse against dense attention in fp64."""
    plan = build_plan(pattern, layout, q_tile=tiles[0], k_tile=tiles[1])
    q, k, v = random_qkv(layout, batch=batch, heads=heads, dim=dim, dtype=dtype)
    k, v, settings["key_bias"] = with_sources(k, v, plan, settings.get("key_bias"), None)
    compare(q, k, v, plan, most=most, groups=menu(plan, batch, heads), **settings)


def compare(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, most: int | None = None, **settings) -> None:
    out, lse = run_triton(q, k, v, plan, most=most, **settings)
    want, want_lse = oracle(q, k, v, plan.pattern, plan.layout, **settings)
    assert out.dtype == q.dtype
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), want, atol=ATOL[q.dtype], rtol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, atol=4e-6, rtol=1e-5)
