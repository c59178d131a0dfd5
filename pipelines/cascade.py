"""What pipelines of several stages share: a picture of any size in, stages one after the other, tiles and previews.

`Stages` is mixed into pipelines in diffusers' manner. What a model is like (how latents are laid out, what a step is)
stays in the pipeline's own file.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import get_module_execution_device
from PIL import Image

from gensparse.attach import applied, attached
from gensparse.errors import ConfigError, NumericsError
from gensparse.highres import resample, vae_tiles
from gensparse.highres.faithful import keep_to
from gensparse.highres.frequency import Motion, guided_velocity
from gensparse.highres.marked import free_cells
from gensparse.highres.stages import Stage, StageResult, StageStore, check_size, steps_within
from gensparse.highres.tiling import Tiling, choose_tiling, parse_tiling
from gensparse.methods import Method, as_method
from gensparse.processors.tally import merged

CONFIG_FILE = "gensparse.json"
DENSE_BELOW = 8192  # tokens up to which attention="auto" stays dense, unless the model's config says otherwise
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass(frozen=True)
class Guide:
    """The smaller picture that leads a stage: its clean estimates by step, and its encoded enlargement otherwise."""

    encoded: torch.Tensor
    history: Mapping[int, torch.Tensor]

    def reference(self, step: int) -> torch.Tensor:
        """x0_ref at `step`, float32 at the stage's own size."""
        x0 = self.history.get(step)
        if x0 is None:
            return self.encoded
        x0 = x0.to(self.encoded.device, torch.float32)
        return F.interpolate(x0, size=self.encoded.shape[-2:], mode="bicubic", align_corners=False)


class Lead:
    """HiFlow's guidance along one stage (arXiv 2504.06232, section 3); its weights fall linearly to 0.

    Works on any sampler of the form z += (sigma_next - sigma) * velocity with x0 = z - sigma * velocity: flow models,
    and models of noise where z = x0 + sigma * noise and the noise is the velocity.
    """

    def __init__(self, stage: Stage, guide: Guide) -> None:
        self.stage, self.guide = stage, guide
        self._motion: Motion | None = None

    def __call__(self, z: torch.Tensor, velocity: torch.Tensor, sigma: float, i: int, step: int) -> torch.Tensor:
        """The velocity to follow at the stage's i-th step, which is `step` of the whole list; float32 [B, C, h, w]."""
        stage = self.stage
        fade = (stage.steps - i) / stage.steps
        alpha, beta = stage.alpha * fade, stage.beta * fade
        if not (alpha > 0 or beta > 0):
            return velocity
        x0_ref = self.guide.reference(step)
        velocity, v_ref = guided_velocity(
            z, velocity, x0_ref, sigma, alpha, beta, self._motion, stage.low_pass, stage.ratio
        )
        self._motion = (velocity, v_ref) if stage.beta > 0 else None
        return velocity


