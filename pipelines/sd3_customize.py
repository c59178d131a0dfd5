"""Several subjects in one Stable Diffusion 3 picture. By pictures of them nothing was published for it: it is ours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_output import StableDiffusion3PipelineOutput
from diffusers.utils import replace_example_docstring

from gensparse.errors import ConfigError, short
from gensparse.highres.stages import Stage
from gensparse.methods import Method
from gensparse.pipelines.customize import Cast, joined
from gensparse.pipelines.flow_customize import FlowCustomizes
from gensparse.pipelines.flow_multidiffusion import FlowMultiDiffuses
from gensparse.pipelines.flow_stages import Run, Velocity
from gensparse.pipelines.multidiffusion import MultiDiffusion
from gensparse.pipelines.sd3_highres import SD3HighresPipeline, SkippedLayers
from gensparse.subjects.areas import Region
from gensparse.subjects.references import Reference

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from gensparse import Reference
        >>> from gensparse.pipelines import SD3CustomizePipeline

        >>> pipe = SD3CustomizePipeline.from_pretrained(
        ...     "stabilityai/stable-diffusion-3.5-large", dtype=torch.bfloat16
        ... )
        >>> pipe.enable_model_cpu_offload()
        >>> cat = Reference("cat", "cat.png", mask="cat_mask.png", prompt="a cat on a sofa")
        >>> image = pipe("a cat in the snow", subjects=[cat], height=1536, width=2048).images[0]
        >>> image.save("snow.png")
        ```
"""


@dataclass(frozen=True)
class Told:
    """Prompts of references: embeds [R, T, C], pooled [R, P]; `alone` where no pictures stand behind them."""

    embeds: torch.Tensor
    pooled: torch.Tensor
    alone: bool = False


