"""Stages of models of noise: the UNets of Stable Diffusion 1.5, 2 and XL, and PixArt.

The native stage is diffusers' own loop with the pipeline's scheduler. All larger stages work on x = x0 + sigma * noise
in float32 with steps x += (sigma_next - sigma) * noise, which is DDIM and Euler at once; the model sees
x / sqrt(1 + sigma^2). Their noise levels are the scheduler's.
"""

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg, retrieve_timesteps
from diffusers.utils import is_torch_xla_available
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from gensparse.errors import ConfigError
from gensparse.highres.stages import Stage, StageResult, StageStore, check_size
from gensparse.methods import Auto, Method
from gensparse.pipelines.cascade import Lead, Stages, as_picture, last_finished, read_config_file, stages_from
from gensparse.pipelines.registry import say_left_out
from gensparse.pipelines.unet_ways import as_way, dilated_share
from gensparse.pipelines.way import Attention, Moment, Native, Prompts, Texts, Way

if is_torch_xla_available():
    import torch_xla.core.xla_model as xm

    XLA_AVAILABLE = True
else:
    XLA_AVAILABLE = False

Crops = Sequence[tuple[int, int]]


@dataclass
class Conditions:
    """What the UNet is told besides latents and time; where guidance acts, the negative half of the batch comes first.

    Args:
        embeds: [B or 2B, T, C]; negative: the negative ones alone, for callbacks.
        pooled: [B or 2B, P], and time_ids: [B or 2B, 6], of SDXL.
        images: embeddings of image prompts, one tensor per adapter.
        timestep: embedding of the guidance scale [B, D], for UNets that take it.
        mask: which tokens are no padding, [B or 2B, T], for PixArt.
    """

    embeds: torch.Tensor
    negative: torch.Tensor | None = None
    pooled: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None
    images: list[torch.Tensor] | None = None
    timestep: torch.Tensor | None = None
    mask: torch.Tensor | None = None


class Levels(NamedTuple):
    """Timesteps of a run, each once, and their noise levels sigma with the final one; no levels where none are used."""

    timesteps: tuple[torch.Tensor, ...]
    sigmas: tuple[float, ...]


@dataclass
class Run:
    """What all stages of one call share.

    Args:
        conditions: (stage, guidance scale of the stage) -> what the UNet is told.
        time_ids: (stage, crops, halves) -> time ids of a batch of views, or None.
        prompts: what ways may ask about them.
    """

    way: Way
    native: Native
    batch: int
    dtype: torch.dtype
    device: torch.device
    conditions: Callable[[Stage, float], Conditions]
    time_ids: Callable[[Stage, Crops, int], torch.Tensor | None]
    prompts: Prompts
    make_scheduler: Callable[[], Any]
    levels: Levels
    guidance_scale: float
    attention: Attention
    dense_steps: int
    dense_layers: tuple[int, ...]
    vae_tile: int | str | None
    extra_step_kwargs: dict[str, Any]
    on_step: Callable | None
    on_step_inputs: Sequence[str]

    @property
    def steps(self) -> int:
        return len(self.levels.timesteps)


class Draws:
    """Random numbers of a run: the first stage's from the caller's generator, all others from generators of their own.

    So a stage draws the same numbers whether the stages before it were computed or resumed, also with samplers that
    draw at every step.
    """

    def __init__(self, generator: torch.Generator | list[torch.Generator] | None) -> None:
        self._own = generator
        given = generator if isinstance(generator, list) else [] if generator is None else [generator]
        self._start = [(g.device, g.get_state()) for g in given]

    def of(self, stage: int) -> Any:
        """The generator (or a list of them) for the noise of a stage."""
        if stage == 0 or not self._start:
            return self._own
        found = [self._child(*start, 2 * stage) for start in self._start]
        return found if isinstance(self._own, list) else found[0]

    def windows(self, stage: int) -> torch.Generator:
        """A CPU generator for the windows of a stage."""
        if not self._start:
            return torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        return torch.Generator().manual_seed(self._child(*self._start[0], 2 * stage + 1).initial_seed())

    @staticmethod
    def _child(device: torch.device, state: torch.Tensor, number: int) -> torch.Generator:
        seeds = torch.Generator(device)
        seeds.set_state(state)
        seed = torch.randint(2**62, (number + 1,), generator=seeds, device=device)[number]
        return torch.Generator(device).manual_seed(int(seed))


