"""The tab "Customize": a picture with given subjects, each by a picture of it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from gensparse.app import cast, forms, render, runs, tales, uploads, widgets
from gensparse.app.core import App, Form
from gensparse.app.jobs import Job
from gensparse.app.panel import Panel
from gensparse.app.viewer import file_url
from gensparse.app.widgets import QUIET
from gensparse.errors import GensparseError
from gensparse.request import CustomizeRequest
from gensparse.subjects.naming import MAX_SUBJECTS

PROMPT = "a red circle left of a blue star on a white background"
NUMBERS = range(1, MAX_SUBJECTS + 1)
OPEN = 2  # subjects whose fields are shown at first
_DRAWN = "gs-customize-drawn"  # field in which the page tells which box was drawn, as NUMBER:BOX:COUNT


def tab(app: App) -> None:
    """Draw the tab inside an open `gr.Tab`."""
    form = app.forms["customize"] = Form("customize")
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            events = _draw_form(app, form)
            cost = gr.HTML("", elem_id="gs-customize-cost")
            run = gr.Button("Make the picture", variant="primary", elem_classes="gs-run", elem_id="gs-customize-run")
        with gr.Column(scale=3, min_width=300):
            panel = TalePanel(app, "customize", "The picture with your subjects appears here. Ctrl+Enter starts it.")

    def submit(owner: str, values: tuple[Any, ...]) -> Job:
        subjects, fields = _parted(widgets.form_values(form, values))
        request, _ = runs.asked(app, "customize", fields, owner, subjects=subjects)
        assert isinstance(request, CustomizeRequest)
        return tales.begin(app, owner, request, panel="customize")

    def follow(owner: str, values: tuple[Any, ...]) -> Job:
        watched, prompt, *rest = values
        subjects, fields = _parted(widgets.form_values(form, rest))
        job = app.jobs.get(watched[0] if watched else "", owner)
        boxes = {item["name"].strip(): item.get("box") for item in subjects if item.get("name")}
        known = {actor.name for actor in job.facts["tale"].story.actors} if "tale" in job.facts else set()
        kept = {name: box for name, box in boxes.items() if name in known}
        return tales.follow(app, owner, job, prompt, kept, fields.get("seed"), panel="customize")

    def estimate(request: gr.Request, *values: Any) -> str:
        subjects, fields = _parted(widgets.form_values(form, values))
        if not any(item.get("name") for item in subjects):
            return ""
        try:
            checked, _ = runs.asked(app, "customize", fields, app.owner(request), subjects=subjects)
            return render.plan_card(*runs.plan(checked, None))
        except GensparseError as error:
            return render.error_card(str(error))

    panel.starts([run.click, *events], form.widgets, submit)
    panel.starts([panel.go.click, panel.prompt.submit], [panel.watched, panel.prompt, *form.widgets], follow)
    watched = [form.fields[name] for name in (*widgets.COSTLY, "subject_method", *_each("name", "picture"))]
    gr.on([item.change for item in watched], estimate, form.widgets, cost, trigger_mode="always_last", **QUIET)


class TalePanel(Panel):
    """A panel whose picture can be continued with the same subjects."""

    def _draw_further(self) -> tuple[str, ...]:
        limits = self.app.limits
        with gr.Group(visible=False) as self.next:
            self.turns = gr.HTML("", elem_id="gs-customize-turns")
            self.prompt = gr.Textbox(
                "", label="Next picture, with the same subjects", lines=2, max_lines=6, max_length=limits.prompt,
                info="Subjects that it names are in it, or else all. Places and seed are those of the form, all other "
                "settings those of the first picture", elem_id="gs-customize-next",
            )  # fmt: skip
            self.go = gr.Button("Continue", elem_id="gs-customize-continue")
        return "next", "turns"

    def _further(self, job: Job, *, done: bool) -> dict[str, Any]:
        told = tales.told(self.app, job)
        return {"next": gr.update(visible=bool(told) and job.state.ended), "turns": _strip(told)}

    def _shown(self, job: Job) -> dict[str, Any]:
        shown, tale = super()._shown(job), job.facts.get("tale")
        if tale is not None and len(tale.story.turns) > 1:
            shown["command"] += "<p>All of them, with story.json</p>"
            shown["command"] += render.copyable(tale.command) + render.copyable(tale.text)
        return shown


def _strip(told: Sequence[Job]) -> str:
    """The pictures of a tale in a row, small."""
    items = [(job.result.outputs[0].path, job.request.prompt) for job in told if job.result is not None and job.request]
    pictures = "".join(
        f'<a href="{render.esc(file_url(path))}" target="_blank" rel="noopener" title="{render.esc(prompt)}">'
        f'<img src="{render.esc(file_url(path))}" alt="{render.esc(prompt)}" loading="lazy"></a>'
        for path, prompt in items
    )
    return f'<div class="gs-turns">{pictures}</div>' if len(items) > 1 else ""


def _draw_form(app: App, form: Form) -> list[Any]:
    """The widgets; returns further events that start a job."""
    fields = form.fields
    fields["prompt"] = widgets.prompt(app, "customize", PROMPT, "The whole picture, with the name of every subject")
    for number in NUMBERS[:OPEN]:
        _draw_subject(app, fields, number)
    with gr.Accordion(f"Subjects {OPEN + 1} to {MAX_SUBJECTS}", open=False):
        for number in NUMBERS[OPEN:]:
            _draw_subject(app, fields, number)
    places = gr.HTML(elem_id="gs-customize-places")
    drawn = gr.Textbox("", show_label=False, elem_id=_DRAWN, elem_classes="gs-hidden")
    fields["subject_method"] = gr.Dropdown(
        list(forms.subject_methods()),
        value="auto",
        label="Subject method",
        info="How the picture sees them; auto is the usual one of the model; also NAME:key=value",
        allow_custom_value=True,
        elem_id="gs-customize-method",
    )
    with gr.Row():
        fields["model"] = widgets.model_choice()
        fields["size"] = widgets.size_choice(app)
    fields["method"], fields["settings"], _ = widgets.attention_choice()
    fields |= widgets.numbers(app)
    fields |= widgets.more(app)

    shown = ["model", "size", *_each("name", "box")]

    def preview(*values: Any) -> str:
        return _places(dict(zip(shown, values, strict=True)))

    watched = [fields[name] for name in shown]
    places.value = preview(*(item.value for item in watched))
    gr.on([item.change for item in watched], preview, watched, places, trigger_mode="always_last", **QUIET)

    def place(text: str, *values: Any) -> list[Any]:
        number, box = (*str(text).split(":"), "", "")[:2]
        field, changed = f"box_{number}", dict(zip(shown, values, strict=True))
        if field in changed:  # also one whose fields are folded away, and not in the page
            changed[field] = box
        return [_places(changed), *(box if name == field else gr.skip() for name in _each("box"))]

    outputs = [places, *(fields[name] for name in _each("box"))]
    drawn.change(place, [drawn, *watched], outputs, trigger_mode="always_last", **QUIET)
    return [fields["prompt"].submit]


def _draw_subject(app: App, fields: dict[str, Any], number: int) -> None:
    """Name, place, picture, mask and words of one subject."""
    with gr.Accordion(f"Subject {number}", open=True):
        _draw_fields(app, fields, number)


def _draw_fields(app: App, fields: dict[str, Any], number: int) -> None:
    name, box, picture, mask = (f"{what}_{number}" for what in ("name", "box", "picture", "mask"))
    with gr.Row():
        fields[name] = gr.Textbox(
            "", label="Name", placeholder=("circle", "star", "", "", "")[number - 1], max_length=app.limits.name,
            max_lines=1, min_width=110, info="A word of the prompt", elem_id=f"gs-customize-name-{number}",
        )  # fmt: skip
        fields[box] = gr.Textbox(
            "", label="Place", placeholder="0, 0, 0.5, 1", max_length=60, max_lines=1, min_width=140,
            info="left, top, right, bottom, 0 to 1", elem_id=f"gs-customize-box-{number}",
        )  # fmt: skip
    fields[picture] = gr.File(
        label=f"Its picture, up to {app.limits.upload // 1_000_000} MB", file_count="single", type="filepath",
        file_types=uploads.FILE_TYPES, height=150, elem_id=f"gs-customize-picture-{number}",
    )  # fmt: skip
    seen = gr.HTML("", elem_id=f"gs-customize-seen-{number}")
    fields[f"words_{number}"] = gr.Textbox(
        "", label="Words", max_length=app.limits.prompt, max_lines=3, elem_id=f"gs-customize-words-{number}",
        info="What it looks like, for methods that read it; empty: its name",
    )  # fmt: skip
    target = f"gs-customize-mask-{number}"
    fields[mask] = gr.Textbox("", show_label=False, elem_id=target, elem_classes="gs-hidden")

    def look(request: gr.Request, value: Any) -> tuple[str, str]:
        if not value:
            return "", ""
        try:
            owner = app.owner(request)
            path = uploads.uploaded(app, value, owner)
            height, width = uploads.checked_header(app, path).size
            source = file_url(uploads.small_copy(app, owner, path))
        except GensparseError as error:
            return render.error_card(str(error)), ""
        words = f"{render.esc(path.name)}: {width} x {height} pixels. Mark the subject, or leave it to its name."
        return f'<p>{words}</p><gs-mask data-src="{render.esc(source)}" data-target="{target}"></gs-mask>', ""

    # one at a time, since a picture may be large
    options: dict[str, Any] = {"concurrency_id": "small-copies", "concurrency_limit": 1, **QUIET}
    fields[picture].change(look, fields[picture], [seen, fields[mask]], **options)


def _each(*names: str) -> list[str]:
    return [f"{name}_{number}" for name in names for number in NUMBERS]


def _parted(values: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(subjects as `cast.read` takes them, all other fields) of the form."""
    subjects = [
        {key: values.get(f"{field}_{number}") for key, field in _FIELDS.items() if values.get(f"{field}_{number}")}
        for number in NUMBERS
    ]
    own = set(_each(*_FIELDS.values()))
    return subjects, {name: value for name, value in values.items() if name not in own}


