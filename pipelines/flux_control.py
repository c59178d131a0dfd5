"""ControlNets beside FLUX in every stage: the control picture at the stage's size, their residuals at its steps."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gensparse.errors import ConfigError
from gensparse.highres import resample
from gensparse.highres.stages import Stage
from gensparse.pipelines.cascade import as_picture


@dataclass(frozen=True)
class Condition:
    """One control picture and how it acts.

    Args:
        picture: [B, 3, H, W] in [-1, 1], of any size.
        mode: kind of control of a union model, None for others.
        scale: factor on the residuals.
        start, end: share of the whole run's steps in which it acts.
    """

    picture: torch.Tensor
    mode: int | None
    scale: float
    start: float
    end: float

    def scale_at(self, step: int, steps: int) -> float:
        """The factor at a step, 0 outside of start and end, as diffusers counts them."""
        return 0.0 if step / steps < self.start or (step + 1) / steps > self.end else self.scale


@dataclass(frozen=True)
class Control:
    """What the ControlNets of a call are given: `model` is one net, or several beside each other (`several`)."""

    model: nn.Module
    conditions: tuple[Condition, ...]
    several: bool

    @property
    def nets(self) -> list[nn.Module]:
        return nets_of(self.model)

    @property
    def hints(self) -> bool:
        """Whether nets read pixels by a network of their own; others read the autoencoder's latents."""
        return self.nets[0].input_hint_block is not None

    def at_stage(self, pipe: Any, stage: Stage, run: Any, pads: Sequence[int]) -> "StageControl":
        """The control pictures at the stage's size; `pads` as in `Stages`."""
        shown = [self._fitted(pipe, condition.picture, stage, run) for condition in self.conditions]
        half = (pipe.token_size if self.hints else pipe._patch) // 2

        def padded(picture: torch.Tensor, pad: int) -> torch.Tensor:
            # the border goes on: zeros would be a picture of their own
            picture = F.pad(picture, (half * pad,) * 4, mode="replicate") if pad else picture
            return (picture if self.hints else pipe._pack(picture)).to(run.device, run.dtype)

        inputs = {pad: [padded(picture, pad) for picture in shown] for pad in pads}
        return StageControl(self, inputs, run.batch, run.steps)

    def _fitted(self, pipe: Any, picture: torch.Tensor, stage: Stage, run: Any) -> torch.Tensor:
        """Pixels, or latents, of a control picture at the size of a stage."""
        size = (stage.height, stage.width)
        if picture.shape[-2] * picture.shape[-1] > size[0] * size[1]:
            picture = resample.resize(picture, size).clamp(-1, 1)
        if self.hints:
            return resample.enlarge(picture, size, (0, size[0], 0, size[1])).clamp_(-1, 1)
        encoded = [pipe._encode(one, size, 0.0, run.wishes.vae_tile, run.device) for one in picture.split(1)]
        return torch.cat(encoded)


class StageControl:
    """The ControlNets at the steps of one stage."""

    def __init__(self, control: Control, inputs: Mapping[int, Sequence[torch.Tensor]], batch: int, steps: int) -> None:
        self._control, self._inputs, self._batch, self._steps = control, inputs, batch, steps

    def residuals(self, step: int, pad: int, guidance: torch.Tensor | None, call: Mapping[str, Any]) -> dict[str, Any]:
        """What the transformer is given at a step of the whole run.

        Nothing once no net acts any more. Before nets begin they are run with a factor of 0, as diffusers does, so
        that they count the same steps as the transformer.

        Args:
            guidance: scale of the distilled guidance, for nets that take it.
            call: further arguments, the same as the transformer's.
        """
        control, own = self._control, self._control.conditions
        if not any(item.scale and (step + 1) / self._steps <= item.end for item in own):
            return {}
        scales = [item.scale_at(step, self._steps) for item in own]
        blocks, single = control.model(
            controlnet_cond=list(self._inputs[pad]) if control.several else self._inputs[pad][0],
            controlnet_mode=self._modes(call["hidden_states"].device),
            conditioning_scale=scales if control.several else scales[0],
            guidance=guidance if control.nets[0].config.guidance_embeds else None,
            return_dict=False,
            **call,
        )
        return {
            "controlnet_block_samples": blocks,
            "controlnet_single_block_samples": single,
            "controlnet_blocks_repeat": control.hints,
        }

    def _modes(self, device: torch.device) -> Any:
        modes = [item.mode for item in self._control.conditions]
        if self._control.several:
            return [torch.full((self._batch,), -1 if mode is None else mode, device=device) for mode in modes]
        return None if modes[0] is None else torch.full((self._batch, 1), modes[0], device=device)


