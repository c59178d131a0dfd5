"""Bad input, hostile input and broken surroundings: exit codes, one line of cause, one of remedy, nothing half done."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fake_hub import make_folder, serve
from PIL import Image
from tiny_model import tiny_folder

from gensparse.cli.progress import Progress
from gensparse.image_io import read_metadata
from gensparse.request import SIZE_FORMS

Cli = Callable[..., tuple[int, str, str]]
TINY = ("-m", "TINY", "-s", "3")


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading weights is an error."""

    def loader(*_: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("gensparse.engine.session.load_pipeline", loader)


def shell(code: str, *arguments: object, **options: object) -> subprocess.CompletedProcess[bytes]:
    """Run Python code in a process of its own."""
    words = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, timeout=120, check=False, **options)


MAIN = "from gensparse.cli import main; main()"


# --------------------------------------------------------------------------------------------------------- 1, 2: sizes
def test_fault_01_sizes_round_and_say_so(cli: Cli) -> None:
    ran = cli("generate", "a star", *TINY, "--size", "33x47", "-o", "a.png")
    assert ran.code == 0
    assert "33x47 rounded to 32x48" in ran.err
    assert Image.open("a.png").size == (32, 48)


@pytest.mark.parametrize("size", ["33", "3840x2161"])
def test_fault_01_strict_sizes_are_refused(cli: Cli, no_weights: None, size: str) -> None:
    ran = cli("generate", "a star", *TINY, "--size", size, "--round", "strict")
    assert ran.code == 2
    assert "--round nearest" in ran.err


@pytest.mark.parametrize("size", ["0", "-1", "nan", "1e9", "4K x"])
@pytest.mark.parametrize("verb", [("generate", "a star"), ("plan",)], ids=lambda words: words[0])
def test_fault_02_bad_sizes_name_the_accepted_forms(cli: Cli, no_weights: None, verb: tuple, size: str) -> None:
    ran = cli(*verb, *TINY, f"--size={size}")
    assert ran.code == 2
    assert SIZE_FORMS in ran.err


@pytest.mark.parametrize("sides", [("--width", "64"), ("--width", "64", "--height", "64", "--size", "64")], ids=len)
def test_fault_02_sides_belong_together(cli: Cli, no_weights: None, sides: tuple) -> None:
    assert cli("generate", "a star", *TINY, *sides).code == 2


# ----------------------------------------------------------------------------------------------------------- 3: memory
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fault_03_plan_says_what_would_fit(cli: Cli, device: str) -> None:
    flags = ("-m", "flux.1-dev", "--size", "16384", "--max-vram", "24GiB", "--device", device)
    ran = cli("plan", *flags, "--attention", "dense")
    assert ran.code == 3
    assert "24.0 GiB are available" in ran.out
    assert ran.out.count("advice") >= 2
    assert json.loads(cli("plan", *flags, "--attention", "dense", "--json").out)["fits"] is False


def test_fault_03_generate_stops_before_loading(cli: Cli, no_weights: None) -> None:
    ran = cli("generate", "a star", *TINY, "--size", "16384", "--attention", "dense", "--max-vram", "2GiB")
    assert ran.code == 3
    assert "--size" in ran.err


# ---------------------------------------------------------------------------------------------------------- 4: numbers
@pytest.mark.parametrize(
    "flag",
    [
        "steps=0",
        "steps=1.5",
        "guidance=nan",
        "seed=-1",
        "num-images=0",
        "dtype=fp8",
        "dense-layers=a",
        "max-vram=lots",
        "device=tpu",
        "dense-steps=-1",
    ],
)
def test_fault_04_numbers_out_of_range_are_usage_errors(cli: Cli, no_weights: None, flag: str) -> None:
    ran = cli("generate", "a star", *TINY, f"--{flag}")
    assert ran.code == 2
    assert ran.err


def test_fault_04_strength_above_one_is_a_usage_error(cli: Cli, no_weights: None) -> None:
    Image.new("RGB", (8, 8)).save("in.png")
    assert cli("upscale", "in.png", *TINY, "--strength", "1.5").code == 2


def test_fault_04_dense_steps_are_clamped_with_a_warning(cli: Cli) -> None:
    ran = cli("generate", "a star", *TINY, "--steps", "1", "--dense-steps", "5", "--size", "64", "-o", "a.png")
    assert ran.code == 0
    assert "warning: --dense-steps 5" in ran.err


def test_fault_04_unknown_options_and_verbs_suggest(cli: Cli) -> None:
    ran = cli("generate", "a star", "--sise", "64")
    assert ran.code == 2
    assert "--size" in ran.err
    assert cli("genrate").code == 2


