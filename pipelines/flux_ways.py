"""Published procedures for FLUX pictures beyond the trained size that are no guided cascade: CLEAR's, Scale-DiT's."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import retrieve_timesteps

from gensparse.errors import ConfigError
from gensparse.highres.resample import resize
from gensparse.highres.stages import Stage, StageResult, check_size, stage_sizes
from gensparse.highres.ways import parse_way
from gensparse.methods import Clear, Method, ScaleDiT, as_method
from gensparse.pipelines.way import Attention

Size = tuple[int, int]


class Anchored(NamedTuple):
    """A clean picture in packed latents [B, tokens, C], and its grid."""

    latents: torch.Tensor
    grid: Size

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class FluxWay:
    """Larger stages that start from the noised enlargement and are not led by it; a value, with settings of its own."""

    name: ClassVar[str]
    default_steps: ClassVar[int]
    position: ClassVar[str] = "ntk10"
    """The position rule that "auto" stands for in larger stages."""
    proportional: ClassVar[bool] = True
    """Whether that rule brings proportional attention."""

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """From the settings that `gensparse.highres.ways` reads."""
        return cls(**settings)

    def plan(self, size: Size, native: Size, multiple: int, steps: int) -> list[Stage]:
        """Stages up to `size` in pixels, native one first; sides are multiples of `multiple`."""
        raise NotImplementedError

    def check(self, stages: Sequence[Stage], position: str) -> None:
        """ConfigError before the first step for stages, or a position rule, that this way cannot run."""

    def check_guidance(self, guided: Sequence[bool]) -> None:
        """ConfigError for true guidance in larger stages (one entry each) that this way cannot run."""

    def check_control(self) -> None:
        """ConfigError where this way cannot run with ControlNets."""

    def attention(self, wanted: Attention, grid: Size, anchors: Anchored | None) -> Method | None:
        """The method of a larger stage of `grid` tokens, None for dense."""
        raise NotImplementedError

    def anchors(self, pipe: Any, smaller: StageResult | torch.Tensor, stage: Stage, run: Any) -> Anchored | None:
        """The smaller picture, where the method of the stage records it."""
        return None

    def beyond(self, pipe: Any, run: Any) -> Any:
        """What larger stages share, where it is not what the native one has: their noise levels."""
        return run


@dataclass(frozen=True)
class ClearStages(FluxWay):
    """CLEAR's generation of large pictures (Liu et al., arXiv 2412.16112; the authors' notebook for high resolution).

    A native picture, then for every size its enlargement, noised and denoised again with CLEAR attention, a rotary base
    times 10, proportional attention and a static time shift. Sizes double, as the authors advise. Ours: the encoder's
    mode in place of a sample, and pictures between stages that are not rounded to bytes.

    Args:
        method: attention of the larger stages, unless the call names another one. Distilled layers:
            `Clear(radius=16, proportional=True, weights="Huage001/CLEAR")`.
        strength: share of the steps that run at every larger size.
        shift: of their noise levels, s' = shift s / (1 + (shift - 1) s). With 20 steps and strength 0.7 they start at
            0.875.
        guidance_factor: multiplies the call's `guidance_scale` there; the authors: 3.5, then 7.5.

    Raises:
        ConfigError: a setting of another kind or range.
    """

    name: ClassVar[str] = "clear"
    default_steps: ClassVar[int] = 20

    method: Clear = field(default_factory=lambda: Clear(radius=16, proportional=True))
    strength: float = 0.7
    shift: float = 3.0
    guidance_factor: float = 7.5 / 3.5

    def __post_init__(self) -> None:
        if not isinstance(self.method, Clear):
            raise ConfigError(f"highres='clear' method={self.method!r} is not allowed; give a Clear(...).")
        _check_share("clear", "strength", self.strength)
        _check_positive("clear", "shift", self.shift)
        _check_positive("clear", "guidance_factor", self.guidance_factor)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        own = dict(settings)
        if "radius" in own:
            own["method"] = replace(cls().method, radius=own.pop("radius"))
        return cls(**own)

    def plan(self, size: Size, native: Size, multiple: int, steps: int) -> list[Stage]:
        first, *larger = stage_sizes(*size, native, multiple=multiple)
        rest = steps - int(max(steps - steps * self.strength, 0))  # as image-to-image pipelines count
        more = {"guidance_factor": self.guidance_factor, "sharpen": 0.0}
        return [Stage(*first, steps, sharpen=0.0), *(Stage(*own, rest, **more) for own in larger)]

    def attention(self, wanted: Attention, grid: Size, anchors: Anchored | None) -> Method | None:
        if wanted == "dense":
            return None
        return self.method if wanted == "auto" else as_method(wanted)

    def beyond(self, pipe: Any, run: Any) -> Any:
        config = pipe.scheduler.config
        # as keywords: in a config, entries that were defaults are overlooked
        template = type(pipe.scheduler).from_config(config, use_dynamic_shifting=False, shift=self.shift)
        sigmas = None if config.get("use_flow_sigmas") else np.linspace(1.0, 1 / run.steps, run.steps)
        retrieve_timesteps(template, run.steps, run.device, sigmas=sigmas)
        levels = tuple(template.sigmas.tolist())
        return replace(run, sigmas=levels, make_scheduler=lambda: copy.deepcopy(template))


@dataclass(frozen=True)
class ScaleDiTStages(FluxWay):
    """Scale-DiT in one call (Zhang, Tai, arXiv 2510.16325, its FLUX.1 pipeline).

    A native picture at 1/ratio of the size; its enlargement, sharpened and noised, runs the last 18 of 28 steps, in
    which tokens see their window, text, and the native picture as anchors. The anchors' keys and values are recorded
    once, before the first of these steps, with the same positions. Ours: sharpening of one strength, where theirs draws
    it; the exact windows unless `method` has a closure; any size, also those that the ratio does not divide.

    Args:
        method: windows and LoRA, unless the call names another method; its ratio follows the sizes. The published
            settings: `ScaleDiT.preset("flux.1-dev", weights="pytorch_lora_weights.safetensors")`. Without the LoRA the
            anchors are untrained: an experiment.
        ratio: target tokens per anchor and axis; None takes the one with which the native picture has about its size.
        share: share of the steps that run at the large size.
        guidance_factor: multiplies the call's `guidance_scale` there; the authors: 3.5, then 4.5.
        keep_on: device of the anchors' keys and values, such as "cpu"; None leaves them where they are computed.

    Raises:
        ConfigError: a setting of another kind or range.
    """

    name: ClassVar[str] = "scale_dit"
    default_steps: ClassVar[int] = 28
    proportional: ClassVar[bool] = False

    method: ScaleDiT = field(default_factory=ScaleDiT)
    ratio: int | None = None
    share: float = 18 / 28
    guidance_factor: float = 4.5 / 3.5
    keep_on: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.method, ScaleDiT):
            raise ConfigError(f"highres='scale_dit' method={self.method!r} is not allowed; give a ScaleDiT(...).")
        whole = isinstance(self.ratio, int) and not isinstance(self.ratio, bool)
        if self.ratio is not None and not (whole and self.ratio >= 1):
            raise ConfigError(f"highres='scale_dit' ratio={self.ratio!r} is not allowed; give an integer from 1 up.")
        _check_share("scale_dit", "share", self.share)
        _check_positive("scale_dit", "guidance_factor", self.guidance_factor)

    def plan(self, size: Size, native: Size, multiple: int, steps: int) -> list[Stage]:
        check_size(*size, multiple)
        zoom = math.sqrt(size[0] * size[1] / (native[0] * native[1]))
        if zoom <= 1.1 and self.ratio is None:
            return [Stage(*size, steps, sharpen=0.0)]
        grid = (size[0] // multiple, size[1] // multiple)
        low = low_grid(grid, self.ratio or max(2, math.floor(zoom + 0.5)))
        first = Stage(low[0] * multiple, low[1] * multiple, steps, sharpen=0.0)
        rest = max(1, round(steps * self.share))
        return [first, Stage(*size, rest, guidance_factor=self.guidance_factor)]

    def check(self, stages: Sequence[Stage], position: str) -> None:
        if any(stage.patch_shift for stage in stages):
            raise ConfigError("highres='scale_dit' has anchors on one grid; give stages without patch_shift.")
        if position.startswith("dy_"):
            raise ConfigError(
                f"highres='scale_dit' records anchors once, but position={position!r} changes at every step; use ntk10."
            )

    def check_guidance(self, guided: Sequence[bool]) -> None:
        if any(guided):
            raise ConfigError(
                "highres='scale_dit' has anchors of one prompt, so true guidance acts in the native stage alone; leave "
                "larger stages out of guidance_stages, or the negative prompt."
            )

    def check_control(self) -> None:
        raise ConfigError(
            "highres='scale_dit' has anchors that a ControlNet's layers do not record; use highres='cascade' or "
            "'clear' with control_image."
        )

    def attention(self, wanted: Attention, grid: Size, anchors: Anchored | None) -> Method | None:
        if wanted == "dense":
            return None
        method = self.method if wanted == "auto" else as_method(wanted)
        if isinstance(method, ScaleDiT) and anchors is not None:
            method = replace(method, ratio=grid[0] // anchors.grid[0])
        return method

    def anchors(self, pipe: Any, smaller: StageResult | torch.Tensor, stage: Stage, run: Any) -> Anchored | None:
        """The smaller picture as the transformer takes it, clean, on a grid that divides the stage's."""
        if not isinstance(self.attention(run.wishes.attention, pipe._grid(stage), None), ScaleDiT):
            return None
        grid, multiple = pipe._grid(stage), pipe.token_size
        if isinstance(smaller, StageResult):
            own = (smaller.height // multiple, smaller.width // multiple)
            if grid[0] >= own[0] and grid[0] // own[0] == grid[1] // own[1]:
                return Anchored(smaller.latents.to(run.device, run.dtype), own)
            smaller = pipe._decode_result(smaller, run.wishes.vae_tile)
        zoom = math.sqrt(stage.height * stage.width / (pipe.native_size**2))
        low = low_grid(grid, self.ratio or max(1, math.floor(zoom + 0.5)))
        size = (low[0] * multiple, low[1] * multiple)
        small = resize(smaller, size)
        encoded = [pipe._encode(one, size, 0.0, run.wishes.vae_tile, run.device) for one in small.split(1)]
        return Anchored(pipe._pack(torch.cat(encoded)).to(run.device, run.dtype), low)


WAYS: Mapping[str, type[FluxWay]] = {way.name: way for way in (ClearStages, ScaleDiTStages)}


def as_flux_way(highres: Any) -> FluxWay | None:
    """The way that `highres` is or names, such as "clear:shift=2" (`gensparse.highres.ways`); None for anything else.

    Raises:
        ConfigError: a setting that the way does not have.
    """
    if isinstance(highres, FluxWay):
        return highres
    name = highres.partition(":")[0].strip() if isinstance(highres, str) else ""
    return WAYS[name].of(parse_way(highres).settings) if name in WAYS else None


def low_grid(grid: Size, ratio: int) -> Size:
    """The tokens of the picture at 1/ratio of a grid, rounded down.

    Raises:
        ConfigError: a grid that is too small for the ratio.
    """
    low = (grid[0] // ratio, grid[1] // ratio)
    if min(low) < 1 or (grid[0] // low[0], grid[1] // low[1]) != (ratio, ratio):
        raise ConfigError(
            f"highres='scale_dit' ratio={ratio} is too large for {grid[1]} x {grid[0]} tokens (width x height); give a "
            "larger size or a smaller ratio."
        )
    return low


def _check_share(way: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ConfigError(f"highres={way!r} {name}={value!r} is not allowed; give a number above 0, up to 1.")


def _check_positive(way: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"highres={way!r} {name}={value!r} is not allowed; give a number above 0.")
