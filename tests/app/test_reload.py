"""Settings out of pictures of unknown origin: checked, dangerous ones named and dropped, everything shown as text."""

import json
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gensparse.app import forms
from gensparse.app.reload import LIMIT, parse_parameters, plain, reload
from gensparse.app.settings import Settings
from gensparse.engine.reuse import without_files
from gensparse.errors import ConfigError
from gensparse.image_io import write_image
from gensparse.request import GenerateRequest, UpscaleRequest

PICTURE = Image.linear_gradient("L").resize((16, 16)).convert("RGB")
A1111 = (
    "a cat <lora:fur:0.8>, studio\nsecond line\nNegative prompt: dog\n"
    'Steps: 24, Sampler: Euler a, CFG scale: 7, Seed: 1234567890123, Size: 640x512, Model: "a, b", Version: v1.9'
)


def ours(folder: Path, request: dict, suffix: str = "png", **more) -> Path:
    path = folder / f"picture.{suffix}"
    write_image(PICTURE, path, metadata={"gensparse": 1, "request": request, **more})
    return path


def foreign(folder: Path, texts: dict[str, str]) -> Path:
    info = PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    PICTURE.save(folder / "foreign.png", pnginfo=info)
    return folder / "foreign.png"


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
def test_own_pictures_give_their_settings_back(tmp_path: Path, suffix: str) -> None:
    request = GenerateRequest(
        prompt='a "red" circle <b>&\n☃', size="1024x512", steps=7, guidance=2.5, seed=(5,), attention="clear:radius=4"
    )
    found = reload(ours(tmp_path, request.to_dict(portable=True), suffix))
    assert found.kind == "generate"
    assert not found.dropped
    assert not found.foreign
    wanted = request.to_dict(portable=True)
    assert found.values == {k: v for k, v in wanted.items() if k in found.values}
    assert {"prompt", "size", "steps", "guidance", "seed", "attention", "model"} <= set(found.values)
    assert "radius=4" in found.text


def test_upscaled_pictures_are_told_apart(tmp_path: Path) -> None:
    request = UpscaleRequest(prompt="x", image="photo.png", strength=0.4, size="2x")
    found = reload(ours(tmp_path, request.to_dict(portable=True)))
    assert found.kind == "upscale"
    assert found.values["strength"] == 0.4
    assert "image" not in found.values
    assert "image" in found.dropped


DANGEROUS = {
    "model": "../../x",
    "lora": ["../evil.safetensors"],
    "trust_remote_code": True,
    "token": "hf_secret",
    "device": "cuda:7",
    "offload": "none",
    "max_vram": "1TiB",
    "local_files_only": True,
    "revision": "main",
    "variant": "fp16",
    "image": "/etc/passwd",
    "output": "/etc/cron.d/x",
    "output_dir": "/",
    "preview_dir": "x",
    "sidecar": "y",
    "anything": 1,
}


def test_dangerous_keys_are_dropped_and_named(tmp_path: Path) -> None:
    found = reload(ours(tmp_path, {"kind": "generate", "prompt": "a star", "steps": 5, **DANGEROUS}))
    assert found.values == {"prompt": "a star", "steps": 5}
    assert set(found.dropped) == set(DANGEROUS)
    for name in DANGEROUS:
        assert name in found.message
    assert "hf_secret" not in found.message
    assert "/etc/passwd" not in found.message


def test_settings_that_say_nothing_are_not_named(tmp_path: Path) -> None:
    found = reload(ours(tmp_path, {"prompt": "x", "trust_remote_code": False, "lora": [], "revision": None}))
    assert not found.dropped
    assert found.values == {"prompt": "x"}


@pytest.mark.parametrize(
    ("attention", "kept", "named"),
    [
        ("clear:radius=8,weights=../../x.safetensors", "clear:radius=8", "weights of clear"),
        ("clear:radius=8,weights=owner/name", "clear:radius=8", "weights of clear"),
        ("auto:profile=/etc/passwd,error=0.2", "auto:error=0.2", "profile of auto"),
        ("schedule:0=dense;0.5=clear:radius=4,weights=x", "0.5=clear:radius=4", "weights of clear"),
    ],
)
def test_files_of_methods_are_dropped(tmp_path: Path, attention: str, kept: str, named: str) -> None:
    found = reload(ours(tmp_path, {"prompt": "x", "attention": attention}))
    assert kept in found.values["attention"]
    assert "weights" not in found.values["attention"]
    assert "profile" not in found.values["attention"]
    assert named in found.dropped


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 10**6), ("steps", "many"), ("steps", True), ("size", "99999999"), ("size", {}), ("seed", [-1]),
        ("seed", "x"), ("guidance", 1e9), ("attention", "nothing:x=1"), ("attention", {"method": "clear"}),
        ("attention", "\ud800"), ("prompt", "a\0b"), ("prompt", ["x"]), ("prompt", "\ud800"), ("tile", {"a": 1}),
        ("model", "x" * 5000), ("model", 7), ("num_images", 0), ("dtype", "fp8"), ("highres", "magic"),
        ("chunk", 1e300), ("dense_layers", [[]]),
    ],
)  # fmt: skip
def test_values_that_no_request_allows_are_dropped(tmp_path: Path, key: str, value) -> None:
    said = json.dumps({"gensparse": 1, "request": {"negative_prompt": "ok", key: value}})
    found = reload(foreign(tmp_path, {"gensparse": said}))
    assert found.values == {"negative_prompt": "ok"}
    assert key in found.dropped
    assert found.message.isprintable() or "\n" in found.message


def test_only_offered_models_are_taken(tmp_path: Path) -> None:
    path = ours(tmp_path, {"prompt": "x", "model": "owner/name"})
    assert reload(path).values["model"] == "owner/name"
    found = reload(path, models=("embedded",))
    assert "model" not in found.values
    assert "not offer" in found.dropped["model"]


