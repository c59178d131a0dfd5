"""What happens when a kernel does not compile or fit: one smaller config, then another backend under the same mask."""

import logging

import pytest
import torch
import triton
from attention_checks import oracle, random_qkv
from triton_checks import run_triton

from gensparse.attention import dispatch, sparse_attention
from gensparse.errors import BackendError
from gensparse.kernels.triton import backward, forward, launch
from gensparse.layout import Layout
from gensparse.patterns import Disc, Text
from gensparse.plan import build_plan

LAYOUT = Layout.image(5, 7, text=3)
PATTERN = Disc(3) | Text()
OUT_OF_SHARED = triton.runtime.errors.OutOfResources(300000, 232448, "shared memory")
FAILURES = [OUT_OF_SHARED, torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("PassManager::run failed")]


class Failing:
    """A kernel whose first launches raise."""

    def __init__(self, kernel, error, times):
        self.kernel, self.error, self.times = kernel, error, times
        self.blocks = []

    def __getitem__(self, grid):
        def run(*args, **options):
            self.blocks.append((options["BM"], options["BN"]))
            if len(self.blocks) <= self.times:
                raise self.error
            return self.kernel[grid](*args, **options)

        return run


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch):
    monkeypatch.setattr(launch, "_smaller", type(launch._smaller)())
    monkeypatch.setattr(launch, "_given_up", type(launch._given_up)())
    dispatch.announce_failure.cache_clear()


def failing(monkeypatch, error, times, module=forward, name="forward_kernel"):
    kernel = Failing(getattr(module, name), error, times)
    monkeypatch.setattr(module, name, kernel)
    return kernel


def plan_and_tensors():
    return build_plan(PATTERN, LAYOUT, q_tile=64, k_tile=64), random_qkv(LAYOUT, heads=1)


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_fault_24_a_smaller_config_is_tried_and_remembered(monkeypatch, caplog, error):
    kernel = failing(monkeypatch, error, 1)
    plan, tensors = plan_and_tensors()
    with caplog.at_level(logging.WARNING, logger="gensparse"):
        results = [run_triton(*tensors, plan)[0] for _ in range(2)]
    want, _ = oracle(*tensors, PATTERN, LAYOUT)
    for out in results:
        torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=1e-5)
    first, second, third = kernel.blocks
    assert second < first
    assert third == second, "the second call starts with what worked"
    assert len(caplog.records) == 1
    assert "Can't run triton; the forward kernel failed" in caplog.text


def test_fault_24_another_backend_takes_over_with_the_same_mask(monkeypatch, caplog):
    kernel = failing(monkeypatch, OUT_OF_SHARED, 2)
    plan, tensors = plan_and_tensors()
    with caplog.at_level(logging.WARNING, logger="gensparse"):
        for _ in range(3):
            out = sparse_attention(*tensors, plan)
            torch.testing.assert_close(out.double(), oracle(*tensors, PATTERN, LAYOUT)[0], atol=2e-6, rtol=1e-5)
    assert len(kernel.blocks) == 2, "a case that failed twice is not compiled again"
    assert "Another backend with the same mask runs instead." in caplog.text
    other = random_qkv(LAYOUT, heads=1, dim=40)  # another case, which is not given up
    torch.testing.assert_close(
        sparse_attention(*other, plan, backend="triton"), sparse_attention(*other, plan, backend="halo")
    )


def test_fault_24_full_memory_is_not_remembered_as_a_failure(monkeypatch):
    failing(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"), 2)
    plan, tensors = plan_and_tensors()
    with pytest.raises(BackendError, match="OutOfMemoryError"):
        sparse_attention(*tensors, plan, backend="triton")
    out = sparse_attention(*tensors, plan, backend="triton")
    torch.testing.assert_close(out.double(), oracle(*tensors, PATTERN, LAYOUT)[0], atol=2e-6, rtol=1e-5)


def test_an_explicit_choice_raises_instead(monkeypatch):
    failing(monkeypatch, OUT_OF_SHARED, 2)
    plan, tensors = plan_and_tensors()
    with pytest.raises(BackendError, match="Can't run triton; the forward kernel failed on cpu"):
        sparse_attention(*tensors, plan, backend="triton")


def test_other_errors_pass_through(monkeypatch):
    kernel = failing(monkeypatch, ValueError("a bug"), 1)
    plan, tensors = plan_and_tensors()
    with pytest.raises(ValueError, match="a bug"):
        sparse_attention(*tensors, plan)
    assert len(kernel.blocks) == 1


@pytest.mark.parametrize("name", ["dq_kernel", "dkv_kernel"])
def test_gradients_fall_back_to_the_plan_loop(monkeypatch, caplog, name):
    failing(monkeypatch, OUT_OF_SHARED, 2, backward, name)
    plan, tensors = plan_and_tensors()
    leaves = [x.requires_grad_() for x in tensors]
    with caplog.at_level(logging.WARNING, logger="gensparse"):
        grads = torch.autograd.grad(sparse_attention(*leaves, plan).square().sum(), leaves)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    want = torch.autograd.grad(oracle(*exact, PATTERN, LAYOUT)[0].square().sum(), exact)
    for mine, theirs in zip(grads, want, strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=2e-5, rtol=1e-4)
    assert "The plan loop computes these gradients." in caplog.text
