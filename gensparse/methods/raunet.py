"""RAU-Net on a model: hooks on a few modules of a UNet that resample its features in some steps (2311.17528)."""

import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from gensparse.errors import ConfigError
from gensparse.layout import Layout
from gensparse.methods.base import At, Loaded, Place

if TYPE_CHECKING:  # methods are listed and described without torch
    from torch import Tensor, nn

    from gensparse.highres.unet_resample import Levels, Size

BLOCK = 1
"""Level whose features are averaged."""

CONV: Mapping[str, int | None] = {"sd15": 0, "sdxl": 1, "sdxl_inpaint": 1, "sdxl_controlnet": 1, "sdxl_turbo": None}
"""Variant -> level whose convolution strides 4."""

_SHRUNK = (8, 8)  # latent cells for a ControlNet whose answer is not used

_DOWN = {"CrossAttnDownBlock2D", "DownBlock2D"}


def variant_of(model: Any) -> str:
    """sd15, sdxl, sdxl_inpaint or sdxl_turbo, by the config of a UNet."""
    config = model.config
    if config["down_block_types"][0] == "CrossAttnDownBlock2D":
        return "sd15"
    if config["in_channels"] == 9:
        return "sdxl_inpaint"
    return "sdxl_turbo" if config["sample_size"] == 64 else "sdxl"


def native_size(model: Any) -> "Size":
    """(height, width) of the training size in latent cells."""
    size = model.config["sample_size"]
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def why_not(model: Any, variant: str) -> str | None:
    """What a model lacks for RAU-Net of a variant ("auto": its own), or None."""
    config = getattr(model, "config", {})
    types, up_types = config.get("down_block_types") or (), config.get("up_block_types") or ()
    if not up_types or not set(types) <= _DOWN:
        return f"{type(model).__name__} has {', '.join(sorted(set(types) - _DOWN)) or 'no way up'}"
    if len(types) < 3:
        return "it has fewer than three levels"
    if types[BLOCK] != "CrossAttnDownBlock2D" or up_types[-1 - BLOCK] != "CrossAttnUpBlock2D":
        return "its second level has no attention"
    if config.get("downsample_padding", 1) != 1:
        return f"its convolutions have downsample_padding={config['downsample_padding']}"
    if not config.get("sample_size"):
        return "its config has no sample_size"
    own = variant_of(model)
    if variant != "auto" and (variant == "sd15") != (own == "sd15"):
        return f"its first level has {'' if own == 'sd15' else 'no '}attention, so it is no {variant}"
    return None


class _Call(NamedTuple):
    """What is reduced in a denoiser call: the level of the convolution, whether the block is, sizes of both."""

    conv: int | None
    block: bool
    levels: "Levels"


class _Now(threading.local):
    """The call of the running thread that reduces anything."""

    call: _Call | None = None

    def __reduce__(self) -> "tuple[type[_Now], tuple[()]]":
        return _Now, ()


