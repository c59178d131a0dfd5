"""CLEAR: circular windows, optionally with pooled keys of the whole picture (Liu, Tan, Wang 2412.16112)."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from gensparse.errors import ConfigError
from gensparse.layout import Layout
from gensparse.methods.base import START, At, Loaded, Method, Place, Subject
from gensparse.methods.checks import flag, whole
from gensparse.methods.pictures import over_pictures
from gensparse.methods.weights import (
    Replaced,
    base_layer,
    copy_into,
    find,
    opened,
    place_of,
    stored,
    why_not_plain,
)
from gensparse.patterns import Disc, Pattern, Pooled

if TYPE_CHECKING:  # methods are listed and described without torch
    from torch import Tensor, nn

POOLED = "clear"
"""Name of the key source with learned pooling weights."""

_FILE = re.compile(r"clear_local_(\d+)(?:_down_(\d+))?\.safetensors")
_PROJECTIONS = ("to_q", "to_k", "to_v")


@dataclass(frozen=True)
class Clear(Method):
    """Picture tokens see text and the disc d^2 < radius^2 around them; text sees everything.

    The published results use attention layers of FLUX.1-dev that were distilled for one radius and factor; the presets
    name the five published ones. Without those weights this is a training-free window, and what it changes grows as the
    radius shrinks. Load them with `weights="Huage001/CLEAR"`; check their licence, they derive from FLUX.1-dev. They
    replace the model's own projections until the method is removed, so a checkpoint saved in between holds them.

    References of the target's grid are seen through the same disc, others wholly (see `methods.pictures`), which is
    our rule: nothing was published for models that edit.

    Args:
        radius: of the disc, in tokens; 8, 16 and 32 were published.
        down_factor: with f > 1, picture tokens also see the picture pooled over f x f tokens: with the learned weights,
            or without them the mean of each cell, where those weights started; 4 was published. Pooled keys grow with
            the square of the picture.
        proportional: raise the logits by sqrt(ln(m S) / ln(S of the training size)), S tokens of the sequence, m = 10
            with pooled keys and else 1, as the authors do above the training size.
        weights: distilled layers: a safetensors file, a folder with `clear_local_16.safetensors` (or the name of the
            settings), or owner/name[@revision] of a hub repository with that file.

    Raises:
        ConfigError: a setting of the wrong type or range, or (when applied) weights that were made for other settings
            or another model, or a model whose weights cannot be exchanged.
        ModelError: (when applied) weights that are missing, gated, offline or damaged.
    """

    name: ClassVar[str] = "clear"
    paper: ClassVar[str] = (
        "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up (Liu, Tan, Wang), arXiv 2412.16112"
    )
    licence: ClassVar[str] = (
        "code Apache-2.0; the weights derive from FLUX.1-dev, whose non-commercial terms they follow"
    )
    use: ClassVar[str] = (
        "FLUX pictures of 2K and more; with the distilled weights for quality, without them as a plain disc"
    )
    edits: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "local_8": {"radius": 8},
        "local_16": {"radius": 16},
        "local_32": {"radius": 32},
        "local_8_down_4": {"radius": 8, "down_factor": 4},
        "local_16_down_4": {"radius": 16, "down_factor": 4},
    }

    radius: int = 16
    down_factor: int = 1
    proportional: bool = False
    weights: str | None = None

    def __post_init__(self) -> None:
        whole(self.name, "radius", self.radius)
        whole(self.name, "down_factor", self.down_factor)
        flag(self.name, "proportional", self.proportional)
        place_of(self.name, self.weights)

    def pattern(self, layout: Layout, at: At = START) -> Pattern:
        local = over_pictures(Disc(self.radius), layout)
        if self.down_factor == 1:
            return local
        if self.weights is None:
            return (local | Pooled(cells=self.down_factor, weights="mean")).clamped(layout.grid)
        return local | Pooled(cells=(1, self.down_factor, self.down_factor), name=POOLED)

    def why_not(self, layout: Layout, role: str = "joint") -> str | None:
        reason = super().why_not(layout, role)
        if reason is None and self.weights is not None and self.down_factor > 1:
            frames, *sides = layout.grid
            if frames > 1 or any(side % self.down_factor for side in sides):
                return f"clear's pooling weights need sides that {self.down_factor} divides, the grid is {layout.grid}"
        return reason

    def logit_gain(self, layout: Layout, native_tokens: int | None) -> float:
        if not self.proportional:
            return 1.0
        if native_tokens is None:
            raise ConfigError(
                "clear proportional=True needs the model's training size, which only its scheduler knows; apply it to "
                "the pipeline instead of the bare model."
            )
        picture = math.prod(layout.grid)
        base = layout.tokens - picture + native_tokens
        factor = 1 if self.down_factor == 1 else 10
        return math.sqrt(math.log(factor * layout.tokens) / math.log(base))

    def load(self, subject: Subject, places: Mapping[str, Place]) -> Loaded | None:
        if self.weights is None:
            return None
        factor = "" if self.down_factor == 1 else f"_down_{self.down_factor}"
        path = find(self.name, self.weights, f"clear_local_{self.radius}{factor}.safetensors")
        self._check_name(path)
        layers = {name: subject.model.get_submodule(name) for name in places}
        with opened(self.name, path) as file:
            self._check(file, path.name, layers)
            return _Distilled(file, layers)

    def _check_name(self, path: Path) -> None:
        match = _FILE.fullmatch(path.name)
        made_for = match and (int(match[1]), int(match[2] or 1))
        if made_for not in (None, (self.radius, self.down_factor)):
            raise ConfigError(
                f"clear radius={self.radius}, down_factor={self.down_factor} is not what {path.name} was distilled "
                f"for; pass radius={made_for[0]}, down_factor={made_for[1]}, or other weights."
            )

    def _check(self, file: Any, name: str, layers: Mapping[str, "nn.Module"]) -> None:
        """ConfigError unless the file has exactly the tensors that the model and the settings need."""
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - not a dict
        pools = {shape for key, shape in found.items() if key.endswith(_POOL)}
        f = self.down_factor
        pool = (1, 1, 1, f, 1, f, 1)
        if pools != ({pool} if f > 1 else set()):
            what = f"pooling weights {min(pools)}" if pools else "no pooling weights"
            raise ConfigError(
                f"clear down_factor={f} does not fit {name}, which has {what}; pass the factor it was distilled for "
                "(1 without pooling weights), or other weights."
            )
        wanted = {path + _POOL: pool for path in layers if f > 1}
        for path, attn in layers.items():
            for part, layer in _linears(attn):
                reason = why_not_plain(layer)
                if reason is not None:
                    raise ConfigError(f"clear weights cannot replace {path}.{part}: {reason}.")
                wanted |= {f"{path}.{part}.{key}": tuple(x.shape) for key, x in base_layer(layer).named_parameters()}
        _compare(name, wanted, found)


_POOL = ".processor.spatial_weight"


class _Distilled(Loaded):
    """The distilled projections on a model, and the pooling weights of its layers."""

    def __init__(self, file: Any, layers: Mapping[str, "nn.Module"]) -> None:
        self._replaced, self._layers = Replaced(), list(layers.values())
        keys = set(file.keys())
        self._pools = {name: file.get_tensor(name + _POOL).float() for name in layers if name + _POOL in keys}
        try:
            for name, attn in layers.items():
                for part, layer in _linears(attn):
                    own = base_layer(layer)
                    for key, _ in own.named_parameters():
                        self._replaced.put(own, key, file.get_tensor(f"{name}.{part}.{key}"))
                for layer, key, value in _fused(attn):
                    self._replaced.put(layer, key, value)
        except BaseException:
            self._replaced.restore()
            raise

    def sources(self, place: Place) -> "dict[str, Tensor] | None":
        weights = self._pools.get(place.name)
        return None if weights is None else {POOLED: weights}

    def undo(self) -> None:
        linears = [layer for attn in self._layers for _, layer in _linears(attn)]
        merged = [(layer, list(layer.merged_adapters)) for layer in linears if getattr(layer, "merged", False)]
        for layer, _ in merged:  # a LoRA fused in the meantime is fused into the model's own weights instead
            layer.unmerge()
        self._replaced.restore()
        for layer, adapters in merged:
            layer.merge(adapter_names=adapters)
        for attn in self._layers:
            for layer, key, value in _fused(attn):
                if not self._replaced.held(layer):  # fused in the meantime, out of the distilled projections
                    copy_into(layer, key, value)


def _linears(attn: "nn.Module") -> "list[tuple[str, nn.Module]]":
    """The projections that were distilled, by their names in the module: picture in and out, not the text's own."""
    found = [(part, getattr(attn, part)) for part in _PROJECTIONS]
    out = getattr(attn, "to_out", None)
    return found if out is None else [*found, ("to_out.0", out[0])]


def _fused(attn: "nn.Module") -> "Iterable[tuple[nn.Module, str, Tensor]]":
    """(layer, tensor, values) of fused projections, the values from the single ones; nothing where none are fused."""
    import torch

    if not getattr(attn, "fused_projections", False):
        return []
    single = [base_layer(getattr(attn, part)) for part in _PROJECTIONS]
    keys = [key for key, _ in base_layer(attn.to_qkv).named_parameters()]
    return [(base_layer(attn.to_qkv), key, torch.cat([stored(layer, key).data for layer in single])) for key in keys]


def _compare(name: str, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or extra:
        what = [f"lacks {len(missing)} tensors such as {missing[0]}"] if missing else []
        what += [f"has {len(extra)} others such as {extra[0]}"] if extra else []
        raise ConfigError(
            f"{name} does not fit the model: it {' and '.join(what)}; the published weights are for FLUX.1."
        )
    for key, shape in wanted.items():
        if found[key] != shape:
            raise ConfigError(
                f"{name} does not fit the model: {key} is {found[key]}, the model has {shape}; use the model it was "
                "distilled from."
            )
