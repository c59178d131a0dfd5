"""Ways in which UNet pipelines reach a size beyond the trained one; each says where it differs from plain stages."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F

from gensparse.errors import ConfigError, unknown_name
from gensparse.highres import demofusion, rectifiedhr, views
from gensparse.highres.freescale import DILATED_STEPS, restart_step
from gensparse.highres.stages import CascadeSettings, Stage, StageResult, native_shape, plan_stages, stage_sizes
from gensparse.highres.ways import parse_way
from gensparse.methods import FreeScale, HiDiffusion, Method, as_method
from gensparse.methods.freescale import FREEU, Scaled
from gensparse.pipelines.c_upscale import CUpscale
from gensparse.pipelines.cascade import Guide, as_tuples
from gensparse.pipelines.way import Attention, Moment, Native, NoiseOf, Way

__all__ = [
    "WAYS",
    "Attention",
    "CUpscale",
    "Cascade",
    "DemoFusion",
    "FreeScaleCascade",
    "Moment",
    "Native",
    "NoiseOf",
    "Plain",
    "RectifiedHR",
    "Shrunk",
    "Way",
    "as_way",
    "dilated_share",
]


@dataclass(frozen=True)
class Plain(Way):
    """The size at once, as diffusers does it."""

    name: ClassVar[str] = "none"

    def plan(self, size: tuple[int, int], native: Native, steps: int) -> list[Stage]:
        return [Stage(*size, steps, sharpen=0.0)]

    def attention(self, wanted: Attention, *, native: bool, dilated_steps: int = 0) -> Method | None:
        return super().attention(wanted, native=False)


@dataclass(frozen=True)
class Shrunk(Plain):
    """The size at once with HiDiffusion (Zhang et al., arXiv 2311.17528), for sizes above the trained one only."""

    name: ClassVar[str] = "hidiffusion"

    method: Method = field(default_factory=HiDiffusion)

    def attention(self, wanted: Attention, *, native: bool, dilated_steps: int = 0) -> Method | None:
        if wanted not in ("auto", "dense"):
            raise ConfigError(
                f"highres hidiffusion brings its own attention, so attention={wanted!r} has no place; leave it out."
            )
        return self.method if wanted == "auto" else replace(self.method, windows=False)


HIFLOW = CascadeSettings(guidance_factor=(1.0,), beta=(0.0,), patch_shift=False)
"""HiFlow's numbers without acceleration, with one guidance for all sizes."""


@dataclass(frozen=True)
class Cascade(Way):
    """HiFlow in its x0 form (arXiv 2504.06232): low frequencies of the clean estimate follow the smaller run's.

    DiffuseHigh (arXiv 2406.18459) is the precedent for models of noise. The defaults are HiFlow's numbers, without
    acceleration (`beta`) and with one guidance for all sizes; how good they are for UNets is not measured.
    """

    name: ClassVar[str] = "cascade"
    keeps: ClassVar[bool] = True

    settings: CascadeSettings = HIFLOW

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        return cls(replace(HIFLOW, **settings))

    def plan(self, size: tuple[int, int], native: Native, steps: int) -> list[Stage]:
        return plan_stages(*size, native.size, steps=steps, multiple=native.multiple, settings=self.settings)


