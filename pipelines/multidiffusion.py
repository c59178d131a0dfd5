"""MultiDiffusion with regions (Bar-Tal et al., arXiv 2302.08113) in stages: one call of the denoiser per region.

Published is a step of the scheduler for each region and view, and the mean of what the steps give. Here predictions
are averaged, and the mean is stepped once. Where steps are linear in latents and prediction (DDIM, Euler, flow
matching) that is the same number, and schedulers with a memory or noise of their own may be used too.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Self

import torch

from gensparse.errors import ConfigError, short, unknown_name
from gensparse.methods import parse_value
from gensparse.methods.checks import flag, whole
from gensparse.methods.subject_run import mixed
from gensparse.pipelines.cascade import Stages
from gensparse.subjects.areas import Region, Regions
from gensparse.subjects.multidiffusion import View, coloured, fused, latent_masks, views_of

NAME = "multidiffusion"

SLACK = 1.1
"""A picture of at most so many times the trained area is seen as a whole; larger ones in windows."""


@dataclass(frozen=True)
class MultiDiffusion:
    """How a picture is fused from its regions.

    Args:
        bootstrap: first steps in which the prompts of regions see a plain colour outside of their region, so that what
            they ask for begins inside; a number, or a share of the run (published: 20 of 50). It needs a scheduler with
            noise levels and one call per step; 0 does without.
        colours: plain colours that are drawn from, one per region and step (published: 20).
        window: latent cells of the square views of a picture beyond the trained size (published: 64 of Stable
            Diffusion); by default the trained size, and one view where the picture is about that large.
        stride: cells between views; by default an eighth of the window, as published.
        larger: whether stages beyond the first one have regions too; each costs as many times more.
        seed: of the colours.

    Raises:
        ConfigError: a setting of another type or range.
    """

    name: ClassVar[str] = NAME

    bootstrap: int | float = 0.4
    colours: int = 20
    window: int | None = None
    stride: int | None = None
    larger: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        share = self.bootstrap
        number = isinstance(share, int | float) and not isinstance(share, bool)
        if not number or not share >= 0 or (isinstance(share, float) and share > 1):
            raise ConfigError(
                f"{NAME} bootstrap={share!r} is not allowed; pass a number of steps from 0 up, or a share of the run "
                "from 0.0 to 1.0."
            )
        whole(NAME, "colours", self.colours)
        for name in ("window", "stride"):
            if getattr(self, name) is not None:
                whole(NAME, name, getattr(self, name))
        if self.window is not None and self.stride is not None and self.stride > self.window:
            raise ConfigError(
                f"{NAME} stride={self.stride} is longer than window={self.window} and leaves gaps; pass a shorter one."
            )
        flag(NAME, "larger", self.larger)
        whole(NAME, "seed", self.seed, low=0)

    @classmethod
    def of(cls, value: Any) -> Self | None:
        """From a value, "multidiffusion:bootstrap=0.2,window=96", or the dict of `to_dict`; None for another method.

        Raises:
            ConfigError: settings that it does not have, or of another form.
        """
        if isinstance(value, MultiDiffusion):
            return value
        if isinstance(value, Mapping):
            return cls._from({k: v for k, v in value.items() if k != "method"}) if value.get("method") == NAME else None
        if not isinstance(value, str) or value.partition(":")[0].strip() != NAME:
            return None
        given = {}
        for item in filter(None, (part.strip() for part in value.partition(":")[2].split(","))):
            key, equals, text = (part.strip() for part in item.partition("="))
            if not equals or key in given:
                raise ConfigError(
                    f"{NAME} setting {short(item)} has another form; write each once, as {NAME}:key=value,key=value."
                )
            given[key] = parse_value(text)
        return cls._from(given)

    @classmethod
    def _from(cls, given: Mapping[str, Any]) -> Self:
        known = tuple(cls.__dataclass_fields__)
        for key in given:
            if key not in known:
                raise ConfigError(unknown_name(f"setting of {NAME}", str(key), known))
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        return {"method": NAME, **asdict(self)}

    def first(self, steps: int) -> int:
        """Steps of `steps` that are bootstrapped."""
        return min(steps, self.bootstrap if isinstance(self.bootstrap, int) else round(self.bootstrap * steps))

    def views(self, cells: tuple[int, int], native: int, patch: int) -> list[View]:
        """Views of a picture.

        Args:
            cells: of its latents, (rows, columns); native: of the trained size, per side; patch: per token and axis.

        Raises:
            ConfigError: a window or stride that cuts tokens.
        """
        window = self.window
        if window is None:
            if cells[0] * cells[1] <= SLACK * native**2:
                return [(0, cells[0], 0, cells[1])]
            window = native
        stride = self.stride or max(patch, window // 8 // patch * patch)
        if window % patch or stride % patch or stride > window:
            raise ConfigError(
                f"{NAME} window={window} and stride={stride} cut the tokens of this model or leave gaps; pass "
                f"multiples of {patch}, the stride at most the window."
            )
        rows, columns = (length // patch for length in cells)
        found = views_of((rows, columns), window // patch, stride // patch)
        return [(patch * h0, patch * h1, patch * w0, patch * w1) for h0, h1, w0, w1 in found]


@dataclass(frozen=True, eq=False)
class Scene:
    """The stage that is drawn from noise.

    Args:
        views: of its latents.
        first: steps that are bootstrapped.
        noise: [B, C, h, w], what it begins from, of unit variance.
        colours: number of a colour -> its clean latents [1, C, h, w] at the size of a view.
        noised: (clean, noise, number of a step) -> latents there, as the denoiser gets them.
        draw: (step, number of a region) -> number of a colour.
        number: timestep -> number of its step; told: (view, whether guided) -> what a model of sizes and crops is told
            about it. For models of noise.
    """

    views: Sequence[View]
    first: int
    noise: torch.Tensor
    colours: Mapping[int, torch.Tensor]
    noised: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
    draw: Callable[[int, int], int]
    number: Callable[[torch.Tensor], int] = int
    told: Callable[[View, bool], torch.Tensor | None] = lambda view, guided: None

    @property
    def windowed(self) -> bool:
        return len(self.views) > 1

    def seen(self, part: torch.Tensor, mask: torch.Tensor, region: int, step: int, view: View) -> torch.Tensor:
        """What the prompt of a region sees of a view at a step."""
        if step >= self.first:
            return part
        h0, h1, w0, w1 = view
        plain = self.noised(self.colours[self.draw(step, region)], self.noise[..., h0:h1, w0:w1].float(), step)
        return coloured(part, mask > 0, plain)


@dataclass(eq=False)
class Fusion:
    """The regions of a call.

    Args:
        texts: what the family made of the regions' prompts, one entry per region; None before the first stage.
        acting: whether the stage that runs has regions; scene: where it is drawn from noise.
    """

    regions: Regions
    settings: MultiDiffusion
    texts: list[Any] | None = None
    acting: bool = False
    scene: Scene | None = None
    _masks: dict[Any, torch.Tensor] = field(default_factory=dict)

    def masks(self, cells: tuple[int, int], scale: int, device: torch.device) -> torch.Tensor:
        """Weights float32 [P + 1, 1, h, w] of the call's prompt, which has what no region covers, and of the regions.

        Args:
            cells: (h, w) of the latents; scale: pixels per cell.

        Raises:
            ConfigError: a region that has an area and no cell.
        """
        key = (cells, device)
        if key not in self._masks:
            size = (cells[0] * scale, cells[1] * scale)
            planes = torch.stack([_corners(item, size, scale) for item in self.regions])
            found = latent_masks(planes, cells)
            found[0] = torch.maximum(found[0], (found.sum(0) == 0).float())  # half-covered pixels are the call's too
            for item, mask in zip(self.regions, found[1:], strict=True):
                if not bool(mask.any()) and not _is_empty(item):
                    raise ConfigError(
                        f"The region {short(item.prompt)} covers no cell of {scale}x{scale} pixels at "
                        f"{size[1]}x{size[0]}; make it larger, or the picture."
                    )
                mask *= item.weight
            self._masks[key] = found.to(device)
        return self._masks[key]

    def fused(
        self,
        z: torch.Tensor,
        masks: torch.Tensor,
        step: int,
        predict: Callable[[int, torch.Tensor, View], torch.Tensor],
    ) -> torch.Tensor:
        """The prediction for latents z [B, C, h, w], fused from those of all prompts.

        Args:
            predict: (0 for the call's prompt, else the region's number from 1; latents of a view; the view).
        """
        scene = self.scene
        views = [(0, z.shape[-2], 0, z.shape[-1])] if scene is None else scene.views

        def denoised(number: int, prompt: int) -> torch.Tensor:
            h0, h1, w0, w1 = view = views[number]
            part = z[..., h0:h1, w0:w1]
            if scene is not None and prompt:
                part = scene.seen(part, masks[prompt, :, h0:h1, w0:w1], prompt, step, view)
            return predict(prompt, part, view)

        return fused(denoised, views, masks)[0].to(z.dtype)

    @contextmanager
    def during(self, scene: Scene | None, *, acting: bool = True) -> Iterator[None]:
        """In a stage."""
        self.acting, self.scene = acting, scene
        try:
            yield
        finally:
            self.acting, self.scene = False, None

    def report(self, scene: Scene | None) -> dict[str, Any]:
        """For the report of a stage."""
        views = 1 if scene is None else len(scene.views)
        return {**self.settings.to_dict(), "regions": len(self.regions), "views": views}


class MultiDiffuses(Stages):
    """Mixed into a pipeline of stages, in front of it; families say how a region gets into a call."""

    _fusion: Fusion | None

    def _init_stages(self) -> None:
        super()._init_stages()
        self._fusion = None

    @contextmanager
    def _with_regions(self, regions: Regions, settings: MultiDiffusion, options: Mapping[str, Any]) -> Iterator[None]:
        """For the time of one call."""
        if options.get("image") is not None and not settings.larger:
            raise ConfigError(
                f"image= begins beyond the stage in which {NAME} with larger=False acts; leave one of both out."
            )
        if getattr(getattr(self, "transformer", None), "is_cache_enabled", False):
            raise ConfigError(
                f"{NAME} calls the model for every region in turn, and its cache would take one for the other; call "
                "pipe.transformer.disable_cache() before."
            )
        self._fusion = Fusion(regions, settings)
        try:
            yield
        finally:
            self._fusion = None

    def _scene(
        self,
        fusion: Fusion,
        views: Sequence[View],
        steps: int,
        noise: torch.Tensor,
        noised: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
        vae_tile: int | str | None,
    ) -> Scene:
        """The stage that is drawn from `noise`, with the colours that its first steps need."""
        settings, first = fusion.settings, fusion.settings.first(steps)
        h0, h1, w0, w1 = views[0]
        size = ((h1 - h0) * self.vae_scale_factor, (w1 - w0) * self.vae_scale_factor)

        def draw(step: int, region: int) -> int:
            generator = torch.Generator().manual_seed(mixed(settings.seed, step, region))
            return int(torch.randint(settings.colours, (), generator=generator))

        shades = torch.rand(settings.colours, 3, generator=torch.Generator().manual_seed(mixed(settings.seed)))
        wanted = sorted({draw(step, region) for step in range(first) for region in range(1, len(fusion.regions) + 1)})
        colours = {}
        for number in wanted:
            picture = (shades[number] * 2 - 1).view(1, 3, 1, 1).expand(1, 3, *size)
            colours[number] = self._encode(picture, size, 0.0, vae_tile, noise.device).to(noise.device).float()
        return Scene(views, first, noise, colours, noised, draw)


# --- pure helpers ---------------------------------------------------------------------------------------------------


def _corners(item: Region, size: tuple[int, int], scale: int) -> torch.Tensor:
    """The first pixel of every cell, float32 in 0..1: those that nearest resampling picks."""
    plane = Regions((item,)).masks(size)[0, ::scale, ::scale]
    return torch.from_numpy(plane.copy()) / item.weight


def _is_empty(item: Region) -> bool:
    """Whether a region is without any area on purpose."""
    return item.box is not None and (item.box[0] == item.box[2] or item.box[1] == item.box[3])
