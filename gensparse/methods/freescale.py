"""FreeScale: a UNet above its training size, by windows for the layout and the whole map for detail (2412.09626)."""

import math
import threading
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from gensparse.errors import ConfigError
from gensparse.layout import Layout
from gensparse.methods.base import START, At, Dense, Loaded, Method, Place, Subject
from gensparse.methods.checks import flag, one_of
from gensparse.methods.checks import whole as check_whole
from gensparse.methods.steps import check_first_steps, first_steps
from gensparse.patterns import LongDistance, Pattern

if TYPE_CHECKING:  # methods are listed and described without torch
    from torch import Tensor, nn

    from gensparse.highres.freescale import Dilation
    from gensparse.processors.scale_fusion import ScaleFusion

FREEU = (1.1, 1.2, 0.6, 0.4)
"""b1, b2, s1, s2 of FreeU, which the authors use at the native size."""

_NAMES = ("b1", "b2", "s1", "s2")


@dataclass(frozen=True)
class FreeScale(Method):
    """Every self-attention runs twice: in windows of the training size that overlap by half, and over the whole map.

    Low frequencies come from the windows, in which the model is at home, and high ones from the whole map, which knows
    what is elsewhere; so subjects are not repeated and detail is kept. In the first steps the deepest convolutions are
    dilated by the picture's zoom. Published for pictures of SDXL that start from a smaller one
    (`SDXLHighresPipeline`, highres="freescale"); works on any UNet and in any pipeline of one. Sides of any length:
    windows have the picture's shape and the training size along its longer side. At that size itself nothing changes.

    Args:
        fusion: "spatial": the filter blurs rows and columns, as the paper says; "reference": also channels, as the
            authors' code does (there behind the output projection, here in front of it).
        whole: attention over the whole map: "dense", as published; "fast": dense on sub-grids of every n-th token; or
            a method whose pattern is a mask, such as "neighborhood:window=64x64" (";" for "," between its settings).
        jitter: whether windows move by up to an eighth, anew at every layer and step, so that no seams add up.
        dilated_steps: first steps with dilated convolutions, a number or a share of the run; 0 for none.
        freeu: b1, b2, s1, s2 of FreeU, which then acts in all steps; none leaves it as it is.
        native: latent cells per side at the training size; by default the model's.
        seed: of the jitter, from 0.

    Raises:
        ConfigError: a setting of another form, or (when applied) a model that is no UNet.
    """

    name: ClassVar[str] = "freescale"
    paper: ClassVar[str] = (
        "FreeScale: Unleashing the Resolution of Diffusion Models via Tuning-Free Scale Fusion (Qiu et al.), "
        "arXiv 2412.09626"
    )
    licence: ClassVar[str] = "code without a licence, none of it used; no weights"
    use: ClassVar[str] = "SDXL pictures of 2K to 8K where quality counts more than time, each from a smaller picture"
    timed: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"sdxl": {"native": 128}, "sdxl-turbo": {"native": 64}}

    fusion: str = "spatial"
    whole: str = "dense"
    jitter: bool = True
    dilated_steps: int | float = 0.7
    freeu: tuple[float, ...] | None = None
    native: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        one_of(self.name, "fusion", self.fusion, ("spatial", "reference"))
        object.__setattr__(self, "whole", _text(self.whole))
        flag(self.name, "jitter", self.jitter)
        check_first_steps(self.name, "dilated_steps", self.dilated_steps)
        if self.freeu is not None:
            object.__setattr__(self, "freeu", _freeu(self.freeu))
        if self.native is not None:
            check_whole(self.name, "native", self.native)
        check_whole(self.name, "seed", self.seed, low=0)

    def resolved(self, subject: Subject) -> Self:
        if subject.family != "UNet":
            raise ConfigError(
                f"freescale knows UNets such as SDXL, not {subject.family}; take another method for this model."
            )
        if self.native is not None:
            return self
        if subject.native_tokens is None:
            raise ConfigError(
                f"The config of this {type(subject.model).__name__} does not tell its training size; pass "
                "freescale native=, its latent cells per side."
            )
        return replace(self, native=round(math.sqrt(subject.native_tokens)))

    def kind(self, place: Place) -> Hashable:
        inner = self._inner()
        return None if inner is None else inner.kind(place)

    def pattern(self, layout: Layout, at: At = START) -> "ScaleFusion | Dense":
        from gensparse.highres.freescale import token_windows, zoom
        from gensparse.processors.scale_fusion import ScaleFusion

        if self.native is None:
            return Dense("freescale looks at the model before it acts; pass it to gensparse.apply()")
        size, native = layout.grid[1:], max(1, self.native // at.coarseness)
        cut = token_windows(size, native)
        cut = cut if self.jitter else cut._replace(jitter=(0, 0))
        return ScaleFusion(cut, zoom(size, native), self._pattern_of_whole(layout, native, at), self.fusion, self.seed)

    def why_not(self, layout: Layout, role: str = "joint") -> str | None:
        if layout.grid[0] > 1:
            return f"freescale attends in windows of one picture, and this call has {layout.grid[0]} frames"
        if layout.parts > 1:
            return "freescale cannot window a sequence that is spread over devices"
        return super().why_not(layout, role)

    def load(self, subject: Subject, places: Mapping[str, Place]) -> Loaded | None:
        if self.dilated_steps == 0 and self.freeu is None:
            return None
        return Scaled(subject.model, self)

    def _inner(self) -> Method | None:
        """The method of the whole map, where it is one."""
        from gensparse.methods import as_method

        return None if self.whole in ("dense", "fast") else as_method(self.whole.replace(";", ","))

    def _pattern_of_whole(self, layout: Layout, native: int, at: At) -> Pattern | None:
        from gensparse.highres.freescale import sub_grids

        inner, size = self._inner(), layout.grid[1:]
        if self.whole == "fast":
            step = sub_grids(size, native)
            group = tuple(-(-axis // n) for axis, n in zip(size, step, strict=True))
            return LongDistance(group, step)
        if inner is None:
            return None
        chosen = inner.pattern(layout, at)
        if isinstance(chosen, Dense):
            return None
        if not isinstance(chosen, Pattern) or inner.heads(at._replace(layout=layout), 2) is not None:
            raise ConfigError(
                f"freescale whole={self.whole!r} is not one mask for all heads; pass a method that is, such as "
                "'neighborhood:window=64x64', or 'fast'."
            )
        return chosen


class _Now(threading.local):
    """Of the running thread: by how much this call dilates, and the convolution that runs."""

    dilation: int = 1
    cut: "Dilation | None" = None

    def __reduce__(self) -> "tuple[type[_Now], tuple[()]]":
        return _Now, ()


class Scaled(Loaded):
    """Hooks by which convolutions of a UNet are dilated in some steps, and FreeU. No weight or module changes."""

    def __init__(self, model: "nn.Module", method: FreeScale) -> None:
        self._model, self._method, self._now = model, method, _Now()
        convs = _convs(model) if method.dilated_steps else []
        self._handles = [conv.register_forward_pre_hook(self._split) for conv in convs]
        self._handles += [conv.register_forward_hook(self._join) for conv in convs]
        self._before: list[dict[str, Any]] = []
        if method.freeu is not None:
            self._before = [{name: vars(block)[name] for name in _NAMES if name in vars(block)} for block in self._ups]
            self._set([dict(zip(_NAMES, method.freeu, strict=True)) for _ in self._ups])

    @property
    def _ups(self) -> list[Any]:
        return list(self._model.up_blocks)

    def begin(self, at: At, arguments: dict[str, Any]) -> bool:
        from gensparse.highres.freescale import zoom

        early = at.step < first_steps(self._method.dilated_steps, at)
        native = self._method.native or 1
        self._now.dilation = zoom(tuple(arguments["sample"].shape[-2:]), native) if early else 1
        self._now.cut = None
        return False

    def undo(self) -> None:
        for handle in self._handles:
            handle.remove()
        if self._method.freeu is not None:
            self._set(self._before)

    def _set(self, values: list[dict[str, Any]]) -> None:
        for block, own in zip(self._ups, values, strict=True):
            for name in _NAMES:
                if name in own:
                    setattr(block, name, own[name])
                elif name in vars(block):
                    delattr(block, name)

    def _split(self, conv: "nn.Module", args: "tuple[Tensor, ...]") -> "tuple[Tensor] | None":
        from gensparse.highres.freescale import Dilation

        if self._now.dilation == 1:
            return None
        x = args[0]
        self._now.cut = Dilation(tuple(x.shape[-2:]), self._now.dilation, _plain(conv).stride[0])
        return (self._now.cut.split(x),)

    def _join(self, _conv: "nn.Module", _args: Any, y: "Tensor") -> "Tensor | None":
        cut, self._now.cut = self._now.cut, None
        return None if cut is None else cut.join(y)


def _convs(model: Any) -> "list[nn.Module]":
    """The convolutions that are dilated.

    Raises:
        ConfigError: a UNet without them, or with others than 3 x 3 of padding 1.
    """
    from gensparse.highres.freescale import dilated_convs

    middle = getattr(model, "mid_block", None)
    names = dilated_convs(
        len(model.down_blocks), len(model.down_blocks[-1].resnets), len(getattr(middle, "resnets", ()))
    )
    found = []
    for name in names:
        try:
            conv = model.get_submodule(name)
        except AttributeError:
            conv = None
        shape = tuple(getattr(_plain(conv), key, None) for key in ("kernel_size", "padding", "dilation"))
        if shape != ((3, 3), (1, 1), (1, 1)) or _plain(conv).stride not in ((1, 1), (2, 2)):
            raise ConfigError(
                f"freescale dilates 3 x 3 convolutions of padding 1, and {name} of this {type(model).__name__} is "
                "none; pass dilated_steps=0."
            )
        found.append(conv)
    return found


def _plain(conv: Any) -> Any:
    """The convolution itself, where an adapter is wrapped around it."""
    return getattr(conv, "base_layer", conv)


def _freeu(value: Any) -> tuple[float, ...]:
    numbers = isinstance(value, tuple | list) and all(
        isinstance(n, int | float) and not isinstance(n, bool) and 0 <= n < float("inf") for n in value
    )
    if not numbers or len(value) != len(_NAMES):
        raise ConfigError(f"freescale freeu={value!r} is not allowed; pass b1, b2, s1, s2, as {FREEU}, or none.")
    return tuple(float(n) for n in value)


def _text(value: Any) -> str:
    """What `whole` is, as text of one method."""
    from gensparse.methods import as_method
    from gensparse.methods.describe import method_text

    if isinstance(value, str) and value.strip() in ("dense", "fast"):
        return value.strip()
    method = as_method(value.replace(";", ",") if isinstance(value, str) else value)
    if method.name in ("freescale", "auto", "schedule") or method.records:
        raise ConfigError(
            f"freescale whole={method.name!r} is not allowed; pass 'dense', 'fast' or a method that is a mask, such as "
            "'neighborhood:window=64x64'."
        )
    return method_text(method.to_dict()).replace(",", ";")