@dataclass(frozen=True)
class FreeScaleCascade(Way):
    """FreeScale (Qiu et al., arXiv 2412.09626): stages from the noised enlargement, with the method `FreeScale`.

    Args:
        restart: share of the steps that larger sizes leave out; 0.5 for SDXL-Turbo.
        cosine_scale: exponent of the weight of the noised guide; at most 1 for 8K.
        freeu: b1, b2, s1, s2 of FreeU in the native stage, or None.
        method: attention of the larger stages; their dilated steps are those among the first 0.7 of the whole run.
    """

    name: ClassVar[str] = "freescale"

    restart: float = 0.3
    cosine_scale: float = 2.0
    freeu: tuple[float, ...] | None = FREEU
    method: FreeScale = field(default_factory=FreeScale)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        own = dict(settings)
        method = {name: own.pop(name) for name in ("fusion", "jitter", "dilated_steps") if name in own}
        own["freeu"] = FREEU if own.get("freeu", True) else None
        return cls(**own, method=FreeScale(**method))

    def plan(self, size: tuple[int, int], native: Native, steps: int) -> list[Stage]:
        first, *larger = stage_sizes(*size, native.size, multiple=native.multiple)
        rest = steps - restart_step(steps, self.restart)
        return [Stage(*first, steps, sharpen=0.0), *(Stage(*own, rest, sharpen=0.0) for own in larger)]

    def attention(self, wanted: Attention, *, native: bool, dilated_steps: int = 0) -> Method | None:
        if native:
            return None
        whole = self.method.whole if wanted == "auto" else wanted  # "fast" and "dense" are words of the method
        steps = dilated_steps if self.method.dilated_steps else 0
        return replace(self.method, whole=whole, dilated_steps=steps)

    @contextmanager
    def around_native(self, unet: torch.nn.Module) -> Iterator[None]:
        if self.freeu is None:
            yield
            return
        loaded = Scaled(unet, FreeScale(dilated_steps=0, freeu=self.freeu))
        try:
            yield
        finally:
            loaded.undo()

    def mixed(self, x: torch.Tensor, noised_guide: torch.Tensor, moment: Moment) -> torch.Tensor:
        weight = demofusion.cosine_factor(moment.t, moment.train_steps) ** self.cosine_scale
        return demofusion.mixed(x, noised_guide, weight)


