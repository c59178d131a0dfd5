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
        request, _ = runs.asked(app, "generate", widgets.form_values(form, values), owner)
        return runs.submit(app, owner, request, panel="generate")

    def estimate(*values: Any) -> str:
        try:
            request, _ = runs.asked(app, "generate", widgets.form_values(form, values), "")
            return render.plan_card(*runs.plan(request, None))
        except GensparseError as error:
            return render.error_card(str(error))

    panel.starts([run.click, *events], form.widgets, submit)
    watched = [form.fields[name] for name in widgets.COSTLY]
    gr.on([item.change for item in watched], estimate, form.widgets, cost, trigger_mode="always_last", **QUIET)
    app.page.load(estimate, form.widgets, cost, **QUIET)


def _draw_form(app: App, form: Form) -> list[Any]:
    """The widgets; returns further events that start a job."""
    fields, info = form.fields, "The embedded model knows coloured shapes; other models take any text"
    fields["prompt"] = widgets.prompt(app, "generate", PROMPT, info)
    with gr.Row():
        fields["model"] = widgets.model_choice()
        fields["size"] = widgets.size_choice(app)
    fields["method"], fields["settings"], _ = widgets.attention_choice()
    fields |= widgets.numbers(app)
    fields |= widgets.more(app)
    return [fields["prompt"].submit]
