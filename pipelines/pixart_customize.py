"""Several subjects in one PixArt picture, by pictures of them. Nothing was published for it: it is ours."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils import replace_example_docstring

from gensparse.methods import Method
from gensparse.pipelines.multidiffusion import MultiDiffusion
from gensparse.pipelines.pixart_highres import PixArtHighresPipeline
from gensparse.pipelines.unet_customize import UNetCustomizes, told_like
from gensparse.pipelines.unet_multidiffusion import Told, UNetMultiDiffuses
from gensparse.pipelines.unet_stages import Conditions, Run
from gensparse.subjects.references import Reference

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from gensparse import Reference
        >>> from gensparse.pipelines import PixArtCustomizePipeline

        >>> pipe = PixArtCustomizePipeline.from_pretrained(
        ...     "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", dtype=torch.bfloat16
        ... )
        >>> pipe.enable_model_cpu_offload()
        >>> cat = Reference("cat", "cat.png", mask="cat_mask.png", prompt="a cat on a sofa")
        >>> image = pipe("a cat in the snow", subjects=[cat], height=1536, width=2048).images[0]
        >>> image.save("snow.png")
        ```
"""


class PixArtCustomizePipeline(UNetCustomizes, UNetMultiDiffuses, PixArtHighresPipeline):
    r"""
    Text and pictures of subjects to image for PixArt-Sigma and PixArt-alpha, at any size in multiples of 16 pixels.

    Self-attention sees the references; cross-attention reads the text of each picture alone.

    Components are those of [`PixArtSigmaPipeline`]. Load it with `from_pretrained`, or share the weights of a loaded
    pipeline: `PixArtCustomizePipeline.from_pipe(pipe)`.
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
    ) -> ImagePipelineOutput | tuple:
        r"""
        Generate a picture with given subjects.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                Of the picture.
            args, kwargs:
                All other arguments of [`PixArtHighresPipeline`]; `attention` acts in the stages beyond the native one.
                Step callbacks see the tensors of the pictures, without those of the references.
            subjects (`Sequence[Reference]`, *optional*):
                At most five subjects, each with a picture or several (eight in all); without any it is
                [`PixArtHighresPipeline`] to the bit.
            subject_method (`str` or `Method`, defaults to `"auto"`):
                By default "freecustom"; or "isolation", "reference_only", "storydiffusion", "masactrl" or
                "style_aligned", with settings. The last two see the picture by its inversion, the others noised.
            regions (`Regions`, list, or path of a layout file, *optional*):
                Parts of the picture with prompts of their own, and negative ones, fused by MultiDiffusion: every region
                is a call of the model under its prompt, and `prompt` is of what no region covers. Settings are those of
                [`MultiDiffusion`], as in `subject_method="multidiffusion:bootstrap=0.2"`.

        Examples:

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple`: the pictures.

        Raises:
            ConfigError: subjects without what the method needs, or a way or attention that leaves them no place.
        """
        with self._with_subjects(prompt, subjects, subject_method, "PixArt", kwargs, regions):
            return super().__call__(prompt, *args, **kwargs)

    def _told(self, prompts: list[str], like: Conditions, run: Run) -> Conditions:
        texts = run.prompts.encode(prompts)
        halves = 2 if self.do_classifier_free_guidance else 1
        return told_like(texts.embeds.to(like.embeds), None, like, halves, texts.mask)

    def _told_region(self, prompt: str, negative: str | None, run: Run) -> tuple[Told, Told | None]:
        texts = [prompt] if negative is None else [prompt, negative]
        found = [Told(embeds, mask=mask) for embeds, mask in (run.prompts.encode([text]) for text in texts)]
        return found[0], found[1] if negative is not None else None
