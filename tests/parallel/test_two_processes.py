"""Two processes share attention calls: this one and a partner, both doing all of `cases.CASES`."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gensparse.errors import ConfigError
from gensparse.layout import Layout
from gensparse.parallel import Team, ulysses

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Results of both processes by case."""
    folder = tmp_path_factory.mktemp("team")
    store, file = folder / "store", folder / "results.json"
    command = [sys.executable, "-P", str(HERE / "cases.py"), str(store), str(file)]
    with (folder / "log").open("w+") as log:
        partner = subprocess.Popen(command, stdout=log, stderr=log)
        sys.path.insert(0, str(HERE))
        try:
            import cases

            while not file.with_suffix(".ready").exists():  # its imports may take long
                assert partner.poll() is None
                time.sleep(0.1)
            mine = cases.run_all(0, str(store))
            assert partner.wait(timeout=120) == 0
            yield mine, json.loads(file.read_text())
        except Exception as error:
            log.seek(0)
            raise AssertionError(f"the partner said: {log.read()[-2000:]}") from error
        finally:
            sys.path.remove(str(HERE))
            partner.kill()


def ended(both: tuple[dict[str, Any], dict[str, Any]], name: str) -> list[dict[str, Any]]:
    results = [process[name] for process in both]
    assert all("error" not in result for result in results), results
    return results


@pytest.mark.parametrize("name", ["wan", "flux", "pooled_keys", "heads_of_their_own", "chosen_at_run_time"])
def test_two_processes_give_the_picture_of_one(both: Any, name: str) -> None:
    for result in ended(both, name):
        assert result["difference"] <= 1e-5
        assert result["effect"] > 0.01
        layers = {"wan": {"dense layer": 1}}.get(name, {})
        assert result["report"]["calls"]["dense"] == layers
        assert result["report"]["sparse"] >= 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_few_heads", "ConfigError: 3 attention heads cannot be divided among 2 processes"),
        ("ring", "ConfigError: Ring attention"),
        ("other_sizes", "ParallelError: Process"),
        ("other_seeds", "different inputs of equal shape"),
        ("other_strips", "is about to compute strips of Disc"),
    ],
)
def test_what_cannot_work_is_said_in_every_process_before_it_waits(both: Any, name: str, message: str) -> None:
    for process in both:
        assert message in process[name]["error"]


def test_under_tensor_parallelism_heads_keep_what_is_theirs(both: Any) -> None:
    for result in ended(both, "tensor_parallel"):
        assert max(result) <= 1e-5


def test_parts_and_heads_may_be_uneven(both: Any) -> None:
    assert all(process["uneven"] <= 1e-6 for process in both)


def test_strips_of_rows_give_the_attention_of_one_process(both: Any) -> None:
    for process in both:
        assert len(process["strips_of_rows"]) == 4
        assert max(process["strips_of_rows"]) <= 2e-6


def test_a_missing_process_is_named(both: Any) -> None:
    assert "Process 1 of 2 did not come within 0.2 s" in both[0]["a_missing_process"]["error"]


def test_exchanges_are_undone_and_differentiable(both: Any) -> None:
    for process in both:
        assert process["there_and_back"] == [True] * 4


def test_text_and_picture_are_divided_each_on_its_own() -> None:
    layout = Layout.joint((1, 4, 6), text=5, references=[(1, 2, 3)])
    assert ulysses.streams(layout) == (1, 2)
    parts = ulysses.divided(layout, 3)
    assert parts.shares() == (2 + 10, 2 + 10, 1 + 10)
    assert sum(parts.shares()) == layout.tokens
    assert layout.shares() == (layout.tokens,)
    with pytest.raises(ConfigError, match="parts=6"):
        ulysses.divided(layout, 6)


@pytest.mark.parametrize(("heads", "size", "uneven"), [(3, 2, False), (1, 2, True), (2, 4, False)])
def test_heads_that_cannot_be_divided_are_refused(heads: int, size: int, uneven: bool) -> None:
    with pytest.raises(ConfigError, match=f"{heads} attention heads cannot be divided among {size} processes"):
        Team(None, 0, size, uneven).share(heads)