class Stages:
    """Mixed into a diffusers pipeline that renders in stages.

    The pipeline says how latents of a `StageResult` become what its autoencoder takes (`_raw_latents`) and the way back
    (`_model_latents`).
    """

    attention_report: list[dict[str, Any]]
    _stage: int
    _num_stages: int
    _stage_size: tuple[int, int]
    _decoded: tuple[StageResult, torch.Tensor] | None

    def _init_stages(self) -> None:
        self.attention_report = []
        self._stage = 0
        self._num_stages = 1
        self._stage_size = (0, 0)  # (height, width) in pixels of the stage that runs
        self._decoded = None
        self._source: np.ndarray | None = None  # the picture that results are kept to
        self._free: torch.Tensor | None = None  # [H, W] above 0 where a given picture may change
        self._cells: torch.Tensor | None = None  # the same for the latents of the stage

    @contextmanager
    def kept_to(self, image: Image.Image) -> Iterator[None]:
        """Keep what goes from stage to stage to the picture that is enlarged (`gensparse.highres.faithful`).

        The last picture is the caller's: `keep_to` it as well.
        """
        self._source = np.asarray(image.convert("RGB"))
        try:
            yield
        finally:
            self._source = None

    @contextmanager
    def changing_only(self, mask: np.ndarray) -> Iterator[None]:
        """Draw a given picture anew only where `mask` uint8 [H, W] is above 0; H and W are those of the last stage.

        Latent cells without any such pixel are led along the noised enlargement of the picture, so that what is drawn
        fits to what stays. The decoder sees beyond cells: join the picture with its plain enlargement afterwards
        (`gensparse.highres.marked`).
        """
        self._free, self._cells = torch.from_numpy(np.array(mask)), None
        try:
            yield
        finally:
            self._free = self._cells = None

    def _pinned(self, z: torch.Tensor, outside: Callable[[], torch.Tensor], border: int = 0) -> torch.Tensor:
        """Latents [B, C, h, w] after a step, those that stay taken from `outside`: around the free part, and as far as
        `border` cells from the border of the picture."""
        if border:
            share = border_share(z.shape[-2], z.shape[-1], border).to(z)
            z = torch.lerp(z, outside().to(z), share)
        if self._free is None:
            return z
        if self._cells is None or self._cells.shape[-2:] != z.shape[-2:]:
            self._cells = free_cells(self._free, (z.shape[-2], z.shape[-1]))
        return torch.where(self._cells.to(z.device), z, outside().to(z))

    @property
    def stage(self) -> int:
        """Number of the stage that runs, 0 = native."""
        return self._stage

    @property
    def num_stages(self) -> int:
        return self._num_stages

    def _progress(self, stage: Stage, total: int):
        bar = self.progress_bar(total=total)
        if self._num_stages > 1:
            bar.set_description(f"stage {self._stage + 1}/{self._num_stages} {stage.width}x{stage.height}")
        return bar

    def _check_numbers(self, index: int, i: int, t: torch.Tensor, latents: torch.Tensor, denoiser: Any) -> None:
        if not torch.isfinite(latents).all():
            raise NumericsError(
                f"Stage {index}, step {i} (timestep {float(t):.1f}): the latents hold NaN or infinity; "
                f"use bfloat16 or float32 in place of {denoiser.dtype}, or another attention method."
            )

    # --- attention

    def _sparse(
        self,
        method: Method | None,
        dense_steps: int = 0,
        dense_layers: Sequence[int] = (),
        *,
        automatic: bool = False,
    ) -> AbstractContextManager:
        """The attention of a stage, with its handle. What the user has applied to the model is taken off only for a
        method that was asked for: neither for none, nor for an `automatic` choice.
        """
        own = attached(self)
        if method is None or (automatic and own is not None):
            return nullcontext(own)
        return applied(self, method, dense_steps=dense_steps, dense_layers=dense_layers)

    @contextmanager
    def _sparse_beside(
        self,
        models: Sequence[torch.nn.Module],
        method: Method | None,
        dense_steps: int,
        steps: int,
        *,
        automatic: bool = False,
    ) -> Iterator[list[Any]]:
        """The attention of models that run with the denoiser, and the handles of those that have any; as `_sparse`.

        They have layers of their own, so that weights and layer numbers of the denoiser's are not for them.
        """
        method = None if automatic and attached(self) is not None else method
        with ExitStack() as stack:
            handles = []
            for model in models:
                own = attached(model)
                if method is not None:
                    plain = replace(method, weights=None) if getattr(method, "weights", None) else method
                    own = stack.enter_context(applied(model, plain, dense_steps=dense_steps))
                    own.restart(steps)
                handles += [] if own is None else [own]
            yield handles

    def _report(
        self, index: int, stage: Stage, method: Method | None = None, handle: Any = None, beside: Sequence[Any] = ()
    ) -> None:
        """Note what the attention of a stage did; sites of models `beside` the denoiser are counted with its own."""
        facts = {"stage": index, "height": stage.height, "width": stage.width}
        facts["method"] = "dense" if method is None else method.to_dict()
        report = handle.report() if handle is not None else {}
        others = [own.report() for own in beside]
        if others:
            report |= merged([*([report] if report else []), *others])
            report["beside"] = [{name: own[name] for name in ("sparse", "dense", "calls", "density")} for own in others]
        self.attention_report.append({**facts, **report})

    # --- the autoencoder

    def _raw_latents(self, result: StageResult) -> torch.Tensor:
        """Latents of a stage as the autoencoder's decode() takes them, [B, C, h, w]."""
        raise NotImplementedError

    def _clean_latents(self, clean: torch.Tensor) -> torch.Tensor:
        """Estimates as step callbacks get them, as latents [B, C, h, w] of the model."""
        raise NotImplementedError

    def _decoder_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [B, C, h, w] of the model as the decoder takes them."""
        raise NotImplementedError

    def _model_latents(self, raw: torch.Tensor) -> torch.Tensor:
        """What encode() gave as the denoiser takes it, float32."""
        raise NotImplementedError

    def _enlarge(
        self, smaller: StageResult | torch.Tensor, stage: Stage, vae_tile: int | str | None, device: torch.device
    ) -> Guide:
        """Decode, enlarge and sharpen, encode again: the start of a stage, and its reference where no estimate is."""
        size = (stage.height, stage.width)
        if isinstance(smaller, StageResult):
            picture, history = self._decode_result(smaller, vae_tile), dict(smaller.history)
            if self._source is not None:  # estimates of the smaller stage are not kept to anything
                picture, history = kept(picture, self._source), {}
        else:
            picture, history = smaller, {}
        if picture.shape[-2] * picture.shape[-1] > stage.height * stage.width:
            picture = resample.resize(picture, size)
        amount = stage.sharpen if tuple(picture.shape[-2:]) != size else 0.0
        encoded = torch.cat([self._encode(sample, size, amount, vae_tile, device) for sample in picture.split(1)])
        return Guide(encoded.to(device, torch.float32), history)

    def _encode(
        self,
        picture: torch.Tensor,
        size: tuple[int, int],
        amount: float,
        vae_tile: int | str | None,
        device: torch.device,
    ) -> torch.Tensor:
        """Scaled latents [1, C, h, w] of a picture enlarged to `size` on the way."""

        def read(rows: tuple[int, int], cols: tuple[int, int]) -> torch.Tensor:
            return resample.enlarge_sharpened(picture, size, (*rows, *cols), amount)

        tiling = self._tiling(size, vae_tile)
        if tiling is None:
            pixels = read((0, size[0]), (0, size[1])).to(device, self.vae.dtype)
            latents = vae_tiles.encoded(self.vae, pixels)
        else:
            device = get_module_execution_device(self.vae)
            latents = vae_tiles.encode_tiles(self.vae, read, size, **vars(tiling), device=device)
        return self._model_latents(latents)

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

    def preview(
        self, result: StageResult, max_side: int = 512, vae_tile: int | str | None = "auto"
    ) -> list[Image.Image]:
        """The pictures of a finished stage, at most `max_side` pixels wide and high.

        The next stage continues the picture decoded here, so pass the `vae_tile` of the call.
        """
        picture = self._decode_result(result, vae_tile)
        shrink = min(1.0, max_side / max(result.height, result.width))
        size = (max(1, round(result.height * shrink)), max(1, round(result.width * shrink)))
        return self.image_processor.postprocess(F.interpolate(picture, size=size, mode="area"), output_type="pil")

    @torch.no_grad()
    def sketch(self, clean: torch.Tensor, max_side: int = 256) -> Image.Image:
        """A small picture of the estimate that a step callback gets as "clean", decoded from latents made smaller.

        About as costly as decoding `max_side` x `max_side` pixels, whatever the size of the stage.
        """
        latents = self._clean_latents(clean[:1].float())
        shrink = min(1.0, max_side / (max(latents.shape[-2:]) * self.vae_scale_factor))
        small = F.adaptive_avg_pool2d(latents, [max(1, round(side * shrink)) for side in latents.shape[-2:]])
        raw = self._decoder_latents(small).to(get_module_execution_device(self.vae), self.vae.dtype)
        return self.image_processor.postprocess(vae_tiles.decoded(self.vae, raw).float(), output_type="pil")[0]

    def _check_tiling(self, vae_tile: int | str | None) -> None:
        """ConfigError for tiles that the autoencoder has no rule for."""
        asked = parse_tiling(vae_tile)
        if isinstance(asked, Tiling) and asked.mode != "feather" and not vae_tiles.supports_exact(self.vae):
            raise ConfigError(
                f"vae_tile={vae_tile!r} asks for {asked.mode} tiles, which are not known for "
                f"{type(self.vae).__name__}; use vae_tile='feather', 'auto' or None."
            )

    def _tiling(self, size: tuple[int, int], vae_tile: int | str | None) -> Tiling | None:
        """The tiles of a picture; None for one piece."""
        vae_tiles.wake(self.vae)
        device = get_module_execution_device(self.vae)
        return choose_tiling(
            vae_tile,
            size,
            cpu=device.type == "cpu",
            in_place=next(self.vae.parameters()).device.type == device.type,
            exact=vae_tiles.supports_exact(self.vae),
        )

    def _strips(self, result: StageResult, sample: int, vae_tile: int | str | None) -> vae_tiles.Strips:
        tiling = self._tiling((result.height, result.width), vae_tile)
        raw = self._raw_latents(result)[sample : sample + 1]
        device = get_module_execution_device(self.vae)
        if tiling is None:
            return iter([(0, vae_tiles.decoded(self.vae, raw.to(device)))])
        return vae_tiles.decode_strips(self.vae, raw, **vars(tiling), device=device)

    def _pictures(self, result: StageResult, output_type: str, vae_tile: int | str | None) -> Any:
        """Decode the final stage; a tiled picture exists once, as bytes for "pil" and as float32 otherwise."""
        if self._tiling((result.height, result.width), vae_tile) is None:
            raw = self._raw_latents(result).to(get_module_execution_device(self.vae))
            return self.image_processor.postprocess(vae_tiles.decoded(self.vae, raw), output_type=output_type)
        count, size = result.latents.shape[0], (result.height, result.width)
        if output_type == "pil" and not self._is_decoded(result):
            strips = (self._strips(result, k, vae_tile) for k in range(count))
            buffers = (torch.empty(*size, 3, dtype=torch.uint8) for _ in range(count))
            return [Image.fromarray(vae_tiles.fill_bytes(s, b).numpy()) for s, b in zip(strips, buffers, strict=True)]
        return self.image_processor.postprocess(self._decode_result(result, vae_tile), output_type=output_type)


# --- pure helpers ---------------------------------------------------------------------------------------------------


def kept(pictures: torch.Tensor, source: np.ndarray) -> torch.Tensor:
    """Pictures [B, 3, H, W] in [-1, 1], corrected until they shrink to the source; smaller ones stay as they are."""
    if pictures.shape[-2] < source.shape[0] or pictures.shape[-1] < source.shape[1]:
        return pictures
    levels = pictures.add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    found = torch.stack([torch.from_numpy(keep_to(one.numpy(), source)) for one in levels])
    return found.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


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


def as_tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings from JSON, lists as tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def steps_to_keep(stages: Sequence[Stage], k: int, steps: int, *, native_draft: bool) -> range:
    """Steps whose estimates stage k must leave behind: the next stage's; all, for a native picture on its own."""
    if k + 1 < len(stages):
        return range(steps - stages[k + 1].steps, steps)
    return range(steps) if k == 0 and native_draft else range(0)


