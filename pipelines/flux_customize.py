"""Several subjects in one FLUX picture, each by a picture of it. Nothing was published for FLUX: it is ours."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from diffusers.utils import replace_example_docstring

from gensparse.errors import ConfigError, short
from gensparse.highres.stages import Stage
from gensparse.methods import Method
from gensparse.pipelines.customize import Cast, joined
from gensparse.pipelines.flow_customize import FlowCustomizes
from gensparse.pipelines.flow_multidiffusion import FlowMultiDiffuses
from gensparse.pipelines.flow_stages import Run, Velocity
from gensparse.pipelines.flux_highres import Condition, FluxHighresPipeline, Prompts
from gensparse.pipelines.multidiffusion import MultiDiffusion
from gensparse.subjects.areas import Region
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


class FluxCustomizePipeline(FlowCustomizes, FlowMultiDiffuses, FluxHighresPipeline):
    r"""
    Text and pictures of subjects to image for FLUX.1-type models, at any size.

    Components are those of [`FluxPipeline`]. Load it with `from_pretrained`, or share the weights of a loaded pipeline:
    `FluxCustomizePipeline.from_pipe(pipe)`.
    """

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *args: Any,
        subjects: Sequence[Reference] = (),
        subject_method: Method | MultiDiffusion | str | Mapping[str, Any] = "auto",
        regions: Any = None,
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
                At most five subjects, each with a picture, several (eight in all) or by words; without any it is
                [`FluxHighresPipeline`] to the bit.
            subject_method (`str` or `Method`, defaults to `"auto"`):
                By default "isolation", which finds out where subjects without a region are to be by drawing the prompt
                without them first; or "freecustom", "reference_only", "storydiffusion", "masactrl" or "style_aligned",
                with settings. The last two see the picture by its inversion, the others noised. For subjects by words
                "regional", which needs regions.
            regions (`Regions`, list, or path of a layout file, *optional*):
                Parts of the picture with prompts of their own, and negative ones, fused by MultiDiffusion: every region
                is a call of the model under its prompt, and `prompt` is of what no region covers. Settings are those of
                [`MultiDiffusion`], as in `subject_method="multidiffusion:bootstrap=0.2"`.

        Examples:

        Returns:
            [`~pipelines.flux.FluxPipelineOutput`] or `tuple`: the pictures.

        Raises:
            ConfigError: subjects without what the method needs, or a way or attention that leaves them no place.
        """
        with self._with_subjects(prompt, subjects, subject_method, "FLUX.1", kwargs, regions):
            return super().__call__(prompt, *args, **kwargs)

    def _told_of(self, prompts: list[str], run: Run) -> Condition:
        return Condition(
            *self.encode_prompt(
                prompt=prompts,
                prompt_2=None,
                device=run.device,
                num_images_per_prompt=1,
                max_sequence_length=run.text,
                lora_scale=self.joint_attention_kwargs.get("scale"),
            )
        )

    def _told_beside(self, told: Condition, run: Run) -> dict[str, torch.Tensor]:
        return {"prompt_embeds": joined(told.embeds, run.told["prompt_embeds"])}

    def _velocity_alone(self, told: Condition, stage: Stage, run: Run) -> Velocity:
        own = replace(run, told={"prompt_embeds": told.embeds})
        return super()._velocity(Prompts(told, None, 1.0, 1.0), 0, stage, own)

    def _velocity(self, prompts: Prompts, index: int, stage: Stage, run: Run) -> Velocity:
        if self._told is not None:
            prompts = _beside(self._told, prompts)
        return super()._velocity(prompts, index, stage, run)

    def _bound_region(self, item: Region, bound: tuple[Prompts], run: Run) -> tuple[tuple[Prompts], Run]:
        (prompts,) = bound
        scale = prompts.true_cfg_scale
        if item.negative is not None and scale <= 1:
            raise ConfigError(
                f"The region {short(item.prompt)} has a negative prompt, which acts by true guidance; pass a "
                "true_cfg_scale above 1, or leave it out."
            )
        given = ((text, None, None, None) for text in (item.prompt, item.negative))
        positive, negative = self._encode_prompts(*given, scale, run.batch, run.text)
        negative = prompts.negative if negative is None else negative
        told = {"prompt_embeds": positive.embeds}
        own = replace(prompts, positive=positive, negative=negative)
        return (own,), replace(run, told=told, guided=negative is not None)

    def _check_native(self, cast: Cast, stage: Stage, run: Run) -> None:
        if run.beside:
            raise ConfigError(
                "control_image is given together with subjects, but ControlNets have no references; leave one of both."
            )
        super()._check_native(cast, stage, run)


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
