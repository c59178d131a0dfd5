"""Published weights that are pickles, as safetensors files: read without running anything in them."""

import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gensparse.errors import ModelError, OutputError, short

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
MAX_TENSORS = 100_000
MAX_DEPTH = 16
SPARE = 1 << 20
"""Bytes that tensors may hold beyond those of their file; storages that are shared are written more than once."""


class Converted(NamedTuple):
    """What was written."""

    path: Path
    tensors: int
    bytes: int
    left_out: int


def convert(source: Path, target: Path | None = None, *, overwrite: bool = False) -> Converted:
    """Write the tensors of a pickled checkpoint as a safetensors file.

    Nested dictionaries become names with dots, as diffusers reads them: {"ip_adapter": {"1.to_k_ip.weight": x}} becomes
    "ip_adapter.1.to_k_ip.weight". Numbers and texts beside the tensors are left out. The pickle is read by torch with
    weights_only=True, which makes tensors and plain containers and calls nothing else.

    Args:
        target: of the result; by default beside the source, with its name.

    Raises:
        ModelError: no such file, no pickle, one that would do more than hold tensors, or one whose tensors are larger
            than the file.
        OutputError: the result exists, or cannot be written.
    """
    target = source.with_suffix(".safetensors") if target is None else target
    if target.suffix != ".safetensors":
        raise OutputError(f"The result {target.name!r} must be a .safetensors file; give another name.")
    if target.exists() and not overwrite:
        raise OutputError(f"{str(target)!r} exists; pass --overwrite, or another name by -o.")
    if not target.parent.is_dir():
        raise OutputError(f"There is no folder {str(target.parent)!r} to write to; make it first.")
    _check_file(source)
    tensors, left_out = _flat(source, _loaded(source))
    size = _written(target, tensors)
    return Converted(target, len(tensors), size, left_out)


def _check_file(path: Path) -> None:
    if path.suffix.lower() not in SUFFIXES:
        raise ModelError(f"{path.name!r} is none of {', '.join(SUFFIXES)}; only pickled checkpoints are converted")
    if not path.is_file():
        raise ModelError(f"there is no file {str(path)!r}; check the path")
    if not zipfile.is_zipfile(path):
        return  # the older form, whose numbers stand in the file as they are
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError) as error:
        raise ModelError(f"{path.name!r} is damaged; get the file again") from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ModelError(f"{path.name!r} is compressed, which torch never writes; it is refused")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise ModelError(f"{path.name!r} claims more bytes than it has; it is refused")


def _loaded(path: Path) -> Any:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = (str(error).splitlines() or [""])[0][:160]
        raise ModelError(
            f"{path.name!r} holds more than tensors and plain containers, so opening it could run code; it is refused "
            f"({reason})"
        ) from None
    except Exception as error:
        raise ModelError(f"{path.name!r} cannot be read ({type(error).__name__}); get the file again") from error


def _flat(path: Path, data: Any) -> "tuple[dict[str, Tensor], int]":
    """Tensors by dotted name, and how many other values there were."""
    import torch

    found: dict[str, Tensor] = {}
    left_out, total, limit = 0, 0, path.stat().st_size + SPARE
    for name, value in _leaves(path, data, "", 0):
        if not isinstance(value, torch.Tensor):
            left_out += 1
            continue
        if name in found:
            raise ModelError(f"{path.name!r} has two tensors that would be named {short(name)}; it is refused")
        if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
            raise ModelError(f"{path.name!r}: {short(name)} is sparse, quantised or without values; it is refused")
        total += value.numel() * value.element_size()
        if total > limit or len(found) >= MAX_TENSORS:
            raise ModelError(
                f"{path.name!r} holds tensors of more bytes than the file has, or more than {MAX_TENSORS} of them; it "
                "is refused"
            )
        found[name] = value.detach()
    if not found:
        raise ModelError(f"{path.name!r} holds no tensors; there is nothing to convert")
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in found.items()}, left_out


def _leaves(path: Path, data: Any, prefix: str, depth: int) -> Iterator[tuple[str, Any]]:
    if depth > MAX_DEPTH:
        raise ModelError(f"{path.name!r} is nested more than {MAX_DEPTH} deep; it is refused")
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from _leaves(path, value, f"{prefix}.{key}" if prefix else str(key), depth + 1)
    elif isinstance(data, list | tuple) and not hasattr(data, "shape"):
        for number, value in enumerate(data):
            yield from _leaves(path, value, f"{prefix}.{number}" if prefix else str(number), depth + 1)
    else:
        yield prefix or "tensor", data


def _written(target: Path, tensors: "dict[str, Tensor]") -> int:
    from safetensors.torch import save_file

    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        size = temporary.stat().st_size
        os.replace(temporary, target)
    except OSError as error:
        raise OutputError(
            f"{str(target)!r} could not be written ({error.strerror or error}); free some space."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return size
