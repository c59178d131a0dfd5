"""What the browser runs beside gradio: a viewer for large pictures, drawing, copy buttons, keys; no other host."""

import json
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from gensparse.app.render import esc
from gensparse.engine.values import Output

_HERE = Path(__file__).parent
_SCRIPTS = ("viewer.js", "draw.js")


def head() -> str:
    """The scripts of the page."""
    return "\n".join(f"<script>\n{(_HERE / name).read_text(encoding='utf-8')}\n</script>" for name in _SCRIPTS)


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


def file_links(paths: Sequence[Path]) -> str:
    """Links to a visitor's own files, by their names."""
    links = "".join(
        f'<a class="gs-link" href="{esc(file_url(path))}" download="{esc(path.name)}">{esc(path.name)}</a>'
        for path in paths
    )
    return f'<div class="gs-links">{links}</div>' if links else ""


def _name(item: Output) -> str:
    return f"gensparse-{item.width}x{item.height}-seed{item.seed}.png"