class RauNet(Loaded):
    """Hooks of RAU-Net on one UNet. No class, forward or weight of the model is touched.

    Args:
        variant: of HiDiffusion, or "auto".
        places: sites of the model.
    """

    beside = ("controlnet",)

    def __init__(self, model: "nn.Module", variant: str, places: Mapping[str, Place]) -> None:
        self._auto, self._variant = variant == "auto", variant_of(model) if variant == "auto" else variant
        self._native, self._now = native_size(model), _Now()
        self._pairs = [len(block.resnets) for block in model.down_blocks]
        self._attends = [bool(getattr(block, "has_cross_attention", False)) for block in model.down_blocks]
        last = len(self._pairs) - 1
        inner = len(model.up_blocks[last - BLOCK].attentions) - 2  # the last pair before the features are whole again
        small = {f"down_blocks.{BLOCK}.attentions.{pair}." for pair in range(1, self._pairs[BLOCK])}
        small |= {f"up_blocks.{last - BLOCK}.attentions.{pair}." for pair in range(inner + 1)}
        self._small = {place.layer for name, place in places.items() if name.startswith(tuple(small))}
        self._ran: dict[str, list[int]] = {"conv": [], "block": []}
        self._ran_as = self._variant
        self._handles = [
            model.down_blocks[BLOCK].attentions[0].register_forward_hook(self._pool),
            model.up_blocks[last - BLOCK].attentions[inner].register_forward_hook(self._enlarge),
        ]
        for level in range(last):
            down, up = model.down_blocks[level].downsamplers[0], model.up_blocks[last - 1 - level].upsamplers[0]
            self._handles += [
                down.register_forward_pre_hook(partial(self._thin, level), with_kwargs=True),
                up.register_forward_pre_hook(partial(self._size, level), with_kwargs=True),
            ]

    def begin(self, at: At, arguments: dict[str, Any]) -> bool:
        from gensparse.highres.unet_resample import CONTROLLED, levels, timetable, variant_at

        steps, size = _steps(at), tuple(arguments["sample"].shape[-2:])
        controlled = arguments.get("mid_block_additional_residual") is not None
        variant = variant_at(self._variant, steps=steps, controlled=controlled) if self._auto else self._variant
        table = timetable(variant, size, self._native, steps)
        conv, block = CONV[variant] if at.step in table.conv else None, at.step in table.block
        self._note(at.step, variant, conv=conv is not None, block=block)
        sizes = levels(size, self._pairs, conv=conv, block=BLOCK if block else None)
        self._now.call = _Call(conv, block, sizes) if block or conv is not None else None
        dropped = controlled and self._variant != "sd15" and at.step >= CONTROLLED * steps
        if dropped:
            arguments |= {"mid_block_additional_residual": None, "down_block_additional_residuals": None}
        fitted = _fit_control(arguments, sizes)
        return _fit_adapter(arguments, sizes, levels(size, self._pairs), self._attends) or fitted or dropped

    def begin_beside(self, at: At, arguments: dict[str, Any]) -> bool:
        from gensparse.highres.unet_resample import CONTROLLED, controlled_size

        if self._variant == "sd15":
            return False
        sample = arguments["sample"]
        own = tuple(sample.shape[-2:])
        # an answer that is left out anyway is made of few cells
        used = at.step < CONTROLLED * _steps(at)
        size = controlled_size(own, self._native) if used else _SHRUNK
        if size == own:
            return False
        arguments["sample"] = _nearest(sample, size)
        hints = arguments["controlnet_cond"]
        resized = [_nearest(hint, _scaled(hint, own, size)) for hint in (hints if isinstance(hints, list) else [hints])]
        arguments["controlnet_cond"] = resized if isinstance(hints, list) else resized[0]
        return True

    def layout(self, layout: Layout, at: At) -> Layout:
        from gensparse.highres.unet_resample import halved

        call = self._now.call
        if call is None or not call.block or at.kind not in self._small:
            return layout
        return Layout.image(*halved(layout.grid[1:]))

    def report(self) -> dict[str, Any]:
        return {"raunet": {"variant": self._ran_as, **{what: list(steps) for what, steps in self._ran.items()}}}

    def undo(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, step: int, variant: str, **reduced: bool) -> None:
        """Remember the steps of this run in which anything was reduced."""
        if step == 0:
            self._ran = {what: [] for what in self._ran}
        self._ran_as = variant
        for what, done in reduced.items():
            if done and step not in self._ran[what]:
                self._ran[what].append(step)

    # ------------------------------------------------------------------------------------------------------------ hooks
    def _thin(self, level: int, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the convolution behind a level."""
        from gensparse.highres.unet_resample import thinned

        call = self._now.call
        if call is None or call.conv != level:
            return None
        return (thinned(args[0]), *args[1:]), kwargs

    def _size(self, level: int, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the way up to a level: to the size that the features had there on the way down."""
        call = self._now.call
        if call is None:
            return None
        return (args[0],), {**kwargs, "output_size": call.levels.pairs[level][-1]}

    def _pool(self, _module: Any, _args: Any, output: Any) -> Any:
        """After the first pair of the block."""
        from gensparse.highres.unet_resample import block_rad

        call = self._now.call
        return None if call is None or not call.block else _first(output, block_rad)

    def _enlarge(self, _module: Any, _args: Any, output: Any) -> Any:
        """Before the last pair of the mirrored block."""
        from gensparse.highres.unet_resample import block_rau

        call = self._now.call
        if call is None or not call.block:
            return None
        return _first(output, lambda x: block_rau(x, call.levels.entry[BLOCK]))


def _steps(at: At) -> int:
    if at.steps is None:
        raise ConfigError(
            "RAU-Net reduces features in shares of the run, and a model without its pipeline does not know how many "
            "steps there are; apply to the pipeline, call handle.restart(steps=...) before each run, or pass "
            "raunet=False."
        )
    return at.steps


def _first(output: Any, change: "Callable[[Tensor], Tensor]") -> Any:
    """An output of a transformer, a tuple or a record, with its tensor changed."""
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    return type(output)(sample=change(output.sample))


def _fit_control(arguments: dict[str, Any], sizes: "Levels") -> bool:
    """Residuals of a ControlNet in the sizes of what they are added to; returns whether any had another."""
    from gensparse.highres.unet_resample import block_rau

    middle, down = (arguments.get(f"{where}_block_additional_residual{s}") for where, s in (("mid", ""), ("down", "s")))
    if middle is None or down is None:
        return False
    fitted = [block_rau(x, size) for x, size in zip(down, sizes.skips, strict=True)]
    fitted_middle = block_rau(middle, sizes.exit[-1])
    arguments |= {
        "mid_block_additional_residual": fitted_middle,
        "down_block_additional_residuals": tuple(fitted),
    }
    return fitted_middle is not middle or any(a is not b for a, b in zip(fitted, down, strict=True))


def _fit_adapter(arguments: dict[str, Any], sizes: "Levels", plain: "Levels", attends: list[bool]) -> bool:
    """The same for a T2I-Adapter: one per level, inside of those that attend, and maybe one of the middle.

    Args:
        plain: sizes without any reduction, for which the adapter made them.
    """
    from gensparse.highres.unet_resample import block_rau

    given = arguments.get("down_intrablock_additional_residuals")
    if given is None:
        return False
    wanted = [pairs[-1] if inside else out for pairs, out, inside in zip(sizes.pairs, sizes.exit, attends, strict=True)]
    if len(given) > len(wanted) and tuple(given[len(wanted)].shape[-2:]) == plain.exit[-1]:
        wanted.append(sizes.exit[-1])
    fitted = [block_rau(x, size) for x, size in zip(given, wanted, strict=False)] + list(given[len(wanted) :])
    changed = any(a is not b for a, b in zip(fitted, given, strict=True))
    if changed:  # the model takes them out of the list it is given
        arguments["down_intrablock_additional_residuals"] = fitted
    return changed


def _nearest(x: "Tensor", size: "Size") -> "Tensor":
    import torch.nn.functional as F

    return F.interpolate(x, size=size, mode="nearest")


def _scaled(hint: "Tensor", own: "Size", size: "Size") -> "Size":
    """Pixels of a hint for latents of `size` instead of `own`."""
    rows, columns = (new * (pixels // old) for new, pixels, old in zip(size, hint.shape[-2:], own, strict=True))
    return rows, columns
