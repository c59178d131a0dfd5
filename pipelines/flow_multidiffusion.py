"""MultiDiffusion with regions on flow transformers; see `gensparse.pipelines.multidiffusion`."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from gensparse.errors import ConfigError
from gensparse.highres.stages import Stage
from gensparse.pipelines.flow_stages import FlowStages, Run, Velocity
from gensparse.pipelines.multidiffusion import NAME, Fusion, MultiDiffuses, Scene
from gensparse.subjects.areas import Region


class FlowMultiDiffuses(MultiDiffuses, FlowStages):
    """Mixed into a pipeline of a flow transformer in front of its stages; the pipeline encodes the prompts of regions.

    What the pipeline binds to its `_velocity` (prompts, scales) is `bound` here.
    """

    def _bound_region(self, item: Region, bound: tuple[Any, ...], run: Run) -> tuple[tuple[Any, ...], Run]:
        """`bound` and the run with a region's prompts in place of the call's, for all pictures."""
        raise NotImplementedError

    def _denoise_native(self, stage: Stage, latents: torch.Tensor, keep: range, run: Run):
        fusion = self._fusion
        if fusion is None:
            return super()._denoise_native(stage, latents, keep, run)
        scene = self._native_scene(fusion, stage, latents, run)
        with fusion.during(scene):
            out = super()._denoise_native(stage, latents, keep, run)
            self.attention_report[-1]["regions"] = fusion.report(scene)
        return out

    def _denoise_guided(self, index: int, stage: Stage, noise: torch.Tensor, guide: Any, keep: range, run: Run):
        fusion = self._fusion
        if fusion is None or not fusion.settings.larger:
            return super()._denoise_guided(index, stage, noise, guide, keep, run)
        with fusion.during(None):
            out = super()._denoise_guided(index, stage, noise, guide, keep, run)
            self.attention_report[-1]["regions"] = fusion.report(None)
        return out

    def _velocity(self, *given: Any) -> Velocity:
        *bound, index, stage, run = given
        fusion = self._fusion
        velocity_of: Callable[..., Velocity] = super()._velocity
        if fusion is None or not fusion.acting:
            return velocity_of(*bound, index, stage, run)
        if fusion.texts is None:
            fusion.texts = [self._bound_region(item, tuple(bound), run) for item in fusion.regions]
        scene = fusion.scene
        part_of = stage if scene is None else self._stage_of(scene, stage)
        velocities = [velocity_of(*bound, index, part_of, run)]
        for own, told in fusion.texts:
            # this stage's run, with the texts of the region
            own_run = replace(run, told=dict(told.told), guided=told.guided)
            velocities.append(velocity_of(*own, index, part_of, own_run))
        half = self._patch // 2

        def velocity(latents: torch.Tensor, t: torch.Tensor, pad: int, step: int) -> torch.Tensor:
            z = self._unpack(latents, stage, pad)
            cells = tuple(side // self.vae_scale_factor for side in (stage.height, stage.width))
            masks = fusion.masks(cells, self.vae_scale_factor, z.device)
            if pad:
                masks = F.pad(masks, (half,) * 4, mode="replicate")

            def predict(prompt: int, part: torch.Tensor, _view: Any) -> torch.Tensor:
                return self._unpack(velocities[prompt](self._pack(part), t, pad, step), part_of, pad)

            return self._pack(fusion.fused(z, masks, step, predict))

        return velocity

    def _stage_of(self, scene: Scene, stage: Stage) -> Stage:
        """A view as a stage of its own."""
        h0, h1, w0, w1 = scene.views[0]
        scale = self.vae_scale_factor
        return replace(stage, height=(h1 - h0) * scale, width=(w1 - w0) * scale)

    def _native_scene(self, fusion: Fusion, stage: Stage, latents: torch.Tensor, run: Run) -> Scene:
        noise = self._unpack(latents, stage)
        cells = (noise.shape[-2], noise.shape[-1])
        fusion.masks(cells, self.vae_scale_factor, noise.device)  # regions without a cell are refused before a call
        views = [(0, cells[0], 0, cells[1])]
        if run.position == "base":  # other rules have one table of positions, for the whole picture
            views = fusion.settings.views(cells, self.native_side * self._patch, self._patch)
        if len(views) > 1 and run.beside:
            raise ConfigError(
                f"control_image is given, and {NAME} sees a picture of {stage.width}x{stage.height} in windows, which "
                "ControlNets do not; leave one of both out, or use highres='cascade'."
            )

        def noised(clean: torch.Tensor, noise: torch.Tensor, step: int) -> torch.Tensor:
            return torch.lerp(clean, noise, run.sigmas[step])

        return self._scene(fusion, views, run.steps, noise, noised, run.wishes.vae_tile)
