"""Help: light, short, and complete."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gensparse.cli import split_token
from gensparse.cli.options import OUTPUT_OPTIONS, REQUEST_OPTIONS, SUBJECT_OPTIONS
from gensparse.cli.state import hoist_globals

Cli = Callable[..., tuple[int, str, str]]
VERBS = (
    "generate",
    "upscale",
    "customize",
    "plan",
    "inspect",
    "env",
    "models list",
    "models show",
    "models check",
    "methods list",
    "methods show",
    "bench list",
    "bench aot",
    "bench cpu",
    "bench kernels",
    "bench quality",
    "bench subjects",
    "tune",
    "calibrate",
    "app",
)
DOCS = Path(__file__).resolve().parents[2] / "docs" / "cli.md"


@pytest.mark.parametrize("words", [["--help"], ["generate", "--help"], ["models", "list"], ["inspect", "none.png"]])
def test_light_commands_import_no_torch(words: list[str]) -> None:
    code = (
        "import sys, atexit\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'triton'}\n"
        "atexit.register(lambda: print('HEAVY', sorted(heavy & set(sys.modules)), file=sys.stderr))\n"
        "from gensparse.cli import main; main()"
    )
    ran = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert "HEAVY []" in ran.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_three_examples(cli: Cli, verb: str) -> None:
    ran = cli(*verb.split(), "--help")
    assert ran.code == 0
    assert len(re.findall(r"^\s*gensparse ", ran.out, re.MULTILINE)) >= 3


@pytest.mark.parametrize("verb", ["generate", "upscale", "plan"])
def test_help_is_short_and_help_all_is_complete(cli: Cli, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    short, full = cli(verb, "--help"), cli(verb, "--help-all")
    assert (short.code, full.code) == (0, 0)
    assert len(short.out.splitlines()) < 100
    assert "--variant" not in short.out
    assert "--variant" in full.out


def test_version(cli: Cli) -> None:
    from gensparse import __version__

    assert cli("--version").out.strip() == f"gensparse {__version__}"


def test_every_flag_is_documented(cli: Cli) -> None:
    text = DOCS.read_text(encoding="utf-8")
    listed = {name.replace("_", "-") for name in (*REQUEST_OPTIONS, *SUBJECT_OPTIONS, *OUTPUT_OPTIONS)} - {"from-file"}
    missing = [name for name in sorted(listed | {"from"}) if f"--{name}" not in text]
    assert not missing


@pytest.mark.parametrize(
    ("words", "moved"),
    [
        (["generate", "x", "--json"], ["--json", "generate", "x"]),
        (["generate", "--format", "json", "x"], ["--format", "json", "generate", "x"]),
        (["generate", "--format=json", "x", "-v"], ["--format=json", "-v", "generate", "x"]),
        (["generate", "--", "--json"], ["generate", "--", "--json"]),
        (["generate", "--format"], ["--format", "generate"]),
        ([], []),
    ],
)
def test_global_flags_may_stand_anywhere(words: list[str], moved: list[str]) -> None:
    assert hoist_globals(words) == moved


@pytest.mark.parametrize(
    ("words", "token", "rest"),
    [
        (["a", "--token", "t", "b"], "t", ["a", "b"]),
        (["--token=t"], "t", []),
        (["a", "--", "--token", "t"], None, ["a", "--", "--token", "t"]),
        (["--token"], None, ["--token"]),
    ],
)
def test_token_is_taken_out_of_the_arguments(words: list[str], token: str | None, rest: list[str]) -> None:
    assert split_token(words) == (token, rest)


def test_formats_of_results(cli: Cli) -> None:
    assert cli("--format", "xml", "env").code == 2
    flags = ("generate", "a star", "-m", "TINY", "-s", "1", "--overwrite", "-o", "a.png")
    quiet = cli(*flags, "--format", "quiet")
    assert (quiet.out, quiet.err) == ("a.png\n", "")
    agent = cli(*flags, "--format", "agent")
    assert agent.out.startswith("a.png 32x32 seed=1 sha256=")
    assert "\x1b" not in agent.out + agent.err
    plain = cli(*flags, "--no-progress")
    assert (plain.out, plain.err) == ("a.png\n", "")
