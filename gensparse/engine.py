"""One request to one result: the only place that picks device, dtype and offload and that handles out of memory.

`Session` keeps a loaded pipeline between requests; `plan` stops before any weight is read. The command line and the app
are thin wrappers around these two.
"""

import contextlib
import hashlib
import json
import platform
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gensparse import __version__, image_io
from gensparse.errors import Cancelled, ConfigError, ModelError, NumericsError, OutputError, WontFitError
from gensparse.estimate import Estimate, StageShape, calibrate, estimate
from gensparse.image_io import Picture
from gensparse.models import ModelInfo, ModelRef, resolve
from gensparse.request import GenerateRequest, Request, UpscaleRequest, parse_bytes, parse_size

if TYPE_CHECKING:
    import torch
    from PIL import Image

OFFLOAD_LADDER = ("none", "model", "group", "sequential")


# -------------------------------------------------------------------------------------------------------------- values
@dataclass(frozen=True)
class Event:
    """Progress of a running request; `eta` is in seconds for everything that is left, None when unknown."""

    phase: str  # load | stage | step | decode | write
    picture: int = 0
    pictures: int = 1
    stage: int = 0
    stages: int = 1
    step: int = 0
    steps: int = 0
    height: int = 0
    width: int = 0
    eta: float | None = None


@dataclass(frozen=True)
class OutputOptions:
    """Where results go and what is written into them.

    Args:
        paths: one file per picture; empty keeps the pictures in the result only.
        stages_dir: folder where finished stages are kept; None keeps them in memory.
        also_read: further folders with finished stages, for instance those of a draft.
    """

    paths: tuple[Path, ...] = ()
    image_format: str = "png"
    overwrite: bool = False
    metadata: bool = True
    prompt_in_metadata: bool = True
    sidecar: bool = False
    preview_dir: Path | None = None
    stages_dir: Path | None = None
    also_read: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Output:
    """One finished picture."""

    path: str | None
    width: int
    height: int
    seed: int
    sha256: str | None
    image: "Image.Image" = field(repr=False, compare=False)
    metadata: Mapping[str, Any] = field(repr=False, compare=False, default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("path", "width", "height", "seed", "sha256")}


@dataclass(frozen=True)
class Result:
    """What the final JSON of a command says."""

    status: str
    outputs: tuple[Output, ...]
    request: dict[str, Any]
    timings: dict[str, float]
    memory: dict[str, int]
    attention: dict[str, Any]
    versions: dict[str, str]
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        out = {k: getattr(self, k) for k in ("status", "request", "timings", "memory", "attention", "versions")}
        return out | {"outputs": [o.to_dict() for o in self.outputs], "warnings": list(self.warnings)}


@dataclass(frozen=True)
class Resolved:
    """A request in which nothing is left open, and what was changed on the way."""

    request: Request
    info: ModelInfo
    height: int
    width: int
    device: str
    dtype: str
    warnings: tuple[str, ...] = ()

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.request.seed

    def picture(self, seed: int) -> Request:
        """The request of one of the pictures."""
        return self.request.replace(seed=(seed,), num_images=1)


# ------------------------------------------------------------------------------------------------- machine: what is here
def pick_device(wanted: str = "auto") -> str:
    """A torch device name; raises ConfigError for one that is not there."""
    import torch

    if wanted == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        kind = torch.device(wanted).type
    except RuntimeError as error:
        raise ConfigError(f"device is {wanted!r}; give auto, cpu, cuda, cuda:1 or mps") from error
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(kind, False):
        raise ConfigError(
            f"device {wanted!r} is not available; this machine has {', '.join(k for k in there if there[k])}"
        )
    return wanted


def pick_dtype(wanted: str, device: str) -> str:
    """fp32 on CPUs (bf16 is an explicit choice there), bf16 on GPUs that have it, else fp16."""
    if wanted != "auto":
        return wanted
    if device == "cpu":
        return "fp32"
    import torch

    if device.startswith("cuda") and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "fp16"
    return "bf16"


def torch_dtype(name: str) -> "torch.dtype":
    import torch

    return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[name]


def memory_limit(device: str, max_vram: str | None) -> int | None:
    """Bytes that may be used: what the user allows, or what is free on the device now."""
    if max_vram is not None:
        return parse_bytes(max_vram)
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return _free_memory()


