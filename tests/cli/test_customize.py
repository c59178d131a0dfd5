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
CONSISTORY = ("--subject-method", "consistory")
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


def test_several_pictures_of_a_subject(cli: Cli, pictures: Path) -> None:
    several = ("--subject", "cat=in/cat.png@in/cat_mask.png,in/dog.jpg@0:0:0.5:1", "--subject-prompt", "cat=a grey cat")
    ran = cli("customize", "a cat", *TINY, *several, "-o", "a.png")
    assert ran.code == 0, ran.err
    assert cli("customize", "a cat", *TINY, *CAT, "-o", "one.png").code == 0
    assert not np.array_equal(pixels("a.png"), pixels("one.png"))
    metadata = read_metadata("a.png")
    assert metadata["request"]["subject"] == ["cat=cat.png@cat_mask.png,dog.jpg@0:0:0.5:1"]
    first, second = metadata["subjects_sha256"]["cat"]
    assert set(first) == {"picture", "mask"}
    assert second["box"] == [0, 0, 0.5, 1]
    assert metadata["run"]["attention"][0]["subjects"]["names"] == ["cat", "cat (2)"]
    again = cli("customize", "--from", "a.png", "-m", "TINY", *several[:2], "-o", "b.png")
    assert again.code == 0, again.err
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert "--subject-prompt 'cat=a grey cat'" in cli("inspect", "a.png", "--as-args").out


def test_subjects_by_words(cli: Cli, pictures: Path) -> None:
    words = ("--layout", "boxes.json", "--subject-method", "regional")
    ran = cli("customize", "a cat and a dog", *TINY, *words, "-o", "a.png")
    assert ran.code == 0, ran.err
    assert read_metadata("a.png")["request"]["subject"] == ["cat", "dog"]  # those of the layout
    told = ("--subject", "cat", "--subject", "dog", "--subject-prompt", "cat=a red cat")
    assert cli("customize", "a cat and a dog", *TINY, *words, *told, "-o", "red.png").code == 0
    assert not np.array_equal(pixels("a.png"), pixels("red.png"))
    again = cli("customize", "--from", "red.png", "-m", "TINY", "-o", "b.png")  # names no files
    assert again.code == 0, again.err
    assert np.array_equal(pixels("red.png"), pixels("b.png"))


def test_a_set_is_drawn_at_once(cli: Cli, pictures: Path) -> None:
    words = ("-m", tiny_family("sd15"), "--steps", "2", "--size", "24x40", "--subject", "cat")
    ran = cli(
        "customize", "a cat", *words, "--subject-method", "consistory", "-s", "3", "--num-images", "3", "-o", "s/"
    )
    assert ran.code == 0, ran.err
    assert [read_metadata(f"s/000{n}.png")["picture"] for n in (1, 2, 3)] == [1, 2, 3]
    assert read_metadata("s/0002.png")["request"]["seed"] == [3, 4, 5]
    again = cli("customize", "--from", "s/0002.png", "-m", tiny_family("sd15"), "-o", "again/")
    assert again.code == 0, again.err
    assert all(np.array_equal(pixels(f"s/000{n}.png"), pixels(f"again/000{n}.png")) for n in (1, 2, 3))
    plan = cli(
        "plan", "-m", "sdxl", "--subject", "cat", "--subject-method", "consistory", "--num-images", "3", "--json"
    )
    alone = cli("plan", "-m", "sdxl", "--json")
    flops = [json.loads(item.out)["stages"][0]["linear_flops"] for item in (plan, alone)]
    steps = [json.loads(item.out)["stages"][0]["steps"] for item in (plan, alone)]
    assert flops[0] == pytest.approx(3 * flops[1])
    assert steps[0] == 2 * steps[1]


SETS = {
    "one": (("-p", "a cat"), "one is asked for"),
    "prompts and pictures": (
        ("-p", "a cat", "-p", "the cat", "--num-images", "3"),
        "2 prompts are given and 3 pictures",
    ),
    "nine": (("-p", "a cat", "--num-images", "9"), "at most 8"),
    "unsaid": (("-p", "a cat", "-p", "a dog"), "fewer than two"),
    "empty": (("-p", "a cat", "-p", "the cat", "-p", " "), "prompt 3 of 3 is empty"),
    "placed": (("-p", "a cat", "--num-images", "2", "--layout", "cat.json"), "leave the layout of cat out"),
}


@pytest.mark.parametrize("mistake", SETS)
def test_what_sets_need(cli: Cli, pictures: Path, no_weights: None, mistake: str) -> None:
    Path("cat.json").write_text(json.dumps(BOXES[:1]))
    words, said = SETS[mistake]
    ran = cli("customize", "-m", tiny_family("sd15"), "--subject", "cat", *CONSISTORY, *words)
    assert ran.code == 2, ran.err
    assert said in ran.err


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
    "by words": (("--subject", "cat"), "needs a picture of cat"),
    "nine": (("--subject", "cat=" + ",".join(["in/cat.png"] * 9)), "at most 8"),
    "box as mask": (("--subject", "cat=in/cat.png@0:0:2:1"), "the box of"),
    "prompt of nobody": ((*CAT, "--subject-prompt", "cow=a cow"), "'cow'"),
    "several prompts": ((*CAT, "-p", "a cat"), "given more than once"),
    "regional nowhere": (("--subject", "cat", "--subject-method", "regional"), "where cat is to be"),
    "regional picture": ((*CAT, "--subject-method", "regional"), "leave it out"),
    "consistory unet": (("--subject", "cat", "--subject-method", "consistory"), "not on FLUX.1"),
    "needs a place": (("--subject", "hat=in/cat.png", "--subject-method", "isolation"), "where hat is to be"),
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
    ran = cli("customize", "a cat", "-m", tiny_family("qwenimage"), *CAT)
    assert ran.code == 2
    assert "customize works with FLUX.1" in ran.err


def test_requests_keep_their_form() -> None:
    request = CustomizeRequest(prompt="a cat", subject="cat=a/b@c/cat.png@m.png", layout=[["cat", 0, 0, 0.5, 1]])
    again = request_from_dict(json.loads(json.dumps(request.to_dict())))
    assert again == request
    assert request.to_dict(portable=True)["subject"] == ["cat=cat.png@m.png"]
    assert request.key() != request.replace(layout=()).key()