# ---------------------------------------------------------------------------------------------------------- 5: prompts
def test_fault_05_empty_prompt_only_where_it_means_something(cli: Cli) -> None:
    assert cli("generate", "", *TINY, "-o", "a.png").code == 0  # trained with empty prompts
    folder = Path("other")
    make_folder(folder)
    ran = cli("generate", "  ", "-m", "./other")
    assert ran.code == 2
    assert "empty" in ran.err


def test_fault_05_long_prompt_is_truncated_with_the_count(cli: Cli) -> None:
    Path("p.txt").write_text("red " * 25_000)
    ran = cli("generate", "--prompt-file", "p.txt", *TINY, "-o", "a.png")
    assert ran.code == 0
    assert "the model reads 16" in ran.err
    assert read_metadata("a.png")["prompt_omitted"] == "too long"


@pytest.mark.parametrize(
    "prompt", ["دائرة \u202e حمراء", "🌟" * 5, "a\tb\nc", "../../etc/passwd", "a; rm -rf ~ $(x) %s {0}"]
)
def test_fault_05_strange_prompts_are_kept_and_name_no_file(cli: Cli, workdir: Path, prompt: str) -> None:
    ran = cli("generate", "-p", prompt, *TINY)
    assert ran.code == 0, ran.err
    assert Path(ran.out.strip()).name == "0001.png"
    assert read_metadata(ran.out.strip())["request"]["prompt"] == prompt
    assert {p.name for p in workdir.iterdir()} == {"gensparse-out"}


def test_fault_05_nul_is_refused(cli: Cli, no_weights: None) -> None:
    Path("p.txt").write_bytes(b"a red\0circle")
    ran = cli("generate", "--prompt-file", "p.txt", *TINY)
    assert ran.code == 2
    assert "NUL" in ran.err


def test_fault_05_prompt_that_looks_like_a_flag(cli: Cli) -> None:
    assert cli("generate", *TINY, "-o", "a.png", "--", "--json -v red").code == 0
    assert read_metadata("a.png")["request"]["prompt"] == "--json -v red"


def test_fault_05_output_path_is_the_users_own(cli: Cli, workdir: Path) -> None:
    (workdir / "deep" / "er").mkdir(parents=True)
    os.chdir(workdir / "deep" / "er")
    assert cli("generate", "a star", *TINY, "-o", "../../x").code == 0
    assert (workdir / "x.png").is_file()


# ----------------------------------------------------------------------------------------------------------- 6: output
@pytest.mark.parametrize("output", ["no/such/a.png", "/proc/a.png", "file/a.png", "old.png"])
def test_fault_06_bad_outputs_are_found_before_loading(cli: Cli, no_weights: None, output: str) -> None:
    Path("file").write_text("")
    Path("old.png").write_text("precious")
    ran = cli("generate", "a star", *TINY, "-o", output)
    assert ran.code == 6
    assert "try:" in ran.err
    assert Path("old.png").read_text() == "precious"


def test_fault_06_overwrite_has_to_be_said(cli: Cli) -> None:
    Path("old.png").write_text("precious")
    assert cli("generate", "a star", *TINY, "-o", "old.png", "--overwrite").code == 0
    assert Image.open("old.png").size == (32, 32)