@dataclass(frozen=True)
class DemoFusion(Way):
    """DemoFusion (Du et al., arXiv 2311.16973): windows of the trained size and dilated views, at every step.

    A stage of zoom s runs about (2s - 1)^2 windows and s^2 views per step, each as costly as a native step.

    Args:
        scales: exponents of the weights of the noised guide, of the dilated views and of their blur.
        sigma: width in latent cells of the widest blur.
        view_batch: windows or dilated views that run at once.
        jitter: whether windows move at random from step to step, against seams.
    """

    name: ClassVar[str] = "demofusion"

    scales: tuple[float, float, float] = demofusion.SCALES
    sigma: float = 1.0
    view_batch: int = 16
    jitter: bool = True

    def plan(self, size: tuple[int, int], native: Native, steps: int) -> list[Stage]:
        phases = demofusion.phases(*size, native.size[0], multiple=native.multiple)
        return [Stage(phase.height, phase.width, steps, sharpen=0.0) for phase in phases]

    def attention(self, wanted: Attention, *, native: bool, dilated_steps: int = 0) -> Method | None:
        return super().attention("dense" if wanted == "auto" else wanted, native=native)  # every view is of native size

    def guide(self, pipe: Any, smaller: StageResult | torch.Tensor, stage: Stage, run: Any) -> Guide:
        if not isinstance(smaller, StageResult):
            return super().guide(pipe, smaller, stage, run)
        size = (stage.height // pipe.vae_scale_factor, stage.width // pipe.vae_scale_factor)
        latents = smaller.latents.to(run.device, torch.float32)
        return Guide(F.interpolate(latents, size=size, mode="bicubic", align_corners=False), {})

    def mixed(self, x: torch.Tensor, noised_guide: torch.Tensor, moment: Moment) -> torch.Tensor:
        return demofusion.mixed(x, noised_guide, self._weights(moment).skip)

    def noise(self, x: torch.Tensor, noise_of: NoiseOf, native: Native, moment: Moment) -> torch.Tensor:
        size = (x.shape[-2], x.shape[-1])
        zoom = max(1, math.floor(max(size) / native.cells + 0.5))
        local = self._local(x, noise_of, native, moment)
        if zoom == 1:
            return local  # the one dilated view is the picture itself
        weights, step = self._weights(moment), (zoom, zoom)
        whole = views.padded_to(x, (zoom * native.patch,) * 2)  # so that views hold whole tokens
        parts = views.dilated_views(demofusion.blurred(whole, zoom, weights.blur, self.sigma), step)
        found = [noise_of(part, [(0, 0)] * (len(part) // len(x))) for part in parts.split(self.view_batch * len(x))]
        dilated = views.from_dilated(torch.cat(found), step)[..., -size[0] :, -size[1] :]
        return demofusion.mixed(local, dilated, weights.dilated)

    def finished(self, z: torch.Tensor, guide: Guide, smaller: StageResult | torch.Tensor) -> torch.Tensor:
        """With the moments of the native latents, which those of every stage have."""
        anchor = smaller.latents.to(z) if isinstance(smaller, StageResult) else guide.encoded
        return demofusion.with_moments(z, demofusion.moments(anchor))

    def _weights(self, moment: Moment) -> demofusion.Weights:
        return demofusion.weights(moment.t, self.scales, moment.train_steps)

    def _local(self, x: torch.Tensor, noise_of: NoiseOf, native: Native, moment: Moment) -> torch.Tensor:
        """Mean over the windows."""
        size, window = (x.shape[-2], x.shape[-1]), (native.cells, native.cells)
        stride = (max(1, native.cells // 2),) * 2
        found = views.windows(size, window, stride)
        if len(found) == 1 and size[0] <= window[0] and size[1] <= window[1]:
            return noise_of(x)
        reach = tuple(
            jitter if self.jitter and length > native.cells else 0
            for jitter, length in zip(views.window_jitter(window, stride), size, strict=True)
        )
        moved = views.jittered(found, size, reach, moment.generator if self.jitter else None)
        wide = views.padded(x, reach)

        def predict(group: list[views.View]) -> torch.Tensor:
            return noise_of(torch.cat([view.of(wide) for view in group]), [(view.top, view.left) for view in group])

        return views.unpadded(views.averaged(predict, moved, wide, self.view_batch), reach)


@dataclass(frozen=True)
class RectifiedHR(Way):
    """RectifiedHR (Yang et al., arXiv 2503.02537): one run whose size and guidance rise, with fresh noise each time.

    Args:
        recipe: how the run is divided; None takes the published one for the zoom.
    """

    name: ClassVar[str] = "rectifiedhr"
    segments: ClassVar[bool] = True

    recipe: rectifiedhr.Recipe | None = None

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        return cls(rectifiedhr.Recipe(**{"count": 2, **settings}) if settings else None)

    def plan(self, size: tuple[int, int], native: Native, steps: int) -> list[Stage]:
        recipe = self.recipe or rectifiedhr.recipe_for(math.sqrt(size[0] * size[1]) / native.size[0])
        base = native_shape(*size, native.size, native.multiple) if recipe.count > 1 else size
        sizes = rectifiedhr.sizes(base, size, recipe.count, multiple=native.multiple)
        lengths = rectifiedhr.segment_lengths(rectifiedhr.switch_steps(recipe, steps))
        scales = rectifiedhr.guidance_scales(recipe)
        return [
            Stage(*own, length, guidance_factor=scale / scales[0], sharpen=0.0)
            for own, length, scale in zip(sizes, lengths, scales, strict=True)
        ]

    def keep(self, stages: Sequence[Stage], index: int, steps: int, *, native_draft: bool) -> Sequence[int]:
        last = self.first_step(stages, index, steps) + stages[index].steps - 1
        return () if index + 1 == len(stages) else (last,)


WAYS: Mapping[str, type[Way]] = {
    way.name: way for way in (Cascade, FreeScaleCascade, DemoFusion, RectifiedHR, CUpscale, Shrunk, Plain)
}


def as_way(highres: Way | str, own: Mapping[str, Any] | None = None) -> Way:
    """A way given as a value, by its name, or as "freescale:cosine_scale=1" (see `gensparse.highres.ways`).

    Args:
        own: settings of the cascade that the model says of itself; those given by name go before them.

    Raises:
        ConfigError: neither, or a setting that the way does not have.
    """
    if isinstance(highres, Way):
        return highres
    asked = parse_way(highres)
    if asked.name not in WAYS:
        raise ConfigError(unknown_name("highres", asked.name, WAYS))
    if asked.name == Shrunk.name:
        return Shrunk(as_method(asked.text))
    mine = as_tuples(own or {}) if asked.name == Cascade.name else {}
    return WAYS[asked.name].of({**mine, **asked.settings})


def dilated_share(first: int, steps: int) -> int:
    """Steps of a stage that begins at `first` of `steps` in which FreeScale dilates."""
    return max(0, int(DILATED_STEPS * steps + 1e-9) - first)
