"""Several subjects in one FLUX picture, each by a picture of it. Nothing was published for FLUX: it is ours."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from diffusers.utils import replace_example_docstring

from gensparse.errors import ConfigError
from gensparse.highres.stages import Stage
from gensparse.methods import Method
from gensparse.pipelines.customize import Cast, Customizes, joined, noise_at, told_to_callbacks
from gensparse.pipelines.flow_stages import Run, Velocity
from gensparse.pipelines.flux_highres import Condition, FluxHighresPipeline, Prompts
from gensparse.subjects.inversion import inverted
from gensparse.subjects.references import Reference

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from gensparse import Reference
        >>> from gensparse.pipelines import FluxCustomizePipeline

        >>> pipe = FluxCustomizePipeline.from_pretrained("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16)
        >>> pipe.enable_model_cpu_offload()
        >>> cat = Reference("cat", "cat.png", mask="cat_mask.png", prompt="a cat on a sofa")
        >>> image = pipe("a cat in the snow", subjects=[cat], height=2048, width=2048).images[0]
        >>> image.save("snow.png")
        ```
"""


class FluxCustomizePipeline(Customizes, FluxHighresPipeline):
    r"""
    Text and pictures of subjects to image for FLUX.1-type models, at any size.

    Components are those of [`FluxPipeline`]. Load it with `from_pretrained`, or share the weights of a loaded pipeline:
    `FluxCustomizePipeline.from_pipe(pipe)`.
    """

    def _init_stages(self) -> None:
        super()._init_stages()
        self._told: Condition | None = None

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *args: Any,
        subjects: Sequence[Reference] = (),
        subject_method: Method | str | Mapping[str, Any] = "freecustom",
        **kwargs: Any,
    ) -> FluxPipelineOutput | tuple:
        r"""
        Generate a picture with given subjects.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                Of the picture.
            args, kwargs:
                All other arguments of [`FluxHighresPipeline`]; `attention` acts in the stages beyond the native one.
                Step callbacks see the tensors of the pictures, without those of the references.
            subjects (`Sequence[Reference]`, *optional*):
                At most five subjects with a picture of each; without any it is [`FluxHighresPipeline`] to the bit.
            subject_method (`str` or `Method`, defaults to `"freecustom"`):
                "freecustom", "isolation", "reference_only", "storydiffusion", "masactrl" or "style_aligned", with
                settings. The last two see the picture by its inversion, the others noised.

        Examples:

        Returns:
            [`~pipelines.flux.FluxPipelineOutput`] or `tuple`: the pictures.

        Raises:
            ConfigError: subjects without what the method needs, or a way or attention that leaves them no place.
        """
        with self._with_subjects(prompt, subjects, subject_method, "FLUX.1", kwargs):
            return super().__call__(prompt, *args, **kwargs)

    def _denoise_native(self, stage: Stage, latents: torch.Tensor, keep: range, run: Run):
        cast = self._cast
        if cast is None:
            return super()._denoise_native(stage, latents, keep, run)
        self._check_native(cast, stage, run)
        count = len(cast.references)
        self._num_timesteps = run.steps
        told = Condition(
            *self.encode_prompt(
                prompt=cast.prompts,
                prompt_2=None,
                device=run.device,
                num_images_per_prompt=1,
                max_sequence_length=run.text,
                lora_scale=self.joint_attention_kwargs.get("scale"),
            )
        )
        fitted = [item.fitted((stage.height, stage.width)) for item in cast.references]
        clean = self._pack(self._clean(cast, fitted, stage, run.wishes.vae_tile, run.device))
        path = self._inverted(clean, told, stage, run) if cast.inverted else None

        def rows(level: int) -> torch.Tensor:
            """Latents of the references at a level."""
            sigma = run.sigmas[level]
            z = torch.lerp(clean, noise_at(clean, cast, level), sigma) if path is None else path[level]
            return z.to(run.dtype)

        start = rows(0)
        if cast.method.name == "masactrl":  # as published: the picture begins where its source does
            latents = start[:1].to(latents).expand_as(latents)
        wishes, names = run.wishes, ("latents", "prompt_embeds", "clean")
        inputs = wishes.on_step_inputs
        on_step = told_to_callbacks(wishes.on_step, inputs, lambda i: rows(i + 1), count, run.batch, names)
        more = tuple(dict.fromkeys((*inputs, "latents")))
        embeds = joined(told.embeds, run.told["prompt_embeds"])
        beside = replace(
            run,
            batch=run.batch + count,
            wishes=replace(wishes, attention="dense", on_step=on_step, on_step_inputs=more),
            told={**run.told, "prompt_embeds": embeds},
        )
        self._told = told
        try:
            with self._shared(cast, fitted, stage):
                out, history = super()._denoise_native(stage, joined(start, latents), keep, beside)
        finally:
            self._told = None
        return out[count:], {step: x[count:] for step, x in history.items()}

    def _velocity(self, prompts: Prompts, index: int, stage: Stage, run: Run) -> Velocity:
        if self._told is not None:
            prompts = _beside(self._told, prompts)
        return super()._velocity(prompts, index, stage, run)

    def _inverted(self, clean: torch.Tensor, told: Condition, stage: Stage, run: Run) -> list[torch.Tensor]:
        """Latents of the references at every level, under their prompts, without guidance."""
        own = replace(run, batch=len(clean), told={"prompt_embeds": told.embeds}, guided=False)
        velocity = super()._velocity(Prompts(told, None, 1.0, 1.0), 0, stage, own)
        timesteps = run.make_scheduler().timesteps

        def slope(z: torch.Tensor, k: int) -> torch.Tensor:
            return velocity(z.to(run.dtype), timesteps[k], 0, k).float()

        return inverted(clean, run.sigmas, slope)

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


# --- pure helpers ---------------------------------------------------------------------------------------------------


def _beside(told: Condition, prompts: Prompts) -> Prompts:
    """Prompts of pictures with those of the references in front; the negative ones are all that of the pictures."""
    count, negative = len(told.embeds), prompts.negative
    positive = replace(
        prompts.positive,
        embeds=joined(told.embeds, prompts.positive.embeds),
        pooled=joined(told.pooled, prompts.positive.pooled),
    )
    if negative is not None:
        first = [x[:1].expand(count, *x.shape[1:]) for x in (negative.embeds, negative.pooled)]
        negative = replace(negative, embeds=joined(first[0], negative.embeds), pooled=joined(first[1], negative.pooled))
    return replace(prompts, positive=positive, negative=negative)
