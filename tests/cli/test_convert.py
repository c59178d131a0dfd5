"""`gensparse models convert`: pickled weights become safetensors, and nothing in a pickle runs."""

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gensparse.engine.convert import convert
from gensparse.errors import ModelError, OutputError

Cli = Callable[..., Any]
CHECKPOINT = {
    "image_proj": {"proj.weight": torch.arange(6.0).reshape(2, 3).T, "norm.bias": torch.ones(2, dtype=torch.float16)},
    "ip_adapter": {"1.to_k_ip.weight": torch.eye(3), "1.text_to_weight.weight": torch.zeros(1, 3)},
    "step": 5,
}
NAMES = {"image_proj.proj.weight", "image_proj.norm.bias", "ip_adapter.1.to_k_ip.weight"}
NAMES |= {"ip_adapter.1.text_to_weight.weight"}


class Hostile:
    """Runs a command when it is unpickled by an ordinary reader."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_is_converted_with_its_names(tmp_path: Path, zipped: bool) -> None:
    source = tmp_path / "model_sdxl.bin"
    torch.save(CHECKPOINT, source, _use_new_zipfile_serialization=zipped)
    done = convert(source)
    assert (done.path, done.tensors, done.left_out) == (tmp_path / "model_sdxl.safetensors", 4, 1)
    assert done.bytes == done.path.stat().st_size
    found = load_file(done.path)
    assert set(found) == NAMES
    assert torch.equal(found["image_proj.proj.weight"], CHECKPOINT["image_proj"]["proj.weight"])
    assert found["image_proj.norm.bias"].dtype is torch.float16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model_sdxl.bin", "model_sdxl.safetensors"]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["whole", "beside tensors"])
def test_nothing_in_a_hostile_pickle_runs(tmp_path: Path, zipped: bool, place: str) -> None:
    marker, source = tmp_path / "ran", tmp_path / "evil.bin"
    data = Hostile(marker) if place == "whole" else {"a": torch.zeros(2), "b": Hostile(marker)}
    torch.save(data, source, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match="could run code; it is refused"):
        convert(source)
    assert not marker.exists()
    assert not (tmp_path / "evil.safetensors").exists()
    torch.load(source, weights_only=False)  # the file does what it says
    assert marker.exists()


def test_a_plain_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    marker, source = tmp_path / "ran", tmp_path / "evil.ckpt"
    source.write_bytes(pickle.dumps({"x": Hostile(marker)}))
    with pytest.raises(ModelError):
        convert(source)
    assert not marker.exists()


def test_tensors_larger_than_their_file_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "big.bin"
    torch.save({"x": torch.zeros(1).expand(1 << 16, 1 << 16)}, source)  # 16 GiB of one number
    assert source.stat().st_size < 1 << 14
    with pytest.raises(ModelError, match="more bytes than the file has"):
        convert(source)


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    plain, source = tmp_path / "plain.bin", tmp_path / "bomb.bin"
    torch.save({"x": torch.zeros(1 << 20)}, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member), zipfile.ZIP_DEFLATED)
    with pytest.raises(ModelError, match="compressed"):
        convert(source)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"a": 1}, "no tensors"),
        ({"a": {"b": torch.zeros(1)}, "a.b": torch.zeros(1)}, "two tensors"),
        ({"a": torch.zeros(3).to_sparse()}, "sparse"),
    ],
)
def test_what_has_no_place_in_the_result_is_refused(tmp_path: Path, data: Any, message: str) -> None:
    source = tmp_path / "x.pt"
    torch.save(data, source)
    with pytest.raises(ModelError, match=message):
        convert(source)


def test_endless_nesting_is_refused(tmp_path: Path) -> None:
    data: Any = torch.zeros(1)
    for _ in range(40):
        data = {"a": data}
    torch.save(data, tmp_path / "deep.pth")
    with pytest.raises(ModelError, match="nested"):
        convert(tmp_path / "deep.pth")


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    good = tmp_path / "good.bin"
    torch.save(CHECKPOINT, good)
    for name, content in (("cut.bin", good.read_bytes()[:-400]), ("text.bin", b"hello"), ("empty.bin", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError):
            convert(tmp_path / name)
    (tmp_path / "x.safetensors").write_bytes(b"")
    for name in ("x.safetensors", "none.bin"):
        with pytest.raises((ModelError, OutputError)):
            convert(tmp_path / name, tmp_path / "out.safetensors")
    with pytest.raises(OutputError, match="no folder"):
        convert(good, tmp_path / "none" / "out.safetensors")
    with pytest.raises(OutputError, match=r"must be a \.safetensors"):
        convert(good, tmp_path / "out.bin")


def test_the_command(cli: Cli, workdir: Path) -> None:
    torch.save(CHECKPOINT, workdir / "model.bin")
    ran = cli("models", "convert", "model.bin", "--json")
    assert ran.code == 0, ran.err
    data = json.loads(ran.out)
    assert (data["status"], data["tensors"], data["left_out"]) == ("ok", 4, 1)
    again = cli("models", "convert", "model.bin")
    assert again.code == 6
    assert "--overwrite" in again.err
    assert cli("models", "convert", "model.bin", "--overwrite").code == 0
    torch.save(Hostile(workdir / "ran"), workdir / "evil.bin")
    evil = cli("models", "convert", "evil.bin", "-o", "evil.safetensors")
    assert evil.code == 4
    assert "refused" in evil.err
    assert not (workdir / "ran").exists()
    assert cli("models", "convert", "none.bin").code == 4


def test_methods_that_cannot_be_had_say_why(cli: Cli) -> None:
    data = json.loads(cli("methods", "list", "--json").out)
    assert "neither code nor weights" in data["not_available"]["customcontrast"]
    shown = cli("methods", "show", "customcontrast")
    assert shown.code == 0
    assert "customcontrast is not available: CustomContrast" in shown.out
    assert "customcontrast" in cli("methods", "list").out
    ran = cli("models", "check", "TINY", "--attention", "customcontrast")
    assert ran.code == 2
    assert "neither code nor weights" in ran.err
