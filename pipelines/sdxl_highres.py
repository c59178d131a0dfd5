"""SDXL pictures far beyond the trained size, from a prompt or from a picture, in a cascade or another way."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion_xl.pipeline_output import StableDiffusionXLPipelineOutput
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import replace_example_docstring
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from gensparse.highres.stages import Stage, StageResult, StageStore
from gensparse.pipelines.cascade import check_options, check_stages
from gensparse.pipelines.unet_stages import Conditions, Crops, Run, UNetStages
from gensparse.pipelines.way import Attention, Prompts, Texts, Way

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from gensparse.pipelines import SDXLHighresPipeline

        >>> pipe = SDXLHighresPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0", dtype=torch.bfloat16)
        >>> pipe.enable_model_cpu_offload()
        >>> image = pipe("an astronaut on a horse", height=2048, width=3072).images[0]
        >>> image.save("astronaut.png")
        ```
"""


class SDXLHighresPipeline(UNetStages, StableDiffusionXLPipeline):
    r"""
    Text to image and image to larger image for SDXL-type models, at any size whose sides are multiples of 8 pixels.

    Components are those of [`StableDiffusionXLPipeline`]; [`AutoencoderTiny`] may stand for the VAE. Load it with
    `from_pretrained`, or share the weights of a loaded pipeline: `SDXLHighresPipeline.from_pipe(pipe)`.
    """

    _callback_tensor_inputs = ("latents", "prompt_embeds", "add_text_embeds", "add_time_ids", "clean")

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
    ):
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=scheduler,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            add_watermarker=add_watermarker,
        )
        self._init_stages()

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 5.0,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        negative_original_size: tuple[int, int] | None = None,
        negative_crops_coords_top_left: tuple[int, int] = (0, 0),
        negative_target_size: tuple[int, int] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        highres: Way | str = "cascade",
        image: Image.Image | torch.Tensor | np.ndarray | None = None,
        strength: float | None = None,
        stages: Sequence[Stage] | None = None,
        attention: Attention = "auto",
        dense_steps: int = 0,
        dense_layers: Sequence[int] = (),
        vae_tile: int | str | None = "auto",
        stage_store: StageStore | None = None,
        callback_on_stage_end: Callable[["SDXLHighresPipeline", StageResult], None] | None = None,
    ) -> StableDiffusionXLPipelineOutput | tuple:
        r"""
        Generate a picture of any size, or enlarge `image`.

        Arguments before `highres` are those of [`StableDiffusionXLPipeline`]; `height` and `width` are the final size
        in pixels, multiples of 8 (sizes between are rounded to them). `original_size` and `target_size` are the size
        of each stage unless given. In the larger stages callbacks see latents as clean picture + sigma * noise.

        Args:
            num_inference_steps (`int`, defaults to 50):
                Steps of the native stage; larger stages run the last part of the same timesteps.
            highres (`str` or `Way`, defaults to `"cascade"`):
                How sizes beyond the native one are reached: "cascade", "freescale", "demofusion", "rectifiedhr",
                "c_upscale", "none" (the size at once), or one of `gensparse.pipelines.unet_ways` with its settings.
            image (`PIL.Image.Image`, `torch.Tensor` [B, 3, H, W] in 0..1 or `np.ndarray` [H, W, 3], *optional*):
                Picture of any size to start from in place of the native stage.
            strength (`float`, *optional*):
                With `image`: share of the steps that is run, 0 keeps the picture, 1 starts from noise.
            stages (`Sequence[Stage]`, *optional*):
                The stages, native one first; by default `self.plan(height, width, num_inference_steps, highres)`.
            attention (`str` or `Method`, defaults to `"auto"`):
                How stages beyond the native one attend: "dense", a method such as "neighborhood:window=64x64", or
                "auto": dense while that is cheaper. With "freescale", how they attend over the whole map: "dense" (as
                "auto"), "fast" or a method.
            dense_steps (`int`), dense_layers (`Sequence[int]`):
                First steps of each stage, and attention layers, that stay dense.
            vae_tile (`int`, `str` or `None`):
                Pixels of exact tiles; "auto" tiles above one megapixel, "feather:512" blends tiles, "synced:512" blends
                them with one GroupNorm for all, `None` never tiles.
            stage_store (`StageStore`, *optional*):
                Keeps finished stages; those it holds are not computed again.
            callback_on_stage_end (`Callable`, *optional*):
                Called with the pipeline and the `StageResult`; `pipe.preview(result)` decodes a small picture.

        Examples:

        Returns:
            [`~pipelines.stable_diffusion_xl.StableDiffusionXLPipelineOutput`] or `tuple`: the pictures.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. the stages, and everything that can be wrong with the arguments
        way, planned = self._way(highres), stages is None
        listed = timesteps if timesteps is not None else sigmas
        steps = num_inference_steps if listed is None else len(listed)
        stages = list(stages or self.plan(height, width, steps, way))
        final = (stages[-1].height, stages[-1].width)
        self.check_inputs(
            prompt,
            prompt_2,
            self.native_size // 8 * 8,  # sizes are checked with the stages
            self.native_size // 8 * 8,
            None,
            negative_prompt,
            negative_prompt_2,
            prompt_embeds,
            negative_prompt_embeds,
            pooled_prompt_embeds,
            negative_pooled_prompt_embeds,
            ip_adapter_image,
            ip_adapter_image_embeds,
            list(callback_on_step_end_tensor_inputs),
        )
        check_stages(stages, steps, self.vae_scale_factor)
        check_options(strength, image, vae_tile, output_type)
        way.attention(attention, native=False)  # a wrong method is refused before the first step
        self._prepare_run_state(guidance_scale, guidance_rescale, clip_skip, cross_attention_kwargs)

        # 2. prompts, once for all stages
        device = self._execution_device
        guided = self.do_classifier_free_guidance
        embeds, negative, pooled, negative_pooled = self.encode_prompt(
            prompt=prompt,
            prompt_2=prompt_2,
            device=device,
            num_images_per_prompt=num_images_per_prompt,
            do_classifier_free_guidance=guided,
            negative_prompt=negative_prompt,
            negative_prompt_2=negative_prompt_2,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            lora_scale=(cross_attention_kwargs or {}).get("scale"),
            clip_skip=clip_skip,
        )
        batch, dtype = embeds.shape[0], embeds.dtype
        if guided:
            embeds, pooled = torch.cat([negative, embeds]), torch.cat([negative_pooled, pooled])
        embeds, pooled = embeds.to(device), pooled.to(device)
        images = None
        if ip_adapter_image is not None or ip_adapter_image_embeds is not None:
            images = self.prepare_ip_adapter_image_embeds(
                ip_adapter_image, ip_adapter_image_embeds, device, batch, guided
            )

        # 3. sizes and crops, which SDXL is told
        projection = pooled.shape[-1] if self.text_encoder_2 is None else self.text_encoder_2.config.projection_dim

        def time_ids(size: tuple[int, int], crops: Crops, halves: int) -> torch.Tensor:
            own, other = [], []
            for row, column in crops:
                at = (row * self.vae_scale_factor, column * self.vae_scale_factor)
                moved = tuple(a + b for a, b in zip(crops_coords_top_left, at, strict=True))
                sizes = (original_size or size, moved, target_size or size)
                own.append(self._get_add_time_ids(*sizes, dtype=dtype, text_encoder_projection_dim=projection))
                if negative_original_size is not None and negative_target_size is not None:
                    moved = tuple(a + b for a, b in zip(negative_crops_coords_top_left, at, strict=True))
                    sizes = (negative_original_size, moved, negative_target_size)
                other.append(self._get_add_time_ids(*sizes, dtype=dtype, text_encoder_projection_dim=projection))
            both = [other, own][2 - halves :]
            return torch.cat([torch.cat(part).repeat_interleave(batch, 0) for part in both]).to(device)

        def conditions(stage: Stage, scale: float) -> Conditions:
            return Conditions(
                embeds,
                negative,
                pooled,
                time_ids((stage.height, stage.width), [(0, 0)], 2 if guided else 1),
                images,
                self._timestep_condition(scale, batch, device, dtype),
            )

        def encode(texts: list[str]) -> Texts:
            scale = (cross_attention_kwargs or {}).get("scale")
            more = {"do_classifier_free_guidance": False, "lora_scale": scale, "clip_skip": clip_skip}
            return Texts(self.encode_prompt(texts, device=device, num_images_per_prompt=1, **more)[0])

        tokenizers = [self.tokenizer, self.tokenizer_2]
        prompts = Prompts(
            words=embeds.shape[1],
            encode=encode,
            content=lambda: self._content([prompt, prompt_2], tokenizers, num_images_per_prompt, embeds.shape[1]),
        )

        # 4. the stages
        plain = len(stages) == 1 and image is None and not way.keeps
        make_scheduler, levels = self._scheduler_factory(steps, timesteps, sigmas, device, native_only=plain)
        run = Run(
            way=way,
            native=self.native,
            batch=batch,
            dtype=dtype,
            device=device,
            conditions=conditions,
            time_ids=lambda stage, crops, halves: time_ids(final, crops, halves),
            prompts=prompts,
            make_scheduler=make_scheduler,
            levels=levels,
            guidance_scale=guidance_scale,
            attention=attention,
            dense_steps=dense_steps,
            dense_layers=tuple(dense_layers),
            vae_tile=vae_tile,
            extra_step_kwargs=self._step_kwargs(generator, eta),
            on_step=callback_on_step_end,
            on_step_inputs=callback_on_step_end_tensor_inputs,
        )
        stages, picture = self._stages_of(stages, planned, image, strength, run)
        result = self._render(run, stages, picture, generator, latents, stage_store, callback_on_stage_end)

        # 5. the picture
        if output_type == "latent":
            images = result.latents.to(device)
        elif self.watermark is None:
            images = self._pictures(result, output_type, vae_tile)
        else:
            marked = self.watermark.apply_watermark(self._decode_result(result, vae_tile))
            images = self.image_processor.postprocess(marked, output_type=output_type)
        self._decoded = None
        self.maybe_free_model_hooks()
        return StableDiffusionXLPipelineOutput(images=images) if return_dict else (images,)
