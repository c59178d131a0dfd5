"""QwenImage pictures far beyond the trained size: HiFlow's cascade, or the size at once with stretched positions.

Bu et al., "HiFlow: training-free high-resolution image generation with flow-aligned guidance", arXiv 2504.06232.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage.pipeline_output import QwenImagePipelineOutput
from diffusers.utils import replace_example_docstring
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from gensparse.errors import ConfigError
from gensparse.highres.centred_rope import CentredPositionTable
from gensparse.highres.stages import Stage, StageResult, StageStore
from gensparse.methods import Method
from gensparse.pipelines.flow_stages import FlowStages, Run, Velocity, Wishes

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from gensparse.pipelines import QwenImageHighresPipeline

        >>> pipe = QwenImageHighresPipeline.from_pretrained("Qwen/Qwen-Image", dtype=torch.bfloat16)
        >>> pipe.enable_model_cpu_offload()
        >>> image = pipe("A coffee shop entrance", negative_prompt=" ", height=2160, width=3840).images[0]
        >>> image.save("shop.png")
        ```
"""


@dataclass(frozen=True)
class Condition:
    """One prompt as the transformer takes it: embeddings [B, T, C], and which are no padding, [B, T] (None: all)."""

    embeds: torch.Tensor
    mask: torch.Tensor | None


@dataclass(frozen=True)
class Prompts:
    """What the transformer is told beside latents and time."""

    positive: Condition
    negative: Condition | None
    guidance_scale: float | None
    true_cfg_scale: float