_FIELDS = {"name": "name", "image": "picture", "mask": "mask", "box": "box", "prompt": "words"}
"""Field of a subject -> field of the form."""


# --------------------------------------------------------------------------------------------------------------- places
def _places(values: Mapping[str, Any]) -> str:
    """The empty canvas with the places of the subjects, to draw them on, and what is wrong with those typed."""
    boxes, wrong = [], ""
    for number in NUMBERS:
        name, text = (str(values.get(f"{what}_{number}") or "").strip() for what in ("name", "box"))
        entry: dict[str, Any] = {"name": name or str(number), "number": number}
        if text:
            try:
                entry["box"] = cast.box_of(name or f"subject {number}", text)
            except GensparseError as error:
                wrong += render.error_card(str(error))
        if name or text or number <= OPEN:
            boxes.append(entry)
    width, height = _shape(values)
    facts = f'data-width="{width}" data-height="{height}" data-boxes="{render.esc(json.dumps(boxes))}"'
    facts += f' data-target="{_DRAWN}"'
    return f"<p>Places in the picture: choose a subject, then draw its box.</p><gs-places {facts}></gs-places>{wrong}"


def _shape(values: Mapping[str, Any]) -> tuple[int, int]:
    """(width, height) of the picture to be made, as far as the form says it."""
    try:
        height, width = forms.size_asked({"model": values.get("model"), "size": values.get("size")})
    except GensparseError:
        return 1, 1
    return width, height
