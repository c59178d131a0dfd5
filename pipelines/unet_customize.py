"""Subjects in the native stage of models of noise, UNets and PixArt; see `gensparse.pipelines.customize`."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

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
from gensparse.pipelines.unet_stages import Conditions, Levels, Run, UNetStages, noise_levels
from gensparse.subjects.inversion import Slope, inverted, seen, unseen
from gensparse.subjects.rehearsal import Noisy

BESIDE = ("latents", "clean", "prompt_embeds", "add_text_embeds", "add_time_ids")
"""Tensors of callbacks that have rows of the references too."""


class UNetCustomizes(Customizes, UNetStages):
    """Mixed into a pipeline of such a model in front of its stages; the pipeline encodes the prompts of references."""

    def _told(self, prompts: list[str], like: Conditions, run: Run) -> Conditions:
        """What the model is told about the references: their prompts [R, T, C], and pooled ones of SDXL."""
        raise NotImplementedError

    def _denoise_native(
        self, stage: Stage, stages: Sequence[Stage], noise: torch.Tensor, keep: Sequence[int], run: Run
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        cast = self._cast
        if cast is None:
            return super()._denoise_native(stage, stages, noise, keep, run)
        if run.way.attention("dense", native=True) is not None or run.attention not in ("auto", "dense"):
            self._check_attention(stages, run)
        count, halves = len(cast.references), 2 if self.do_classifier_free_guidance else 1
        scheduler = run.make_scheduler()
        levels = noise_levels(scheduler)
        number = {float(t): k for k, t in enumerate(levels.timesteps)}
        end = stage.steps if run.way.segments else run.steps
        timesteps = [t for t in scheduler.timesteps if number[float(t)] < end]
        self._num_timesteps = len(timesteps)
        if cast.worded:
            return self._denoise_by_words(cast, stage, stages, noise, keep, run)
        if cast.unplaced:
            found = self._rehearsed(stage, stages, noise, keep, replace(run, attention="dense"))
            if self.interrupt:
                return found
            cast = self._placed(cast, found[0], stage, run, run.vae_tile)

        own = run.conditions(stage, run.guidance_scale)
        told = self._told(cast.prompts, own, run)
        fitted = [item.fitted((stage.height, stage.width)) for item in cast.references]
        clean = self._clean(cast, fitted, stage, run.vae_tile, run.device)
        fitted = self._cut_out(cast, fitted, clean, stage, run)
        path = self._inverted(clean, told, levels, run) if cast.inverted else None
        scaled = scales_latents(scheduler)

        def rows(level: int) -> torch.Tensor:
            """Latents of the references at a level, in the form of the scheduler."""
            sigma = levels.sigmas[level]
            x = clean + sigma * noise_at(clean, cast, level) if path is None else path[level]
            return (x if scaled else seen(x, sigma)).to(run.dtype)

        def behind(i: int) -> torch.Tensor:
            return rows(number[float(timesteps[i + 1])] if i + 1 < len(timesteps) else end)

        start = rows(0) / scheduler.init_noise_sigma
        if cast.method.name == "masactrl":  # as published: the picture begins where its source does
            noise = start[:1].to(noise).expand_as(noise)
        on_step = told_to_callbacks(run.on_step, run.on_step_inputs, behind, count, run.batch, BESIDE)
        beside = replace(
            run,
            batch=run.batch + count,
            attention="dense",
            conditions=lambda stage, scale: told_beside(told, own, count, halves),
            extra_step_kwargs=_with_generators(run.extra_step_kwargs, count),
            on_step=on_step,
            on_step_inputs=tuple(dict.fromkeys((*run.on_step_inputs, "latents"))),
        )
        with self._shared(cast, fitted, stage):
            out, history = super()._denoise_native(stage, stages, joined(start, noise), keep, beside)
        return out[count:], {step: x[count:] for step, x in history.items()}

    def _denoise_by_words(
        self,
        cast: Cast,
        stage: Stage,
        stages: Sequence[Stage],
        noise: torch.Tensor,
        keep: Sequence[int],
        run: Run,
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Stage 0 with subjects that are known by words; for features to inject, it runs twice from the same noise."""
        run = replace(run, attention="dense")
        with self._told_by_words(cast) as handle:
            if getattr(cast.method, "inject", 0):
                with handle.rehearsal():
                    found = self._rehearsed(stage, stages, noise, keep, run)
                if self.interrupt:
                    return found
                handle.restart(steps=self._num_timesteps)
            return super()._denoise_native(stage, stages, noise, keep, run)

    def _rehearsed(
        self, stage: Stage, stages: Sequence[Stage], noise: torch.Tensor, keep: Sequence[int], run: Run
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Stage 0 without subjects, which leaves nothing behind but what it gives."""
        restored = _states(run.extra_step_kwargs)
        found = super()._denoise_native(stage, stages, noise, keep, run)
        if not self.interrupt:
            self.attention_report.pop()
            restored()
            self._guidance_scale = run.guidance_scale  # a callback may have ended guidance
        return found

    def _answers(
        self, prompts: list[str], drawn: torch.Tensor, stage: Stage, run: Run
    ) -> Callable[[Noisy], torch.Tensor]:
        levels = noise_levels(run.make_scheduler())
        told = self._told(prompts, run.conditions(stage, run.guidance_scale), run)
        slope, clean = self._slope(told, levels, run), unseen(drawn.float(), levels.sigmas[-1])
        shares = [sigma / (1 + sigma) for sigma in levels.sigmas[:-1]]

        def answer(noisy: Noisy) -> torch.Tensor:
            k = nearest_level(shares, noisy.share)
            x = clean + levels.sigmas[k] * noise_of(noisy, clean)
            return slope(x.expand(len(prompts), *x.shape[1:]), k)

        return answer

    def _check_attention(self, stages: Sequence[Stage], run: Run) -> None:
        """ConfigError where the first stage has a method of its own beside that of the subjects."""
        if run.way.attention("dense", native=True) is not None:
            raise ConfigError(
                f"highres={run.way.name!r} has its own attention in the first stage, where subjects act; use 'cascade'."
            )
        if run.way.attention(run.attention, native=True) is not None:
            raise ConfigError(
                f"attention={run.attention!r} would act in the first stage, where subjects do; use highres='cascade', "
                "whose larger stages take it, or leave attention out."
            )

    def _inverted(self, clean: torch.Tensor, told: Conditions, levels: Levels, run: Run) -> list[torch.Tensor]:
        """x = picture + sigma * noise at every level, under the prompts of the references, without guidance."""
        return inverted(unseen(clean, levels.sigmas[-1]), levels.sigmas, self._slope(told, levels, run))

    def _slope(self, told: Conditions, levels: Levels, run: Run) -> Slope:
        """The noise that the model predicts in x = picture + sigma * noise at a level, without guidance."""

        def slope(x: torch.Tensor, k: int) -> torch.Tensor:
            t, sigma = levels.timesteps[k], levels.sigmas[k]
            z = seen(x, sigma)
            prediction = self._call(z.to(run.dtype), t, told, 1, 1, None, None)
            return self._noise_in(prediction.float(), z, sigma)

        return slope


# --- pure helpers ---------------------------------------------------------------------------------------------------


def told_like(
    embeds: torch.Tensor,
    pooled: torch.Tensor | None,
    own: Conditions,
    halves: int,
    mask: torch.Tensor | None = None,
) -> Conditions:
    """Conditions of references by their prompts; what else the model is told is as for the first picture.

    Args:
        embeds: [R, T, C]; pooled: [R, P]; mask: [R, T], tokens that are no padding.
        own: of the pictures, with `halves` halves of guidance.
    """

    def first(x: torch.Tensor | None, parts: int = halves) -> torch.Tensor | None:
        return None if x is None else x.chunk(parts)[-1][:1].expand(len(embeds), *x.shape[1:])

    images = None if own.images is None else [first(x) for x in own.images]
    return Conditions(embeds, None, pooled, first(own.time_ids), images, first(own.timestep, 1), mask)


def told_beside(told: Conditions, own: Conditions, count: int, halves: int) -> Conditions:
    """The conditions of pictures with references in front of them; their unconditional half is that of the pictures."""

    def both(references: torch.Tensor | None, x: torch.Tensor | None, parts: int = halves) -> torch.Tensor | None:
        if x is None or references is None:
            return x
        unconditional = x.chunk(parts)[0][:1].expand(count, *x.shape[1:])
        every = references.to(x) if parts == 1 else torch.cat([unconditional, references.to(x)])
        return joined(every, x, parts)

    images = own.images
    if images is not None and told.images is not None:
        images = [both(a, b) for a, b in zip(told.images, images, strict=True)]
    return Conditions(
        both(told.embeds, own.embeds),
        own.negative,
        both(told.pooled, own.pooled),
        both(told.time_ids, own.time_ids),
        images,
        both(told.timestep, own.timestep, 1),
        both(told.mask, own.mask),
    )


def scales_latents(scheduler: object) -> bool:
    """Whether latents of a scheduler are picture + sigma * noise, which it scales for the model."""
    probe = copy.deepcopy(scheduler)
    levels = noise_levels(scheduler)
    scaled = float(probe.scale_model_input(torch.ones(1, device=probe.timesteps.device), probe.timesteps[0]))
    return math.isclose(scaled, 1 / math.sqrt(1 + levels.sigmas[0] ** 2), rel_tol=1e-3)


def _states(settings: dict) -> Callable[[], None]:
    """Gives back the states that the generators of a scheduler's step have now."""
    given = settings.get("generator")
    generators = given if isinstance(given, list) else [] if given is None else [given]
    states = [generator.get_state() for generator in generators]

    def restore() -> None:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)

    return restore


def _with_generators(settings: dict, count: int) -> dict:
    """Settings of a scheduler's step whose generators, where there is one per picture, are enough for references."""
    given = settings.get("generator")
    if not isinstance(given, list):
        return settings
    more = [torch.Generator(given[0].device).manual_seed(number) for number in range(count)]
    return {**settings, "generator": [*more, *given]}
