"""The page in the browser: the same requests and the same engine as on the command line.

`serve(Settings())` runs it until it is stopped; `build(app)` gives the `gr.Blocks` alone. gradio is imported by the
files that draw, so that settings, jobs and limits can be used without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "App": "gensparse.app.core",
    "Jobs": "gensparse.app.jobs",
    "Limits": "gensparse.app.settings",
    "Server": "gensparse.app.server",
    "Settings": "gensparse.app.settings",
    "build": "gensparse.app.page",
    "serve": "gensparse.app.server",
}

__all__ = ["App", "Jobs", "Limits", "Server", "Settings", "build", "serve"]

if TYPE_CHECKING:
    from gensparse.app.core import App
    from gensparse.app.jobs import Jobs
    from gensparse.app.page import build
    from gensparse.app.server import Server, serve
    from gensparse.app.settings import Limits, Settings


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'gensparse.app' has no attribute {name!r}")
