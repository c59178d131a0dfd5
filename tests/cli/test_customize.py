"""`gensparse customize`: subjects by their pictures, boxes by a file, metadata, plans, and one sentence per mistake."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_model import tiny_family

from gensparse.image_io import read_metadata
from gensparse.request import CustomizeRequest, request_from_dict

Cli = Callable[..., tuple[int, str, str]]
TINY = ("-m", "TINY", "--steps", "2", "-s", "3", "--size", "40x24")
CAT, DOG = ("--subject", "cat=in/cat.png@in/cat_mask.png"), ("--subject", "dog=in/dog.jpg")
BOXES = [{"subject": "cat", "box": [0, 0.1, 0.5, 1]}, {"subject": "dog", "box": [0.5, 0, 1, 1]}]


@pytest.fixture
def pictures(workdir: Path) -> Path:
    Path("in").mkdir()
    rng = np.random.default_rng(5)
    for name, size in (("cat.png", (30, 21)), ("dog.jpg", (17, 40))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(f"in/{name}")
    mask = np.zeros((30, 21), dtype=np.uint8)
    mask[4:, :12] = 255
    Image.fromarray(mask).save("in/cat_mask.png")
    Path("boxes.json").write_text(json.dumps(BOXES))
    return Path("in")


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def loader(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("gensparse.engine.session.load_pipeline", loader)


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_subjects_come_into_the_picture_and_its_metadata(cli: Cli, pictures: Path) -> None:
    ran = cli("customize", "a cat and a dog", *TINY, *CAT, *DOG, "-o", "a.png")
    assert ran.code == 0, ran.err
    assert cli("generate", "a cat and a dog", *TINY, "-o", "plain.png").code == 0
    assert Image.open("a.png").size == (40, 24)
    assert not np.array_equal(pixels("a.png"), pixels("plain.png"))
    metadata = read_metadata("a.png")
    request = metadata["request"]
    assert request["kind"] == "customize"
    assert request["subject"] == ["cat=cat.png@cat_mask.png", "dog=dog.jpg"]  # no folders
    assert {name: set(files) for name, files in metadata["subjects_sha256"].items()} == {
        "cat": {"picture", "mask"},
        "dog": {"picture"},
    }
    assert metadata["run"]["attention"][0]["subjects"]["names"] == ["cat", "dog"]


def test_from_repeats_it_and_names_no_files_of_its_own(cli: Cli, pictures: Path) -> None:
    given = ("--subject-method", "isolation", "--layout", "boxes.json")
    assert cli("customize", "a cat and a dog", *TINY, *CAT, *DOG, *given, "-o", "a.png").code == 0
    ran = cli("customize", "--from", "a.png", "-m", "TINY", *CAT, *DOG, "-o", "b.png")
    assert ran.code == 0, ran.err
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert read_metadata("b.png")["request"]["layout"] == [["cat", 0, 0.1, 0.5, 1], ["dog", 0.5, 0, 1, 1]]
    alone = cli("customize", "--from", "a.png", "-m", "TINY")
    assert alone.code == 2
    assert "--subject" in alone.err
    assert cli("generate", "--from", "a.png", "-m", "TINY").code == 2
    shown = cli("inspect", "a.png", "--as-args")
    assert shown.code == 0, shown.err
    assert "--subject cat=cat.png@cat_mask.png" in shown.out
    assert "--layout LAYOUT.json --subject-method isolation" in shown.out


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_unets(cli: Cli, pictures: Path, family: str) -> None:
    words = ("-m", tiny_family(family), "--steps", "2", "-s", "3", "--size", "24x40")
    ran = cli("customize", "a cat", *words, *CAT, "--subject-method", "magicface", "-o", "a.png", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["attention"]["stages"][0]["subjects"]["method"]["method"] == "magicface"


def test_larger_pictures_go_on_from_the_small_one(cli: Cli, pictures: Path) -> None:
    large = ("-m", "TINY", "--steps", "3", "-s", "3", "--size", "80x48")
    ran = cli("customize", "a cat", *large, *CAT, "-o", "a.png", "--json")
    assert ran.code == 0, ran.err
    stages = json.loads(ran.out)["attention"]["stages"]
    assert ["subjects" in stage for stage in stages] == [True, *[False] * (len(stages) - 1)]
    assert len(stages) > 1


def test_other_pixels_of_the_same_name_are_no_finished_stage(cli: Cli, pictures: Path) -> None:
    small = ("customize", "a cat", *TINY, *CAT)
    assert cli(*small, "-o", "a.png").code == 0
    Image.new("RGB", (21, 30), (200, 10, 10)).save("in/cat.png")
    assert cli(*small, "-o", "b.png").code == 0
    assert not np.array_equal(pixels("a.png"), pixels("b.png"))


def test_the_plan_counts_references(cli: Cli, pictures: Path) -> None:
    def work(*words: str) -> float:
        ran = cli("plan", "-m", "flux.1-dev", *words, "--json")
        return json.loads(ran.out)["stages"][0]["linear_flops"]

    assert work(*CAT, *DOG) == pytest.approx(3 * work())
    assert work(*CAT, "--size", "2048", "--highres", "none") == pytest.approx(
        2 * work("--size", "2048", "--highres", "none")
    )
    assert cli("plan", "--image", "in/cat.png", *CAT).code == 2
    other = cli("plan", "-m", "sdxl", *CAT, "--highres", "hidiffusion")
    assert other.code == 2
    assert "attention of its own" in other.err


MISTAKES = {
    "missing file": (("--subject", "cat=none.png"), "none.png"),
    "missing mask": (("--subject", "cat=in/cat.png@none.png"), "none.png"),
    "no picture": (("--subject", "cat=boxes.json"), "boxes.json"),
    "form": (("--subject", "cat"), "NAME=IMAGE"),
    "none": ((), "no subject is given"),
    "one name": ((*CAT, *CAT), "two subjects are named 'cat'"),
    "six": (tuple(w for n in range(6) for w in ("--subject", f"s{n}=in/cat.png")), "at most 5"),
    "needs regions": ((*CAT, "--subject-method", "isolation"), "where cat is to be"),
    "needs both": ((*CAT, "--subject-method", "masactrl:start=0"), "mask and region of 'cat'"),
    "one alone": ((*CAT, *DOG, "--subject-method", "reference_only"), "1 subject"),
    "unknown method": ((*CAT, "--subject-method", "freecustm"), "did you mean freecustom"),
    "other method": ((*CAT, "--subject-method", "clear"), "unknown subject method"),
    "unet alone": ((*CAT, "--subject-method", "magicface"), "not on FLUX.1"),
    "no layout": ((*CAT, "--layout", "none.json"), "none.json"),
    "layout": ((*CAT, "--layout", "in/cat.png"), "no JSON"),
    "unknown subject": ((*CAT, "--layout", "boxes.json"), "'dog'"),
    "attention": ((*CAT, "--highres", "none", "--attention", "neighborhood:window=4x4"), "first stage"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_sentence_and_exit_2(cli: Cli, pictures: Path, mistake: str) -> None:
    words, said = MISTAKES[mistake]
    ran = cli("customize", "a cat", *TINY, *words, "-o", "a.png")
    assert ran.code == 2, ran.err
    assert said in ran.err
    assert "Traceback" not in ran.err
    assert not Path("a.png").exists()


@pytest.mark.parametrize(
    "boxes",
    [
        [{"subject": "cat", "box": [0, 0, 1.5, 1]}],
        [{"subject": "cat", "box": [0.5, 0, 0.5, 1]}],
        [{"subject": "cat", "box": [0, 0, 1]}],
        [{"subject": "cat", "box": [0, 0, "1", 1]}],
        [{"subject": "cat", "box": "wide"}],
        [{"subject": "cat", "box": [0, 0, 1, 1], "extra": 1}],
        [{"subject": "cat", "box": [0, 0, 1, 1]}, {"subject": "cat", "box": [0, 0, 1, 1]}],
        {"subject": "cat"},
        [7],
    ],
)
def test_boxes_lie_in_the_picture(cli: Cli, pictures: Path, no_weights: None, boxes: object) -> None:
    Path("boxes.json").write_text(json.dumps(boxes))
    ran = cli("customize", "a cat", *TINY, *CAT, "--layout", "boxes.json")
    assert ran.code == 2
    assert "box" in ran.err


def test_mistakes_are_found_before_weights(cli: Cli, pictures: Path, no_weights: None) -> None:
    for mistake in MISTAKES.keys() - {"needs both"}:
        assert cli("customize", "a cat", *TINY, *MISTAKES[mistake][0]).code == 2


def test_families_without_subjects_say_who_has_them(cli: Cli, pictures: Path, no_weights: None) -> None:
    ran = cli("customize", "a cat", "-m", tiny_family("sd3"), *CAT)
    assert ran.code == 2
    assert "Stable Diffusion XL" in ran.err


def test_requests_keep_their_form() -> None:
    request = CustomizeRequest(prompt="a cat", subject="cat=a/b@c/cat.png@m.png", layout=[["cat", 0, 0, 0.5, 1]])
    again = request_from_dict(json.loads(json.dumps(request.to_dict())))
    assert again == request
    assert request.to_dict(portable=True)["subject"] == ["cat=cat.png@m.png"]
    assert request.key() != request.replace(layout=()).key()
