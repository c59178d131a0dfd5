"""FLUX pictures far beyond the trained size: HiFlow's cascade with sparse attention in its larger stages.

Bu et al., "HiFlow: training-free high-resolution image generation with flow-aligned guidance", arXiv 2504.06232.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxMultiControlNetModel,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from diffusers.utils import replace_example_docstring
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    T5EncoderModel,
    T5TokenizerFast,
)

from gensparse.errors import ConfigError, unknown_name
from gensparse.highres.rope import PositionTable
from gensparse.highres.stages import Stage, StageResult, StageStore
from gensparse.methods import Method
from gensparse.pipelines.flow_stages import FlowStages, Run, Velocity, Wishes
from gensparse.pipelines.flux_control import Control, control_of
from gensparse.pipelines.flux_ways import WAYS as PROCEDURES
from gensparse.pipelines.flux_ways import FluxWay, as_flux_way

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from gensparse.pipelines import FluxHighresPipeline

        >>> pipe = FluxHighresPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16)
        >>> pipe.enable_model_cpu_offload()
        >>> image = pipe("A cat holding a sign that says hello world", height=4096, width=4096).images[0]
        >>> image.save("cat.png")
        ```
"""


@dataclass(frozen=True)
class Condition:
    """One prompt as the transformer takes it: embeddings [B, T, C], pooled [B, P], ids [T, 3]."""

    embeds: torch.Tensor
    pooled: torch.Tensor
    ids: torch.Tensor


@dataclass(frozen=True)
class Prompts:
    """What the transformer is told beside latents and time."""

    positive: Condition
    negative: Condition | None
    guidance_scale: float
    true_cfg_scale: float
    control: Control | None = None