def test_scripts_are_text(tmp_path: Path) -> None:
    script = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    found = reload(ours(tmp_path, {"prompt": script, script: script}))
    assert found.values["prompt"] == script  # a prompt is text and stays as it is
    assert found.dropped == {script: "not a setting"}
    evil = "\x1b]0;x\x07\u202e" + "a" * 500
    assert plain(evil).startswith("\\x1b]0;x\\x07\\u202e")
    assert len(plain("a" * 500)) == 80
    assert "\x1b" not in reload(ours(tmp_path, {"prompt": "x", "y\x1b[2J": 1}, "webp")).message


def test_too_much_metadata_is_refused(tmp_path: Path) -> None:
    text = json.dumps({"gensparse": 1, "request": {"prompt": "x" * LIMIT}})
    with pytest.raises(ConfigError, match="at most"):
        reload(foreign(tmp_path, {"gensparse": text}))
    with pytest.raises(ConfigError):
        reload(foreign(tmp_path, {"gensparse": "x" * (1 << 20)}))
    many = {f"key{n}": n for n in range(2000)}
    found = reload(ours(tmp_path, {"prompt": "x", **many}))
    assert len(found.message.splitlines()) < 30
    assert "more" in found.message


@pytest.mark.parametrize("content", [b"", b"<svg xmlns=...>", b"<html><script>", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_files_that_are_no_pictures_are_refused_without_their_folders(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        reload(path)
    assert str(tmp_path) not in str(caught.value)


def test_a_picture_without_settings_says_so(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="no gensparse metadata"):
        reload(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="no gensparse metadata"):
        reload(foreign(tmp_path, {"parameters": "just words\nSampler: Euler, Steps: 5"}))


def test_pictures_of_other_tools_give_prompt_steps_seed_and_size(tmp_path: Path) -> None:
    found = reload(foreign(tmp_path, {"parameters": A1111}))
    assert found.foreign
    assert found.values == {
        "prompt": "a cat , studio\nsecond line",
        "steps": 24,
        "seed": [1234567890123],
        "size": "640x512",
    }
    assert {"Sampler", "CFG scale", "Model", "Negative prompt", "<lora:fur:0.8>"} <= set(found.dropped)
    assert "Version" not in found.dropped


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
@pytest.mark.parametrize("words", ["utf-16-be", "utf-16-le"])
def test_other_tools_write_comments_into_jpeg_and_webp(tmp_path: Path, suffix: str, words: str) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + A1111.encode(words)
    PICTURE.save(tmp_path / f"a.{suffix}", exif=exif.tobytes())
    assert reload(tmp_path / f"a.{suffix}").values["steps"] == 24


@pytest.mark.parametrize(
    "text",
    ["", "a cat", "Steps: many, Seed: 1", "Seed: 1, Steps: 2", "Steps: 2" + ", x" * 5000, "Steps: 5, Seed: 1\nafter"],
)
def test_other_forms_are_not_guessed(text: str) -> None:
    assert parse_parameters(text) == ({}, ())


def test_other_tools_values_are_checked_like_ours(tmp_path: Path) -> None:
    found = reload(foreign(tmp_path, {"parameters": "x\nSteps: 999999, Seed: 99999999999999999999, Size: 70000x1"}))
    assert found.values == {"prompt": "x"}
    assert {"steps", "seed", "size"} <= set(found.dropped)


def test_hidden_prompts_stay_hidden(tmp_path: Path) -> None:
    found = reload(ours(tmp_path, {"prompt": "leak", "steps": 3}, prompt_omitted="asked"))
    assert found.values == {"steps": 3}


CUT = [
    ("clear:radius=8", "clear:radius=8", ()),
    ("freecustom:weights=2.0", "freecustom:weights=2.0", ()),
    ("regional:regions=/etc/passwd,base_weight=0.3", "regional:base_weight=0.3", ("regions of regional",)),
    (
        'regional:{"regions": "/etc/passwd", "background": "a, b"}',
        'regional:{"background": "a, b"}',
        ("regions of regional",),
    ),
    ("freescale:jitter=false,whole=clear:radius=4;weights=x", "freescale:jitter=false", ("weights of clear",)),
    (
        "together:sliding_window:radius=4;clear:weights=a/b",
        "together:sliding_window:radius=4;clear",
        ("weights of clear",),
    ),
    ("schedule:0=dense;0.5=auto:profile=/x", "schedule:0=dense;0.5=auto", ("profile of auto",)),
]


@pytest.mark.parametrize(("attention", "kept", "named"), CUT, ids=lambda value: str(value)[:40])
def test_files_are_cut_from_the_text_before_anything_could_open_them(
    attention: str, kept: str, named: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gensparse.subjects.areas.Regions.read", lambda path: pytest.fail("a file was opened"))
    assert without_files(attention) == (kept, named)
    shared = Settings(host="0.0.0.0", auth=("me", "secret"))
    values = {"prompt": "a star", "attention": attention}
    if named:
        with pytest.raises(ConfigError, match="names a file"):
            forms.generate_request(values, shared)
    else:
        assert forms.generate_request(values, shared).attention == attention


def test_what_the_page_has_no_field_for_is_named_where_it_matters(tmp_path: Path) -> None:
    request = GenerateRequest(prompt="x", steps=3, tile="512", dtype="fp32", chunk=0, seed=(4,))
    found = reload(ours(tmp_path, request.to_dict(portable=True)), fields={"generate": ("prompt", "steps", "seed")})
    assert found.values == {"prompt": "x", "steps": 3, "seed": [4]}
    assert set(found.dropped) == {"tile", "dtype"}
    assert found.message.startswith("Taken from the picture: prompt, seed, steps.")
