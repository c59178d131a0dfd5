"""FLUX pictures far beyond the trained size: HiFlow's cascade with sparse attention in its larger stages.

Bu et al., "HiFlow: training-free high-resolution image generation with flow-aligned guidance", arXiv 2504.06232.
"""

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.pipelines.flux.pipeline_flux import retrieve_timesteps
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from diffusers.utils import is_torch_xla_available, replace_example_docstring
from diffusers.utils.torch_utils import get_module_execution_device, is_compiled_module
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    T5EncoderModel,
    T5TokenizerFast,
)

from gensparse.attach import applied
from gensparse.errors import ConfigError, NumericsError
from gensparse.families.flux import native_tokens
from gensparse.highres import resample, vae_tiles
from gensparse.highres.frequency import Motion, guided_velocity
from gensparse.highres.rope import RULES, PositionTable, proportional_scale
from gensparse.highres.shift import shift_mu
from gensparse.highres.stages import (
    CascadeSettings,
    Stage,
    StageResult,
    StageStore,
    check_size,
    plan_stages,
    steps_within,
)
from gensparse.methods import Method, as_method

if is_torch_xla_available():
    import torch_xla.core.xla_model as xm

    XLA_AVAILABLE = True
else:
    XLA_AVAILABLE = False

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

CONFIG_FILE = "gensparse.json"
PATCH = 2  # latent pixels per token and axis
UNTILED_AREA = 1024 * 1024  # pixels up to which vae_tile="auto" decodes in one piece
AUTO_TILE, AUTO_TILE_CPU = 1024, 256  # small tiles stay in a CPU's cache
FEATHER_TILE = 1024
DENSE_BELOW = 8192  # tokens up to which attention="auto" stays dense, unless the model's config says otherwise
PROPORTIONAL = ("ntk10", "imax_clip")  # position rules published together with proportional attention


@dataclass(frozen=True)
class Condition:
    """One prompt as the transformer takes it: embeddings [B, T, C], pooled [B, P], ids [T, 3]."""

    embeds: torch.Tensor
    pooled: torch.Tensor
    ids: torch.Tensor


@dataclass
class Run:
    """What all stages of one call share."""

    positive: Condition
    negative: Condition | None
    batch: int
    device: torch.device
    sigmas: tuple[float, ...]
    make_scheduler: Callable[[], Any]
    native_grid: tuple[int, int]
    position: str
    attention: Method | str | Mapping[str, Any]
    dense_steps: int
    dense_layers: tuple[int, ...]
    guidance_scale: float
    true_cfg_scale: float
    guidance_stages: Sequence[int] | str
    vae_tile: int | str | None
    on_step: Callable | None
    on_step_inputs: Sequence[str]

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def uses_cfg(self, index: int) -> bool:
        return self.negative is not None and (self.guidance_stages == "all" or index in self.guidance_stages)


@dataclass(frozen=True)
class Guide:
    """The smaller picture that leads a stage: its clean estimates by step, and its encoded enlargement otherwise."""

    encoded: torch.Tensor
    history: dict[int, torch.Tensor]

    def reference(self, step: int) -> torch.Tensor:
        """x0_ref at `step`, float32 at the stage's own size."""
        x0 = self.history.get(step)
        if x0 is None:
            return self.encoded
        x0 = x0.to(self.encoded.device, torch.float32)
        return F.interpolate(x0, size=self.encoded.shape[-2:], mode="bicubic", align_corners=False)


