"""What all ways to a size beyond the trained one share in pipelines of models of noise: UNets and PixArt."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch

from gensparse.highres.stages import Stage, StageResult
from gensparse.methods import Auto, Method, as_method
from gensparse.pipelines.cascade import Guide, steps_to_keep

Attention = Method | str | Mapping[str, Any]

NoiseOf = Callable[..., torch.Tensor]
"""(x [B, C, h, w], crops = None, texts = None) -> the noise in it, float32.

crops: (row, column) in cells of every view of the batch, which then holds every picture once per view. texts: `Texts`
with a row per sample of the batch, behind the prompts where guidance acts."""


class Texts(NamedTuple):
    """Encoded prompts: embeds [B, T, C], and which tokens are no padding, [B, T], for models that ask."""

    embeds: torch.Tensor
    mask: torch.Tensor | None = None


@dataclass(frozen=True)
class Prompts:
    """What ways may ask about prompts.

    Args:
        words: tokens of the encoded prompt.
        encode: texts -> their encoding, a row each, as the denoiser takes it.
        content: () -> bool [pictures, words], the tokens that are words: no begin, end or padding. Raises ConfigError
            where the prompt came as embeddings.
    """

    words: int
    encode: Callable[[list[str]], Texts]
    content: Callable[[], torch.Tensor]


class Native(NamedTuple):
    """The size of training: latent cells per side, pixels per cell, and cells per token and axis."""

    cells: int
    scale: int
    patch: int = 1

    @property
    def size(self) -> tuple[int, int]:
        return self.cells * self.scale, self.cells * self.scale

    @property
    def multiple(self) -> int:
        """Pixels that sides are multiples of."""
        return self.scale * self.patch


class Moment(NamedTuple):
    """A step of a stage: timestep of 0..T, T, the noise level, what is drawn for windows, and what `prepare` gave."""

    t: float
    train_steps: int
    generator: torch.Generator | None
    sigma: float = 0.0
    held: Any = None


@dataclass(frozen=True)
class Way:
    """Stages that start from the enlarged smaller picture and take the last part of the noise levels."""

    name: ClassVar[str]
    keeps: ClassVar[bool] = False
    """Whether a stage needs the clean estimates of the one before."""
    segments: ClassVar[bool] = False
    """Whether stages share one run: each goes on where the one before stopped, from its clean estimate."""

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """From the settings that `gensparse.highres.ways` reads."""
        return cls(**settings)

    def plan(self, size: tuple[int, int], native: Native, steps: int) -> list[Stage]:
        """Stages up to `size` in pixels, native one first."""
        raise NotImplementedError

    def first_step(self, stages: Sequence[Stage], index: int, steps: int) -> int:
        """The step of the whole list with which a stage begins."""
        later = sum(stage.steps for stage in stages[index + 1 :]) if self.segments else 0
        return steps - later - stages[index].steps

    def keep(self, stages: Sequence[Stage], index: int, steps: int, *, native_draft: bool) -> Sequence[int]:
        """Steps whose clean estimates a stage leaves behind."""
        return steps_to_keep(stages, index, steps, native_draft=native_draft) if self.keeps else ()

    def attention(self, wanted: Attention, *, native: bool, dilated_steps: int = 0) -> Method | None:
        """The method of a stage, None for dense; the native one is dense.

        Args:
            dilated_steps: first steps of the stage that lie in the part of the run in which FreeScale dilates.
        """
        if native or wanted == "dense":
            return None
        return Auto() if wanted == "auto" else as_method(wanted)

    def check(self, run: Any) -> None:
        """ConfigError before the first step of a run with stages beyond the native one that cannot be."""

    def around_native(self, unet: torch.nn.Module) -> AbstractContextManager[None]:
        """What holds during the native stage of several."""
        return nullcontext()

    def guide(self, pipe: Any, smaller: StageResult | torch.Tensor, stage: Stage, run: Any) -> Guide:
        """The smaller picture at the stage's size, as clean latents."""
        return pipe._enlarge(smaller, stage, run.vae_tile, run.device)

    def prepare(self, pipe: Any, smaller: StageResult | torch.Tensor, stage: Stage, guide: Guide, run: Any) -> Any:
        """What a stage beyond the native one needs at every step (`Moment.held`), made once."""
        return None

    def around(self, pipe: Any, held: Any) -> AbstractContextManager[None]:
        """What holds during a stage beyond the native one."""
        return nullcontext()

    def mixed(self, x: torch.Tensor, noised_guide: torch.Tensor, moment: Moment) -> torch.Tensor:
        """x before a step."""
        return x

    def noise(self, x: torch.Tensor, noise_of: NoiseOf, native: Native, moment: Moment) -> torch.Tensor:
        """The noise in x that the step removes."""
        return noise_of(x)

    def finished(self, z: torch.Tensor, guide: Guide, smaller: StageResult | torch.Tensor) -> torch.Tensor:
        """The latents of a stage after its last step."""
        return z