def _free_memory() -> int | None:
    """Free main memory, also inside a container with a limit of its own."""
    import psutil

    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
        if limit.isdigit():
            free = min(free, int(limit) - int(used))
    return max(free, 0)


def peak_memory(device: str) -> dict[str, int]:
    """Peak bytes of this process, and of the GPU when one is used."""
    out: dict[str, int] = {}
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        out["peak_ram_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device.startswith("cuda"):
        import torch

        out["peak_vram_bytes"] = int(torch.cuda.max_memory_allocated(device))
    return out


def versions() -> dict[str, str]:
    """Versions that decide the bits of a picture."""
    from importlib.metadata import PackageNotFoundError, version

    out = {"gensparse": __version__, "python": platform.python_version()}
    for name in ("torch", "diffusers", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            out[name] = version(name)
    return out


# ------------------------------------------------------------------------------------------------- request -> resolved
def resolve_request(request: Request, info: ModelInfo, picture: Picture | None = None) -> Resolved:
    """Fill in everything a request left open; the warnings say what was rounded, clamped or is without effect."""
    notes: list[str] = []
    _check_prompt(request, info)
    check_attention(request.attention)
    height, width = _target_size(request, info, picture, notes)
    device = pick_device(request.device)
    steps = request.steps if request.steps is not None else int(info.steps)
    dense_steps = min(request.dense_steps, steps)
    if dense_steps != request.dense_steps:
        notes.append(f"--dense-steps {request.dense_steps} is more than the {steps} steps there are: {steps} used")
    guidance = request.guidance if request.guidance is not None else info.guidance
    if request.negative_prompt and not _uses_negative(info, guidance):
        notes.append(f"the negative prompt has no effect: {info.alias} runs without classifier-free guidance")
    full = request.replace(
        steps=steps,
        dense_steps=dense_steps,
        guidance=float(guidance),
        dtype=pick_dtype(request.dtype, device),
        seed=_seeds(request),
        size=f"{width}x{height}",
    )
    full = full.replace(num_images=len(full.seed))
    return Resolved(full, info, height, width, device, full.dtype, tuple(notes))


def _check_prompt(request: Request, info: ModelInfo) -> None:
    if isinstance(request, GenerateRequest) and not request.prompt.strip() and not info.unconditional:
        raise ConfigError(f"the prompt is empty and {info.alias} was not trained without one; give a prompt")


def check_attention(text: str) -> None:
    """Raise ConfigError for an attention setting that names no method."""
    if text not in ("auto", "dense"):
        from gensparse.methods import parse_method

        parse_method(text)


def _target_size(request: Request, info: ModelInfo, picture: Picture | None, notes: list[str]) -> tuple[int, int]:
    """(height, width) of the result; upscaling is exact, generating rounds to what the model can do."""
    multiple = info.architecture.multiple
    if picture is not None:
        (height, width), _ = parse_size(request.size or "2x").resolve(base=picture.size, multiple=1)
        if request.round == "strict":
            parse_size(f"{width}x{height}").resolve(base=picture.size, multiple=multiple, rounding="strict")
        return height, width
    native = (info.native_size, info.native_size)
    size, note = parse_size(request.size or "1x").resolve(base=native, multiple=multiple, rounding=request.round)
    if note:
        notes.append(note)
    return size


def _seeds(request: Request) -> tuple[int, ...]:
    """One seed per picture: those given, counted up from the last one; drawn when none is given."""
    seeds = list(request.seed) or [secrets.randbelow(2**32)]
    while len(seeds) < request.num_images:
        seeds.append(seeds[-1] + 1)
    return tuple(seeds)


def _uses_negative(info: ModelInfo, guidance: float) -> bool:
    return info.guidance_kind == "cfg" and guidance > 1.0


def text_tokens(info: ModelInfo) -> int:
    return info.max_sequence_length


def passes(resolved: Resolved) -> int:
    """Denoiser calls per step."""
    return 2 if _uses_negative(resolved.info, resolved.request.guidance or 0.0) else 1


# ----------------------------------------------------------------------------------------------------------------- plan
def plan(
    request: Request, *, picture: Picture | None = None, time_it: bool = True, ref: ModelRef | None = None
) -> tuple[Resolved, Estimate]:
    """What a request will cost, without reading a weight. Raises nothing for a request that does not fit."""
    ref = ref or open_model(request, weights=False)
    resolved = resolve_request(request, ref.info, picture)
    return resolved, estimate_for(resolved, time_it=time_it)


def open_model(request: Request, *, weights: bool = True) -> ModelRef:
    """Find and check the model of a request; `weights=False` reads configs only. Raises ModelError."""
    from gensparse.embedded import embedded_path

    return resolve(
        request.model,
        revision=request.revision,
        variant=request.variant,
        local_files_only=request.local_files_only,
        trust_remote_code=request.trust_remote_code,
        token=request.token,
        weights=weights,
        shipped={"embedded": embedded_path},
    )


def estimate_for(resolved: Resolved, *, time_it: bool = True, offload: str | None = None) -> Estimate:
    """Estimate a resolved request on its device; `offload=None` takes the request's (auto: the first that fits)."""
    arch = resolved.info.architecture
    limit = memory_limit(resolved.device, resolved.request.max_vram)
    rates = calibrate(resolved.device, resolved.dtype, arch.width, arch.head_dim) if time_it else None
    shapes = stage_shapes(resolved)

    def cost(choice: str) -> Estimate:
        return estimate(
            arch,
            shapes,
            n_text=text_tokens(resolved.info),
            dtype=resolved.dtype,
            passes=passes(resolved),
            offload=choice,
            limit_bytes=limit,
            rates=rates,
        )

    return cost(offload or pick_offload(resolved, lambda choice: cost(choice).fits))


def pick_offload(resolved: Resolved, fits: Callable[[str], bool]) -> str:
    """The request's offload; "auto" on a GPU is the first rung of the ladder that fits."""
    wanted = resolved.request.offload
    if wanted != "auto":
        return wanted
    if not resolved.device.startswith("cuda"):
        return "none"
    return next((choice for choice in OFFLOAD_LADDER[:3] if fits(choice)), "none")


def stage_shapes(resolved: Resolved) -> list[StageShape]:
    """Sizes, steps and attention of every stage, as the pipeline will run them."""
    from gensparse.highres.stages import plan_stages

    info, request = resolved.info, resolved.request
    native = (info.native_size, info.native_size)
    multiple = info.architecture.multiple
    height, width = _padded(resolved.height, multiple), _padded(resolved.width, multiple)
    stages = plan_stages(height, width, native, steps=request.steps or info.steps, multiple=multiple)
    if getattr(request, "highres", "auto") == "none":
        stages = [replace(stages[0], height=height, width=width)]
    return [_shape(resolved, stage.height, stage.width, stage.steps) for stage in stages]


def _padded(side: int, multiple: int) -> int:
    return -(-side // multiple) * multiple


def _shape(resolved: Resolved, height: int, width: int, steps: int) -> StageShape:
    attention = attention_at(resolved, height, width)
    if attention == "dense":
        return StageShape(height, width, steps)
    density = attention_density(attention, height, width, text_tokens(resolved.info))
    return StageShape(height, width, steps, attention, density, "sparse")


def attention_at(resolved: Resolved, height: int, width: int) -> str:
    """The method in force at one size: only `auto` chooses."""
    return resolved.request.attention


def attention_density(attention: str, height: int, width: int, n_text: int) -> float:
    """Share of the query-key pairs that a method computes at one size."""
    return 1.0


# -------------------------------------------------------------------------------------------------------------- session
class Session:
    """A loaded pipeline that serves requests one after the other.

    Args:
        ref: the model, already checked.
        device, dtype, offload: as the first request resolved them.
        lora: LoRA files or hub ids, each with an optional `:scale`.
        loader: builds the pipeline; tests pass their own.
    """

    def __init__(
        self,
        ref: ModelRef,
        *,
        device: str = "cpu",
        dtype: str = "fp32",
        offload: str = "none",
        lora: Sequence[str] = (),
        local_files_only: bool = False,
        loader: Callable[..., Any] | None = None,
    ) -> None:
        self.ref, self.device, self.dtype, self.offload = ref, device, dtype, offload
        self.lora = tuple(lora)
        self.local_files_only = local_files_only
        self._loader = loader or load_pipeline
        self._pipe: Any = None
        self._lock = threading.Lock()

    @property
    def pipe(self) -> Any:
        """The pipeline, loaded on first use."""
        if self._pipe is None:
            self._pipe = self._loader(self.ref, self.dtype, self.device, self.offload, self.lora)
        return self._pipe

    def close(self) -> None:
        """Drop the pipeline and give its memory back."""
        self._pipe = None
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.empty_cache()

    def run(
        self,
        resolved: Resolved,
        output: OutputOptions | None = None,
        *,
        picture: Picture | None = None,
        on_event: Callable[[Event], None] | None = None,
        cancel: threading.Event | None = None,
        expected: Estimate | None = None,
    ) -> Result:
        """Make every picture of a resolved request and write it.

        Raises Cancelled (finished pictures stay), NumericsError, WontFitError, OutputError, ModelError.
        """
        with self._lock:
            job = _Job(self, resolved, output or OutputOptions(), picture, on_event, cancel, expected)
            return job.run()


@dataclass
class _Job:
    """The state of one `Session.run`."""

    session: Session
    resolved: Resolved
    output: OutputOptions
    source: Picture | None
    on_event: Callable[[Event], None] | None
    cancel: threading.Event | None
    expected: Estimate | None
    warnings: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    done: list[Output] = field(default_factory=list)
    index: int = 0

    def run(self) -> Result:
        started = time.perf_counter()
        self.warnings += self.resolved.warnings
        if self.source is not None:
            self.warnings += self.source.warnings
        self._load()
        self.warnings += prompt_warnings(self.session.ref, self.session.pipe, self.resolved.request)
        for self.index, seed in enumerate(self.resolved.seeds):
            self._check_cancel()
            self._one(seed)
        self.timings["total"] = time.perf_counter() - started
        return self._result()

    # -- phases
    def _load(self) -> None:
        self.emit(Event("load"))
        with self._timed("load"):
            try:
                _ = self.session.pipe
            except Exception as error:
                if is_out_of_memory(error):
                    raise self._wont_fit(error) from error
                raise

    def _one(self, seed: int) -> None:
        request = self.resolved.picture(seed)
        store = self._store(request)
        with self._timed("denoise_decode"):
            image = self._pixels(request, seed, store)
        with self._timed("write"):
            self.emit(Event("write"))
            self.done.append(self._write(image, request, seed))
        store.finish()

    def _pixels(self, request: Request, seed: int, store: "StageCache") -> "Image.Image":
        """The picture of one seed, with the retries that are allowed: less memory, then a float32 autoencoder."""
        while True:
            try:
                return self._checked_pixels(request, seed, store)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if not self._give_ground():
                    raise self._wont_fit(error) from error

    def _checked_pixels(self, request: Request, seed: int, store: "StageCache") -> "Image.Image":
        image, problem = self._call(request, seed, store)
        if problem is None:
            return image
        with float32_vae(self.session.pipe) as changed:
            if changed:
                self.warnings.append(f"the autoencoder gave {problem} in {self.resolved.dtype}: decoded again in fp32")
                image, problem = self._call(request, seed, store)
        if problem is None:
            return image
        raise NumericsError(f"decoding gave {problem} even in fp32; try --dtype fp32, other settings or another seed")

    def _call(self, request: Request, seed: int, store: "StageCache") -> tuple["Image.Image", str | None]:
        """Run the pipeline once; return the picture and what is wrong with it, if anything is."""
        pipe = self.session.pipe
        pipe.set_progress_bar_config(disable=True)
        arguments = call_arguments(self.resolved, request, seed, pipe)
        if self.source is not None:
            arguments |= {"image": padded_source(self.source.image, self.resolved)}
        watch = StepWatch(self, pipe)
        with decode_guard(pipe, self._check_cancel) as guard:
            out = pipe(
                **arguments,
                stage_store=store,
                callback_on_step_end=watch.on_step,
                callback_on_stage_end=watch.on_stage,
            )
        image = out.images[0].convert("RGB")
        return image, "NaN or infinity" if guard.broken else image_io.picture_problem(image)

    # -- helpers
    def emit(self, event: Event) -> None:
        if self.on_event is not None:
            self.on_event(replace(event, picture=self.index, pictures=len(self.resolved.seeds)))

    def _check_cancel(self) -> None:
        if self.cancel is not None and self.cancel.is_set():
            raise Cancelled("stopped on request; finished stages are kept, run the same command to continue")

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - start

    def _store(self, request: Request) -> "StageCache":
        key = stage_key(request, self.resolved, self.source)
        folders = [root / key for root in (self.output.stages_dir, *self.output.also_read) if root is not None]
        return StageCache(folders, writable=self.output.stages_dir is not None)

    def _give_ground(self) -> bool:
        """After out of memory on a GPU: reload one rung further down the offload ladder. False at its end."""
        session = self.session
        if not session.device.startswith("cuda") or session.offload == OFFLOAD_LADDER[-1]:
            return False
        session.offload = OFFLOAD_LADDER[OFFLOAD_LADDER.index(session.offload) + 1]
        session.close()
        self.warnings.append(f"out of memory: continued with --offload {session.offload}")
        return True

    def _wont_fit(self, error: BaseException) -> WontFitError:
        advice = "; ".join(self.expected.advice[1:]) if self.expected else ""
        hint = advice or "choose a smaller --size or --dtype bf16"
        return WontFitError(f"out of memory on {self.session.device} after every fallback; {hint}")

    def _write(self, image: "Image.Image", request: Request, seed: int) -> Output:
        finished = finish_picture(image, self.source, self.resolved)
        metadata = self._metadata(request)
        if not self.output.paths:
            return Output(None, finished.width, finished.height, seed, None, finished, metadata)
        path = self.output.paths[self.index]
        digest = image_io.write_image(
            finished,
            path,
            image_format=self.output.image_format,
            metadata=metadata if self.output.metadata else None,
            icc_profile=self.source.icc_profile if self.source else None,
            from_picture=self.source is not None,
            overwrite=self.output.overwrite,
        )
        if self.output.sidecar:
            image_io.write_json(path.with_suffix(".json"), metadata, overwrite=self.output.overwrite)
        return Output(str(path), finished.width, finished.height, seed, digest, finished, metadata)

    def _metadata(self, request: Request) -> dict[str, Any]:
        metadata = build_metadata(request, self.resolved, self.session, self.source)
        return metadata if self.output.prompt_in_metadata else image_io.without_prompt(metadata)

    def _result(self) -> Result:
        return Result(
            "ok",
            tuple(self.done),
            self.resolved.request.to_dict(portable=True),
            {k: round(v, 3) for k, v in self.timings.items()},
            peak_memory(self.session.device),
            attention_summary(self.session.pipe),
            versions(),
            tuple(dict.fromkeys(self.warnings)),
        )


# ------------------------------------------------------------------------------------------------------------- loading
def load_pipeline(ref: ModelRef, dtype: str, device: str, offload: str, lora: Sequence[str]) -> Any:
    """Load the high-resolution pipeline of a checked model. Raises ModelError when the files do not load."""
    pipe = _load_weights(ref, torch_dtype(dtype))
    for item in lora:
        _load_lora(pipe, item)
    _place(pipe, device, offload)
    return pipe


def _load_weights(ref: ModelRef, dtype: "torch.dtype") -> Any:
    from gensparse.pipelines.flux_highres import FluxHighresPipeline

    if ref.embedded:
        from gensparse.embedded import load_embedded

        return FluxHighresPipeline(**load_embedded(torch_dtype=dtype).components)
    try:
        return FluxHighresPipeline.from_pretrained(
            ref.folder,
            torch_dtype=dtype,
            use_safetensors=True,
            variant=ref.variant,
            local_files_only=True,
            trust_remote_code=ref.remote_code,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"model {ref.name!r} could not be loaded ({_first_line(error)}); download it again") from error


def parse_lora(text: str) -> tuple[str, float]:
    """Split PATH[:SCALE]; a colon of a Windows drive is not a scale."""
    path, colon, scale = text.rpartition(":")
    if not colon or len(path) <= 1 or "/" in scale or "\\" in scale:
        return text, 1.0
    try:
        return path, float(scale)
    except ValueError as error:
        raise ConfigError(f"LoRA scale is {scale!r}; write PATH or PATH:0.8") from error


def _load_lora(pipe: Any, item: str) -> None:
    path, scale = parse_lora(item)
    name = f"lora{len(pipe.get_list_adapters().get('transformer', [])) if hasattr(pipe, 'get_list_adapters') else 0}"
    try:
        pipe.load_lora_weights(path, adapter_name=name, use_safetensors=True)
        pipe.fuse_lora(adapter_names=[name], lora_scale=scale)
    except ImportError as error:
        raise ModelError("LoRA files need peft; install it with `pip install gensparse[lora]`") from error
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"LoRA {Path(path).name!r} could not be loaded ({_first_line(error)}); check it") from error


def check_lora(items: Sequence[str]) -> None:
    """Check LoRA files by name before any weight is loaded. Raises ModelError for pickles and missing files."""
    from gensparse.models import PICKLES

    for item in items:
        path, _ = parse_lora(item)
        if path.lower().endswith(PICKLES):
            raise ModelError(f"LoRA {Path(path).name!r} is a pickle, which can run code; use a .safetensors file")
        if path.lower().endswith(".safetensors") and not Path(path).is_file():
            raise ModelError(f"LoRA file {Path(path).name!r} does not exist; check its path")


def _place(pipe: Any, device: str, offload: str) -> None:
    if offload == "none" or device == "cpu":
        pipe.to(device)
    elif offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "group":
        import torch

        target = torch.device(device)
        pipe.enable_group_offload(onload_device=target, offload_type="block_level", num_blocks_per_group=1)
    else:
        pipe.enable_sequential_cpu_offload(device=device)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


# ------------------------------------------------------------------------------------------------------------- one call
def call_arguments(resolved: Resolved, request: Request, seed: int, pipe: Any) -> dict[str, Any]:
    """Keyword arguments of the pipeline for one picture."""
    import torch

    info, multiple = resolved.info, resolved.info.architecture.multiple
    out: dict[str, Any] = {
        "prompt": request.prompt,
        "height": _padded(resolved.height, multiple),
        "width": _padded(resolved.width, multiple),
        "num_inference_steps": request.steps,
        # the noise is drawn on the CPU, so that a seed is the same picture on every device
        "generator": torch.Generator("cpu").manual_seed(seed),
        "max_sequence_length": text_tokens(info),
        "attention": request.attention,
        "dense_steps": request.dense_steps,
        "dense_layers": request.dense_layers,
        "strength": request.strength,
    }
    if info.guidance_kind == "embedded":
        out["guidance_scale"] = request.guidance
    if _uses_negative(info, request.guidance or 0.0):
        out |= {"true_cfg_scale": request.guidance, "negative_prompt": request.negative_prompt}
    if getattr(request, "highres", "auto") == "none":
        out["stages"] = [_single_stage(resolved, request)]
    return out


def _single_stage(resolved: Resolved, request: Request) -> Any:
    from gensparse.highres.stages import Stage

    return Stage(resolved.height, resolved.width, steps=request.steps or 1)


class StepWatch:
    """Callbacks of one pipeline call: cancel, invalid numbers, progress with a time that is left."""

    def __init__(self, job: _Job, pipe: Any) -> None:
        self.job, self.pipe = job, pipe
        shapes = job.expected.stages if job.expected else ()
        self.costs = [s.linear_flops + 1.5 * s.attention_flops for s in shapes]
        self.steps = [s.steps for s in shapes]
        self.last = time.perf_counter()
        self.spent = 0.0
        self.cost_done = 0.0

    def on_step(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self.job._check_cancel()
        stage = int(getattr(pipe, "stage", 0) or 0)
        latents = tensors.get("latents")
        if latents is not None and not bool(latents.isfinite().all()):
            raise NumericsError(
                f"the latents are not finite after step {step + 1} of stage {stage + 1}; use --dtype fp32 or bf16"
            )
        self.job.emit(self._event("step", stage, step + 1))
        return {}

    def on_stage(self, *unused: Any) -> None:
        self.job._check_cancel()

    def _event(self, phase: str, stage: int, step: int) -> Event:
        steps = int(getattr(self.pipe, "num_timesteps", 0) or 0)
        shapes = self.job.expected.stages if self.job.expected else ()
        shape = shapes[stage] if stage < len(shapes) else None
        return Event(
            phase,
            stage=stage,
            stages=max(len(shapes), stage + 1),
            step=step,
            steps=steps,
            height=shape.height if shape else 0,
            width=shape.width if shape else 0,
            eta=self._eta(stage, step, steps),
        )

    def _eta(self, stage: int, step: int, steps: int) -> float | None:
        """Seconds left: the estimate, scaled by how long the steps so far really took."""
        if stage >= len(self.costs):
            return None
        now = time.perf_counter()
        self.spent, self.last = self.spent + now - self.last, now
        self.cost_done += self.costs[stage]
        left = self.costs[stage] * max(0, steps - step)
        left += sum(c * n for c, n in zip(self.costs[stage + 1 :], self.steps[stage + 1 :], strict=True))
        return left * self.spent / max(self.cost_done, 1e-9)


# ------------------------------------------------------------------------------------------------------ invalid numbers
@dataclass
class _Guard:
    broken: bool = False


@contextlib.contextmanager
def decode_guard(pipe: Any, check_cancel: Callable[[], None]) -> Iterator[_Guard]:
    """Watch the last convolution of the decoder: it runs once per tile, and what leaves it must be finite."""
    import torch

    guard = _Guard()
    decoder = getattr(getattr(pipe, "vae", None), "decoder", None)
    convolutions = [m for m in decoder.modules() if isinstance(m, torch.nn.Conv2d)] if decoder is not None else []

    def look(module: Any, inputs: Any, output: "torch.Tensor") -> None:
        check_cancel()
        guard.broken = guard.broken or not bool(output.isfinite().all())

    hook = convolutions[-1].register_forward_hook(look) if convolutions else None
    try:
        yield guard
    finally:
        if hook is not None:
            hook.remove()


@contextlib.contextmanager
def float32_vae(pipe: Any) -> Iterator[bool]:
    """Run with the autoencoder in float32; yields False when it already was."""
    import torch

    vae = pipe.vae
    before = vae.dtype
    if before == torch.float32:
        yield False
        return
    vae.to(torch.float32)
    try:
        yield True
    finally:
        vae.to(before)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is the device or the machine running out of memory."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


# ------------------------------------------------------------------------------------------------------------- pictures
def padded_source(image: "Image.Image", resolved: Resolved) -> "Image.Image":
    """The input with its last row and column repeated so that its sides have the ratio of the padded result."""
    multiple = resolved.info.architecture.multiple
    height = round(image.height * _padded(resolved.height, multiple) / resolved.height)
    width = round(image.width * _padded(resolved.width, multiple) / resolved.width)
    if (height, width) == (image.height, image.width):
        return image
    import numpy as np
    from PIL import Image

    extra = ((0, max(0, height - image.height)), (0, max(0, width - image.width)), (0, 0))
    return Image.fromarray(np.pad(np.asarray(image), extra, mode="edge"))


def finish_picture(image: "Image.Image", source: Picture | None, resolved: Resolved) -> "Image.Image":
    """Cut the padding off and give back the alpha channel, scaled on its own."""
    from PIL import Image

    if image.size != (resolved.width, resolved.height):
        image = image.crop((0, 0, resolved.width, resolved.height))
    if source is None or source.alpha is None:
        return image
    image.putalpha(source.alpha.resize(image.size, Image.Resampling.LANCZOS))
    return image


# --------------------------------------------------------------------------------------------------------------- stages
class StageCache:
    """Finished stages of one picture, in memory and in folders: written to the first, read from all."""

    def __init__(self, folders: Sequence[Path], *, writable: bool) -> None:
        from gensparse.highres.stage_store import FolderStageStore

        self._stores = [FolderStageStore(folder) for folder in folders]
        self._writable = writable and bool(folders)
        self._memory: dict[int, Any] = {}

    def load(self, index: int) -> Any:
        if index in self._memory:
            return self._memory[index]
        return next((found for store in self._stores if (found := store.load(index)) is not None), None)

    def save(self, index: int, result: Any) -> None:
        self._memory[index] = result
        if not self._writable:
            return
        try:
            self._stores[0].save(index, result)
        except OSError as error:
            raise OutputError(
                f"could not keep stage {index + 1} in {str(self._stores[0].folder)!r}: {error.strerror}; free space"
            ) from error

    def finish(self) -> None:
        """The picture is written: keep the native stage, which a larger run may continue, and drop the rest."""
        last = max(self._memory, default=0)
        self._memory.clear()
        if self._writable:
            for index in range(1, last + 1):
                with contextlib.suppress(OSError):
                    self._stores[0].path(index).unlink(missing_ok=True)


def stage_key(request: Request, resolved: Resolved, source: Picture | None) -> str:
    """Name of the folder of a picture's stages: everything that decides its bits except the final size."""
    import torch

    data = request.replace(size=None).to_dict()
    for name in request.machine_fields | {"highres", "round", "image"}:
        data.pop(name, None)
    data |= {"device": resolved.device, "threads": torch.get_num_threads(), "versions": versions()}
    data["source"] = source.sha256 if source else None
    data["size"] = resolved.request.size if source else None
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:24]


# ------------------------------------------------------------------------------------------------------------- metadata
def build_metadata(request: Request, resolved: Resolved, session: Session, source: Picture | None) -> dict[str, Any]:
    """What is written into a picture; no date, so that the same request gives the same file."""
    import torch

    run: dict[str, Any] = {
        "device": session.device.split(":")[0],
        "dtype": session.dtype,
        "offload": session.offload,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "attention": attention_summary(session.pipe),
    }
    out = {
        "gensparse": image_io.METADATA_VERSION,
        "request": request.to_dict(portable=True),
        "licence": resolved.info.licence,
        "run": run,
        "versions": versions(),
    }
    if source is not None:
        out["source_sha256"] = source.sha256
    return out


def attention_summary(pipe: Any) -> dict[str, Any]:
    """The attention reports of the stages, reduced to what JSON can hold."""
    reports = getattr(pipe, "attention_report", None) or []
    return {"stages": json.loads(json.dumps(list(reports), default=str))}


def prompt_warnings(ref: ModelRef, pipe: Any, request: Request) -> list[str]:
    """Words the embedded model does not know, and how much of a long prompt is not read."""
    out = []
    if ref.embedded and request.prompt:
        from gensparse.embedded import unknown_words

        for word, near in unknown_words(request.prompt).items():
            hint = f"did you mean {', '.join(near)}?" if near else "see `gensparse models show embedded`"
            out.append(f"the embedded model does not know {word[:40]!r}; {hint}")
    tokenizer = getattr(pipe, "tokenizer_2", None) or getattr(pipe, "tokenizer", None)
    if tokenizer is not None and request.prompt:
        count = len(tokenizer(request.prompt, truncation=False, verbose=False)["input_ids"])
        if count > ref.info.max_sequence_length:
            limit = ref.info.max_sequence_length
            out.append(
                f"the prompt has {count} tokens and the model reads {limit}: the last {count - limit} are ignored"
            )
    return out


def reproduction_warnings(metadata: Mapping[str, Any]) -> list[str]:
    """Why running a picture's request again may not give the same bits here."""
    import torch

    out = []
    then, now = metadata.get("versions"), versions()
    for name in now if isinstance(then, Mapping) else ():
        if isinstance(then.get(name), str) and then[name] != now[name]:
            out.append(f"made with {name} {then[name][:20]}, here is {now[name]}: bits may differ")
    run = metadata.get("run")
    threads = run.get("threads") if isinstance(run, Mapping) else None
    if isinstance(threads, int) and threads != torch.get_num_threads():
        out.append(f"made with {threads} threads, here are {torch.get_num_threads()}: bits may differ")
    return out


# ---------------------------------------------------------------------------------------------------------- convenience
def execute(
    request: Request,
    output: OutputOptions | None = None,
    *,
    on_event: Callable[[Event], None] | None = None,
    cancel: threading.Event | None = None,
    loader: Callable[..., Any] | None = None,
) -> Result:
    """Run one request from start to end: check everything, estimate, load, make the pictures.

    Raises the error classes of `gensparse.errors`; WontFitError before any weight is loaded.
    """
    picture = image_io.read_image(request.image) if isinstance(request, UpscaleRequest) else None
    check_lora(request.lora)
    ref = open_model(request)
    resolved = resolve_request(request, ref.info, picture)
    output = output or OutputOptions()
    image_io.check_side(output.image_format, resolved.height, resolved.width)
    expected = estimate_for(resolved, time_it=False)
    if not expected.fits:
        raise WontFitError("; ".join(expected.advice))
    offload = pick_offload(resolved, lambda choice: estimate_for(resolved, time_it=False, offload=choice).fits)
    session = Session(
        ref, device=resolved.device, dtype=resolved.dtype, offload=offload, lora=request.lora, loader=loader
    )
    return session.run(resolved, output, picture=picture, on_event=on_event, cancel=cancel, expected=expected)
