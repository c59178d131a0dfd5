"""Stable Diffusion 1.5 and 2 pictures beyond the trained size: the stages of `SDXLHighresPipeline` on their UNets."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion.pipeline_output import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from PIL import Image
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from gensparse.highres.stages import Stage, StageResult, StageStore
from gensparse.pipelines.cascade import check_options, check_stages
from gensparse.pipelines.unet_stages import Conditions, Run, UNetStages
from gensparse.pipelines.way import Attention, Prompts, Texts, Way


class SD15HighresPipeline(UNetStages, StableDiffusionPipeline):
    r"""
    Text to image and image to larger image for Stable Diffusion 1.5 and 2, at any size in multiples of 8 pixels.

    Components are those of [`StableDiffusionPipeline`]; [`AutoencoderTiny`] may stand for the VAE. Load it with
    `from_pretrained`, or share the weights of a loaded pipeline: `SD15HighresPipeline.from_pipe(pipe)`.
    """

    _callback_tensor_inputs = ("latents", "prompt_embeds", "negative_prompt_embeds", "clean")

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker,
        feature_extractor: CLIPImageProcessor,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        requires_safety_checker: bool = True,
    ):
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            requires_safety_checker=requires_safety_checker,
        )
        self._init_stages()

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
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
        callback_on_stage_end: Callable[["SD15HighresPipeline", StageResult], None] | None = None,
    ) -> StableDiffusionPipelineOutput | tuple:
        r"""
        Generate a picture of any size, or enlarge `image`.

        Arguments before `highres` are those of [`StableDiffusionPipeline`], `highres` and those behind it are those of
        [`SDXLHighresPipeline`].

        Returns:
            [`~pipelines.stable_diffusion.StableDiffusionPipelineOutput`] or `tuple`: the pictures, and what the safety
            checker says about each, if there is one.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. the stages, and everything that can be wrong with the arguments
        way, planned = self._way(highres), stages is None
        listed = timesteps if timesteps is not None else sigmas
        steps = num_inference_steps if listed is None else len(listed)
        stages = list(stages or self.plan(height, width, steps, way))
        self.check_inputs(
            prompt,
            self.native_size // 8 * 8,  # sizes are checked with the stages
            self.native_size // 8 * 8,
            None,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
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
        embeds, negative = self.encode_prompt(
            prompt,
            device,
            num_images_per_prompt,
            guided,
            negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            lora_scale=(cross_attention_kwargs or {}).get("scale"),
            clip_skip=clip_skip,
        )
        batch, dtype = embeds.shape[0], embeds.dtype
        embeds = torch.cat([negative, embeds]) if guided else embeds
        images = None
        if ip_adapter_image is not None or ip_adapter_image_embeds is not None:
            images = self.prepare_ip_adapter_image_embeds(
                ip_adapter_image, ip_adapter_image_embeds, device, batch, guided
            )

        def conditions(_stage: Stage, scale: float) -> Conditions:
            timestep = self._timestep_condition(scale, batch, device, dtype)
            return Conditions(embeds, negative, images=images, timestep=timestep)

        def encode(texts: list[str]) -> Texts:
            scale = (cross_attention_kwargs or {}).get("scale")
            return Texts(self.encode_prompt(texts, device, 1, False, lora_scale=scale, clip_skip=clip_skip)[0])

        prompts = Prompts(
            words=embeds.shape[1],
            encode=encode,
            content=lambda: self._content([prompt], [self.tokenizer], num_images_per_prompt, embeds.shape[1]),
        )

        # 3. the stages
        plain = len(stages) == 1 and image is None and not way.keeps
        make_scheduler, levels = self._scheduler_factory(steps, timesteps, sigmas, device, native_only=plain)
        run = Run(
            way=way,
            native=self.native,
            batch=batch,
            dtype=dtype,
            device=device,
            conditions=conditions,
            time_ids=lambda stage, crops, halves: None,
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

        # 4. the picture, looked at by the safety checker if there is one
        flags = None
        if output_type == "latent":
            images = result.latents.to(device)
        elif self.safety_checker is None:
            images = self._pictures(result, output_type, vae_tile)
        else:
            decoded, flags = self.run_safety_checker(self._decode_result(result, vae_tile), device, dtype)
            shown = [not flag for flag in flags]
            images = self.image_processor.postprocess(decoded, output_type=output_type, do_denormalize=shown)
        self._decoded = None
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, flags
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=flags)
