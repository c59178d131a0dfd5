"""Published outputs through the Triton kernels, in fp32 and fp16: every golden file with q, k, v.

The checks are those of the golden modules; here their attention calls name the backend, and in fp16 their tensors are
rounded and compared at the tolerance the vectors have for it, 2e-3 of the largest value of an output.
"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import test_golden_attention as windows
import test_golden_geometry as geometry
import test_golden_pooled as pooled
import test_golden_references as references
import test_golden_routed as routed
import torch
from golden_files import golden_params, load

from gensparse.attention import sparse_attention


def _reference_check(file: Path, path: str) -> None:
    kind, arrays = load(file)
    references.CHECKS[file.parent.name, kind](arrays, references.Path3(path))


# module, its check(file, path), and folder -> kinds with an attention call
MODULES: list[tuple[ModuleType, Callable[[Path, str], None], dict[str, tuple[str, ...]]]] = [
    (
        windows,
        windows.check_attention,
        {"natten": ("attention", "attention_extra_keys"), "clear": ("attention",), "msw_msa": ("even",)},
    ),
    (
        geometry,
        geometry.check_attention,
        {"radial": ("attention",), "freeswim": ("attention",), "hybrids": ("double_attention",)},
    ),
    (references, _reference_check, references.CHECKED),
    (pooled, pooled.check, {"ptdit": ("pooled_kv",), "hybrids": ("hilo",)}),
    (routed, routed.check, {"psa": ("attention",), "hybrids": ("biformer", "routing")}),
]
CASES = [
    pytest.param(module, check, *param.values, id=f"{module.__name__}-{param.id}")
    for module, check, folders in MODULES
    for folder, kinds in folders.items()
    for param in golden_params(folder, kinds=kinds)
]


def through_triton(dtype: torch.dtype, calls: list[str]) -> Callable:
    """`sparse_attention` by the kernels in `dtype`; results come back in fp32."""

    def call(q, k, v, plan, *, backend=None, sources=None, return_lse=False, **options):
        assert backend is None
        calls.append(repr(plan.pattern))
        if sources:
            sources = {name: _cast(given, dtype) for name, given in sources.items()}
        tensors = (x.to(dtype) for x in (q, k, v))
        result = sparse_attention(*tensors, plan, backend="triton", sources=sources, return_lse=return_lse, **options)
        return tuple(x.float() for x in result) if return_lse else result.float()

    return call


def _cast(given, dtype: torch.dtype):
    return tuple(x.to(dtype) for x in given) if isinstance(given, tuple) else given


def near(got, expected, atol: float | None = None) -> None:
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(("module", "check", "file"), CASES)
def test_published_outputs_by_the_kernels(monkeypatch, module, check, file, dtype):
    calls: list[str] = []
    monkeypatch.setattr(module, "sparse_attention", through_triton(dtype, calls))
    if dtype == torch.float16:
        monkeypatch.setattr(module, "close", near)
    check(file, "auto")
    assert calls, f"{file} made no attention call"
