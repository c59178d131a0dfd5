"""MultiDiffusion with regions on models of noise, UNets and PixArt; see `gensparse.pipelines.multidiffusion`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from gensparse.errors import ConfigError, short
from gensparse.highres.stages import Stage, StageResult
from gensparse.pipelines.multidiffusion import NAME, Fusion, MultiDiffuses, Scene
from gensparse.pipelines.unet_stages import Conditions, Run, UNetStages, noise_levels
from gensparse.pipelines.way import Texts
from gensparse.subjects.inversion import seen

WINDOWED = ("demofusion", "c_upscale")
"""Ways that denoise windows of the picture on their own."""


class Told(NamedTuple):
    """What a model is told about one prompt: embeds [1, T, C], pooled [1, P] of SDXL, and mask [1, T] of PixArt."""

    embeds: torch.Tensor
    pooled: torch.Tensor | None = None
    mask: torch.Tensor | None = None


class UNetMultiDiffuses(MultiDiffuses, UNetStages):
    """Mixed into a pipeline of such a model in front of its stages; the pipeline encodes the prompts of regions."""

    def _told_region(self, prompt: str, negative: str | None, run: Run) -> tuple[Told, Told | None]:
        """What the model is told about a region; of the unconditional half None for what it is told about the rest."""
        raise NotImplementedError

    def _denoise_native(
        self, stage: Stage, stages: Sequence[Stage], noise: torch.Tensor, keep: Sequence[int], run: Run
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        fusion = self._fusion
        if fusion is None:
            return super()._denoise_native(stage, stages, noise, keep, run)
        self._prepare_regions(fusion, run)
        scene = self._native_scene(fusion, stage, noise, run)
        with fusion.during(scene):
            out = super()._denoise_native(stage, stages, noise, keep, run)
            self.attention_report[-1]["regions"] = fusion.report(scene)
        return out

    def _denoise_larger(
        self,
        index: int,
        stages: Sequence[Stage],
        noise: torch.Tensor,
        smaller: StageResult | torch.Tensor,
        keep: Sequence[int],
        run: Run,
        windows: torch.Generator,
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        fusion = self._fusion
        if fusion is None or not fusion.settings.larger:
            return super()._denoise_larger(index, stages, noise, smaller, keep, run, windows)
        self._prepare_regions(fusion, run)
        with fusion.during(None):
            out = super()._denoise_larger(index, stages, noise, smaller, keep, run, windows)
            self.attention_report[-1]["regions"] = fusion.report(None)
        return out

    def _predict(
        self,
        z: torch.Tensor,
        t: torch.Tensor,
        conditions: Conditions,
        scale: float,
        views: int = 1,
        time_ids: torch.Tensor | None = None,
        texts: Texts | None = None,
    ) -> torch.Tensor:
        fusion, predict_one = self._fusion, super()._predict
        if fusion is None or not fusion.acting:
            return predict_one(z, t, conditions, scale, views, time_ids, texts)
        assert fusion.texts is not None, "told before every stage"
        scene, guided = fusion.scene, self.do_classifier_free_guidance
        told = [conditions, *(_beside(own, conditions, len(z), guided) for own in fusion.texts)]
        masks = fusion.masks((z.shape[-2], z.shape[-1]), self.vae_scale_factor, z.device)

        def predict(prompt: int, part: torch.Tensor, view: tuple[int, int, int, int]) -> torch.Tensor:
            crop = None if scene is None or not scene.windowed else scene.told(view, guided)
            return predict_one(part, t, told[prompt], scale, 1, crop, None)

        return fusion.fused(z, masks, 0 if scene is None else scene.number(t), predict)

    def _prepare_regions(self, fusion: Fusion, run: Run) -> None:
        """Encode the prompts of the regions, once.

        Raises:
            ConfigError: a way with windows, or negative prompts without guidance.
        """
        if run.way.name in WINDOWED:
            raise ConfigError(
                f"highres={run.way.name!r} denoises windows under its own prompts, and {NAME} has regions; use "
                "highres='cascade' or 'none'."
            )
        if fusion.texts is not None:
            return
        guided = self.do_classifier_free_guidance
        for item in fusion.regions:
            if item.negative is not None and not guided:
                raise ConfigError(
                    f"The region {short(item.prompt)} has a negative prompt, which acts by guidance; pass a "
                    "guidance_scale above 1, or leave it out."
                )
        fusion.texts = [self._told_region(item.prompt, item.negative, run) for item in fusion.regions]

    def _native_scene(self, fusion: Fusion, stage: Stage, noise: torch.Tensor, run: Run) -> Scene:
        cells = (noise.shape[-2], noise.shape[-1])
        fusion.masks(cells, self.vae_scale_factor, noise.device)  # regions without a cell are refused before a call
        settings, numbers = fusion.settings, {float(t): k for k, t in enumerate(run.levels.timesteps)}
        sigmas = noise_levels(run.make_scheduler()).sigmas if settings.first(run.steps) else ()

        def noised(clean: torch.Tensor, noise: torch.Tensor, step: int) -> torch.Tensor:
            return seen(clean + sigmas[step] * noise, sigmas[step])

        def told(view: tuple[int, int, int, int], guided: bool) -> torch.Tensor | None:
            return run.time_ids(stage, [(view[0], view[2])], 2 if guided else 1)

        views = settings.views(cells, self.native.cells, self.native.patch)
        scene = self._scene(fusion, views, run.steps, noise, noised, run.vae_tile)
        return replace(scene, number=lambda t: numbers[float(t)], told=told)


# --- pure helpers ---------------------------------------------------------------------------------------------------


def _beside(told: tuple[Told, Told | None], own: Conditions, batch: int, guided: bool) -> Conditions:
    """The conditions of the call with a region's prompts in place of its own, for all pictures."""
    positive, negative = told

    def rows(name: str) -> torch.Tensor | None:
        given, new = getattr(own, name), getattr(positive, name)
        if given is None or new is None:
            return given
        new = new.to(given).expand(batch, *new.shape[1:])
        if not guided:
            return new
        first = given.chunk(2)[0]
        if negative is not None:
            first = getattr(negative, name).to(given).expand(batch, *new.shape[1:])
        if first.shape != new.shape:
            raise ConfigError(
                f"Prompts of regions have {new.shape[1]} tokens, and the call's negative embeddings {first.shape[1]}; "
                "give every region a negative prompt, or pass negative_prompt in place of embeddings."
            )
        return torch.cat([first, new])

    return replace(own, embeds=rows("embeds"), pooled=rows("pooled"), mask=rows("mask"))
