"""One request to one result: a session keeps a loaded pipeline between requests."""

import contextlib
import gc
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from gensparse import image_io
from gensparse.engine.call import call_arguments, finish_picture, padded_mask, padded_source, vae_tile
from gensparse.engine.ladder import OFFLOADS
from gensparse.engine.loading import check_lora, denoiser_of, load_pipeline
from gensparse.engine.machine import is_out_of_memory, peak_memory, return_memory, versions
from gensparse.engine.plans import asked_way, can_halve, guidance_in_halves
from gensparse.engine.record import build_metadata, length_warnings, word_warnings
from gensparse.engine.resolve import estimate_for, open_model, resolve_request
from gensparse.engine.stages import StageCache, stage_key
from gensparse.engine.subjects import Cast, arguments_of, read_cast, together_arguments
from gensparse.engine.values import Event, Output, OutputOptions, Resolved, Result
from gensparse.engine.watch import StepWatch, decode_guard, float32_vae
from gensparse.errors import Cancelled, NumericsError, WontFitError
from gensparse.estimate import CHUNK, Estimate
from gensparse.image_io import Picture
from gensparse.models import ModelRef, registered
from gensparse.request import CustomizeRequest, Request, UpscaleRequest

if TYPE_CHECKING:
    from PIL import Image


