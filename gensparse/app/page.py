"""The page: its tabs, in order, and what all of them look like."""

from collections.abc import Callable
from typing import Any

import gradio as gr

from gensparse.app import api, customize_tab, generate_tab, history_tab, lab_tab, upscale_tab, viewer
from gensparse.app.core import App

TABS: tuple[tuple[str, str, Callable[[App], None]], ...] = (
    ("Generate", "generate", generate_tab.tab),
    ("Upscale", "upscale", upscale_tab.tab),
    ("Customize", "customize", customize_tab.tab),
    ("Attention lab", "lab", lab_tab.tab),
    ("History and presets", "history", history_tab.tab),
)
"""(label, id, function that draws it inside an open `gr.Tab`)."""

CSS: tuple[str, ...] = (lab_tab.css(),)
"""Styles that tabs bring themselves."""

FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Ubuntu", "sans-serif")
MONO = ("ui-monospace", "Menlo", "Consolas", "monospace")


def build(app: App) -> gr.Blocks:
    """The page of a server, not yet launched."""
    with gr.Blocks(title="gensparse", analytics_enabled=False, delete_cache=(3600, 86_400)) as app.page:
        api.add(app)  # first, so that its names are not taken
        gr.Markdown("# gensparse\nPictures far beyond the trained size, with sparse attention.", elem_id="gs-title")
        with gr.Tabs(elem_id="gs-tabs") as app.tabs:
            for label, name, draw in TABS:
                with gr.Tab(label, id=name) as app.items[name]:
                    draw(app)
    app.page.queue(max_size=256, default_concurrency_limit=8)
    return app.page


def look() -> dict[str, Any]:
    """Arguments of `launch`: theme with fonts of the system only, style, script."""
    theme = gr.themes.Default(font=list(FONTS), font_mono=list(MONO))
    return {"theme": theme, "css": "\n".join((viewer.css(), *CSS)), "head": viewer.head()}
