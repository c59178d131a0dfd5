"""FLUX pictures far beyond the trained size: HiFlow's cascade with sparse attention in its larger stages.

Bu et al., "HiFlow: training-free high-resolution image generation with flow-aligned guidance", arXiv 2504.06232.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from diffusers.utils.torch_utils import is_compiled_module
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    T5EncoderModel,
    T5TokenizerFast,
)

from gensparse.errors import ConfigError
from gensparse.families.flux import native_tokens
from gensparse.highres.rope import RULES, PositionTable, proportional_scale
from gensparse.highres.shift import shift_mu
from gensparse.highres.stages import CascadeSettings, Stage, StageResult, StageStore, plan_stages
from gensparse.methods import Method
from gensparse.pipelines.cascade import (
    DENSE_BELOW,
    Guide,
    Lead,
    Stages,
    as_picture,
    as_tuples,
    check_options,
    check_stages,
    choose_attention,
    last_finished,
    read_config_file,
    stages_from,
    steps_to_keep,
)

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

PATCH = 2  # latent pixels per token and axis
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


class FluxHighresPipeline(Stages, FluxPipeline):
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
        self._init_stages()

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

    def plan(self, height: int | None = None, width: int | None = None, steps: int | None = None) -> list[Stage]:
        """The stages a call with these arguments runs."""
        settings = CascadeSettings(**as_tuples({"patch_shift": not self._interpolates, **self._cascade_config}))
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
        facts = self.gensparse_config
        max_sequence_length = max_sequence_length or facts.get("max_sequence_length", 512)
        given, picture = stages, None
        stages = list(given or self.plan(height, width, len(sigmas) if sigmas is not None else num_inference_steps))
        native, target = stages[0], stages[-1]
        check_stages(stages, len(sigmas) if sigmas is not None else native.steps, self.token_size)
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
        check_options(strength, image, vae_tile, output_type)
        _check_own_options(position, guidance_stages)
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
            picture = as_picture(image, batch)
            stages = stages_from(picture, stages, strength, run.sigmas, planned=given is None)
        self._num_stages = len(stages)

        needed = [steps_to_keep(stages, k, run.steps, native_draft=False) for k in range(len(stages))]
        result = None if stage_store is None else last_finished(stage_store, stages, run.sigmas, needed)
        done = -1 if result is None else result.index
        for k, stage in enumerate(stages):
            noise = self._noise(stage, run, generator, latents if k == 0 and image is None else None)
            if k <= done:
                continue
            self._stage = k
            keep = steps_to_keep(stages, k, run.steps, native_draft=picture is None)
            if k == 0 and picture is None:
                packed, history = self._denoise_native(stage, noise, keep, run)
            else:
                guide = self._enlarge(result if k > 0 else picture, stage, vae_tile, device)
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
        lead = Lead(stage, guide)
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
                velocity = lead(z, velocity, sigma, i, step)
                z = z + (sigma_next - sigma) * velocity
                z = self._end_step(index, i, t, z, run, stage)
                bar.update()
        return self._pack(z).to(run.positive.embeds.dtype), history

    def _end_step(
        self, index: int, i: int, t: torch.Tensor, latents: torch.Tensor, run: Run, stage: Stage | None = None
    ):
        """Check the numbers and run the step callback, which sees packed latents."""
        self._check_numbers(index, i, t, latents, self.transformer)
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

        with (
            self._sparse(method, run.dense_steps, run.dense_layers) as handle,
            _positions_of(self.transformer) as install,
        ):

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

    # --- the autoencoder

    def _raw_latents(self, result: StageResult) -> torch.Tensor:
        latents = self._unpack_latents(result.latents, result.height, result.width, self.vae_scale_factor)
        return (latents / self.vae.config.scaling_factor) + (self.vae.config.shift_factor or 0.0)

    def _model_latents(self, raw: torch.Tensor) -> torch.Tensor:
        return (raw.float() - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

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


@contextmanager
def _positions_of(transformer: torch.nn.Module) -> Iterator[Callable[[torch.nn.Module], None]]:
    """Gives a function that swaps the position embedding; the model's own comes back at the end."""
    model = transformer._orig_mod if is_compiled_module(transformer) else transformer
    own = model.pos_embed
    try:
        yield lambda table: setattr(model, "pos_embed", table)
    finally:
        model.pos_embed = own


def _check_own_options(position: str, guidance_stages: Sequence[int] | str) -> None:
    if position != "auto" and position not in RULES:
        raise ConfigError(f"The position rule is {position!r}; choose 'auto' or one of {', '.join(RULES)}.")
    if isinstance(guidance_stages, str) and guidance_stages != "all":
        raise ConfigError(f"guidance_stages is {guidance_stages!r}; give stage numbers or 'all'.")
