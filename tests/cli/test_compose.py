"""`gensparse customize --subject-method primecomposer`: a background, an object, its box; mistakes."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_model import tiny_family

from gensparse.image_io import read_metadata

Cli = Callable[..., tuple[int, str, str]]
ROOM, CAT = ("--subject", "room=in/room.png"), ("--subject", "cat=in/cat.png@in/cat_mask.png")
METHOD = ("--subject-method", "primecomposer", "--layout", "boxes.json")


@pytest.fixture
def pictures(workdir: Path) -> None:
    Path("in").mkdir()
    rng = np.random.default_rng(5)
    for name, size in (("cat", (30, 21)), ("room", (17, 40))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(f"in/{name}.png")
    mask = np.zeros((30, 21), dtype=np.uint8)
    mask[4:, :12] = 255
    Image.fromarray(mask).save("in/cat_mask.png")
    Path("boxes.json").write_text(json.dumps([{"subject": "cat", "box": [0.1, 0.1, 0.6, 0.9]}]))


def test_an_object_is_put_into_a_background(cli: Cli, pictures: None) -> None:
    model = ("-m", tiny_family("sd15"), "--steps", "3", "--size", "40x24")
    ran = cli("customize", "a cat in a room", *model, *ROOM, *CAT, *METHOD, "-s", "3", "--num-images", "2", "-o", "s/")
    assert ran.code == 0, ran.err
    first, second = sorted(Path("s").glob("*.png"))
    assert Image.open(first).size == (40, 24)
    assert not np.array_equal(*(np.asarray(Image.open(path)) for path in (first, second)))
    metadata = read_metadata(str(first))
    assert set(metadata["subjects_sha256"]) == {"room", "cat"}
    (stage,) = metadata["run"]["attention"]
    assert stage["subjects"]["names"] == ["room", "cat"]
    assert stage["subjects"]["method"]["method"] == "primecomposer"
    assert stage["subjects"]["calls"]["sparse"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*CAT, *METHOD), "takes two pictures"),
        ((*ROOM, *CAT, *METHOD[:2]), "2 are given, 0 with a box"),
        (("--subject", "room", *CAT, *METHOD), "needs a picture of room"),
        (("--subject", "room=in/room.png,in/cat.png", *CAT, *METHOD), "takes two pictures"),
    ],
    ids=["no background", "no box", "no picture", "two backgrounds"],
)
@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_mistakes_are_one_sentence_before_weights(
    cli: Cli, pictures: None, monkeypatch: pytest.MonkeyPatch, family: str, words: tuple[str, ...], said: str
) -> None:
    def loader(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("gensparse.engine.session.load_pipeline", loader)
    model = "TINY" if family == "flux" else tiny_family(family)
    ran = cli("customize", "a cat in a room", "-m", model, "--steps", "2", *words)
    assert ran.code == 2, ran.err
    known = said if family == "sd15" or "picture of" in said else "works on UNets"
    assert known in ran.err
    assert "Traceback" not in ran.err
    if family == "sd15":
        ran = cli("customize", "a dog", "-m", model, "--steps", "2", *ROOM, *CAT, *METHOD)
        assert ran.code == 2
        assert "keeps the words 'cat'" in ran.err
