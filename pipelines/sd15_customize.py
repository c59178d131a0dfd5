"""Several subjects in one Stable Diffusion 1.5 or 2 picture, each by a picture of it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_output import StableDiffusionPipelineOutput

from gensparse.methods import Method
from gensparse.pipelines.sd15_highres import SD15HighresPipeline
from gensparse.pipelines.unet_customize import UNetCustomizes, told_like
from gensparse.pipelines.unet_stages import Conditions
from gensparse.subjects.references import Reference


class SD15CustomizePipeline(UNetCustomizes, SD15HighresPipeline):
    r"""
    Text and pictures of subjects to image for Stable Diffusion 1.5 and 2, of any size in multiples of 8 pixels.

    Components are those of [`StableDiffusionPipeline`]. Load it with `from_pretrained`, or share the weights of a
    loaded pipeline: `SD15CustomizePipeline.from_pipe(pipe)`.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *args: Any,
        subjects: Sequence[Reference] = (),
        subject_method: Method | str | Mapping[str, Any] = "freecustom",
        **kwargs: Any,
    ) -> StableDiffusionPipelineOutput | tuple:
        r"""
        Generate a picture with given subjects.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                Of the picture.
            args, kwargs:
                All other arguments of [`SD15HighresPipeline`]; `attention` acts in the stages beyond the native one.
                Step callbacks see the tensors of the pictures, without those of the references.
            subjects (`Sequence[Reference]`, *optional*):
                At most five subjects with a picture of each; without any it is [`SD15HighresPipeline`] to the bit.
            subject_method (`str` or `Method`, defaults to `"freecustom"`):
                "freecustom", "magicface", "isolation", "reference_only", "storydiffusion", "masactrl" or
                "style_aligned", with settings. The last two see the picture by its inversion, the others noised.

        Returns:
            [`~pipelines.stable_diffusion.StableDiffusionPipelineOutput`] or `tuple`: the pictures.

        Raises:
            ConfigError: subjects without what the method needs, or a way or attention that leaves them no place.
        """
        with self._with_subjects(prompt, subjects, subject_method, "UNet", kwargs):
            return super().__call__(prompt, *args, **kwargs)

    def _told(self, prompts: list[str], like: Conditions) -> Conditions:
        scale = (self.cross_attention_kwargs or {}).get("scale")
        device = like.embeds.device
        embeds = self.encode_prompt(prompts, device, 1, False, lora_scale=scale, clip_skip=self.clip_skip)[0]
        return told_like(embeds.to(like.embeds), None, like, 2 if self.do_classifier_free_guidance else 1)