class FluxHighresPipeline(FluxPipeline):
    r"""
    Text to image and image to larger image for FLUX.1-type models, at any size.

    Components are those of [`FluxPipeline`]; [`AutoencoderTiny`] may stand for the VAE. Load it with `from_pretrained`,
    or share the weights of a loaded pipeline: `FluxHighresPipeline.from_pipe(pipe)`.

    Args:
        gensparse_config (`dict`, *optional*):
            What a model says about itself, read from `gensparse.json` beside `model_index.json` if there is one:
            `native_size` (pixels), `position_ids` ("centre-aligned scene units": trained on close-ups, so larger
            pictures interpolate positions), `max_sequence_length`, `num_inference_steps`, `attention` and
            `dense_below_tokens` (what attention="auto" uses), `cascade` (fields of `CascadeSettings`).
    """

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
        self.register_to_config(gensparse_config=gensparse_config)
        self.attention_report: list[dict[str, Any]] = []
        self._stage = 0
        self._num_stages = 1
        self._decoded: tuple[StageResult, torch.Tensor] | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        facts = read_config_file(pretrained_model_name_or_path)
        if facts is not None:
            kwargs.setdefault("gensparse_config", facts)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        # diffusers would drop an AutoencoderTiny and cast the shared weights to float32
        kwargs.setdefault("vae", pipeline.vae)
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", pipeline.dtype)
        facts = read_config_file(pipeline.config.get("_name_or_path"))
        if facts is not None and not any(pipeline.config.get(k) for k in ("gensparse_config", "_gensparse_config")):
            kwargs.setdefault("gensparse_config", facts)
        return super().from_pipe(pipeline, **kwargs)

    # --- what the model says about itself

    @property
    def gensparse_config(self) -> dict[str, Any]:
        return dict(self.config.get("gensparse_config") or {})

    @property
    def token_size(self) -> int:
        """Pixels of a token's side; picture sizes are multiples of it."""
        return self.vae_scale_factor * PATCH

    @property
    def native_side(self) -> int:
        """Tokens per side at which the model was trained."""
        size = self.gensparse_config.get("native_size")
        return round(math.sqrt(native_tokens(self))) if size is None else size // self.token_size

    @property
    def native_size(self) -> int:
        """Pixels per side at which the model was trained."""
        return self.native_side * self.token_size

    @property
    def stage(self) -> int:
        """Number of the stage that runs, 0 = native."""
        return self._stage

    @property
    def num_stages(self) -> int:
        return self._num_stages

    def plan(self, height: int | None = None, width: int | None = None, steps: int | None = None) -> list[Stage]:
        """The stages a call with these arguments runs."""
        settings = CascadeSettings(**_tuples({"patch_shift": not self._interpolates, **self._cascade_config}))
        return plan_stages(
            height or self.native_size,
            width or self.native_size,
            (self.native_size, self.native_size),
            steps=steps or self.gensparse_config.get("num_inference_steps", 30),
            multiple=self.token_size,
            settings=settings,
        )

    @property
    def _cascade_config(self) -> dict[str, Any]:
        return self.gensparse_config.get("cascade", {})

    @property
    def _interpolates(self) -> bool:
        return "position_ids" in self.gensparse_config

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
        image: Image.Image | torch.Tensor | np.ndarray | None = None,
        strength: float | None = None,
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

        Arguments before `image` are those of [`FluxPipeline`]; `height` and `width` are the final size in pixels.

        Args:
            num_inference_steps (`int`, *optional*):
                Steps of the native stage; larger stages run the last part of the same sigma list.
            image (`PIL.Image.Image`, `torch.Tensor` [B, 3, H, W] in 0..1 or `np.ndarray` [H, W, 3], *optional*):
                Picture of any size to start from in place of the native stage.
            strength (`float`, *optional*):
                With `image`: share of the noise range that is redone, 0 keeps the picture, 1 starts from noise.
            stages (`Sequence[Stage]`, *optional*):
                The cascade, native stage first; by default `self.plan(height, width, num_inference_steps)`.
            attention (`str` or `Method`, defaults to `"auto"`):
                How stages beyond the native one attend: "dense", a method such as "clear:radius=16", or "auto": dense
                while that is cheaper.
            dense_steps (`int`), dense_layers (`Sequence[int]`):
                First steps of each stage, and blocks, that stay dense.
            position (`str`, defaults to `"auto"`):
                Rotary rule of the larger stages, a key of `gensparse.highres.rope.RULES`. The dy_ rules are DyPE, which
                is patent pending according to its authors.
            guidance_stages (`Sequence[int]` or `"all"`, defaults to `(0,)`):
                Stages in which `true_cfg_scale` applies; each doubles the cost of its stage.
            vae_tile (`int`, `"auto"`, `"feather"` or `None`):
                Pixels of exact tiles; "auto" tiles above one megapixel, "feather" blends, `None` never tiles.
            stage_store (`StageStore`, *optional*):
                Keeps finished stages; those it holds are not computed again.
            callback_on_stage_end (`Callable`, *optional*):
                Called with the pipeline and the `StageResult`; `pipe.preview(result)` decodes a small picture.

        Examples:

        Returns:
            [`~pipelines.flux.FluxPipelineOutput`] or `tuple`: the pictures.
        """
        facts = self.gensparse_config
        max_sequence_length = max_sequence_length or facts.get("max_sequence_length", 512)
        given, picture = stages, None
        stages = list(given or self.plan(height, width, len(sigmas) if sigmas is not None else num_inference_steps))
        native, target = stages[0], stages[-1]
        _check_stages(stages, len(sigmas) if sigmas is not None else native.steps, self.token_size)
        self.check_inputs(
            prompt,
            prompt_2,
            target.height,
            target.width,
            negative_prompt=negative_prompt,
            negative_prompt_2=negative_prompt_2,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            callback_on_step_end_tensor_inputs=list(callback_on_step_end_tensor_inputs),
            max_sequence_length=max_sequence_length,
        )
        _check_options(position, strength, image, guidance_stages, vae_tile, output_type)
        choose_attention(attention, 0, automatic="dense")  # a wrong method is refused before the first step
        self._guidance_scale, self._joint_attention_kwargs = guidance_scale, dict(joint_attention_kwargs or {})
        self._current_timestep, self._interrupt, self._decoded = None, False, None
        self.attention_report = []

        positive, negative = self._encode_prompts(
            (prompt, prompt_2, prompt_embeds, pooled_prompt_embeds),
            (negative_prompt, negative_prompt_2, negative_prompt_embeds, negative_pooled_prompt_embeds),
            true_cfg_scale,
            num_images_per_prompt,
            max_sequence_length,
        )
        batch, device = positive.embeds.shape[0], self._execution_device
        make_scheduler = self._scheduler_factory(native, sigmas, device)
        run = Run(
            positive=positive,
            negative=negative,
            batch=batch,
            device=device,
            sigmas=tuple(make_scheduler().sigmas.tolist()),
            make_scheduler=make_scheduler,
            native_grid=(native.height // self.token_size, native.width // self.token_size),
            position=self._position_rule(position),
            attention=attention,
            dense_steps=dense_steps,
            dense_layers=tuple(dense_layers),
            guidance_scale=guidance_scale,
            true_cfg_scale=true_cfg_scale,
            guidance_stages=guidance_stages,
            vae_tile=vae_tile,
            on_step=callback_on_step_end,
            on_step_inputs=callback_on_step_end_tensor_inputs,
        )
        if image is not None:
            picture = _as_picture(image, batch)
            stages = _stages_from(picture, stages, strength, run.sigmas, planned=given is None)
        self._num_stages = len(stages)

        result = None if stage_store is None else _last_finished(stage_store, stages, run.sigmas)
        done = -1 if result is None else result.index
        for k, stage in enumerate(stages):
            noise = self._noise(stage, run, generator, latents if k == 0 and image is None else None)
            if k <= done:
                continue
            self._stage = k
            keep = _steps_to_keep(stages, k, run.steps, native_draft=picture is None)
            if k == 0 and picture is None:
                packed, history = self._denoise_native(stage, noise, keep, run)
            else:
                guide = self._enlarge(result if k > 0 else picture, stage, run)
                self._decoded = None
                packed, history = self._denoise_guided(k, stage, noise, guide, keep, run)
            result = StageResult(k, stage.height, stage.width, run.sigmas, packed.cpu(), history)
            if self.interrupt:
                break
            if stage_store is not None:
                stage_store.save(k, result)
            if callback_on_stage_end is not None:
                callback_on_stage_end(self, result)
        self._current_timestep = None

        assert result is not None
        images = result.latents.to(device) if output_type == "latent" else self._pictures(result, output_type, vae_tile)
        self._decoded = None
        self.maybe_free_model_hooks()
        return FluxPipelineOutput(images=images) if return_dict else (images,)

    # --- the two kinds of stage

    def _denoise_native(self, stage: Stage, latents: torch.Tensor, keep: range, run: Run):
        """Stage 0: exactly FluxPipeline's loop, noting the clean estimates x0 = z - sigma * v."""
        history: dict[int, torch.Tensor] = {}
        scheduler = run.make_scheduler()
        scheduler.set_begin_index(0)
        call = self._velocity_call(0, stage, run)
        ids = self._image_ids(stage, run)
        with self._progress(stage, run.steps) as bar:
            for i, t in enumerate(scheduler.timesteps):
                if self.interrupt:
                    break
                self._current_timestep = t
                velocity = call(latents, t, ids)
                if i in keep:
                    x0 = latents.float() - run.sigmas[i] * velocity.float()
                    history[i] = self._unpack(x0, stage).cpu()
                latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
                latents = self._end_step(0, i, t, latents, run)
                bar.update()
        self._report(0, stage)
        return latents, history

    def _denoise_guided(self, index: int, stage: Stage, noise: torch.Tensor, guide: Guide, keep: range, run: Run):
        """A larger stage: its last steps from the noised enlargement, each velocity led by the smaller picture.

        Spatial latents, float32; HiFlow section 3.
        """
        history: dict[int, torch.Tensor] = {}
        timesteps, first = run.make_scheduler().timesteps, run.steps - stage.steps
        z = (
            torch.lerp(guide.encoded, self._unpack(noise, stage).float(), run.sigmas[first])
            if stage.steps
            else guide.encoded
        )
        motion: Motion | None = None
        self._num_timesteps = stage.steps
        with self._stage_model(index, stage, run) as call, self._progress(stage, stage.steps) as bar:
            for i in range(stage.steps):
                if self.interrupt:
                    break
                step, t = first + i, timesteps[first + i]
                sigma, sigma_next = run.sigmas[step], run.sigmas[step + 1]
                self._current_timestep = t
                velocity = call(z, t, i)
                if step in keep:
                    history[step] = (z - sigma * velocity).cpu()
                fade = (stage.steps - i) / stage.steps
                alpha, beta = stage.alpha * fade, stage.beta * fade
                if alpha > 0 or beta > 0:
                    x0_ref = guide.reference(step)
                    velocity, v_ref = guided_velocity(
                        z, velocity, x0_ref, sigma, alpha, beta, motion, stage.low_pass, stage.ratio
                    )
                    motion = (velocity, v_ref) if stage.beta > 0 else None
                z = z + (sigma_next - sigma) * velocity
                z = self._end_step(index, i, t, z, run, stage)
                bar.update()
        return self._pack(z).to(run.positive.embeds.dtype), history

    def _end_step(
        self, index: int, i: int, t: torch.Tensor, latents: torch.Tensor, run: Run, stage: Stage | None = None
    ):
        """Check the numbers and run the step callback, which sees packed latents."""
        if not torch.isfinite(latents).all():
            raise NumericsError(
                f"Stage {index}, step {i} (timestep {float(t):.1f}): the latents hold NaN or infinity; "
                f"use bfloat16 or float32 in place of {self.transformer.dtype}, or another attention method."
            )
        if run.on_step is not None:
            packed = latents if stage is None else self._pack(latents)
            values = {"latents": packed, "prompt_embeds": run.positive.embeds}
            changed = run.on_step(self, i, t, {name: values[name] for name in run.on_step_inputs})
            new = changed.pop("latents", packed)
            if new is not packed:
                latents = new if stage is None else self._unpack(new, stage).float()
            run.positive = replace(run.positive, embeds=changed.pop("prompt_embeds", run.positive.embeds))
        if XLA_AVAILABLE:
            xm.mark_step()
        return latents

    # --- one call of the transformer

    def _velocity_call(self, index: int, stage: Stage, run: Run) -> Callable[..., torch.Tensor]:
        """(packed latents, timestep, image ids) -> packed velocity, with true guidance where the stage has it."""
        guidance = None
        if self.transformer.config.guidance_embeds:
            scale = run.guidance_scale * stage.guidance_factor
            guidance = torch.full([1], scale, device=run.device, dtype=torch.float32).expand(run.batch)

        def velocity(
            latents: torch.Tensor, t: torch.Tensor, ids: torch.Tensor, text: Condition, name: str
        ) -> torch.Tensor:
            timestep = t.expand(latents.shape[0]).to(latents.dtype)
            with self.transformer.cache_context(name):
                return self.transformer(
                    hidden_states=latents,
                    timestep=timestep / 1000,
                    guidance=guidance,
                    pooled_projections=text.pooled,
                    encoder_hidden_states=text.embeds,
                    txt_ids=text.ids,
                    img_ids=ids,
                    joint_attention_kwargs=self.joint_attention_kwargs,
                    return_dict=False,
                )[0]

        def call(latents: torch.Tensor, t: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            cond = velocity(latents, t, ids, run.positive, "cond")
            if not run.uses_cfg(index):
                return cond
            uncond = velocity(latents, t, ids, run.negative, "uncond")
            return uncond + run.true_cfg_scale * (cond - uncond)

        return call

    @contextmanager
    def _stage_model(self, index: int, stage: Stage, run: Run) -> Iterator[Callable[..., torch.Tensor]]:
        """(spatial latents, timestep, step in stage) -> spatial velocity in float32.

        Positions and sparse attention are installed meanwhile, and taken out again whatever happens.
        """
        velocity, method = self._velocity_call(index, stage, run), self._stage_attention(stage, run)
        shifts = (1, 0) if stage.patch_shift else (0,)
        tables = {pad: self._position_table(stage, pad, method, run) for pad in shifts}
        ids = {pad: self._image_ids(stage, run, pad) for pad in shifts}
        dtype = run.positive.embeds.dtype

        with self._sparse(method, run) as handle, _positions_of(self.transformer) as install:

            def call(z: torch.Tensor, t: torch.Tensor, i: int) -> torch.Tensor:
                pad = shifts[i % len(shifts)]
                if tables[pad] is not None:
                    tables[pad].set_time(float(t) / self.scheduler.config.num_train_timesteps)
                    install(tables[pad])
                padded = F.pad(z, (pad,) * 4) if pad else z
                v = self._unpack(velocity(self._pack(padded.to(dtype)), t, ids[pad]).float(), stage, pad)
                return v[..., 1:-1, 1:-1] if pad else v

            yield call
            self._report(index, stage, method, handle)

    def _sparse(self, method: Method | None, run: Run) -> AbstractContextManager:
        if method is None:
            return nullcontext()
        return applied(self, method, dense_steps=run.dense_steps, dense_layers=run.dense_layers)

    def _report(self, index: int, stage: Stage, method: Method | None = None, handle: Any = None) -> None:
        facts = {"stage": index, "height": stage.height, "width": stage.width}
        facts["method"] = "dense" if method is None else method.to_dict()
        self.attention_report.append({**facts, **(handle.report() if handle is not None else {})})

    def _position_rule(self, position: str) -> str:
        if position != "auto":
            return position
        return "interpolate" if self._interpolates else "ntk10"

    def _position_table(self, stage: Stage, pad: int, method: Method | None, run: Run) -> PositionTable | None:
        """The stage's rotary table for a latent padded by `pad` pixels; None leaves the model's own in place."""
        rows, cols = self._grid(stage)
        trained = self.native_side**2
        if run.position == "base" or (rows, cols) == run.native_grid:
            return None
        text = run.positive.embeds.shape[1]
        scale = 1.0
        if run.position in PROPORTIONAL and not getattr(method, "proportional", False):
            scale = proportional_scale(rows * cols + text, trained + text)
        own = self.transformer.pos_embed
        return PositionTable(
            own.axes_dim,
            own.theta,
            (rows + pad, cols + pad),
            self.native_side,
            rule=run.position,
            native_grid=run.native_grid,
            offset=-0.5 * pad,
            logit_scale=scale,
        )

    def _stage_attention(self, stage: Stage, run: Run) -> Method | None:
        """The method of a stage; None is dense, as the native size always is."""
        rows, cols = self._grid(stage)
        if (rows, cols) == run.native_grid:
            return None
        facts = self.gensparse_config
        automatic = facts.get("attention", f"neighborhood:window={self.native_side}x{self.native_side}")
        return choose_attention(
            run.attention, rows * cols, automatic=automatic, dense_below=facts.get("dense_below_tokens", DENSE_BELOW)
        )

    # --- enlarging

    def _enlarge(self, smaller: StageResult | torch.Tensor, stage: Stage, run: Run) -> Guide:
        """Decode, enlarge and sharpen, encode again: the start of a stage, and its reference where no estimate is."""
        size = (stage.height, stage.width)
        if isinstance(smaller, StageResult):
            picture, history = self._decode_result(smaller, run.vae_tile), dict(smaller.history)
        else:
            picture, history = smaller, {}
        if picture.shape[-2] * picture.shape[-1] > stage.height * stage.width:
            picture = resample.resize(picture, size)
        amount = stage.sharpen if tuple(picture.shape[-2:]) != size else 0.0
        encoded = torch.cat([self._encode(sample, size, amount, run) for sample in picture.split(1)])
        return Guide(encoded.to(run.device, torch.float32), history)

    def _encode(self, picture: torch.Tensor, size: tuple[int, int], amount: float, run: Run) -> torch.Tensor:
        """Scaled latents [1, C, h, w] of a picture enlarged to `size` on the way."""

        def read(rows: tuple[int, int], cols: tuple[int, int]) -> torch.Tensor:
            return resample.enlarge_sharpened(picture, size, (*rows, *cols), amount)

        tile, mode = self._tiling(size, run.vae_tile)
        if tile is None:
            pixels = read((0, size[0]), (0, size[1])).to(run.device, self.vae.dtype)
            latents = vae_tiles.mode_of(self.vae.encode(pixels))
        else:
            device = get_module_execution_device(self.vae)
            latents = vae_tiles.encode_tiles(self.vae, read, size, tile=tile, mode=mode, device=device)
        return (latents.float() - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

    def _decode_result(self, result: StageResult, vae_tile: int | str | None) -> torch.Tensor:
        """The stage's pictures [B, 3, H, W] in [-1, 1], float32 on the CPU; kept until the next stage is done."""
        if not self._is_decoded(result):
            picture = torch.empty(result.latents.shape[0], 3, result.height, result.width)
            for k, sample in enumerate(picture):
                vae_tiles.fill(self._strips(result, k, vae_tile), sample[None])
            self._decoded = (result, picture.clamp_(-1, 1))
        return self._decoded[1]

    def _is_decoded(self, result: StageResult) -> bool:
        return self._decoded is not None and self._decoded[0] is result

    def preview(self, result: StageResult, max_side: int = 512) -> list[Image.Image]:
        """The pictures of a finished stage, at most `max_side` pixels wide and high."""
        picture = self._decode_result(result, "auto")
        shrink = min(1.0, max_side / max(result.height, result.width))
        size = (max(1, round(result.height * shrink)), max(1, round(result.width * shrink)))
        return self.image_processor.postprocess(F.interpolate(picture, size=size, mode="area"), output_type="pil")

    # --- the autoencoder

    def _tiling(self, size: tuple[int, int], vae_tile: int | str | None) -> tuple[int | None, str]:
        """(tile in pixels or None for one piece, mode)."""
        if vae_tile is None or (vae_tile == "auto" and size[0] * size[1] <= UNTILED_AREA):
            return None, "exact"
        # exact tiles run the network's layers one by one, so their weights must be in place between two calls
        vae_tiles.wake(self.vae)
        device = get_module_execution_device(self.vae)
        in_place = next(self.vae.parameters()).device.type == device.type
        if vae_tile == "feather" or (vae_tile == "auto" and not (in_place and vae_tiles.supports_exact(self.vae))):
            return FEATHER_TILE, "feather"
        if not in_place:
            raise ConfigError(
                f"vae_tile={vae_tile} asks for exact tiles, but the autoencoder is offloaded piece by piece; "
                "leave the VAE out of the offloading, or use vae_tile='feather'."
            )
        return (AUTO_TILE_CPU if device.type == "cpu" else AUTO_TILE) if vae_tile == "auto" else int(vae_tile), "exact"

    def _raw_latents(self, result: StageResult) -> torch.Tensor:
        latents = self._unpack_latents(result.latents, result.height, result.width, self.vae_scale_factor)
        return (latents / self.vae.config.scaling_factor) + (self.vae.config.shift_factor or 0.0)

    def _strips(self, result: StageResult, sample: int, vae_tile: int | str | None) -> vae_tiles.Strips:
        tile, mode = self._tiling((result.height, result.width), vae_tile)
        raw = self._raw_latents(result)[sample : sample + 1]
        if tile is None:
            raw = raw.to(get_module_execution_device(self.vae))
            return iter([(0, self.vae.decode(raw, return_dict=False)[0])])
        device = get_module_execution_device(self.vae)
        return vae_tiles.decode_strips(self.vae, raw, tile=tile, mode=mode, device=device)

    def _pictures(self, result: StageResult, output_type: str, vae_tile: int | str | None) -> Any:
        """Decode the final stage; a tiled picture exists once, as bytes for "pil" and as float32 otherwise."""
        if self._tiling((result.height, result.width), vae_tile)[0] is None:
            raw = self._raw_latents(result).to(get_module_execution_device(self.vae))
            return self.image_processor.postprocess(self.vae.decode(raw, return_dict=False)[0], output_type=output_type)
        count, size = result.latents.shape[0], (result.height, result.width)
        if output_type == "pil" and not self._is_decoded(result):
            strips = (self._strips(result, k, vae_tile) for k in range(count))
            buffers = (torch.empty(*size, 3, dtype=torch.uint8) for _ in range(count))
            return [Image.fromarray(vae_tiles.fill_bytes(s, b).numpy()) for s, b in zip(strips, buffers, strict=True)]
        return self.image_processor.postprocess(self._decode_result(result, vae_tile), output_type=output_type)

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

    def _scheduler_factory(self, native: Stage, sigmas: Sequence[float] | None, device: torch.device):
        """A maker of schedulers set to the native stage's timesteps; the pipeline's own is only copied."""
        config = self.scheduler.config
        if sigmas is None:
            sigmas = np.linspace(1.0, 1 / native.steps, native.steps)
        if config.get("use_flow_sigmas"):
            sigmas = None
        rows, cols = self._grid(native)
        mu = shift_mu(
            rows * cols,
            base_tokens=config.get("base_image_seq_len", 256),
            max_tokens=config.get("max_image_seq_len", 4096),
            base_shift=config.get("base_shift", 0.5),
            max_shift=config.get("max_shift", 1.15),
        )
        template = copy.deepcopy(self.scheduler)
        _, count = retrieve_timesteps(template, native.steps, device, sigmas=sigmas, mu=mu)
        if len(template.sigmas) != len(template.timesteps) + 1 or template.order != 1:
            raise ConfigError(
                f"The cascade needs one sigma per step, which {type(template).__name__} does not give; "
                "use FlowMatchEulerDiscreteScheduler."
            )
        self._num_timesteps = count
        return lambda: copy.deepcopy(template)

    def _noise(self, stage: Stage, run: Run, generator: Any, given: torch.Tensor | None) -> torch.Tensor:
        """Packed noise of a stage. Every stage draws in turn, computed or not, so that a resumed run sees the same."""
        channels = self.transformer.config.in_channels // 4
        noise, _ = self.prepare_latents(
            run.batch,
            channels,
            stage.height,
            stage.width,
            run.positive.embeds.dtype,
            run.device,
            generator,
            given,
        )
        return noise

    def _progress(self, stage: Stage, total: int):
        bar = self.progress_bar(total=total)
        if self._num_stages > 1:
            bar.set_description(f"stage {self._stage + 1}/{self._num_stages} {stage.width}x{stage.height}")
        return bar

    # --- shapes

    def _grid(self, stage: Stage) -> tuple[int, int]:
        return stage.height // self.token_size, stage.width // self.token_size

    def _image_ids(self, stage: Stage, run: Run, pad: int = 0) -> torch.Tensor:
        rows, cols = (n + pad for n in self._grid(stage))
        return self._prepare_latent_image_ids(run.batch, rows, cols, run.device, run.positive.embeds.dtype)

    def _pack(self, z: torch.Tensor) -> torch.Tensor:
        return self._pack_latents(z, *z.shape)

    def _unpack(self, packed: torch.Tensor, stage: Stage, pad: int = 0) -> torch.Tensor:
        extra = 2 * pad * self.vae_scale_factor
        return self._unpack_latents(packed, stage.height + extra, stage.width + extra, self.vae_scale_factor)


# --- pure helpers ---------------------------------------------------------------------------------------------------


def read_config_file(folder: Any) -> dict[str, Any] | None:
    """`gensparse.json` of a local model folder, or None."""
    path = Path(folder) / CONFIG_FILE if isinstance(folder, str | Path) and Path(folder).is_dir() else None
    if path is None or not path.is_file():
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{CONFIG_FILE} of the model is no JSON ({error}); restore the file.") from error
    if not isinstance(facts, dict):
        raise ConfigError(f"{CONFIG_FILE} of the model holds a {type(facts).__name__}; it must be one JSON object.")
    return facts


def choose_attention(
    attention: Method | str | Mapping[str, Any], tokens: int, *, automatic: str, dense_below: int = DENSE_BELOW
) -> Method | None:
    """The method for a stage of `tokens` image tokens; None means dense. Only "auto" may choose dense by size.

    Raises:
        ConfigError: an unknown method or setting.
    """
    if attention == "auto":
        attention = automatic if tokens > dense_below else "dense"
    return None if attention == "dense" else as_method(attention)


@contextmanager
def _positions_of(transformer: torch.nn.Module) -> Iterator[Callable[[torch.nn.Module], None]]:
    """Gives a function that swaps the position embedding; the model's own comes back at the end."""
    model = transformer._orig_mod if is_compiled_module(transformer) else transformer
    own = model.pos_embed
    try:
        yield lambda table: setattr(model, "pos_embed", table)
    finally:
        model.pos_embed = own


def _tuples(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def _steps_to_keep(stages: Sequence[Stage], k: int, steps: int, *, native_draft: bool) -> range:
    """Steps whose estimates stage k must leave behind: the next stage's; all, for a native picture on its own."""
    if k + 1 < len(stages):
        return range(steps - stages[k + 1].steps, steps)
    return range(steps) if k == 0 and native_draft else range(0)


def _last_finished(store: StageStore, stages: Sequence[Stage], sigmas: Sequence[float]) -> StageResult | None:
    """The latest stage that the store holds in a form the next stage can use."""
    for k in reversed(range(len(stages))):
        result = store.load(k)
        if result is not None and result.serves(
            stages[k], sigmas, _steps_to_keep(stages, k, len(sigmas) - 1, native_draft=False)
        ):
            return result
    return None


def _as_picture(image: Any, batch: int) -> torch.Tensor:
    """Any accepted image as float32 [batch, 3, H, W] in [-1, 1]."""
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB"))
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.array(image)).movedim(-1, -3)  # a copy: PIL's own bytes are read-only
        image = image.float() / 255 if image.dtype == torch.uint8 else image
    image = image.float().cpu()
    image = image[None] if image.ndim == 3 else image
    if image.ndim != 4 or image.shape[1] != 3 or image.shape[0] not in (1, batch) or min(image.shape) < 1:
        raise ConfigError(
            f"The image has the shape {tuple(image.shape)}; give an RGB picture, or {batch} pictures as [B, 3, H, W]."
        )
    if not torch.isfinite(image).all() or image.min() < 0 or image.max() > 1:
        raise ConfigError("The image has values outside 0..1; give bytes, or floats from 0 (black) to 1 (white).")
    return image.expand(batch, -1, -1, -1).mul(2).sub_(1)


def _stages_from(
    picture: torch.Tensor, stages: Sequence[Stage], strength: float | None, sigmas: Sequence[float], *, planned: bool
) -> list[Stage]:
    """The stages a given picture still needs: those larger than it, or the last; none redoes more than `strength`."""
    height, width = picture.shape[-2:]
    todo = list(stages[1:]) or [replace(stages[0], steps=max(1, round(len(sigmas[:-1]) * 16 / 30)))]
    if planned:
        todo = [stage for stage in todo[:-1] if stage.height * stage.width > height * width] + todo[-1:]
    if strength is None:
        return todo
    within = steps_within(sigmas, strength)
    first = replace(todo[0], steps=within)
    return [first, *(replace(stage, steps=min(stage.steps, within)) for stage in todo[1:])]


def _check_stages(stages: Sequence[Stage], steps: int, multiple: int) -> None:
    for stage in stages:
        check_size(stage.height, stage.width, multiple)
        if stage.steps > steps:
            raise ConfigError(
                f"The stage {stage.width}x{stage.height} asks for {stage.steps} steps, but the native stage has only "
                f"{steps}; larger stages run the last part of its sigma list."
            )


def _check_options(position: str, strength, image, guidance_stages, vae_tile, output_type) -> None:
    if position != "auto" and position not in RULES:
        raise ConfigError(f"The position rule is {position!r}; choose 'auto' or one of {', '.join(RULES)}.")
    if strength is not None and image is None:
        raise ConfigError(f"strength={strength} is given without an image; pass image=, or leave strength out.")
    if isinstance(guidance_stages, str) and guidance_stages != "all":
        raise ConfigError(f"guidance_stages is {guidance_stages!r}; give stage numbers or 'all'.")
    if isinstance(vae_tile, str) and vae_tile not in ("auto", "feather"):
        raise ConfigError(f"vae_tile is {vae_tile!r}; give pixels, 'auto', 'feather' or None.")
    if isinstance(vae_tile, int) and vae_tile < 64:
        raise ConfigError(f"vae_tile is {vae_tile} pixels; give at least 64.")
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ConfigError(f"output_type is {output_type!r}; choose 'pil', 'np', 'pt' or 'latent'.")