class UNetStages(Stages):
    """Mixed into a diffusers pipeline of a UNet; the pipeline encodes prompts and says what else the UNet is told.

    Denoisers of other kinds that predict noise may stand for the UNet, see `_denoiser` and `_call`.
    """

    gensparse_config: Mapping[str, Any] = MappingProxyType({})
    """What the model says of itself in gensparse.json."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        out = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        out.gensparse_config = read_config_file(pretrained_model_name_or_path) or {}
        return out

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        say_left_out(pipeline, cls)
        # diffusers would drop an AutoencoderTiny and cast the shared weights to float32
        kwargs.setdefault("vae", pipeline.vae)
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", pipeline.dtype)
        out = super().from_pipe(pipeline, **kwargs)
        told = getattr(pipeline, "gensparse_config", None)
        out.gensparse_config = told or read_config_file(pipeline.config.get("_name_or_path")) or {}
        return out

    # --- what the model says about itself

    @property
    def _denoiser(self) -> torch.nn.Module:
        return self.unet

    @property
    def native(self) -> Native:
        """The size of training in latent cells."""
        size = self._denoiser.config.sample_size
        cells = size if isinstance(size, int) else round(math.sqrt(size[0] * size[1]))
        return Native(cells, self.vae_scale_factor)

    @property
    def native_size(self) -> int:
        """Pixels per side at which the model was trained."""
        return self.native.size[0]

    def plan(
        self, height: int | None = None, width: int | None = None, steps: int = 50, highres: Way | str = "cascade"
    ) -> list[Stage]:
        """The stages a call with these arguments runs, native one first.

        Raises:
            ConfigError: a side that is no multiple of the VAE's factor (8; PixArt: 16), or another `highres`.
        """
        size = (height or self.native_size, width or self.native_size)
        check_size(*size, self.native.multiple)
        return self._way(highres).plan(size, self.native, steps)

    def _way(self, highres: Way | str) -> Way:
        return as_way(highres, self.gensparse_config.get("cascade"))

    # --- the run

    def _stages_of(
        self, given: Sequence[Stage], planned: bool, image: Any, strength: float | None, run: Run
    ) -> tuple[list[Stage], torch.Tensor | None]:
        """The stages to run and the picture to start from, if there is one."""
        if image is None:
            return list(given), None
        picture, steps = as_picture(image, run.batch), run.steps
        if run.way.segments:
            if strength is not None:
                raise ConfigError(f"strength={strength} has no meaning for {run.way.name}; leave it out.")
            return list(given[1:]) or list(given), picture
        shares = [(steps - i) / steps for i in range(steps + 1)]
        return stages_from(picture, given, strength, shares, planned=planned), picture

    def _render(
        self,
        run: Run,
        stages: Sequence[Stage],
        picture: torch.Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        stage_store: StageStore | None,
        callback_on_stage_end: Callable[[Any, StageResult], None] | None,
    ) -> StageResult:
        """All stages, one after the other; the last result that there is."""
        draws, sigmas = Draws(generator), run.levels.sigmas
        draft, numbers = picture is None, range(len(stages))
        keep = [run.way.keep(stages, k, run.steps, native_draft=draft) for k in numbers]
        needed = [() if run.way.segments else run.way.keep(stages, k, run.steps, native_draft=False) for k in numbers]
        result = None if stage_store is None else last_finished(stage_store, stages, sigmas, needed)
        done = -1 if result is None else result.index
        self._num_stages = len(stages)
        if len(stages) > 1 or not draft:
            run.way.check(run)
        for k, stage in enumerate(stages):
            if k <= done:
                continue
            self._stage, self._guidance_scale = k, run.guidance_scale
            noise = self._noise_of(stage, run, draws.of(k), latents if k == 0 and draft else None)
            if k == 0 and draft:
                out, history = self._denoise_native(stage, stages, noise, keep[0], run)
            else:
                smaller = result if result is not None else picture
                windows = draws.windows(k)
                out, history = self._denoise_larger(k, stages, noise, smaller, keep[k], run, windows)
            if run.way.segments and k + 1 < len(stages) and not self.interrupt:
                (out,), history = history.values(), {}  # the clean estimate of the last step goes on
            result = StageResult(k, stage.height, stage.width, sigmas, out.cpu(), history)
            if self.interrupt:
                break
            if stage_store is not None:
                stage_store.save(k, result)
            if callback_on_stage_end is not None:
                callback_on_stage_end(self, result)
        self._current_timestep = None
        assert result is not None
        return result

    def _denoise_native(
        self, stage: Stage, stages: Sequence[Stage], noise: torch.Tensor, keep: Sequence[int], run: Run
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Stage 0: exactly the loop of diffusers' pipeline, noting clean estimates."""
        history: dict[int, torch.Tensor] = {}
        scheduler, conditions = run.make_scheduler(), run.conditions(stage, run.guidance_scale)
        latents = noise * scheduler.init_noise_sigma
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        number = {float(t): i for i, t in enumerate(run.levels.timesteps)}
        end = stage.steps if run.way.segments else run.steps
        timesteps = [t for t in scheduler.timesteps if number[float(t)] < end]
        method = run.way.attention(run.attention, native=True)
        shown = _levels_to_show(run, scheduler)
        self._num_timesteps = len(timesteps)
        around = run.way.around_native(self._denoiser) if len(stages) > 1 else nullcontext()
        with self._installed(0, stage, method, run), around, self._progress(stage, end) as bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    break
                self._current_timestep = t
                z = scheduler.scale_model_input(latents, t)
                prediction = self._predict(z, t, conditions, self.guidance_scale)
                step = number[float(t)]
                if step in keep:
                    history[step] = self._estimate(prediction, z, run.levels.sigmas[step]).cpu()
                clean = self._estimate(prediction, z, shown[step]) if shown else None
                latents = scheduler.step(prediction, t, latents, **run.extra_step_kwargs, return_dict=False)[0]
                latents = self._end_step(0, i, t, latents, conditions, run, clean)
                if i == len(timesteps) - 1 or (i + 1) % scheduler.order == 0:
                    bar.update()
        return latents, history

    def _denoise_larger(
        self,
        index: int,
        stages: Sequence[Stage],
        noise: torch.Tensor,
        smaller: StageResult | torch.Tensor,
        keep: Sequence[int],
        run: Run,
        windows: torch.Generator,
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """A stage from its noised guide on, led by it as the way says."""
        stage, way, sigmas, noise = stages[index], run.way, run.levels.sigmas, noise.float()
        history: dict[int, torch.Tensor] = {}
        first, train_steps = way.first_step(stages, index, run.steps), self.scheduler.config.num_train_timesteps
        guide = way.guide(self, smaller, stage, run)
        held = way.prepare(self, smaller, stage, guide, run)
        self._decoded = None
        x = guide.encoded + sigmas[first] * noise if stage.steps else guide.encoded
        lead, conditions = Lead(stage, guide), run.conditions(stage, run.guidance_scale * stage.guidance_factor)
        method = way.attention(run.attention, native=False, dilated_steps=dilated_share(first, run.steps))
        self._num_timesteps = stage.steps
        around = way.around(self, held)
        with self._installed(index, stage, method, run), around, self._progress(stage, stage.steps) as bar:
            for i in range(stage.steps):
                if self.interrupt:
                    break
                step, t = first + i, run.levels.timesteps[first + i]
                sigma, sigma_next = sigmas[step], sigmas[step + 1]
                self._current_timestep = t
                moment = Moment(float(t), train_steps, windows, sigma, held)
                x = way.mixed(x, guide.encoded + sigma * noise, moment)
                noise_of = partial(self._noise_at, t, sigma, conditions, stage, run)
                own = way.noise(x, noise_of, run.native, moment)
                if step in keep:
                    history[step] = (x - sigma * own).cpu()
                own = lead(x, own, sigma, i, step)
                clean = x - sigma * own
                x = x + (sigma_next - sigma) * own
                x = self._pinned(x, partial(torch.add, guide.encoded, noise, alpha=sigma_next), stage.border)
                x = self._end_step(index, i, t, x, conditions, run, clean)
                bar.update()
        sigma = sigmas[first + stage.steps] if stage.steps else 0.0
        z = way.finished(x / math.sqrt(1 + sigma**2), guide, smaller)
        return z.to(run.dtype), history

    @contextmanager
    def _installed(self, index: int, stage: Stage, method: Method | None, run: Run):
        """Sparse attention during a stage, taken out again whatever happens."""
        automatic = isinstance(method, Auto)
        with self._sparse(method, run.dense_steps, run.dense_layers, automatic=automatic) as handle:
            if handle is not None:
                handle.restart(steps=stage.steps)
            yield
            self._report(index, stage, method, handle)

    def _end_step(
        self,
        index: int,
        i: int,
        t: torch.Tensor,
        latents: torch.Tensor,
        conditions: Conditions,
        run: Run,
        clean: torch.Tensor | None,
    ) -> torch.Tensor:
        """Check the numbers and run the step callback; `clean` is what the step estimates, where that is known."""
        self._check_numbers(index, i, t, latents, self._denoiser)
        if run.on_step is not None:
            values = {
                "latents": latents,
                "clean": clean,
                "prompt_embeds": conditions.embeds,
                "negative_prompt_embeds": conditions.negative,
                "add_text_embeds": conditions.pooled,
                "add_time_ids": conditions.time_ids,
            }
            changed = run.on_step(self, i, t, {name: values[name] for name in run.on_step_inputs})
            latents = changed.pop("latents", latents)
            conditions.embeds = changed.pop("prompt_embeds", conditions.embeds)
            conditions.negative = changed.pop("negative_prompt_embeds", conditions.negative)
            conditions.pooled = changed.pop("add_text_embeds", conditions.pooled)
            conditions.time_ids = changed.pop("add_time_ids", conditions.time_ids)
        if XLA_AVAILABLE:
            xm.mark_step()
        return latents

    # --- one call of the UNet

    def _noise_at(
        self,
        t: torch.Tensor,
        sigma: float,
        conditions: Conditions,
        stage: Stage,
        run: Run,
        x: torch.Tensor,
        crops: Crops | None = None,
        texts: Texts | None = None,
    ) -> torch.Tensor:
        """The noise in x = x0 + sigma * noise, float32; see `NoiseOf` for crops and texts."""
        z = x / math.sqrt(1 + sigma**2)
        time_ids = None
        if crops is not None:
            time_ids = run.time_ids(stage, crops, 2 if self.do_classifier_free_guidance else 1)
        scale, views = self.guidance_scale * stage.guidance_factor, 1 if crops is None else len(crops)
        prediction = self._predict(z.to(run.dtype), t, conditions, scale, views, time_ids, texts)
        return self._noise_in(prediction.float(), z, sigma)

    def _predict(
        self,
        z: torch.Tensor,
        t: torch.Tensor,
        conditions: Conditions,
        scale: float,
        views: int = 1,
        time_ids: torch.Tensor | None = None,
        texts: Texts | None = None,
    ) -> torch.Tensor:
        """The guided output of the denoiser."""
        guided = self.do_classifier_free_guidance
        both = torch.cat([z] * 2) if guided else z
        out = self._call(both, t, conditions, views, 2 if guided else 1, time_ids, texts)
        if not guided:
            return out
        unconditional, text = out.chunk(2)
        out = unconditional + scale * (text - unconditional)
        if self.guidance_rescale > 0.0:
            out = rescale_noise_cfg(out, text, guidance_rescale=self.guidance_rescale)
        return out

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
        """The output of the denoiser for all halves of guidance."""
        added: dict[str, Any] = {}
        if conditions.pooled is not None:
            added["text_embeds"] = repeated(conditions.pooled, views, halves)
            added["time_ids"] = repeated(conditions.time_ids, views, halves) if time_ids is None else time_ids
        if conditions.images is not None:
            added["image_embeds"] = [repeated(x, views, halves) for x in conditions.images]
        return self.unet(
            z,
            t,
            encoder_hidden_states=with_texts(
                repeated(conditions.embeds, views, halves), None if texts is None else texts.embeds
            ),
            timestep_cond=None if conditions.timestep is None else repeated(conditions.timestep, views, 1),
            cross_attention_kwargs=self.cross_attention_kwargs,
            added_cond_kwargs=added or None,
            return_dict=False,
        )[0]

    def _estimate(self, prediction: torch.Tensor, z: torch.Tensor, sigma: float) -> torch.Tensor:
        """The clean latents that a prediction for z = (x0 + sigma * noise) / sqrt(1 + sigma^2) means, float32."""
        x = z.float() * math.sqrt(1 + sigma**2)
        return x - sigma * self._noise_in(prediction.float(), z.float(), sigma)

    def _noise_in(self, prediction: torch.Tensor, z: torch.Tensor, sigma: float) -> torch.Tensor:
        """What a prediction of the UNet for z = (x0 + sigma * noise) / sqrt(1 + sigma^2) says about the noise."""
        kind = self.scheduler.config.get("prediction_type", "epsilon")
        share = 1 / math.sqrt(1 + sigma**2)  # of the picture in z; sigma * share is that of the noise
        if kind == "v_prediction":
            return share * prediction + sigma * share * z
        if kind == "sample":
            return (z / share - prediction) / sigma
        return prediction

    # --- preparation

    def _prepare_run_state(self, guidance_scale, guidance_rescale, clip_skip, cross_attention_kwargs) -> None:
        self._guidance_scale, self._guidance_rescale = guidance_scale, guidance_rescale
        self._clip_skip, self._cross_attention_kwargs = clip_skip, cross_attention_kwargs
        self._denoising_end, self._current_timestep = None, None
        self._interrupt, self._decoded = False, None
        self.attention_report = []

    def _scheduler_factory(
        self, steps: int, timesteps: Any, sigmas: Any, device: torch.device, *, native_only: bool
    ) -> tuple[Callable[[], Any], Levels]:
        """A maker of schedulers set to the run's timesteps, and its levels; the pipeline's own is only copied.

        Args:
            native_only: nothing but the native stage runs, so that any scheduler will do.
        """
        template = copy.deepcopy(self.scheduler)
        retrieve_timesteps(template, steps, device, timesteps, sigmas)
        levels = Levels(distinct(template)[0], ()) if native_only else noise_levels(template)
        return (lambda: copy.deepcopy(template)), levels

    def _noise_of(self, stage: Stage, run: Run, generator: Any, given: torch.Tensor | None) -> torch.Tensor:
        """Unit noise [B, C, h, w] of a stage."""
        if given is not None:
            return given.to(run.device)
        cells = (stage.height // self.vae_scale_factor, stage.width // self.vae_scale_factor)
        shape = (run.batch, self._denoiser.config.in_channels, *cells)
        return randn_tensor(shape, generator=generator, device=run.device, dtype=run.dtype)

    def _step_kwargs(self, generator: Any, eta: float) -> dict[str, Any]:
        accepted = inspect.signature(self.scheduler.step).parameters
        found = {"eta": eta, "generator": generator}
        return {name: value for name, value in found.items() if name in accepted}

    def _content(self, prompts: Sequence[Any], tokenizers: Sequence[Any], count: int, words: int) -> torch.Tensor:
        """`Prompts.content`: words by any of the tokenizers, each with its prompt, or else the first one."""
        if prompts[0] is None:
            raise ConfigError(
                "Screened attention needs the words of the prompt, which was given as embeddings; pass prompt=..., or "
                "highres=CUpscale(screening=False)."
            )
        found = None
        for prompt, tokenizer in zip(prompts, tokenizers, strict=True):
            if tokenizer is None:
                continue
            texts = prompts[0] if prompt is None else prompt
            texts = [texts] if isinstance(texts, str) else list(texts)
            convert = getattr(self, "maybe_convert_prompt", None)  # words of textual inversions are several tokens
            own = content_words(tokenizer, texts if convert is None else convert(texts, tokenizer), words)
            found = own if found is None else found | own
        assert found is not None, "a pipeline without any tokenizer takes no prompt"
        return found.repeat_interleave(count, 0)

    def _timestep_condition(self, scale: float, batch: int, device: torch.device, dtype: torch.dtype):
        """Embedding of the guidance scale, for UNets distilled with it."""
        width = self.unet.config.time_cond_proj_dim
        if width is None:
            return None
        scales = torch.tensor(scale - 1).repeat(batch)
        return self.get_guidance_scale_embedding(scales, embedding_dim=width).to(device=device, dtype=dtype)

    # --- the autoencoder

    def _raw_latents(self, result: StageResult) -> torch.Tensor:
        return self._decoder_latents(result.latents).to(self.vae.dtype)

    def _model_latents(self, raw: torch.Tensor) -> torch.Tensor:
        raw = raw.float()
        mean, std = _statistics(self.vae.config, raw)
        return (raw - mean) * self.vae.config.scaling_factor / std

    @contextmanager
    def _whole_range(self):
        """The autoencoder in float32 where float16 would overflow; its weights are the same bits afterwards."""
        if self.vae.dtype != torch.float16 or not getattr(self.vae.config, "force_upcast", False):
            yield
            return
        self.vae.to(dtype=torch.float32)
        try:
            yield
        finally:
            self.vae.to(dtype=torch.float16)

    def _encode(self, *args: Any) -> torch.Tensor:
        with self._whole_range():
            return super()._encode(*args)

    def _decode_result(self, *args: Any) -> torch.Tensor:
        with self._whole_range():
            return super()._decode_result(*args)

    def _pictures(self, *args: Any) -> Any:
        with self._whole_range():
            return super()._pictures(*args)

    def _clean_latents(self, clean: torch.Tensor) -> torch.Tensor:
        return clean

    def _decoder_latents(self, latents: torch.Tensor) -> torch.Tensor:
        mean, std = _statistics(self.vae.config, latents)
        return latents * std / self.vae.config.scaling_factor + mean

    def sketch(self, clean: torch.Tensor, max_side: int = 256) -> Image.Image:
        with self._whole_range():
            return super().sketch(clean, max_side)


# --- pure helpers ---------------------------------------------------------------------------------------------------


def repeated(x: torch.Tensor, times: int, halves: int) -> torch.Tensor:
    """Each half of a batch (or the one) `times` times."""
    return x if times == 1 else torch.cat([half.repeat(times, *(1,) * (x.ndim - 1)) for half in x.chunk(halves)])


def with_texts(embeds: torch.Tensor, texts: torch.Tensor | None) -> torch.Tensor:
    """Encoded prompts [B, T, ...] with further ones behind them in the last rows, and zeros in those before."""
    if texts is None:
        return embeds
    texts = texts.to(embeds)
    blank = texts.new_zeros(len(embeds) - len(texts), *texts.shape[1:])
    return torch.cat([embeds, torch.cat([blank, texts])], 1)


def content_words(tokenizer: Any, texts: list[str], words: int) -> torch.Tensor:
    """bool [texts, words]: tokens that are words, neither begin nor end nor padding."""
    found = tokenizer(texts, padding="max_length", max_length=words, truncation=True, return_tensors="pt")
    ends = [n for n in (tokenizer.bos_token_id, tokenizer.eos_token_id) if n is not None]
    return found.attention_mask.bool() & ~torch.isin(found.input_ids, torch.tensor(ends))


def noise_levels(scheduler: Any) -> Levels:
    """The distinct timesteps of a scheduler, and sigma = sqrt((1 - abar) / abar) at each and behind the last.

    Raises:
        ConfigError: a scheduler of another kind of model, whose latents have another form, or with second-order steps.
    """
    name = type(scheduler).__name__
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ConfigError(f"{name} is no scheduler of a model of noise; use DDIMScheduler or EulerDiscreteScheduler.")
    if scheduler.order != 1:
        raise ConfigError(
            f"{name} takes {scheduler.order} calls per step; use one with a call per step, such as Euler."
        )
    timesteps, places = distinct(scheduler)
    if hasattr(scheduler, "sigmas") and len(scheduler.sigmas) == len(scheduler.timesteps) + 1:
        known = scheduler.sigmas.tolist()
        sigmas = [known[i] for i in places] + [known[-1]]
    else:
        abar = scheduler.alphas_cumprod.double().cpu()
        last = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
        kept = [float(abar[round(float(t))]) for t in timesteps] + [last]
        sigmas = [math.sqrt((1 - a) / a) for a in kept]
    probe = copy.deepcopy(scheduler)
    one = torch.ones(1, device=scheduler.timesteps.device)
    scaled = float(probe.scale_model_input(one, scheduler.timesteps[0]))
    if not any(math.isclose(scaled, form, rel_tol=1e-3) for form in (1.0, 1 / math.sqrt(1 + sigmas[0] ** 2))):
        raise ConfigError(
            f"{name} scales the model's input in its own way; use DDIMScheduler or EulerDiscreteScheduler."
        )
    return Levels(timesteps, tuple(sigmas))


def _levels_to_show(run: Run, scheduler: Any) -> tuple[float, ...]:
    """Noise levels of a native stage for a callback that wants clean estimates; none for others, or where unknown."""
    if run.on_step is None or "clean" not in run.on_step_inputs:
        return ()
    if run.levels.sigmas:
        return run.levels.sigmas
    try:
        return noise_levels(scheduler).sigmas
    except ConfigError:  # any scheduler will do for a native stage alone
        return ()


def distinct(scheduler: Any) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
    """Timesteps of a scheduler, each once (some take two calls at one), and where each stands first."""
    listed = scheduler.timesteps.tolist()
    places = tuple(listed.index(t) for t in dict.fromkeys(listed))
    return tuple(scheduler.timesteps[i] for i in places), places


def _statistics(config: Any, like: torch.Tensor) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """Mean and standard deviation per channel of the autoencoder's latents, where its config has them."""
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None or std is None:
        return 0.0, 1.0
    return tuple(torch.tensor(x).view(1, -1, 1, 1).to(like) for x in (mean, std))  # type: ignore[return-value]
