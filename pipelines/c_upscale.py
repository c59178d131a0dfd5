"""C-Upscale: windows of the native size that keep a picture's structure and read prompts of their own (2505.16976)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from gensparse.errors import ConfigError, short
from gensparse.highres import views
from gensparse.highres.c_upscale import Part, hann_window
from gensparse.highres.resample import resize
from gensparse.highres.stages import Stage, StageResult, native_shape, stage_sizes
from gensparse.methods import Method
from gensparse.pipelines.cascade import Guide
from gensparse.pipelines.way import Attention, Moment, Native, NoiseOf, Texts, Way
from gensparse.processors.composer import Composer, Scene, ViewTexts
from gensparse.processors.text_attention import text_attention
from gensparse.subjects.region_prompts import (
    Box,
    RegionPrompt,
    as_region_prompts,
    read_region_prompts,
    region_masks,
)

Captioner = Callable[[Image.Image, Box], str]
"""(picture of a window, its box as shares of the picture) -> its prompt."""

MERGES = ("mean", "hann")


@dataclass(frozen=True)
class CUpscale(Way):
    """C-Upscale (Qian et al., arXiv 2505.16976): regional denoising led by three priors, in one jump to the target.

    The enlarged picture is noised, and at every step windows of the native size are denoised and merged.

    - Structure: low frequencies of the clean estimate are pulled to the smaller picture's, by a weight that falls from
      `structure` to 0.
    - Attention: the native picture, noised to the same level, is run once per step; where a word matters little there,
      windows attend little to it, so that not every window draws the whole subject.
    - Semantics: windows attend to prompts of their own beside the picture's.

    The authors' code is not released, and the text that could be read names no constants. Ours are: windows every half
    of their side, as DemoFusion's; the low-pass and the linear fade of HiFlow; log-relevance as the form of screening;
    `semantic`, `share`; that only the conditional half of guidance is composed; and that rectangles of a file may cut
    through windows. There tokens outside all rectangles read the picture's prompt alone.

    Args:
        regions: prompts for parts of the picture: `RegionPrompt` values (or mappings with "box" and "prompt"), a JSON
            file of them, or a function that captions a window (`Captioner`, such as
            `gensparse.subjects.captions.VisionCaptioner`); then every window reads its own caption, which costs a call
            of it per window: (2 zoom - 1)^2.
        semantic: weight of those prompts, 0..1.
        structure: weight of the structure prior at the first step, 0..1; stages of your own bring it as `alpha`.
        screening: whether attention is screened.
        share: share of the steps that the large size runs.
        window: latent cells per side of a window; None for the native size.
        merge: "mean" of the windows, or "hann": weights that fall to their borders, against seams.
        view_batch: windows that run at once.

    Raises:
        ConfigError: a setting of another kind or range, regions that leave the picture, a file that is not there.
    """

    name: ClassVar[str] = "c_upscale"

    regions: tuple[RegionPrompt, ...] | str | Path | Captioner = ()
    semantic: float = 0.5
    structure: float = 1.0
    screening: bool = True
    share: float = 0.7
    window: int | None = None
    merge: str = "mean"
    view_batch: int = 16

    def __post_init__(self) -> None:
        if isinstance(self.regions, str | Path):
            object.__setattr__(self, "regions", read_region_prompts(self.regions))
        elif not callable(self.regions):
            object.__setattr__(self, "regions", as_region_prompts(self.regions))
        for name in ("semantic", "structure", "share"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ConfigError(f"c_upscale {name}={value!r} is not allowed; give a number from 0 to 1.")
        if not isinstance(self.screening, bool):
            raise ConfigError(f"c_upscale screening={self.screening!r} is not allowed; give True or False.")
        if self.merge not in MERGES:
            raise ConfigError(f"c_upscale merge={self.merge!r} is not allowed; give {' or '.join(MERGES)}.")
        for name in ("window", "view_batch"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"c_upscale {name}={value!r} is not allowed; give an integer from 1 up.")

    def plan(self, size: tuple[int, int], native: Native, steps: int) -> list[Stage]:
        first, *larger = stage_sizes(*size, native.size, multiple=native.multiple)
        own = Stage(*first, steps, sharpen=0.0)
        large = {"alpha": float(self.structure), "sharpen": 0.0}
        return [own, *(Stage(*last, max(1, round(steps * self.share)), **large) for last in larger[-1:])]

    def attention(self, wanted: Attention, *, native: bool, dilated_steps: int = 0) -> Method | None:
        return super().attention("dense" if wanted == "auto" else wanted, native=native)  # windows are of native size

    # --- once per run, and per stage

    def check(self, run: Any) -> None:
        if self.screening:
            run.prompts.content()
        if self.window is not None and self.window % run.native.patch:
            raise ConfigError(
                f"c_upscale window={self.window} is no multiple of {run.native.patch} cells, a token's side."
            )

    def prepare(self, pipe: Any, smaller: StageResult | torch.Tensor, stage: Stage, guide: Guide, run: Any) -> Any:
        cells = (guide.encoded.shape[-2], guide.encoded.shape[-1])
        side = self.window or run.native.cells
        found = views.windows(cells, (side, side), (max(1, side // 2),) * 2)
        texts, masks = self._texts(pipe, smaller, stage, cells, found, run)
        if texts is None and not self.screening:
            return _Held(found, None, [], [], 0, None, run.batch)
        composer = Composer(self.semantic, run.prompts.content() if self.screening else None)
        low = None
        if self.screening:
            shape = native_shape(stage.height, stage.width, run.native.size, run.native.multiple)
            size = [length // run.native.scale for length in shape]
            low = F.interpolate(guide.encoded, size=size, mode="bicubic", align_corners=False, antialias=True)
        return _Held(found, composer, texts or [], masks, run.prompts.words, low, run.batch)

    def _texts(
        self, pipe: Any, smaller: Any, stage: Stage, cells: tuple[int, int], found: list[views.View], run: Any
    ) -> tuple[list[Texts] | None, list[torch.Tensor]]:
        """For every window its prompts, encoded, one row per picture, and masks [prompts, h, w]; None without any."""
        if self.semantic == 0 or self.regions == ():
            return None, []
        if callable(self.regions):
            words = _captions(self.regions, pipe, smaller, stage, cells, found, run)
            encoded = [run.prompts.encode(own) for own in words]
            one = [torch.ones(1, view.bottom - view.top, view.right - view.left, dtype=torch.bool) for view in found]
            return encoded, one
        whole = region_masks([region.box for region in self.regions], cells)
        masks = [torch.from_numpy(np.ascontiguousarray(view.of(whole))) for view in found]
        own = run.prompts.encode([region.prompt for region in self.regions])
        joined = Texts(*(None if x is None else x.flatten(0, 1)[None].expand(run.batch, *_rest(x)) for x in own))
        return [joined] * len(found), masks

    @contextmanager
    def around(self, pipe: Any, held: "_Held") -> Iterator[None]:
        if held.composer is None:
            yield
            return
        with text_attention(pipe._denoiser, held.composer):
            yield

    # --- every step

    def noise(self, x: torch.Tensor, noise_of: NoiseOf, native: Native, moment: Moment) -> torch.Tensor:
        held: _Held = moment.held
        if held.low is not None:
            with held.composer.recording(held.batch):
                noise_of(held.noised(moment))
        found = held.views
        if len(found) == 1 and held.composer is None:
            return noise_of(x)
        size = (x.shape[-2], x.shape[-1])
        alone = len(found) == 1  # the whole picture, whose crop is its own

        def predict(group: list[views.View]) -> torch.Tensor:
            crops = None if alone else [(view.top, view.left) for view in group]
            parts = torch.cat([view.of(x) for view in group])
            with held.composing(group, size) as texts:
                return noise_of(parts, crops, texts)

        weigh = partial(_hann, device=x.device) if self.merge == "hann" else None
        return views.averaged(predict, found, x, self.view_batch, weigh)


@dataclass
class _Held:
    """What a stage needs at every step.

    Args:
        views: the windows; texts and masks: of each, where there are regional prompts.
        composer: of cross-attention; None where nothing is composed.
        words: tokens of the picture's prompt.
        low: the clean native picture as latents, where attention is screened.
        batch: pictures.
    """

    views: list[views.View]
    composer: Composer | None
    texts: list[Texts]
    masks: list[torch.Tensor]
    words: int
    low: torch.Tensor | None
    batch: int
    low_noise: torch.Tensor | None = field(default=None)

    def noised(self, moment: Moment) -> torch.Tensor:
        """The native picture under noise of its own, the same at every step."""
        assert self.low is not None
        if self.low_noise is None:
            drawn = torch.randn(self.low.shape, generator=moment.generator)
            self.low_noise = drawn.to(self.low)
        return self.low + moment.sigma * self.low_noise

    @contextmanager
    def composing(self, group: list[views.View], size: tuple[int, int]) -> Iterator[Texts | None]:
        """Inside, cross-attention of a batch of windows is composed; gives their texts, row by row of the batch."""
        if self.composer is None:
            yield None
            return
        numbers = [self.views.index(view) for view in group]
        texts, masks = None, [torch.zeros(0, 1, 1, dtype=torch.bool)] * len(group)
        lengths: tuple[int, ...] = ()
        if self.texts:
            own, masks = [self.texts[n] for n in numbers], [self.masks[n] for n in numbers]
            texts = Texts(*(None if rows[0] is None else torch.cat(rows) for rows in zip(*own, strict=True)))
            lengths = (texts.embeds.shape[1] // len(masks[0]),) * len(masks[0])
        shown = tuple(ViewTexts(_part(view, size), mask) for view, mask in zip(group, masks, strict=True))
        with self.composer.composing(Scene(shown, self.batch, self.words, lengths)):
            yield texts


def _captions(
    caption: Captioner, pipe: Any, smaller: Any, stage: Stage, cells: tuple[int, int], found: list[views.View], run: Any
) -> list[list[str]]:
    """For every window what `caption` says of each picture."""
    pictures = pipe._decode_result(smaller, run.vae_tile) if isinstance(smaller, StageResult) else smaller
    height, width = pictures.shape[-2:]
    words: list[list[str]] = []
    try:
        for view in found:
            top, bottom, left, right = _part(view, cells)
            rows, columns = _pixels(top, bottom, height), _pixels(left, right, width)
            size = ((view.bottom - view.top) * run.native.scale, (view.right - view.left) * run.native.scale)
            crops = resize(pictures[..., rows, columns], size).clamp(-1, 1)
            shown = pipe.image_processor.postprocess(crops, output_type="pil")
            words.append([_said(caption(crop, (left, top, right, bottom))) for crop in shown])
    finally:
        release = getattr(caption, "release", None)
        if release is not None:  # a model of its own gives its memory back before the picture is drawn
            release()
    return words


def _said(caption: Any) -> str:
    if not isinstance(caption, str) or not caption.strip():
        raise ConfigError(f"The captioner gave {short(caption)} for a window; it must give a text with words.")
    return caption


def _pixels(start: float, stop: float, length: int) -> slice:
    first = min(round(start * length), length - 1)
    return slice(first, max(first + 1, round(stop * length)))


def _part(view: views.View, size: tuple[int, int]) -> Part:
    return view.top / size[0], view.bottom / size[0], view.left / size[1], view.right / size[1]


def _hann(view: views.View, device: torch.device) -> torch.Tensor:
    return hann_window(view.bottom - view.top, view.right - view.left, device)


def _rest(x: torch.Tensor) -> tuple[int, ...]:
    return (x.shape[0] * x.shape[1], *x.shape[2:])