class QwenImageHighresPipeline(FlowStages, QwenImagePipeline):
    r"""
    Text to image and image to larger image for QwenImage, at any size.

    Components are those of [`QwenImagePipeline`]. Load it with `from_pretrained`, or share the weights of a loaded
    pipeline: `QwenImageHighresPipeline.from_pipe(pipe)`.

    Args:
        gensparse_config (`dict`, *optional*):
            What a model says about itself, read from `gensparse.json` beside `model_index.json` if there is one:
            `native_size` (pixels; the scheduler's `max_image_seq_len` otherwise), `max_sequence_length`,
            `num_inference_steps`, `attention` and `dense_below_tokens` (what attention="auto" uses), `cascade` (fields
            of `CascadeSettings`).
    """

    _callback_tensor_inputs = ("latents", "prompt_embeds", "clean")
    _default_steps = 50

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKLQwenImage,
        text_encoder: Qwen2_5_VLForConditionalGeneration,
        tokenizer: Qwen2Tokenizer,
        transformer: QwenImageTransformer2DModel,
        gensparse_config: dict[str, Any] | None = None,
    ):
        super().__init__(
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=transformer,
        )
        if transformer is not None and transformer.config.get("use_layer3d_rope"):
            raise ConfigError(
                "The transformer is one of layered pictures (use_layer3d_rope), which no stages have yet; use the "
                "text-to-image model Qwen/Qwen-Image."
            )
        self.register_to_config(gensparse_config=gensparse_config)
        self._init_stages()

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        true_cfg_scale: float = 4.0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_embeds_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds_mask: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
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
        callback_on_stage_end: Callable[["QwenImageHighresPipeline", StageResult], None] | None = None,
    ) -> QwenImagePipelineOutput | tuple:
        r"""
        Generate a picture of any size, or enlarge `image`.

        Arguments before `highres` are those of [`QwenImagePipeline`]; `height` and `width` are the final size in
        pixels.

        Args:
            num_inference_steps (`int`, *optional*):
                Steps of the native stage; larger stages run the last part of the same sigma list.
            highres (`str`, defaults to `"cascade"`):
                How sizes beyond the native one are reached: "cascade", "direct" (the size at once, with stretched
                positions) or "none" (the size at once, with the model's own).
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
                Rotary rule of sizes beyond the native one, a key of `gensparse.highres.rope.RULES`; auto is "yarn".
                The dy_ rules are DyPE, which is patent pending according to its authors.
            guidance_stages (`Sequence[int]` or `"all"`, defaults to `"all"`):
                Stages in which `true_cfg_scale` applies; the others cost half.
            vae_tile (`int`, `str` or `None`):
                "auto" tiles above one megapixel, "feather:512" blends tiles, `None` never tiles.
            stage_store (`StageStore`, *optional*):
                Keeps finished stages; those it holds are not computed again.
            callback_on_stage_end (`Callable`, *optional*):
                Called with the pipeline and the `StageResult`; `pipe.preview(result)` decodes a small picture.

        Examples:

        Returns:
            [`~pipelines.qwenimage.QwenImagePipelineOutput`] or `tuple`: the pictures.
        """
        # 1. the stages, and everything that can be wrong with the arguments
        max_sequence_length = max_sequence_length or self.gensparse_config.get("max_sequence_length", 512)
        planned = stages is None
        stages = self._checked_stages(stages, (height, width), num_inference_steps, sigmas, highres)
        self.check_inputs(
            prompt,
            stages[-1].height,
            stages[-1].width,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            prompt_embeds_mask=prompt_embeds_mask,
            negative_prompt_embeds_mask=negative_prompt_embeds_mask,
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
        if self.transformer.config.guidance_embeds and guidance_scale is None:
            raise ConfigError("This model takes guidance_scale as input, and none is given; pass guidance_scale=1.0.")
        self._guidance_scale, self._attention_kwargs = guidance_scale, dict(attention_kwargs or {})
        self._reset()

        # 2. prompts, once for all stages; the negative one only where it is used
        def condition(text, embeds, mask) -> Condition:
            return Condition(
                *self.encode_prompt(
                    prompt=text,
                    prompt_embeds=embeds,
                    prompt_embeds_mask=mask,
                    device=self._execution_device,
                    num_images_per_prompt=num_images_per_prompt,
                    max_sequence_length=max_sequence_length,
                )
            )

        positive, negative = condition(prompt, prompt_embeds, prompt_embeds_mask), None
        if true_cfg_scale > 1 and (negative_prompt is not None or negative_prompt_embeds is not None):
            negative = condition(negative_prompt, negative_prompt_embeds, negative_prompt_embeds_mask)
            if len(negative.embeds) != len(positive.embeds):
                raise ConfigError(
                    f"There are {len(negative.embeds)} negative prompts for {len(positive.embeds)} prompts; pass as "
                    "many of both."
                )

        # 3. the stages
        run = self._run(
            wishes,
            stages,
            partial(self._velocity, Prompts(positive, negative, guidance_scale, true_cfg_scale)),
            self._scheduler_factory(stages[0], sigmas, self._execution_device),
            {"prompt_embeds": positive.embeds},
            batch=positive.embeds.shape[0],
            guided=negative is not None,
        )
        result = self._render(
            run, stages, planned, image, strength, generator, latents, stage_store, callback_on_stage_end
        )

        # 4. the picture
        images = self._finished(result, output_type, run)
        return QwenImagePipelineOutput(images=images) if return_dict else (images,)

    # --- one call of the transformer

    def _velocity(self, prompts: Prompts, index: int, stage: Stage, run: Run) -> Velocity:
        """The velocity of a stage; where it is guided, in two calls, and as long as the prompt's own."""
        guidance = None
        if self.transformer.config.guidance_embeds:
            scale = prompts.guidance_scale * stage.guidance_factor
            guidance = torch.full([1], scale, device=run.device, dtype=torch.float32).expand(run.batch)

        def half(latents: torch.Tensor, t: torch.Tensor, pad: int, text: Condition, name: str) -> torch.Tensor:
            rows, cols = (side + pad for side in self._grid(stage))
            timestep = t.expand(latents.shape[0]).to(latents.dtype)
            with self.transformer.cache_context(name):
                return self.transformer(
                    hidden_states=latents,
                    timestep=timestep / 1000,
                    guidance=guidance,
                    encoder_hidden_states_mask=text.mask,
                    encoder_hidden_states=text.embeds,
                    img_shapes=[[(1, rows, cols)]] * run.batch,
                    attention_kwargs=self.attention_kwargs,
                    return_dict=False,
                )[0]

        def velocity(latents: torch.Tensor, t: torch.Tensor, pad: int, step: int) -> torch.Tensor:
            cond = half(latents, t, pad, Condition(run.told["prompt_embeds"], prompts.positive.mask), "cond")
            if prompts.negative is None or not run.uses_guidance(index):
                return cond
            uncond = half(latents, t, pad, prompts.negative, "uncond")
            mixed = uncond + prompts.true_cfg_scale * (cond - uncond)
            return mixed * (torch.norm(cond, dim=-1, keepdim=True) / torch.norm(mixed, dim=-1, keepdim=True))

        return velocity

    # --- positions and time

    def _position_rule(self, position: str, highres: str) -> str:
        if position != "auto":
            return position
        return "base" if highres == "none" else "yarn"

    def _position_module(
        self, grid: tuple[int, int], offset: float, logit_scale: float, run: Run
    ) -> CentredPositionTable:
        own = self.transformer.pos_embed
        return CentredPositionTable(
            own.axes_dim,
            own.theta,
            grid,
            self.native_side,
            rule=run.position,
            native_grid=run.native_grid,
            offset=offset,
            logit_scale=logit_scale,
        )

    def _times(self, native: Stage, sigmas: Sequence[float] | None, mu: float | None) -> dict[str, Any]:
        if sigmas is None:
            sigmas = np.linspace(1.0, 1 / native.steps, native.steps)
        return {"sigmas": sigmas, "mu": self._shift(native)}

    # --- latents: the autoencoder is one of clips, and its latents have a mean and a width per channel

    def _unpack(self, packed: torch.Tensor, stage: Stage, pad: int = 0) -> torch.Tensor:
        return super()._unpack(packed, stage, pad)[:, :, 0]

    def _unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        mean, inverse = self._statistics(latents.to(self.vae.dtype))
        return latents.to(self.vae.dtype) / inverse + mean

    def _model_latents(self, raw: torch.Tensor) -> torch.Tensor:
        mean, inverse = self._statistics(raw.float())
        return (raw.float() - mean) * inverse

    def _statistics(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and 1 / standard deviation of the latents' channels, [1, C, 1, 1]."""
        config = self.vae.config
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std))
        return mean.to(like), 1.0 / std.to(like)
