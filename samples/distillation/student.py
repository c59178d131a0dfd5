"""What is trained: the attention weights themselves, or a LoRA on them; and how the model becomes its teacher again."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gensparse.errors import ConfigError
from gensparse.methods import Clear, Loaded, Method, Place, Subject
from gensparse.methods.clear import POOLED


class Student(ABC):
    """Trained parameters of a model, in fp32 whatever the model is in; everything else is frozen."""

    parameters: dict[str, nn.Parameter]
    method: Method
    """What runs on the student: the method of the run, with the weights that it learns besides the model's."""
    file: str

    @abstractmethod
    def teacher(self) -> Any:
        """A `with` block in which the model has the weights it came with."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the file that pipelines load, `path(folder)`."""

    def path(self, folder: Path) -> Path:
        return folder / self.file

    def state(self) -> dict[str, Tensor]:
        """Copies of the trained parameters, for checkpoints."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Take the parameters of a checkpoint.

        Raises:
            ConfigError: it holds others than those trained here.
        """
        if state.keys() != self.parameters.keys():
            raise ConfigError("The checkpoint trains other layers than this run; resume it with its own settings.")
        for name, parameter in self.parameters.items():
            parameter.copy_(state[name])


class AttentionStudent(Student):
    """Query, key, value and output projections of the picture, as in CLEAR's published files.

    A copy of them stays for the teacher; the rest of the model is shared. Where CLEAR pools keys, a weight per position
    of its cells is learned in every layer too.
    """

    file = "attention.safetensors"

    def __init__(self, model: nn.Module, sites: Sequence[str], method: Method) -> None:
        model.requires_grad_(False)
        layers = {name: model.get_submodule(name) for name in projections(model, sites)}
        self.parameters = {f"{n}.{part}": p for n, layer in layers.items() for part, p in layer.named_parameters()}
        self._before = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        for parameter in self.parameters.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        self.method = method
        if isinstance(method, Clear) and method.down_factor > 1:
            pools = {site: _pool(model.get_submodule(site), method.down_factor) for site in sites}
            self.method = learning(method, pools)
            self.parameters |= {f"{site}.processor.spatial_weight": pool for site, pool in pools.items()}

    @contextmanager
    def teacher(self) -> Iterator[None]:
        trained = {name: self.parameters[name].data for name in self._before}
        try:
            self._put(self._before)
            yield
        finally:
            self._put(trained)

    def _put(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.parameters[name].data = value

    def export(self, folder: Path) -> None:
        dtype = next(iter(self._before.values())).dtype
        weights = {name: p.detach().to("cpu", dtype).contiguous() for name, p in self.parameters.items()}
        save_file(weights, self.path(folder), {"format": "pt"})


class LoraStudent(Student):
    """A LoRA on the same projections; it is switched off for the teacher, so nothing is held twice."""

    file = "pytorch_lora_weights.safetensors"

    def __init__(self, pipe: Any, model: nn.Module, sites: Sequence[str], rank: int, method: Method) -> None:
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise ConfigError("--train lora needs peft; install it with `pip install gensparse[lora]`.") from error
        model.requires_grad_(False)
        self._pipe, self._model, self.method = type(pipe), model, method
        targets = projections(model, sites)
        model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets))
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for parameter in self.parameters.values():
            parameter.data = parameter.data.float()

    @contextmanager
    def teacher(self) -> Iterator[None]:
        self._model.disable_adapters()
        try:
            yield
        finally:
            self._model.enable_adapters()

    def export(self, folder: Path) -> None:
        from peft.utils import get_peft_model_state_dict

        self._pipe.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(self._model))


def projections(model: nn.Module, sites: Sequence[str]) -> list[str]:
    """Linear layers of attention modules, without those of a text stream of their own (`add_*`, `to_add_*`)."""
    found = []
    for site in sites:
        for name, layer in model.get_submodule(site).named_modules():
            if isinstance(layer, nn.Linear) and not name.startswith(("add_", "to_add_")):
                found.append(f"{site}.{name}")
    return found


@dataclass(frozen=True)
class _Learning(Clear):
    """CLEAR with pooling weights in the making, by the names of their layers."""

    pools: Mapping[str, nn.Parameter] = field(default_factory=dict)

    def load(self, subject: Subject, places: Mapping[str, Place]) -> Loaded:
        return _Pools(self.pools)


class _Pools(Loaded):
    def __init__(self, pools: Mapping[str, nn.Parameter]) -> None:
        self._pools = pools

    def sources(self, place: Place) -> dict[str, Tensor]:
        return {POOLED: self._pools[place.name]}

    def undo(self) -> None:
        """Nothing was changed on the model."""


def learning(method: Clear, pools: Mapping[str, nn.Parameter]) -> Clear:
    """The method with pooling weights that get gradients."""
    return _Learning(method.radius, method.down_factor, method.proportional, "in training", pools)


def _pool(attn: nn.Module, factor: int) -> nn.Parameter:
    """Pooling weights of one layer, at first the mean; held by the layer so that processes share their gradients."""
    start = torch.full((1, 1, 1, factor, 1, factor, 1), 1 / factor**2, device=next(attn.parameters()).device)
    pool = nn.Parameter(start)
    attn.register_parameter("learned_pooling", pool)
    return pool


def with_weights(method: Method, path: Path) -> Method | None:
    """CLEAR on trained attention weights; None for other methods and for LoRA files, see `load_trained`."""
    if not isinstance(method, Clear) or _is_lora(path):
        return None
    return replace(method, weights=str(path))


def _is_lora(path: Path) -> bool:
    with safe_open(path, "pt") as file:
        return any(".lora_" in name for name in file.keys())  # noqa: SIM118 - no mapping


def load_trained(pipe: Any, path: Path) -> None:
    """Put a file written by `export` on a pipeline; pooling weights are left to CLEAR.

    Raises:
        ConfigError: the file holds weights that the model does not have.
    """
    if _is_lora(path):
        pipe.load_lora_weights(path.parent, weight_name=path.name)
        return
    weights = {name: value for name, value in load_file(path).items() if not name.endswith(".spatial_weight")}
    unknown = pipe.transformer.load_state_dict(weights, strict=False).unexpected_keys
    if unknown:
        raise ConfigError(f"{path} holds {unknown[0]}, which {type(pipe.transformer).__name__} does not have.")
