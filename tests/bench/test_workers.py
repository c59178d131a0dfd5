"""Processes that share a measurement: nothing is done twice, nothing lost, and a failure is told."""

import json
from pathlib import Path

import pytest

from gensparse.bench.pictures import Item, prompts
from gensparse.bench.quality import Options, items, run_quality, work
from gensparse.bench.store import Store
from gensparse.bench.workers import share_work
from gensparse.errors import ConfigError, ParallelError

CREW = """
import os
from gensparse.errors import ConfigError

def write(folder, number, say):
    (folder / str(number)).write_text(str(os.getpid()))
    say(f"worker {number}")

def refuse(folder, number, say):
    if number == 1:
        raise ConfigError("the second has no oar")
    write(folder, number, say)

def stumble(folder, number, say):
    if number == 0:
        os._exit(7)
    if number == 2:
        raise ZeroDivisionError("no wind")
    write(folder, number, say)
"""


@pytest.fixture
def crew(tmp_path, monkeypatch):
    """Functions that new processes can import too."""
    (tmp_path / "rowing_crew.py").write_text(CREW, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    import rowing_crew

    yield rowing_crew
    monkeypatch.delitem(__import__("sys").modules, "rowing_crew")


@pytest.fixture
def boat(tmp_path) -> Path:
    (tmp_path / "boat").mkdir()
    return tmp_path / "boat"


def pids(boat: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in boat.iterdir()}


def test_every_worker_is_a_process_of_its_own(crew, boat):
    said: list[str] = []
    share_work(crew.write, boat, 3, said.append)
    assert sorted(said) == ["worker 0", "worker 1", "worker 2"]
    assert set(pids(boat)) == {"0", "1", "2"}
    assert len(set(pids(boat).values())) == 3


def test_a_single_worker_is_this_process(crew, boat):
    import os

    share_work(crew.write, boat, 1, [].append)
    assert pids(boat) == {"0": str(os.getpid())}


def test_what_one_worker_refuses_is_told_when_the_others_are_done(crew, boat):
    with pytest.raises(ConfigError, match="no oar"):
        share_work(crew.refuse, boat, 3, [].append)
    assert set(pids(boat)) == {"0", "2"}


def test_workers_that_fall_silent_or_fail_are_missed(crew, boat):
    with pytest.raises(ParallelError, match=r"ended with code 7|no wind"):
        share_work(crew.stumble, boat, 3, [].append)
    assert set(pids(boat)) == {"1"}


# ---------------------------------------------------------------- what they write


def row(number: int) -> dict:
    return {"key": f"native/rendering/{number}"}


def test_rows_of_all_workers_become_one_file(tmp_path):
    Store(tmp_path).add(row(0))
    for worker in (0, 1, 3):
        Store(tmp_path, worker).add(row(worker + 1))
    with (tmp_path / "items-1.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"key": "native/rend')  # an interrupted write
    again = Store(tmp_path, 1)
    assert len(again.rows) == 4
    again.add(row(9))  # what this worker had written before stays
    store = Store(tmp_path)
    store.merge()
    assert sorted(p.name for p in tmp_path.glob("items*")) == ["items.jsonl"]
    keys = [json.loads(line)["key"] for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert sorted(keys) == [row(n)["key"] for n in (0, 1, 2, 4, 9)]
    store.add(row(11))
    assert len(Store(tmp_path).rows) == 6


def test_workers_divide_the_prompts_and_keep_all_of_one_together(tmp_path):
    options = Options(tmp_path, limit=5, only="native", baselines=True, workers=3)
    shares = []
    for number in range(3):
        work(options, number, lambda text: None)
        lines = (tmp_path / f"items-{number}.jsonl").read_text().splitlines()
        shares.append({json.loads(line)["index"] for line in lines})
    assert shares == [{0, 3}, {1, 4}, {2}]
    assert {i.key for i in items(options)} == set(Store(tmp_path).rows)


def test_a_shared_run_goes_on_with_another_number_of_workers(tmp_path):
    few = Options(tmp_path, limit=3, only="native", baselines=True, workers=2)
    work(few, 1, lambda text: None)  # the other was interrupted before its first item
    said: list[str] = []
    text = run_quality(Options(tmp_path, limit=3, only="native", baselines=True), said.append)
    assert len(said) == 2  # the second prompt was there
    assert "| native | rendering | 3 |" in text
    assert not list(tmp_path.glob("items-*"))


def test_processes_share_a_run(tmp_path):
    said: list[str] = []
    text = run_quality(Options(tmp_path, limit=2, only="native", baselines=True, workers=2), said.append)
    assert len(said) == 2
    assert "| native | rendering | 2 |" in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"device": "tpu"}, "choose cpu or cuda"), ({"workers": 0}, "whole number from 1")],
    ids=["device", "workers"],
)
def test_other_devices_and_no_workers_are_refused(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        Options(tmp_path, **settings)


def test_a_gpu_that_is_not_there_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"cuda.*not available"):
        run_quality(Options(tmp_path / "run", limit=1, device="cuda"))
    assert not (tmp_path / "run").exists()


def test_the_device_decides_the_dtype_and_seconds_are_those_of_one_process(tmp_path):
    from gensparse.bench.measure import Use
    from gensparse.bench.pictures import Maker
    from gensparse.bench.quality import run_item
    from gensparse.embedded.reader import Reader

    assert Options(tmp_path).dtype == "float32"
    assert Options(tmp_path, device="cuda").dtype == "bfloat16"
    assert Options(tmp_path, device="cuda", dtype="float32").dtype == "float32"
    item = Item("native", "rendering", prompts(1)[0])
    for workers, seconds in ((1, 4.5), (2, None)):
        store = Store(tmp_path)
        maker = Maker(Options(tmp_path, workers=workers), store)
        maker.used[item.key] = Use(seconds=4.5, cpu_seconds=3.25, peak_bytes=2**29)
        run_item(item, maker, Reader.load(), store, lambda text: None)
        assert store.rows[item.key]["seconds"] == seconds
        told = {name: store.rows[item.key][name] for name in ("device", "core_seconds", "peak_gib")}
        assert told == {"device": "cpu", "core_seconds": 3.25, "peak_gib": 0.5}
