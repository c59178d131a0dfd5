"""The tab "Generate": text to picture, up to any size."""

from typing import Any

import gradio as gr

from gensparse.app import render, runs, widgets
from gensparse.app.core import App, Form
from gensparse.app.jobs import Job
from gensparse.app.panel import Panel
from gensparse.app.widgets import QUIET
from gensparse.errors import GensparseError

PROMPT = "a red circle left of a blue star on a green striped background"


def tab(app: App) -> None:
    """Draw the tab inside an open `gr.Tab`."""
    form = app.forms["generate"] = Form("generate")
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            events = _draw_form(app, form)
            cost = gr.HTML("", elem_id="gs-generate-cost")
            run = gr.Button("Generate", variant="primary", elem_classes="gs-run", elem_id="gs-generate-run")
        with gr.Column(scale=3, min_width=300):
            panel = Panel(app, "generate", "The picture appears here. Ctrl+Enter starts it.")

    def submit(owner: str, values: tuple[Any, ...]) -> Job:
        request, _ = runs.asked(app, "generate", _values(form, values), owner)
        return runs.submit(app, owner, request, panel="generate")

    def estimate(*values: Any) -> str:
        try:
            request, _ = runs.asked(app, "generate", _values(form, values), "")
            return render.plan_card(*runs.plan(request, None))
        except GensparseError as error:
            return render.error_card(str(error))

    panel.starts([run.click, *events], form.widgets, submit)
    watched = [form.fields[name] for name in _COSTLY]
    gr.on([item.change for item in watched], estimate, form.widgets, cost, trigger_mode="always_last", **QUIET)
    app.page.load(estimate, form.widgets, cost, **QUIET)


_COSTLY = ("model", "size", "method", "settings", "steps", "guidance", "num_images", "highres", "dense_steps")


def _draw_form(app: App, form: Form) -> list[Any]:
    """The widgets; returns further events that start a job."""
    limits, fields = app.limits, form.fields
    fields["prompt"] = gr.Textbox(
        PROMPT,
        label="Prompt",
        lines=3,
        max_lines=8,
        max_length=limits.prompt,
        info="The embedded model knows coloured shapes; other models take any text",
        elem_id="gs-generate-prompt",
    )
    with gr.Row():
        fields["model"] = widgets.model_choice()
        fields["size"] = gr.Dropdown(
            widgets.sizes(app, [("the model's own", "1x")]),
            value="1x",
            label="Size",
            info=f"or type 1920x1200, 2x, 16:9@8mp; up to {limits.side} pixels a side",
            allow_custom_value=True,
            min_width=140,
        )
    fields["method"], fields["settings"], _ = widgets.attention_choice()
    fields |= widgets.numbers(app)
    with gr.Accordion("More", open=False):
        fields["negative_prompt"] = gr.Textbox(
            "", label="Negative prompt", lines=1, max_lines=4, max_length=limits.prompt, info="What to steer away from"
        )
        fields["highres"] = widgets.highres_choice()
        with gr.Row():
            fields["num_images"] = gr.Slider(1, limits.images, 1, step=1, label="Pictures", info="Seeds counted up")
            fields["dense_steps"] = gr.Slider(
                0, limits.steps, 0, step=1, label="Dense steps", info="First steps of each stage kept dense"
            )
        if not app.settings.shared:
            fields["lora"] = gr.Textbox("", label="LoRA", lines=1, max_lines=4, info="PATH or PATH:SCALE, one a line")
    return [fields["prompt"].submit]


def _values(form: Form, values: tuple[Any, ...]) -> dict[str, Any]:
    return widgets.request_values(dict(zip(form.fields, values, strict=True)))
