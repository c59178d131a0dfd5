"""The machine: which device and dtype to use, how much memory there is, which versions run."""

import contextlib
import ctypes
import platform
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from gensparse import __version__
from gensparse.errors import ConfigError, short
from gensparse.request import parse_bytes

if TYPE_CHECKING:
    import torch


def pick_device(wanted: str = "auto", *, must_exist: bool = True) -> str:
    """A torch device name; raises ConfigError for one that is not there (or, when planning, is no device at all)."""
    import torch

    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        return next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ConfigError(f"device is {short(wanted)}; give auto, cpu, cuda, cuda:1 or mps") from error
    missing = not there.get(device.type, False) or (
        device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    )
    if device.type not in there or (missing and must_exist):
        here = ", ".join(kind for kind in there if there[kind])
        raise ConfigError(f"device {short(wanted)} is not available; this machine has {here}")
    return wanted


def is_present(device: str) -> bool:
    """Whether a device name that `pick_device` let through can be used here."""
    import torch

    return not device.startswith("cuda") or torch.cuda.is_available()


def pick_dtype(wanted: str, device: str) -> str:
    """bf16 where the hardware multiplies it; else fp32 on CPUs and fp16 on GPUs."""
    if wanted != "auto":
        return wanted
    if device == "cpu":
        return "bf16" if cpu_has_bf16() else "fp32"
    import torch

    here = device.startswith("cuda") and torch.cuda.is_available()
    if here and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "fp16"
    return "bf16"


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX512-BF16 or AMX); without it fp32 is faster."""
    import torch

    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(probe() for probe in probes if probe is not None)


QUANTIZERS = {"fp8": (), "int8": ("torchao", "bitsandbytes"), "nf4": ("bitsandbytes",)}
"""How weights may be stored -> packages of which one is needed; fp8 storage is diffusers' own."""


def quantizers() -> tuple[str, ...]:
    """The entries of `QUANTIZERS` that work here."""
    return tuple(name for name, packages in QUANTIZERS.items() if not packages or quantizer(name) is not None)


def quantizer(name: str) -> str | None:
    """The installed package that stores weights as `name`; None without one."""
    return next((package for package in QUANTIZERS[name] if find_spec(package) is not None), None)


def torch_dtype(name: str) -> "torch.dtype":
    import torch

    return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[name]


def memory_limit(device: str, max_vram: str | None) -> int | None:
    """Bytes that may be used: what the user allows, or what is free on the device now."""
    if max_vram is not None:
        return parse_bytes(max_vram)
    if not is_present(device):
        return None
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory()


def free_memory() -> int | None:
    """Free main memory, also inside a container with a limit of its own."""
    import psutil

    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
        if limit.isdigit():
            free = min(free, int(limit) - int(used))
    return max(free, 0)


def return_memory() -> None:
    """Hand pages that the C library keeps for itself back to the system, where it knows how (glibc)."""
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory(device: str) -> dict[str, int]:
    """Peak bytes of this process, and of the GPU when one is used."""
    out: dict[str, int] = {}
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        out["peak_ram_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device.startswith("cuda"):
        import torch

        out["peak_vram_bytes"] = int(torch.cuda.max_memory_allocated(device))
    return out


def versions() -> dict[str, str]:
    """Versions that decide the bits of a picture."""
    from importlib.metadata import PackageNotFoundError, version

    out = {"gensparse": __version__, "python": platform.python_version()}
    for name in ("torch", "diffusers", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            out[name] = version(name)
    return out


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is the device or the machine running out of memory."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
