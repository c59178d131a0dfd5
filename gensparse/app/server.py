"""Starting and stopping the server of the page."""

import inspect
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any, Self

from gensparse.app.core import App
from gensparse.app.guard import Guard
from gensparse.app.jobs import Engine
from gensparse.app.settings import Settings
from gensparse.errors import ConfigError, OutputError

MISSING = "the page needs gradio 6.7 or newer; pip install 'gensparse[app]'"
OLDEST = (6, 7)


class Server:
    """A page that is served until `close()`; a context manager.

    Args:
        settings: how it runs.
        engine: runs requests; by default the engine of the command line.

    Raises:
        ConfigError: gradio is missing or too old, or the address cannot be used.
        OutputError: the folder of the results cannot be made.
    """

    def __init__(self, settings: Settings, engine: Engine | None = None) -> None:
        check_gradio()
        self.settings = settings
        try:
            settings.output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"cannot make folder {str(settings.output_dir)!r}: {error.strerror}; choose another --output-dir"
            ) from error
        self.scratch = Path(tempfile.mkdtemp(prefix="gensparse-app-")).resolve()
        # gradio reads these when widgets are made
        self._before = {name: os.environ.get(name) for name in _environment(self.scratch)}
        os.environ.update(_environment(self.scratch))
        self.app = App(settings, self.scratch, engine)
        self.page: Any = None
        self.url = ""
        self.share_url: str | None = None

    def start(self) -> str:
        """Serve from threads of their own; returns the local address."""
        from gensparse.app.page import build, look

        self.page = build(self.app)
        settings = self.settings
        options = {
            **look(),
            "server_name": settings.host,
            "server_port": settings.port,
            "share": settings.share,
            "auth": [settings.auth] if settings.auth is not None else None,
            "allowed_paths": [str(self.app.sessions.root)],
            "blocked_paths": [str(Path.home() / ".cache"), str(Path.home() / ".ssh")],
            "max_file_size": settings.limits.upload,
            "max_threads": 40,
            "show_error": True,
            "enable_monitoring": False,
            "strict_cors": True,
            "prevent_thread_lock": True,
            "quiet": True,
            "inbrowser": False,
            "ssr_mode": False,
            "mcp_server": False,
            "pwa": False,
            "num_workers": 0,
            "run_history": False,
            "root_path": "",
            "footer_links": ["api"],
            "state_session_capacity": 1000,
            "app_kwargs": {"middleware": [self._middleware()]},
        }
        known = inspect.signature(self.page.launch).parameters
        try:
            _, self.url, self.share_url = self.page.launch(**{k: v for k, v in options.items() if k in known})
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {settings.host}:{settings.port} ({error.strerror or error}); choose another --port"
            ) from error
        return self.url

    def _middleware(self) -> Any:
        from starlette.middleware import Middleware

        app = self.app
        return Middleware(Guard, sessions=app.sessions, limits=app.limits, local=not self.settings.shared)

    def close(self) -> None:
        """Stop jobs and server, and delete temporary files; results stay, but for those of a shared server."""
        self.app.close()
        if self.page is not None:
            self.page.close(verbose=False)
        shutil.rmtree(self.scratch, ignore_errors=True)
        if self.settings.shared:
            self.app.sessions.forget_all()
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(settings: Settings, engine: Engine | None = None, stop: threading.Event | None = None) -> None:
    """Serve until `stop` is set, or until Ctrl-C. Raises as `Server`."""
    stop = stop or threading.Event()
    with Server(settings, engine):
        while not stop.wait(0.5):
            pass


def check_gradio() -> None:
    """Raise ConfigError unless a gradio that fits is installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("gradio")
    except PackageNotFoundError:
        raise ConfigError(MISSING) from None
    if tuple(int(part) for part in found.split(".")[:2] if part.isdecimal()) < OLDEST:
        raise ConfigError(f"gradio {found} is installed; {MISSING}")


def _environment(scratch: Path) -> dict[str, str]:
    return {
        "GRADIO_TEMP_DIR": str(scratch),
        "GRADIO_EXAMPLES_CACHE": str(scratch / "examples"),
        "GRADIO_ANALYTICS_ENABLED": "False",
    }