def test_fault_06_disk_full_leaves_no_half_picture(cli: Cli, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("gensparse.image_io.os.fsync", full)
    ran = cli("generate", "a star", *TINY, "-o", "a.png")
    assert ran.code == 6
    assert "No space left" in ran.err
    assert not [p for p in workdir.iterdir() if p.is_file()]


def test_fault_06_formats_that_cannot_hold_the_size_are_refused(cli: Cli, no_weights: None) -> None:
    ran = cli("generate", "a star", *TINY, "--size", "16384x64", "--attention", "dense", "-o", "a.webp")
    assert ran.code == 2
    assert "16383" in ran.err


# ---------------------------------------------------------------------------------------------------------- 8: signals
def test_fault_08_ctrl_c_stops_after_the_step_and_the_run_resumes(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = cli("generate", "a star", *TINY, "--size", "128", "-o", "whole.png")
    assert whole.code == 0
    original = Progress.on_event

    def press(self: Progress, event: object) -> None:
        original(self, event)
        if event.phase == "step" and (event.stage, event.step) == (1, 1):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Progress, "on_event", press)
    ran = cli("generate", "a star", *TINY, "--size", "128", "-o", "a.png")
    assert ran.code == 130
    assert "Traceback" not in ran.err
    assert not Path("a.png").exists()
    monkeypatch.setattr(Progress, "on_event", original)
    ran = cli("generate", "a star", *TINY, "--size", "128", "-o", "a.png")
    assert ran.code == 0
    assert "stage 1/3" not in ran.err
    assert np.array_equal(np.asarray(Image.open("a.png")), np.asarray(Image.open("whole.png")))


def test_fault_08_ctrl_c_while_writing_finishes_the_picture(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Progress.on_event

    def press(self: Progress, event: object) -> None:
        original(self, event)
        if event.phase == "write":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Progress, "on_event", press)
    ran = cli("generate", "a star", *TINY, "--num-images", "3", "-o", "out/")
    assert ran.code == 130
    assert ran.out.split() == ["out/0001.png"]
    assert read_metadata("out/0001.png")


BUSY = """
import sys, time
from gensparse import engine
from gensparse.cli import main
class Runner:
    def execute(self, request, output, on_event, cancel):
        on_event(engine.Event("start"))
        print("ready", flush=True)
        {work}
        time.sleep(60)
engine.Runner = Runner
main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"])
def test_fault_08_second_signal_ends_at_once(workdir: Path, number: int, code: int) -> None:
    script = BUSY.format(work="import ctypes; ctypes.CDLL(None).sleep(60)")  # a call that handles no signals
    words = [sys.executable, "-c", script, "generate", "a star", "-m", str(tiny_folder())]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    child.send_signal(number)
    time.sleep(0.3)
    assert child.poll() is None
    child.send_signal(number)
    assert child.wait(timeout=20) == code
    assert child.stderr is not None
    text = child.stderr.read().decode()
    assert "again to stop at once" in text
    assert "Traceback" not in text


# --------------------------------------------------------------------------------------------------------- 10: the hub
def test_fault_10_offline_and_not_cached(cli: Cli, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(workdir / "cache"))
    ran = cli("generate", "a star", "-m", "flux.1-schnell", "--offline")
    assert ran.code == 4
    assert "try: run once without --offline" in ran.err


@pytest.mark.parametrize(
    ("refuse", "words"),
    [((403, "GatedRepo"), "accept its terms"), ((404, "RevisionNotFound"), "no revision 'v9'")],
    ids=["gated", "revision"],
)
def test_fault_10_hub_errors_and_the_token(
    cli: Cli, workdir: Path, monkeypatch: pytest.MonkeyPatch, refuse: tuple[int, str], words: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(workdir / "cache"))
    with serve(None, refuse=refuse) as (endpoint, _):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        flags = ("--token", "hf_verysecret", "--revision", "v9", "-vv", "--log-file", "log.txt", "--json")
        ran = cli("generate", "a star", "-m", "owner/model", *flags)
    assert ran.code == 4
    assert words in ran.err
    assert json.loads(ran.out)["error"]["code"] == 4
    assert "hf_verysecret" not in ran.out + ran.err + Path("log.txt").read_text()


def test_fault_10_token_stays_out_of_metadata_and_presets(cli: Cli, tmp_path: Path) -> None:
    flags = ("--token", "hf_verysecret", "--save-preset", "mine", "--sidecar", "--json")
    ran = cli("generate", "a star", *TINY, *flags, "-o", "a.png")
    assert ran.code == 0, ran.err
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert b"hf_verysecret" not in written + (ran.out + ran.err).encode()


def test_fault_10_token_leaves_the_process_title() -> None:
    probe = (
        "import os; os.execv = lambda path, words: os._exit(print(words, os.environ['HF_TOKEN'], flush=True) or 0)\n"
    )
    ran = shell(probe + MAIN, "models", "list", "--token", "hf_verysecret")
    words, _, token = ran.stdout.decode().strip().rpartition(" ")
    assert token == "hf_verysecret"
    assert "hf_verysecret" not in words
    assert "'models', 'list'" in words


# ------------------------------------------------------------------------------------------------------ 11, 12: models
@pytest.mark.parametrize("name", ["evil.ckpt", "evil.bin", "folder"])
def test_fault_11_pickles_are_refused(cli: Cli, name: str) -> None:
    if name == "folder":
        make_folder(Path(name), weights="pytorch_model.bin")
    else:
        Path(name).write_bytes(b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.")
    ran = cli("generate", "a star", "-m", f"./{name}")
    assert ran.code == 4
    assert "pickle" in ran.err
    assert not Path("ran").exists()


def test_fault_11_code_of_a_model_is_named_and_not_run(cli: Cli) -> None:
    folder = make_folder(Path("foreign"), transformer=["evil", "Net"])
    (folder / "transformer" / "evil.py").write_text("open('ran', 'w')")
    ran = cli("generate", "a star", "-m", "./foreign")
    assert ran.code == 4
    assert "transformer/evil.py" in ran.err
    assert "--trust-remote-code" in ran.err
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    "index",
    [{"_class_name": "KandinskyPipeline"}, {"_class_name": "WanPipeline", "transformer_2": ["diffusers", "X"]}],
    ids=["family", "two-transformers"],
)
def test_fault_12_unsupported_families_get_the_list(cli: Cli, index: dict) -> None:
    make_folder(Path("other"), **index)
    ran = cli("generate", "a star", "-m", "./other")
    assert ran.code == 4
    assert "supported: flux" in ran.err


# ------------------------------------------------------------------------------------------------------- 13: terminals
def test_fault_13_closed_stdout_is_no_traceback() -> None:
    words = [sys.executable, "-c", MAIN, "methods", "show", "clear"]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    errors = child.stderr.read()
    assert child.wait(timeout=60) in (0, 1, 141)
    assert b"Traceback" not in errors
    assert b"Exception" not in errors


@pytest.mark.parametrize("locale", [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}], ids=["ascii"])
def test_fault_13_locale_without_utf8(workdir: Path, locale: dict[str, str]) -> None:
    environment = {**os.environ, **locale, "PYTHONIOENCODING": "ascii"}
    ran = shell(MAIN, "inspect", "/no/ünïcode/ファイル.png", env=environment)
    assert ran.returncode == 2
    assert b"Traceback" not in ran.stderr
    (workdir / "r.json").write_text(json.dumps({"kind": "generate", "prompt": "赤い丸 🌟"}))
    ran = shell(MAIN, "inspect", "r.json", env=environment)
    assert ran.returncode == 0, ran.stderr
    ran = shell(MAIN, "--help", env=environment)
    assert ran.returncode == 0, ran.stderr


def test_fault_13_bytes_of_the_prompt_are_read_as_utf8() -> None:
    from gensparse.cli.requests import repair

    broken = "赤い".encode().decode("ascii", "surrogateescape")
    assert repair(broken) == "赤い"
    assert repair("\udcff") == "\ufffd"
    assert repair("plain") == "plain"


@pytest.mark.parametrize("columns", ["40", "1", "200"])
@pytest.mark.parametrize("verb", [("--help",), ("generate", "--help"), ("models", "list")], ids=lambda v: v[0])
def test_fault_13_any_terminal_width(cli: Cli, monkeypatch: pytest.MonkeyPatch, columns: str, verb: tuple) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERMINAL_WIDTH", columns)
    assert cli(*verb).code == 0


def test_fault_13_progress_fits_forty_columns() -> None:
    from gensparse.cli.progress import describe, fit
    from gensparse.engine import Event

    event = Event("step", stage=3, stages=5, step=7, steps=10, height=4096, width=4096, eta=125.0)
    assert len(fit(event, 40)) < 40
    assert describe(event) in fit(event, 120)
    assert "2 min 05 s left" in describe(event)


@pytest.mark.parametrize("model", ["C:\\models\\flux", "..\\flux", "\\\\server\\share\\flux"])
def test_fault_13_windows_paths_are_paths(cli: Cli, model: str) -> None:
    ran = cli("generate", "a star", "-m", model)
    assert ran.code == 4
    assert "does not exist" in ran.err


# --------------------------------------------------------------------------------------------------------- 25: numbers
def test_fault_25_black_picture_is_exit_7(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from gensparse.engine.loading import load_pipeline

    def load(*arguments: object) -> object:
        pipe = load_pipeline(*arguments)
        pipe.vae.decoder.conv_out.register_forward_hook(lambda m, i, out: torch.full_like(out, float("nan")))
        return pipe

    monkeypatch.setattr("gensparse.engine.session.load_pipeline", load)
    ran = cli("generate", "a star", *TINY, "-o", "a.png")
    assert ran.code == 7
    assert "NaN" in ran.err
    assert not Path("a.png").exists()


# ---------------------------------------------------------------------------------------------------------- unexpected
def test_unexpected_errors_show_their_place_only_with_v(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("inner")

    monkeypatch.setattr("gensparse.engine.session.load_pipeline", broken)
    quiet, loud = cli("generate", "a star", *TINY), cli("generate", "a star", *TINY, "-v")
    assert (quiet.code, loud.code) == (1, 1)
    assert "Traceback" not in quiet.err
    assert "KeyError" in quiet.err
    assert "Traceback" in loud.err
