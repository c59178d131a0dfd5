"""Published weights of methods: where their file is, what it holds, and tensors of a model that hold it for a while."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gensparse.errors import ConfigError, ModelError

if TYPE_CHECKING:  # methods are listed and described without torch
    from torch import Tensor, nn

SUFFIX = ".safetensors"

_REPO = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def place_of(method: str, value: Any) -> None:
    """ConfigError unless `value` can name weights: None, a path, or owner/name of the hub."""
    if value is not None and not (isinstance(value, str) and value.strip()):
        raise ConfigError(
            f"{method} weights={value!r} is not allowed; pass a {SUFFIX} file, a folder with one, or owner/name of a "
            "hub repository."
        )


def find(method: str, weights: str, name: str) -> Path:
    """The local file of a method's weights; downloads it where `weights` names a hub repository.

    Args:
        weights: path of a safetensors file or of a folder that holds `name`, or owner/name or owner/name@revision of a
            hub repository with `name` in it.
        name: of the file.

    Raises:
        ModelError: there is no such file, it is no safetensors file, or the hub does not give it.
    """
    path = Path(weights).expanduser()
    if path.is_dir():
        path = path / name
        if not path.is_file():
            raise ModelError(f"{method} weights: the folder {path.parent.name!r} has no {name}; pass the file itself.")
        return path
    if path.is_file() or _is_path(weights):
        return _local(method, path)
    match = _REPO.fullmatch(weights)
    if match is None:
        raise ModelError(
            f"{method} weights={weights!r} is neither a file nor owner/name of a hub repository; pass one of them."
        )
    return _download(method, match[1], match[2], name)


@contextmanager
def opened(method: str, path: Path) -> Iterator[Any]:
    """A safetensors file open for reading single tensors on the CPU.

    Raises:
        ModelError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{method} weights: {path.name} cannot be read ({error}); get the file again.") from error


class Replaced:
    """Tensors of a model that hold other values until `restore` brings back their own, bit for bit.

    Values are copied in place, so offloading, compiled blocks and optimisers keep the tensors they know; what they held
    is kept in main memory.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[nn.Module, str, Tensor]] = []

    def put(self, layer: "nn.Module", name: str, value: "Tensor") -> None:
        """Give one tensor of a layer the values of another of its shape."""
        self._kept.append((layer, name, stored(layer, name).detach().to("cpu", copy=True)))
        copy_into(layer, name, value)

    def held(self, layer: "nn.Module") -> bool:
        """Whether a tensor of this layer was replaced."""
        return any(kept is layer for kept, _, _ in self._kept)

    def restore(self) -> None:
        """Everything as it was; the other way round, should a tensor have been replaced twice."""
        for layer, name, value in reversed(self._kept):
            copy_into(layer, name, value)


def stored(layer: "nn.Module", name: str) -> "Tensor":
    """The tensor that holds the values of a parameter, also where accelerate keeps them off the model.

    Raises:
        ConfigError: they are on disk.
    """
    tensor = getattr(layer, name)
    if tensor.device.type != "meta":
        return tensor
    hook = getattr(layer, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        values = getattr(part, "weights_map", None)
        if values is not None and values[name] is values[name]:  # read from disk, every access is another tensor
            return values[name]
    raise ConfigError(
        f"A {type(layer).__name__} is offloaded to where its weights cannot be exchanged; call apply() before disk "
        "offload, and remove() after it is off."
    )


def why_not_plain(layer: "nn.Module") -> str | None:
    """Why the weights of a linear layer cannot be exchanged, or None."""
    import torch
    from torch import nn

    if getattr(layer, "merged", False):
        return "a LoRA is fused into it; call unfuse_lora() first and fuse it again afterwards"
    layer = base_layer(layer)
    weight = getattr(layer, "weight", None)
    if not isinstance(layer, nn.Linear) or type(weight) is not nn.Parameter or type(weight.data) is not torch.Tensor:
        return f"it is a quantised or sharded {type(layer).__name__}; load the model in bf16 or fp16"
    if not weight.dtype.is_floating_point:
        return f"its weights are quantised to {weight.dtype}; load the model in bf16 or fp16"
    return None


def base_layer(layer: "nn.Module") -> "nn.Module":
    """The linear layer inside a LoRA layer, or the layer itself."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def copy_into(layer: "nn.Module", name: str, value: "Tensor") -> None:
    """Overwrite one tensor of a layer."""
    stored(layer, name).data.copy_(value)


def _is_path(text: str) -> bool:
    return text.endswith(SUFFIX) or text.startswith((".", "~", "/")) or os.sep in text.replace("/", "")


def _local(method: str, path: Path) -> Path:
    if path.suffix != SUFFIX:
        raise ModelError(
            f"{method} weights: {path.name} is no {SUFFIX} file; pickled weights are refused, convert it with "
            "`gensparse models convert`."
        )
    if not path.is_file():
        raise ModelError(f"{method} weights: there is no file {str(path)!r}; check the path.")
    return path


def _download(method: str, repo: str, revision: str | None, name: str) -> Path:
    from huggingface_hub import constants, hf_hub_download

    no_network = os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in ("1", "true", "yes", "on")
    options = {"cache_dir": constants.HF_HUB_CACHE, "endpoint": os.environ.get("HF_ENDPOINT") or constants.ENDPOINT}
    try:
        return Path(hf_hub_download(repo, name, revision=revision, local_files_only=no_network, **options))
    except Exception as error:
        sentence = _hub_sentence({cls.__name__ for cls in type(error).__mro__}, repo, revision, name, no_network)
        sentence = sentence or f"{name} of {repo} could not be fetched ({type(error).__name__}); check the network."
        raise ModelError(f"{method} weights: {sentence}") from None  # the text of the error may quote request headers


def _hub_sentence(kinds: set[str], repo: str, revision: str | None, name: str, no_network: bool) -> str | None:
    """What a failure of the hub client means, from the names of its classes."""
    answers: Sequence[tuple[str, str]] = (
        ("GatedRepoError", f"{repo} is gated; accept its terms on https://huggingface.co/{repo}, then set HF_TOKEN."),
        ("RevisionNotFoundError", f"{repo} has no revision {revision!r}; give a branch, tag or commit that exists."),
        ("RepositoryNotFoundError", f"{repo} was not found on the hub; check its name, or set HF_TOKEN if private."),
        ("HFValidationError", f"{repo!r} is not a valid hub id; write owner/name."),
    )
    for kind, sentence in answers:
        if kind in kinds:
            return sentence
    if no_network or "OfflineModeIsEnabled" in kinds:
        return (
            f"{name} of {repo} is not in the local cache and the network is switched off; run once without "
            "HF_HUB_OFFLINE, or pass the path of the file."
        )
    if "EntryNotFoundError" in kinds and "LocalEntryNotFoundError" not in kinds:
        return f"{repo} has no file {name}; check the settings, or pass the path of a file."
    return None