class Session:
    """A loaded pipeline that serves requests one after the other.

    Args:
        ref: the model, already checked.
        device, dtype, offload, quantize: as the first request resolved them.
        lora: LoRA files or hub ids, each with an optional `:scale`.
        subjects: whether the pipeline takes subjects.
        loader: builds the pipeline; tests pass their own.
    """

    def __init__(
        self,
        ref: ModelRef,
        *,
        device: str = "cpu",
        dtype: str = "fp32",
        offload: str = "none",
        quantize: str = "none",
        lora: Sequence[str] = (),
        subjects: bool = False,
        loader: Callable[..., Any] | None = None,
    ) -> None:
        self.ref, self.device, self.dtype, self.offload = ref, device, dtype, offload
        self.lora, self.quantize, self.subjects = tuple(lora), quantize, subjects
        self._loader = loader or load_pipeline
        self._pipe: Any = None
        self._lock = threading.Lock()

    @property
    def pipe(self) -> Any:
        """The pipeline, loaded on first use."""
        if self._pipe is None:
            more: dict[str, Any] = {} if self.quantize == "none" else {"quantize": self.quantize}
            more |= {"subjects": True} if self.subjects else {}
            self._pipe = self._loader(self.ref, self.dtype, self.device, self.offload, self.lora, **more)
        return self._pipe

    def close(self) -> None:
        """Drop the pipeline and give its memory back."""
        self._pipe = None
        self.tidy()

    def tidy(self) -> None:
        """Give memory back that nothing uses."""
        gc.collect()  # the frames of an error refer to each other, and to tensors
        return_memory()
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.empty_cache()

    def run(
        self,
        resolved: Resolved,
        output: OutputOptions | None = None,
        *,
        picture: Picture | None = None,
        cast: Cast | None = None,
        on_event: Callable[[Event], None] | None = None,
        cancel: threading.Event | None = None,
        expected: Estimate | None = None,
    ) -> Result:
        """Make every picture of a resolved request and write it.

        Raises Cancelled (finished pictures stay), NumericsError, WontFitError, OutputError, ModelError.
        """
        with self._lock:
            job = _Job(self, resolved, output or OutputOptions(), picture, on_event, cancel, expected, cast)
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
    cast: Cast | None = None
    warnings: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    done: list[Output] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)
    index: int = 0
    tile: str = "auto"
    chunk: int = 0
    halves: bool = False
    retried: bool = False

    def __post_init__(self) -> None:
        self.tile, self.chunk = self.resolved.request.tile, self.resolved.request.chunk or 0
        self.halves = guidance_in_halves(self.resolved)

    def run(self) -> Result:
        started = time.perf_counter()
        ref, request = self.session.ref, self.resolved.request
        self._warn(
            *self.resolved.warnings, *(self.source.warnings if self.source else ()), *word_warnings(ref, request)
        )
        self._load()
        self._warn(*length_warnings(ref, self.session.pipe, request))
        status = "ok"
        try:
            for seeds in self._draws():
                self.index = len(self.done)
                self._check_cancel()
                self._draw(seeds)
        except Cancelled:
            if not self.done:
                raise
            status = "cancelled"
        self.timings["total"] = time.perf_counter() - started
        return self._result(status)

    # -- phases
    def _load(self) -> None:
        self.emit(Event("load"))
        with self._timed("load"):
            self._within_memory(lambda: self.session.pipe, retry=self._less_resident)

    def _draws(self) -> list[tuple[int, ...]]:
        """Seeds by call of the pipeline: one each, or all at once where pictures see each other."""
        seeds, request = self.resolved.seeds, self.resolved.request
        together = isinstance(request, CustomizeRequest) and request.together
        return [seeds] if together else [(seed,) for seed in seeds]

    def _draw(self, seeds: tuple[int, ...]) -> None:
        self.emit(Event("start"))
        request = self.resolved.request if len(seeds) > 1 else self.resolved.picture(seeds[0])
        store = self._store(request)
        with self._timed("denoise_decode"):
            images = self._pixels(request, seeds, store)
        with self._timed("write"):
            self.emit(Event("write"))
            self.reports = store.reports()
            for image, seed in zip(images, seeds, strict=True):
                self.index = len(self.done)
                self.done.append(self._write(image, request, seed))
        store.finish()

    def _pixels(self, request: Request, seeds: tuple[int, ...], store: StageCache) -> "list[Image.Image]":
        """The pictures of a call, with the retries that are allowed: less memory, then a float32 autoencoder."""
        return self._within_memory(lambda: self._checked_pixels(request, seeds, store), retry=self._give_ground)

    def _within_memory(self, work: Callable[[], Any], *, retry: Callable[[], bool]) -> Any:
        """The result of `work`, called again while it runs out of memory and `retry` finds something to change."""
        while True:
            try:
                return work()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if not retry():
                    raise self._wont_fit(error) from error
            self.session.tidy()  # here, where the error and what its frames held are gone

    def _checked_pixels(self, request: Request, seeds: tuple[int, ...], store: StageCache) -> "list[Image.Image]":
        images, problem = self._call(request, seeds, store)
        if images is not None:
            return images
        with float32_vae(self.session.pipe) as changed:
            if changed:
                self._warn(f"the autoencoder gave {problem} in {self.resolved.dtype}: decoded again in fp32")
                images, problem = self._call(request, seeds, store)
        if images is not None:
            return images
        raise NumericsError(f"decoding gave {problem} even in fp32; try --dtype fp32, other settings or another seed")

    def _call(
        self, request: Request, seeds: tuple[int, ...], store: StageCache
    ) -> tuple["list[Image.Image] | None", str | None]:
        """Run the pipeline once; return the pictures, or what is wrong with one of them."""
        pipe = self.session.pipe
        pipe.set_progress_bar_config(disable=True)
        arguments = call_arguments(self.resolved, request.replace(tile=self.tile), seeds[0])
        arguments |= arguments_of(request, self.cast)
        if len(seeds) > 1 and isinstance(request, CustomizeRequest):
            arguments = together_arguments(request, arguments)
        if self.source is not None:
            arguments["image"] = padded_source(self.source.image, self.resolved)
        live, on_stage = self._is_live(pipe), partial(self._stage_done, store)
        if live:
            arguments["callback_on_step_end_tensor_inputs"] = ("latents", "clean")
        tile = vae_tile(self.tile) if live else None
        watch = StepWatch(self.expected, self.emit, self._check_cancel, on_stage, live=live, vae_tile=tile)
        with (
            decode_guard(pipe, self._check_cancel) as guard,
            self._chunks(pipe),
            self._halves(pipe, arguments),
            self._kept(pipe, arguments),
            self._marked(pipe),
        ):
            watch.guard = guard
            try:
                out = pipe(
                    **arguments,
                    stage_store=store,
                    callback_on_step_end=watch.on_step,
                    callback_on_stage_end=watch.on_stage,
                )
            except NumericsError:
                if guard.broken:  # a picture between two stages was broken, not the latents
                    return None, "NaN or infinity"
                raise
        images = list(out.images)
        if any(getattr(out, "nsfw_content_detected", None) or ()):
            self._warn("the safety checker of the model blacked the picture out; try another prompt or seed")
            return images, None
        found = (image_io.picture_problem(image) for image in images)
        problem = "NaN or infinity" if guard.broken else next((text for text in found if text is not None), None)
        return (images, None) if problem is None else (None, problem)

    # -- helpers
    def _is_live(self, pipe: Any) -> bool:
        """Whether small pictures can be made on the way: not where that would move weights to and fro."""
        resident = self.session.offload == "none" or self.session.device == "cpu"
        return self.output.live_preview and resident and hasattr(pipe, "sketch")

    def _chunks(self, pipe: Any) -> contextlib.AbstractContextManager[Any]:
        if not self.chunk:
            return contextlib.nullcontext()
        from gensparse.processors.chunks import chunked

        return chunked(denoiser_of(pipe), self.chunk)

    def _kept(self, pipe: Any, arguments: Mapping[str, Any]) -> contextlib.AbstractContextManager[Any]:
        """What goes from stage to stage is kept to the given picture, if the result is."""
        request = self.resolved.request
        if not (isinstance(request, UpscaleRequest) and request.faithful and "image" in arguments):
            return contextlib.nullcontext()
        return pipe.kept_to(arguments["image"])

    def _marked(self, pipe: Any) -> contextlib.AbstractContextManager[Any]:
        """Only what the given picture's mask marks is drawn anew."""
        if self.source is None or self.source.mask is None:
            return contextlib.nullcontext()
        return pipe.changing_only(padded_mask(self.source, self.resolved))

    def _halves(self, pipe: Any, arguments: Mapping[str, Any]) -> contextlib.AbstractContextManager[Any]:
        """Both halves of the guidance one by one, where they are a batch, there is guidance and memory is short."""
        scale = arguments.get(self.resolved.info.row.guidance) or 0.0
        if not self.halves or scale <= 1:
            return contextlib.nullcontext()
        from gensparse.processors.halves import halved

        return halved(denoiser_of(pipe))

    def _warn(self, *texts: str) -> None:
        for text in texts:
            if text not in self.warnings:
                self.warnings.append(text)
                self.emit(Event("warning", text=text))

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

    def _store(self, request: Request) -> StageCache:
        key = stage_key(request, self.resolved, self.source, None if self.cast is None else self.cast.facts)
        folders = [root / key for root in (self.output.stages_dir, *self.output.also_read) if root is not None]
        return StageCache(folders, writable=self.output.stages_dir is not None, keep_native=self.source is None)

    def _stage_done(self, store: StageCache, pipe: Any, result: Any) -> None:
        """Keep the attention report and, where wanted, a small picture of a finished stage."""
        report = next((r for r in pipe.attention_report if r.get("stage") == result.index), None)
        if report is not None:
            store.keep_report(result.index, report)
        folder = self.output.preview_dir
        if folder is not None:
            path = folder / f"{self.index + 1:04d}-stage{result.index + 1}-{result.width}x{result.height}.png"
            image_io.write_image(pipe.preview(result, vae_tile=vae_tile(self.tile))[0], path, overwrite=True)

    def _give_ground(self) -> bool:
        """After out of memory: once smaller tiles and chunks, then fewer resident weights. False at the end."""
        if self.retried:
            return self._less_resident()
        self.retried = True
        self.tile, self.chunk = smaller_tile(self.tile), min(CHUNK, max(1, self.chunk // 4)) if self.chunk else CHUNK
        halves = can_halve(self.resolved) and not self.halves
        self.halves = self.halves or halves
        more = " and the halves of the guidance one by one" if halves else ""
        self._warn(f"out of memory: continued with --tile {self.tile} --chunk {self.chunk}{more}")
        return True

    def _less_resident(self) -> bool:
        """Drop the pipeline of a GPU, to load it one rung further down the offload ladder. False at its end."""
        session = self.session
        if not session.device.startswith("cuda") or session.offload == OFFLOADS[-1]:
            return False
        session.offload = OFFLOADS[OFFLOADS.index(session.offload) + 1]
        session.close()
        self._warn(f"out of memory: continued with --offload {session.offload}")
        return True

    def _wont_fit(self, error: BaseException) -> WontFitError:
        advice = "; ".join(self.expected.advice[1:]) if self.expected else ""
        hint = advice or "choose a smaller --size or --dtype bf16"
        return WontFitError(f"out of memory on {self.session.device} after every fallback; {hint}")

    def _write(self, image: "Image.Image", request: Request, seed: int) -> Output:
        finished = finish_picture(image, self.source, self.resolved)
        metadata = self._metadata(request)
        size = (finished.width, finished.height)
        if not self.output.paths:
            return Output(None, *size, seed, None, finished, metadata)
        path = self.output.paths[self.index]
        digest = image_io.write_image(
            finished,
            path,
            image_format=self.output.image_format,
            metadata=metadata if self.output.metadata else None,
            from_picture=self.source is not None,
            overwrite=self.output.overwrite,
        )
        if self.output.sidecar:
            image_io.write_json(path.with_suffix(".json"), metadata, overwrite=self.output.overwrite)
        return Output(str(path), *size, seed, digest, None, metadata)

    def _metadata(self, request: Request) -> dict[str, Any]:
        used = request.replace(tile=self.tile, chunk=self.chunk)
        metadata = build_metadata(
            used,
            self.resolved,
            offload=self.session.offload,
            attention=self.reports,
            source=self.source,
            key=self.output.key,
            subjects=None if self.cast is None else self.cast.facts,
        )
        if isinstance(request, CustomizeRequest) and request.together:
            metadata["picture"] = self.index + 1  # which of those that the request makes
        return metadata if self.output.prompt_in_metadata else image_io.without_prompt(metadata)

    def _result(self, status: str) -> Result:
        return Result(
            status,
            tuple(self.done),
            self.resolved.request.to_dict(portable=True),
            {k: round(v, 3) for k, v in self.timings.items()},
            peak_memory(self.session.device),
            {"stages": self.reports},
            versions(),
            tuple(self.warnings),
        )


class Runner:
    """Runs requests one after the other and keeps the pipeline loaded while it serves them.

    Args:
        loader: builds a pipeline; the default loads it from disk.
    """

    def __init__(self, loader: Callable[..., Any] | None = None) -> None:
        self._loader = loader
        self._key: tuple[Any, ...] | None = None
        self._session: Session | None = None

    def execute(
        self,
        request: Request,
        output: OutputOptions | None = None,
        *,
        on_event: Callable[[Event], None] | None = None,
        cancel: threading.Event | None = None,
    ) -> Result:
        """Run one request from start to end: check everything, estimate, load, make the pictures.

        Raises the error classes of `gensparse.errors`; WontFitError before any weight is loaded.
        """
        picture = read_source(request)
        cast = read_cast(request)
        check_lora(request.lora)
        known = registered(request.model)
        if known is not None:  # what its family cannot do need not be downloaded
            asked_way(request, known)
        ref = open_model(request)
        resolved = resolve_request(request, ref.info, picture)
        output = output or OutputOptions()
        image_io.check_side(output.image_format, resolved.height, resolved.width)
        resolved, expected = fitting_estimate(resolved)
        session = self._session_for(ref, resolved)
        return session.run(
            resolved, output, picture=picture, cast=cast, on_event=on_event, cancel=cancel, expected=expected
        )

    def prepare(self, request: Request) -> None:
        """Load what a request needs before it comes. Raises as `execute`."""
        ref = open_model(request)
        resolved, _ = fitting_estimate(resolve_request(request, ref.info))
        self._session_for(ref, resolved).pipe  # noqa: B018 - loads it

    def tidy(self) -> None:
        """Give memory back that nothing uses; the pipeline stays loaded."""
        if self._session is not None:
            self._session.tidy()

    def close(self) -> None:
        """Drop the pipeline."""
        if self._session is not None:
            self._session.close()
        self._session = self._key = None

    def _session_for(self, ref: ModelRef, resolved: Resolved) -> Session:
        facts = resolved.loading
        if self._session is not None and self._session.subjects:
            facts["subjects"] = True  # without subjects it is the plain pipeline to the bit
        key = (ref.folder, ref.variant, *facts.values())
        if self._session is None or key != self._key:
            if self._session is not None:
                self._session.close()
            self._key = key
            self._session = Session(ref, **facts, loader=self._loader)
        return self._session


def read_source(request: Request) -> Picture | None:
    """The picture that a request enlarges, with its mask; None for other requests. Raises ConfigError."""
    if not isinstance(request, UpscaleRequest):
        return None
    picture = image_io.read_image(request.image)
    if request.mask is None:
        return picture
    mask = image_io.read_mask(request.mask)
    (height, width), (down, across) = picture.size, (mask.image.height, mask.image.width)
    notes = picture.warnings
    if abs(across * height / (down * width) - 1) > 1 / min(height, width, down, across) + 0.005:
        notes += (f"the mask of {across}x{down} is stretched over the picture of {width}x{height}",)
    return replace(picture, mask=mask, warnings=notes)


def execute(
    request: Request,
    output: OutputOptions | None = None,
    *,
    on_event: Callable[[Event], None] | None = None,
    cancel: threading.Event | None = None,
    loader: Callable[..., Any] | None = None,
) -> Result:
    """Run a single request; see `Runner.execute`."""
    return Runner(loader).execute(request, output, on_event=on_event, cancel=cancel)


def fitting_estimate(resolved: Resolved) -> tuple[Resolved, Estimate]:
    """The request with its memory settings and what it costs. Raises WontFitError with advice."""
    resolved, expected = estimate_for(resolved)
    if not expected.fits:
        raise WontFitError("; ".join(expected.advice))
    return resolved, expected


def smaller_tile(tile: str) -> str:
    """The next smaller tile of the autoencoder, in the same mode."""
    from gensparse.highres.tiling import SMALLEST, Tiling, parse_tiling

    asked = parse_tiling(tile)
    if not isinstance(asked, Tiling):
        return "512"
    return str(replace(asked, tile=max(SMALLEST, asked.tile // 2)))