class SD3CustomizePipeline(FlowCustomizes, FlowMultiDiffuses, SD3HighresPipeline):
    r"""
    Text and pictures of subjects to image for Stable Diffusion 3 and 3.5, at any size.

    References stand beside the picture with the positions of pictures of their own, the middle of the model's table, so
    a token of a reference and the picture's token at the same place have the same position.

    Components are those of [`StableDiffusion3Pipeline`]. Load it with `from_pretrained`, or share the weights of a
    loaded pipeline: `SD3CustomizePipeline.from_pipe(pipe)`.
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
    ) -> StableDiffusion3PipelineOutput | tuple:
        r"""
        Generate a picture with given subjects.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                Of the picture.
            args, kwargs:
                All other arguments of [`SD3HighresPipeline`]; `attention` acts in the stages beyond the native one.
                Step callbacks see the tensors of the pictures, without those of the references.
            subjects (`Sequence[Reference]`, *optional*):
                At most five subjects, each with a picture, several (eight in all) or by words; without any it is
                [`SD3HighresPipeline`] to the bit.
            subject_method (`str` or `Method`, defaults to `"auto"`):
                By default "freecustom"; or "isolation", "reference_only", "storydiffusion", "masactrl" or
                "style_aligned", with settings. The last two see the picture by its inversion, the others noised. For
                subjects by words "regional", which needs regions.
            regions (`Regions`, list, or path of a layout file, *optional*):
                Parts of the picture with prompts of their own, and negative ones, fused by MultiDiffusion: every region
                is a call of the model under its prompt, and `prompt` is of what no region covers. Settings are those of
                [`MultiDiffusion`], as in `subject_method="multidiffusion:bootstrap=0.2"`.

        Examples:

        Returns:
            [`~pipelines.stable_diffusion_3.StableDiffusion3PipelineOutput`] or `tuple`: the pictures.

        Raises:
            ConfigError: subjects without what the method needs, or a way or attention that leaves them no place.
        """
        with self._with_subjects(prompt, subjects, subject_method, "Stable Diffusion 3", kwargs, regions):
            return super().__call__(prompt, *args, **kwargs)

    def _told_of(self, prompts: list[str], run: Run) -> Told:
        embeds, _, pooled, _ = self._encoded(prompts, None, run)
        return Told(embeds.to(run.told["prompt_embeds"]), pooled.to(run.told["pooled_prompt_embeds"]))

    def _encoded(self, prompts: str | list[str], negative: str | None, run: Run, count: int = 1) -> tuple[Any, ...]:
        """What `encode_prompt` gives, in as many tokens as the call's prompt has; a negative half where it is given.

        Raises:
            ConfigError: embeddings of the call that have fewer tokens than prompts have.
        """
        tokens = run.text - self.tokenizer_max_length  # those of the third encoder, behind CLIP's
        if tokens < 1:
            raise ConfigError(
                f"The prompt's embeddings have {run.text} tokens, and prompts of subjects and regions take more than "
                f"{self.tokenizer_max_length}; pass prompt= in place of prompt_embeds."
            )
        return self.encode_prompt(
            prompt=prompts,
            prompt_2=None,
            prompt_3=None,
            negative_prompt=negative,
            device=run.device,
            num_images_per_prompt=count,
            do_classifier_free_guidance=negative is not None,
            clip_skip=self.clip_skip,
            max_sequence_length=tokens,
            lora_scale=(self.joint_attention_kwargs or {}).get("scale"),
        )

    def _bound_region(self, item: Region, bound: tuple[Any, ...], run: Run) -> tuple[tuple[Any, ...], Run]:
        guidance_scale, skipped, images = bound
        if item.negative is not None and not run.guided:
            raise ConfigError(
                f"The region {short(item.prompt)} has a negative prompt, which acts by guidance; pass a guidance_scale "
                "above 1, or leave it out."
            )
        embeds, other, pooled, other_pooled = self._encoded(item.prompt, item.negative, run, run.batch)

        def halves(name: str, own: torch.Tensor, negative: torch.Tensor | None) -> torch.Tensor:
            if not run.guided:
                return own
            return torch.cat([run.given[name].chunk(2)[0] if negative is None else negative, own])

        told = {
            "prompt_embeds": halves("prompt_embeds", embeds, other),
            "pooled_prompt_embeds": halves("pooled_prompt_embeds", pooled, other_pooled),
        }
        if skipped is not None:
            skipped = replace(skipped, embeds=embeds, pooled=pooled)
        return (guidance_scale, skipped, images), replace(run, told=told)

    def _told_beside(self, told: Told, run: Run) -> dict[str, torch.Tensor]:
        given = {"prompt_embeds": told.embeds, "pooled_prompt_embeds": told.pooled}
        return {name: _beside(given[name], x, 2 if run.guided else 1) for name, x in run.told.items()}

    def _velocity_alone(self, told: Told, stage: Stage, run: Run) -> Velocity:
        before, self._told = self._told, replace(told, alone=True)
        try:
            given = {"prompt_embeds": told.embeds, "pooled_prompt_embeds": told.pooled}
            return run.velocity(0, stage, replace(run, told=given))
        finally:
            self._told = before

    def _velocity(
        self,
        guidance_scale: float,
        skipped: SkippedLayers | None,
        images: torch.Tensor | None,
        index: int,
        stage: Stage,
        run: Run,
    ) -> Velocity:
        told = self._told
        if told is not None:
            count = len(told.embeds)
            # image prompts of references are those of the first picture
            shown = None if images is None else images[-1:].expand(count, *images.shape[1:])
            if told.alone:
                return super()._velocity(1.0, None, shown, index, stage, run)
            if images is not None and shown is not None:
                images = _beside(shown, images, 2 if run.guided else 1)
            if skipped is not None:
                embeds, pooled = joined(told.embeds, skipped.embeds), joined(told.pooled, skipped.pooled)
                skipped = replace(skipped, embeds=embeds, pooled=pooled)
        return super()._velocity(guidance_scale, skipped, images, index, stage, run)

    def _check_native(self, cast: Cast, stage: Stage, run: Run) -> None:
        super()._check_native(cast, stage, run)
        if run.guided and not run.uses_guidance(0):  # the pipeline guides, and its calls in this stage have one half
            cast.method = replace(cast.method, halves=1)


# --- pure helpers ---------------------------------------------------------------------------------------------------


def _beside(references: torch.Tensor, own: torch.Tensor, halves: int) -> torch.Tensor:
    """Rows of references in front of those of the pictures; their unconditional half is that of the first picture."""
    if halves == 2:
        unconditional = own.chunk(2)[0][:1].expand(len(references), *own.shape[1:])
        references = torch.cat([unconditional, references.to(own)])
    return joined(references, own, halves)
