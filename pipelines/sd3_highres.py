"""Stable Diffusion 3 and 3.5 pictures far beyond the trained size: HiFlow's cascade with resized positions.

Bu et al., "HiFlow: training-free high-resolution image generation with flow-aligned guidance", arXiv 2504.06232.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion_3.pipeline_output import StableDiffusion3PipelineOutput
from diffusers.utils import replace_example_docstring
from PIL import Image
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    SiglipImageProcessor,
    SiglipVisionModel,
    T5EncoderModel,
    T5TokenizerFast,
)

from gensparse.errors import ConfigError
from gensparse.highres.patch_table import ResizedPatchEmbed
from gensparse.highres.stages import Stage, StageResult, StageStore
from gensparse.methods import Method
from gensparse.pipelines.flow_stages import FlowStages, Run, Velocity, Wishes

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from gensparse.pipelines import SD3HighresPipeline

        >>> pipe = SD3HighresPipeline.from_pretrained(
        ...     "stabilityai/stable-diffusion-3.5-large", dtype=torch.bfloat16
        ... )
        >>> pipe.enable_model_cpu_offload()
        >>> image = pipe("A cat holding a sign that says hello world", height=2048, width=3072).images[0]
        >>> image.save("cat.png")
        ```
"""


@dataclass(frozen=True)
class SkippedLayers:
    """Guidance by a run without some layers (Stable Diffusion 3.5 medium): which, how strong, in which share of steps.

    `embeds` [B, T, C] and `pooled` [B, P] are the prompt's own.
    """

    layers: list[int]
    scale: float
    start: float
    stop: float
    embeds: torch.Tensor
    pooled: torch.Tensor

    def acts(self, step: int, steps: int) -> bool:
        return steps * self.start < step < steps * self.stop


