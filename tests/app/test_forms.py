"""What visitors may ask for, whatever they send."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from gensparse.app import forms, widgets
from gensparse.app.core import widget_values
from gensparse.app.settings import Limits, Settings, is_loopback
from gensparse.errors import ConfigError, GensparseError

LOCAL = Settings()
SHARED = Settings(host="0.0.0.0", auth=("me", "secret"))
HERE = Path("photo.png")
both = pytest.mark.parametrize("settings", [LOCAL, SHARED], ids=["loopback", "shared"])


def generate(settings: Settings = LOCAL, **values):
    return forms.generate_request({"prompt": "a star", **values}, settings)


@both
def test_ordinary_values_become_the_request_of_the_command_line(settings: Settings) -> None:
    values = {"size": "512x256", "steps": 5, "guidance": 3, "seed": 7, "num_images": 2, "attention": "clear:radius=8"}
    request = generate(settings, **values, negative_prompt="", highres="cascade", dense_steps=0)
    assert (request.size, request.steps, request.guidance, request.seed, request.num_images) == (
        "512x256",
        5,
        3.0,
        (7,),
        2,
    )
    assert request.attention == "clear:radius=8"
    assert request.local_files_only, "nothing is fetched for a visitor"
    assert not request.trust_remote_code
    assert request.token is None


@both
def test_empty_fields_are_left_to_the_model(settings: Settings) -> None:
    request = generate(settings, size="", steps=None, guidance=None, seed=None)
    assert (request.size, request.steps, request.guidance, request.seed) == (None, None, None, ())


BAD = {
    "size": ["99999", "8193x64", "64x8193", "9000:1@8mp", "0", "-1", "nan", "1e9", "4K x", "x" * 100, 5, ["64"], {}],
    "steps": [0, -1, 1e6, 101, 2.5, math.nan, math.inf, True, "many", [3], "9" * 50, 10**400],
    "guidance": [-0.1, 30.5, math.nan, -math.inf, True, "x", {}],
    "seed": [-1, 2**53, 1.5, math.nan, "0x10", True],
    "num_images": [0, 5, 1e9, False],
    "dense_steps": [-1, 1000],
    "prompt": ["x" * 2001, 5, ["a"], "a\0b", "a\ud800b"],
    "negative_prompt": ["x" * 2001],
    "attention": ["nonsense", "clear:radius=0", "clear:radius=x", "x" * 300, 5, "clear:" + "radius=8," * 40],
    "highres": ["nonsense", "cascade:share=9", 7, "x" * 300],
    "model": ["no-such-model", "http://169.254.169.254/", "https://huggingface.co/a/b", 5, "a" * 300, "owner/name"],
}


@both
@pytest.mark.parametrize(("name", "value"), [(k, v) for k, vs in BAD.items() for v in vs], ids=lambda v: str(v)[:24])
def test_fault_29_wrong_values_are_refused_with_a_sentence(settings: Settings, name: str, value) -> None:
    with pytest.raises(GensparseError) as caught:
        generate(settings, **{name: value})
    text = str(caught.value)
    assert 10 < len(text) < 700
    assert name in text or name == "size" or (name, type(value)) == ("attention", str) or name in ("model", "highres")


@both
@pytest.mark.parametrize("name", [*forms.REFUSED, "cascade", "tile", "offload", "__class__"])
def test_fault_29_fields_that_name_files_secrets_or_the_machine_are_refused(settings: Settings, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        generate(settings, **{name: "../x"})
    with pytest.raises(ConfigError, match=name):
        forms.upscale_request({name: True}, settings, HERE, (64, 64))


@pytest.mark.parametrize("lora", ["../../x.safetensors", "/etc/passwd.bin", "owner/name", "http://169.254.169.254/a"])
def test_fault_29_lora_files_are_for_the_person_at_the_machine(lora: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lora is not accepted by this page"):
        generate(SHARED, lora=lora)
    with pytest.raises(GensparseError):
        generate(LOCAL, lora=lora)
    file = tmp_path / "mine.safetensors"
    file.write_bytes(b"")
    assert generate(LOCAL, lora=f"{file}:0.5\n\n").lora == (f"{file}:0.5",)


@pytest.mark.parametrize("model", ["/models/flux", "../flux", "C:\\flux", "~/flux", "a/b/c", "flux.ckpt"])
def test_fault_29_folders_of_models_are_for_the_person_at_the_machine(model: str) -> None:
    with pytest.raises(ConfigError, match="model"):
        generate(SHARED, model=model)
    assert generate(LOCAL, model=model).model == model


def test_fault_29_methods_name_no_files_on_a_shared_server() -> None:
    for attention in ("clear:weights=/tmp/x.safetensors", "auto:profile=../x.json", "clear:weights=owner/name"):
        with pytest.raises(ConfigError, match="names a file"):
            generate(SHARED, attention=attention)


def test_fault_30_paths_in_a_reloaded_request_reach_no_request() -> None:
    evil = {"model": "../../x", "trust_remote_code": True, "token": "hf_x", "prompt": "<script>alert(1)</script>"}
    for name in ("trust_remote_code", "token"):
        with pytest.raises(ConfigError, match=name):
            forms.generate_request({name: evil[name]}, LOCAL)
    assert generate(SHARED, prompt=evil["prompt"]).prompt == evil["prompt"], "text stays text"


def test_upscaling_is_limited_by_the_result_not_by_the_factor() -> None:
    small = replace(LOCAL, limits=Limits(side=1000))
    assert forms.upscale_request({"size": "4x"}, small, HERE, (250, 200)).size == "4x"
    for size, value in (((251, 200), "4x"), ((600, 10), None), ((10, 10), "2000x10")):
        with pytest.raises(ConfigError, match="at most 1000 pixels"):
            forms.upscale_request({"size": value}, small, HERE, size)
    for strength in (-0.1, 1.1, math.nan, "x", True):
        with pytest.raises(ConfigError, match="strength"):
            forms.upscale_request({"strength": strength}, LOCAL, HERE, (64, 64))


def test_a_smaller_server_makes_smaller_pictures() -> None:
    small = replace(LOCAL, limits=Limits(side=512))
    assert generate(small, size="512x512").size == "512x512"
    assert generate(small, size="2x").size == "2x"  # of 256
    for size in ("513x64", "4x", "16:9@8mp"):
        with pytest.raises(ConfigError, match="at most 512 pixels"):
            generate(small, size=size)


def test_forms_and_requests_are_each_other_backwards(tmp_path: Path) -> None:
    loras = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in loras:
        file.write_bytes(b"")
    request = generate(attention="clear:radius=8", seed=3, size="512x512", steps=4, lora=f"{loras[0]}\n{loras[1]}:2")
    shown = widget_values(json.loads(json.dumps(request.to_dict())))
    assert (shown["method"], shown["settings"], shown["seed"], shown["random_seed"]) == ("clear", "radius=8", 3, False)
    known = forms.FIELDS["generate"] + forms.LOCAL_FIELDS
    back = {k: v for k, v in widgets.request_values(shown).items() if k in known}
    assert forms.generate_request(back, LOCAL) == request
    assert "seed" not in widgets.request_values({"seed": 3, "random_seed": True})


def test_servers_that_others_can_reach_need_a_password() -> None:
    for options in ({"host": "0.0.0.0"}, {"share": True}, {"host": "192.168.1.2"}, {"host": "example.org"}):
        with pytest.raises(ConfigError, match="--auth USER:PASS"):
            Settings(**options)
        with pytest.raises(ConfigError, match="--auth USER:PASS"):
            Settings(**options, auth=("me", ""))
        assert Settings(**options, auth=("me", "secret")).shared
    assert "secret" not in repr(Settings(auth=("me", "secret")))
    for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        assert is_loopback(host)
        assert not Settings(host=host).shared


@pytest.mark.parametrize("bad", [{"side": 10}, {"side": 99_999}, {"queue": 0}, {"queue": True}])
def test_limits_are_checked(bad: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Settings(limits=Limits(**bad))


def test_every_method_that_is_offered_works_with_its_defaults() -> None:
    for name in widgets.OFFERED:
        settings, about = widgets._chosen(name)
        request = generate(SHARED, **widgets.request_values({"method": name, "settings": settings}))
        assert request.attention.partition(":")[0] == name
        assert len(about) > 40
    assert widgets._chosen("nonsense")[0] == ""
    assert "<b>" not in widgets._chosen("<b>")[1]
