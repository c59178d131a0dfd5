"""`gensparse app`: the page in the browser."""

from pathlib import Path
from typing import Annotated

import typer

NETWORK, LIMITS = "Network", "Limits"


def serve(
    host: Annotated[str, typer.Option("--host", help="Address to listen on.", rich_help_panel=NETWORK)] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", help="Port, 1 to 65535; 0 takes a free one.", rich_help_panel=NETWORK)
    ] = 7860,
    listen: Annotated[
        bool, typer.Option("--listen", help="Let other machines in (address 0.0.0.0).", rich_help_panel=NETWORK)
    ] = False,
    share: Annotated[
        bool, typer.Option("--share", help="Open a public tunnel through gradio's service.", rich_help_panel=NETWORK)
    ] = False,
    auth: Annotated[
        str | None,
        typer.Option(
            "--auth",
            metavar="USER:PASS",
            help="Ask visitors for a password; made up and printed where others can reach the page.",
            rich_help_panel=NETWORK,
            show_default=False,
        ),
    ] = None,
    max_size: Annotated[
        int, typer.Option("--max-size", help="Largest side of a result in pixels, 64 to 16384.", rich_help_panel=LIMITS)
    ] = 8192,
    max_queue: Annotated[
        int, typer.Option("--max-queue", help="Jobs that may wait, 1 to 10000.", rich_help_panel=LIMITS)
    ] = 16,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            "--output-dir",
            help="Folder of the results (gensparse-out/app; a temporary one where others can reach the page).",
            rich_help_panel=LIMITS,
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto|cpu|cuda|cuda:1|mps.", rich_help_panel=LIMITS)] = "auto",
) -> None:
    """Make and enlarge pictures in the browser; needs `pip install 'gensparse[app]'`.

    Examples:

      gensparse app

      gensparse app --port 8000 --max-size 4096

      gensparse app --listen --auth me:secret
    """
    from gensparse.app.server import Server, check_gradio
    from gensparse.app.settings import Limits, Settings, is_loopback
    from gensparse.cli import output

    check_gradio()
    host = "0.0.0.0" if listen else host
    shared = share or not is_loopback(host)
    login, made = _login(auth, shared)
    settings = Settings(
        host=host,
        port=port or None,
        share=share,
        auth=login,
        output_dir=output_dir or _default_folder(shared),
        device=device,
        limits=Limits(side=max_size, queue=max_queue, per_session=4 if shared else max_queue + 1),
    )
    with Server(settings) as server:
        output.print_out(server.url)
        if server.share_url:
            output.print_out(server.share_url)
        if made and login is not None:
            output.print_err(f"user {login[0]}, password {login[1]}")
        output.note("press Ctrl-C to stop")
        _wait()


def _login(auth: str | None, shared: bool) -> tuple[tuple[str, str] | None, bool]:
    """((user, password), whether it was made up here)."""
    import secrets

    from gensparse.errors import ConfigError

    if auth is None:
        return (("gensparse", secrets.token_urlsafe(12)), True) if shared else (None, False)
    user, colon, password = auth.partition(":")
    if not colon or not user or not password:
        raise ConfigError("--auth is not USER:PASS; give a name, a colon and a password")
    return (user, password), False


def _default_folder(shared: bool) -> Path:
    """Pictures of one's own stay; those of visitors lie in a folder that goes with the server."""
    import tempfile

    return Path(tempfile.mkdtemp(prefix="gensparse-results-")) if shared else Path("gensparse-out") / "app"


def _wait() -> None:
    """Until Ctrl-C or SIGTERM, which end the command as every other."""
    import threading

    threading.Event().wait()
