"""The user's table: written in one step, checked, and read by the next lookup."""

import json
import os
from pathlib import Path

import pytest

from gensparse.bench import tuning
from gensparse.errors import ConfigError, OutputError
from gensparse.kernels.triton import tune
from gensparse.kernels.triton.tune import Case, Config, config_for, shipped_config, write_user_table

CASE = Case("forward", "sm_90", "bfloat16", 128, partial=True, bias=False, tile_m=128, tile_n=64)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(tune.FOLDER, str(tmp_path))
    return tmp_path


def row(**change):
    shape = {"BM": 64, "BN": 32, "num_warps": 8, "num_stages": 4, "loader": "rows"}
    return {"kernel": "forward", "dtype": "bf16", "dim": 128, **shape, "seconds": 1e-3, **change}


def test_written_entries_come_first_and_are_read_at_once(folder: Path) -> None:
    shipped = config_for(CASE)
    path = write_user_table("sm_90", [tuning.entry(row())], {"machine": "test"})
    assert path == folder / "triton" / "sm_90.json"
    assert config_for(CASE) == Config(64, 32, 8, 4) != shipped
    assert shipped_config(CASE) == shipped
    write_user_table("sm_90", [tuning.entry(row(kernel="dq")), tuning.entry(row(BM=32))], {})
    assert config_for(CASE).BM == 32
    table = json.loads(path.read_text())
    assert [(entry["kernel"], entry["BM"]) for entry in table["entries"]] == [("dq", 64), ("forward", 32)]
    assert all(entry["measured"] is True for entry in table["entries"])
    assert os.listdir(path.parent) == ["sm_90.json"], "nothing is left behind"


def test_wrong_entries_and_tables_are_not_written_over(folder: Path) -> None:
    with pytest.raises(ConfigError, match="the new table entry 0: BM=48"):
        write_user_table("sm_90", [tuning.entry(row(BM=48))], {})
    assert not (folder / "triton").exists()
    (folder / "triton").mkdir()
    (folder / "triton" / "sm_90.json").write_text("{")
    with pytest.raises(ConfigError, match="is no JSON"):
        write_user_table("sm_90", [tuning.entry(row())], {})
    assert (folder / "triton" / "sm_90.json").read_text() == "{"


def test_a_folder_that_cannot_be_written_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").write_text("")
    monkeypatch.setenv(tune.FOLDER, str(folder / "file"))
    with pytest.raises(OutputError, match="GENSPARSE_CONFIG_DIR"):
        write_user_table("sm_90", [tuning.entry(row())], {})


def test_an_interrupted_write_leaves_the_old_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_user_table("sm_90", [tuning.entry(row())], {})
    before = path.read_text()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tune.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_user_table("sm_90", [tuning.entry(row(BM=32))], {})
    assert path.read_text() == before
    assert os.listdir(path.parent) == ["sm_90.json"]


def test_the_fastest_row_of_every_cell_wins() -> None:
    rows = [row(), row(BM=32, seconds=5e-4), row(BM=16, seconds=None), row(kernel="dq", note="failed", seconds=None)]
    assert [(item["kernel"], item["BM"]) for item in tuning.best(rows)] == [("forward", 32)]


@pytest.mark.parametrize("dtype", tuning.DTYPES)
@pytest.mark.parametrize("kernel", tune.KERNELS)
@pytest.mark.parametrize("dim", tune.DIMS)
def test_there_are_valid_candidates_everywhere(dtype: str, kernel: str, dim: int) -> None:
    found = tuning.candidates(dtype, kernel, dim)
    assert 3 <= len(found) == len(set(found)) <= 40
    entries = [tuning.entry(row(BM=c.BM, BN=c.BN, num_warps=c.num_warps, num_stages=c.num_stages)) for c in found]
    assert len(tune.checked_table({"entries": entries}, "candidates")) == len(found)
