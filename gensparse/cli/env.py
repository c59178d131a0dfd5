"""`gensparse env`: what this machine and installation are, to paste into an issue."""

import os
import platform
import sys
from typing import Any


def env() -> None:
    """Print versions, devices and what each attention backend says about this machine.

    Examples:

      gensparse env

      gensparse env --json

      gensparse env > env.txt
    """
    from gensparse.cli import output
    from gensparse.cli.state import STATE

    facts = collect()
    if STATE.output == "json":
        output.print_json(facts)
    else:
        ways = facts.pop("backends")
        output.facts({name: _words(value) for name, value in facts.items()})
        output.print_out("\nattention backends, in the order they are tried:")
        output.facts(ways)


def collect() -> dict[str, Any]:
    """Everything `env` prints; no user name, no path, no token."""
    import torch

    from gensparse.attention import backends
    from gensparse.engine.machine import memory_limit, versions

    limit = memory_limit("cpu", None)
    return {
        **versions(),
        **_optional_versions(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "encoding": sys.stdout.encoding,
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "free_memory_gib": round(limit / 2**30, 1) if limit else None,
        "gpus": _gpus(),
        "backends": {name: reason or "ready" for name, reason in backends().items()},
    }


def _optional_versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    out = {}
    for name in ("accelerate", "safetensors", "huggingface_hub", "numpy", "pillow", "triton", "peft", "xformers"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "not installed"
    return out


def _gpus() -> list[dict[str, Any]]:
    import torch

    out = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        memory = round(facts.total_memory / 2**30, 1)
        out.append({"name": facts.name, "memory_gib": memory, "capability": f"{facts.major}.{facts.minor}"})
    return out


def _words(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(_words(item) for item in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{k}: {v}" for k, v in value.items())
    return str(value)
