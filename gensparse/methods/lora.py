"""A LoRA that belongs to a method: off in ordinary calls, on where the method says so, and removed without a trace."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gensparse.errors import ConfigError

if TYPE_CHECKING:  # methods are listed and described without torch
    from torch import Tensor, nn

_PREFIXES = ("base_model.model.", "transformer.", "unet.")
_ENDS = (".lora_A.weight", ".lora_B.weight")


class LoRA:
    """An adapter in the layout of diffusers and PEFT on a model. LoRAs of the user stay as they are, in both states.

    Args:
        name: of the adapter, and of the method in messages.
        weights: `path.to.layer.lora_A.weight` [r, in] and `path.to.layer.lora_B.weight` [out, r] of every layer, also
            with "transformer." in front.
        source: file name for messages.

    Raises:
        ConfigError: tensors that are no LoRA of this model, a model that takes none, an adapter of that name, or PEFT
            is not installed. The model is unchanged then.
    """

    def __init__(self, model: "nn.Module", name: str, weights: "Mapping[str, Tensor]", source: str) -> None:
        try:
            import peft  # noqa: F401
        except ImportError:
            raise ConfigError(f"{name} weights need PEFT; pip install 'gensparse[lora]'.") from None
        if not hasattr(model, "load_lora_adapter"):
            raise ConfigError(f"{name} weights cannot be put on a {type(model).__name__}, which takes no LoRA.")
        if name in getattr(model, "peft_config", {}):
            raise ConfigError(f"The model has an adapter called {name!r} already; delete_adapters({name!r}) first.")
        found = {_plain(key): value for key, value in weights.items()}
        _check(model, name, found, source)
        self._model, self._name = model, name
        self._had = [key for key in _TRACES if key in model.__dict__]
        self._wrapped = [path for path, _ in _layers(model)]
        active = {path: list(layer.active_adapters) for path, layer in _layers(model)}
        with _same_flags(model):
            model.load_lora_adapter(found, prefix=None, adapter_name=name)
            for path, layer in _layers(model):
                layer.set_adapter(active.get(path, []))

    @contextmanager
    def on(self) -> Iterator[None]:
        """Active inside the block, together with the LoRAs that are active anyway."""
        layers = [layer for _, layer in _layers(self._model) if self._name in layer.lora_A]
        before = [[other for other in layer.active_adapters if other != self._name] for layer in layers]
        with _same_flags(self._model):
            try:
                for layer, others in zip(layers, before, strict=True):
                    layer.set_adapter([*others, self._name])
                yield
            finally:
                for layer, others in zip(layers, before, strict=True):
                    layer.set_adapter(others)

    def undo(self) -> None:
        """Take the adapter off; layers that had none are the plain ones again."""
        model, adapters = self._model, set(getattr(self._model, "peft_config", {}))
        if self._name not in adapters:
            return  # the user has taken it off
        if adapters != {self._name}:
            model.delete_adapters(self._name)
            for path, layer in _layers(model):
                if path not in self._wrapped and not layer.lora_A:
                    _replace(model, path, layer.get_base_layer())
            return
        model.unload_lora()
        for key in set(_TRACES).difference(self._had):
            model.__dict__.pop(key, None)


_TRACES = ("peft_config", "_hf_peft_config_loaded")
"""What loading the first adapter leaves on a model."""


def _layers(model: "nn.Module") -> "list[tuple[str, Any]]":
    """Layers with adapters, by name."""
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


@contextmanager
def _same_flags(model: "nn.Module") -> Iterator[None]:
    """Weights stay trainable or not as they are: PEFT makes active adapters trainable and others not."""
    flags = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        yield
    finally:
        for weight, flag in flags:
            weight.requires_grad_(flag)


def _replace(model: "nn.Module", path: str, layer: "nn.Module") -> None:
    outer, _, last = path.rpartition(".")
    setattr(model.get_submodule(outer), last, layer)


def _plain(key: str) -> str:
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    return key


def _check(model: "nn.Module", name: str, found: "Mapping[str, Tensor]", source: str) -> None:
    """ConfigError unless the tensors are pairs of factors for layers of the model."""
    paths = {key.removesuffix(end) for key in found for end in _ENDS if key.endswith(end)}
    strange = sorted(key for key in found if not key.endswith(_ENDS))
    lonely = sorted(path for path in paths if any(path + end not in found for end in _ENDS))
    if strange or lonely or not paths:
        what = strange[0] if strange else f"only one half of {lonely[0]}" if lonely else "no tensors"
        raise ConfigError(
            f"{name} weights: {source} holds {what}; a LoRA in diffusers' layout has lora_A and lora_B of every layer."
        )
    modules = dict(model.named_modules())
    for path in sorted(paths):
        layer = modules.get(path)
        weight = getattr(layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer, "weight", None)
        down, up = (found[path + end] for end in _ENDS)
        if weight is None or weight.ndim != 2 or down.ndim != 2 or up.ndim != 2:
            raise ConfigError(f"{name} weights: {source} is for another model, this one has no linear layer {path}.")
        wanted, rank = (weight.shape[1], weight.shape[0]), down.shape[0]
        if down.shape[1] != wanted[0] or tuple(up.shape) != (wanted[1], rank):
            raise ConfigError(
                f"{name} weights: {source} has {path} from {down.shape[1]} to {up.shape[0]} features, the model from "
                f"{wanted[0]} to {wanted[1]}; use the model it was trained on."
            )