def border_share(height: int, width: int, border: int) -> torch.Tensor:
    """Share of what stays, [height, width]: 1 in the outer half of the border, falling to 0 where it ends."""
    rows, columns = (torch.minimum(x, n - 1 - x) for x, n in ((torch.arange(n), n) for n in (height, width)))
    distance = torch.minimum(rows[:, None], columns[None])
    return (2 * (border - distance) / border).clamp(0, 1).float()


def last_finished(
    store: StageStore,
    stages: Sequence[Stage],
    sigmas: Sequence[float],
    keep: Sequence[Sequence[int]],
    larger: Sequence[float] | None = None,
) -> StageResult | None:
    """The latest stage that the store holds in a form the next stage can use.

    Args:
        sigmas: of the first stage; larger: of the others, the same by default.
        keep: estimates that each must have.
    """
    for k in reversed(range(len(stages))):
        result, own = store.load(k), sigmas if k == 0 or larger is None else larger
        if result is not None and result.serves(stages[k], own, keep[k]):
            return result
    return None


def as_picture(image: Any, batch: int) -> torch.Tensor:
    """Any accepted image as float32 [batch, 3, H, W] in [-1, 1].

    Raises:
        ConfigError: another shape, or values outside 0..1.
    """
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


def stages_from(
    picture: torch.Tensor, stages: Sequence[Stage], strength: float | None, sigmas: Sequence[float], *, planned: bool
) -> list[Stage]:
    """The stages a given picture still needs: those larger than it, or the last; none redoes more than `strength`.

    `sigmas` are shares of the noise range from 1 to 0, one per step and the final 0.
    """
    height, width = picture.shape[-2:]
    todo = list(stages[1:]) or [replace(stages[0], steps=max(1, round(len(sigmas[:-1]) * 16 / 30)))]
    if planned:
        todo = [stage for stage in todo[:-1] if stage.height * stage.width > height * width] + todo[-1:]
    if strength is None:
        return todo
    within = steps_within(sigmas, strength)
    first = replace(todo[0], steps=within)
    return [first, *(replace(stage, steps=min(stage.steps, within)) for stage in todo[1:])]


def check_stages(stages: Sequence[Stage], steps: int, multiple: int) -> None:
    """ConfigError unless sizes are multiples of `multiple` pixels and no stage has more than `steps` steps."""
    for stage in stages:
        check_size(stage.height, stage.width, multiple)
        if stage.steps > steps:
            raise ConfigError(
                f"The stage {stage.width}x{stage.height} asks for {stage.steps} steps, but the native stage has only "
                f"{steps}; larger stages run the last part of its sigma list."
            )


def check_options(strength: float | None, image: Any, vae_tile: int | str | None, output_type: str) -> None:
    """ConfigError for values that no pipeline of stages takes."""
    if strength is not None and image is None:
        raise ConfigError(f"strength={strength} is given without an image; pass image=, or leave strength out.")
    try:
        parse_tiling(vae_tile)
    except ConfigError as error:
        raise ConfigError(f"vae_tile={vae_tile!r} is not allowed: {error}") from None
    if output_type not in OUTPUT_TYPES:
        raise ConfigError(f"output_type is {output_type!r}; choose 'pil', 'np', 'pt' or 'latent'.")
