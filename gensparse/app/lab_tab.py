"""The tab "Attention lab": who sees whom, and what it costs; a thin skin over `gensparse.app.lab`."""

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from gensparse.app import lab
from gensparse.app.core import App
from gensparse.app.jobs import State
from gensparse.app.render import esc
from gensparse.errors import ConfigError, GensparseError
from gensparse.layout import Grid
from gensparse.methods import METHODS
from gensparse.request import parse_size

START, START_MODEL = "clear", "embedded"
SIZES = ("512x512", "1024x1024", "2048x2048", "3840x2160", "4096x4096", "8192x8192", "832x480", "1280x720")
KEPT = 24  # pictures of a visitor that stay on disk
DEFAULTS = "defaults"

_FIELDS = max(len(lab.settings_of(name)) for name in (*METHODS, *lab.PATTERNS))
_CLICK = "Click a token to see who it sees"
_LEGEND = (
    '<p class="gs-legend">Click a token: <span style="--c:#d55e00"></span>the token '
    '<span style="--c:#0072b2"></span>sees <span style="--c:#009e73"></span>sees, extra key '
    '<span style="--c:#e2e5e9"></span>sees not</p>'
)
_COPY = "(code) => { navigator.clipboard && navigator.clipboard.writeText(code).catch(() => {}); }"


@dataclass(frozen=True)
class Asked:
    """What the widgets say, in the order of `names`."""

    name: str
    settings: tuple[str, ...]
    model: str
    size: str
    text: float | None
    frames: float | None
    layer: float
    moment: float
    frame: float | None
    row: float | None
    column: float | None
    group: int | None

    @classmethod
    def of(cls, values: Sequence[Any]) -> "Asked":
        name, *rest = values
        settings = ("" if text is None else str(text) for text in rest[:_FIELDS])
        return cls(name, tuple(settings), *rest[_FIELDS:])

    def view(self) -> lab.View:
        """Raises ConfigError for what is not allowed."""
        model = lab.lab_model(self.model)
        known = lab.settings_of(self.name)
        values = {item.name: text for item, text in zip(known, self.settings, strict=False)}
        (height, width), _ = parse_size(str(self.size)).resolve(base=model.size, multiple=1)
        return lab.look(
            self.model,
            self.name,
            values,
            height=height,
            width=width,
            text=_whole("text", self.text),
            frames=_whole("frames", self.frames) if model.frames is not None else None,
            layer=_whole("layer", self.layer) or 0,
            moment=float(self.moment),
        )

    def query(self, grid: Grid) -> Grid:
        """The token, moved inside the grid; the middle where nothing was said."""
        asked = (self.frame, self.row, self.column)
        frame, row, column = (
            middle if at is None else min(max(0, int(at)), n - 1)
            for at, n, middle in zip(asked, grid, lab.centre(grid), strict=True)
        )
        return frame, row, column


def css() -> str:
    """The style of the tab."""
    return Path(__file__).with_name("lab.css").read_text(encoding="utf-8")


def tab(app: App) -> None:
    """Draw the tab inside an open `gr.Tab`."""
    gr.Markdown("Who sees whom under a method, and what that saves. No model runs here.")
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            name, about, preset, settings = _what()
            model, size, text, frames, layer, moment = _where()
        with gr.Column(scale=3, min_width=300):
            gr.HTML(_LEGEND)
            picture = gr.Image(
                label=_CLICK, show_label=False, interactive=False, format="png", buttons=["download", "fullscreen"],
                height=560, elem_id="gs-lab-picture",
            )  # fmt: skip
            status = gr.HTML(elem_id="gs-lab-status")
            group = gr.Radio([], label="Heads", info="This method gives heads different views.", visible=False)
            with gr.Row():
                query = _query()
            with gr.Row():
                use = gr.Button("Use this in Generate", variant="primary", min_width=140, elem_id="gs-lab-use")
                copy = gr.Button("Copy as Python", min_width=140, elem_id="gs-lab-copy")
            table = gr.HTML(elem_id="gs-lab-costs")
    with gr.Accordion("The same in Python", open=False):
        code = gr.Code(language="python", interactive=False, show_label=False, elem_id="gs-lab-code")
    profile = _profile()

    inputs = [name, *settings, model, size, text, frames, layer, moment, *query, group]
    counter = Counter(app)

    def draw(request: gr.Request, *values: Any) -> list[Any]:
        return _drawn(app, request, values)

    def count(*values: Any) -> str:
        return counter.table(values)

    def filled(*values: Any) -> list[Any]:
        """The attention field of the Generate tab, and that tab in front."""
        form = app.forms["generate"]
        try:
            view = Asked.of(values).view()
        except GensparseError as error:
            raise gr.Error(str(error), print_exception=False) from None
        return [*form.updates({"attention": view.attention}), gr.Tabs(selected=form.tab)]

    quick: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "queue": True}
    drawn = [picture, status, group, *query, code, use]

    def redraw(event: Any) -> None:
        """Draw, then count: the picture does not wait for the numbers."""
        event.then(draw, inputs, drawn, concurrency_id="lab", concurrency_limit=2, **quick).then(
            count, inputs, table, concurrency_id="lab-counts", concurrency_limit=1, **quick
        )

    redraw(name.input(_chosen, name, [about, preset, *settings], **quick))
    redraw(preset.input(_published, [name, preset], settings, **quick))
    redraw(model.input(_moved, model, [size, text, frames, layer, *query, *profile], **quick))
    typed = [item.submit for item in (*settings, text, frames)] + [item.blur for item in (*settings, text, frames)]
    gr.on(
        [*typed, size.input, layer.release, moment.release, app.items["lab"].select],
        draw, inputs, drawn, concurrency_id="lab", trigger_mode="always_last", **quick,
    ).then(count, inputs, table, concurrency_id="lab-counts", **quick)  # fmt: skip
    # another token or head: the numbers stay
    gr.on(
        [*(item.input for item in query), group.input],
        draw, inputs, drawn, concurrency_id="lab", trigger_mode="always_last", **quick,
    )  # fmt: skip
    picture.select(_clicked, [model, size, text, frames], query, trigger_mode="always_last", **quick).then(
        draw, inputs, drawn, concurrency_id="lab", **quick
    )
    where, what, plot = profile[1:]
    gr.on([where.input, what.input], _heat, [model, where, what], plot, **quick)
    copy.click(None, code, None, js=_COPY)
    if "generate" in app.forms:
        use.click(filled, inputs, [*app.forms["generate"].widgets, app.tabs], **quick)


