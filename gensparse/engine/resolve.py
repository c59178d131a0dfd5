"""From a request to a resolved one and its cost, without reading a weight."""

import secrets
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from gensparse.engine import ladder
from gensparse.engine.machine import (
    QUANTIZERS,
    free_memory,
    is_present,
    memory_limit,
    pick_device,
    pick_dtype,
    quantizers,
)
from gensparse.engine.plans import acting_way, asked_way, is_large, planned_stages
from gensparse.engine.subjects import check_customize, drawn_at_once, larger_runs, native_runs, pictures_beside
from gensparse.engine.values import Resolved
from gensparse.errors import ConfigError
from gensparse.estimate import DTYPE_BYTES, Estimate, Memory, StageShape, calibrate, estimate, stored_bytes
from gensparse.highres.ways import WAYS
from gensparse.image_io import Header, Picture
from gensparse.models import ModelInfo, ModelRef, resolve
from gensparse.request import CustomizeRequest, GenerateRequest, Request, UpscaleRequest, parse_size

if TYPE_CHECKING:
    from gensparse.highres.stages import Stage

_STRENGTH = UpscaleRequest.strength
_RUN = 50  # steps of the run whose middle stands for all of it where methods differ by step


def plan(
    request: Request, *, picture: Picture | Header | None = None, time_it: bool = True, ref: ModelRef | None = None
) -> tuple[Resolved, Estimate]:
    """What a request will cost, without reading a weight. Raises nothing for a request that does not fit."""
    ref = ref or open_model(request, weights=False)
    resolved = resolve_request(request, ref.info, picture, device_must_exist=False)
    return estimate_for(resolved, time_it=time_it)


def open_model(request: Request, *, weights: bool = True) -> ModelRef:
    """Find and check the model of a request; `weights=False` reads configs only. Raises ModelError."""
    from gensparse.embedded import SHIPPED

    return resolve(
        request.model,
        revision=request.revision,
        variant=request.variant,
        local_files_only=request.local_files_only,
        trust_remote_code=request.trust_remote_code,
        token=request.token,
        weights=weights,
        shipped=SHIPPED,
    )


def resolve_request(
    request: Request,
    info: ModelInfo,
    picture: Picture | Header | None = None,
    *,
    device_must_exist: bool = True,
) -> Resolved:
    """Fill in everything a request left open; the warnings say what was rounded, clamped or is without effect."""
    notes: list[str] = []
    _check_prompt(request, info)
    check_attention(request.attention)
    asked = asked_way(request, info)
    check_customize(request, info, asked)
    height, width = _target_size(request, info, picture, notes)
    device = pick_device(request.device, must_exist=device_must_exist)
    _check_quantize(request, device, notes, must_exist=device_must_exist)
    if device == "cpu" and request.max_vram and not device_must_exist:
        notes.append("--max-vram is counted as main memory of this CPU; --device cuda plans for a GPU of that size")
    steps = request.steps if request.steps is not None else int(info.steps)
    dense_steps = min(request.dense_steps, steps)
    if dense_steps != request.dense_steps:
        notes.append(f"--dense-steps {request.dense_steps} is more than the {steps} steps there are: {steps} used")
    guidance = request.guidance if request.guidance is not None else info.guidance
    if request.negative_prompt and not uses_negative(info, guidance):
        notes.append(f"the negative prompt has no effect: {info.alias} runs without classifier-free guidance")
    if isinstance(request, UpscaleRequest) and not WAYS[asked.name].strength and request.strength != _STRENGTH:
        notes.append(f"--strength has no effect with --highres {asked.name}, which redoes a share of its own")
    full = request.replace(
        highres=asked.text,
        steps=steps,
        dense_steps=dense_steps,
        guidance=float(guidance),
        dtype=pick_dtype(request.dtype, device),
        seed=_seeds(request, picture),
        size=f"{width}x{height}",
    )
    full = full.replace(num_images=len(full.seed))
    source = picture.size if picture else (0, 0)
    resolved = Resolved(full, info, height, width, device, full.dtype, tuple(notes), source)
    if request.regions and picture is None and len(planned_stages(resolved)) == 1:
        said = f"--regions have no effect at {width}x{height}: windows read them beyond {info.native_size} pixels"
        resolved = replace(resolved, warnings=(*notes, said))
    return resolved


def _check_prompt(request: Request, info: ModelInfo) -> None:
    if isinstance(request, GenerateRequest) and not request.prompt.strip() and not info.unconditional:
        raise ConfigError(f"the prompt is empty and {info.alias} was not trained without one; give a prompt")


