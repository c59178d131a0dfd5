"""The gate in front of gradio: which routes exist, how large a request may be, and who may read which file.

An ASGI middleware without gradio in it. It hands out the session cookie, lets only the routes through that the page and
`gradio_client` use, refuses addresses where files are expected (nothing is ever fetched), and serves a file to its
owner only.
"""

import json
import math
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from gensparse.app.sessions import COOKIE, Sessions
from gensparse.app.settings import LOOPBACK_NAMES, Limits

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

API = "/gradio_api"
FILE = f"{API}/file="
HEARTBEAT = f"{API}/heartbeat/"
UPLOAD = f"{API}/upload"
PAGES = ("/", "/config", "/config/", "/login", "/login/", "/logout", "/theme.css", "/favicon.ico", "/manifest.json")
PAGES += ("/robots.txt", "/pwa_icon", f"{API}/theme.css", f"{API}/info", f"{API}/info/", f"{API}/startup-events")
PAGES += (f"{API}/user", f"{API}/user/", f"{API}/login_check", f"{API}/login_check/", f"{API}/app_id", f"{API}/app_id/")
PAGES += (f"{API}/reset", f"{API}/reset/", f"{API}/cancel", UPLOAD, f"{API}/upload_progress", f"{API}/openapi.json")
FOLDERS = ("/static/", "/assets/", "/svelte/", HEARTBEAT, f"{API}/queue/", f"{API}/run/", f"{API}/api/", f"{API}/call/")
CONTENT = (  # nothing from other hosts, whatever a library would like to load
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "media-src 'self' data: blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
_MOST_DEPTH = 40  # of JSON
_MULTIPART_EXTRA = 64 * 1024  # bytes of an upload that are not the file
_ADDRESS = re.compile(r"\s*[a-z][a-z0-9+.-]*:", re.IGNORECASE)  # http:, file:, data:, ...
_DRIVE = re.compile(r"\s*[a-z]:[\\/]", re.IGNORECASE)


class Refused(Exception):  # noqa: N818 - an answer, not a fault
    """An answer in place of gradio's."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


class Guard:
    """ASGI middleware.

    Args:
        app: what is guarded.
        sessions: the visitors.
        limits: sizes of requests.
        local: refuse requests that name another host than this machine, as pages that rebind their name do.
    """

    def __init__(self, app: ASGIApp, sessions: Sessions, limits: Limits, *, local: bool) -> None:
        self.app, self.sessions, self.limits, self.local = app, sessions, limits, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] != "http":
            await self.app(scope, receive, send)
        else:
            try:
                await self._http(scope, receive, send)
            except Refused as answer:
                await _answer(send, answer)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = _path(scope), scope["method"]
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if self.local and _host(headers.get("host", "")) not in LOOPBACK_NAMES:
            raise Refused(403, "this server answers to localhost only")
        if self.local and method == "POST" and not _is_own(headers.get("origin")):
            raise Refused(403, "another site may not use this server")
        if not _known(path, method):
            raise Refused(404, "not found")
        cookie = _cookie(headers.get("cookie", ""))
        owner = self.sessions.owner(cookie)
        if owner is not None:
            self.sessions.touch(owner)
        if path.startswith(FILE):
            self._check_file(path.removeprefix(FILE), owner)
            send = _with_headers(
                send, [("cache-control", "private, max-age=3600"), ("x-content-type-options", "nosniff")]
            )
        elif path.startswith(HEARTBEAT):
            await self._heartbeat(scope, receive, send, owner, path.removeprefix(HEARTBEAT))
            return
        elif path == UPLOAD:
            self._check_length(headers, self.limits.upload + _MULTIPART_EXTRA)
            send = self._noting_uploads(send, owner)
        elif method == "POST":
            self._check_length(headers, self.limits.body)
            if path.startswith((f"{API}/queue/join", f"{API}/run/", f"{API}/api/", f"{API}/call/")):
                scope, receive = await self._checked_body(scope, receive, owner)
        elif path == "/" and owner is None:
            send = _with_headers(send, [("set-cookie", self._new_cookie(scope, headers))])
        if path == "/":
            send = _with_headers(send, [("referrer-policy", "no-referrer"), ("content-security-policy", CONTENT)])
        await self.app(scope, receive, send)

    # -- cookies
    def _new_cookie(self, scope: Scope, headers: MutableMapping[str, str]) -> str:
        secure = scope.get("scheme") == "https" or headers.get("x-forwarded-proto") == "https"
        return f"{COOKIE}={self.sessions.issue()}; Path=/; HttpOnly; SameSite=Lax" + ("; Secure" if secure else "")

    # -- files
    def _check_file(self, path: str, owner: str | None) -> None:
        """Let a visitor read his own files; the answer for all others is the same, whether they exist or not."""
        if _is_address(path):
            raise Refused(403, "addresses are not fetched")
        if "\0" in path or not self.sessions.may_read(Path(path), owner):
            raise Refused(403, "this file is not served")

    def _noting_uploads(self, send: Send, owner: str | None) -> Send:
        """Note whose the files are whose paths the answer to an upload lists."""
        parts: list[bytes] = []

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.body":
                parts.append(bytes(message.get("body", b"")))
                if not message.get("more_body", False):
                    for path in _paths(b"".join(parts)):
                        self.sessions.own_upload(path, owner)
            await send(message)

        return noting

    # -- presence
    async def _heartbeat(
        self, scope: Scope, receive: Receive, send: Send, owner: str | None, session_hash: str
    ) -> None:
        """A page keeps this request open as long as it is there."""
        here = owner or self.sessions.owner(None, session_hash.strip("/"))
        if here is None:
            raise Refused(404, "not found")
        self.sessions.connect(here)
        try:
            await self.app(scope, receive, send)
        finally:
            self.sessions.disconnect(here)

    # -- bodies
    def _check_length(self, headers: MutableMapping[str, str], most: int) -> None:
        length = headers.get("content-length", "")
        if not length.isdecimal():
            raise Refused(411, "the request does not say how long it is")
        if int(length) > most:
            raise Refused(413, f"the request has {int(length) / 1e6:.1f} MB; at most {most / 1e6:.1f} MB are taken")

    async def _checked_body(self, scope: Scope, receive: Receive, owner: str | None) -> tuple[Scope, Receive]:
        """The same request with a body in which every file is one of the visitor's own uploads."""
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refused(400, "the request ended early")
            body += message.get("body", b"")
            if len(body) > self.limits.body:
                raise Refused(413, "the request is too long")
            if not message.get("more_body", False):
                break
        try:
            data = json.loads(body)
        except (ValueError, RecursionError):
            raise Refused(400, "the request is not valid JSON") from None
        if not isinstance(data, dict):
            raise Refused(400, "the request is not a JSON object")
        self._check_files(data, owner, 0)
        body = json.dumps(data).encode()
        headers = [item for item in scope["headers"] if item[0].lower() != b"content-length"]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
        sent = False

        async def again() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        return scope, again

    def _check_files(self, data: Any, owner: str | None, depth: int) -> None:
        """Refuse addresses and files of others, and drop the `url` of every file: only its path counts."""
        if depth > _MOST_DEPTH:
            raise Refused(400, "the request is nested too deeply")
        if isinstance(data, float) and not math.isfinite(data):
            raise Refused(400, "the request holds a number that is not finite")
        if isinstance(data, dict):
            path = data.get("path")
            if isinstance(path, str) and ("meta" in data or "url" in data or "orig_name" in data):
                if _is_address(path):
                    raise Refused(400, "addresses are not fetched; download the picture and upload the file")
                if "\0" in path or not self.sessions.may_read(Path(path), owner):
                    raise Refused(400, "the file was not uploaded here; upload it again")
                data.pop("url", None)
            elif _names_file(data):
                raise Refused(400, "addresses are not fetched; download the picture and upload the file")
        values: Iterable[Any] = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
        for value in values:
            self._check_files(value, owner, depth + 1)


def _path(scope: Scope) -> str:
    """The path as it will be routed: decoded, and with `//` in it left as it is."""
    root = scope.get("root_path", "")
    path = scope["path"]
    return path.removeprefix(root) if root and path.startswith(root) else path


def _known(path: str, method: str) -> bool:
    if method not in ("GET", "HEAD", "POST", "OPTIONS") or "\0" in path:
        return False
    if path.startswith(FILE):
        return method in ("GET", "HEAD")
    if ".." in path.split("/"):
        return False
    return path in PAGES or path.startswith(FOLDERS)


def _host(value: str) -> str:
    """The host of a Host header, without port."""
    return value[1:].split("]", 1)[0] if value.startswith("[") else value.rsplit(":", 1)[0].lower()


def _is_own(origin: str | None) -> bool:
    """Whether a request comes from a page of this machine, or from a program (which says nothing)."""
    return origin is None or _host(origin.partition("://")[2]) in LOOPBACK_NAMES


def _cookie(header: str) -> str | None:
    try:
        morsel = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return None
    return morsel.value if morsel else None


def _is_address(path: str) -> bool:
    """Whether a path is something to fetch, also when it is written with escapes."""
    plain = unquote(unquote(path))
    return any((_ADDRESS.match(text) and not _DRIVE.match(text)) or "://" in text for text in (path, plain))


def _names_file(data: MutableMapping[str, Any]) -> bool:
    """Whether a dictionary without a path means a file all the same."""
    meta = data.get("meta")
    return isinstance(meta, dict) and meta.get("_type") == "gradio.FileData"


def _paths(body: bytes) -> list[str]:
    try:
        data = json.loads(body)
    except ValueError:
        return []
    return [item for item in data if isinstance(item, str)] if isinstance(data, list) else []


def _with_headers(send: Send, extra: list[tuple[str, str]]) -> Send:
    async def adding(message: Message) -> None:
        if message["type"] == "http.response.start":
            names = {name.encode() for name, _ in extra if name != "set-cookie"}
            kept = [item for item in message.get("headers", []) if item[0].lower() not in names]
            message["headers"] = [*kept, *((name.encode(), value.encode()) for name, value in extra)]
        await send(message)

    return adding


async def _answer(send: Send, answer: Refused) -> None:
    body = json.dumps({"error": answer.text, "detail": answer.text}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
