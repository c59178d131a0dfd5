"""DisenDiff's losses on attention maps (2403.18551): a modifier's map binds to its class word, classes stay apart."""

from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from gensparse.errors import ConfigError


def blur_kernel(size: int = 3, sigma: float = 0.5) -> Tensor:
    """Kernel [size, size] with exp(-((x - middle) / (2 sigma))^2) per axis, of sum 1."""
    line = torch.exp(-(((torch.arange(size, dtype=torch.float32) - (size - 1) / 2) / (2 * sigma)) ** 2))
    kernel = torch.outer(line, line)
    return kernel / kernel.sum()


def token_mask(maps: Tensor, token: int, squared: bool = False) -> Tensor:
    """The map of a token [side, side]: mean over layers and heads, stretched to 0..1, blurred; squared for class words.

    Args:
        maps: probabilities [layers, heads, side * side, L].
    """
    side = round(maps.shape[2] ** 0.5)
    if side * side != maps.shape[2]:
        raise ConfigError(f"Maps of {maps.shape[2]} tokens are not square; train on square pictures.")
    plane = maps[..., token].mean(dim=(0, 1)).reshape(side, side)
    plane = (plane - plane.min()) / (plane.max() - plane.min() + 1e-8)
    padded = F.pad(plane[None, None], (1, 1, 1, 1), mode="reflect")
    blurred = F.conv2d(padded, blur_kernel().to(plane)[None, None])[0, 0]
    return blurred.square() if squared else blurred


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of two soft masks, smoothed by 1."""
    both = (a * b).sum()
    return (both + 1) / (a.sum() + b.sum() - both + 1)


def calibration_loss(maps: Tensor, concepts: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """(binding, separation) of a prompt; the published loss is 0.01 times their sum, added to that of diffusion.

    Binding moves every modifier's map to that of its class word, which itself is moved by separation alone.

    Args:
        maps: probabilities [layers, heads, side * side, L] of the layers at 1/32 of the picture's side.
        concepts: (token of the modifier, token of its class word) of two concepts or more. For more than two,
            separation is the mean over the pairs.

    Raises:
        ConfigError: fewer than two concepts, or maps that are not square.
    """
    if len(concepts) < 2:
        raise ConfigError(f"{len(concepts)} concepts have nothing to be kept apart from; pass two or more.")
    classes = [token_mask(maps, word, squared=True) for _, word in concepts]
    modifiers = [token_mask(maps, modifier) for modifier, _ in concepts]
    bind = sum((1 - overlap(c.detach(), m) for c, m in zip(classes, modifiers, strict=True)), maps.new_zeros(()))
    pairs = [overlap(a, b) for a, b in combinations(classes, 2)]
    return bind, torch.stack(pairs).mean()