class FluxHighresPipeline(FlowStages, FluxPipeline):
    r"""
    Text to image and image to larger image for FLUX.1-type models, at any size.

    Components are those of [`FluxPipeline`]; [`AutoencoderTiny`] may stand for the VAE. Load it with `from_pretrained`,
    or share the weights of a loaded pipeline: `FluxHighresPipeline.from_pipe(pipe)`. From a [`FluxControlNetPipeline`]
    or [`FluxControlNetImg2ImgPipeline`] it takes the ControlNets too, which then act in every stage.

    Args:
        controlnet ([`FluxControlNetModel`], [`FluxMultiControlNetModel`] or a list of the former, *optional*):
            Used in calls with a `control_image`.
        gensparse_config (`dict`, *optional*):
            What a model says about itself, read from `gensparse.json` beside `model_index.json` if there is one:
            `native_size` (pixels), `position_ids` ("centre-aligned scene units": trained on close-ups, so larger
            pictures interpolate positions), `max_sequence_length`, `num_inference_steps`, `attention` and
            `dense_below_tokens` (what attention="auto" uses), `cascade` (fields of `CascadeSettings`).
    """

    _callback_tensor_inputs = ("latents", "prompt_embeds", "clean")  # clean: the estimate of the finished picture
    _optional_components: ClassVar = [*FluxPipeline._optional_components, "controlnet"]

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL | AutoencoderTiny,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        text_encoder_2: T5EncoderModel,
        tokenizer_2: T5TokenizerFast,
        transformer: FluxTransformer2DModel,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        controlnet: FluxControlNetModel
        | FluxMultiControlNetModel
        | list[FluxControlNetModel]
        | tuple[FluxControlNetModel, ...]
        | None = None,
        gensparse_config: dict[str, Any] | None = None,
    ):
        super().__init__(
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            transformer=transformer,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )
        nets = controlnet if isinstance(controlnet, list | tuple) else None
        self.register_modules(controlnet=controlnet if nets is None else FluxMultiControlNetModel(nets))
        self.register_to_config(gensparse_config=gensparse_config)
        self._init_stages()

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        # diffusers would leave it behind, since its type is one of several
        kwargs.setdefault("controlnet", getattr(pipeline, "controlnet", None))
        return super().from_pipe(pipeline, **kwargs)

    @property
    def _interpolates(self) -> bool:
        return "position_ids" in self.gensparse_config

    @property
    def _cascade_defaults(self) -> dict[str, Any]:
        return {"patch_shift": not self._interpolates}

    def plan(
        self,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        highres: str | FluxWay = "cascade",
    ) -> list[Stage]:
        """The stages a call with these arguments runs.

        Raises:
            ConfigError: a side that is no multiple of `token_size` pixels, or another `highres`.
        """
        way = self._way(highres)
        if way is None:
            return super().plan(height, width, steps, highres)
        steps = steps or self.gensparse_config.get("num_inference_steps", way.default_steps)
        size = (height or self.native_size, width or self.native_size)
        return way.plan(size, (self.native_size, self.native_size), self.token_size, steps)

    def _way(self, highres: Any) -> FluxWay | None:
        return as_flux_way(highres)

    def _no_way(self, highres: str) -> str:
        return unknown_name("highres", str(highres), (*self._ways, *PROCEDURES))

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        true_cfg_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 3.5,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        *,
        highres: str | FluxWay = "cascade",
        image: Image.Image | torch.Tensor | np.ndarray | None = None,
        strength: float | None = None,
        control_image: Any = None,
        control_mode: int | Sequence[int | None] | None = None,
        controlnet_conditioning_scale: float | Sequence[float] = 1.0,
        control_guidance_start: float | Sequence[float] = 0.0,
        control_guidance_end: float | Sequence[float] = 1.0,
        stages: Sequence[Stage] | None = None,
        attention: Method | str | Mapping[str, Any] = "auto",
        dense_steps: int = 0,
        dense_layers: Sequence[int] = (),
        position: str = "auto",
        guidance_stages: Sequence[int] | str = (0,),
        vae_tile: int | str | None = "auto",
        stage_store: StageStore | None = None,
        callback_on_stage_end: Callable[["FluxHighresPipeline", StageResult], None] | None = None,
    ) -> FluxPipelineOutput | tuple:
        r"""
        Generate a picture of any size, or enlarge `image`.

        Arguments before `highres` are those of [`FluxPipeline`]; `height` and `width` are the final size in pixels.

        Args:
            num_inference_steps (`int`, *optional*):
                Steps of the native stage; larger stages run the last part of the same sigma list.
            highres (`str` or `FluxWay`, defaults to `"cascade"`):
                How sizes beyond the native one are reached: "cascade", "clear" (CLEAR's stages), "scale_dit" (with the
                smaller picture as anchors), "direct" (the size at once, with stretched positions), "none" (the size at
                once, with the model's own), or one of `gensparse.pipelines.flux_ways` with settings of its own.
            image (`PIL.Image.Image`, `torch.Tensor` [B, 3, H, W] in 0..1 or `np.ndarray` [H, W, 3], *optional*):
                Picture of any size to start from in place of the native stage.
            strength (`float`, *optional*):
                With `image`: share of the noise range that is redone, 0 keeps the picture, 1 starts from noise.
            control_image (as `image`, or a list with one for each ControlNet, *optional*):
                What the ControlNets are shown, of any size: every stage gets it resized. Without it they are left out.
            control_mode (`int` or a list, *optional*):
                Kind of control, for union ControlNets.
            controlnet_conditioning_scale (`float` or a list, defaults to 1.0):
                Factor on what the ControlNets add.
            control_guidance_start (`float` or a list), control_guidance_end (`float` or a list):
                Share of the whole run's steps in which they act; a larger stage runs the last part of those steps.
            stages (`Sequence[Stage]`, *optional*):
                The cascade, native stage first; by default `self.plan(height, width, num_inference_steps, highres)`.
            attention (`str` or `Method`, defaults to `"auto"`):
                How stages beyond the native one attend: "dense", a method such as "clear:radius=16", or "auto": dense
                while that is cheaper.
            dense_steps (`int`), dense_layers (`Sequence[int]`):
                First steps of each stage, and blocks, that stay dense.
            position (`str`, defaults to `"auto"`):
                Rotary rule of sizes beyond the native one, a key of `gensparse.highres.rope.RULES`. The dy_ rules are
                DyPE, which is patent pending according to its authors.
            guidance_stages (`Sequence[int]` or `"all"`, defaults to `(0,)`):
                Stages in which `true_cfg_scale` applies; each doubles the cost of its stage.
            vae_tile (`int`, `str` or `None`):
                Pixels of exact tiles; "auto" tiles above one megapixel, "feather:512" blends tiles, "synced:512" blends
                them with one GroupNorm for all, `None` never tiles.
            stage_store (`StageStore`, *optional*):
                Keeps finished stages; those it holds are not computed again.
            callback_on_stage_end (`Callable`, *optional*):
                Called with the pipeline and the `StageResult`; `pipe.preview(result)` decodes a small picture.

        Examples:

        Returns:
            [`~pipelines.flux.FluxPipelineOutput`] or `tuple`: the pictures.
        """
        # 1. the stages, and everything that can be wrong with the arguments
        facts = self.gensparse_config
        max_sequence_length = max_sequence_length or facts.get("max_sequence_length", 512)
        planned = stages is None
        stages = self._checked_stages(stages, (height, width), num_inference_steps, sigmas, highres)
        self.check_inputs(
            prompt,
            prompt_2,
            stages[-1].height,
            stages[-1].width,
            negative_prompt=negative_prompt,
            negative_prompt_2=negative_prompt_2,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            callback_on_step_end_tensor_inputs=list(callback_on_step_end_tensor_inputs),
            max_sequence_length=max_sequence_length,
        )
        way = self._way(highres)
        wishes = Wishes(
            highres if way is None else way.name,
            attention,
            dense_steps,
            tuple(dense_layers),
            position,
            guidance_stages,
            vae_tile,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            way,
        )
        self._check_wishes(wishes, stages, strength, image, output_type)
        self._guidance_scale, self._joint_attention_kwargs = guidance_scale, dict(joint_attention_kwargs or {})
        self._reset()

        # 2. prompts, once for all stages
        positive, negative = self._encode_prompts(
            (prompt, prompt_2, prompt_embeds, pooled_prompt_embeds),
            (negative_prompt, negative_prompt_2, negative_prompt_embeds, negative_pooled_prompt_embeds),
            true_cfg_scale,
            num_images_per_prompt,
            max_sequence_length,
        )

        # 3. the stages
        control = control_of(
            self.controlnet,
            control_image,
            control_mode,
            controlnet_conditioning_scale,
            control_guidance_start,
            control_guidance_end,
            batch=positive.embeds.shape[0],
        )
        if control is not None and way is not None:
            way.check_control()
        prompts = Prompts(positive, negative, guidance_scale, true_cfg_scale, control)
        run = self._run(
            wishes,
            stages,
            partial(self._velocity, prompts),
            self._scheduler_factory(stages[0], sigmas, self._execution_device),
            {"prompt_embeds": positive.embeds},
            batch=positive.embeds.shape[0],
            guided=negative is not None,
        )
        run.recorded = partial(self._anchor_call, prompts)
        run.beside = () if control is None else control.nets
        result = self._render(
            run, stages, planned, image, strength, generator, latents, stage_store, callback_on_stage_end
        )

        # 4. the picture
        images = self._finished(result, output_type, run)
        return FluxPipelineOutput(images=images) if return_dict else (images,)

    # --- one call of the transformer

    def _velocity(self, prompts: Prompts, index: int, stage: Stage, run: Run) -> Velocity:
        """The velocity of a stage, with true guidance where the stage has it."""
        guidance = self._guidance(prompts, stage, run)
        # one tensor per grid for the whole stage: who reads the grid from it remembers the tensor
        pads = (1, 0) if stage.patch_shift else (0,)
        ids = {pad: self._image_ids(stage, run, pad) for pad in pads}
        control = None if prompts.control is None else prompts.control.at_stage(self, stage, run, pads)
        scale = self._scale(prompts, stage, run)

        def call(latents: torch.Tensor, t: torch.Tensor, pad: int, text: Condition) -> dict[str, Any]:
            return {
                "hidden_states": latents,
                "timestep": t.expand(latents.shape[0]).to(latents.dtype) / 1000,
                "pooled_projections": text.pooled,
                "encoder_hidden_states": text.embeds,
                "txt_ids": text.ids,
                "img_ids": ids[pad],
                "joint_attention_kwargs": self.joint_attention_kwargs,
            }

        def half(told: dict[str, Any], name: str) -> torch.Tensor:
            with self.transformer.cache_context(name):
                return self.transformer(guidance=guidance, return_dict=False, **told)[0]

        def velocity(latents: torch.Tensor, t: torch.Tensor, pad: int, step: int) -> torch.Tensor:
            positive = Condition(run.told["prompt_embeds"], prompts.positive.pooled, prompts.positive.ids)
            told = call(latents, t, pad, positive)
            # once for both halves of true guidance, as diffusers' pipeline has it
            added = {} if control is None else control.residuals(step, pad, scale, told)
            cond = half({**told, **added}, "cond")
            if prompts.negative is None or not run.uses_guidance(index):
                return cond
            uncond = half({**call(latents, t, pad, prompts.negative), **added}, "uncond")
            return uncond + prompts.true_cfg_scale * (cond - uncond)

        return velocity

    def _anchor_call(self, prompts: Prompts, stage: Stage, run: Run) -> dict[str, Any]:
        """The call of a clean picture under the stage's prompt and guidance, see `Handle.record`."""
        latents, (rows, cols) = run.anchors
        ids = self._prepare_latent_image_ids(run.batch, rows, cols, run.device, torch.float32)
        return {
            "hidden_states": latents,
            "img_ids": ids,
            "guidance": self._guidance(prompts, stage, run),
            "encoder_hidden_states": prompts.positive.embeds,
            "pooled_projections": prompts.positive.pooled,
            "txt_ids": prompts.positive.ids,
            "joint_attention_kwargs": self.joint_attention_kwargs,
            "return_dict": False,
        }

    def _guidance(self, prompts: Prompts, stage: Stage, run: Run) -> torch.Tensor | None:
        """Scale of the distilled guidance [B], for models that take it."""
        return self._scale(prompts, stage, run) if self.transformer.config.guidance_embeds else None

    def _scale(self, prompts: Prompts, stage: Stage, run: Run) -> torch.Tensor:
        """The scale of the distilled guidance in a stage, [B]."""
        scale = prompts.guidance_scale * stage.guidance_factor
        return torch.full([1], scale, device=run.device, dtype=torch.float32).expand(run.batch)

    # --- positions and time

    def _position_rule(self, position: str, highres: str) -> str:
        if position != "auto":
            return position
        if highres == "none":
            return "base"
        if self._interpolates:
            return "interpolate"
        return "yarn" if highres == "direct" else "ntk10"

    def _position_module(self, grid: tuple[int, int], offset: float, logit_scale: float, run: Run) -> PositionTable:
        own = self.transformer.pos_embed
        return PositionTable(
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
        if self.scheduler.config.get("use_flow_sigmas"):
            sigmas = None
        return {"sigmas": sigmas, "mu": self._shift(native)}

    # --- preparation

    def _encode_prompts(self, positive, negative, true_cfg_scale, count, max_sequence_length):
        """Both prompts once for all stages; the negative one only where it is used."""
        scale = self.joint_attention_kwargs.get("scale")

        def condition(prompt, prompt_2, embeds, pooled) -> Condition:
            return Condition(
                *self.encode_prompt(
                    prompt=prompt,
                    prompt_2=prompt_2,
                    prompt_embeds=embeds,
                    pooled_prompt_embeds=pooled,
                    device=self._execution_device,
                    num_images_per_prompt=count,
                    max_sequence_length=max_sequence_length,
                    lora_scale=scale,
                )
            )

        first = condition(*positive)
        given = negative[0] is not None or negative[2] is not None
        if true_cfg_scale <= 1 or not given:
            return first, None
        second = condition(*negative)
        if second.embeds.shape != first.embeds.shape:
            raise ConfigError(
                f"The negative prompt embeddings have the shape {tuple(second.embeds.shape)}, the positive ones "
                f"{tuple(first.embeds.shape)}; pass as many negative prompts as prompts, of the same length."
            )
        return first, second

    def _image_ids(self, stage: Stage, run: Run, pad: int = 0) -> torch.Tensor:
        rows, cols = (n + pad for n in self._grid(stage))
        # half precision would merge neighbours beyond 256
        dtype = run.dtype if max(rows, cols) <= 256 else torch.float32
        return self._prepare_latent_image_ids(run.batch, rows, cols, run.device, dtype)
