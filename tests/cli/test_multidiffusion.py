"""`customize --subject-method multidiffusion`, and subjects by pictures on Stable Diffusion 3 and PixArt."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_model import tiny_family

from gensparse.image_io import read_metadata

Cli = Callable[..., tuple[int, str, str]]
BOXES = [{"subject": "cat", "box": [0, 0.1, 0.5, 1]}, {"subject": "dog", "box": [0.5, 0, 1, 1]}]
FUSED = ("--subject-method", "multidiffusion", "--layout", "boxes.json")


@pytest.fixture
def boxes(workdir: Path) -> Path:
    Path("boxes.json").write_text(json.dumps(BOXES))
    return Path("boxes.json")


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_regions_of_a_layout_and_their_words(cli: Cli, boxes: Path) -> None:
    small = ("-m", "TINY", "--steps", "3", "-s", "3", "--size", "40x24")
    ran = cli("customize", "a lawn", *small, *FUSED, "-o", "a.png", "--json")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)["attention"]["stages"][0]["regions"]
    assert (told["method"], told["regions"], told["views"]) == ("multidiffusion", 2, 1)
    words = ("--subject", "cat", "--subject", "dog", "--subject-prompt", "cat=a red cat")
    negative = ("--subject-negative", "dog=blue")
    assert cli("customize", "a lawn", *small, *FUSED, *words, "-o", "red.png").code == 0
    ran = cli("customize", "a lawn", *small, *FUSED, *words, *negative, "-o", "not-blue.png")
    assert ran.code == 0, ran.err
    made = [pixels(name) for name in ("a.png", "red.png", "not-blue.png")]
    assert not np.array_equal(made[0], made[1])
    assert not np.array_equal(made[1], made[2])
    assert read_metadata("not-blue.png")["request"]["subject_negative"] == ["dog=blue"]
    again = cli("customize", "--from", "not-blue.png", "-m", "TINY", "-o", "b.png")
    assert again.code == 0, again.err
    assert np.array_equal(pixels("b.png"), made[2])
    assert "--subject-negative dog=blue" in cli("inspect", "b.png", "--as-args").out
    hidden = cli("customize", "a lawn", *small, *FUSED, *words, *negative, "--no-prompt", "-o", "c.png")
    assert hidden.code == 0, hidden.err
    assert not {"subject_negative", "subject_prompt", "prompt"} & set(read_metadata("c.png")["request"])


def test_the_plan_counts_a_call_per_region(cli: Cli, boxes: Path) -> None:
    def steps(*words: str) -> list[int]:
        ran = cli("plan", "-m", "sdxl", "--size", "2048", *words, "--json")
        assert ran.code == 0, ran.err
        return [stage["steps"] for stage in json.loads(ran.out)["stages"]]

    plain, fused = steps(), steps(*FUSED)
    assert fused == [3 * count for count in plain]
    assert steps("--layout", "boxes.json", "--subject-method", "multidiffusion:larger=false") == [fused[0], *plain[1:]]


MISTAKES = {
    "no layout": (("--subject", "cat", "--subject-method", "multidiffusion"), "where cat is to be"),
    "setting": (("--layout", "boxes.json", "--subject-method", "multidiffusion:share=1"), "setting of multidiffusion"),
    "windows": ((*FUSED, "--highres", "demofusion"), "--highres demofusion"),
    "negative of nobody": ((*FUSED, "--subject-negative", "cow=grass"), "'cow'"),
    "negative without place": (
        ("--subject", "cat", "--subject-method", "consistory", "--num-images", "2", "--subject-negative", "cat=dog"),
        "has a negative prompt",
    ),
    "negative of a form": ((*FUSED, "--subject-negative", "cat"), "negative prompt 'cat' is not NAME=TEXT"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_sentence_before_weights(
    cli: Cli, boxes: Path, mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loader(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("gensparse.engine.session.load_pipeline", loader)
    words, said = MISTAKES[mistake]
    ran = cli("customize", "a cat", "-m", tiny_family("sd15"), *words, "-o", "a.png")
    assert ran.code == 2, ran.err
    assert said in ran.err


@pytest.mark.parametrize("family", ["sd3", "pixart"])
def test_subjects_by_pictures_on_other_families(cli: Cli, boxes: Path, family: str) -> None:
    rng = np.random.default_rng(5)
    Image.fromarray(rng.integers(0, 256, (30, 21, 3), dtype=np.uint8)).save("cat.png")
    small = ("-m", tiny_family(family), "--steps", "2", "-s", "3", "--size", "40x24", "--subject", "cat=cat.png")
    ran = cli("customize", "a cat", *small, "-o", "a.png", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["attention"]["stages"][0]["subjects"]["names"] == ["cat"]
    assert cli("generate", "a cat", *small[:-2], "-o", "plain.png").code == 0
    assert not np.array_equal(pixels("a.png"), pixels("plain.png"))
    refused = cli("customize", "a cat", *small, "--subject-method", "magicface", "-o", "b.png")
    assert refused.code == 2
    assert "works on UNets" in refused.err
