"""`gensparse bench` and `gensparse tune` with tiny work."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gensparse.bench import cases as registry
from gensparse.bench import contenders, cpu, gpu, record
from gensparse.bench.cases import BenchCase, register_case
from gensparse.errors import ConfigError
from gensparse.layout import Layout
from gensparse.patterns import Disc, Text

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """One small case in each suite, instead of the real ones."""
    monkeypatch.setattr(registry, "_CASES", {})
    for suite in registry.SUITES:
        register_case(
            f"tiny_{suite}",
            suite=suite,
            pattern=Disc(5) | Text(),
            layout=Layout.image(40, 32, text=9),
            heads=2,
            dim=16,
            small=Layout.image(13, 11, text=3),
            small_pattern=Disc(4) | Text(),
        )


def test_cases_are_listed(cli: Cli) -> None:
    ran = cli("bench", "list", "--json")
    assert ran.code == 0
    found = {row["case"]: row for row in json.loads(ran.out)["cases"]}
    assert found["flux4k_clear_r16"]["tokens"] == str(256 * 256 + 512)
    assert found["wan720_window"]["tokens"] == "75600"
    assert {row["suite"] for row in found.values()} == {"kernels", "cpu"}


def test_kernels_without_a_gpu_check_and_say_so(cli: Cli, tiny: None, workdir: Path) -> None:
    ran = cli("bench", "kernels", "--out", "results")
    assert ran.code == 0
    assert "Timings need a GPU" in ran.out
    rows = list(csv.DictReader((workdir / "results" / "kernels.csv").open()))
    assert {row["contender"] for row in rows} == {"plan_loop", "halo"}
    assert all(0 < float(row["error"]) < 1e-5 and not row["seconds"] for row in rows)
    assert all(row["machine"] and row["torch"] == torch.__version__ for row in rows)
    again = cli("bench", "kernels", "--case", "tiny_k*", "--json", "--out", "results")
    data = json.loads(again.out)
    assert data["device"] == "cpu"
    assert data["message"].startswith("Timings need a GPU")
    assert len(list(csv.DictReader((workdir / "results" / "kernels.csv").open()))) == 2 * len(rows)


def test_wrong_results_give_no_numbers(cli: Cli, tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = contenders.sparse_attention

    def broken(q, k, v, plan, **settings):
        out = real(q, k, v, plan, **settings)
        return out * 1.001 if settings["backend"] == "halo" else torch.empty_like(out)

    monkeypatch.setattr(contenders, "sparse_attention", broken)
    flags = ("--threads", "1", "--dtype", "fp32", "--rounds", "1", "--contender", "halo", "--contender", "plan_loop")
    ran = cli("bench", "cpu", "--case", "tiny_cpu", *flags, "--json")
    assert ran.code == 7
    rows = {row["contender"]: row for row in json.loads(ran.out.splitlines()[0])["rows"]}
    assert "relative error 0.001" in rows["halo"]["note"]
    assert "not finite" in rows["plan_loop"]["note"]
    assert not any("seconds" in row for row in rows.values())
    ran = cli("bench", "kernels")
    assert ran.code == 7
    assert "2 results are wrong" in ran.err


def test_cpu_rows_hold_ratios(cli: Cli, tiny: None, workdir: Path) -> None:
    flags = ("--threads", "1", "--dtype", "fp32", "--dtype", "bf16", "--rounds", "2", "--contender", "dense")
    ran = cli("bench", "cpu", "--case", "tiny_cpu", *flags, "--contender", "halo", "--out", "results", "--json")
    assert ran.code == 0
    rows = json.loads(ran.out)["rows"]
    assert [(row["contender"], row["dtype"]) for row in rows] == [
        ("dense", "fp32"), ("halo", "fp32"), ("dense", "bf16"), ("halo", "bf16"),
    ]  # fmt: skip
    for row in rows:
        assert row["seconds"] > 0
        assert row["cpu_seconds"] > 0
        assert row["useful_tflops"] <= row["visited_tflops"]
        assert row["peak_share"] > 0
        assert row["extra_bytes"] is None or row["extra_bytes"] >= 0
    assert rows[0]["times_dense"] == 1
    assert rows[0]["visited_to_useful"] == pytest.approx(1 / rows[0]["density"])
    header, *lines = (workdir / "results" / "cpu_kernels.csv").read_text().splitlines()
    assert header == ",".join(record.FIELDS)
    assert len(lines) == 4
    assert torch.get_num_threads() >= 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("cpu", "--tokens", "100"), "--tokens is 100"),
        (("cpu", "--threads", "0"), "--threads is 0"),
        (("cpu", "--dtype", "fp8"), "--dtype is 'fp8'"),
        (("cpu", "--contender", "fa9"), "--contender is 'fa9'"),
        (("cpu", "--rounds", "0"), "--rounds and --limit"),
        (("cpu", "--case", "cpu4097"), "unknown case of `gensparse bench cpu` 'cpu4097'"),
        (("kernels", "--case", "flux4k_clear_r17"), "did you mean flux4k_clear_r16"),
        (("kernels", "--stage", "hot"), "--stage is 'hot'"),
        (("kernels", "--dtype", "int8"), "--dtype is 'int8'"),
        (("kernels", "--seconds", "0"), "--seconds is 0"),
        (("aot", "--arch", "sm_91"), "unknown architecture 'sm_91'"),
        (("cpu", "--quick", "--against", "no-such-revision"), "cannot be checked out"),
        (("cpu", "--quick", "--against", "--force"), "is not allowed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_values_are_usage_errors(
    cli: Cli, words: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "run_cpu", lambda bench, say: iter(()))
    ran = cli("bench", *words)
    assert ran.code == 2
    assert message in " ".join(ran.err.split())
    assert ran.out == ""


def test_an_existing_file_of_another_kind_is_not_touched(cli: Cli, tiny: None, workdir: Path) -> None:
    (workdir / "kernels.csv").write_text("a,b\n1,2\n")
    ran = cli("bench", "kernels", "--out", ".")
    assert ran.code == 6
    assert (workdir / "kernels.csv").read_text() == "a,b\n1,2\n"


def test_names_are_registered_once() -> None:
    case = registry._CASES["flux4k_clear_r16"]
    with pytest.raises(ConfigError, match="'flux4k_clear_r16' exists"):
        register_case(case.name, suite="cpu", pattern=case.pattern, layout=case.layout, heads=1, dim=8)


@pytest.mark.parametrize("case", registry._CASES.values(), ids=lambda case: case.name)
def test_small_layouts_are_awkward_and_sparse(case: BenchCase) -> None:
    share = case.small_pattern.bind(case.small).dense_mask().mean()
    assert share < 0.8 or case.name == "density_100"
    assert case.small.tokens % 64
    assert case.small.tokens < 1000


def test_the_gpu_protocol_on_a_machine_without_one(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage with the CPU in the place of the GPU: what is measured, compared and refused."""
    monkeypatch.setattr(gpu, "ours", lambda name: contenders.ours("halo"))
    monkeypatch.setattr(gpu, "gpu_seconds", lambda run, sets: (len([run(*x) for x in sets]), 0.002)[1])
    monkeypatch.setattr(gpu, "gpu_extra_bytes", lambda run: (run(), 1 << 20)[1])
    rival = contenders.ours("plan_loop")._replace(name="rival", on_small=False)
    monkeypatch.setattr(gpu, "flex_attention", lambda block, tiles: rival)
    monkeypatch.setattr(gpu, "dense", lambda name: contenders.dense())
    bench = gpu.KernelBench(("dense", "ours", "flex"), dtype="fp32", device="cpu")
    (case,) = registry.cases("kernels")
    rows = list(gpu._run_case(bench, case, gpu.Clock(60), lambda text: None))
    assert [row["contender"] for row in rows] == [
        "triton_small", "dense", "dense", "halo", "rival", "rival", "rival", "natten",
    ]  # fmt: skip
    assert "seconds" not in rows[0]
    assert rows[0]["error"] < 1e-5
    for row in rows[1:-1]:
        assert row["times_dense"] == 1
        assert row["extra_bytes"] == 1 << 20
    assert all(row["error"] < 1e-5 for row in rows[4:-1])
    assert rows[-1]["note"]
    assert len(gpu.table_rows(rows)[0]) == len(gpu.HEADER)
    late = list(gpu._run_case(bench, case, gpu.Clock(-1), lambda text: None))
    assert {row.get("note") for row in late[1:]} == {"not started: the time limit was reached"}