def _check_quantize(request: Request, device: str, notes: list[str], *, must_exist: bool) -> None:
    """Raise ConfigError for a storage of weights that cannot work here; planning only says so."""
    asked = request.quantize
    if asked in ("auto", "none"):
        return
    if asked == "fp8" and device.startswith("mps"):
        raise ConfigError("--quantize fp8 does not work on mps, which has no such numbers; use --quantize none")
    if asked == "nf4" and not device.startswith("cuda"):
        raise ConfigError(f"--quantize nf4 works on GPUs of CUDA, not on {device}; use --quantize fp8 or none")
    if asked not in quantizers():
        needed = " or ".join(QUANTIZERS[asked])
        said = f"--quantize {asked} needs {needed}, which is not installed; pip install {QUANTIZERS[asked][0]}"
        if must_exist:
            raise ConfigError(f"{said}, or use --quantize fp8")
        notes.append(said)


def check_attention(text: str) -> None:
    """Raise ConfigError for an attention setting that names no method."""
    if text not in ("auto", "dense"):
        from gensparse.methods import parse_method

        parse_method(text)


def _target_size(
    request: Request, info: ModelInfo, picture: Picture | Header | None, notes: list[str]
) -> tuple[int, int]:
    """(height, width) of the result; upscaling is exact, generating rounds to what the model can do."""
    multiple = info.architecture.multiple
    if picture is not None:
        (height, width), _ = parse_size(request.size or "2x").resolve(base=picture.size, multiple=1)
        if request.round == "strict":
            parse_size(f"{width}x{height}").resolve(base=picture.size, multiple=multiple, rounding="strict")
        if note := _stretch(picture.size, (height, width)):
            notes.append(note)
        return height, width
    native = (info.native_size, info.native_size)
    size, note = parse_size(request.size or "1x").resolve(base=native, multiple=multiple, rounding=request.round)
    if note:
        notes.append(note)
    return size


def _stretch(source: tuple[int, int], target: tuple[int, int]) -> str | None:
    """What another aspect ratio than the picture's does to it; rounding to whole pixels is not worth a word."""
    down, across = target[0] / source[0], target[1] / source[1]
    slack = 1 / min(target) + 0.005
    if abs(across / down - 1) <= slack:
        return None
    kept = f"{target[1]}x{round(source[0] * across)}"
    return (
        f"size {target[1]}x{target[0]} stretches the picture, {across:.2f} times across and {down:.2f} times down; "
        f"{kept} keeps its shape"
    )


def _seeds(request: Request, picture: Picture | Header | None) -> tuple[int, ...]:
    """One seed per picture: those given, counted up from the last one.

    When none is given it is drawn; for a given picture it follows from its bytes, so that a stopped run goes on.
    """
    first = int(picture.sha256[:8], 16) if isinstance(picture, Picture) else secrets.randbelow(2**32)
    seeds = list(request.seed) or [first]
    while len(seeds) < request.num_images:
        seeds.append(seeds[-1] + 1)
    return tuple(seeds)


def uses_negative(info: ModelInfo, guidance: float) -> bool:
    return info.guidance_kind == "cfg" and guidance > 1.0


def text_tokens(info: ModelInfo) -> int:
    return info.max_sequence_length


def estimate_for(resolved: Resolved, *, time_it: bool = True) -> tuple[Resolved, Estimate]:
    """The request with memory settings filled in, and its estimate: on a GPU, the first rung of the ladder that fits.

    Whoever repeats the request later gets the same settings, whatever memory is free then.
    """
    arch, request, device = resolved.info.architecture, resolved.request, resolved.device
    limit = memory_limit(device, request.max_vram)
    timed = time_it and is_present(device)
    rates = calibrate(device, resolved.dtype, arch.width, arch.head_dim) if timed else None
    shapes, size, gpu = stage_shapes(resolved), DTYPE_BYTES[resolved.dtype], device.startswith("cuda")

    def cost(memory: Memory) -> Estimate:
        return estimate(
            arch,
            shapes,
            n_text=text_tokens(resolved.info),
            dtype=resolved.dtype,
            memory=memory if memory.tile != "auto" or request.tile == "auto" else replace(memory, tile=request.tile),
            limit_bytes=limit,
            rates=rates,
            from_picture=isinstance(request, UpscaleRequest),
            can_offload=device != "cpu",
        )

    def tile(item: Estimate) -> str:
        if request.tile != "auto" or not gpu or limit is None:
            return request.tile
        last, memory = item.stages[-1], item.memory
        weights = stored_bytes(arch, size, memory.quantize) + arch.encoder_params * size
        resident = weights if memory.offload == "none" else 0
        return ladder.pick_tile(arch, last.height, last.width, size, limit, resident)

    steps = list(ladder.rungs(arch, request.offload, request.quantize, gpu=gpu, quantizers=_planned(device)))
    host = free_memory() if gpu and is_present(device) else None
    found = ladder.choose(cost, steps, host_bytes=host, chunk=request.chunk, tile=tile)
    memory = found.memory
    pieces = {"offload": memory.offload, "quantize": memory.quantize, "tile": memory.tile, "chunk": memory.chunk}
    return replace(resolved, request=request.replace(**pieces)), found


def _planned(device: str) -> tuple[str, ...]:
    """How a GPU could store weights; one that is not here says nothing about the packages beside it."""
    if not device.startswith("cuda"):
        return ()
    return quantizers() if is_present(device) else tuple(QUANTIZERS)


