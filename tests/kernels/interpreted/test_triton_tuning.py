"""Tuning with a stopwatch that does not look: configs are forced, checked, and refused when wrong."""

import time

import pytest

from gensparse.bench import tuning
from gensparse.errors import BackendError
from gensparse.kernels.triton import launch
from gensparse.kernels.triton.tune import Config
from gensparse.layout import Layout

CONFIGS = [Config(16, 16, 8, 1), Config(64, 64, 4, 2)]


@pytest.fixture(autouse=True)
def small_work(monkeypatch):
    monkeypatch.setattr(tuning, "candidates", lambda *_: CONFIGS)
    monkeypatch.setattr(tuning, "HEADS", {"small": 1, "large": 1})
    monkeypatch.setattr(tuning, "SMALL", Layout.image(7, 9, text=3))
    monkeypatch.setattr(tuning, "LARGE", Layout.image(5, 7, text=2))


def rows(kernel, timer=lambda run: (run(), 1.0)[1], seconds=600):
    return list(tuning.tune_cell("fp32", kernel, 16, time.monotonic() + seconds, "cpu", timer))


@pytest.mark.parametrize("kernel", ["forward", "dq", "dkv"])
def test_every_kernel_is_checked_and_timed_with_its_config(kernel, monkeypatch):
    used = []
    real = launch.launch

    def spy(case, run):
        def noted(config):
            used.append((case.kernel, config.BM, config.BN))
            run(config)

        real(case, noted)

    for name in ("forward", "backward"):
        module = __import__(f"gensparse.kernels.triton.{name}", fromlist=["launch"])
        monkeypatch.setattr(module, "launch", spy)
    found = rows(kernel)
    assert [(row["BM"], row["seconds"]) for row in found] == [(16, 1.0), (64, 1.0)]
    assert all(row["error"] < 1e-5 for row in found)
    assert {(bm, bn) for name, bm, bn in used if name == kernel} == {(16, 16), (64, 64)}


def test_wrong_and_failing_configs_are_not_timed(monkeypatch):
    error = tuning._Call.error
    monkeypatch.setattr(tuning._Call, "error", lambda self: error(self) + 1e-3)
    assert all("wrong: relative error" in row["note"] and "seconds" not in row for row in rows("forward"))

    def failing(self):
        raise BackendError("Can't run triton; out of resources")

    monkeypatch.setattr(tuning._Call, "error", failing)
    assert all("out of resources" in row["note"] for row in rows("forward"))


def test_nothing_is_started_after_the_limit():
    assert rows("forward", seconds=-1) == []


def test_launches_are_as_before_afterwards():
    before = launch.config_for
    with tuning.forced("forward", CONFIGS[0]):
        assert launch.config_for is not before
    assert launch.config_for is before
    with pytest.raises(TypeError), tuning.forced("forward", CONFIGS[0]):
        len(None)
    assert launch.config_for is before
