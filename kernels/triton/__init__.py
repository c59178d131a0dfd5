"""The Triton engine: one forward and two backward kernels for every plan. Importing it does not import triton."""

import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

from ..need import Need

OLDEST = (3, 3)  # Triton release with everything the kernels use
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_not(need: Need) -> str | None:
    """Why the Triton kernels cannot serve a call, or None."""
    if need.device == "cpu" and not interpreted():
        return "Can't run triton; the tensors are on the CPU and the kernels need a CUDA or ROCm device."
    if need.device not in ("cpu", "cuda"):
        return f"Can't run triton; the tensors are on {need.device!r} and the kernels need a CUDA or ROCm device."
    found = installed()
    if found is None:
        return "Can't run triton; it is not installed: pip install triton."
    if found < OLDEST:
        names = [".".join(map(str, numbers)) for numbers in (found, OLDEST)]
        return f"Can't run triton; version {names[0]} is installed and {names[1]} or newer is needed."
    if need.arch.startswith("sm_") and int(need.arch.removeprefix("sm_")) < 80:
        return f"Can't run triton; this GPU is {need.arch} and sm_80 (Ampere) or newer is needed."
    if need.head_dim > 256:
        return f"Can't run triton; the head dimension is {need.head_dim} and at most 256 fits."
    if need.dtype not in _DTYPES:
        return f"Can't run triton; the dtype is {need.dtype} and the kernels take float16, bfloat16 and float32."
    return None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors; slow, for tests. Read before triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@cache
def installed() -> tuple[int, int] | None:
    """Major and minor version of triton, or None."""
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows"):
        try:
            numbers = version(name).split("+")[0].split(".")
        except PackageNotFoundError:
            continue
        return int(numbers[0]), int(numbers[1])
    return None
