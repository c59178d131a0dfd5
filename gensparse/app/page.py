"""The page: its tabs, in order, and what all of them look like."""

from collections.abc import Callable

import gradio as gr

from gensparse.app import api, generate_tab, upscale_tab
from gensparse.app.core import App

TABS: tuple[tuple[str, str, Callable[[App], None]], ...] = (
    ("Generate", "generate", generate_tab.tab),
    ("Upscale", "upscale", upscale_tab.tab),
)
"""(label, id, function that draws it inside an open `gr.Tab`)."""


def build(app: App) -> gr.Blocks:
    """The page of a server, not yet launched."""
    with gr.Blocks(title="gensparse", analytics_enabled=False, delete_cache=(3600, 86_400)) as page:
        gr.Markdown("# gensparse\nPictures far beyond the trained size, with sparse attention.", elem_id="gs-title")
        with gr.Tabs(elem_id="gs-tabs") as app.tabs:
            for label, name, draw in TABS:
                with gr.Tab(label, id=name):
                    draw(app)
        api.add(app)
    page.queue(max_size=256, default_concurrency_limit=8)
    return page
