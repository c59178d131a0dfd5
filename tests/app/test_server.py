"""The page over HTTP: a really started server with the embedded model, hostile requests, two visitors, no browser."""

import concurrent.futures
import contextlib
import hashlib
import io
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image, TiffImagePlugin

from gensparse.app import Limits, Settings
from gensparse.app.server import Server
from gensparse.engine.values import Result
from gensparse.errors import ConfigError
from gensparse.image_io import read_metadata

SOON = 120.0
GRACE = 2.5  # seconds that a job goes on without its page
QUEUE = 6
START = """
import signal, sys, threading
from pathlib import Path
from gensparse.app import Limits, Settings, serve

port, folder, grace, queue = int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
limits = Limits(side=1024, queue=queue, per_session=99)
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
serve(Settings(port=port, output_dir=folder, grace=grace, limits=limits), stop=stop)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Visitor:
    """A browser without a screen: a cookie of its own and the calls that a page makes."""

    def __init__(self, url: str, *, cookie: bool = True) -> None:
        self.http = httpx.Client(base_url=url, timeout=SOON)
        self.session, self.cookie = uuid.uuid4().hex, cookie
        if cookie:
            self.http.get("/").raise_for_status()

    def call(self, name: str, *data: Any) -> Any:
        """The answer of a named endpoint; an error's sentence as `RuntimeError`."""
        # answers go to sessions: whoever is known by his cookie may use a new one for each call
        body = {"data": list(data), "session_hash": uuid.uuid4().hex if self.cookie else self.session}
        answer = self.http.post(f"/gradio_api/call/{name}", json=body)
        if answer.status_code != 200:
            raise RuntimeError(f"{answer.status_code}: {answer.text}")
        kind = ""
        with self.http.stream("GET", f"/gradio_api/call/{name}/{answer.json()['event_id']}") as stream:
            for line in stream.iter_lines():
                if line.startswith("event:"):
                    kind = line.partition(":")[2].strip()
                elif line.startswith("data:") and kind in ("complete", "error"):
                    value = json.loads(line.partition(":")[2])
                    if kind == "error":
                        raise RuntimeError(value["error"] if isinstance(value, dict) else str(value))
                    return value[0]
        raise RuntimeError("the stream ended without an answer")

    def page(self) -> contextlib.AbstractContextManager[httpx.Response]:
        """An open page, as the server sees it."""
        return self.http.stream("GET", f"/gradio_api/heartbeat/{self.session}")

    def generate(self, prompt: str = "a red circle", **fields: Any) -> dict[str, Any]:
        size, steps = fields.pop("size", "64x64"), fields.pop("steps", 1)
        named = [fields.pop(name, default) for name, default in (("model", "embedded"), ("attention", "dense"))]
        seed = fields.pop("seed", 1)
        return self.call("generate", prompt, size, *named, steps, None, seed, 1, "", "auto", 0, fields)

    def upscale(self, image: Any, size: str = "96x64", **fields: Any) -> dict[str, Any]:
        return self.call(
            "upscale",
            image,
            size,
            0.3,
            "",
            "embedded",
            "dense",
            2,
            None,
            1,
            "",
            "auto",
            0,
            {"faithful": False, **fields},
        )

    def customize(self, subjects: Any, subject_method: str = "freecustom", prompt: str = "a circle and a star") -> dict:
        fields = ["64x64", "embedded", "auto", 2, None, 1, 1, "", "auto", 0, None]
        return self.call("customize", prompt, subjects, subject_method, *fields)

    def estimate(self, size: str = "2x", attention: str = "auto", image: Any = None) -> dict[str, Any]:
        fields = [None, None, 1, "auto", image, 0.3, None, None]
        return self.call("estimate", "a star", size, "embedded", attention, *fields)

    def upload(self, name: str, data: bytes) -> dict[str, Any]:
        answer = self.http.post("/gradio_api/upload", files={"files": (name, data)})
        answer.raise_for_status()
        return {"path": answer.json()[0], "meta": {"_type": "gradio.FileData"}, "orig_name": name}

    def ended(self, job: str, seconds: float = SOON) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while True:
            seen = self.call("status", job)
            if seen["state"] in ("done", "failed", "cancelled"):
                return seen
            assert time.monotonic() < deadline, seen
            time.sleep(0.3)

    def picture(self, **fields: Any) -> dict[str, Any]:
        seen = self.ended(self.generate(**fields)["job"])
        assert seen["state"] == "done", seen
        return seen


