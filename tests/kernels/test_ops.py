"""Attention as a torch op: gradients, schema and shape checks, torch.compile; the engine here is the plan loop."""

import subprocess
import sys

import pytest
import torch
from attention_checks import menu, oracle, random_qkv

from gensparse.attention import sparse_attention
from gensparse.errors import BackendError
from gensparse.kernels import ops
from gensparse.kernels.lists import Schedule
from gensparse.layout import Layout
from gensparse.patterns import Blocks, CrissCross, Disc, PerHead, Text
from gensparse.plan import build_plan

LAYOUT = Layout.image(5, 7, text=3)
MENU = PerHead((Disc(2), Blocks(3))) | Text()


def call(pattern=MENU, *, heads=2, key_heads=None, dim=3, dtype=torch.float64):
    """Arguments of an attention call that needs gradients everywhere, and its options."""
    plan = build_plan(pattern, LAYOUT, q_tile=32, k_tile=32)
    q, k, v = random_qkv(LAYOUT, heads=heads, dim=dim, dtype=dtype)
    bias = torch.randn(1, heads, LAYOUT.tokens, dtype=dtype, generator=torch.Generator().manual_seed(1))
    tensors = [x.requires_grad_() for x in (q, k[:, :, :key_heads].clone(), v[:, :, :key_heads].clone(), bias)]
    return plan, tensors, menu(plan, 1, heads)


def arguments(plan, tensors, groups, engine="plan_loop"):
    """The flat arguments of the op itself."""
    schedule = Schedule(plan.pieces, plan.turned, plan.turned_pieces)
    pieces, turned, slots = ops._flat(schedule)
    boxes = ops._flat_boxes(schedule._replace(boxes=plan.with_boxes().boxes))
    return (*tensors, groups, list(plan.lists), pieces, turned, *slots, 0.5, engine, *boxes)


@pytest.mark.parametrize("key_heads", [2, 1])
def test_gradients_pass_gradcheck(key_heads):
    plan, tensors, groups = call(key_heads=key_heads)

    def attend(q, k, v, bias):
        return ops.attend(q, k, v, plan.lists, groups=groups, key_bias=bias)

    assert torch.autograd.gradcheck(attend, tensors, fast_mode=True)


def test_gradients_pass_gradcheck_without_a_bias():
    plan, tensors, _ = call(Disc(3) | Text())
    assert torch.autograd.gradcheck(lambda *x: ops.attend(*x, plan.lists, scale=-0.4), tensors[:3], fast_mode=True)


def test_the_plan_loop_itself_stays_differentiable():
    plan, tensors, groups = call()

    def attend(q, k, v, bias):
        return sparse_attention(q, k, v, plan, groups=groups, key_bias=bias, backend="plan_loop", return_lse=True)

    assert torch.autograd.gradcheck(attend, tensors, fast_mode=True)


@pytest.mark.parametrize("pattern", [MENU, CrissCross()], ids=repr)
def test_the_op_equals_the_oracle(pattern):
    plan, (q, k, v, bias), groups = call(pattern)
    out, lse = ops.attend(q, k, v, plan.lists, groups=groups, key_bias=bias)
    want, want_lse = oracle(q, k, v, pattern, LAYOUT, groups=groups, key_bias=bias)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    grads = torch.autograd.grad((out.sin().sum() + lse[:, 3:].sum()), (q, k, v, bias))
    theirs = torch.autograd.grad((want.sin().sum() + want_lse[:, 3:].sum()), (q, k, v, bias))
    for mine, other in zip(grads, theirs, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_the_op_keeps_the_rules_of_torch_ops(dtype):
    plan, tensors, groups = call(dtype=dtype)
    torch.library.opcheck(torch.ops.gensparse.attend.default, arguments(plan, tensors, groups))
    plain = arguments(plan, [*(x.detach() for x in tensors[:3]), None], groups)
    torch.library.opcheck(torch.ops.gensparse.attend.default, plain)


def test_the_backward_op_keeps_the_rules_of_torch_ops():
    plan, tensors, groups = call()
    values = [x.detach() for x in tensors]
    flat = arguments(plan, values, groups)
    out, lse = torch.ops.gensparse.attend(*flat)
    given = (torch.ones_like(out), torch.ones_like(lse), *flat[:5], out, lse, *flat[5:12])
    torch.library.opcheck(torch.ops.gensparse.attend_backward.default, given)


def test_the_op_compiles_in_one_graph():
    plan, (q, k, v, bias), groups = call()

    def layer(q, k, v, bias):
        out, lse = ops.attend(q * 2, k, v, plan.lists, groups=groups, key_bias=bias)
        return (out + 1).sum() + lse[:, 3:].sum()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    grads = torch.autograd.grad(compiled(q, k, v, bias), (q, k, v, bias))
    for mine, theirs in zip(grads, torch.autograd.grad(layer(q, k, v, bias), (q, k, v, bias)), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("pattern", [Disc(3) | Text(), Blocks(4) | Text(), CrissCross() | Text(), MENU], ids=repr)
def test_attention_compiles_in_one_graph(pattern):
    """With any plan; the compiler never looks into the lists."""
    plan, (q, k, v, _), groups = call(pattern, dtype=torch.float32)

    def layer(q, k, v):
        return sparse_attention(q, k, v, plan, groups=groups).square().sum()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), layer(q, k, v))
    grads = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    for mine, theirs in zip(grads, torch.autograd.grad(layer(q, k, v), (q, k, v)), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)


def test_gradients_by_kernels_need_the_turned_lists():
    plan, tensors, groups = call(dtype=torch.float32)
    flat = list(arguments(plan, [x.detach() for x in tensors], groups, "plan_loop"))
    out, lse = torch.ops.gensparse.attend(*flat)
    flat[7], flat[11] = [], "triton"
    with pytest.raises(BackendError, match="need the turned lists"):
        torch.ops.gensparse.attend_backward(out, lse, *flat[:5], out, lse, *flat[5:12])


def test_the_ops_import_no_triton():
    code = "import sys, gensparse.kernels.ops, gensparse.kernels.triton; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
