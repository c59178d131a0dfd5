"""`gensparse calibrate`: a profile on disk, or one line that says why not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gensparse.methods.profile import Profile

Cli = Callable[..., tuple[int, str, str]]
RUN = ("calibrate", "TINY", "--steps", "1", "--rows", "4")


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading weights is an error."""

    def loader(*_: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("gensparse.engine.session.load_pipeline", loader)


def test_a_profile_is_written_and_auto_reads_it(cli: Cli) -> None:
    ran = cli(*RUN, "-p", "a red circle", "--size", "32x48", "--size", "64", "-o", "own.json", "--json")
    assert ran.code == 0, ran.err
    said = json.loads(ran.out)
    grids = [entry.grid for entry in Profile.load("own.json").grids]
    assert (said["status"], said["profile"]) == ("ok", "own.json")
    assert [tuple(grid) for grid in said["grids"]] == grids
    assert {(1, 12, 8), (1, 16, 16)} <= set(grids)  # and the smaller stages that lead to them
    method = "auto:profile=own.json,dense_below=0,error=1.0"
    checked = cli("models", "check", "TINY", "--attention", method, "--size", "64", "--json")
    assert checked.code == 0, checked.err
    assert json.loads(checked.out)["parts"][0]["sparse"] == 2


def test_the_table_names_grids_and_windows(cli: Cli) -> None:
    ran = cli(*RUN, "-p", "a red circle")
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[-1] == "attention_profile.json"
    assert "radius" in ran.out
    assert Path("attention_profile.json").is_file()


def test_existing_profiles_are_kept(cli: Cli, no_weights: None) -> None:
    Path("own.json").write_text("mine")
    ran = cli(*RUN, "-p", "a red circle", "-o", "own.json")
    assert ran.code == 6
    assert "own.json" in ran.err
    assert Path("own.json").read_text() == "mine"


def test_overwrite_has_to_be_said(cli: Cli) -> None:
    Path("own.json").write_text("mine")
    assert cli(*RUN, "-p", "a red circle", "-o", "own.json", "--overwrite").code == 0
    assert Profile.load("own.json").grids


def test_an_unknown_model_is_exit_4(cli: Cli) -> None:
    ran = cli("calibrate", "no-such", "-p", "a star")
    assert ran.code == 4
    assert not list(Path().iterdir())


def test_nothing_to_draw_is_exit_2(cli: Cli, no_weights: None) -> None:
    ran = cli(*RUN)
    assert ran.code == 2
    assert "--prompt" in ran.err


@pytest.mark.parametrize("flags", [("--steps", "0"), ("--rows", "0"), ("--size", "nan"), ("--dtype", "fp8")], ids=str)
def test_values_out_of_range_are_exit_2(cli: Cli, flags: tuple[str, str]) -> None:
    ran = cli("calibrate", "TINY", "-p", "a star", *flags)
    assert ran.code == 2, ran.err
    assert not list(Path().iterdir())
