"""Visitors: who one is (a signed random cookie), which folders are his, and whether he is still there.

An owner is a hash: of the cookie for browsers, of the random session hash for API clients, which keep no cookies.
Folder names are random and have nothing to do with either, so that a path tells nobody who its owner is.
"""

import hashlib
import hmac
import re
import secrets
import shutil
import threading
import time
from pathlib import Path

COOKIE = "gensparse_session"
CLIENT = "client-"  # first letters of owners without a cookie
_TOKEN = re.compile(r"[\w-]{43}\.[0-9a-f]{64}")


class Sessions:
    """All visitors of a server.

    Args:
        root: folder of the results.
        scratch: folder of the page's own temporary files, which results are never in.
    """

    def __init__(self, root: Path, scratch: Path) -> None:
        self.root, self.scratch = root.resolve(), scratch.resolve()
        self._secret = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._folders: dict[str, str] = {}  # owner -> name of his folder, below both roots
        self._owners: dict[str, str] = {}  # the other way round
        self._connections: dict[str, int] = {}
        self._last: dict[str, float] = {}
        self._uploads: dict[str, set[str]] = {}  # folder of an upload -> owners

    # -- who
    def issue(self) -> str:
        """A new cookie."""
        token = secrets.token_urlsafe(32)
        return f"{token}.{self._sign(token)}"

    def owner(self, cookie: str | None, session_hash: str | None = None) -> str | None:
        """The owner that a request belongs to; None for one that brings neither cookie nor session hash."""
        if self.is_valid(cookie):
            return "cookie-" + _hash(str(cookie))
        return CLIENT + _hash(session_hash) if session_hash else None

    def is_valid(self, cookie: str | None) -> bool:
        """Whether this server made the cookie."""
        if not cookie or not _TOKEN.fullmatch(cookie):
            return False
        token, _, signature = cookie.partition(".")
        return hmac.compare_digest(signature, self._sign(token))

    def _sign(self, token: str) -> str:
        return hmac.new(self._secret, token.encode(), hashlib.sha256).hexdigest()

    # -- where
    def folder(self, owner: str, *, scratch: bool = False) -> Path:
        """The folder of a visitor, made on first use; readable by this user of the machine only."""
        with self._lock:
            name = self._folders.get(owner)
            if name is None:
                name = f"{time.strftime('%Y%m%d')}-{secrets.token_hex(16)}"
                self._folders[owner], self._owners[name] = name, owner
        path = (self.scratch if scratch else self.root) / name
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path

    def new_folder(self, owner: str) -> Path:
        """An empty folder for one job."""
        path = self.folder(owner) / f"{time.strftime('%H%M%S')}-{secrets.token_hex(4)}"
        path.mkdir(mode=0o700)
        return path

    def own_upload(self, path: str, owner: str | None) -> None:
        """Note who uploaded a file; without an owner, everybody who knows its path may use it."""
        with self._lock:
            self._uploads.setdefault(_first_part(Path(path), self.scratch), set()).add(owner or "")

    def may_read(self, path: Path, owner: str | None) -> bool:
        """Whether a visitor may see a file: his results, his temporary files, his uploads, and nothing else.

        Owners without a cookie prove who they are by knowing the random name of the folder.
        """
        real = path.resolve()
        for root in (self.root, self.scratch):
            name = _first_part(real, root)
            if not name:
                continue
            with self._lock:
                owners = {self._owners[name]} if name in self._owners else self._uploads.get(name, set())
                return any(item == owner or item == "" or item.startswith(CLIENT) for item in owners)
        return False

    # -- whether still there
    def connect(self, owner: str) -> None:
        with self._lock:
            self._connections[owner] = self._connections.get(owner, 0) + 1

    def disconnect(self, owner: str) -> None:
        with self._lock:
            self._connections[owner] -= 1
            if not self._connections[owner]:
                del self._connections[owner]
            self._last[owner] = time.monotonic()

    def touch(self, owner: str) -> None:
        """He has just asked for something."""
        with self._lock:
            self._last[owner] = time.monotonic()

    def away(self, owner: str) -> float:
        """Seconds since a visitor was last there; 0 while a page of his is open."""
        with self._lock:
            if owner in self._connections:
                return 0.0
            return time.monotonic() - self._last.get(owner, float("-inf"))

    def sweep(self, older_than: float) -> int:
        """Forget visitors who have been away longer than this many seconds, and delete their results."""
        with self._lock:
            gone = [owner for owner in self._folders if owner not in self._connections]
        gone = [owner for owner in gone if self.away(owner) > older_than]
        for owner in gone:
            with self._lock:
                name = self._folders.pop(owner)
                self._owners.pop(name)
                self._last.pop(owner, None)
            for root in (self.root, self.scratch):
                shutil.rmtree(root / name, ignore_errors=True)
        with self._lock:  # what nobody asks for any more
            self._uploads = {name: who for name, who in self._uploads.items() if (self.scratch / name).exists()}
            self._last = {owner: at for owner, at in self._last.items() if time.monotonic() - at <= older_than}
        return len(gone)

    def forget_all(self) -> None:
        """Delete the results of every visitor, when a shared server ends."""
        with self._lock:
            self._connections.clear()
        self.sweep(-1.0)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:32]


def _first_part(path: Path, root: Path) -> str:
    """Name of the entry of `root` that a path leads through; "" for a path elsewhere, or `root` itself."""
    try:
        parts = path.relative_to(root).parts
    except ValueError:
        return ""
    return parts[0] if parts else ""
