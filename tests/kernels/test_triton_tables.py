"""What the Triton engine answers without a GPU: refusals, config tables, the user's own table."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gensparse.errors import ConfigError
from gensparse.kernels import triton as engine
from gensparse.kernels.need import Need
from gensparse.kernels.triton import tune
from gensparse.kernels.triton.tune import ARCHS, DIMS, KERNELS, Case, Config, config_for, padded_dim

NEED = Need(torch.bfloat16, "cuda", 128, queries=4608, keys=4608, density=0.3, arch="sm_90")
CASE = Case("forward", "sm_90", "bfloat16", 128, partial=True, bias=False, tile_m=128, tile_n=64)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"device": "cpu", "arch": ""}, "the tensors are on the CPU and the kernels need a CUDA or ROCm device."),
        ({"device": "mps", "arch": ""}, "the tensors are on 'mps' and the kernels need a CUDA or ROCm device."),
        ({"arch": "sm_75"}, "this GPU is sm_75 and sm_80 (Ampere) or newer is needed."),
        ({"head_dim": 257}, "the head dimension is 257 and at most 256 fits."),
        ({"dtype": torch.float64}, "the dtype is torch.float64 and the kernels take float16, bfloat16 and float32."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals_are_one_sentence(change, sentence, monkeypatch):
    monkeypatch.setattr(engine, "installed", lambda: (3, 7))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert engine.why_not(NEED) is None
    assert engine.why_not(replace(NEED, arch="gfx942")) is None
    assert engine.why_not(replace(NEED, **change)) == f"Can't run triton; {sentence}"


def test_a_missing_or_old_triton_is_a_refusal(monkeypatch):
    monkeypatch.setattr(engine, "installed", lambda: None)
    assert engine.why_not(NEED) == "Can't run triton; it is not installed: pip install triton."
    monkeypatch.setattr(engine, "installed", lambda: (2, 1))
    assert engine.why_not(NEED) == "Can't run triton; version 2.1 is installed and 3.3 or newer is needed."


def test_the_interpreter_takes_cpu_tensors(monkeypatch):
    monkeypatch.setattr(engine, "installed", lambda: (3, 7))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert engine.why_not(replace(NEED, device="cpu", arch="")) is None


@pytest.mark.parametrize("arch", ARCHS)
def test_every_shipped_table_answers_every_case_and_says_that_no_gpu_ran_it(arch):
    table = json.loads((Path(tune.__file__).parent / "configs" / f"{arch}.json").read_text())
    assert table["arch"] == arch
    for entry in tune.checked_table(table, arch):
        assert entry["measured"] is False
        assert entry["source"] == "derived"
    for kernel in KERNELS:
        for dtype in ("float16", "bfloat16", "float32"):
            for dim in DIMS:
                case = Case(kernel, arch, dtype, dim, partial=True, bias=True, tile_m=128, tile_n=64)
                config = config_for(case)
                assert 128 % config.BM == 0
                assert 64 % config.BN == 0


def test_configs_shrink_to_the_tiles_of_a_plan():
    small = config_for(replace(CASE, tile_m=32, tile_n=32))
    assert (small.BM, small.BN) == (32, 32)


def test_a_smaller_config_never_grows():
    config = Config(128, 64, 8, 3)
    for _ in range(6):
        smaller = config.smaller()
        assert smaller.BM <= config.BM
        assert smaller.BN <= config.BN
        assert smaller.num_warps <= config.num_warps
        assert smaller.num_stages == 1
        config = smaller
    assert config == config.smaller()


def test_newer_and_unknown_architectures_take_the_nearest_older_table():
    for arch, known in {
        "sm_86": "sm_80",
        "sm_103": "sm_100",
        "sm_121": "sm_120",
        "gfx950": "gfx942",
        "cpu": "sm_80",
    }.items():
        assert config_for(replace(CASE, arch=arch)) == config_for(replace(CASE, arch=known))


def test_padded_dimensions():
    assert [padded_dim(dim) for dim in (1, 16, 17, 40, 64, 72, 160, 256)] == [16, 16, 32, 64, 64, 128, 256, 256]


def entry(**change):
    return {"BM": 64, "BN": 32, "num_warps": 4, "num_stages": 2, "loader": "rows", **change}


@pytest.fixture
def user_table(tmp_path, monkeypatch):
    """Writes a table of the user for sm_90."""
    monkeypatch.setenv(tune.FOLDER, str(tmp_path))
    (tmp_path / "triton").mkdir()
    return lambda text: (tmp_path / "triton" / "sm_90.json").write_text(text)


def test_the_users_table_comes_first_and_only_where_it_matches(user_table):
    shipped = config_for(replace(CASE, arch="sm_100"))
    user_table(json.dumps({"entries": [entry(kernel="forward", dtype=["bfloat16"], dim=128, bias=False)]}))
    assert config_for(CASE) == Config(64, 32, 4, 2)
    assert config_for(replace(CASE, bias=True)) != Config(64, 32, 4, 2)
    assert config_for(replace(CASE, arch="sm_100")) == shipped


def test_boxes_are_made_where_a_table_asks_for_them(user_table):
    user_table(json.dumps({"entries": [entry(kernel="forward", dim=128, loader="boxes")]}))
    assert [arch for arch in ARCHS if tune.uses(arch, "boxes")] == ["sm_90"]
    assert all(tune.uses(arch, "rows") for arch in ARCHS)
    assert config_for(CASE) == Config(64, 32, 4, 2, "boxes")
    assert config_for(CASE).smaller().loader == "rows"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("{}", "has no list 'entries'"),
        (json.dumps({"entries": [entry(BM=48)]}), r"entry 0: BM=48 is not one of"),
        (json.dumps({"entries": [entry(num_stages=0)]}), "num_stages=0 is not between 1 and 8"),
        (json.dumps({"entries": [entry(loader="best")]}), "loader='best'"),
        (json.dumps({"entries": [entry(loader=["rows"])]}), r"loader=\['rows'\] is not one of \('rows', 'boxes'\)"),
        (json.dumps({"entries": [entry(loader="boxes")]}), r"loader='boxes' serves \('forward',\) and not"),
        (json.dumps({"entries": [entry(loader="boxes", kernel="dq")]}), r"serves \('forward',\) and not \['dq'\]"),
        (json.dumps({"entries": [3]}), "3 is no object"),
    ],
)
def test_a_broken_table_of_the_user_is_named(user_table, text, message):
    user_table(text)
    with pytest.raises(ConfigError, match=message):
        config_for(CASE)


@pytest.mark.parametrize(
    ("platform", "variable", "tail"),
    [("linux", "XDG_CONFIG_HOME", "gensparse"), ("win32", "APPDATA", "gensparse"), ("darwin", None, "gensparse")],
)
def test_tables_lie_in_the_platforms_folder(monkeypatch, tmp_path, platform, variable, tail):
    monkeypatch.delenv(tune.FOLDER, raising=False)
    monkeypatch.setattr(tune.sys, "platform", platform)
    if variable:
        monkeypatch.setenv(variable, str(tmp_path))
        assert tune.user_folder() == tmp_path / tail
    else:
        assert tune.user_folder().name == tail
