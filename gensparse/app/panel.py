"""The side of a tab that shows a job: progress with a small picture, then the result and all that belongs to it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from gensparse.app import cast, render, runs
from gensparse.app.core import App
from gensparse.app.jobs import Job, State
from gensparse.app.viewer import file_links, viewer
from gensparse.app.widgets import QUIET
from gensparse.engine import Result
from gensparse.errors import GensparseError
from gensparse.request import CustomizeRequest

TICK = 0.7  # seconds between two looks at a job


class Panel:
    """Draws itself where it is made, inside an open column.

    Args:
        app: the server.
        name: of the tab; jobs that were submitted with `panel=name` are found again when the page is loaded anew.
        hint: what is shown before the first job.
    """

    def __init__(self, app: App, name: str, hint: str) -> None:
        self.app, self.name = app, name
        self.card = gr.HTML(f'<div class="gs-card gs-quiet"><p>{render.esc(hint)}</p></div>', elem_id=f"gs-{name}-card")
        self.cancel = gr.Button("Cancel", variant="stop", visible=False, elem_id=f"gs-{name}-cancel")
        self.result = gr.HTML("", elem_id=f"gs-{name}-result")
        further = self._draw_further()
        with gr.Row():
            self.native = gr.Button("Compare with the start", visible=False, elem_id=f"gs-{name}-native", size="sm")
            self.dense = gr.Button("Compare with dense attention", visible=False, elem_id=f"gs-{name}-dense", size="sm")
        self.slider = gr.ImageSlider(
            visible=False, interactive=False, elem_id=f"gs-{name}-slider", type="filepath", max_height=640
        )
        with gr.Accordion("What ran", open=False, visible=False, elem_id=f"gs-{name}-report") as self.report_box:
            self.report = gr.HTML("")
        with gr.Accordion("Make it again", open=False, visible=False, elem_id=f"gs-{name}-again") as self.again_box:
            gr.Markdown("On the command line")
            self.command = gr.HTML("", elem_id=f"gs-{name}-command")
            gr.Markdown("In Python")
            self.python = gr.HTML("", elem_id=f"gs-{name}-python")
        self.watched = gr.State(None)  # (id of the job, revision that is shown)
        self.timer = gr.Timer(TICK, active=False)
        self._names = (
            "card",
            "cancel",
            "result",
            "native",
            "dense",
            "slider",
            "report_box",
            "report",
            "again_box",
            "command",
            "python",
            "watched",
            "timer",
            *further,
        )
        self.outputs = [getattr(self, name) for name in self._names]
        self.timer.tick(self._poll, [self.watched], self.outputs, queue=False, **QUIET)
        self.cancel.click(self._cancel, [self.watched], [self.card], queue=False, **QUIET)
        self.native.click(self._compare_native, [self.watched], [self.slider, self.card], **QUIET)
        self.dense.click(self._compare_dense, [self.watched], self.outputs, **QUIET)
        app.page.load(self._resume, None, self.outputs, queue=False, **QUIET)

    def starts(
        self, events: Sequence[Any], inputs: Sequence[Any], submit: Callable[[str, tuple[Any, ...]], Job]
    ) -> None:
        """Let events submit a job with `submit(owner, values of the inputs)` and show it."""

        def start(request: gr.Request, *values: Any) -> list[Any]:
            try:
                return self._begin(submit(self.app.owner(request), values))
            except GensparseError as error:
                return self._only(card=render.error_card(str(error)))

        gr.on(list(events), start, list(inputs), self.outputs, **QUIET)

    # -- what tabs may add
    def _draw_further(self) -> tuple[str, ...]:
        """Draw what stands below the result; returns the names of its attributes that are outputs."""
        return ()

    def _further(self, job: Job, *, done: bool) -> dict[str, Any]:
        """The updates of these for a job, and whether it has a result."""
        return {}

    # -- what events answer
    def _only(self, **changes: Any) -> list[Any]:
        """Changes of some outputs; the others stay."""
        return [changes.get(name, gr.skip()) for name in self._names]

    def _begin(self, job: Job) -> list[Any]:
        hidden = gr.update(visible=False)
        return self._only(
            card=render.job_card(job, self.app.jobs.position(job)),
            cancel=gr.update(visible=True, interactive=True),
            result="",
            native=hidden,
            dense=hidden,
            slider=gr.update(value=None, visible=False),
            report_box=hidden,
            again_box=hidden,
            watched=(job.id, job.revision),
            timer=gr.Timer(TICK, active=True),
            **self._further(job, done=False),
        )

    def _poll(self, request: gr.Request, watched: Any) -> list[Any]:
        if not watched:
            return self._only(timer=gr.Timer(active=False))
        try:
            job = self.app.job(watched[0], request)
            if job.state.ended:
                return self._end(job)
        except (GensparseError, OSError) as error:
            return self._only(
                card=render.error_card(str(error)),
                cancel=gr.update(visible=False),
                watched=None,
                timer=gr.Timer(active=False),
            )
        if job.revision == watched[1]:
            return self._only()
        return self._only(card=render.job_card(job, self.app.jobs.position(job)), watched=(job.id, job.revision))

    def _end(self, job: Job) -> list[Any]:
        done = {"cancel": gr.update(visible=False), "timer": gr.Timer(active=False), "card": render.job_card(job)}
        original = self._original(job)
        if original is not None:
            slider = (
                self._slider(job.owner, original.result.outputs[0].path, job, original) if job.result else gr.skip()
            )
            return self._only(**done, slider=slider, watched=(original.id, original.revision), **self._shown(original))
        shown = self._shown(job) if isinstance(job.result, Result) and job.result.outputs else {}
        shown |= self._further(job, done=bool(shown))
        return self._only(**done, **shown, watched=(job.id, job.revision))

    def _original(self, job: Job) -> Job | None:
        """The job that this one was made to be compared with."""
        try:
            return self.app.jobs.get(job.facts["twin_of"], job.owner) if "twin_of" in job.facts else None
        except GensparseError:
            return None

    def _shown(self, job: Job) -> dict[str, Any]:
        """The updates that show a result."""
        before = runs.before_of(job)
        command, python = render.again(job.result)
        given = cast.files(job.request) if isinstance(job.request, CustomizeRequest) else []
        twin = job.state is State.DONE and runs.why_no_twin(self.app, job) is None
        return {
            "result": viewer(job.result.outputs),
            "native": gr.update(visible=before is not None, value=f"Compare with the {before[0]}" if before else ""),
            "dense": gr.update(visible=twin),
            "report_box": gr.update(visible=True),
            "report": render.what_ran(job.result),
            "again_box": gr.update(visible=True),
            "command": command + file_links(given),
            "python": python,
        }

    def _slider(self, owner: str, left: str | Path | None, twin: Job, original: Job) -> Any:
        if left is None or not isinstance(twin.result, Result) or not twin.result.outputs:
            return gr.skip()
        path = twin.result.outputs[0].path
        method = original.request.attention if original.request is not None else "sparse"
        value = runs.pair(self.app, owner, Path(str(path)), Path(left))
        return gr.update(value=value, visible=True, label=f"dense attention | {method}")

    # -- buttons
    def _cancel(self, request: gr.Request, watched: Any) -> Any:
        if not watched:
            return gr.skip()
        try:
            job = self.app.job(watched[0], request)
        except GensparseError as error:
            return render.error_card(str(error))
        self.app.jobs.cancel(job)
        return render.job_card(job, self.app.jobs.position(job))

    def _compare_native(self, request: gr.Request, watched: Any) -> list[Any]:
        try:
            job = self.app.job(watched[0] if watched else "", request)
            before = runs.before_of(job)
            if before is None or not isinstance(job.result, Result):
                return [gr.skip(), gr.skip()]
            value = runs.pair(self.app, job.owner, before[1], Path(str(job.result.outputs[0].path)))
        except GensparseError as error:
            return [gr.skip(), render.error_card(str(error))]
        return [gr.update(value=value, visible=True, label=f"{before[0]} | result"), gr.skip()]

    def _compare_dense(self, request: gr.Request, watched: Any) -> list[Any]:
        try:
            job = self.app.job(watched[0] if watched else "", request)
            twin = runs.submit_twin(self.app, job.owner, job, panel=self.name)
        except GensparseError as error:
            return self._only(card=render.error_card(str(error)))
        return self._only(
            card=render.job_card(twin, self.app.jobs.position(twin)),
            cancel=gr.update(visible=True),
            dense=gr.update(visible=False),
            watched=(twin.id, twin.revision),
            timer=gr.Timer(TICK, active=True),
        )

    def _resume(self, request: gr.Request) -> list[Any]:
        """What this visitor's last job of this tab is doing: a page that is loaded again finds it."""
        try:
            own = [job for job in self.app.jobs.of(self.app.owner(request)) if job.facts.get("panel") == self.name]
        except GensparseError:
            return self._only()
        job = next((job for job in own if not job.state.ended), own[0] if own else None)
        if job is None:
            return self._only()
        return self._end(job) if job.state.ended else self._begin(job)
