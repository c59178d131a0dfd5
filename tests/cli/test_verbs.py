"""The verbs from flags to files: generate, upscale, plan, inspect, models, methods, env."""

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_model import tiny_folder

from gensparse.cli import main
from gensparse.image_io import read_metadata
from gensparse.methods import METHODS

Cli = Callable[..., tuple[int, str, str]]
TINY = ("-m", "TINY", "-s", "3")


def photo(path: Path, height: int = 24, width: int = 40) -> Path:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


# ------------------------------------------------------------------------------------------------------------ generate
def test_generate_prints_the_path_of_its_picture(cli: Cli, workdir: Path) -> None:
    ran = cli("generate", "a red circle", *TINY)
    assert ran.code == 0, ran.err
    path = Path(ran.out.strip())
    assert path.name == "0001.png"
    assert path.parent.parent == Path("gensparse-out")
    assert Image.open(path).size == (32, 32)


def test_generate_large_is_sparse_and_json_says_so(cli: Cli) -> None:
    ran = cli("generate", "a red circle", *TINY, "--size", "128", "-o", "a.png", "--json")
    assert ran.code == 0, ran.err
    data = json.loads(ran.out)
    assert [stage.get("sparse", 0) > 0 for stage in data["attention"]["stages"]] == [False, True, True]
    assert data["attention"]["stages"][-1]["density"] < 0.2
    assert data["outputs"][0]["path"] == "a.png"
    assert data["request"]["model"] == "tiny-flux"


def test_draft_then_finish_continues_the_draft(cli: Cli, workdir: Path) -> None:
    draft = cli("generate", "a red circle", *TINY).out.strip()
    whole = cli("generate", "a red circle", *TINY, "--size", "64x64", "-o", "whole.png")
    finish = cli("generate", "--from", draft, "-m", "TINY", "--size", "64", "-o", "big.png")
    assert finish.code == 0, finish.err
    assert "stage 1/2" not in finish.err
    assert "stage 1/2" in whole.err
    assert np.array_equal(np.asarray(Image.open("big.png")), np.asarray(Image.open("whole.png")))


def test_draft_of_another_shape_is_said_to_be_another_picture(cli: Cli) -> None:
    cli("generate", "a red circle", *TINY, "-o", "a.png")
    ran = cli("generate", "--from", "a.png", "-m", "TINY", "--size", "64x32", "-o", "b.png")
    assert "another aspect ratio" in ran.err
    assert "another aspect" not in cli("generate", "--from", "a.png", "-m", "TINY", "--size", "2x", "-o", "c.png").err


def test_from_reproduces_bit_for_bit(cli: Cli) -> None:
    cli("generate", "a red circle", *TINY, "--size", "48x80", "--steps", "2", "-o", "a.png")
    for source in ("a.png", "a.json"):
        if source == "a.json":
            Path(source).write_text(json.dumps(read_metadata("a.png")))
        ran = cli("generate", "--from", source, "-m", "TINY", "-o", f"{source}.png")
        assert ran.code == 0, ran.err
        assert Path(f"{source}.png").read_bytes() == Path("a.png").read_bytes()


