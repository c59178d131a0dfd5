"""A hub on localhost with one model folder, and a cache folder laid out like the real one."""

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SHA = "0123456789abcdef0123456789abcdef01234567"

INDEX = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.42.1",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "image_encoder": [None, None],
}
CONFIGS = {
    "transformer": {"num_layers": 2, "num_single_layers": 3, "num_attention_heads": 4, "attention_head_dim": 16},
    "vae": {"_class_name": "AutoencoderKL", "block_out_channels": [8, 16, 16, 16], "layers_per_block": 1},
    "text_encoder": {},
    "text_encoder_2": {},
    "scheduler": {},
}


def make_folder(folder: Path, *, weights: str = "model.safetensors", **index: object) -> Path:
    """A folder that looks like a FLUX pipeline; its weight files are empty."""
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps(INDEX | index))
    for part, config in CONFIGS.items():
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config))
        if part != "scheduler":
            (folder / part / weights).write_bytes(b"")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    return folder


def make_cache(cache: Path, source: Path, name: str = "owner/model") -> Path:
    """Put a folder into a hub cache as branch `main` of `name`."""
    repo = cache / ("models--" + name.replace("/", "--"))
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(SHA)
    shutil.copytree(source, repo / "snapshots" / SHA)
    return cache


@contextmanager
def serve(folder: Path | None, *, refuse: tuple[int, str] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Serve `folder` as any model; yields (endpoint, log of requests). `refuse` = (status, error code of the hub)."""
    log: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, *, body: bool) -> None:
            log.append(f"{self.command} {self.path}")
            if refuse is not None:
                self._send(refuse[0], b"{}", {"X-Error-Code": refuse[1], "X-Error-Message": "no"}, body)
            elif "/resolve/" in self.path:
                self._file(self.path.split("/resolve/", 1)[1].split("/", 1)[1].split("?")[0], body)
            elif "/tree/" in self.path:
                self._send(200, json.dumps(self._tree()).encode(), {}, body)
            else:
                files = [{"rfilename": item["path"]} for item in self._tree()]
                self._send(200, json.dumps({"id": "owner/model", "sha": SHA, "siblings": files}).encode(), {}, body)

        def _tree(self) -> list[dict]:
            assert folder is not None
            files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
            names = [(p.relative_to(folder).as_posix(), p.stat().st_size) for p in files]
            return [{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in names]

        def _file(self, name: str, body: bool) -> None:
            assert folder is not None
            data = (folder / name).read_bytes()
            tag = {"ETag": f'"{sha256(data).hexdigest()[:40]}"', "X-Repo-Commit": SHA}
            self._send(200, data, tag, body)

        def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(status)
            for key, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", log
    finally:
        server.shutdown()
        server.server_close()
