"""HiDiffusion: a UNet above its training size, by smaller deep features (RAU-Net) and windows (2311.17528)."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from gensparse.errors import ConfigError
from gensparse.layout import Layout
from gensparse.methods.base import START, At, Dense, Loaded, Place, Subject
from gensparse.methods.checks import flag, one_of
from gensparse.methods.msw_msa import MswMsa
from gensparse.methods.raunet import CONV, RauNet, why_not
from gensparse.patterns import Pattern

VARIANTS = ("auto", *CONV)


@dataclass(frozen=True)
class HiDiffusion(MswMsa):
    """RAU-Net shrinks the deep features of the first steps, so that a UNet does not repeat subjects in large pictures.

    The features stay as small as at the training size while the picture takes shape, and are whole again afterwards, so
    that the last steps are the plain UNet's. In all steps the largest attention blocks run in windows (see `msw_msa`),
    which is what makes large pictures quick. No weights are needed, and any fine-tuned checkpoint or LoRA works. It
    reduces features at any size, so apply it for pictures above the training size only.

    Works in text to image, image to image, inpainting and ControlNet pipelines; intervals are shares of the steps that
    the run really takes. A ControlNet of SDXL runs on latents of the training size, for the first 0.6 of the steps;
    residuals of ControlNets and T2I-Adapters are enlarged or shrunk to the features they are added to.
    `report()["raunet"]` tells in which steps of the last run the convolutions and the blocks were reduced. A model
    without its pipeline needs `handle.restart(steps=...)` before each run.

    Args:
        blocks: names of the windowed blocks, joined by "+"; None for those of the highest resolution with attention, as
            published.
        draw: "block": a roll of the windows per step and block, as the authors' code has it; "step": one per step for
            all blocks.
        seed: of the rolls, from 0.
        raunet: whether features are reduced.
        windows: whether blocks are windowed.
        variant: sd15 (also 2.1), sdxl, sdxl_inpaint (also Playground v2, which looks like SDXL), sdxl_controlnet or
            sdxl_turbo. "auto" tells them by attention at the first level, 9 input channels, ControlNet residuals, and
            for Turbo a training size of 64 latent cells or a run of at most 4 steps.

    Raises:
        ConfigError: a setting of another form, neither raunet nor windows, or (when applied) a model that is no UNet of
            these kinds; at the first call: the number of steps is not known.
    """

    name: ClassVar[str] = "hidiffusion"
    paper: ClassVar[str] = (
        "HiDiffusion: Unlocking Higher-Resolution Creativity and Efficiency (Zhang et al.), arXiv 2311.17528"
    )
    licence: ClassVar[str] = "code Apache-2.0; no weights"
    use: ClassVar[str] = "whole pictures of Stable Diffusion 1.5, 2.1 and XL at two to four times the size of training"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "sd1.5": {"variant": "sd15", "blocks": "down_blocks.0+up_blocks.3"},
        "sd2.1": {"variant": "sd15", "blocks": "down_blocks.0+up_blocks.3"},
        "sdxl": {"variant": "sdxl", "blocks": "down_blocks.1+up_blocks.1"},
        "sdxl-inpainting": {"variant": "sdxl_inpaint", "blocks": "down_blocks.1+up_blocks.1"},
        "playground-v2": {"variant": "sdxl_inpaint", "blocks": "down_blocks.1+up_blocks.1"},
        "sdxl-turbo": {"variant": "sdxl_turbo", "blocks": "down_blocks.1+up_blocks.1"},
    }

    raunet: bool = True
    windows: bool = True
    variant: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        flag(self.name, "raunet", self.raunet)
        flag(self.name, "windows", self.windows)
        one_of(self.name, "variant", self.variant, VARIANTS)
        if not (self.raunet or self.windows):
            raise ConfigError("hidiffusion raunet=False and windows=False leave nothing to do; turn one of them on.")

    def resolved(self, subject: Subject) -> Self:
        settled = super().resolved(subject)
        reason = why_not(subject.model, self.variant) if self.raunet else None
        if reason is not None:
            raise ConfigError(
                f"hidiffusion variant={self.variant!r} does not fit this {type(subject.model).__name__}: {reason}; "
                "apply it to a UNet of Stable Diffusion 1.5, 2.1 or XL, with another variant, or pass raunet=False."
            )
        return settled

    def kind(self, place: Place) -> Hashable:
        windowed = self.windows and super().kind(place) is not None
        return place.layer if windowed else None  # by layer even for one draw per step: their sizes differ

    def pattern(self, layout: Layout, at: At = START) -> Pattern | Dense:
        if not self.windows:
            return Dense("hidiffusion windows=False leaves attention dense")
        return super().pattern(layout, at)

    def index(self, at: At) -> int:
        return super().index(at._replace(kind="all") if self.draw == "step" else at)

    def load(self, subject: Subject, places: Mapping[str, Place]) -> Loaded | None:
        return RauNet(subject.model, self.variant, places) if self.raunet else None
