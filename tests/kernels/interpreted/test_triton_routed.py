"""Lists chosen at run time through the forward kernel, against dense attention in fp64."""

import pytest
import torch
from attention_checks import poisoned_memory, random_qkv

from gensparse.attention import sparse_attention
from gensparse.kernels import reference
from gensparse.layout import Layout, Segment
from gensparse.patterns import Clusters, PyramidBlocks, RoutedPattern, TopRegions
from gensparse.plan import RouteContext, build_plan

MIXED = Layout((Segment("text", 3), Segment("target", 77, (1, 7, 11)), Segment("pad", 2)))
PICTURE = Layout.image(5, 7, text=6)
CASES: list[tuple[RoutedPattern, Layout]] = [
    (TopRegions(3, 2), PICTURE),
    (TopRegions(2, 3, own=False, per_head=True), MIXED),
    (PyramidBlocks(8, 24, ends=(0.2, 0.4, 0.6, 0.9), tile=8), MIXED),
    (PyramidBlocks(16, 16, (0.2, 0.4, 0.6, 0.8), "threshold", pad="replicate", order="sequence", tile=16), PICTURE),
]


@pytest.mark.parametrize(("pattern", "layout"), CASES, ids=repr)
def test_lists_chosen_at_run_time(pattern, layout):
    plan = build_plan(pattern, layout)
    q, k, v = random_qkv(layout, batch=2, heads=2)
    ctx = RouteContext(1, 2, 3)
    with poisoned_memory():
        out, lse = sparse_attention(q, k, v, plan, ctx=ctx, backend="triton", return_lse=True)
    keys, values, bias = plan.extend(k.double(), v.double(), None)
    mask = plan.dense_mask(plan.select(q, k, ctx))
    want, want_lse = reference.attend(q.double(), keys, values, mask, key_bias=bias)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=2e-6)


def test_clusters():
    layout = Layout.joint((1, 1, 29))
    q, k, v = random_qkv(layout)
    plan, ctx = build_plan(Clusters(3, 11), layout), RouteContext(5)
    out = sparse_attention(q, k, v, plan, ctx=ctx, backend="triton")
    torch.testing.assert_close(out, sparse_attention(q, k, v, plan, ctx=ctx, backend="plan_loop"))
