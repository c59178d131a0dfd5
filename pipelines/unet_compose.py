"""An object in a background, in the native stage of UNets: the loop around the method `primecomposer` (2403.05053).

Both pictures are inverted by DPM-Solver++ under a prompt that says nothing. The new picture starts from them. While the
method steers, the composite and the object are beside it in the denoiser call; after the steps it is pasted anew, or
kept around the object's box, by the latents that the inversion passes at that noise.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from gensparse.attach import applied
from gensparse.errors import ConfigError
from gensparse.highres.stages import Stage
from gensparse.methods.base import At
from gensparse.methods.primecomposer import PrimeComposer
from gensparse.pipelines.customize import Cast, joined, parted
from gensparse.pipelines.unet_customize import UNetCustomizes, scales_latents, told_beside, told_like
from gensparse.pipelines.unet_stages import Conditions, Levels, Run, noise_levels
from gensparse.subjects.cast import Concept, Subjects, token_places
from gensparse.subjects.composition import Composition, composition
from gensparse.subjects.inversion import inverted_by_solver, seen, unseen
from gensparse.subjects.placing import Placed

NOTHING = 7788
"""The token that the prompt of the inversion consists of (TF-ICON, 2307.12493)."""


@dataclass(frozen=True, eq=False)
class Composing:
    """What the loop of one picture needs.

    Args:
        own: where the object is, in latent cells.
        path: background and object at every noise level, x = picture + sigma * noise, [2, C, h, w] each.
        scaled: whether latents of the scheduler are such an x; else they are of unit variance.
        end: level at which the stage ends.
    """

    method: PrimeComposer
    own: Placed
    path: list[torch.Tensor]
    levels: Levels
    scaled: bool
    steps: int
    end: int

    @cached_property
    def number(self) -> dict[float, int]:
        """Noise level of a timestep."""
        return {float(t): k for k, t in enumerate(self.levels.timesteps)}

    def steers(self, t: Any) -> bool:
        """Whether the denoiser call of a timestep is steered."""
        return self.method.when(At(step=self.number[float(t)], steps=self.steps)) is None

    def rows(self, z: torch.Tensor, t: Any) -> torch.Tensor:
        """The pictures beside the generated one [1, C, h, w] in a call, as the denoiser gets them."""
        level = self.number[float(t)]
        background, item = seen(self.path[level], self.levels.sigmas[level]).to(z).split(1)
        found = {"composite": self.own.pasted(background, item), "object": self.own.taken(item, z)}
        return torch.cat([found[name] for name in self.method.beside])

    def at(self, level: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Background and object at a level in the form of the scheduler."""
        x = self.path[level]
        first, second = (x if self.scaled else seen(x, self.levels.sigmas[level])).to(like).split(1)
        return first, second

    def start(self, noise: torch.Tensor, init_sigma: float) -> torch.Tensor:
        """What the run begins with, in place of its noise: both pictures, and noise around the object in its box."""
        background, item = (x / init_sigma for x in self.at(0, noise))
        pasted = background if self.method.same_domain else self.own.pasted(background, item)
        free = self.own.inside(noise)
        free.view(-1)[self.own.target.to(free.device)] = False
        return torch.where(free, noise, pasted)

    def behind(self, latents: torch.Tensor, step: int, level: int) -> torch.Tensor:
        """Latents after a step, which are at a noise level."""
        if step < self.method.ends(self.method.paste, self.steps):
            return self.own.pasted(*self.at(level, latents))
        if step < self.method.ends(self.method.keep, self.steps):
            return torch.where(self.own.inside(latents), latents, self.at(level, latents)[0])
        return latents