def nets_of(model: nn.Module | None) -> list[nn.Module]:
    """The ControlNets in a component `controlnet`."""
    model = getattr(model, "_orig_mod", model)
    return [] if model is None else [getattr(net, "_orig_mod", net) for net in getattr(model, "nets", [model])]


def control_of(
    model: nn.Module | None,
    picture: Any,
    mode: int | Sequence[int | None] | None,
    scale: float | Sequence[float],
    start: float | Sequence[float],
    end: float | Sequence[float],
    batch: int,
) -> Control | None:
    """The control of a call; None without a control picture, which leaves the ControlNet out.

    Raises:
        ConfigError: a control picture without a ControlNet, or arguments that do not fit the ControlNet.
    """
    if picture is None:
        return None
    if model is None:
        raise ConfigError(
            "control_image is given, but this pipeline has no ControlNet; make it from a FluxControlNetPipeline by "
            "from_pipe, or pass controlnet= when loading."
        )
    nets, several = nets_of(model), hasattr(getattr(model, "_orig_mod", model), "nets")
    pictures = list(picture) if several and isinstance(picture, list | tuple) else [picture]
    if len(nets) > 1 and len(pictures) != len(nets):
        raise ConfigError(
            f"There are {len(nets)} ControlNets, but {len(pictures)} control pictures; pass control_image as a list "
            "with one for each."
        )
    count = len(pictures)
    modes = _spread("control_mode", mode, count)
    scales = _spread("controlnet_conditioning_scale", scale, count)
    starts, ends = _spread("control_guidance_start", start, count), _spread("control_guidance_end", end, count)
    conditions = []
    for k, values in enumerate(zip(modes, scales, starts, ends, strict=True)):
        _check(nets[k % len(nets)], *values)
        conditions.append(Condition(as_picture(pictures[k], batch), *values))
    return Control(model, tuple(conditions), several)


def _spread(name: str, value: Any, count: int) -> list[Any]:
    """One value for each control picture."""
    values = list(value) if isinstance(value, list | tuple) else [value] * count
    if len(values) != count:
        raise ConfigError(f"{name} has {len(values)} values for {count} control pictures; pass one, or one for each.")
    return values


def _check(net: nn.Module, mode: Any, scale: Any, start: Any, end: Any) -> None:
    kinds = net.config.num_mode if net.union else None
    if kinds is not None and not (isinstance(mode, int) and 0 <= mode < kinds):
        raise ConfigError(f"control_mode={mode!r} is not allowed; this union ControlNet takes 0 to {kinds - 1}.")
    if kinds is None and mode is not None:
        raise ConfigError(f"control_mode={mode!r} is given, but the ControlNet is no union model; leave it out.")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ConfigError(f"controlnet_conditioning_scale={scale!r} is not allowed; give a number, 0 for none.")
    if not all(isinstance(x, int | float) for x in (start, end)) or not 0 <= start <= end <= 1:
        raise ConfigError(
            f"control_guidance_start={start!r} and control_guidance_end={end!r} are not allowed; give shares of the "
            "steps from 0 to 1, the start first."
        )
