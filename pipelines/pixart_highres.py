"""PixArt pictures beyond the trained size: the stages of `SDXLHighresPipeline` on its transformer."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, PixArtSigmaPipeline, PixArtTransformer2DModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers import KarrasDiffusionSchedulers
from PIL import Image
from transformers import T5EncoderModel, T5Tokenizer

from gensparse.errors import ConfigError
from gensparse.highres.stages import Stage, StageResult, StageStore
from gensparse.pipelines.cascade import check_options, check_stages
from gensparse.pipelines.unet_stages import Conditions, Run, UNetStages, repeated, with_texts
from gensparse.pipelines.way import Attention, Native, Prompts, Texts, Way


class PixArtHighresPipeline(UNetStages, PixArtSigmaPipeline):
    r"""
    Text to image and image to larger image for PixArt-Sigma and PixArt-alpha, at any size in multiples of 16 pixels.

    Components are those of [`PixArtSigmaPipeline`]; [`AutoencoderTiny`] may stand for the VAE. Load it with
    `from_pretrained`, or share the weights of a loaded pipeline: `PixArtHighresPipeline.from_pipe(pipe)`.
    """

    _callback_tensor_inputs = ("latents", "prompt_embeds", "negative_prompt_embeds", "clean")

    def __init__(
        self,
        tokenizer: T5Tokenizer,
        text_encoder: T5EncoderModel,
        vae: AutoencoderKL | AutoencoderTiny,
        transformer: PixArtTransformer2DModel,
        scheduler: KarrasDiffusionSchedulers,
    ):
        super().__init__(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )
        self._init_stages()

    # --- what stages ask, which the pipelines of UNets have

    @property
    def _denoiser(self) -> torch.nn.Module:
        return self.transformer

    @property
    def native(self) -> Native:
        return super().native._replace(patch=self.transformer.config.patch_size)

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def guidance_rescale(self) -> float:
        return self._guidance_rescale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1.0

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str = "",
        num_inference_steps: int = 20,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 4.5,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        clean_caption: bool = True,
        max_sequence_length: int = 300,
        callback_on_step_end: Callable[..., dict] | None = None,
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
        callback_on_stage_end: Callable[["PixArtHighresPipeline", StageResult], None] | None = None,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Generate a picture of any size, or enlarge `image`.

        Arguments before `callback_on_step_end` are those of [`PixArtSigmaPipeline`], without its older callback and
        without resolution bins, in place of which the stages are planned; PixArt-alpha takes `max_sequence_length` 120.
        `highres` and those behind it are those of [`SDXLHighresPipeline`]; "freescale" is for UNets alone.

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple`: the pictures.
        """
        # 1. the stages, and everything that can be wrong with the arguments
        way, planned = self._way(highres), stages is None
        if way.name == "freescale":
            raise ConfigError("highres='freescale' dilates convolutions, which PixArt has not; use 'cascade'.")
        listed = timesteps if timesteps is not None else sigmas
        steps = num_inference_steps if listed is None else len(listed)
        stages = list(stages or self.plan(height, width, steps, way))
        self.check_inputs(
            prompt,
            self.native_size // 8 * 8,  # sizes are checked with the stages
            self.native_size // 8 * 8,
            negative_prompt,
            1,
            prompt_embeds,
            negative_prompt_embeds,
            prompt_attention_mask,
            negative_prompt_attention_mask,
        )
        strange = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if strange:
            raise ConfigError(
                f"callback_on_step_end_tensor_inputs holds {min(strange)!r}; choose among "
                f"{', '.join(self._callback_tensor_inputs)}."
            )
        check_stages(stages, steps, self.native.multiple)
        check_options(strength, image, vae_tile, output_type)
        way.attention(attention, native=False)  # a wrong method is refused before the first step
        self._prepare_run_state(guidance_scale, 0.0, None, None)

        # 2. prompts, once for all stages
        device = self._execution_device
        guided = self.do_classifier_free_guidance
        embeds, mask, negative, negative_mask = self.encode_prompt(
            prompt,
            guided,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            device=device,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            clean_caption=clean_caption,
            max_sequence_length=max_sequence_length,
        )
        batch, dtype, words = embeds.shape[0], embeds.dtype, embeds.shape[1]
        if guided:
            embeds, mask = torch.cat([negative, embeds]), torch.cat([negative_mask, mask])

        def encode(texts: list[str]) -> Texts:
            more = {"device": device, "clean_caption": clean_caption, "max_sequence_length": words}
            return Texts(*self.encode_prompt(texts, False, **more)[:2])

        def content() -> torch.Tensor:
            plain = None if prompt is None else self._text_preprocessing(prompt, clean_caption=clean_caption)
            return self._content([plain], [self.tokenizer], num_images_per_prompt, words)

        prompts = Prompts(words=words, encode=encode, content=content)

        # 3. the stages
        plain = len(stages) == 1 and image is None and not way.keeps
        make_scheduler, levels = self._scheduler_factory(steps, timesteps, sigmas, device, native_only=plain)
        run = Run(
            way=way,
            native=self.native,
            batch=batch,
            dtype=dtype,
            device=device,
            conditions=lambda stage, scale: Conditions(embeds, negative, mask=mask),
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

        # 4. the picture
        images = result.latents.to(device) if output_type == "latent" else self._pictures(result, output_type, vae_tile)
        self._decoded = None
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _call(
        self,
        z: torch.Tensor,
        t: torch.Tensor,
        conditions: Conditions,
        views: int,
        halves: int,
        time_ids: torch.Tensor | None,
        texts: Texts | None,
    ) -> torch.Tensor:
        more, more_mask = (None, None) if texts is None else texts
        added: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if self.transformer.use_additional_conditions:
            # alpha is told the size of what it sees, which is a window where windows are denoised
            height, width = (length * self.vae_scale_factor for length in z.shape[-2:])
            added["resolution"] = z.new_tensor([height, width]).repeat(len(z), 1)
            added["aspect_ratio"] = z.new_tensor([height / width]).repeat(len(z), 1)
        out = self.transformer(
            z,
            encoder_hidden_states=with_texts(repeated(conditions.embeds, views, halves), more),
            encoder_attention_mask=with_texts(repeated(conditions.mask, views, halves), more_mask),
            timestep=t.reshape(1).to(z.device).expand(len(z)),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        learned = self.transformer.config.out_channels // 2 == self.transformer.config.in_channels  # and its variance
        return out.chunk(2, dim=1)[0] if learned else out

    def _timestep_condition(self, scale: float, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        return None