# -------------------------------------------------------------------------------------------------------------- widgets
def _what() -> tuple[Any, Any, Any, list[Any]]:
    """Method or pattern, what it is, its published settings, and a field for each of its settings."""
    methods = [(name.replace("_", " "), name) for name in METHODS]
    shapes = [(f"{name} (pattern)", name) for name in lab.PATTERNS]
    name = gr.Dropdown(
        [*methods, *shapes], value=START, label="Method or pattern", elem_id="gs-lab-name",
        info="Methods are what papers publish; patterns are bare geometry for Python.",
    )  # fmt: skip
    preset = gr.Dropdown(
        [DEFAULTS, *lab.presets_of(START)], value=DEFAULTS, label="Published settings", elem_id="gs-lab-preset",
        info="What the authors used for a model.",
    )  # fmt: skip
    with gr.Group():
        settings = [gr.Textbox(**_field(START, number), max_lines=1) for number in range(_FIELDS)]
    with gr.Accordion("What it is", open=False):
        about = gr.Markdown(_about(START))
    return name, about, preset, settings


def _where() -> tuple[Any, ...]:
    """Model, size, text, frames, layer and moment."""
    first = lab.lab_model(START_MODEL)
    models = [(model.label, key) for key, model in lab.lab_models().items()]
    model = gr.Dropdown(models, value=START_MODEL, label="Model or family", elem_id="gs-lab-model")
    size = gr.Dropdown(
        list(SIZES), value=_size_text(first), allow_custom_value=True, label="Picture size", elem_id="gs-lab-size",
        info="Width x height in pixels, up to 8192; forms such as 4k and 16:9@8mp work too.",
    )  # fmt: skip
    with gr.Row():
        text = gr.Number(first.text, label="Text tokens", precision=0, minimum=0, maximum=lab.MAX_TEXT, min_width=120)
        frames = gr.Number(
            first.frames, label="Frames", precision=0, minimum=1, maximum=lab.MAX_FRAMES, visible=False, min_width=120
        )
    with gr.Accordion("Layer and moment", open=False):
        layer = gr.Slider(
            0, first.layers - 1, first.layers // 2, step=1, label="Attention layer", elem_id="gs-lab-layer",
            info="Some methods act differently from layer to layer.",
        )  # fmt: skip
        moment = gr.Slider(
            0, 1, 0.5, step=0.02, label="Moment of the run",
            info="0 is the first step, 1 the last; some methods begin or end dense.",
        )  # fmt: skip
    return model, size, text, frames, layer, moment


def _query() -> list[Any]:
    """Frame, row and column of the token, for those who do not click; the middle at first."""
    first = lab.lab_model(START_MODEL)
    middle = lab.centre(first.layout(*first.size, text=first.text).grid)
    return [
        gr.Number(
            at,
            label=what,
            precision=0,
            minimum=0,
            min_width=90,
            visible=what != "Frame",
            elem_id=f"gs-lab-{what.lower()}",
        )
        for what, at in zip(("Frame", "Row", "Column"), middle, strict=True)
    ]


