"""Losses of CLEAR's training (Liu, Tan, Wang 2412.16112), noise levels, and the attention outputs they compare."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gensparse.families import family_of


class Losses(NamedTuple):
    """The three terms: noise minus data, the dense model's prediction, its attention outputs."""

    flow: Tensor
    prediction: Tensor
    attention: Tensor

    def weighted(self, weights: "tuple[float, float, float]") -> Tensor:
        return sum(weight * term for weight, term in zip(weights, self, strict=True))


def losses(
    velocity: Tensor, target: Tensor, taught: Tensor, seen: Sequence[Tensor], wanted: Sequence[Tensor]
) -> Losses:
    """Mean squared errors of the student.

    Args:
        velocity: of the student; target: noise minus data; taught: velocity of the teacher.
        seen, wanted: attention outputs of student and teacher.
    """
    each = [squared_error(own, other) for own, other in zip(seen, wanted, strict=True)]
    attention = torch.stack(each).mean() if each else velocity.new_zeros(())
    return Losses(squared_error(velocity, target), squared_error(velocity, taught), attention)


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference in fp32."""
    return (a.float() - b.float()).square().mean()


def noise_levels(count: int, levels: Sequence[float], kind: str, generator: torch.Generator) -> Tensor:
    """Noise levels fp32 [count] in 0..1.

    Args:
        levels: of the pipeline's steps, falling.
        kind: "schedule" spreads them evenly over the pipeline's steps, "normal" is the logistic of a normal draw.
    """
    if kind == "normal":
        return torch.randn(count, generator=generator).sigmoid()
    table = torch.tensor(levels)
    place = torch.rand(count, generator=generator) * (len(levels) - 1)
    low = place.long()
    return torch.lerp(table[low], table[low + 1], place - low)


def noised(latents: Tensor, level: Tensor, noise: Tensor) -> Tensor:
    """Latents [B, ...] at noise levels [B] of a straight path to `noise`."""
    return torch.lerp(latents, noise, level.view(-1, *[1] * (latents.ndim - 1)).to(latents))


class Watch:
    """Outputs of some attention modules, collected in `with` blocks; a module with several outputs gives them all."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.outputs: list[Tensor] = []
        self._open = False
        for name in names:
            model.get_submodule(name).register_forward_hook(self._keep)

    def __enter__(self) -> list[Tensor]:
        self.outputs, self._open = [], True
        return self.outputs

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._open = False  # blocks that are computed again for their gradient call the hook once more

    def _keep(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        if self._open:
            parts = output if isinstance(output, tuple) else (output,)
            self.outputs += [part for part in parts if isinstance(part, Tensor)]


def attention_sites(model: nn.Module) -> list[str]:
    """Names of the attention modules that a method makes sparse, in the order of the model."""
    names = [name for name, module in model.named_modules() if getattr(module, "processor", None) is not None]
    return list(family_of(model).sites(model, names))


def watched_sites(model: nn.Module, every: int) -> list[str]:
    """Sites whose outputs are compared: every so many-th that lies in a single-stream block.

    Models without single-stream blocks give every so many-th site. CLEAR takes every fourth; their output is that of
    the attention itself there, for single-stream blocks have no output projection of their own.
    """
    sites = attention_sites(model)
    chosen = sites[::every]
    return [name for name in chosen if "single" in name] or chosen