def test_inspect_as_args_reproduces_bit_for_bit(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    import shlex

    cli("generate", "-p", "--a 'red' circle", *TINY, "--size", "48", "--attention", "dense", "-o", "a.png")
    words = shlex.split(cli("inspect", "a.png", "--as-args").out)
    assert words[0] == "gensparse"
    words[words.index("tiny-flux")] = "TINY"
    ran = cli(words[1], "-o", "b.png", *words[2:])
    assert ran.code == 0, ran.err
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_flags_win_over_from(cli: Cli) -> None:
    cli("generate", "a red circle", *TINY, "-o", "a.png")
    cli("generate", "a blue star", "--from", "a.png", "-m", "TINY", "-s", "5", "-o", "b.png")
    request = read_metadata("b.png")["request"]
    assert (request["prompt"], request["seed"], request["steps"]) == ("a blue star", [5], 3)


def test_several_pictures_in_one_folder(cli: Cli) -> None:
    ran = cli("generate", "a star", *TINY, "--num-images", "2", "-o", "out/")
    assert ran.out.split() == ["out/0001.png", "out/0002.png"]
    assert cli("generate", "a star", *TINY, "-o", "out/").out.split() == ["out/0003.png"]
    assert read_metadata("out/0002.png")["request"]["seed"] == [4]


def test_repeated_seeds_are_pictures(cli: Cli) -> None:
    ran = cli("generate", "a star", "-m", "TINY", "-s", "1", "-s", "9", "-o", "a.png")
    assert ran.out.split() == ["a-0001.png", "a-0002.png"]
    assert [read_metadata(p)["request"]["seed"] for p in ran.out.split()] == [[1], [9]]


@pytest.mark.parametrize("kind", ["webp", "jpg", "tiff"])
def test_other_formats_reproduce_too(cli: Cli, kind: str) -> None:
    cli("generate", "a star", *TINY, "-o", f"a.{kind}")
    assert read_metadata(f"a.{kind}")["request"]["prompt"] == "a star"


def test_dash_writes_the_picture_to_stdout(workdir: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["generate", "a star", "-m", str(tiny_folder()), "-o", "-", "-s", "3"])
    assert stop.value.code == 0
    image = Image.open(BytesIO(capfdbinary.readouterr().out))
    assert image.size == (32, 32)
    assert json.loads(image.info["gensparse"])["request"]["prompt"] == "a star"
    assert not list(workdir.iterdir())


def test_no_prompt_and_no_metadata(cli: Cli) -> None:
    cli("generate", "my secret", *TINY, "--no-prompt", "--sidecar", "-o", "a.png")
    cli("generate", "my secret", *TINY, "--no-metadata", "-o", "b.png")
    assert b"secret" not in Path("a.png").read_bytes() + Path("a.json").read_bytes()
    assert not Image.open("b.png").info
    ran = cli("generate", "--from", "a.png", "my secret", "-m", "TINY", "-o", "c.png")
    assert ran.code == 0
    assert np.array_equal(np.asarray(Image.open("c.png")), np.asarray(Image.open("a.png")))


def test_preset_keeps_settings_without_prompt_and_seed(cli: Cli) -> None:
    cli("generate", "a star", *TINY, "--steps", "2", "--save-preset", "quick", "-o", "a.png")
    ran = cli("generate", "a moon", "-m", "TINY", "--preset", "quick", "-o", "b.png")
    assert ran.code == 0, ran.err
    request = read_metadata("b.png")["request"]
    assert (request["steps"], request["prompt"]) == (2, "a moon")
    assert request["seed"] != [3]
    assert cli("generate", "x", *TINY, "--preset", "../quick").code == 2
    assert cli("generate", "x", *TINY, "--preset", "absent").code == 2


def test_method_settings_from_a_file(cli: Cli) -> None:
    Path("m.json").write_text(json.dumps({"method": "clear", "version": 1, "radius": 4}))
    ran = cli("generate", "a star", *TINY, "--size", "64", "--config", "m.json", "-o", "a.png", "--json")
    assert json.loads(ran.out)["request"]["attention"] == "clear:radius=4"


def test_prompt_from_file_and_stdin(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("p.txt").write_text("a green moon\n", encoding="utf-8")
    cli("generate", "--prompt-file", "p.txt", *TINY, "-o", "a.png")
    assert read_metadata("a.png")["request"]["prompt"] == "a green moon"
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("a teal heart\n"))
    cli("generate", "-", *TINY, "-o", "b.png")
    assert read_metadata("b.png")["request"]["prompt"] == "a teal heart"
    assert cli("generate", "a star", "-p", "a moon", *TINY).code == 2


def test_previews_go_to_their_folder(cli: Cli) -> None:
    ran = cli("generate", "a star", *TINY, "--size", "64", "--preview-dir", "small", "-o", "a.png")
    assert ran.code == 0, ran.err
    assert sorted(p.name for p in Path("small").glob("*.png")) == ["0001-stage1-32x32.png", "0001-stage2-64x64.png"]


def test_run_folder_is_removed_when_nothing_was_made(cli: Cli, workdir: Path) -> None:
    assert cli("generate", "a star", "-m", "TINY", "--attention", "none-such").code == 2
    assert not list((workdir / "gensparse-out").glob("2*"))


# ------------------------------------------------------------------------------------------------------------- upscale
def test_upscale_doubles_by_default(cli: Cli) -> None:
    photo(Path("in.png"))
    ran = cli("upscale", "in.png", *TINY, "-o", "out.png")
    assert ran.code == 0, ran.err
    assert Image.open("out.png").size == (80, 48)


def test_upscale_many_into_a_folder(cli: Cli) -> None:
    photo(Path("a.png")), photo(Path("b.png"), 16, 16)
    ran = cli("upscale", "a.png", "b.png", *TINY, "--by", "1.5", "--strength", "0", "-o", "large/")
    assert ran.out.split() == ["large/a.png", "large/b.png"]
    assert [Image.open(p).size for p in ran.out.split()] == [(60, 36), (24, 24)]


def test_upscale_opens_every_input_before_loading(cli: Cli) -> None:
    photo(Path("a.png"))
    ran = cli("upscale", "a.png", "missing.png", *TINY, "-o", "large/")
    assert ran.code == 2
    assert "missing.png" in ran.err
    assert "loading" not in ran.err


def test_upscale_settings_are_repeated_from_a_result(cli: Cli) -> None:
    photo(Path("in.png"))
    cli("upscale", "in.png", *TINY, "--strength", "0.6", "-o", "out.png")
    cli("upscale", "in.png", "--from", "out.png", "-m", "TINY", "-o", "again.png")
    assert Path("out.png").read_bytes() == Path("again.png").read_bytes()
    assert cli("generate", "--from", "out.png", "-m", "TINY").code == 2


# ---------------------------------------------------------------------------------------------------------------- plan
def test_plan_reads_no_weights(cli: Cli) -> None:
    ran = cli("plan", "-m", "flux.1-dev", "--size", "4096", "--attention", "clear", "--json")
    data = json.loads(ran.out)
    assert [stage["height"] for stage in data["stages"]] == [1024, 2048, 4096]
    assert data["stages"][-1]["tokens"] == 65536 + 512
    assert data["stages"][-1]["density"] == pytest.approx(0.0267, abs=5e-4)
    assert data["stages"][0]["attention"] == "dense"


def test_plan_says_which_rung_it_took_and_why(cli: Cli) -> None:
    flags = (
        "plan",
        "-m",
        "flux.1-dev",
        "--device",
        "cuda",
        "--dtype",
        "bf16",
        "--size",
        "4096",
        "--attention",
        "dense",
    )
    ran = cli(*flags, "--max-vram", "24GB", "--format", "agent")
    assert ran.code == 0
    for words in (
        "--offload model, --quantize fp8, --tile 1024, chunks of 4096",
        "since offload none needs",
        "prompt: ",
    ):
        assert words in ran.out
    fixed = json.loads(cli(*flags, "--max-vram", "24GB", "--tile", "synced:512", "--chunk", "0", "--json").out)
    assert (fixed["request"]["tile"], fixed["request"]["chunk"]) == ("synced:512", 0)
    assert cli(*flags, "--max-vram", "6GB").code == 3


def test_plan_says_whose_memory_a_limit_is_where_there_is_no_gpu(cli: Cli) -> None:
    limit = ("plan", *TINY, "--size", "64", "--max-vram", "8GiB")
    assert "--device cuda plans for a GPU" in cli(*limit, "--device", "cpu").err
    assert "plans for a GPU" not in cli(*limit, "--device", "cuda").err


def test_plan_of_a_picture(cli: Cli) -> None:
    photo(Path("in.png"))
    ran = cli("plan", "--image", "in.png", "-m", "TINY", "--size", "128", "--json")
    assert [stage["height"] for stage in json.loads(ran.out)["stages"]] == [64, 128]


# -------------------------------------------------------------------------------------------- inspect, models, methods
def test_inspect_shows_what_was_written(cli: Cli) -> None:
    cli("generate", "a star", *TINY, "-o", "a.png")
    assert "a star" in cli("inspect", "a.png").out
    assert json.loads(cli("inspect", "a.png", "--json").out) == read_metadata("a.png")


def test_inspect_makes_control_characters_harmless(cli: Cli) -> None:
    cli("generate", "-p", "a \x1b[31mred\x1b[0m star\r\n", *TINY, "-o", "a.png")
    for ran in (cli("inspect", "a.png"), cli("inspect", "a.png", "--as-args"), cli("inspect", "a.png", "--json")):
        assert ran.code == 0
        assert "\x1b" not in ran.out


def test_untrusted_metadata_decides_nothing_dangerous(cli: Cli) -> None:
    cli("generate", "a star", *TINY, "-o", "a.png")
    metadata = read_metadata("a.png")
    metadata["request"] |= {"trust_remote_code": True, "device": "cuda", "max_vram": "1", "token": "x"}
    Path("evil.json").write_text(json.dumps(metadata))
    assert cli("generate", "--from", "evil.json", "-m", "TINY", "-o", "b.png").code == 0
    assert read_metadata("b.png")["request"]["trust_remote_code"] is False
    metadata["request"]["model"] = "../../x"
    Path("evil.json").write_text(json.dumps(metadata))
    assert cli("generate", "--from", "evil.json", "-o", "c.png").code == 2


def test_models_list_and_show(cli: Cli) -> None:
    assert "flux.1-schnell" in cli("models", "list").out
    assert "Non-Commercial" in cli("models", "show", "flux.1-dev").out
    shown = json.loads(cli("models", "show", "TINY", "--json").out)
    assert (shown["native_size"], shown["guidance"]) == (32, "2 (cfg)")
    assert cli("models", "show", "no-such").code == 4


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_is_listed_and_shown(cli: Cli, name: str) -> None:
    assert name in cli("methods", "list").out
    assert f"--attention {name}" in cli("methods", "show", name).out


def test_unknown_method_suggests(cli: Cli) -> None:
    ran = cli("methods", "show", "claer")
    assert ran.code == 2
    assert "clear" in ran.err


def test_env_names_versions_and_backends_and_nobody(cli: Cli) -> None:
    facts = json.loads(cli("env", "--json").out)
    assert facts["backends"]["reference"] == "ready"
    assert {"torch", "diffusers", "gensparse"} <= set(facts)
    assert str(Path.home()) not in json.dumps(facts)