def _profile() -> tuple[Any, Any, Any, Any]:
    """The measured profile of the model: its place, size, kind and chart."""
    first = lab.lab_model(START_MODEL)
    measured = lab.profile_of(first)
    grids = [] if measured is None else lab.grid_names(measured)
    with gr.Accordion("Measured attention of this model, layer by layer", open=False, visible=bool(grids)) as place:
        gr.Markdown(
            "How much of its attention a token keeps inside windows of several sizes (tokens), in dense runs, mean "
            "over the heads of a layer. `gensparse calibrate` measures it; the method `auto` reads it."
        )
        with gr.Row():
            where = gr.Dropdown(grids, value=grids[-1] if grids else None, label="Measured at", min_width=160)
            kinds = [("attention kept", "kept"), ("error of the output", "error")]
            what = gr.Radio(kinds, value="kept", label="Show", min_width=160)
        plot = gr.HTML(_heat(START_MODEL, None, "kept"), elem_id="gs-lab-profile")
    return place, where, what, plot


def _field(name: str, number: int) -> dict[str, Any]:
    """Arguments of the field of one setting; unused fields are hidden."""
    known = lab.settings_of(name)
    if number >= len(known):
        return {"label": "", "info": "", "value": "", "visible": False}
    item = known[number]
    return {
        "label": item.label.capitalize(),
        "info": item.info[:1].upper() + item.info[1:],
        "value": item.value,
        "visible": True,
    }


def _about(name: str) -> str:
    return lab.about(name)


# --------------------------------------------------------------------------------------------------------------- events
def _chosen(name: str) -> list[Any]:
    """Another method: what it is, its presets, its settings."""
    presets = lab.presets_of(name)
    choice = gr.update(choices=[DEFAULTS, *presets], value=DEFAULTS, visible=bool(presets))
    return [_about(name), choice, *(gr.update(**_field(name, number)) for number in range(_FIELDS))]


def _published(name: str, preset: str) -> list[Any]:
    """The settings published for a model; those that are not named are the defaults."""
    own = lab.presets_of(name).get(preset, {})
    known = lab.settings_of(name)
    values = [own.get(item.name, item.value) for item in known]
    return [gr.update(value=value) for value in values] + [gr.skip()] * (_FIELDS - len(values))


