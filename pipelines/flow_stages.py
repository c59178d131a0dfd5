"""Stages of flow transformers: FLUX.1, Stable Diffusion 3, QwenImage.

z = (1 - sigma) * picture + sigma * noise, and the transformer gives the velocity noise - picture. The first stage is
diffusers' own loop with the pipeline's scheduler, on latents as the transformer takes them. Larger stages follow HiFlow
(Bu et al., arXiv 2504.06232): float32 latents [B, C, h, w], steps z += (sigma_next - sigma) * velocity.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from diffusers.pipelines.flux.pipeline_flux import retrieve_timesteps
from diffusers.utils import is_torch_xla_available
from diffusers.utils.torch_utils import is_compiled_module

from gensparse.errors import ConfigError, unknown_name
from gensparse.families import family_of
from gensparse.highres.rope import DYPE_NOTICE, RULES, proportional_scale
from gensparse.highres.shift import shift_mu
from gensparse.highres.stages import (
    CascadeSettings,
    Stage,
    StageResult,
    StageStore,
    check_size,
    native_shape,
    plan_stages,
)
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
from gensparse.pipelines.registry import check_source

if is_torch_xla_available():
    import torch_xla.core.xla_model as xm

    XLA_AVAILABLE = True
else:
    XLA_AVAILABLE = False

_LOG = logging.getLogger(__name__)

WAYS = ("cascade", "direct", "none")
"""How a size beyond the trained one is reached: in stages, at once with stretched positions, at once as it is."""

PROPORTIONAL = ("ntk10", "imax_clip")  # position rules published together with proportional attention


class Velocity(Protocol):
    """The guided velocity of latents, as the transformer takes and gives them."""

    def __call__(self, latents: torch.Tensor, t: torch.Tensor, pad: int, step: int) -> torch.Tensor:
        """
        Args:
            t: timestep, a scalar tensor; step: its number in the whole list.
            pad: 1 where the latents are half a token larger on every side than their stage.
        """
        ...


@dataclass(frozen=True)
class Wishes:
    """The arguments of a call that all these pipelines share."""

    highres: str
    attention: Method | str | Mapping[str, Any]
    dense_steps: int
    dense_layers: tuple[int, ...]
    position: str
    guidance_stages: Sequence[int] | str
    vae_tile: int | str | None
    on_step: Callable[..., dict] | None
    on_step_inputs: Sequence[str]
    way: Any = None
    """A procedure of its own, see `gensparse.pipelines.flux_ways`; None for the ways of all flows."""


@dataclass
class Run:
    """What all stages of one call share.

    Args:
        velocity: (number of a stage, the stage, this run) -> the velocity there.
        told: tensors that callbacks may see and change; every stage starts from `given`.
        text: text tokens.
        guided: whether there is a negative prompt to guide by.
        native_grid: tokens (rows, columns) of this picture at the size of training.
        position: a key of `gensparse.highres.rope.RULES`.
        anchors: of a stage whose method records the smaller picture; recorded: (stage, this run) -> that call.
        beside: models that run with the transformer, on the same tokens: same positions, same attention.
    """

    wishes: Wishes
    velocity: Callable[[int, Stage, "Run"], Velocity]
    given: Mapping[str, torch.Tensor]
    text: int
    batch: int
    guided: bool
    dtype: torch.dtype
    device: torch.device
    sigmas: tuple[float, ...]
    make_scheduler: Callable[[], Any]
    native_grid: tuple[int, int]
    position: str
    told: dict[str, torch.Tensor] = field(default_factory=dict)
    anchors: Any = None
    recorded: Callable[[Stage, "Run"], dict[str, Any]] | None = None
    beside: Sequence[torch.nn.Module] = ()

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def uses_guidance(self, index: int) -> bool:
        """Whether the negative prompt acts in a stage."""
        stages = self.wishes.guidance_stages
        return self.guided and (stages == "all" or index in stages)


class FlowStages(Stages):
    """Mixed into a diffusers pipeline of a flow transformer, in front of it.

    The pipeline encodes prompts and gives the velocity (`Run.velocity`). What its latents and positions are like it
    says in `_pack`, `_unpack`, `_channels`, `_position_module`, `_position_rule` and `_times`.
    """

    _position_rules: tuple[str, ...] = tuple(RULES)
    _ways: tuple[str, ...] = WAYS
    _default_steps = 30

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        facts = read_config_file(pretrained_model_name_or_path)
        if facts is not None:
            kwargs.setdefault("gensparse_config", facts)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        check_source(pipeline, cls)
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
    def _patch(self) -> int:
        """Latent pixels per token and axis."""
        return 2

    @property
    def token_size(self) -> int:
        """Pixels of a token's side; picture sizes are multiples of it."""
        return self.vae_scale_factor * self._patch

    @property
    def native_side(self) -> int:
        """Tokens per side at which the model was trained."""
        size = self.gensparse_config.get("native_size")
        if size is not None:
            return size // self.token_size
        return round(math.sqrt(family_of(_uncompiled(self.transformer)).native_tokens(self)))

    @property
    def native_size(self) -> int:
        """Pixels per side at which the model was trained."""
        return self.native_side * self.token_size

    def plan(
        self,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        highres: str = "cascade",
    ) -> list[Stage]:
        """The stages a call with these arguments runs.

        Raises:
            ConfigError: a side that is no multiple of `token_size` pixels, or another `highres`.
        """
        if highres not in self._ways:
            raise ConfigError(self._no_way(highres))
        height, width = height or self.native_size, width or self.native_size
        steps = steps or self.gensparse_config.get("num_inference_steps", self._default_steps)
        if highres != "cascade":
            check_size(height, width, self.token_size)
            return [Stage(height, width, steps, sharpen=0.0)]
        return plan_stages(
            height,
            width,
            (self.native_size, self.native_size),
            steps=steps,
            multiple=self.token_size,
            settings=CascadeSettings(**as_tuples({**self._cascade_defaults, **self._cascade_config})),
        )

    @property
    def _cascade_config(self) -> dict[str, Any]:
        return self.gensparse_config.get("cascade", {})

    @property
    def _cascade_defaults(self) -> dict[str, Any]:
        """Where this family's cascade differs from the defaults of `CascadeSettings`."""
        # real guidance acts on every stage with one scale; HiFlow's factors are for FLUX's distilled guidance
        return {"guidance_factor": (1.0,)}

    def _way(self, highres: Any) -> Any:
        """The procedure of its own that `highres` is or names, or None."""
        return None

    def _no_way(self, highres: str) -> str:
        return unknown_name("highres", str(highres), self._ways)

    # --- arguments

    def _checked_stages(
        self,
        given: Sequence[Stage] | None,
        size: tuple[int | None, int | None],
        steps: int | None,
        sigmas: Sequence[float] | None,
        highres: str,
    ) -> list[Stage]:
        """The stages of a call, native one first.

        Raises:
            ConfigError: sizes, steps or `highres` that cannot be.
        """
        listed = steps if sigmas is None else len(sigmas)
        way = self._way(highres)
        if way is None and highres not in self._ways:
            raise ConfigError(self._no_way(highres))
        if given is not None and way is None and highres != "cascade" and len(given) != 1:
            raise ConfigError(
                f"highres={highres!r} renders the size at once, but {len(given)} stages are given; give one, or leave "
                "stages out."
            )
        stages = list(given or self.plan(*size, listed, highres))
        check_stages(stages, stages[0].steps if sigmas is None else len(sigmas), self.token_size)
        return stages

    def _check_wishes(self, wishes: Wishes, stages: Sequence[Stage], strength: Any, image: Any, output: str) -> None:
        """ConfigError for what can be known to be wrong before the first step."""
        check_options(strength, image, wishes.vae_tile, output)
        self._check_tiling(wishes.vae_tile)
        rules, position = self._position_rules, wishes.position
        if position != "auto" and position not in rules:
            raise ConfigError(f"The position rule is {position!r}; choose 'auto' or one of {', '.join(rules)}.")
        if isinstance(wishes.guidance_stages, str) and wishes.guidance_stages != "all":
            raise ConfigError(f"guidance_stages is {wishes.guidance_stages!r}; give stage numbers or 'all'.")
        choose_attention(wishes.attention, 0, automatic="dense")
        if wishes.way is not None:
            wishes.way.check(stages, position)
        self._check_positions(stages, self._position_rule(position, wishes.highres), self._native_grid(stages, wishes))

    def _check_positions(self, stages: Sequence[Stage], position: str, native_grid: tuple[int, int]) -> None:
        """ConfigError where the model's own positions do not reach as far as they are wanted."""

    def _reset(self) -> None:
        self._current_timestep, self._interrupt, self._decoded = None, False, None
        self.attention_report = []

    def _native_grid(self, stages: Sequence[Stage], wishes: Wishes) -> tuple[int, int]:
        """Tokens (rows, columns) of this picture at the size of training."""
        first = self._grid(stages[0])
        staged = wishes.highres == "cascade" or wishes.way is not None
        if staged or first[0] * first[1] <= self.native_side**2:
            return first
        size = (self.native_size, self.native_size)
        height, width = native_shape(stages[0].height, stages[0].width, size, self.token_size)
        return height // self.token_size, width // self.token_size

    def _run(
        self,
        wishes: Wishes,
        stages: Sequence[Stage],
        velocity: Callable[[int, Stage, Run], Velocity],
        make_scheduler: Callable[[], Any],
        told: Mapping[str, torch.Tensor],
        *,
        batch: int,
        guided: bool,
    ) -> Run:
        embeds = told["prompt_embeds"]
        position = self._position_rule(wishes.position, wishes.highres)
        if position.startswith("dy_"):
            _LOG.warning(DYPE_NOTICE)
        return Run(
            wishes=wishes,
            velocity=velocity,
            given=told,
            text=embeds.shape[1],
            batch=batch,
            guided=guided,
            dtype=embeds.dtype,
            device=self._execution_device,
            sigmas=tuple(make_scheduler().sigmas.tolist()),
            make_scheduler=make_scheduler,
            native_grid=self._native_grid(stages, wishes),
            position=position,
        )

    # --- the stages

    def _render(
        self,
        run: Run,
        stages: Sequence[Stage],
        planned: bool,
        image: Any,
        strength: float | None,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        stage_store: StageStore | None,
        callback_on_stage_end: Callable[[Any, StageResult], None] | None,
    ) -> StageResult:
        """All stages, one after the other; the last result that there is."""
        way, picture = run.wishes.way, None
        beyond = run if way is None else way.beyond(self, run)  # what larger stages share
        if image is not None:
            picture = as_picture(image, run.batch)
            stages = stages_from(picture, stages, strength, beyond.sigmas, planned=planned)
        if way is not None:
            way.check_guidance([run.uses_guidance(k) for k in range(len(stages)) if k > 0 or picture is not None])
        self._num_stages = len(stages)
        needed = [self._to_keep(stages, k, run, draft=False) for k in range(len(stages))]
        result = None
        if stage_store is not None:
            first = beyond.sigmas if picture is not None else run.sigmas
            result = last_finished(stage_store, stages, first, needed, larger=beyond.sigmas)
        done = -1 if result is None else result.index
        for k, stage in enumerate(stages):
            # every stage draws in turn, computed or not, so that a resumed run sees the same
            noise = self._noise(stage, run, generator, latents if k == 0 and picture is None else None)
            if k <= done:
                continue
            self._stage, self._stage_size = k, (stage.height, stage.width)
            keep = self._to_keep(stages, k, run, draft=picture is None)
            own = run if k == 0 and picture is None else beyond
            own.told = dict(own.given)
            if k == 0 and picture is None:
                out, history = self._denoise_native(stage, noise, keep, own)
            else:
                smaller = result if k > 0 else picture
                guide = self._enlarge(smaller, stage, own.wishes.vae_tile, own.device)
                own.anchors = None if way is None else way.anchors(self, smaller, stage, own)
                self._decoded = None
                out, history = self._denoise_guided(k, stage, noise, guide, keep, own)
            result = StageResult(k, stage.height, stage.width, own.sigmas, out.cpu(), history)
            if self.interrupt:
                break
            if stage_store is not None:
                stage_store.save(k, result)
            if callback_on_stage_end is not None:
                callback_on_stage_end(self, result)
        self._current_timestep = None
        assert result is not None
        return result

    def _to_keep(self, stages: Sequence[Stage], k: int, run: Run, *, draft: bool) -> Sequence[int]:
        """Steps whose clean estimates stage k leaves behind; none where no stage is led by them."""
        return () if run.wishes.way is not None else steps_to_keep(stages, k, run.steps, native_draft=draft)

    def _finished(self, result: StageResult, output_type: str, run: Run) -> Any:
        """Pictures of the last stage, or its latents."""
        if output_type == "latent":
            images = result.latents.to(run.device)
        else:
            images = self._pictures(result, output_type, run.wishes.vae_tile)
        self._decoded = None
        self.maybe_free_model_hooks()
        return images

    def _denoise_native(self, stage: Stage, latents: torch.Tensor, keep: range, run: Run):
        """Stage 0: exactly diffusers' loop, noting the clean estimates x0 = z - sigma * v.

        At the size of training nothing is installed; in the direct way positions and attention are.
        """
        history: dict[int, torch.Tensor] = {}
        scheduler = run.make_scheduler()
        scheduler.set_begin_index(0)
        self._num_timesteps = run.steps
        velocity_of = run.velocity(0, stage, run)
        with self._installed(0, stage, run, (0,)) as place, self._progress(stage, run.steps) as bar:
            for i, t in enumerate(scheduler.timesteps):
                if self.interrupt:
                    break
                self._current_timestep = t
                place(0, t)
                velocity = velocity_of(latents, t, 0, i)
                if i in keep:
                    x0 = latents.float() - run.sigmas[i] * velocity.float()
                    history[i] = self._unpack(x0, stage).cpu()
                before = (latents, run.sigmas[i], velocity)
                latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
                latents = self._end_step(0, i, t, latents, before, run)
                bar.update()
        return latents, history

    def _denoise_guided(self, index: int, stage: Stage, noise: torch.Tensor, guide: Guide, keep: range, run: Run):
        """A larger stage: its last steps from the noised enlargement, each velocity led by the smaller picture.

        Latents [B, C, h, w], float32; HiFlow section 3. On every other step of a stage with `patch_shift` the model
        sees them half a token larger on every side.
        """
        history: dict[int, torch.Tensor] = {}
        timesteps, first = run.make_scheduler().timesteps, run.steps - stage.steps
        drawn = self._unpack(noise, stage).float()
        z = torch.lerp(guide.encoded, drawn, run.sigmas[first]) if stage.steps else guide.encoded
        half = self._patch // 2
        pads = (1, 0) if stage.patch_shift and half else (0,)
        lead, velocity_of = Lead(stage, guide), run.velocity(index, stage, run)
        self._num_timesteps = stage.steps
        with self._installed(index, stage, run, pads) as place, self._progress(stage, stage.steps) as bar:
            for i in range(stage.steps):
                if self.interrupt:
                    break
                step, t, pad = first + i, timesteps[first + i], pads[i % len(pads)]
                sigma, sigma_next = run.sigmas[step], run.sigmas[step + 1]
                self._current_timestep = t
                place(pad, t)
                padded = F.pad(z, (half,) * 4) if pad else z
                velocity = self._unpack(velocity_of(self._pack(padded.to(run.dtype)), t, pad, step).float(), stage, pad)
                if pad:
                    velocity = velocity[..., half:-half, half:-half]
                if step in keep:
                    history[step] = (z - sigma * velocity).cpu()
                velocity = lead(z, velocity, sigma, i, step)
                before = (z, sigma, velocity)
                z = z + (sigma_next - sigma) * velocity
                z = self._pinned(z, partial(torch.lerp, guide.encoded, drawn, sigma_next), stage.border)
                z = self._end_step(index, i, t, z, before, run, stage)
                bar.update()
        return self._pack(z).to(run.dtype), history

    def _end_step(
        self,
        index: int,
        i: int,
        t: torch.Tensor,
        latents: torch.Tensor,
        before: tuple[torch.Tensor, float, torch.Tensor],
        run: Run,
        stage: Stage | None = None,
    ) -> torch.Tensor:
        """Check the numbers and run the step callback, which sees latents as the transformer takes them.

        `before` = (latents, sigma, velocity) of the step.
        """
        self._check_numbers(index, i, t, latents, self.transformer)
        if run.wishes.on_step is not None:
            packed = latents if stage is None else self._pack(latents)
            values = {**run.told, "latents": packed}
            if "clean" in run.wishes.on_step_inputs:
                z, sigma, velocity = before
                clean = z.float() - sigma * velocity.float()
                values["clean"] = clean if stage is None else self._pack(clean)
            changed = run.wishes.on_step(self, i, t, {name: values[name] for name in run.wishes.on_step_inputs})
            new = changed.pop("latents", packed)
            if new is not packed:
                latents = new if stage is None else self._unpack(new, stage).float()
            run.told |= {name: changed.pop(name) for name in run.told if name in changed}
        if XLA_AVAILABLE:
            xm.mark_step()
        return latents

    # --- positions and attention

    @contextmanager
    def _installed(
        self, index: int, stage: Stage, run: Run, pads: Sequence[int]
    ) -> Iterator[Callable[[int, torch.Tensor], None]]:
        """Positions and sparse attention during a stage, taken out again whatever happens.

        Gives (pad, timestep) -> None, which puts the positions of the coming step in place.
        """
        wishes = run.wishes
        chosen, automatic = self._stage_attention(stage, run), wishes.attention == "auto" and wishes.way is None
        with (
            self._sparse_beside(run.beside, chosen, wishes.dense_steps, stage.steps, automatic=automatic) as beside,
            self._sparse(chosen, wishes.dense_steps, wishes.dense_layers, automatic=automatic) as handle,
            _positions_of(self.transformer, *run.beside) as install,
        ):
            method = None if handle is None else handle.method
            tables = {pad: self._position_table(stage, pad, method, run) for pad in pads}

            def place(pad: int, t: torch.Tensor) -> None:
                if tables[pad] is not None:
                    tables[pad].set_time(float(t) / self.scheduler.config.num_train_timesteps)
                    install(tables[pad])

            if run.anchors is not None and method is not None and method.records:
                table = self._position_table(stage, 0, method, run)
                if table is not None:
                    table.image_tokens = run.anchors.tokens
                    install(table)
                assert run.recorded is not None, "set where there are ways that record"
                with self.transformer.cache_context("anchors"):
                    handle.record(keep_on=run.wishes.way.keep_on, **run.recorded(stage, run))
            yield place
            self._report(index, stage, method, handle, beside)

    def _position_table(self, stage: Stage, pad: int, method: Method | None, run: Run) -> Any:
        """The module that takes the place of the transformer's `pos_embed`; None leaves its own there."""
        rows, cols = self._grid(stage)
        if run.position == "base" or (rows, cols) == run.native_grid:
            return None
        scale = 1.0
        way = run.wishes.way
        proportional = run.position in PROPORTIONAL and (way is None or way.proportional)
        if proportional and not getattr(method, "proportional", False):
            scale = proportional_scale(rows * cols + run.text, self.native_side**2 + run.text)
        return self._position_module((rows + pad, cols + pad), -0.5 * pad, scale, run)

    def _position_module(self, grid: tuple[int, int], offset: float, logit_scale: float, run: Run) -> Any:
        """What stands for `pos_embed` on a grid of tokens.

        Args:
            grid: (rows, columns), with the token more that a shifted grid has.
            offset: tokens by which the grid is shifted.
            logit_scale: factor on all logits.
        """
        raise NotImplementedError

    def _position_rule(self, position: str, highres: str) -> str:
        """The rule that "auto" stands for."""
        raise NotImplementedError

    def _stage_attention(self, stage: Stage, run: Run) -> Method | None:
        """The method of a stage; None is dense, as the native size of a cascade always is."""
        rows, cols = self._grid(stage)
        way = run.wishes.way
        if (run.wishes.highres == "cascade" or way is not None) and (rows, cols) == run.native_grid:
            return None
        if way is not None:
            return way.attention(run.wishes.attention, (rows, cols), run.anchors)
        facts = self.gensparse_config
        automatic = facts.get("attention", f"neighborhood:window={self.native_side}x{self.native_side}")
        dense_below = facts.get("dense_below_tokens", DENSE_BELOW)
        return choose_attention(run.wishes.attention, rows * cols, automatic=automatic, dense_below=dense_below)

    # --- time

    def _scheduler_factory(
        self, native: Stage, sigmas: Sequence[float] | None, device: torch.device, mu: float | None = None
    ) -> Callable[[], Any]:
        """A maker of schedulers set to the first stage's timesteps; the pipeline's own is only copied."""
        template = copy.deepcopy(self.scheduler)
        _, count = retrieve_timesteps(template, native.steps, device, **self._times(native, sigmas, mu))
        if len(template.sigmas) != len(template.timesteps) + 1 or template.order != 1:
            raise ConfigError(
                f"The cascade needs one sigma per step, which {type(template).__name__} does not give; "
                "use FlowMatchEulerDiscreteScheduler."
            )
        self._num_timesteps = count
        return lambda: copy.deepcopy(template)

    def _times(self, native: Stage, sigmas: Sequence[float] | None, mu: float | None) -> dict[str, Any]:
        """Arguments of `scheduler.set_timesteps` beside the number of steps, as diffusers' pipeline gives them."""
        raise NotImplementedError

    def _shift(self, native: Stage, max_shift: float = 1.15) -> float:
        """mu for the tokens of the first stage, never above the scheduler's own `max_shift`."""
        rows, cols = self._grid(native)
        config = self.scheduler.config
        return shift_mu(
            rows * cols,
            base_tokens=config.get("base_image_seq_len", 256),
            max_tokens=config.get("max_image_seq_len", 4096),
            base_shift=config.get("base_shift", 0.5),
            max_shift=config.get("max_shift", max_shift),
        )

    # --- latents

    @property
    def _channels(self) -> int:
        """Channels of the autoencoder's latents."""
        return self.transformer.config.in_channels // self._patch**2

    def _noise(self, stage: Stage, run: Run, generator: Any, given: torch.Tensor | None) -> torch.Tensor:
        """Noise of a stage as the transformer takes it."""
        drawn = self.prepare_latents(
            run.batch, self._channels, stage.height, stage.width, run.dtype, run.device, generator, given
        )
        return drawn[0] if isinstance(drawn, tuple) else drawn

    def _grid(self, stage: Stage) -> tuple[int, int]:
        return stage.height // self.token_size, stage.width // self.token_size

    def _pack(self, z: torch.Tensor) -> torch.Tensor:
        """Latents [B, C, h, w] as the transformer takes them."""
        return self._pack_latents(z, *z.shape)

    def _unpack(self, packed: torch.Tensor, stage: Stage, pad: int = 0) -> torch.Tensor:
        """The reverse; with `pad` of a grid that has a token more per axis than the stage."""
        extra = pad * self.token_size
        return self._unpack_latents(packed, stage.height + extra, stage.width + extra, self.vae_scale_factor)

    def _raw_latents(self, result: StageResult) -> torch.Tensor:
        return self._unscaled(self._unpack(result.latents, Stage(result.height, result.width, 0)))

    def _unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [B, C, h, w] as decode() takes them."""
        return (latents / self.vae.config.scaling_factor) + (self.vae.config.shift_factor or 0.0)

    def _clean_latents(self, clean: torch.Tensor) -> torch.Tensor:
        return self._unpack(clean, Stage(*self._stage_size, 0))

    def _decoder_latents(self, latents: torch.Tensor) -> torch.Tensor:
        return self._unscaled(latents)

    def _model_latents(self, raw: torch.Tensor) -> torch.Tensor:
        return (raw.float() - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor


# --- pure helpers ---------------------------------------------------------------------------------------------------


def _uncompiled(model: torch.nn.Module) -> torch.nn.Module:
    return model._orig_mod if is_compiled_module(model) else model


@contextmanager
def _positions_of(*models: torch.nn.Module) -> Iterator[Callable[[torch.nn.Module], None]]:
    """Gives a function that swaps the position embeddings; the models' own come back at the end."""
    plain = [_uncompiled(model) for model in models]
    own = [model.pos_embed for model in plain]

    def install(table: torch.nn.Module) -> None:
        for model in plain:
            model.pos_embed = table

    try:
        yield install
    finally:
        for model, table in zip(plain, own, strict=True):
            model.pos_embed = table
