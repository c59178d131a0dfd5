"""Named endpoints for programs: `gradio_client`, or plain HTTP under `/gradio_api/call/NAME`.

They take the fields of a request and answer JSON data. A job is asked for by its id, at least once in every grace
period, else it counts as left alone.
"""

import html
from typing import Any

import gradio as gr

from gensparse.app import runs, tales
from gensparse.app.core import App
from gensparse.errors import GensparseError
from gensparse.request import CustomizeRequest


def add(app: App) -> None:
    """Add the endpoints to the page that is being built."""

    def generate(
        request: gr.Request,
        prompt: str = "",
        size: str = "",
        model: str = "embedded",
        attention: str = "auto",
        steps: int | None = None,
        guidance: float | None = None,
        seed: int | None = None,
        num_images: int = 1,
        negative_prompt: str = "",
        highres: str = "auto",
        dense_steps: int = 0,
        more: dict | None = None,
    ) -> dict:
        """Queue a picture from text; the answer names the job. `more` takes further fields of a request."""
        values = _fields(locals(), more)
        return _told(lambda: _submit(app, "generate", values, app.owner(request)))

    def upscale(
        request: gr.Request,
        image: dict | None = None,
        size: str = "2x",
        strength: float = 0.3,
        prompt: str = "",
        model: str = "embedded",
        attention: str = "auto",
        steps: int | None = None,
        guidance: float | None = None,
        seed: int | None = None,
        negative_prompt: str = "",
        highres: str = "auto",
        dense_steps: int = 0,
        more: dict | None = None,
    ) -> dict:
        """Queue a larger version of an uploaded picture; the answer names the job."""
        values = _fields(locals(), more)
        return _told(lambda: _submit(app, "upscale", values, app.owner(request), image))

    def customize(
        request: gr.Request,
        prompt: str = "",
        subjects: list | None = None,
        subject_method: str = "auto",
        size: str = "",
        model: str = "embedded",
        attention: str = "auto",
        steps: int | None = None,
        guidance: float | None = None,
        seed: int | None = None,
        num_images: int = 1,
        negative_prompt: str = "",
        highres: str = "auto",
        dense_steps: int = 0,
        more: dict | None = None,
    ) -> dict:
        """Queue a picture with subjects, each a dictionary of name, image, mask and box; the answer names the job."""
        values = _fields(locals(), more)
        return _told(lambda: _submit(app, "customize", values, app.owner(request), subjects=subjects))

    def estimate(
        request: gr.Request,
        prompt: str = "",
        size: str = "",
        model: str = "embedded",
        attention: str = "auto",
        steps: int | None = None,
        guidance: float | None = None,
        num_images: int = 1,
        highres: str = "auto",
        image: dict | None = None,
        strength: float = 0.3,
        more: dict | None = None,
        subjects: list | None = None,
    ) -> dict:
        """What a request will cost, as `gensparse plan --json` says it; with an image, of upscaling it."""
        values = _fields(locals(), more)
        kind = "upscale" if image is not None else "customize" if subjects is not None else "generate"
        if image is None:
            values.pop("strength")
        return _told(lambda: _plan(app, kind, values, app.owner(request), image, subjects))

    def turn(
        request: gr.Request, job: str = "", prompt: str = "", boxes: dict | None = None, seed: int | None = None
    ) -> dict:
        """Queue the next picture with the subjects of a job of /customize; boxes are places by name."""

        def follow() -> dict[str, Any]:
            found = app.job(job, request)
            return runs.view(app, tales.follow(app, found.owner, found, prompt, boxes, seed))

        return _told(follow)

    def status(request: gr.Request, job: str = "") -> dict:
        """Where a job is, and its files once it has ended."""
        return _told(lambda: runs.view(app, app.job(job, request)))

    def cancel(request: gr.Request, job: str = "") -> dict:
        """Stop a job after its current step or tile, or take it out of the queue."""

        def stop() -> dict[str, Any]:
            found = app.job(job, request)
            app.jobs.cancel(found)
            return runs.view(app, found)

        return _told(stop)

    for function in (generate, upscale, customize, turn, estimate, status, cancel):
        gr.api(function, api_name=function.__name__, concurrency_limit=4)


def _fields(given: dict[str, Any], more: Any) -> dict[str, Any]:
    """The fields of a request among the arguments of an endpoint; those left out stay open."""
    own = ("request", "more", "image", "subjects", "app")
    values = {name: value for name, value in given.items() if name not in own}
    return values | (more if isinstance(more, dict) else {})


def _submit(
    app: App, kind: str, values: dict[str, Any], owner: str, image: Any = None, subjects: Any = ()
) -> dict[str, Any]:
    request, header = runs.asked(app, kind, values, owner, image, subjects)
    if isinstance(request, CustomizeRequest):
        return runs.view(app, tales.begin(app, owner, request))
    return runs.view(app, runs.submit(app, owner, request, header))


def _plan(app: App, kind: str, values: dict[str, Any], owner: str, image: Any, subjects: Any) -> dict[str, Any]:
    request, header = runs.asked(app, kind, values, owner, image, subjects)
    return runs.plan_view(*runs.plan(request, header))


def _told(answer: Any) -> dict[str, Any]:
    """The answer, or its error as one sentence that a page may show as it is."""
    try:
        return answer()
    except GensparseError as error:
        raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from None
