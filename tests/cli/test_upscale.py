"""`gensparse upscale` of one picture, many, or a folder: names, what is skipped, what failed, and exit codes."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_model import tiny_family

from gensparse.cli.progress import Progress
from gensparse.image_io import read_metadata

Cli = Callable[..., tuple[int, str, str]]
TINY = ("-m", "TINY", "--steps", "2")


def photo(path: str, height: int = 16, width: int = 24, mode: str = "RGB") -> Path:
    seed = sum(path.encode())
    values = np.random.default_rng(seed).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values, mode).save(path)
    return Path(path)


@pytest.fixture
def pictures(workdir: Path) -> Path:
    """A folder of three pictures and a note."""
    photo("in/a.png"), photo("in/b.jpg", 20, 16), photo("in/c.webp", 12, 12)
    Path("in/readme.txt").write_text("not a picture")
    return Path("in")


def test_a_folder_becomes_a_folder_of_the_same_names(cli: Cli, pictures: Path) -> None:
    ran = cli("upscale", "in", *TINY, "-o", "out")
    assert ran.code == 0, ran.err
    assert ran.out.split() == ["out/a.png", "out/b.png", "out/c.png"]
    assert [Image.open(path).size for path in ran.out.split()] == [(48, 32), (32, 40), (24, 24)]
    assert "[2/3] b.jpg" in ran.err


@pytest.mark.parametrize(("size", "kept"), [("60x30", "60x40"), ("31x62", "31x21"), ("61x41", ""), ("1.7x", "")])
def test_another_shape_than_the_picture_is_said(cli: Cli, workdir: Path, size: str, kept: str) -> None:
    photo("wide.png")  # 24 x 16
    ran = cli("plan", "--image", "wide.png", *TINY, "--size", size)
    assert ran.code == 0, ran.err
    assert ("stretches the picture" in ran.err) is bool(kept)
    assert f"{kept} keeps its shape" in ran.err or not kept


def test_what_is_finished_is_skipped_and_settings_make_it_another_job(cli: Cli, pictures: Path) -> None:
    cli("upscale", "in", *TINY, "-o", "out/")
    made = {path.name: path.stat().st_mtime_ns for path in Path("out").glob("*.png")}
    photo("in/d.png")
    Path("out/b.png").write_bytes(Path("out/b.png").read_bytes()[:-20])  # cut short by a full disk
    again = cli("upscale", "in/", *TINY, "-o", "out", "--json")
    data = json.loads(again.out)
    assert again.code == 5
    assert [item["status"] for item in data["items"]] == ["skipped", "failed", "skipped", "ok"]
    assert {p.name: p.stat().st_mtime_ns for p in Path("out").glob("[ac].png")} == {
        k: made[k] for k in ("a.png", "c.png")
    }
    other = cli("upscale", "in", *TINY, "--strength", "0.5", "-o", "out")
    assert other.code == 5
    assert other.err.count("made with other settings") >= 4
    assert cli("upscale", "in", *TINY, "--strength", "0.5", "-o", "out", "--overwrite").code == 0
    assert read_metadata("out/a.png")["request"]["strength"] == 0.5


def test_the_same_name_with_other_pixels_is_made_anew(cli: Cli, workdir: Path) -> None:
    photo("in/a.png")
    assert cli("upscale", "in", *TINY, "-o", "out").code == 0
    Image.new("RGB", (24, 16), (200, 10, 10)).save("in/a.png")
    ran = cli("upscale", "in", *TINY, "-o", "out")
    assert ran.code == 5
    assert "other settings" in ran.err


def test_partial_failure_is_exit_5_with_a_table(cli: Cli, pictures: Path) -> None:
    Path("in/bad.png").write_bytes(Path("in/a.png").read_bytes()[:60])
    Path("in/page.jpg").write_text("<html>not a picture</html>")
    ran = cli("upscale", "in", *TINY, "-o", "out")
    assert ran.code == 5
    assert ran.out.split() == ["out/a.png", "out/b.png", "out/c.png"]
    assert "2 of 5 pictures failed:" in ran.err
    table = ran.err.split("failed:")[-1]
    assert "bad.png   2  " in table
    assert "SVG or HTML" in table
    data = json.loads(cli("upscale", "in", *TINY, "-o", "out", "--json").out)
    assert data["status"] == "partial"
    assert {item["input"]: item["error"]["code"] for item in data["items"] if "error" in item} == {
        "bad.png": 2,
        "page.jpg": 2,
    }


def test_everything_that_fails_alike_is_still_exit_5(cli: Cli, workdir: Path) -> None:
    for name in ("in/a.png", "in/b.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    ran = cli("upscale", "in", *TINY, "-o", "out", "--json")
    assert ran.code == 5
    assert json.loads(ran.out)["status"] == "failed"


def test_one_picture_keeps_the_code_of_what_went_wrong(cli: Cli, workdir: Path) -> None:
    photo("in/a.png")
    Path("in/a.png").write_bytes(Path("in/a.png").read_bytes()[:100])
    assert cli("upscale", "in/a.png", *TINY, "-o", "out/").code == 2


def test_fault_11_a_model_that_is_refused_ends_the_whole_run(cli: Cli, pictures: Path) -> None:
    Path("evil.ckpt").write_bytes(b"\x80\x04")
    ran = cli("upscale", "in", "-m", "./evil.ckpt", "-o", "out")
    assert ran.code == 4
    assert "pictures failed" not in ran.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("in/a.png", "in/c.webp", "-o", "x.png"), "need a folder"),
        (("in", "-o", "-"), "one stream"),
        (("empty", "-o", "out"), "holds no picture"),
        (("in/a.png", "more/a.png", "-o", "out"), "two pictures are called"),
        (("in", "--by", "2x", "--size", "64"), "use one of them"),
        (("in", "--highres", "freescale", "-o", "out"), "freescale does not exist for FLUX.1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_fault_04_what_cannot_be_is_refused(cli: Cli, pictures: Path, arguments: tuple, words: str) -> None:
    Path("empty").mkdir()
    photo("more/a.png")
    ran = cli("upscale", *arguments, *TINY)
    assert ran.code == 2
    assert words in ran.err
    assert not Path("out/a.png").exists()


def test_names_that_differ_in_their_ending_only_keep_it(cli: Cli, workdir: Path) -> None:
    photo("in/a.png"), photo("in/a.jpg")
    ran = cli("upscale", "in", *TINY, "-o", "out", "--image-format", "webp")
    assert ran.out.split() == ["out/a.jpg.webp", "out/a.png.webp"]


def test_a_picture_is_never_replaced_by_its_own_enlargement(cli: Cli, pictures: Path) -> None:
    before = Path("in/a.png").read_bytes()
    ran = cli("upscale", "in", *TINY, "-o", "in", "--overwrite")
    assert ran.code == 5
    assert "would replace the picture" in ran.err
    assert Path("in/a.png").read_bytes() == before


def test_several_seeds_give_several_pictures_of_each(cli: Cli, workdir: Path) -> None:
    photo("a.png"), photo("b.png")
    ran = cli("upscale", "a.png", "b.png", *TINY, "-s", "1", "-s", "2", "-o", "out")
    assert ran.out.split() == [f"out/{name}-000{k}.png" for name in "ab" for k in (1, 2)]


def test_fault_06_metadata_is_what_tells_a_finished_picture(cli: Cli, workdir: Path) -> None:
    photo("in/a.png")
    cli("upscale", "in", *TINY, "--no-metadata", "-o", "out")
    ran = cli("upscale", "in", *TINY, "--no-metadata", "-o", "out")
    assert ran.code == 5
    assert "out/a.png" not in ran.out


def test_fault_07_and_08_a_stopped_run_goes_on_where_it_was(
    cli: Cli, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strong = ("upscale", "in", "-m", "TINY", "--steps", "3", "--strength", "1", "--size", "128x96")
    whole = cli(*strong, "-o", "whole")
    assert whole.code == 0
    original, seen = Progress.on_event, []

    def press(self: Progress, event: object) -> None:
        original(self, event)
        seen.append(event.phase)
        if seen.count("load") == 2 and event.phase == "step" and (event.stage, event.step) == (0, event.steps):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Progress, "on_event", press)
    ran = cli(*strong, "-o", "out")
    assert ran.code == 130
    assert ran.out.split() == ["out/a.png"]
    monkeypatch.setattr(Progress, "on_event", original)
    ran = cli(*strong, "-o", "out")
    assert ran.code == 0
    assert "skipped a.png" in ran.err
    for name in ("a.png", "b.png", "c.png"):
        assert np.array_equal(np.asarray(Image.open(f"out/{name}")), np.asarray(Image.open(f"whole/{name}")))


def test_fault_03_a_picture_that_will_not_fit_is_one_line_of_the_table(cli: Cli, pictures: Path) -> None:
    ran = cli("upscale", "in", *TINY, "--size", "16384", "--attention", "dense", "--max-vram", "2GiB", "-o", "out")
    assert ran.code == 5
    assert "  3  " in ran.err
    one = cli("upscale", "in/a.png", *TINY, "--size", "16384", "--attention", "dense", "--max-vram", "2GiB", "-o", "o/")
    assert one.code == 3


def test_no_faithful_leaves_the_result_as_the_model_gave_it(cli: Cli, workdir: Path) -> None:
    from gensparse.highres.faithful import area_mean

    photo("in.png")
    cli("upscale", "in.png", *TINY, "-o", "kept.png")
    cli("upscale", "in.png", *TINY, "--no-faithful", "-o", "free.png")
    want = np.asarray(Image.open("in.png"))
    kept, free = (
        np.abs(area_mean(np.asarray(Image.open(name)), want.shape[:2]) - want).mean()
        for name in ("kept.png", "free.png")
    )
    assert kept < 2 < free


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_every_family_upscales_folders_and_plans(cli: Cli, pictures: Path, name: str) -> None:
    model = tiny_family(name)
    ran = cli("upscale", "in", "-m", model, "--steps", "2", "--by", "3x", "-o", "out")
    assert ran.code == 0, ran.err
    assert Image.open("out/b.png").size == (48, 60)
    plan = json.loads(cli("plan", "-m", model, "--image", "in/a.png", "--size", "128", "--json").out)
    assert plan["fits"]
    assert cli("plan", "-m", model, "--size", "16384", "--max-vram", "1GiB", "--attention", "dense").code == 3


def test_sixteen_bit_and_transparent_pictures_come_through_a_folder(cli: Cli, workdir: Path) -> None:
    photo("in/a.png", mode="RGBA")
    grey = np.linspace(0, 65535, 16 * 16).astype(np.uint16).reshape(16, 16)
    Image.fromarray(grey).save("in/deep.png")
    ran = cli("upscale", "in", *TINY, "-o", "out")
    assert ran.code == 0, ran.err
    assert Image.open("out/a.png").mode == "RGBA"
    assert "16-bit picture" in ran.err
    assert np.asarray(Image.open("out/deep.png").convert("L")).max() > 180


def test_the_output_folder_may_hold_other_things(cli: Cli, pictures: Path) -> None:
    shutil.copytree("in", "out")
    ran = cli("upscale", "in", *TINY, "-o", "out")
    assert ran.code == 5
    assert ran.out.split() == ["out/b.png", "out/c.png"]
