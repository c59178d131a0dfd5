"""Several subjects in one Stable Diffusion 1.5 or 2 picture, each by a picture of it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_output import StableDiffusionPipelineOutput

from gensparse.methods import Method
from gensparse.pipelines.multidiffusion import MultiDiffusion
from gensparse.pipelines.sd15_highres import SD15HighresPipeline
from gensparse.pipelines.unet_compose import UNetComposes
from gensparse.pipelines.unet_customize import told_like
from gensparse.pipelines.unet_multidiffusion import Told, UNetMultiDiffuses
from gensparse.pipelines.unet_stages import Conditions, Run
from gensparse.subjects.references import Reference


class SD15CustomizePipeline(UNetComposes, UNetMultiDiffuses, SD15HighresPipeline):
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
        subject_method: Method | MultiDiffusion | str | Mapping[str, Any] = "auto",
        regions: Any = None,
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
                At most five subjects, each with a picture, several (eight in all) or by words; without any it is
                [`SD15HighresPipeline`] to the bit.
            subject_method (`str` or `Method`, defaults to `"auto"`):
                By default "freecustom"; or "magicface", "isolation", "reference_only", "storydiffusion", "masactrl" or
                "style_aligned", with settings. The last two see the picture by its inversion, the others noised. For
                subjects by words "regional", which needs regions, or "consistory", with several prompts, whose pictures
                are drawn together. "primecomposer" puts an object, which has a region, into a background without one.
            regions (`Regions`, list, or path of a layout file, *optional*):
                Parts of the picture with prompts of their own, and negative ones, fused by MultiDiffusion: every region
                is a call of the model under its prompt, and `prompt` is of what no region covers. Settings are those of
                [`MultiDiffusion`], as in `subject_method="multidiffusion:bootstrap=0.2"`.

        Returns:
            [`~pipelines.stable_diffusion.StableDiffusionPipelineOutput`] or `tuple`: the pictures.

        Raises:
            ConfigError: subjects without what the method needs, or a way or attention that leaves them no place.
        """
        with self._with_subjects(prompt, subjects, subject_method, "UNet", kwargs, regions):
            return super().__call__(prompt, *args, **kwargs)

    def _told(self, prompts: list[str], like: Conditions, run: Run) -> Conditions:
        scale = (self.cross_attention_kwargs or {}).get("scale")
        device = like.embeds.device
        embeds = self.encode_prompt(prompts, device, 1, False, lora_scale=scale, clip_skip=self.clip_skip)[0]
        return told_like(embeds.to(like.embeds), None, like, 2 if self.do_classifier_free_guidance else 1)

    def _told_region(self, prompt: str, negative: str | None, run: Run) -> tuple[Told, Told | None]:
        scale = (self.cross_attention_kwargs or {}).get("scale")
        guided = self.do_classifier_free_guidance and negative is not None
        more = {"lora_scale": scale, "clip_skip": self.clip_skip}
        embeds, other = self.encode_prompt(prompt, run.device, 1, guided, negative, **more)
        return Told(embeds), Told(other) if guided else None
