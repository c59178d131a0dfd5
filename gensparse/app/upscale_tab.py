"""The tab "Upscale": a picture of one's own, larger."""

from pathlib import Path
from typing import Any

import gradio as gr

from gensparse.app import render, runs, uploads, widgets
from gensparse.app.core import App, Form
from gensparse.app.jobs import Job
from gensparse.app.panel import Panel
from gensparse.app.viewer import file_url
from gensparse.app.widgets import QUIET
from gensparse.errors import GensparseError


def tab(app: App) -> None:
    """Draw the tab inside an open `gr.Tab`."""
    form = app.forms["upscale"] = Form("upscale")
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            picture = gr.File(
                label=f"Your picture, up to {app.limits.upload // 1_000_000} MB",
                file_count="single",
                file_types=uploads.FILE_TYPES,
                type="filepath",
                elem_id="gs-upscale-picture",
            )
            seen = gr.HTML("", elem_id="gs-upscale-seen")
            events = _draw_form(app, form)
            cost = gr.HTML("", elem_id="gs-upscale-cost")
            run = gr.Button("Upscale", variant="primary", elem_classes="gs-run", elem_id="gs-upscale-run")
        with gr.Column(scale=3, min_width=300):
            panel = Panel(app, "upscale", "The enlarged picture appears here. Ctrl+Enter starts it.")

    def submit(owner: str, values: tuple[Any, ...]) -> Job:
        request, header = runs.asked(app, "upscale", widgets.form_values(form, values[1:]), owner, values[0])
        return runs.submit(app, owner, request, header, panel="upscale")

    def estimate(request: gr.Request, *values: Any) -> str:
        if not values[0]:
            return ""
        try:
            fields = widgets.form_values(form, values[1:])
            checked, header = runs.asked(app, "upscale", fields, app.owner(request), values[0])
            return render.plan_card(*runs.plan(checked, header))
        except GensparseError as error:
            return render.error_card(str(error))

    def look(request: gr.Request, value: Any) -> str:
        if not value:
            return ""
        try:
            path = uploads.uploaded(app, value, app.owner(request))
            return _seen(path, uploads.checked_header(app, path).size)
        except GensparseError as error:
            return render.error_card(str(error))

    inputs = [picture, *form.widgets]
    panel.starts([run.click, *events], inputs, submit)
    picture.change(look, picture, seen, queue=False, **QUIET)
    watched = [picture, *(form.fields[name] for name in _COSTLY)]
    gr.on([item.change for item in watched], estimate, inputs, cost, trigger_mode="always_last", **QUIET)


_COSTLY = ("model", "size", "strength", "method", "settings", "steps", "guidance", "highres")


def _draw_form(app: App, form: Form) -> list[Any]:
    """The widgets; returns further events that start a job."""
    limits, fields = app.limits, form.fields
    with gr.Row():
        fields["size"] = gr.Dropdown(
            widgets.sizes(app, widgets.FACTORS),
            value="2x",
            label="By or to",
            info=f"a factor such as 2x, or a size such as 3000x2000; up to {limits.side} pixels a side",
            allow_custom_value=True,
            min_width=140,
        )
        fields["model"] = widgets.model_choice()
    fields["strength"] = gr.Slider(
        0.0, 1.0, 0.3, step=0.05, label="Strength", info="0 keeps the picture, 1 draws it anew from noise"
    )
    fields["prompt"] = widgets.prompt(app, "upscale", "", "What the picture shows; optional", lines=2)
    fields["method"], fields["settings"], _ = widgets.attention_choice()
    with gr.Accordion("More", open=False):
        fields |= widgets.numbers(app)
        fields["highres"] = widgets.highres_choice()
        fields["faithful"] = gr.Checkbox(
            True, label="Faithful", info="Correct the result until it shrinks to your picture"
        )
        fields["negative_prompt"] = widgets.negative_prompt(app)
        fields |= widgets.loras(app)
    return [fields["prompt"].submit]


def _seen(path: Path, size: tuple[int, int]) -> str:
    """The picture that was uploaded, as the visitor's own browser shows it."""
    height, width = size
    words = f"<p>{render.esc(path.name)}: {width} x {height} pixels</p>"
    return f'{words}<img class="gs-preview" alt="your picture" src="{render.esc(file_url(path))}">'
