"""From a checked request to a job: what it costs, where its files go, and pairs of pictures to compare."""

import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from gensparse import engine, image_io
from gensparse.app import cast, forms, uploads
from gensparse.app.core import App
from gensparse.app.jobs import Engine, Job, State, Work, run_request
from gensparse.engine import Event, OutputOptions, Resolved, Result
from gensparse.errors import ConfigError, GensparseError, WontFitError
from gensparse.estimate import Estimate
from gensparse.image_io import Header
from gensparse.request import CustomizeRequest, GenerateRequest, Request, UpscaleRequest

NATIVE = "native.png"
PAIR_SIDE = 2048
STAGES = ".stages"


# --------------------------------------------------------------------------------------------------------------- asking
def asked(
    app: App, kind: str, values: Mapping[str, Any], owner: str, image: Any = None, subjects: Any = ()
) -> tuple[Request, Header | None]:
    """The checked request behind a visitor's values, and the size of the picture to enlarge. Raises ConfigError."""
    if kind == GenerateRequest.kind:
        return forms.generate_request(values, app.settings), None
    if kind == CustomizeRequest.kind:
        return forms.customize_request(values, app.settings, cast.read(app, subjects, owner)), None
    path = uploads.uploaded(app, image, owner)
    header = uploads.checked_header(app, path)
    return forms.upscale_request(values, app.settings, path, header.size), header


def plan(request: Request, header: Header | None) -> tuple[Resolved, Estimate]:
    """What `gensparse plan` says of a request."""
    return engine.plan(request, picture=header)


def submit(
    app: App, owner: str, request: Request, header: Header | None = None, *, kind: str | None = None, **facts: Any
) -> Job:
    """Queue a checked request.

    Raises:
        WontFitError: it needs more memory than there is; the sentence says what would fit.
        BusyError: the queue is full.
        ConfigError, ModelError: as `gensparse plan`.
    """
    check_fits(request, header)
    with job_folder(app, owner) as folder:
        if isinstance(request, UpscaleRequest):
            request = request.replace(image=str(uploads.keep(Path(request.image), folder)))
        elif isinstance(request, CustomizeRequest):
            request = cast.keep(request, folder)
        count = max(len(request.seed), request.num_images)
        output = OutputOptions(
            paths=tuple(folder / f"{k + 1:04d}.png" for k in range(count)),
            live_preview=True,
            stages_dir=app.sessions.folder(owner) / STAGES,
        )
        work = keeping_native(run_request(request, output), folder)
        return app.jobs.submit(owner, work, kind=kind or request.kind, request=request, folder=folder, **facts)


def check_fits(request: Request, header: Header | None = None) -> None:
    """Raises WontFitError for a request that needs more memory than there is, and others as `gensparse plan`."""
    _, cost = plan(request, header)
    if not cost.fits:
        raise WontFitError("; ".join(cost.advice))


@contextmanager
def job_folder(app: App, owner: str) -> Iterator[Path]:
    """A new folder for a job, taken away again where it could not be queued."""
    folder = app.sessions.new_folder(owner)
    try:
        yield folder
    except (GensparseError, OSError):
        shutil.rmtree(folder, ignore_errors=True)
        raise


def keeping_native(work: Work, folder: Path) -> Work:
    """The same work, which also keeps the picture of the native stage, to compare with."""

    def both(runner: Engine, on_event: Callable[[Event], None], cancel: threading.Event) -> Any:
        def note(event: Event) -> None:
            if event.preview is not None and (event.picture, event.stage) == (0, 0) and event.step == event.steps:
                image_io.write_image(event.preview, folder / NATIVE, overwrite=True)
            on_event(event)

        return work(runner, note, cancel)

    return both