class Running:
    """The server process."""

    def __init__(self, folder: Path) -> None:
        self.port, self.folder = free_port(), folder
        self.url = f"http://127.0.0.1:{self.port}"
        env = {k: v for k, v in os.environ.items() if not k.startswith("GRADIO")} | {"HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-P", "-c", START, str(self.port), str(folder / "out"), str(GRACE), str(QUEUE)]
        self.log = (folder / "log").open("wb")
        self.process = subprocess.Popen(command, cwd=folder, env=env, stdout=self.log, stderr=self.log)
        deadline = time.monotonic() + SOON
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(self.url, timeout=5).status_code == 200:
                    return
            assert self.process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)

    def memory(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        finally:
            self.process.kill()
        self.log.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running(tmp_path_factory.mktemp("page"))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def visitor(server: Running) -> Iterator[Visitor]:
    """One whose page is open all the time."""
    made = Visitor(server.url)
    with made.page():
        yield made


@pytest.fixture
def newcomer(server: Running) -> Iterator[Visitor]:
    """One who has done nothing yet."""
    made = Visitor(server.url)
    with made.page():
        yield made


# ------------------------------------------------------------------------------------------------------- ordinary use
def test_a_picture_from_prompt_to_file(server: Running, visitor: Visitor) -> None:
    answer = visitor.generate("a red circle left of a blue star", size="80x64", steps=2, seed=5)
    assert answer["state"] in ("queued", "running")
    seen = visitor.ended(answer["job"])
    assert seen["state"] == "done", seen
    (output,) = seen["outputs"]
    assert (output["width"], output["height"], output["seed"]) == (80, 64, 5)
    assert seen["report"]["attention"]["stages"]
    got = visitor.http.get(output["url"])
    assert got.status_code == 200
    assert got.headers["content-type"] == "image/png"
    assert hashlib.sha256(got.content).hexdigest() == output["sha256"], "the file is served as it was written"
    path = server.folder / "got.png"
    path.write_bytes(got.content)
    request = read_metadata(path)["request"]
    assert (request["prompt"], request["seed"], request["steps"]) == ("a red circle left of a blue star", [5], 2)
    assert str(server.folder) not in json.dumps(read_metadata(path))


def test_estimates_are_those_of_the_command_line(visitor: Visitor) -> None:
    fits = visitor.estimate(size="512x512", attention="clear:radius=8")
    assert fits["status"] == "ok"
    assert [stage["width"] for stage in fits["stages"]][-1] == 512
    assert fits["peak_bytes"] > 0
    assert fits["seconds"] > 0


def test_the_page_loads_nothing_from_other_hosts(visitor: Visitor) -> None:
    page = visitor.http.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    for name in ("/gradio_api/info", "/config"):
        assert visitor.http.get(name).status_code == 200
    named = visitor.http.get("/gradio_api/info").json()["named_endpoints"]
    assert {"/generate", "/upscale", "/customize", "/turn", "/status", "/cancel", "/estimate"} <= set(named)


def press(visitor: Visitor, name: str, **values: Any) -> list[Any]:
    """What a page gets that presses the button of a name; `values` by the labels of its widgets."""
    config = visitor.http.get("/config").json()
    parts = {part["id"]: part["props"] for part in config["components"]}
    (button,) = [number for number, props in parts.items() if props.get("elem_id") == name]
    (dep,) = [d for d in config["dependencies"] if [button, "click"] in d["targets"]]
    data = [values.get(str(parts[number].get("label")), parts[number].get("value")) for number in dep["inputs"]]
    return run(visitor, dep["id"], data)


def run(visitor: Visitor, number: int, data: list[Any]) -> list[Any]:
    body = {"data": data, "fn_index": number, "session_hash": visitor.session}
    answer = visitor.http.post("/gradio_api/run/x", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


def test_a_page_that_is_loaded_again_finds_its_job(server: Running, newcomer: Visitor) -> None:
    first = press(newcomer, "gs-generate-run", Prompt="a red circle", Size="512x512", Steps=100, Attention="dense")
    assert "gs-card" in first[0]
    assert 'role="alert"' not in first[0], first[0]
    again = Visitor(server.url, cookie=False)
    again.http.cookies = newcomer.http.cookies
    config = again.http.get("/config").json()
    loads = [d for d in config["dependencies"] if d["targets"] == [[0, "load"]] and not d["inputs"]]
    found = [data for data in (run(again, d["id"], []) for d in loads) if isinstance(data[0], str)]
    (seen,) = found
    assert "progressbar" in seen[0] or "queue" in seen[0]
    other = Visitor(server.url)
    assert not [data for data in (run(other, d["id"], []) for d in loads) if isinstance(data[0], str)]
    (card,) = press(again, "gs-generate-cancel")
    assert "Stopping" in card or "Cancelled" in card


def watch(visitor: Visitor) -> dict[str, Any]:
    """What the page shows once its job has ended, by the names of its widgets."""
    config = visitor.http.get("/config").json()
    parts = {part["id"]: part["props"] for part in config["components"]}
    (card,) = [number for number, props in parts.items() if props.get("elem_id") == "gs-generate-card"]
    dep = next(
        d for d in config["dependencies"] if any(event == "tick" for _, event in d["targets"]) and card in d["outputs"]
    )
    deadline = time.monotonic() + SOON
    while True:
        data = run(visitor, dep["id"], [None])
        named = {parts[number].get("elem_id"): value for number, value in zip(dep["outputs"], data, strict=True)}
        if "Done" in str(named["gs-generate-card"]) or "alert" in str(named["gs-generate-card"]):
            return named
        assert time.monotonic() < deadline, named
        time.sleep(0.2)


def test_a_picture_is_compared_with_its_draft_and_with_dense_attention(server: Running, newcomer: Visitor) -> None:
    widgets = {"Size": "512x512", "Steps": 2, "Attention": "clear", "Settings": "radius=2"}
    press(newcomer, "gs-generate-run", Prompt="a red circle", **widgets)
    shown = watch(newcomer)
    assert "gs-viewer" in shown["gs-generate-result"]
    assert "--attention clear:radius=2" in shown["gs-generate-command"]
    assert "sparse attention in 1 of" in str(shown["gs-generate-card"])
    assert shown["gs-generate-dense"]["visible"]
    slider, _ = press(newcomer, "gs-generate-native")
    press(newcomer, "gs-generate-dense")
    dense = watch(newcomer)["gs-generate-slider"]
    for pair in (slider["value"], dense["value"]):
        sizes = []
        for file in pair:
            answer = newcomer.http.get(f"/gradio_api/file={file['path']}")
            sizes.append(Image.open(io.BytesIO(answer.content)).size)
            assert Visitor(server.url).http.get(f"/gradio_api/file={file['path']}").status_code == 403
        assert sizes == [(512, 512)] * 2
    assert "clear" in dense["label"]


def test_the_python_client_can_use_the_endpoints(server: Running, tmp_path: Path) -> None:
    from gradio_client import Client, handle_file

    client = Client(server.url, verbose=False, download_files=False, httpx_kwargs={"timeout": SOON})
    try:
        path = tmp_path / "mine.png"
        Image.linear_gradient("L").resize((48, 32)).convert("RGB").save(path)
        cost = client.predict(image=handle_file(path), size="96x64", api_name="/estimate")
        assert cost["stages"][-1]["width"] == 96
        cat = {"name": "cat", "image": handle_file(path), "mask": "0:0:0.5:1", "box": [0, 0, 0.5, 1]}
        fields = {"prompt": "a cat", "subjects": [cat], "size": "64x64", "steps": 1}
        assert client.predict(**fields, api_name="/estimate")["request"]["kind"] == "customize"
        job = client.predict(**fields, api_name="/customize")["job"]
        deadline = time.monotonic() + SOON
        while client.predict(job=job, api_name="/status")["state"] != "done":
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        client.close()


def test_pictures_with_subjects_from_uploads_to_file(server: Running, visitor: Visitor) -> None:
    circle = {
        "name": "circle",
        "image": visitor.upload("a.jpg", rotated()),
        "mask": "32x48:0,500,1036",
        "box": [0, 0, 0.5, 1],
    }
    star = {"name": "star", "image": visitor.upload("a.jpg", png(gradient("RGBA"))), "box": "0.5, 0, 1, 1"}
    job = visitor.customize([circle, star], subject_method="isolation")["job"]
    seen = visitor.ended(job)
    assert seen["state"] == "done", seen
    assert seen["kind"] == "customize"
    assert any("subjects" in stage for stage in seen["report"]["attention"]["stages"])
    got = visitor.http.get(seen["outputs"][0]["url"])
    (server.folder / "subjects.png").write_bytes(got.content)
    metadata = read_metadata(server.folder / "subjects.png")
    assert metadata["request"]["subject"] == ["circle=1-circle.jpg@1-circle-mask.png", "star=2-star.jpg"]
    assert {"picture", "mask"} == set(metadata["subjects_sha256"]["circle"])
    assert str(server.folder) not in json.dumps(metadata)
    later = visitor.ended(visitor.call("turn", job, "a star in the night", {"star": [0, 0, 1, 1]}, 4)["job"])
    assert later["state"] == "done", later
    got = visitor.http.get(later["outputs"][0]["url"])
    (server.folder / "turn.png").write_bytes(got.content)
    request = read_metadata(server.folder / "turn.png")["request"]
    assert (request["subject"], request["seed"], request["layout"]) == (
        ["star=2-star.jpg"],
        [4],
        [["star", 0, 0, 1, 1]],
    )
    with pytest.raises(RuntimeError, match="no such job"):
        Visitor(server.url).call("turn", job, "a star", None, None)
    with pytest.raises(RuntimeError, match="needs to know where hat is to be"):
        visitor.customize([circle, {**star, "name": "hat", "box": None}], subject_method="isolation")
    with pytest.raises(RuntimeError, match="subject 1 has a picture and no name"):
        visitor.customize([{"image": circle["image"]}])
    with pytest.raises(RuntimeError, match=r"upload|fetch"):
        visitor.customize([{"name": "star", "image": {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}}])
    own = Visitor(server.url)
    with pytest.raises(RuntimeError, match="upload it again"):
        own.customize([star])


# ----------------------------------------------------------------------------------------- 28: pictures of strangers
def png(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, options.pop("format", "PNG"), **options)
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises more than its few bytes hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")
    )


def gradient(mode: str = "RGB", size: tuple[int, int] = (48, 32)) -> Image.Image:
    return Image.linear_gradient("L").resize(size).convert(mode)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return png(gradient(size=(32, 48)), format="JPEG", exif=exif)


def deep() -> bytes:
    image = Image.frombytes("I;16", (48, 32), struct.pack("<1536H", *range(0, 1536 * 40, 40)))
    return png(image)


GOOD = {
    "one.png": lambda: png(Image.new("RGB", (1, 1), "red")),
    "cmyk.jpg": lambda: png(gradient("CMYK"), format="JPEG"),
    "deep.png": deep,
    "alpha.png": lambda: png(gradient("RGBA")),
    "moving.gif": lambda: png(
        gradient("P"), format="GIF", save_all=True, append_images=[gradient("P").rotate(180)], duration=90
    ),
    "turned.jpg": rotated,
}
REFUSED = {
    "bomb.png": (lambda: bomb(30_000, 30_000), "too large"),
    "wide.png": (lambda: bomb(13_000, 12_000), "megapixels"),
    "vector.png": (lambda: b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "SVG or HTML"),
    "page.png": (lambda: b"<!DOCTYPE html><html><script>alert(1)</script></html>", "SVG or HTML"),
    "noise.jpg": (lambda: bytes(range(256)) * 8, "not a picture"),
    "empty.png": (lambda: b"", "not a picture"),
}


@pytest.mark.parametrize("name", GOOD)
def test_fault_28_odd_pictures_are_enlarged(visitor: Visitor, name: str) -> None:
    size = "64x64" if name == "one.png" else "96x64"
    seen = visitor.ended(visitor.upscale(visitor.upload(name, GOOD[name]()), size)["job"])
    assert seen["state"] == "done", seen
    got = Image.open(io.BytesIO(visitor.http.get(seen["outputs"][0]["url"]).content))
    assert got.size == tuple(map(int, size.split("x")))
    if name == "alpha.png":
        assert got.mode == "RGBA"
    notes = {"deep.png": "16-bit", "moving.gif": "first of 2 frames"}
    assert name not in notes or any(notes[name] in text for text in seen["warnings"])


@pytest.mark.parametrize("name", REFUSED)
def test_fault_28_what_is_no_picture_is_refused_in_words(server: Running, visitor: Visitor, name: str) -> None:
    data, words = REFUSED[name]
    file = visitor.upload(name, data())
    with pytest.raises(RuntimeError, match=words) as caught:
        visitor.upscale(file)
    assert name in str(caught.value)
    assert str(server.folder) not in str(caught.value)
    assert "gensparse-app-" not in str(caught.value), "no folder of the server is told"


def test_fault_28_a_damaged_picture_fails_its_job_and_nothing_else(visitor: Visitor) -> None:
    whole = png(gradient(size=(200, 200)).rotate(30), format="JPEG", quality=95)
    seen = visitor.ended(visitor.upscale(visitor.upload("cut.jpg", whole[: len(whole) // 2]), "256x256")["job"])
    assert seen["state"] == "failed"
    assert "damaged" in seen["error"]
    assert visitor.picture()["state"] == "done", "the worker survived"


def test_fault_28_uploads_end_at_their_limit(server: Running, visitor: Visitor) -> None:
    head = "POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as link:
        link.sendall(f"{head}Content-Length: 200000000\r\n\r\n".encode())  # refused before a byte of it is read
        assert b" 413 " in link.recv(4096).splitlines()[0]
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as link:
        link.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        assert b" 411 " in link.recv(4096).splitlines()[0]
    assert visitor.http.post("/gradio_api/upload", content=b"x" * 100_000, headers={}).status_code == 400
    body = json.dumps({"data": ["x" * 2_000_000], "session_hash": "abc"})
    assert visitor.http.post("/gradio_api/call/generate", content=body).status_code == 413


# ------------------------------------------------------------------------------------------------- 29: hostile programs
@pytest.mark.parametrize(
    "fields",
    [
        {"size": "99999"},
        {"size": "2048x2048"},  # more than this server makes
        {"steps": 1e6},
        {"steps": "NaN"},
        {"seed": -1},
        {"prompt": "x" * 5000},
        {"model": "/etc"},
        {"model": "http://169.254.169.254/"},
        {"attention": "nonsense"},
        {"output": "../x.png"},
        {"trust_remote_code": True},
        {"token": "hf_secret"},
        {"lora": "../../../etc/passwd.safetensors"},
    ],
    ids=str,
)
def test_fault_29_direct_calls_meet_the_same_limits(visitor: Visitor, fields: dict[str, Any]) -> None:
    try:
        seen = visitor.ended(visitor.generate(**fields)["job"])
    except RuntimeError as error:
        text = str(error)
    else:
        assert seen["state"] == "failed", seen
        text = seen["error"]
    assert 20 < len(text) < 700
    assert "Traceback" not in text
    assert "hf_secret" not in text


PATHS = [
    "/etc/passwd",
    "../../../../etc/passwd",
    "%2e%2e/%2e%2e/etc/passwd",
    "..%2f..%2f..%2fetc%2fpasswd",
    "//etc/passwd",
    "/proc/self/environ",
    "~/.bashrc",
    "file:///etc/passwd",
    "http://169.254.169.254/latest/meta-data/",
    "http:%2f%2f127.0.0.1:1/x",
    "hTTps://localhost/x",
    "data:text/html,x",
    "/",
    "",
    "/etc/passwd%00.png",
]


@pytest.mark.parametrize("path", PATHS)
def test_fault_29_no_file_outside_is_served_and_no_address_fetched(visitor: Visitor, path: str) -> None:
    for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/", "/gradio_api/proxy=", "/proxy="):
        answer = visitor.http.get(route + path)
        assert answer.status_code in (400, 403, 404), (route, answer.status_code)
        assert "root:" not in answer.text


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../secret.png", "http://169.254.169.254/x.png", "file:///etc/passwd", "\0"]
)
def test_fault_29_pictures_are_uploads_and_nothing_else(server: Running, visitor: Visitor, path: str) -> None:
    (server.folder / "secret.png").write_bytes(png(gradient()))
    for image in ({"path": path, "meta": {"_type": "gradio.FileData"}}, {"path": path}, path, {"url": path}):
        with pytest.raises(RuntimeError, match=r"upload|fetch"):
            visitor.upscale(image)
    real = str(server.folder / "secret.png")
    with pytest.raises(RuntimeError, match="upload"):
        visitor.upscale({"path": real, "url": "http://127.0.0.1:9/", "meta": {"_type": "gradio.FileData"}})


def test_fault_29_routes_that_the_page_does_not_need_do_not_exist(visitor: Visitor) -> None:
    for path in ("/gradio_api/vibe-code/", "/gradio_api/dev/reload", "/monitoring", "/gradio_api/runs", "/docs", "/x"):
        assert visitor.http.get(path).status_code == 404, path
    for path in ("/gradio_api/vibe-edit/", "/gradio_api/process_recording", "/gradio_api/component_server"):
        assert visitor.http.post(path, json={}).status_code == 404, path
    assert visitor.http.put("/", content=b"").status_code == 404


def test_fault_29_other_sites_and_names_are_refused(server: Running, visitor: Visitor) -> None:
    assert httpx.get(server.url, headers={"host": "evil.example:7860"}).status_code == 403
    body = {"data": ["", "64x64"], "session_hash": "abc"}
    for origin in ("https://evil.example", "null", "http://127.0.0.1.evil.example"):
        answer = visitor.http.post("/gradio_api/call/generate", json=body, headers={"origin": origin})
        assert answer.status_code == 403, origin


@pytest.mark.parametrize("body", ["{", "[" * 100_000, '{"data": ' + "[" * 500 + "]" * 500 + "}", '"x"', "\0", "1e999"])
def test_fault_29_bodies_that_are_no_requests_are_refused(visitor: Visitor, body: str) -> None:
    answer = visitor.http.post("/gradio_api/call/status", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422)


def test_fault_29_fifty_jobs_at_once_are_finished_or_refused(server: Running) -> None:
    crowd = [Visitor(server.url) for _ in range(5)]
    start = threading.Barrier(50)

    def one(number: int) -> str:
        start.wait()
        try:
            job = crowd[number % 5].generate(seed=number)["job"]
        except RuntimeError as error:
            return str(error)
        return crowd[number % 5].ended(job)["state"]

    with contextlib.ExitStack() as open_pages, concurrent.futures.ThreadPoolExecutor(50) as pool:
        for who in crowd:
            open_pages.enter_context(who.page())
        answers = list(pool.map(one, range(50)))
    done = answers.count("done")
    refused = [text for text in answers if text != "done"]
    assert all("queue is full" in text and "try again" in text for text in refused), set(refused)
    assert done + len(refused) == 50
    assert done >= QUEUE


def test_fault_29_a_job_stops_soon_when_its_visitor_is_gone(server: Running) -> None:
    visitor = Visitor(server.url)
    with visitor.page():
        visitor.picture(size="512x512", steps=2)
    before = server.memory()
    with visitor.page():
        job = visitor.generate(size="1024x1024", steps=100, attention="dense")["job"]
        watcher = Visitor(server.url)  # does not own the job: looking with a wrong id keeps nothing alive
        time.sleep(1.5 * GRACE)
        with pytest.raises(RuntimeError, match="no such job"):
            watcher.call("status", job)
        assert visitor.call("status", job)["state"] == "running", "its page is open"
    time.sleep(GRACE + 0.5)
    deadline = time.monotonic() + 30
    while True:
        time.sleep(GRACE + 1.5)  # looking is being there, so look seldom
        seen = visitor.call("status", job)
        if seen["state"] == "cancelled":
            break
        assert time.monotonic() < deadline, seen
    assert "page was closed" in seen["text"]
    assert server.memory() - before < 200_000_000
    with visitor.page():
        assert visitor.picture()["state"] == "done", "the worker takes the next job"


def test_cancel_stops_a_running_job_within_a_step(visitor: Visitor) -> None:
    job = visitor.generate(size="512x512", steps=100)["job"]
    while visitor.call("status", job)["state"] == "queued":
        time.sleep(0.05)
    assert visitor.call("cancel", job)["state"] in ("running", "cancelled")
    seen = visitor.ended(job, 30)
    assert seen["state"] == "cancelled"
    assert seen.get("event", {}).get("step", 0) < 100


# ---------------------------------------------------------------------------------------------------- 30: two visitors
def test_fault_30_visitors_see_their_own_files_and_jobs_only(server: Running) -> None:
    mine, yours, nobody = Visitor(server.url), Visitor(server.url), Visitor(server.url, cookie=False)
    with mine.page():
        seen = mine.picture()
    url, path = seen["outputs"][0]["url"], seen["outputs"][0]["path"]
    assert mine.http.get(url).status_code == 200
    for other in (yours, nobody):
        assert other.http.get(url).status_code == 403
        for name in ("status", "cancel"):
            with pytest.raises(RuntimeError, match="no such job"):
                other.call(name, seen["job"])
        with pytest.raises(RuntimeError, match="upload"):
            other.upscale({"path": path, "meta": {"_type": "gradio.FileData"}})
    forged = Visitor(server.url, cookie=False)
    forged.http.cookies.set("gensparse_session", "A" * 43 + "." + "0" * 64)
    assert forged.http.get(url).status_code == 403
    token = mine.http.cookies["gensparse_session"]
    assert token.split(".")[0] not in json.dumps(seen), "the cookie is in no address"
    page = mine.http.get("/")
    assert "set-cookie" not in page.headers, "a visitor who has one keeps it"
    first = httpx.get(server.url).headers["set-cookie"]
    assert "HttpOnly" in first
    assert "SameSite=Lax" in first


def test_fault_30_two_files_of_the_same_name_stay_apart(server: Running) -> None:
    mine, yours = Visitor(server.url), Visitor(server.url)
    files = [who.upload("photo.png", png(gradient(size=size))) for who, size in ((mine, (40, 20)), (yours, (20, 40)))]
    assert files[0]["path"] != files[1]["path"]
    for who, file, other, side in ((mine, files[0], files[1], (80, 40)), (yours, files[1], files[0], (40, 80))):
        cost = who.estimate(image=file)
        assert (cost["request"]["size"]) == f"{side[0]}x{side[1]}"
        assert who.http.get(f"/gradio_api/file={file['path']}").status_code == 200
        assert who.http.get(f"/gradio_api/file={other['path']}").status_code == 403
        with pytest.raises(RuntimeError, match="upload"):
            who.estimate(image=other)


def test_fault_30_errors_are_text_and_no_markup(visitor: Visitor) -> None:
    with pytest.raises(RuntimeError) as caught:
        visitor.generate(model="<img src=x onerror=alert(1)>")
    assert "<img" not in str(caught.value)
    assert "&lt;img" in str(caught.value)


# ------------------------------------------------------------------------------------------------------ shared servers
class Nothing:
    """An engine that draws nothing."""

    def execute(self, request, output=None, *, on_event=None, cancel=None) -> Result:
        raise AssertionError("nothing was to be drawn")

    def tidy(self) -> None:
        pass


def test_a_shared_server_asks_for_its_password_and_takes_no_files(tmp_path: Path) -> None:
    settings = Settings(
        host="0.0.0.0",
        port=free_port(),
        auth=("me", "se cret"),
        output_dir=tmp_path / "out",
        preload=False,
        limits=Limits(side=512),
    )
    with Server(settings, Nothing()) as server:
        url = f"http://127.0.0.1:{settings.port}"
        visitor = Visitor(url)
        with pytest.raises(RuntimeError, match="401"):
            visitor.generate()
        assert visitor.http.get("/config").status_code == 401
        assert visitor.http.post("/login", data={"username": "me", "password": "wrong"}).status_code == 400
        assert visitor.http.post("/login", data={"username": "me", "password": "se cret"}).status_code == 200
        labels = [part["props"].get("label") for part in visitor.http.get("/config").json()["components"]]
        assert "Prompt" in labels
        assert "LoRA" not in labels
        for fields in ({"lora": "x.safetensors"}, {"model": "../../x"}, {"token": "x"}, {"trust_remote_code": True}):
            with pytest.raises(RuntimeError, match=next(iter(fields))):
                visitor.generate(**fields)
        with pytest.raises(RuntimeError, match="names a file"):
            visitor.generate(attention="clear:weights=/tmp/x.safetensors")
        folder = server.app.sessions.new_folder("cookie-x")
        assert folder.is_relative_to((tmp_path / "out").resolve())
    assert not list((tmp_path / "out").iterdir()), "results of visitors go with the server"


def test_a_port_that_is_taken_is_said(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = Settings(port=taken.getsockname()[1], output_dir=tmp_path / "out", preload=False)
        with pytest.raises(ConfigError, match="--port"), Server(settings, Nothing()):
            pass


def test_tiff_orientation_is_read_from_the_header(tmp_path: Path) -> None:
    from gensparse.image_io import read_header

    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[0x0112] = 8
    gradient(size=(40, 20)).save(tmp_path / "a.tif", tiffinfo=info)
    assert read_header(tmp_path / "a.tif").size == (40, 20)
    gradient(size=(40, 20)).save(tmp_path / "b.png")
    assert read_header(tmp_path / "b.png").size == (20, 40)