def _moved(key: str) -> list[Any]:
    """Another model: its size, text, frames and layers; the query in the middle; its profile."""
    model = lab.lab_model(key)
    measured = lab.profile_of(model)
    grids = [] if measured is None else lab.grid_names(measured)
    clip = model.frames is not None
    middle = lab.centre(model.layout(*model.size, text=model.text, frames=model.frames).grid)
    return [
        gr.update(value=_size_text(model)),
        gr.update(value=model.text),
        gr.update(value=model.frames, visible=clip),
        gr.update(value=model.layers // 2, maximum=model.layers - 1),
        gr.update(value=middle[0], visible=clip),
        middle[1],
        middle[2],
        gr.update(visible=bool(grids)),
        gr.update(choices=grids, value=grids[-1] if grids else None),
        gr.update(value="kept"),
        _heat(key, None, "kept"),
    ]


def _clicked(model: str, size: str, text: Any, frames: Any, event: gr.SelectData) -> list[Any]:
    """The token under the pointer; a click beside the tokens changes nothing."""
    try:
        known = lab.lab_model(model)
        (height, width), _ = parse_size(str(size)).resolve(base=known.size, multiple=1)
        own = _whole("frames", frames) if known.frames is not None else None
        layout = known.layout(height, width, text=_whole("text", text) or 0, frames=own)
        place = lab.token_under(layout.grid, *event.index)
    except (GensparseError, TypeError, ValueError):
        place = None
    return [gr.skip()] * 3 if place is None else list(place)


def _heat(key: str, grid: str | None, what: str) -> str:
    """The profile as a table: layers by windows, the darker the more; empty without a profile."""
    measured = lab.profile_of(lab.lab_model(key))
    if measured is None:
        return ""
    points = lab.chart(measured, grid, error=what == "error")
    windows, layers = (list(dict.fromkeys(point[name] for point in points)) for name in ("window", "layer"))
    values = {(point["layer"], point["window"]): point["value"] for point in points}
    head = "".join(f'<th scope="col">{esc(window)}</th>' for window in windows)
    rows = "".join(
        f'<tr><th scope="row">{esc(layer[3:])}</th>'
        + "".join(_cell(values[layer, window]) for window in windows)
        + "</tr>"
        for layer in layers
    )
    return (
        f'<div class="gs-wide gs-heat"><table><thead><tr><th scope="col">layer, window</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _cell(value: float) -> str:
    return f'<td style="--share:{min(100, round(100 * value))}%">{value:.0%}</td>'


def _drawn(app: App, request: gr.Request, values: Sequence[Any]) -> list[Any]:
    """Picture, status, menu of heads, query, Python, and whether Generate can use it."""
    try:
        asked = Asked.of(values)
        view = asked.view()
        grid = view.layout.grid
        query, entry = asked.query(grid), asked.group if asked.group in range(len(view.groups)) else 0
        code = lab.python_code(view, query, entry)
        entries = [(f"menu entry {name}", number) for number, name in enumerate(view.groups)]
        menu = gr.update(choices=entries, value=entry if entries else None, visible=bool(entries))
        use = gr.update(interactive=bool(view.attention))
        if view.pattern is None:
            return [None, _status(view.why, *view.notes), menu, *query, code, use]
        drawing = lab.sight(view, query, entry)
        path = _saved(app, request, drawing.image, (values, entry))
    except GensparseError as error:
        return [None, _status(str(error), bad=True), gr.skip(), *[gr.skip()] * 3, "", gr.update(interactive=False)]
    except (TypeError, ValueError):
        return [None, _status("A number is missing.", bad=True), gr.skip(), *[gr.skip()] * 3, "", gr.skip()]
    frame = f"frame {query[0]}, " if grid[0] > 1 else ""
    sees = (
        f"Token at {frame}row {query[1]}, column {query[2]} sees {drawing.sees:,} of {drawing.keys:,} keys "
        f"({drawing.sees / drawing.keys:.1%})."
    )
    return [str(path), _status(sees, str(view.pattern), *view.notes), menu, *query, code, use]


def _saved(app: App, request: gr.Request, image: Any, key: Any) -> Path:
    """The picture among the visitor's own temporary files; only the latest ones stay."""
    folder = app.sessions.folder(app.owner(request), scratch=True)
    path = folder / f"lab-{hashlib.sha256(repr(key).encode('utf-8', 'replace')).hexdigest()[:16]}.png"
    image.save(path, compress_level=1)
    older = sorted(folder.glob("lab-*.png"), key=lambda file: file.stat().st_mtime_ns)
    for file in older[:-KEPT]:
        file.unlink(missing_ok=True)
    return path


class Counter:
    """Numbers for the table. The speed of the machine is measured once per model, and never beside a running job."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._speeds: dict[str, tuple[Any, str, str]] = {}
        self._lock = threading.Lock()

    def table(self, values: Sequence[Any]) -> str:
        """The comparison as HTML; empty where there is nothing to compare."""
        try:
            view = Asked.of(values).view()
            speeds = self._speed(view.model)
            rates, dtype, device = speeds or (None, "bf16", "")
            found = lab.cost(view, rates=rates, dtype=dtype, device=device)
        except (GensparseError, TypeError, ValueError):
            return ""  # the status line says it
        if found is None:
            return ""
        notes = list(found.notes)
        if speeds is None and view.model.arch is not None:
            notes.append("A job is running, so the speed of this machine is not measured now; look again later.")
        return _table(found, notes)

    def _speed(self, model: lab.LabModel) -> tuple[Any, str, str] | None:
        with self._lock:
            if model.key not in self._speeds:
                if any(job.state is State.RUNNING for job in self._app.jobs.unfinished()):
                    return None
                self._speeds[model.key] = lab.speeds(model, self._app.settings.device)
            return self._speeds[model.key]


def _table(found: lab.Cost, notes: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{word}</th>' for word in ("", "dense", "this attention", "how it is known"))
    rows = "".join(
        "<tr>" + "".join(f"<td>{esc(cell)}</td>" for cell in (row.what, row.dense, row.sparse, row.source)) + "</tr>"
        for row in found.rows
    )
    tiles = ""
    if found.q_tile and found.k_tile:
        shapes = (" x ".join(map(str, tile)) for tile in (found.q_tile, found.k_tile))
        tiles = "<p>Tiles of {} queries and {} keys (frames x rows x columns of tokens).</p>".format(*shapes)
    words = "".join(f"<p>{esc(note)}</p>" for note in notes)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="gs-wide gs-costs">{table}</div>{tiles}{words}'


def _status(*lines: str, bad: bool = False) -> str:
    """Lines for people; a message of an error is read out by screen readers."""
    first, *rest = (esc(line) for line in lines)
    more = "".join(f"<br><small>{line}</small>" for line in rest)
    return f'<div class="gs-status{" gs-bad" if bad else ""}" role="{"alert" if bad else "status"}">{first}{more}</div>'


def _size_text(model: lab.LabModel) -> str:
    height, width = model.size
    return f"{width}x{height}"


def _whole(name: str, value: Any) -> int | None:
    """A whole number as an int, whatever JSON made of it; None stays None."""
    if value is None:
        return None
    if isinstance(value, bool) or float(value) != int(value):
        raise ConfigError(f"{name}={value!r} is not allowed here; give a whole number.")
    return int(value)
