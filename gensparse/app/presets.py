"""Named settings of visitors: the user's own presets where only he reaches the server, else each visitor's for a while.

Those of a visitor lie among his temporary files and go with them.
"""

import json
import threading
from pathlib import Path
from typing import Any

from gensparse.app.core import App
from gensparse.app.forms import FIELDS
from gensparse.app.reload import checked
from gensparse.engine import presets as own
from gensparse.engine.reuse import UNTRUSTED
from gensparse.errors import ConfigError, unknown_name
from gensparse.image_io import write_json
from gensparse.request import KINDS, GenerateRequest, Request

MOST = 50  # presets of a visitor of a shared server
_LOCK = threading.Lock()


def names(app: App, owner: str) -> list[str]:
    """Names of the presets that a visitor can load, sorted."""
    return sorted(_read(app, owner)) if app.settings.shared else own.preset_names()


def load(app: App, owner: str, name: str) -> tuple[str, dict[str, Any]]:
    """(kind of the request, fields that still pass its checks) of a preset.

    Raises:
        ConfigError: there is no such preset, or it is not readable.
    """
    known = names(app, owner)
    if name not in known:
        raise ConfigError(unknown_name("preset", str(name), known))
    data = _read(app, owner)[name] if app.settings.shared else own.read_preset(name)
    kind = data.get("kind", GenerateRequest.kind)
    if kind not in FIELDS:
        raise ConfigError(f"preset {name!r} is not for this page; load it on the command line")
    kept = {k: v for k, v in data.items() if k in KINDS[kind].__dataclass_fields__ and k not in UNTRUSTED}
    return kind, checked(KINDS[kind], kept)[0]


def save(app: App, owner: str, name: str, request: Request) -> None:
    """Keep the settings of a request, without prompt and seed; a preset of that name is replaced.

    Raises:
        ConfigError: a name with other characters than letters, digits, dots and dashes, or too many presets.
        OutputError: the folder cannot be written.
    """
    if not app.settings.shared:
        own.save_preset(name, request)
        return
    own.check_name(name)
    with _LOCK:
        kept = _read(app, owner)
        if name not in kept and len(kept) >= MOST:
            raise ConfigError(f"{MOST} presets are kept here; delete one first")
        write_json(_file(app, owner), kept | {name: own.preset_values(request)}, overwrite=True)


def delete(app: App, owner: str, name: str) -> None:
    """Forget a preset; does nothing where there is none.

    Raises:
        ConfigError: a name that no preset can have.
        OutputError: the folder cannot be written.
    """
    if not app.settings.shared:
        own.delete_preset(name)
        return
    with _LOCK:
        kept = _read(app, owner)
        if kept.pop(own.check_name(name), None) is not None:
            write_json(_file(app, owner), kept, overwrite=True)


def _file(app: App, owner: str) -> Path:
    return app.sessions.folder(owner, scratch=True) / "presets.json"


def _read(app: App, owner: str) -> dict[str, Any]:
    """All presets of a visitor of a shared server."""
    try:
        data = json.loads(_file(app, owner).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
