"""Requests: sizes, validation, dictionaries and keys."""

import json
import math
import subprocess
import sys

import pytest

from gensparse.errors import ConfigError
from gensparse.request import (
    SIZE_FORMS,
    GenerateRequest,
    UpscaleRequest,
    parse_bytes,
    parse_size,
    request_from_dict,
)
from gensparse.subjects.naming import Shown, parse_subject, subject_text

BASE = (256, 256)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", (4096, 4096)),
        ("3840x2160", (2160, 3840)),
        (" 3840 X 2160 ", (2160, 3840)),
        ("3840×2160", (2160, 3840)),
        ("4k", (4096, 4096)),
        ("8K", (8192, 8192)),
        ("2x", (512, 512)),
        ("1.5x", (384, 384)),
    ],
)
def test_size_forms(text: str, size: tuple[int, int]) -> None:
    assert parse_size(text).resolve(base=BASE, multiple=16)[0] == size


def test_aspect_with_area_keeps_both() -> None:
    height, width = parse_size("16:9@8mp").resolve(base=BASE, multiple=16)[0]
    assert width / height == pytest.approx(16 / 9, rel=0.02)
    assert height * width == pytest.approx(8e6, rel=0.02)


BAD_SIZES = "0 -1 nan 1e9 4K_x x 0x512 512x0 99999999 0x 0.0x 16:0@8mp 16:9@0mp 4096.5 2x2x2 infk 100000 1:999@8mp"


@pytest.mark.parametrize("text", [*BAD_SIZES.split(), "", "4K x", "4096\n4096"])
def test_bad_size_names_the_accepted_forms(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_size(text)
    assert SIZE_FORMS in str(error.value)


@pytest.mark.parametrize(("rounding", "size"), [("nearest", 4096), ("up", 4112)])
def test_rounding_says_what_it_did(rounding: str, size: int) -> None:
    (height, width), note = parse_size("4097").resolve(base=BASE, multiple=16, rounding=rounding)
    assert (height, width) == (size, size)
    assert note is not None
    assert "4097x4097" in note
    assert f"{size}x{size}" in note


def test_strict_rounding_refuses_and_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="3840x2160"):
        parse_size("3840x2161").resolve(base=BASE, multiple=16, rounding="strict")
    assert parse_size("3840x2160").resolve(base=BASE, multiple=16, rounding="strict") == ((2160, 3840), None)


def test_tiny_sizes_become_one_multiple() -> None:
    assert parse_size("1").resolve(base=BASE, multiple=16)[0] == (16, 16)


@pytest.mark.parametrize(
    ("text", "count"),
    [("24GiB", 24 << 30), ("16GB", 16 * 10**9), ("512MiB", 512 << 20), ("1.5g", 1.5e9), ("4096", 4096)],
)
def test_amounts_of_memory(text: str, count: float) -> None:
    assert parse_bytes(text) == int(count)


@pytest.mark.parametrize("text", ["", "lots", "-1GiB", "0", "nan", "1e9", "GiB"])
def test_bad_amounts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="24GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    "values",
    [
        {"steps": 0},
        {"steps": True},
        {"steps": 2.0},
        {"guidance": -1.0},
        {"guidance": math.nan},
        {"seed": -1},
        {"seed": [1, "2"]},
        {"num_images": 0},
        {"dense_steps": -1},
        {"dtype": "int8"},
        {"offload": "disk"},
        {"round": "down"},
        {"highres": "magic"},
        {"prompt": "a\0b"},
        {"prompt": 5},
        {"prompt": "x" * 300_000},
        {"prompt": "\ud800"},
        {"model": ""},
        {"size": "4K x"},
        {"max_vram": "much"},
        {"trust_remote_code": "yes"},
    ],
    ids=str,
)
def test_bad_values_are_config_errors_that_name_the_field(values: dict) -> None:
    with pytest.raises(ConfigError) as error:
        GenerateRequest(**values)
    name = next(iter(values))
    words = {"max_vram": "memory"}
    assert words.get(name, name) in str(error.value)


@pytest.mark.parametrize("strength", [-0.1, 1.5, math.nan, "much"])
def test_strength_outside_0_to_1_is_refused(strength: object) -> None:
    with pytest.raises(ConfigError, match="strength"):
        UpscaleRequest(image="a.png", strength=strength)


def test_prompts_in_any_script_are_kept() -> None:
    text = "a red circle 🌟 دائرة حمراء 赤い丸"
    assert GenerateRequest(prompt=text).prompt == text


def test_round_trip_through_json() -> None:
    request = GenerateRequest(prompt="a star", seed=(1, 2), size="4k", attention="clear:radius=8", dense_layers=(-1, 0))
    assert GenerateRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request
    upscale = UpscaleRequest(image="x.png", strength=0.5)
    assert request_from_dict(upscale.to_dict()) == upscale


def test_unknown_key_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="did you mean prompt"):
        GenerateRequest.from_dict({"promt": "a star"})


@pytest.mark.parametrize("data", [{"kind": "video"}, {"version": 99}, {"kind": ["generate"]}], ids=str)
def test_other_kinds_and_versions_are_refused(data: dict) -> None:
    with pytest.raises(ConfigError):
        request_from_dict(data)


def test_key_depends_on_the_picture_and_not_on_the_machine() -> None:
    request = GenerateRequest(prompt="a star", seed=(1,))
    assert request.key() == request.replace(device="cpu", offload="model", max_vram="1GiB", token="secret").key()
    assert request.key() != request.replace(seed=(2,)).key()
    assert len(request.key()) == 64


def test_portable_dict_names_no_folder_and_no_token() -> None:
    request = UpscaleRequest(
        image="/home/ada/pictures/cat.png", model="C:\\models\\flux", lora=("~/l/a.safetensors:0.5",), token="hf_secret"
    )
    text = json.dumps(request.to_dict(portable=True))
    assert "ada" not in text
    assert "hf_secret" not in text
    assert "models" not in text.replace('"model"', "")
    assert "hf_secret" not in json.dumps(request.to_dict())
    assert "hf_secret" not in repr(request)
    data = json.loads(text)
    assert (data["image"], data["model"], data["lora"]) == ("cat.png", "flux", ["a.safetensors:0.5"])


def test_hub_ids_stay_in_the_portable_dict() -> None:
    assert GenerateRequest(model="owner/name").to_dict(portable=True)["model"] == "owner/name"


def test_import_is_light() -> None:
    code = "import sys, gensparse.request; assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("folder", ["out", "me@home", "a, b", "x=y", "me@home,@work"])
@pytest.mark.parametrize("mask", [None, "mask.png", "0.1:0.2:0.5:1"])
def test_subjects_keep_files_in_folders_of_any_name(folder: str, mask: str | None) -> None:
    kept = mask if mask is None or ":" in mask else f"/{folder}/{mask}"
    shown = (Shown(f"/{folder}/cat.png", kept), Shown(f"/{folder}/two@.png"))
    assert parse_subject(subject_text("cat", shown)) == ("cat", shown)
