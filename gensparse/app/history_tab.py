"""The tab "History": this session's pictures, settings out of a picture, and presets."""

from collections.abc import Mapping
from typing import Any

import gradio as gr

from gensparse.app import forms, history, presets, render, uploads
from gensparse.app.core import App
from gensparse.app.reload import reload
from gensparse.app.viewer import viewer
from gensparse.app.widgets import QUIET, request_values
from gensparse.errors import ConfigError, GensparseError

EMPTY = "Pictures that you make appear here. They stay until the server ends; the files stay in its output folder."
EMPTY_SHARED = "Pictures that you make appear here, for this browser alone. Download what you want to keep."
_NEWEST = '<p class="gs-quiet">This session, newest first. Click a picture to see what made it.</p>'
_PICTURES = [".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff"]


def tab(app: App) -> None:
    """Draw the tab inside an open `gr.Tab`."""
    back = _Forms(app)
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=300):
            _gallery(app, back)
        with gr.Column(scale=2, min_width=300):
            _from_picture(app, back)
            _presets(app, back)


class _Forms:
    """The forms of the other tabs as outputs of an event, and what fills one of them."""

    def __init__(self, app: App) -> None:
        self._app = app

    @property
    def outputs(self) -> list[Any]:
        return [widget for form in self._app.forms.values() for widget in form.widgets] + [self._app.tabs]

    def filled(self, kind: str, values: Mapping[str, Any]) -> list[Any]:
        """Updates that put values into the form of a kind of request, and that tab in front."""
        out: list[Any] = []
        for name, form in self._app.forms.items():
            out += form.updates(values) if name == kind else [gr.skip()] * len(form.widgets)
        return [*out, gr.Tabs(selected=self._app.forms[kind].tab) if kind in self._app.forms else gr.skip()]

    def untouched(self) -> list[Any]:
        return [gr.skip()] * len(self.outputs)


def _gallery(app: App, back: _Forms) -> None:
    """The pictures of this session; a click shows one with its report."""
    empty = f'<p class="gs-quiet">{EMPTY_SHARED if app.settings.shared else EMPTY}</p>'
    note = gr.HTML(empty)
    gallery = gr.Gallery(
        label="Pictures of this session", show_label=False, columns=4, object_fit="cover", allow_preview=False,
        interactive=False, height="auto", visible=False, elem_id="gs-history-gallery",
    )  # fmt: skip
    keys, chosen = gr.State([]), gr.State(None)
    again = gr.Button("Load these settings", variant="primary", visible=False, elem_id="gs-history-load")
    said = gr.HTML("", elem_id="gs-history-said")
    shown = gr.HTML("", elem_id="gs-history-picture")
    with gr.Accordion("What ran", open=False, visible=False) as box:
        report = gr.HTML("", elem_id="gs-history-report")

    def refresh(request: gr.Request) -> list[Any]:
        try:
            owner = app.owner(request)
            found = history.entries(app, owner)
            items = [(str(history.thumbnail(app, owner, entry.output)), entry.caption) for entry in found]
        except GensparseError as error:
            return [render.error_card(str(error)), gr.skip(), gr.skip()]
        value = gr.update(value=items, visible=bool(items), selected_index=None)
        return [_NEWEST if items else empty, value, [entry.key for entry in found]]

    def select(request: gr.Request, listed: list[str], event: gr.SelectData) -> list[Any]:
        try:
            key = listed[int(event.index)]
            entry = history.find(app, app.owner(request), key)
        except (GensparseError, IndexError, TypeError, ValueError) as error:
            text = str(error) if isinstance(error, GensparseError) else "this picture is not here any more"
            return [render.error_card(text), "", gr.update(visible=False), gr.skip(), gr.update(visible=False), None]
        return [
            "",
            viewer([entry.output]),
            gr.update(visible=True),
            render.what_ran(entry.result),
            gr.update(visible=True),
            key,
        ]

    def load(request: gr.Request, key: Any) -> list[Any]:
        try:
            kind, values = history.settings_of(history.find(app, app.owner(request), key))
        except GensparseError as error:
            return [render.error_card(str(error)), *back.untouched()]
        return ["", *back.filled(kind, values)]

    app.items["history"].select(refresh, None, [note, gallery, keys], **QUIET)
    gallery.select(select, [keys], [said, shown, box, report, again, chosen], **QUIET)
    again.click(load, [chosen], [said, *back.outputs], **QUIET)