class UNetComposes(UNetCustomizes):
    """`UNetCustomizes` with an object and a background among what it takes."""

    _composing: Composing | None

    def _init_stages(self) -> None:
        super()._init_stages()
        self._composing = None

    def _denoise_native(
        self, stage: Stage, stages: Sequence[Stage], noise: torch.Tensor, keep: Sequence[int], run: Run
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        cast = self._cast
        if cast is None or not cast.composed:
            return super()._denoise_native(stage, stages, noise, keep, run)
        if run.way.attention("dense", native=True) is not None or run.attention not in ("auto", "dense"):
            self._check_attention(stages, run)
        if run.batch != 1:
            raise ConfigError(
                f"{cast.method.name} composes one picture in a call, and {run.batch} are asked for; call it again, "
                "with another generator."
            )
        what = composition(*cast.pair, (stage.height, stage.width))
        scheduler = run.make_scheduler()
        composing = self._composed(cast, what, stage, run, scheduler)
        timesteps = [t for t in scheduler.timesteps if composing.number[float(t)] < composing.end]

        def after(pipe: Any, i: int, t: torch.Tensor, values: dict[str, Any]) -> dict[str, Any]:
            level = composing.number[float(timesteps[i + 1])] if i + 1 < len(timesteps) else composing.end
            latents = composing.behind(values["latents"], composing.number[float(t)], level)
            if run.on_step is None:
                return {"latents": latents}
            shown = {**values, "latents": latents}
            changed = run.on_step(pipe, i, t, {name: shown[name] for name in run.on_step_inputs})
            return {"latents": latents, **changed}

        more = tuple(dict.fromkeys((*run.on_step_inputs, "latents")))
        own = replace(run, attention="dense", on_step=after, on_step_inputs=more)
        start = composing.start(noise, float(scheduler.init_noise_sigma))
        with self._composes(cast, what, composing):
            # the loop of diffusers itself, behind the one for references
            return super(UNetCustomizes, self)._denoise_native(stage, stages, start, keep, own)

    def _composed(self, cast: Cast, what: Composition, stage: Stage, run: Run, scheduler: Any) -> Composing:
        method, size = cast.method, (stage.height, stage.width)
        assert isinstance(method, PrimeComposer), "checked by its name"
        levels = noise_levels(scheduler)
        end = stage.steps if run.way.segments else run.steps
        self._num_timesteps = steps = end
        pictures = (what.pasted if method.same_domain else what.background, what.object)
        clean = torch.cat([self._encode(x, size, 0.0, run.vae_tile, run.device) for x in pictures]).to(run.device)
        told = self._saying_nothing(run.conditions(stage, run.guidance_scale))
        slope = self._slope(told, levels, run)
        path = inverted_by_solver(unseen(clean.float(), levels.sigmas[-1]), levels.sigmas, slope)
        own = what.placed(tuple(clean.shape[-2:]))
        return Composing(method, own, path, levels, scales_latents(scheduler), steps, end)

    @contextmanager
    def _composes(self, cast: Cast, what: Composition, composing: Composing) -> Iterator[None]:
        """The method on the model, and what it says in the report of the stage."""
        name = cast.pair[1].name
        words = token_places(self.tokenizer, cast.prompt, name) if cast.prompt and composing.method.confine else ()
        if composing.method.confine and not words:
            raise ConfigError(
                f"{cast.method.name} keeps the words {name!r} to the object's place and finds none in the prompt; name "
                "it there, or set confine=false."
            )
        subjects = Subjects(Concept(name, mask=what.mask, region=what.region, tokens=words))
        self._composing = composing
        try:
            with applied(self, cast.method, subjects=subjects) as handle:
                handle.restart(steps=composing.steps)
                yield
                names = [item.name for item in cast.references]
                facts = {"method": cast.method.to_dict(), "names": names, **handle.report()}
                self.attention_report[-1]["subjects"] = facts
        finally:
            self._composing = None

    def _call(
        self,
        z: torch.Tensor,
        t: torch.Tensor,
        conditions: Conditions,
        views: int,
        halves: int,
        time_ids: torch.Tensor | None,
        texts: Any,
    ) -> torch.Tensor:
        composing = self._composing
        if composing is None or not composing.steers(t):
            return super()._call(z, t, conditions, views, halves, time_ids, texts)
        rows = composing.rows(z.chunk(halves)[-1], t)
        count = len(rows)
        embeds, pooled = (
            None if x is None else x.chunk(halves)[-1][:1].expand(count, *x.shape[1:])
            for x in (conditions.embeds, conditions.pooled)
        )
        assert embeds is not None, "every UNet reads a prompt"
        told = told_beside(told_like(embeds, pooled, conditions, halves), conditions, count, halves)
        both = joined(rows.repeat(halves, 1, 1, 1), z, halves)
        return parted(super()._call(both, t, told, views, halves, time_ids, texts), count, 1)

    def _saying_nothing(self, own: Conditions) -> Conditions:
        """What the UNet is told during the inversion of two pictures: one token everywhere, without its place."""
        encoders = [getattr(self, name, None) for name in ("text_encoder", "text_encoder_2")]
        wide, device = own.pooled is not None, own.embeds.device
        outs = [_encoded(encoder, device, wide) for encoder in encoders if encoder is not None]
        if not outs:
            raise ConfigError("primecomposer encodes a prompt for the inversion; load the text encoders.")
        pooled = None
        if not wide:
            embeds = outs[-1][0]
        else:  # as SDXL takes them
            embeds, pooled = torch.cat([out.hidden_states[-2] for out in outs], -1), outs[-1][0].to(own.pooled)
            pooled = pooled.expand(2, *pooled.shape[1:])
        embeds = embeds.to(own.embeds).expand(2, *embeds.shape[1:])
        return told_like(embeds, pooled, own, 2 if self.do_classifier_free_guidance else 1)


# --- pure helpers ---------------------------------------------------------------------------------------------------


def _encoded(encoder: nn.Module, device: torch.device, layers: bool) -> Any:
    """What a text encoder of CLIP says to `NOTHING` at all its places, without embeddings of the places.

    Args:
        layers: whether the outputs of its layers are wanted too.
    """
    config = encoder.config
    token = min(NOTHING, config.vocab_size - 1)
    ids = torch.full((1, config.max_position_embeddings), token, device=device)
    places = [module for name, module in encoder.named_modules() if name.endswith("position_embedding")]
    hooks = [module.register_forward_hook(lambda _module, _args, out: torch.zeros_like(out)) for module in places]
    try:
        return encoder(ids, output_hidden_states=layers)
    finally:
        for hook in hooks:
            hook.remove()
