"""What the browser runs beside gradio: a viewer for large pictures, copy buttons, keys. One script, no other host."""

import json
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from gensparse.app.render import esc
from gensparse.engine.values import Output

_HERE = Path(__file__).parent


def head() -> str:
    """The script of the page."""
    return f"<script>\n{(_HERE / 'viewer.js').read_text(encoding='utf-8')}\n</script>"


def css() -> str:
    """The style of the page."""
    return (_HERE / "page.css").read_text(encoding="utf-8")


def file_url(path: str | Path) -> str:
    """The address under which a visitor's own browser gets a file, exactly as it is stored."""
    return f"gradio_api/file={quote(str(path))}"


def viewer(outputs: Sequence[Output]) -> str:
    """Finished pictures, to zoom and pan up to single pixels, with links to the files."""
    pictures = [
        {"src": file_url(item.path), "width": item.width, "height": item.height, "name": _name(item)}
        for item in outputs
        if item.path is not None
    ]
    if not pictures:
        return ""
    links = "".join(
        f'<a class="gs-link" href="{esc(p["src"])}" download="{esc(p["name"])}">'
        f"Download {esc(p['name'])} ({p['width']} x {p['height']}, PNG)</a>"
        for p in pictures
    )
    return f'<gs-viewer data-pictures="{esc(json.dumps(pictures))}"></gs-viewer><div class="gs-links">{links}</div>'


def _name(item: Output) -> str:
    return f"gensparse-{item.width}x{item.height}-seed{item.seed}.png"
