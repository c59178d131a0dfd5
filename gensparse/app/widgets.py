"""The widgets that a request is made of; which values they allow is checked again in `forms`."""

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from gensparse.app.core import App, Form
from gensparse.app.forms import models_here
from gensparse.app.render import esc
from gensparse.errors import ConfigError, GensparseError
from gensparse.highres.ways import WAYS
from gensparse.methods import method_class
from gensparse.methods.describe import describe

SIZES = (
    ("1024 x 1024", "1024x1024"),
    ("2048 x 2048", "2048x2048"),
    ("4096 x 4096 (4K square)", "4096x4096"),
    ("3840 x 2160 (4K wide)", "3840x2160"),
    ("2160 x 3840 (4K tall)", "2160x3840"),
    ("3072 x 4096", "3072x4096"),
    ("7680 x 4320 (8K wide)", "7680x4320"),
    ("8192 x 8192 (8K square)", "8192x8192"),
    ("16:9 with 8 megapixels", "16:9@8mp"),
)
FACTORS = (("1.5 times", "1.5x"), ("2 times", "2x"), ("3 times", "3x"), ("4 times", "4x"))
OFFERED = (
    "clear",
    "neighborhood",
    "sliding_window",
    "double_window",
    "long_distance",
    "proxy",
    "psa",
    "hilo",
    "biformer",
)
"""Methods that the form lists: those that make any picture cheaper with nothing but numbers. Others can be typed."""

COSTLY = ("model", "size", "method", "settings", "steps", "guidance", "num_images", "highres", "dense_steps")
"""Fields of every form with text that change what a request costs."""

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def prompt(app: App, tab: str, value: str, info: str, lines: int = 3) -> gr.Textbox:
    """What the picture shows."""
    return gr.Textbox(
        value,
        label="Prompt",
        lines=lines,
        max_lines=8,
        max_length=app.limits.prompt,
        info=info,
        elem_id=f"gs-{tab}-prompt",
    )


def size_choice(app: App) -> gr.Dropdown:
    """The size of a picture from text."""
    return gr.Dropdown(
        sizes(app, [("the model's own", "1x")]),
        value="1x",
        label="Size",
        info=f"or type 1920x1200, 2x, 16:9@8mp; up to {app.limits.side} pixels a side",
        allow_custom_value=True,
        min_width=140,
    )


def sizes(app: App, first: Sequence[tuple[str, str]] = ()) -> list[tuple[str, str]]:
    """Sizes to choose from, those that the server makes."""
    fitting = [item for item in SIZES if max(_sides(item[1])) <= app.limits.side]
    return [*first, *fitting]


def _sides(size: str) -> tuple[int, int]:
    width, _, height = size.partition("x")
    return (int(width), int(height)) if height else (0, 0)


def model_choice() -> gr.Dropdown:
    """The models that are on this machine."""
    here = models_here()
    return gr.Dropdown(
        here,
        value=here[0],
        label="Model",
        info="Models whose files are on this machine",
        interactive=True,
        min_width=140,
    )


def attention_choice() -> tuple[gr.Dropdown, gr.Textbox, gr.Markdown]:
    """Method, its settings, and what they mean."""
    names = ["auto", "dense", *OFFERED]
    with gr.Row():
        method = gr.Dropdown(
            names,
            value="auto",
            label="Attention",
            info="How large stages attend",
            allow_custom_value=True,
            min_width=140,
        )
        settings = gr.Textbox("", label="Settings", info="key=value, key=value; empty for the defaults", max_length=200)
    about = gr.Markdown(method_words("auto"), elem_classes="gs-quiet")
    method.input(_chosen, method, [settings, about], queue=False, **QUIET)
    method.change(method_words, method, about, queue=False, **QUIET)  # also when another tab fills it
    return method, settings, about


def _chosen(name: str) -> tuple[str, str]:
    if name in ("auto", "dense"):
        return "", method_words(name)
    try:
        return describe(method_class(name))["text"].partition(":")[2], method_words(name)
    except GensparseError as error:
        return "", esc(error)


def method_words(name: str) -> str:
    """What a method is and what its settings mean, in Markdown."""
    if name == "auto":
        return "Dense while that is cheaper, then what the model's authors found best."
    if name == "dense":
        return "Every token sees every token: exact, and slow beyond 2048 pixels."
    try:
        facts = describe(method_class(name))
    except ConfigError as error:
        return esc(error)
    settings = "\n".join(f"- `{key}`: {esc(text)}" for key, text in facts["settings"].items())
    return f"{esc(facts['summary'])}\n\n{settings}"


def highres_choice() -> gr.Dropdown:
    """The ways to a large size; each family of models knows some of them."""
    return gr.Dropdown(
        ["auto", *WAYS],
        value="auto",
        label="High resolution",
        info="How large sizes are reached; also NAME:key=value",
        allow_custom_value=True,
    )


def numbers(app: App) -> dict[str, Any]:
    """Steps, guidance and seed; empty fields leave the choice to the model."""
    limits = app.limits
    out: dict[str, Any] = {}
    with gr.Row():
        # texts, because gradio's numbers show and send 0 where they are empty at first
        options = {"placeholder": "the model's", "max_lines": 1, "max_length": 10, "min_width": 90}
        out["steps"] = gr.Textbox("", label="Steps", info=f"1 to {limits.steps}; empty: the model's", **options)
        out["guidance"] = gr.Textbox(
            "", label="Guidance", info=f"0 to {limits.guidance:g}; empty: the model's", **options
        )
    with gr.Row():
        out["seed"] = gr.Number(0, label="Seed", info="The same seed is the same picture", precision=0, min_width=120)
        out["random_seed"] = gr.Checkbox(True, label="Random seed", info="A new one each time", min_width=120)
    return out


def negative_prompt(app: App) -> gr.Textbox:
    """What the picture is not to show."""
    return gr.Textbox(
        "", label="Negative prompt", lines=1, max_lines=4, max_length=app.limits.prompt, info="What to steer away from"
    )


def loras(app: App) -> dict[str, Any]:
    """LoRA files, where only the person at this machine reaches the page."""
    if app.settings.shared:
        return {}
    return {"lora": gr.Textbox("", label="LoRA", lines=1, max_lines=4, info="PATH or PATH:SCALE, one a line")}


def more(app: App) -> dict[str, Any]:
    """What forms with text have beside, folded away."""
    out: dict[str, Any] = {}
    with gr.Accordion("More", open=False):
        out["negative_prompt"] = negative_prompt(app)
        out["highres"] = highres_choice()
        with gr.Row():
            out["num_images"] = gr.Slider(1, app.limits.images, 1, step=1, label="Pictures", info="Seeds counted up")
            out["dense_steps"] = gr.Slider(
                0, app.limits.steps, 0, step=1, label="Dense steps", info="First steps of each stage kept dense"
            )
        out |= loras(app)
    return out


def form_values(form: Form, values: Sequence[Any]) -> dict[str, Any]:
    """Values of the widgets of a form, in their order, as fields of a request."""
    return request_values(dict(zip(form.fields, values, strict=True)))


def request_values(shown: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the widgets as fields of a request: the opposite of `core.widget_values`."""
    out = {name: value for name, value in shown.items() if value is not None and value != ""}
    method, settings = str(out.pop("method", "auto")).strip(), str(out.pop("settings", "")).strip()
    if method in ("auto", "dense") and not settings:
        out["attention"] = method
    else:
        out["attention"] = f"{method}:{settings}" if settings else method
    if out.pop("random_seed", False):
        out.pop("seed", None)
    return out