def _from_picture(app: App, back: _Forms) -> None:
    """A picture dropped here fills the form it came from; nothing runs."""
    file = gr.File(
        label="Take settings from a picture", file_types=_PICTURES, file_count="single", type="filepath", height=150,
        elem_id="gs-reload-file",
    )  # fmt: skip
    gr.HTML(
        '<p class="gs-quiet">Drop a picture that gensparse made (PNG, JPEG, WebP, TIFF). Of pictures of other tools '
        "prompt, steps, seed and size are read. Only the form is filled; nothing is loaded or started.</p>"
    )
    said = gr.HTML("", elem_id="gs-reload-error")
    message = gr.Textbox(
        label="What was taken", lines=2, max_lines=8, interactive=False, visible=False, elem_id="gs-reload-message"
    )
    with gr.Accordion("Everything the picture says, as text", open=False, visible=False) as box:
        text = gr.Textbox(show_label=False, lines=8, max_lines=20, interactive=False, elem_id="gs-reload-text")

    def take(request: gr.Request, value: Any) -> list[Any]:
        if not value:
            return ["", gr.skip(), gr.skip(), gr.skip(), *back.untouched()]
        try:
            owner = app.owner(request)
            path = uploads.uploaded(app, value, owner)
            uploads.checked_header(app, path)
            found = reload(path, models=forms.models_here(), fields=forms.FILLED)
            if found.kind not in app.forms:
                raise ConfigError(f"the picture was made by {found.kind}, which this page has no form for")
        except GensparseError as error:
            hidden = gr.update(visible=False)
            return [render.error_card(str(error)), hidden, hidden, "", *back.untouched()]
        return [
            "",
            gr.update(value=found.message, visible=True),
            gr.update(visible=True),
            found.text,
            *back.filled(found.kind, found.values)[:-1],
            gr.skip(),
        ]

    file.upload(take, [file], [said, message, box, text, *back.outputs], **QUIET)


def _presets(app: App, back: _Forms) -> None:
    """Settings under a name: those of the Generate tab are saved, and loaded back."""
    where = "for this browser, on this server" if app.settings.shared else "for you, also for `gensparse --preset`"
    with gr.Accordion("Presets", open=True):
        gr.Markdown(f"The settings of the Generate tab under a name, without prompt and seed. Kept {where}.")
        name = gr.Dropdown([], label="Saved", elem_id="gs-preset-name")
        with gr.Row():
            loads = gr.Button("Load", size="sm", min_width=70, elem_id="gs-preset-load")
            deletes = gr.Button("Delete", size="sm", min_width=70, elem_id="gs-preset-delete")
        new = gr.Textbox("", label="Save as", max_lines=1, max_length=64, elem_id="gs-preset-new")
        saves = gr.Button("Save", size="sm", elem_id="gs-preset-save")
        said = gr.HTML("", elem_id="gs-preset-said")

    def listed(request: gr.Request, kept: str | None = None) -> Any:
        return gr.update(choices=presets.names(app, app.owner(request)), value=kept)

    def answer(text: str) -> str:
        return f'<p class="gs-quiet" role="status">{render.esc(text)}</p>'

    def refresh(request: gr.Request, current: Any) -> Any:
        try:
            return listed(request, current)
        except GensparseError:
            return gr.skip()

    def save(request: gr.Request, chosen: Any, *shown: Any) -> list[Any]:
        try:
            values = request_values(dict(zip(app.forms["generate"].fields, shown, strict=True)))
            made = forms.generate_request({"prompt": "-", **values}, app.settings)
            presets.save(app, app.owner(request), str(chosen or ""), made)
            return [answer(f"Saved {chosen}."), listed(request, str(chosen))]
        except GensparseError as error:
            return [render.error_card(str(error)), gr.skip()]

    def load(request: gr.Request, chosen: Any) -> list[Any]:
        try:
            kind, values = presets.load(app, app.owner(request), str(chosen or ""))
        except GensparseError as error:
            return [render.error_card(str(error)), *back.untouched()]
        return [answer(f"Loaded {chosen}."), *back.filled(kind, values)]

    def delete(request: gr.Request, chosen: Any) -> list[Any]:
        try:
            presets.delete(app, app.owner(request), str(chosen or ""))
            return [answer(f"Deleted {chosen}."), listed(request)]
        except GensparseError as error:
            return [render.error_card(str(error)), gr.skip()]

    app.items["history"].select(refresh, [name], [name], **QUIET)
    gr.on([saves.click, new.submit], save, [new, *app.forms["generate"].widgets], [said, name], **QUIET)
    loads.click(load, [name], [said, *back.outputs], **QUIET)
    deletes.click(delete, [name], [said, name], **QUIET)
