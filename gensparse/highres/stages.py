"""The cascade: which sizes are rendered, with how many of the last steps, and what one stage hands to the next."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from gensparse.errors import ConfigError

LOW_PASSES = ("fft", "dwt")


@dataclass(frozen=True)
class Stage:
    """One size of the cascade.

    Args:
        height, width: pixels.
        steps: how many of the last steps of the shared sigma list run at this size (stage 0: all of them; 0: none, the
            picture is only enlarged).
        guidance_factor: multiplies the call's `guidance_scale` here (HiFlow: 3.5 -> 4.5 -> 6).
        alpha: weight of direction guidance at the first step; falls linearly to 0 (HiFlow, section 3.2).
        beta: weight of acceleration guidance, from the second step on; falls linearly to 0.
        ratio: cut-off D of the Butterworth low-pass, as a share of the Nyquist frequency.
        low_pass: "fft" (Butterworth) or "dwt" (Haar, one level).
        sharpen: strength of the unsharp mask on the upsampled picture; 0 switches it off.
        patch_shift: on every other step the model sees the latent shifted by half a token, so that the borders of
            its 2x2 patches do not build up into a grid.
        border: latent cells at the picture's border that stay those of the enlarged picture, fading over the inner
            half; for models that draw borders of large pictures badly.
    """

    height: int
    width: int
    steps: int
    guidance_factor: float = 1.0
    alpha: float = 0.0
    beta: float = 0.0
    ratio: float = 0.2
    low_pass: str = "fft"
    sharpen: float = 1.0
    patch_shift: bool = False
    border: int = 0

    def __post_init__(self) -> None:
        for name in ("height", "width", "steps", "border"):
            value = getattr(self, name)
            least = 0 if name in ("steps", "border") else 1  # no steps: a picture is only enlarged
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"Stage {name} is {value!r}; give an integer of at least {least}.")
        if self.low_pass not in LOW_PASSES:
            raise ConfigError(f"Stage low_pass is {self.low_pass!r}; choose one of {', '.join(LOW_PASSES)}.")
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"Stage {name} is {getattr(self, name)}; give a weight from 0 to 1.")
        if not self.ratio > 0:
            raise ConfigError(
                f"Stage ratio is {self.ratio}; give a share of the Nyquist frequency above 0, such as 0.2."
            )


@dataclass(frozen=True)
class CascadeSettings:
    """What every upscaling stage uses; entry k of a tuple belongs to the k-th upscaling, the last entry to all later.

    Defaults are HiFlow's for FLUX.1 (30 native steps, then the last 16 and the last 10).
    """

    share: tuple[float, ...] = (16 / 30, 10 / 30)
    guidance_factor: tuple[float, ...] = (4.5 / 3.5, 6.0 / 3.5)
    alpha: tuple[float, ...] = (1.0, 0.5)
    beta: tuple[float, ...] = (0.25, 0.5)
    ratio: tuple[float, ...] = (0.2,)
    low_pass: str = "fft"
    sharpen: float = 1.0
    patch_shift: bool = True
    border: int = 0

    def stage(self, upscaling: int, height: int, width: int, steps: int) -> Stage:
        """The stage of the `upscaling`-th enlargement (0 = first), out of `steps` native steps."""

        def entry(values: Sequence[float]) -> float:
            return values[min(upscaling, len(values) - 1)]

        return Stage(
            height=height,
            width=width,
            steps=max(1, round(steps * entry(self.share))),
            guidance_factor=entry(self.guidance_factor),
            alpha=entry(self.alpha),
            beta=entry(self.beta),
            ratio=entry(self.ratio),
            low_pass=self.low_pass,
            sharpen=self.sharpen,
            patch_shift=self.patch_shift,
            border=self.border,
        )


def round_size(pixels: float, multiple: int) -> int:
    """The nearest multiple of `multiple`, at least one of it."""
    return max(multiple, multiple * math.floor(pixels / multiple + 0.5))


def check_size(height: int, width: int, multiple: int) -> None:
    """Raise ConfigError unless both sides are positive multiples of `multiple` pixels."""
    if min(height, width) < multiple or height % multiple or width % multiple:
        near = f"{round_size(width, multiple)}x{round_size(height, multiple)}"
        raise ConfigError(
            f"The size {width}x{height} (width x height) is given, but both sides must be multiples of {multiple} "
            f"pixels; use {near}."
        )


def native_shape(height: int, width: int, native: tuple[int, int], multiple: int = 16) -> tuple[int, int]:
    """Pixels (height, width) of about the native area and the target's aspect ratio.

    Of all sizes on the grid the one with the best aspect ratio wins, an area error counting a seventh: a stretched
    draft would be pulled straight by every later stage.
    """
    area, aspect = native[0] * native[1], width / height
    middle = round_size(math.sqrt(area / aspect), multiple) // multiple

    def mismatch(size: tuple[int, int]) -> float:
        return abs(math.log(size[1] / size[0] / aspect)) + abs(math.log(size[0] * size[1] / area)) / 7

    rows = range(max(1, middle * 3 // 4), middle * 5 // 4 + 2)
    return min(((r * multiple, round_size(r * multiple * aspect, multiple)) for r in rows), key=mismatch)


def stage_sizes(
    height: int, width: int, native: tuple[int, int], *, multiple: int = 16, factor: float = 2.0, slack: float = 1.1
) -> list[tuple[int, int]]:
    """Sizes from native to target, each side growing by about `factor` (never by more than `factor * slack`).

    A target whose side is at most `slack` times native is rendered directly.
    """
    check_size(height, width, multiple)
    if not factor > 1:
        raise ConfigError(f"The growth factor is {factor}; give a number above 1, such as 2.")
    zoom = math.sqrt(height * width / (native[0] * native[1]))
    if zoom <= slack:
        return [(height, width)]
    count = max(1, math.ceil((math.log(zoom) - math.log(slack)) / math.log(factor)))
    between = [zoom ** (k / count - 1) for k in range(1, count)]
    sizes = [(round_size(height * s, multiple), round_size(width * s, multiple)) for s in between]
    return list(dict.fromkeys([native_shape(height, width, native, multiple), *sizes, (height, width)]))


def plan_stages(
    height: int,
    width: int,
    native: tuple[int, int],
    *,
    steps: int = 30,
    multiple: int = 16,
    factor: float = 2.0,
    settings: CascadeSettings | None = None,
) -> list[Stage]:
    """The cascade from a model's native size to (height, width) in pixels.

    Args:
        native: (height, width) in pixels at which the model was trained; only the area counts.
        steps: steps of the native stage.
        multiple: both sides of every stage are multiples of this (VAE factor times patch size).

    Raises:
        ConfigError: a side that is no multiple of `multiple`.
    """
    settings = settings or CascadeSettings()
    first, *larger = stage_sizes(height, width, native, multiple=multiple, factor=factor)
    return [Stage(*first, steps=steps), *(settings.stage(k, *size, steps) for k, size in enumerate(larger))]


def steps_within(sigmas: Sequence[float], strength: float) -> int:
    """How many of the last steps lie in the lower `strength` share of the noise range (0 none, 1 all).

    `sigmas` has one entry per step plus the final 0.
    """
    if not 0 <= strength <= 1:
        raise ConfigError(f"strength is {strength}; give a share of the noise range from 0 (keep) to 1 (redo).")
    return sum(sigma <= strength + 1e-6 for sigma in sigmas[:-1]) if strength > 0 else 0


@dataclass(frozen=True)
class StageResult:
    """What a finished stage leaves behind, on the CPU.

    Args:
        index: number of the stage; 0 is the native one.
        height, width: pixels.
        sigmas: the sigma list it ran on (all steps, then 0).
        latents: as the denoiser takes them: packed [B, tokens, 4*C] or [B, C, h, w].
        history: clean estimates x0 [B, C, h, w] by step index, for the steps the next stage will need.
    """

    index: int
    height: int
    width: int
    sigmas: tuple[float, ...]
    latents: torch.Tensor
    history: Mapping[int, torch.Tensor] = field(default_factory=dict)

    def serves(self, stage: Stage, sigmas: Sequence[float], steps: Sequence[int]) -> bool:
        """Whether this result stands for `stage` and has the estimates of all `steps`."""
        return (
            (self.height, self.width) == (stage.height, stage.width)
            and len(self.sigmas) == len(sigmas)
            and all(a == b for a, b in zip(self.sigmas, sigmas, strict=True))
            and all(step in self.history for step in steps)
        )


class StageStore(Protocol):
    """Keeps finished stages so that an interrupted run continues; `load` returns None for a stage it does not have."""

    def load(self, index: int) -> StageResult | None: ...

    def save(self, index: int, result: StageResult) -> None: ...