class SD3HighresPipeline(FlowStages, StableDiffusion3Pipeline):
    r"""
    Text to image and image to larger image for Stable Diffusion 3 and 3.5, at any size.

    Components are those of [`StableDiffusion3Pipeline`]; [`AutoencoderTiny`] may stand for the VAE. Load it with
    `from_pretrained`, or share the weights of a loaded pipeline: `SD3HighresPipeline.from_pipe(pipe)`.

    Args:
        gensparse_config (`dict`, *optional*):
            What a model says about itself, read from `gensparse.json` beside `model_index.json` if there is one:
            `native_size` (pixels), `max_sequence_length`, `num_inference_steps`, `attention` and `dense_below_tokens`
            (what attention="auto" uses), `cascade` (fields of `CascadeSettings`).
    """

    _callback_tensor_inputs = ("latents", "prompt_embeds", "pooled_prompt_embeds", "clean")
    _position_rules = ("interpolate", "base")
    _ways = ("cascade", "none")
    _default_steps = 28

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL | AutoencoderTiny,
        text_encoder: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer_2: CLIPTokenizer,
        text_encoder_3: T5EncoderModel,
        tokenizer_3: T5TokenizerFast,
        image_encoder: SiglipVisionModel | None = None,
        feature_extractor: SiglipImageProcessor | None = None,
        gensparse_config: dict[str, Any] | None = None,
    ):
        super().__init__(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )
        self.register_to_config(gensparse_config=gensparse_config)
        self._init_stages()

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        prompt_3: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.0,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        negative_prompt_3: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., dict] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        skip_guidance_layers: list[int] | None = None,
        skip_layer_guidance_scale: float = 2.8,
        skip_layer_guidance_stop: float = 0.2,
        skip_layer_guidance_start: float = 0.01,
        mu: float | None = None,
        *,
        highres: str = "cascade",
        image: Image.Image | torch.Tensor | np.ndarray | None = None,
        strength: float | None = None,
        stages: Sequence[Stage] | None = None,
        attention: Method | str | Mapping[str, Any] = "auto",
        dense_steps: int = 0,
        dense_layers: Sequence[int] = (),
        position: str = "auto",
        guidance_stages: Sequence[int] | str = "all",
        vae_tile: int | str | None = "auto",
        stage_store: StageStore | None = None,
        callback_on_stage_end: Callable[["SD3HighresPipeline", StageResult], None] | None = None,
    ) -> StableDiffusion3PipelineOutput | tuple:
        r"""
        Generate a picture of any size, or enlarge `image`.

        Arguments before `highres` are those of [`StableDiffusion3Pipeline`]; `height` and `width` are the final size in
        pixels. Layers are skipped by the number of a step in the whole list, so larger stages seldom do.

        Args:
            num_inference_steps (`int`, *optional*):
                Steps of the native stage; larger stages run the last part of the same sigma list.
            highres (`str`, defaults to `"cascade"`):
                How sizes beyond the native one are reached: "cascade" or "none" (the size at once, with the model's own
                positions).
            image (`PIL.Image.Image`, `torch.Tensor` [B, 3, H, W] in 0..1 or `np.ndarray` [H, W, 3], *optional*):
                Picture of any size to start from in place of the native stage.
            strength (`float`, *optional*):
                With `image`: share of the noise range that is redone, 0 keeps the picture, 1 starts from noise.
            stages (`Sequence[Stage]`, *optional*):
                The cascade, native stage first; by default `self.plan(height, width, num_inference_steps, highres)`.
            attention (`str` or `Method`, defaults to `"auto"`):
                How stages beyond the native one attend: "dense", a method such as "clear:radius=16", or "auto": dense
                while that is cheaper.
            dense_steps (`int`), dense_layers (`Sequence[int]`):
                First steps of each stage, and blocks, that stay dense.
            position (`str`, defaults to `"auto"`):
                Positions of the larger stages: "interpolate" (auto) resizes the part of the model's table that the
                native stage uses (`gensparse.highres.patch_table`), "base" takes a larger part of it.
            guidance_stages (`Sequence[int]` or `"all"`, defaults to `"all"`):
                Stages in which `guidance_scale` applies; the others cost half.
            vae_tile (`int`, `str` or `None`):
                Pixels of exact tiles; "auto" tiles above one megapixel, "feather:512" blends tiles, "synced:512" blends
                them with one GroupNorm for all, `None` never tiles.
            stage_store (`StageStore`, *optional*):
                Keeps finished stages; those it holds are not computed again.
            callback_on_stage_end (`Callable`, *optional*):
                Called with the pipeline and the `StageResult`; `pipe.preview(result)` decodes a small picture.

        Examples:

        Returns:
            [`~pipelines.stable_diffusion_3.StableDiffusion3PipelineOutput`] or `tuple`: the pictures.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. the stages, and everything that can be wrong with the arguments
        max_sequence_length = max_sequence_length or self.gensparse_config.get("max_sequence_length", 256)
        planned = stages is None
        stages = self._checked_stages(stages, (height, width), num_inference_steps, sigmas, highres)
        self.check_inputs(
            prompt,
            prompt_2,
            prompt_3,
            stages[-1].height,
            stages[-1].width,
            negative_prompt=negative_prompt,
            negative_prompt_2=negative_prompt_2,
            negative_prompt_3=negative_prompt_3,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            callback_on_step_end_tensor_inputs=list(callback_on_step_end_tensor_inputs),
            max_sequence_length=max_sequence_length,
        )
        wishes = Wishes(
            highres,
            attention,
            dense_steps,
            tuple(dense_layers),
            position,
            guidance_stages,
            vae_tile,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        self._check_wishes(wishes, stages, strength, image, output_type)
        self._guidance_scale, self._clip_skip = guidance_scale, clip_skip
        self._skip_layer_guidance_scale = skip_layer_guidance_scale
        self._joint_attention_kwargs = None if joint_attention_kwargs is None else dict(joint_attention_kwargs)
        self._reset()

        # 2. prompts and image prompts, once for all stages
        device, guided = self._execution_device, self.do_classifier_free_guidance
        embeds, negative, pooled, negative_pooled = self.encode_prompt(
            prompt=prompt,
            prompt_2=prompt_2,
            prompt_3=prompt_3,
            negative_prompt=negative_prompt,
            negative_prompt_2=negative_prompt_2,
            negative_prompt_3=negative_prompt_3,
            do_classifier_free_guidance=guided,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            device=device,
            clip_skip=clip_skip,
            num_images_per_prompt=num_images_per_prompt,
            max_sequence_length=max_sequence_length,
            lora_scale=(joint_attention_kwargs or {}).get("scale"),
        )
        batch, skipped = embeds.shape[0], None
        if skip_guidance_layers is not None:
            window = (skip_layer_guidance_start, skip_layer_guidance_stop)
            skipped = SkippedLayers(skip_guidance_layers, skip_layer_guidance_scale, *window, embeds, pooled)
        if guided:
            embeds, pooled = torch.cat([negative, embeds]), torch.cat([negative_pooled, pooled])
        images = None
        if (ip_adapter_image is not None and self.is_ip_adapter_active) or ip_adapter_image_embeds is not None:
            images = self.prepare_ip_adapter_image_embeds(
                ip_adapter_image, ip_adapter_image_embeds, device, batch, guided
            )

        # 3. the stages
        run = self._run(
            wishes,
            stages,
            partial(self._velocity, guidance_scale, skipped, images),
            self._scheduler_factory(stages[0], sigmas, device, mu),
            {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled},
            batch=batch,
            guided=guided,
        )
        result = self._render(
            run, stages, planned, image, strength, generator, latents, stage_store, callback_on_stage_end
        )

        # 4. the picture
        pictures = self._finished(result, output_type, run)
        return StableDiffusion3PipelineOutput(images=pictures) if return_dict else (pictures,)

    # --- one call of the transformer

    def _velocity(
        self,
        guidance_scale: float,
        skipped: SkippedLayers | None,
        images: torch.Tensor | None,
        index: int,
        stage: Stage,
        run: Run,
    ) -> Velocity:
        """The velocity of a stage; where it is guided, both halves are one batch, the negative one first."""
        self._guidance_scale = guidance_scale  # callbacks may have changed it in the stage before

        def batch_of(tensor: torch.Tensor, guided: bool) -> torch.Tensor:
            return tensor if guided or len(tensor) < 2 * run.batch else tensor.chunk(2)[1]

        def call(latents: torch.Tensor, t: torch.Tensor, guided: bool, texts: Sequence[torch.Tensor], **more: Any):
            kwargs = self.joint_attention_kwargs
            if images is not None:
                kwargs = {**(kwargs or {}), "ip_adapter_image_embeds": batch_of(images, guided)}
            return self.transformer(
                hidden_states=latents,
                timestep=t.expand(latents.shape[0]),
                encoder_hidden_states=texts[0],
                pooled_projections=texts[1],
                joint_attention_kwargs=kwargs,
                return_dict=False,
                **more,
            )[0]

        def velocity(latents: torch.Tensor, t: torch.Tensor, pad: int, step: int) -> torch.Tensor:
            guided = self.do_classifier_free_guidance and run.uses_guidance(index)
            texts = [batch_of(run.told[name], guided) for name in ("prompt_embeds", "pooled_prompt_embeds")]
            if not guided:
                return call(latents, t, False, texts)
            uncond, cond = call(torch.cat([latents] * 2), t, True, texts).chunk(2)
            out = uncond + self.guidance_scale * stage.guidance_factor * (cond - uncond)
            if skipped is not None and skipped.acts(step, run.steps):
                without = call(latents, t, False, (skipped.embeds, skipped.pooled), skip_layers=skipped.layers)
                out = out + (cond - without) * skipped.scale
            return out

        return velocity

    # --- positions and time

    @property
    def _patch(self) -> int:
        return self.transformer.config.patch_size

    def _no_way(self, highres: str) -> str:
        if highres != "direct":
            return super()._no_way(highres)
        return (
            "highres='direct' stretches rotary positions, but Stable Diffusion 3 has a table of positions; "
            "use highres='cascade'."
        )

    def _position_rule(self, position: str, highres: str) -> str:
        if position != "auto":
            return position
        return "base" if highres == "none" else "interpolate"

    def _position_module(self, grid: tuple[int, int], offset: float, logit_scale: float, run: Run) -> ResizedPatchEmbed:
        return ResizedPatchEmbed(self.transformer.pos_embed, run.native_grid, grid, offset)

    def _check_positions(self, stages: Sequence[Stage], position: str, native_grid: tuple[int, int]) -> None:
        """ConfigError where more of the model's table is wanted than there is."""
        limit = self.transformer.config.pos_embed_max_size
        for stage in stages:
            grid = self._grid(stage)
            shifted = int(stage.patch_shift)
            if (position == "base" or grid == native_grid) and max(grid) + shifted > limit:
                raise ConfigError(
                    f"The stage {stage.width}x{stage.height} has {max(grid) + shifted} tokens on one side, but the "
                    f"model's table of positions ends at {limit}; use position='interpolate' in a cascade from a "
                    f"native stage of at most {limit * self.token_size} pixels per side."
                )

    def _times(self, native: Stage, sigmas: Sequence[float] | None, mu: float | None) -> dict[str, Any]:
        if self.scheduler.config.get("use_dynamic_shifting") and mu is None:
            mu = self._shift(native, max_shift=1.16)
        return {"sigmas": sigmas, **({} if mu is None else {"mu": mu})}

    # --- latents are pictures already

    @property
    def _channels(self) -> int:
        return self.transformer.config.in_channels

    def _pack(self, z: torch.Tensor) -> torch.Tensor:
        return z

    def _unpack(self, packed: torch.Tensor, stage: Stage, pad: int = 0) -> torch.Tensor:
        return packed
