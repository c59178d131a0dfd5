"""Which block sizes, warps and stages a kernel takes: tables per architecture, and the user's own before them.

A table is a JSON file with `entries`; the first that matches wins. An entry names what it is for (kernel, dtype, dim =
the padded head dimension, partial, bias; an absent field matches everything) and what to take (BM, BN, num_warps,
num_stages, loader). "measured" says whether a GPU ran it; "derived" entries come from compiler output alone.
"""

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from gensparse.errors import ConfigError, OutputError

DIMS = (16, 32, 64, 128, 256)  # padded head dimensions
ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
FOLDER = "GENSPARSE_CONFIG_DIR"  # environment variable: folder of the user's settings
KERNELS = ("forward", "dq", "dkv")
BOX_DIMS = (64, 128)  # head dimensions whose boxes are compiled ahead of time
LOADERS = {"rows": KERNELS, "boxes": ("forward",)}  # how keys are fetched, and the kernels that can
_MATCHED = ("kernel", "dtype", "dim", "partial", "bias")
_SIZES = {"BM": (16, 32, 64, 128, 256), "BN": (16, 32, 64, 128, 256), "num_warps": (1, 2, 4, 8, 16)}


@dataclass(frozen=True)
class Config:
    """How one kernel is launched.

    Args:
        BM, BN: query and key slots computed at once; at most those of the plan's tiles, which they divide.
        num_warps, num_stages: as Triton means them.
        loader: "rows", addresses computed per token; "boxes", tensor descriptors where plan and tensors allow them.
    """

    BM: int
    BN: int
    num_warps: int
    num_stages: int
    loader: str = "rows"

    def fitted(self, tile_m: int, tile_n: int) -> "Config":
        """The same with blocks no larger than a plan's tiles."""
        return replace(self, BM=min(self.BM, tile_m), BN=min(self.BN, tile_n))

    def smaller(self) -> "Config":
        """A config that needs about a quarter of the registers and shared memory; itself when there is none."""
        rows, columns = max(16, self.BM // 2), min(self.BN, max(32, self.BN // 2))
        return Config(rows, columns, min(self.num_warps, 4), 1, "rows")


@dataclass(frozen=True)
class Case:
    """What a config is looked up for.

    Args:
        kernel: "forward", "dq" or "dkv".
        arch: as `arch_of` names it.
        dtype: "float16", "bfloat16" or "float32".
        dim: padded head dimension.
        partial, bias: whether the plan has bit masks, and the call a key bias.
        tile_m, tile_n: slots of the plan's tiles.
    """

    kernel: str
    arch: str
    dtype: str
    dim: int
    partial: bool
    bias: bool
    tile_m: int
    tile_n: int


def padded_dim(dim: int) -> int:
    """The head dimension that a kernel computes with."""
    return next(size for size in DIMS if size >= dim)


@lru_cache(maxsize=64)
def arch_of(device: torch.device) -> str:
    """ "sm_90", "gfx942", ...; "cpu" and other device types by their name."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def config_for(case: Case) -> Config:
    """The user's entry for a case, else the shipped one of its architecture, else that of the nearest older one.

    Raises:
        ConfigError: the user's table is no valid table.
    """
    return _config(case, user_folder())


def shipped_config(case: Case) -> Config:
    """The shipped entry for a case, whatever the user's table says."""
    return _first([_shipped_table(_known_arch(case.arch))], case)


def uses(arch: str, loader: str) -> bool:
    """Whether any entry for an architecture, the user's or a shipped one, names a loader.

    Raises:
        ConfigError: the user's table is no valid table.
    """
    tables = (_user_table(user_table(arch)), _shipped_table(_known_arch(arch)))
    return any(entry["loader"] == loader for table in tables for entry in table)


@lru_cache(maxsize=256)
def _config(case: Case, folder: Path) -> Config:
    return _first([_user_table(user_table(case.arch, folder)), _shipped_table(_known_arch(case.arch))], case)


def _first(tables: Sequence[list[dict[str, Any]]], case: Case) -> Config:
    wanted = {name: getattr(case, name) for name in _MATCHED}
    entry = next(entry for table in tables for entry in table if _matches(entry, wanted))
    config = Config(**{name: entry[name] for name in ("BM", "BN", "num_warps", "num_stages")}, loader=entry["loader"])
    return config.fitted(case.tile_m, case.tile_n)


def user_folder() -> Path:
    """Where the user's tables lie: `GENSPARSE_CONFIG_DIR`, or gensparse in the platform's folder of settings."""
    if os.environ.get(FOLDER):
        return Path(os.environ[FOLDER])
    if sys.platform == "win32":
        return Path(os.environ.get("APPDATA") or Path.home() / "AppData" / "Roaming") / "gensparse"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "gensparse"
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "gensparse"


def user_table(arch: str, folder: Path | None = None) -> Path:
    """The user's table of an architecture; it need not exist."""
    return (folder or user_folder()) / "triton" / f"{arch}.json"


def write_user_table(arch: str, entries: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> Path:
    """Put entries before those the user's table has; entries for the same thing go. The file is replaced in one step.

    Args:
        entries: as a table has them.
        about: what to note beside them: the GPU, versions.

    Returns:
        The file, which later launches of any process read.

    Raises:
        ConfigError: an entry, or the table that is there, is not valid.
        OutputError: the file cannot be written.
    """
    path = user_table(arch)
    new = checked_table({"entries": [dict(entry) for entry in entries]}, "the new table")
    same = {_key(entry) for entry in new}
    kept = [entry for entry in _read_table(path) if _key(entry) not in same]
    text = json.dumps({"arch": arch, **about, "entries": [*new, *kept]}, indent=1) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; set {FOLDER} to a folder of yours") from error
    _user_table.cache_clear()
    _config.cache_clear()
    return path


def _key(entry: Mapping[str, Any]) -> str:
    """What an entry is for."""
    return json.dumps({name: entry.get(name) for name in _MATCHED})


def checked_table(table: Any, where: str) -> list[dict[str, Any]]:
    """The entries of a table.

    Raises:
        ConfigError: an entry lacks a field or has a value no kernel takes.
    """
    entries = table.get("entries") if isinstance(table, dict) else None
    if not isinstance(entries, list):
        raise ConfigError(f"{where} has no list 'entries'; run the tuner again or remove the file.")
    for number, entry in enumerate(entries):
        problem = _problem(entry)
        if problem:
            raise ConfigError(f"{where} entry {number}: {problem}; run the tuner again or remove the file.")
    return entries


def _problem(entry: Any) -> str | None:
    if not isinstance(entry, dict):
        return f"{entry!r} is no object"
    for name, allowed in _SIZES.items():
        if entry.get(name) not in allowed or type(entry[name]) is not int:
            return f"{name}={entry.get(name)!r} is not one of {allowed}"
    if type(entry.get("num_stages")) is not int or not 1 <= entry["num_stages"] <= 8:
        return f"num_stages={entry.get('num_stages')!r} is not between 1 and 8"
    if entry.get("loader") not in tuple(LOADERS):
        return f"loader={entry.get('loader')!r} is not one of {tuple(LOADERS)}"
    kernels = entry.get("kernel")
    kernels = KERNELS if kernels is None else (kernels if isinstance(kernels, list) else [kernels])
    if any(kernel in KERNELS and kernel not in LOADERS[entry["loader"]] for kernel in kernels):
        return f"loader={entry['loader']!r} serves {LOADERS[entry['loader']]} and not {kernels}"
    return None


def _matches(entry: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    def fits(name: str, value: Any) -> bool:
        given = entry.get(name)
        return given is None or (value in given if isinstance(given, list) else value == given)

    return all(fits(name, value) for name, value in wanted.items())


def _known_arch(arch: str) -> str:
    """The newest architecture with a table that is not newer than `arch`."""
    if arch.startswith("gfx"):
        return "gfx942"
    number = int(arch.removeprefix("sm_")) if arch.startswith("sm_") else 80
    return next((name for name in reversed(ARCHS[:-1]) if int(name.removeprefix("sm_")) <= number), "sm_80")


@lru_cache(maxsize=len(ARCHS))
def _shipped_table(arch: str) -> list[dict[str, Any]]:
    text = (files(__package__) / "configs" / f"{arch}.json").read_text()
    return checked_table(json.loads(text), f"{arch}.json")


@lru_cache(maxsize=16)
def _user_table(path: Path) -> list[dict[str, Any]]:
    return _read_table(path)


def _read_table(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        table = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON ({error}); run the tuner again or remove the file.") from error
    return checked_table(table, str(path))