def stage_shapes(resolved: Resolved) -> list[StageShape]:
    """Sizes, steps and attention of every stage, as the pipeline will run them."""
    stages = planned_stages(resolved)
    request = resolved.request
    small = len(stages) > 1 or not is_large(resolved) or isinstance(request, CustomizeRequest)  # subjects act densely
    drafted = not isinstance(request, UpscaleRequest) and small
    return [_shape(resolved, stage, native=drafted and k == 0) for k, stage in enumerate(stages)]


def _shape(resolved: Resolved, stage: "Stage", *, native: bool) -> StageShape:
    """Cost facts of one stage; the native one is always dense."""
    info, size = resolved.info, (stage.height, stage.width)
    guided = uses_negative(info, resolved.request.guidance or 0.0)
    passes = 2 if guided and (native or info.row.guides == "all") else 1
    if native:
        steps = stage.steps * native_runs(resolved.request, resolved.info)
        return StageShape(*size, steps, passes=passes, beside=pictures_beside(resolved.request))
    windows = _windows(resolved, size)
    if windows is not None:
        return StageShape(*size, stage.steps, passes=passes, **windows)
    attention = attention_at(resolved, *size)
    density = 1.0 if attention == "dense" else attention_density(attention, *size, info)
    steps = stage.steps * larger_runs(resolved.request, resolved.info)
    return StageShape(*size, steps, attention, density, passes, beside=drawn_at_once(resolved.request))


def _windows(resolved: Resolved, size: tuple[int, int]) -> dict[str, Any] | None:
    """Calls of native size per step, of ways that compute windows and dilated views in place of the whole map."""
    asked, info = acting_way(resolved), resolved.info
    if asked.name not in ("demofusion", "c_upscale"):
        return None
    from gensparse.highres.views import windows

    scale, native = info.architecture.vae_factor, info.native_size // info.architecture.vae_factor
    cells = (size[0] // scale, size[1] // scale)
    count = len(windows(cells, (native, native), (max(1, native // 2),) * 2))
    zoom = max(1, round(max(cells) / native))
    views = count + zoom**2 if asked.name == "demofusion" and zoom > 1 else count
    view = (min(native, cells[0]) * scale, min(native, cells[1]) * scale)
    return {"views": views, "view": view, "view_batch": int(asked.settings.get("view_batch", 16))}


def attention_at(resolved: Resolved, height: int, width: int) -> str:
    """The attention of an enlarged stage: only `auto` chooses by size."""
    info, wanted, asked = resolved.info, resolved.request.attention, acting_way(resolved)
    if WAYS[asked.name].method:
        return asked.text
    if asked.name == "freescale":
        settings = {k: v for k, v in asked.settings.items() if k in ("fusion", "jitter")}
        whole = {} if wanted == "auto" else {"whole": wanted.replace(",", ";")}
        text = ",".join(f"{key}={str(value).lower()}" for key, value in {**settings, **whole}.items())
        return f"freescale:{text}" if text else "freescale"
    if wanted != "auto":
        return wanted
    if WAYS[asked.name].procedure:
        own = WAYS[asked.name].procedure
        return own.replace("radius=16", f"radius={asked.settings.get('radius', 16)}")
    if info.row.automatic is not None:
        return info.attention or info.row.automatic
    multiple = info.architecture.multiple
    side = info.native_size // multiple
    sparse = (height // multiple) * (width // multiple) > info.dense_below
    return (info.attention or f"neighborhood:window={side}x{side}") if sparse else "dense"


@lru_cache(maxsize=64)
def _density(attention: str, height: int, width: int, info: "ModelInfo") -> float:
    from gensparse.methods import START, Auto, Dense, parse_method
    from gensparse.patterns import Pattern, RoutedPattern
    from gensparse.plan import build_plan

    arch, row = info.architecture, info.row
    family = import_module(f"gensparse.families.{row.attention}").FAMILY
    layout = family.layout_for(height, width, n_text=text_tokens(info), **row.layout(arch))
    method, native = parse_method(attention), info.native_size
    if isinstance(method, Auto):
        return method.planned(info.profile, arch.tokens(native, native)).share(layout)
    if getattr(method, "native", 0) is None:  # what an applied method reads from the model
        method = replace(method, native=native // arch.vae_factor)
    if method.why_not(layout) is not None:
        return 1.0
    at = START._replace(step=_RUN // 2, steps=_RUN, coarseness=2 ** getattr(arch, "level", 0))
    what = method.pattern(layout, at)
    if isinstance(what, Pattern | RoutedPattern):
        return build_plan(what, layout).density
    known = None if isinstance(what, Dense) else getattr(what, "density", None)
    return 1.0 if known is None else known(layout) or 1.0


def attention_density(attention: str, height: int, width: int, info: ModelInfo) -> float:
    """Share of the query-key pairs that a method computes at one size."""
    return _density(attention, height, width, info)
