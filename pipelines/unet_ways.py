"""Ways in which UNet pipelines reach a size beyond the trained one; each says where it differs from plain stages."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F

from gensparse.errors import ConfigError, unknown_name
from gensparse.highres import demofusion, rectifiedhr, views
from gensparse.highres.freescale import DILATED_STEPS, restart_step
from gensparse.highres.stages import CascadeSettings, Stage, StageResult, native_shape, plan_stages, stage_sizes
from gensparse.methods import Auto, FreeScale, Method, as_method
from gensparse.methods.freescale import FREEU, Scaled
from gensparse.pipelines.cascade import Guide, steps_to_keep

Attention = Method | str | Mapping[str, Any]

NoiseOf = Callable[..., torch.Tensor]
"""(x [B, C, h, w], crops = None) -> the noise in it, float32; crops: (row, column) in cells of every view of the batch,
which then holds every picture once per view."""


class Native(NamedTuple):
    """The size of training: latent cells per side, and pixels per cell."""

    cells: int
    scale: int

    @property
    def size(self) -> tuple[int, int]:
        return self.cells * self.scale, self.cells * self.scale


class Moment(NamedTuple):
    """A step of a stage: timestep of 0..T, T, and what is drawn for windows."""

    t: float
    train_steps: int
    generator: torch.Generator | None


@dataclass(frozen=True)
class Way:
    """Stages that start from the enlarged smaller picture and take the last part of the noise levels."""

    name: ClassVar[str]
    keeps: ClassVar[bool] = False
    """Whether a stage needs the clean estimates of the one before."""
    segments: ClassVar[bool] = False
    """Whether stages share one run: each goes on where the one before stopped, from its clean estimate."""

    def plan(self, size: tuple[int, int], native: Native, steps: int) -> list[Stage]:
        """Stages up to `size` in pixels, native one first."""
        raise NotImplementedError

    def first_step(self, stages: Sequence[Stage], index: int, steps: int) -> int:
        """The step of the whole list with which a stage begins."""
        later = sum(stage.steps for stage in stages[index + 1 :]) if self.segments else 0
        return steps - later - stages[index].steps

    def keep(self, stages: Sequence[Stage], index: int, steps: int, *, native_draft: bool) -> Sequence[int]:
        """Steps whose clean estimates a stage leaves behind."""
        return steps_to_keep(stages, index, steps, native_draft=native_draft) if self.keeps else ()

    def attention(self, wanted: Attention, *, native: bool, dilated_steps: int = 0) -> Method | None:
        """The method of a stage, None for dense; the native one is dense.

        Args:
            dilated_steps: first steps of the stage that lie in the part of the run in which FreeScale dilates.
        """
        if native or wanted == "dense":
            return None
        return Auto() if wanted == "auto" else as_method(wanted)

    def around_native(self, unet: torch.nn.Module) -> AbstractContextManager[None]:
        """What holds during the native stage of several."""
        return nullcontext()

    def guide(self, pipe: Any, smaller: StageResult | torch.Tensor, stage: Stage, run: Any) -> Guide:
        """The smaller picture at the stage's size, as clean latents."""
        return pipe._enlarge(smaller, stage, run.vae_tile, run.device)

    def mixed(self, x: torch.Tensor, noised_guide: torch.Tensor, moment: Moment) -> torch.Tensor:
        """x before a step."""
        return x

    def noise(self, x: torch.Tensor, noise_of: NoiseOf, native: Native, moment: Moment) -> torch.Tensor:
        """The noise in x that the step removes."""
        return noise_of(x)

    def finished(self, z: torch.Tensor, guide: Guide, smaller: StageResult | torch.Tensor) -> torch.Tensor:
        """The latents of a stage after its last step."""
        return z


@dataclass(frozen=True)
class Plain(Way):
    """The size at once, as diffusers does it."""

    name: ClassVar[str] = "none"

    def plan(self, size: tuple[int, int], native: Native, steps: int) -> list[Stage]:
        return [Stage(*size, steps, sharpen=0.0)]

    def attention(self, wanted: Attention, *, native: bool, dilated_steps: int = 0) -> Method | None:
        return super().attention(wanted, native=False)


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

    def plan(self, size: tuple[int, int], native: Native, steps: int) -> list[Stage]:
        return plan_stages(*size, native.size, steps=steps, multiple=native.scale, settings=self.settings)


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

    def plan(self, size: tuple[int, int], native: Native, steps: int) -> list[Stage]:
        first, *larger = stage_sizes(*size, native.size, multiple=native.scale)
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
        phases = demofusion.phases(*size, native.size[0], multiple=native.scale)
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
        whole = views.padded_to(x, step)
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

    def plan(self, size: tuple[int, int], native: Native, steps: int) -> list[Stage]:
        recipe = self.recipe or rectifiedhr.recipe_for(math.sqrt(size[0] * size[1]) / native.size[0])
        base = native_shape(*size, native.size, native.scale) if recipe.count > 1 else size
        sizes = rectifiedhr.sizes(base, size, recipe.count, multiple=native.scale)
        lengths = rectifiedhr.segment_lengths(rectifiedhr.switch_steps(recipe, steps))
        scales = rectifiedhr.guidance_scales(recipe)
        return [
            Stage(*own, length, guidance_factor=scale / scales[0], sharpen=0.0)
            for own, length, scale in zip(sizes, lengths, scales, strict=True)
        ]

    def keep(self, stages: Sequence[Stage], index: int, steps: int, *, native_draft: bool) -> Sequence[int]:
        last = self.first_step(stages, index, steps) + stages[index].steps - 1
        return () if index + 1 == len(stages) else (last,)


WAYS: Mapping[str, type[Way]] = {way.name: way for way in (Cascade, FreeScaleCascade, DemoFusion, RectifiedHR, Plain)}


def as_way(highres: Way | str) -> Way:
    """A way given as a value or by its name.

    Raises:
        ConfigError: neither.
    """
    if isinstance(highres, Way):
        return highres
    if not isinstance(highres, str) or highres not in WAYS:
        raise ConfigError(unknown_name("highres", str(highres), WAYS))
    return WAYS[highres]()


def dilated_share(first: int, steps: int) -> int:
    """Steps of a stage that begins at `first` of `steps` in which FreeScale dilates."""
    return max(0, int(DILATED_STEPS * steps + 1e-9) - first)
