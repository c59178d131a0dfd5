"""Subjects in the native stage of flow transformers; see `gensparse.pipelines.customize`.

Methods with given pictures were published for UNets alone: here they are ours.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from gensparse.errors import ConfigError
from gensparse.highres.stages import Stage
from gensparse.pipelines.customize import (
    Cast,
    Customizes,
    joined,
    nearest_level,
    noise_at,
    noise_of,
    told_to_callbacks,
)
from gensparse.pipelines.flow_stages import FlowStages, Run, Velocity
from gensparse.subjects.inversion import inverted
from gensparse.subjects.rehearsal import Noisy


class FlowCustomizes(Customizes, FlowStages):
    """Mixed into a pipeline of such a model in front of its stages; the pipeline encodes prompts of references."""

    def _init_stages(self) -> None:
        super()._init_stages()
        self._told: Any = None  # while references stand beside the pictures: what `_told_of` gave

    def _told_of(self, prompts: list[str], run: Run) -> Any:
        """What the transformer is told about references with these prompts."""
        raise NotImplementedError

    def _told_beside(self, told: Any, run: Run) -> Mapping[str, torch.Tensor]:
        """`run.told` with the rows of the references in front of those of the pictures, in every half of guidance."""
        raise NotImplementedError

    def _velocity_alone(self, told: Any, stage: Stage, run: Run) -> Velocity:
        """The velocity of the references alone, without guidance; `run` has their number of pictures."""
        raise NotImplementedError

    def _denoise_native(self, stage: Stage, latents: torch.Tensor, keep: range, run: Run):
        cast = self._cast
        if cast is None:
            return super()._denoise_native(stage, latents, keep, run)
        self._check_native(cast, stage, run)
        self._num_timesteps = run.steps
        if cast.worded:
            dense = replace(run, wishes=replace(run.wishes, attention="dense"))
            with self._told_by_words(cast):
                return super()._denoise_native(stage, latents, keep, dense)
        if cast.unplaced:
            plain = replace(run, wishes=replace(run.wishes, attention="dense"), told=dict(run.told))
            drawn, history = super()._denoise_native(stage, latents, keep, plain)
            if self.interrupt:
                return drawn, history
            self.attention_report.pop()
            cast = self._placed(cast, drawn, stage, run, run.wishes.vae_tile)
        count = len(cast.references)
        told = self._told_of(cast.prompts, run)
        fitted = [item.fitted((stage.height, stage.width)) for item in cast.references]
        clean = self._pack(self._clean(cast, fitted, stage, run.wishes.vae_tile, run.device))
        fitted = self._cut_out(cast, fitted, clean, stage, run)
        path = self._inverted(clean, told, stage, run) if cast.inverted else None

        def rows(level: int) -> torch.Tensor:
            """Latents of the references at a level."""
            sigma = run.sigmas[level]
            z = torch.lerp(clean, noise_at(clean, cast, level), sigma) if path is None else path[level]
            return z.to(run.dtype)

        start = rows(0)
        if cast.method.name == "masactrl":  # as published: the picture begins where its source does
            latents = start[:1].to(latents).expand_as(latents)
        wishes, names = run.wishes, ("latents", "clean", *run.told)
        inputs = wishes.on_step_inputs
        on_step = told_to_callbacks(wishes.on_step, inputs, lambda i: rows(i + 1), count, run.batch, names)
        more = tuple(dict.fromkeys((*inputs, "latents")))
        beside = replace(
            run,
            batch=run.batch + count,
            wishes=replace(wishes, attention="dense", on_step=on_step, on_step_inputs=more),
            told=dict(self._told_beside(told, run)),
        )
        self._told = told
        try:
            with self._shared(cast, fitted, stage):
                out, history = super()._denoise_native(stage, joined(start, latents), keep, beside)
        finally:
            self._told = None
        return out[count:], {step: x[count:] for step, x in history.items()}

    def _inverted(self, clean: torch.Tensor, told: Any, stage: Stage, run: Run) -> list[torch.Tensor]:
        """Latents of the references at every level, under their prompts, without guidance."""
        velocity = self._velocity_alone(told, stage, replace(run, batch=len(clean), guided=False))
        timesteps = run.make_scheduler().timesteps

        def slope(z: torch.Tensor, k: int) -> torch.Tensor:
            return velocity(z.to(run.dtype), timesteps[k], 0, k).float()

        return inverted(clean, run.sigmas, slope)

    def _answers(
        self, prompts: list[str], drawn: torch.Tensor, stage: Stage, run: Run
    ) -> Callable[[Noisy], torch.Tensor]:
        alone = replace(run, batch=len(prompts), guided=False)
        velocity = self._velocity_alone(self._told_of(prompts, run), stage, alone)
        timesteps, clean = run.make_scheduler().timesteps, drawn.float()

        def answer(noisy: Noisy) -> torch.Tensor:
            k = nearest_level(run.sigmas[:-1], noisy.share)
            z = torch.lerp(clean, noise_of(noisy, clean), run.sigmas[k])
            z = z.expand(len(prompts), *z.shape[1:]).to(run.dtype)
            return self._unpack(velocity(z, timesteps[k], 0, k), stage)

        return answer

    def _check_native(self, cast: Cast, stage: Stage, run: Run) -> None:
        """ConfigError where the first stage has attention or positions of its own beside those of the subjects."""
        wanted = run.wishes.attention
        if wanted not in ("auto", "dense") and self._stage_attention(stage, run) is not None:
            raise ConfigError(
                f"attention={wanted!r} would act in the first stage, where subjects do; use highres='cascade', whose "
                "larger stages take it, or leave attention out."
            )
        if cast.inverted and run.position != "base" and self._grid(stage) != run.native_grid:
            raise ConfigError(
                f"{cast.method.name} inverts pictures at positions of training, and position={run.position!r} moves "
                "them; use highres='cascade'."
            )
