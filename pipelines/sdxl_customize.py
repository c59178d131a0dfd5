"""Several subjects in one SDXL picture, each by a picture of it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_output import StableDiffusionXLPipelineOutput
from diffusers.utils import replace_example_docstring

from gensparse.methods import Method
from gensparse.pipelines.multidiffusion import MultiDiffusion
from gensparse.pipelines.sdxl_highres import SDXLHighresPipeline
from gensparse.pipelines.unet_compose import UNetComposes
from gensparse.pipelines.unet_customize import told_like
from gensparse.pipelines.unet_multidiffusion import Told, UNetMultiDiffuses
from gensparse.pipelines.unet_stages import Conditions, Run
from gensparse.subjects.references import Reference

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from gensparse import Reference
        >>> from gensparse.pipelines import SDXLCustomizePipeline

        >>> pipe = SDXLCustomizePipeline.from_pretrained(
        ...     "stabilityai/stable-diffusion-xl-base-1.0", dtype=torch.bfloat16
        ... )
        >>> pipe.enable_model_cpu_offload()
        >>> cat = Reference("cat", "cat.png", mask="cat_mask.png", region=(0, 0.2, 0.5, 1))
        >>> dog = Reference("dog", "dog.png", mask="dog_mask.png", region=(0.5, 0.2, 1, 1))
        >>> image = pipe("a cat and a dog on a lawn", subjects=[cat, dog], subject_method="isolation").images[0]
        >>> image.save("lawn.png")
        ```
"""


class SDXLCustomizePipeline(UNetComposes, UNetMultiDiffuses, SDXLHighresPipeline):
    r"""
    Text and pictures of subjects to image for SDXL-type models, of any size in multiples of 8 pixels.

    Components are those of [`StableDiffusionXLPipeline`]. Load it with `from_pretrained`, or share the weights of a
    loaded pipeline: `SDXLCustomizePipeline.from_pipe(pipe)`.
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
    ) -> StableDiffusionXLPipelineOutput | tuple:
        r"""
        Generate a picture with given subjects.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                Of the picture.
            args, kwargs:
                All other arguments of [`SDXLHighresPipeline`]; `attention` acts in the stages beyond the native one.
                Step callbacks see the tensors of the pictures, without those of the references.
            subjects (`Sequence[Reference]`, *optional*):
                At most five subjects, each with a picture, several (eight in all) or by words; without any it is
                [`SDXLHighresPipeline`] to the bit.
            subject_method (`str` or `Method`, defaults to `"auto"`):
                By default "freecustom"; or "magicface", "isolation", "reference_only", "storydiffusion", "masactrl" or
                "style_aligned", with settings. The last two see the picture by its inversion, the others noised. For
                subjects by words "regional", which needs regions, or "consistory", with several prompts, whose pictures
                are drawn together. "primecomposer" puts an object, which has a region, into a background without one.
            regions (`Regions`, list, or path of a layout file, *optional*):
                Parts of the picture with prompts of their own, and negative ones, fused by MultiDiffusion: every region
                is a call of the model under its prompt, and `prompt` is of what no region covers. Settings are those of
                [`MultiDiffusion`], as in `subject_method="multidiffusion:bootstrap=0.2"`.

        Examples:

        Returns:
            [`~pipelines.stable_diffusion_xl.StableDiffusionXLPipelineOutput`] or `tuple`: the pictures.

        Raises:
            ConfigError: subjects without what the method needs, or a way or attention that leaves them no place.
        """
        with self._with_subjects(prompt, subjects, subject_method, "UNet", kwargs, regions):
            return super().__call__(prompt, *args, **kwargs)

    def _told(self, prompts: list[str], like: Conditions, run: Run) -> Conditions:
        embeds, _, pooled, _ = self.encode_prompt(
            prompts,
            device=like.embeds.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            lora_scale=(self.cross_attention_kwargs or {}).get("scale"),
            clip_skip=self.clip_skip,
        )
        halves = 2 if self.do_classifier_free_guidance else 1
        return told_like(embeds.to(like.embeds), pooled.to(like.pooled), like, halves)

    def _told_region(self, prompt: str, negative: str | None, run: Run) -> tuple[Told, Told | None]:
        guided = self.do_classifier_free_guidance and negative is not None
        embeds, other, pooled, other_pooled = self.encode_prompt(
            prompt,
            device=run.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
            negative_prompt=negative,
            lora_scale=(self.cross_attention_kwargs or {}).get("scale"),
            clip_skip=self.clip_skip,
        )
        return Told(embeds, pooled), Told(other, other_pooled) if guided else None