def test_tune_needs_a_gpu(cli: Cli) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    ran = cli("tune")
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.startswith("error: tuning times kernels on a GPU and this machine has none")
    assert len(ran.err.splitlines()) == 2


def test_tune_lists_what_it_would_try(cli: Cli) -> None:
    ran = cli("tune", "--dry-run", "--head-dim", "40", "--kernel", "forward", "--json")
    assert ran.code == 0
    (cell,) = json.loads(ran.out)["cells"]
    assert (cell["kernel"], cell["head dim"]) == ("forward", "64")
    assert int(cell["configs"]) > 4
    assert cli("tune", "--head-dim", "300").code == 2
    assert cli("tune", "--kernel", "backward").code == 2
    assert cli("tune", "--dtype", "fp8").code == 2
    assert cli("tune", "--seconds", "0").code == 2


def test_the_gate_writes_its_table_and_fails_when_a_build_does(
    cli: Cli, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from gensparse.bench import aot

    good = aot.Build("merge", "sm_90", "bfloat16", 64, aot.HELPER)
    bad = aot.Build("sum", "sm_90", "bfloat16", 64, aot.Config(16, 32, 3, 1))
    monkeypatch.setattr(aot, "shipped_builds", lambda archs, full: [good])
    ran = cli("bench", "aot", "--arch", "sm_90", "--out", "tables", "--json")
    assert ran.code == 0
    assert json.loads(ran.out)["passed"] == 1
    monkeypatch.setattr(aot, "shipped_builds", lambda archs, full: [good, bad])
    ran = cli("bench", "aot", "--out", "tables")
    assert ran.code == 1
    assert "1 of 2 builds pass" in ran.err
    rows = list(csv.DictReader((workdir / "tables" / "aot.csv").open()))
    assert [row["verdict"][:16] for row in rows] == ["pass", "does not compile"]
    assert int(rows[0]["registers"]) > 8
    assert all(row["triton"] and row["arch"] == "sm_90" for row in rows)


def test_quality_measures_baselines_without_a_model(cli, workdir) -> None:
    flags = ("bench", "quality", "--out", "run", "--size", "native", "--limit", "1", "--baselines")
    ran = cli(*flags)
    assert ran.code == 0, ran.err
    assert "| native | rendering | 1 |" in ran.out
    again = cli(*flags, "--json")
    assert json.loads(again.out)["tables"] == "run/quality.md"
    assert "right" not in again.err  # nothing was measured again


@pytest.mark.parametrize("flag", [("--size", "77"), ("--contender", "claer"), ("--dtype", "fp8"), ("--limit", "0")])
def test_quality_refuses_what_it_does_not_know(cli, workdir, flag: tuple) -> None:
    assert cli("bench", "quality", "--out", "run", *flag).code == 2


def test_subjects_measures_drawings_without_a_model(cli, workdir) -> None:
    flags = ("bench", "subjects", "--run", "run", "--methods", "rendering", "--limit", "1")
    ran = cli(*flags)
    assert ran.code == 0, ran.err
    assert "| rendering | 1 | 100 (100..100) |" in ran.out
    again = cli(*flags, "--json")
    assert json.loads(again.out)["rows"] == "run/subjects.csv"
    assert "good" not in again.err  # nothing was measured again


@pytest.mark.parametrize(
    "flag",
    [
        ("--size", "77"),
        ("--methods", "masactrl"),
        ("--attention", "claer"),
        ("--dtype", "fp8"),
        ("--limit", "0"),
        ("--device", "tpu"),
        ("--workers", "0"),
    ],
)
def test_subjects_refuses_what_it_does_not_know(cli, workdir, flag: tuple) -> None:
    assert cli("bench", "subjects", "--run", "run", *flag).code == 2