# ------------------------------------------------------------------------------------------------------------ comparing
def before_of(job: Job) -> tuple[str, Path] | None:
    """(what it is, file) of the picture that a result grew out of; None where there is none."""
    if isinstance(job.request, UpscaleRequest):
        return "your picture", Path(job.request.image)
    native = job.folder / NATIVE if job.folder is not None else None
    return ("native draft", native) if native is not None and native.is_file() else None


def why_no_twin(app: App, job: Job) -> str | None:
    """Why a result is not compared with dense attention, None where it can be."""
    if not isinstance(job.result, Result) or not job.result.outputs:
        return "there is no result yet"
    if not any(stage.get("sparse") and "subjects" not in stage for stage in job.result.attention.get("stages", [])):
        return "it is dense already"
    side = max(job.result.outputs[0].width, job.result.outputs[0].height)
    if side > app.limits.dense:
        return f"dense attention at {side} pixels takes too long here; it is offered up to {app.limits.dense}"
    return None


def submit_twin(app: App, owner: str, job: Job, **facts: Any) -> Job:
    """Queue the same picture, from the same seed, with dense attention. Raises ConfigError where that is no use."""
    reason = why_no_twin(app, job)
    if reason is not None or job.request is None:
        raise ConfigError(f"no comparison with dense attention: {reason}")
    seed = job.result.outputs[0].seed
    request = job.request.replace(attention="dense", seed=(seed,), num_images=1)
    header = image_io.read_header(request.image) if isinstance(request, UpscaleRequest) else None
    return submit(app, owner, request, header, kind="compare", twin_of=job.id, **facts)


def pair(app: App, owner: str, left: Path, right: Path) -> tuple[str, str]:
    """Two pictures as files of equal size, that of the right one up to `PAIR_SIDE`, among a visitor's own."""
    folder = app.sessions.folder(owner, scratch=True)
    second = image_io.read_image(right, max_pixels=app.limits.side**2).image
    shrink = min(1.0, PAIR_SIDE / max(second.size))
    size = (max(1, round(second.width * shrink)), max(1, round(second.height * shrink)))
    first = image_io.read_image(left, max_pixels=max(app.limits.side**2, app.limits.upload_pixels)).image
    out = []
    for name, image in (("left", first), ("right", second)):
        if image.size != size:
            image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
        path = folder / f"{name}-{left.parent.name}-{left.stem}-{right.parent.name}-{right.stem}.png"
        image_io.write_image(image, path, overwrite=True)
        out.append(str(path))
    return out[0], out[1]


# ------------------------------------------------------------------------------------------------------------- telling
def view(app: App, job: Job) -> dict[str, Any]:
    """A job as JSON data: what the API answers."""
    from gensparse.app.render import job_words
    from gensparse.app.viewer import file_url

    position = app.jobs.position(job)
    event = job.event
    out: dict[str, Any] = {
        "job": job.id,
        "kind": job.kind,
        "state": str(job.state),
        "position": position,
        "text": job_words(job, position),
        "progress": round(job.share, 4),
        "warnings": list(job.warnings),
        "error": job.error,
        "seconds": round(job.seconds, 2),
    }
    if event is not None:
        names = ("phase", "picture", "pictures", "stage", "stages", "step", "steps", "width", "height", "eta")
        out["event"] = {name: getattr(event, name) for name in names}
    if job.state in (State.DONE, State.CANCELLED) and isinstance(job.result, Result):
        result = job.result.to_dict()
        for item in result["outputs"]:
            item["url"] = "/" + file_url(item["path"])
        out |= {"outputs": result["outputs"], "report": {k: v for k, v in result.items() if k != "outputs"}}
    return out


def plan_view(resolved: Resolved, cost: Estimate) -> dict[str, Any]:
    """A plan as JSON data, with the same fields as `gensparse plan --json`."""
    request = replace(resolved.request, token=None).to_dict(portable=True)
    status = "ok" if cost.fits else "will_not_fit"
    return {"status": status, "request": request, "warnings": list(resolved.warnings), **cost.to_dict()}
