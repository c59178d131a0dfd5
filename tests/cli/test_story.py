"""`customize --turns`: pictures of a story, a bank that is written once, stopped and changed stories, one sentence per
mistake.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_model import tiny_family, tiny_folder

from gensparse.engine import session as engine_session
from gensparse.engine.story import SESSION, StoryRequest, StoryRun
from gensparse.errors import Cancelled, ConfigError
from gensparse.image_io import read_metadata
from gensparse.request import GenerateRequest
from gensparse.subjects.story import Story

Cli = Callable[..., tuple[int, str, str]]
TINY = ("-m", "TINY", "--steps", "1", "--size", "40x24")

CAT = {"name": "cat", "pictures": [{"picture": "in/cat.png", "mask": "in/cat_mask.png"}, "in/dog.jpg"]}
DOG = {"name": "dog", "prompt": "a brown dog"}
FOX = {"name": "fox"}
STORY: dict[str, Any] = {
    "seed": 7,
    "subjects": [CAT, DOG, FOX],
    "turns": [
        {"prompt": "a dog runs", "layout": [{"subject": "dog", "box": [0.25, 0, 0.9, 1]}]},
        {"prompt": "a cat and a dog on a sofa", "seed": 8},
        {"prompt": "a fox looks at the cat", "subjects": ["cat", "fox"]},
        {"prompt": "an empty garden"},
    ],
}


def write_pictures(folder: Path) -> None:
    (folder / "in").mkdir()
    rng = np.random.default_rng(5)
    for name, size in (("cat.png", (30, 21)), ("dog.jpg", (17, 40))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / "in" / name)
    mask = np.zeros((30, 21), dtype=np.uint8)
    mask[4:, :12] = 255
    Image.fromarray(mask).save(folder / "in" / "cat_mask.png")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The pictures of a story that nobody stopped, made in Python."""
    folder = tmp_path_factory.mktemp("whole")
    write_pictures(folder)
    base = GenerateRequest(model=str(tiny_folder()), steps=1, size="40x24")
    run = StoryRun(StoryRequest(Story.of(STORY, folder=folder), base), folder / "out")
    run.check()
    results = [run.turn(number) for number in range(run.count)]
    return {result.path.name: result.path.read_bytes() for result in results}


@pytest.fixture
def story(workdir: Path) -> Callable[..., None]:
    """Writes a story file with its pictures; `story(turns=...)` changes it."""
    write_pictures(Path())

    def write(**changes: Any) -> None:
        Path("story.json").write_text(json.dumps(STORY | changes))

    write()
    return write


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Prompts of everything that was drawn."""
    seen: list[str] = []
    execute = engine_session.Runner.execute

    def noted(self: Any, request: Any, *rest: Any, **more: Any) -> Any:
        seen.append(request.prompt)
        return execute(self, request, *rest, **more)

    monkeypatch.setattr(engine_session.Runner, "execute", noted)
    return seen


def turns(**changes: dict[str, Any]) -> list[dict[str, Any]]:
    """The turns of the story, changed: `turns(t2={"seed": 9})`."""
    return [{**turn, **changes.get(f"t{number}", {})} for number, turn in enumerate(STORY["turns"], 1)]


def told(cli: Cli, *words: str) -> Any:
    return cli("customize", "--turns", "story.json", *TINY, "-o", "out/", *words)


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path))


def names(folder: str = "out") -> list[str]:
    return sorted(path.name for path in Path(folder).glob("*.png"))


def session() -> dict[str, Any]:
    return json.loads(Path("out", SESSION).read_text())


def test_a_story_is_told_once_and_goes_on(cli: Cli, story: Callable[..., None], calls: list[str]) -> None:
    ran = told(cli, "--json")
    assert ran.code == 0, ran.err
    said = json.loads(ran.out)
    assert [turn["status"] for turn in said["turns"]] == ["ok"] * 4
    assert [turn["seed"] for turn in said["turns"]] == [7, 8, 7, 7]
    assert said["bank"] == {"dog": {"turn": 1, "how": "cut"}, "fox": {"turn": 3, "how": "portrait"}}
    assert names() == [f"turn-0{n}.png" for n in range(1, 5)]
    # the fox, which joins a cat that is known, is drawn alone first
    assert calls == ["a dog runs", "a cat and a dog on a sofa", "fox", "a fox looks at the cat", "an empty garden"]
    (look,) = Path("out/bank").glob("dog-*.png")
    assert np.array_equal(pixels(str(look)), pixels("out/turn-01.png")[:, 10:36])
    second = read_metadata("out/turn-02.png")
    assert second["request"]["subject"] == ["cat=cat.png@cat_mask.png,dog.jpg", f"dog={look.name}"]
    assert second["request"]["subject_prompt"] == ["dog=a brown dog"]
    assert second["run"]["attention"][0]["subjects"]["names"] == ["cat", "cat (2)", "dog"]
    before = {name: Path("out", name).read_bytes() for name in names()}

    calls.clear()
    again = told(cli, "--json")
    assert again.code == 0, again.err
    assert [turn["status"] for turn in json.loads(again.out)["turns"]] == ["skipped"] * 4
    assert not calls

    Path("out/turn-02.png").unlink()
    Path(look).unlink()
    story(turns=[*STORY["turns"], {"prompt": "a dog and a fox"}])
    more = told(cli)
    assert more.code == 0, more.err
    assert calls == ["a cat and a dog on a sofa", "a dog and a fox"]
    assert {name: Path("out", name).read_bytes() for name in before} == before
    assert look.is_file()


def test_turns_are_single_calls(cli: Cli, story: Callable[..., None]) -> None:
    """A first turn by words is `regional` (where all have boxes) or `generate`, one with pictures is `customize`."""
    box = [{"subject": "dog", "box": [0.25, 0, 0.9, 1]}]
    Path("boxes.json").write_text(json.dumps(box))
    story(turns=[{"prompt": "a dog runs", "layout": box}, {"prompt": "a cat"}])
    assert told(cli).code == 0
    same = (*TINY, "-s", "7")
    words = ("--subject", "dog", "--subject-prompt", "dog=a brown dog", "--layout", "boxes.json")
    regional = cli("customize", "a dog runs", *same, *words, "--subject-method", "regional", "-o", "r.png")
    assert regional.code == 0, regional.err
    assert np.array_equal(pixels("r.png"), pixels("out/turn-01.png"))
    shown = ("--subject", "cat=in/cat.png@in/cat_mask.png,in/dog.jpg")
    assert cli("customize", "a cat", *same, *shown, "-o", "c.png").code == 0
    assert np.array_equal(pixels("c.png"), pixels("out/turn-02.png"))
    story(turns=[{"prompt": "a dog runs"}])
    assert cli("customize", "--turns", "story.json", *TINY, "-o", "plain/").code == 0
    assert cli("generate", "a dog runs", *same, "-o", "g.png").code == 0
    assert np.array_equal(pixels("g.png"), pixels("plain/turn-01.png"))


def test_looks_are_written_once(cli: Cli, story: Callable[..., None]) -> None:
    story(turns=[{"prompt": "a dog"}, {"prompt": "the dog again"}, {"prompt": "a dog and a fox", "seed": 2}])
    assert told(cli).code == 0
    (dog,) = Path("out/bank").glob("dog-*.png")
    assert np.array_equal(pixels(str(dog)), pixels("out/turn-01.png"))
    assert session()["bank"]["dog"]["turn"] == 1
    assert [read_metadata(f"out/turn-0{n}.png")["request"]["kind"] for n in (1, 2, 3)] == [
        "generate",
        "customize",
        "customize",
    ]


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_stopped_story_goes_on(
    cli: Cli,
    story: Callable[..., None],
    calls: list[str],
    whole: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    stop: int,
) -> None:
    """Between a picture and what is kept of it (1), in the middle of a turn (2), behind a portrait (3)."""
    if stop == 1:
        with monkeypatch.context() as patched:
            patched.setattr(StoryRun, "_cut", lambda *_: (_ for _ in ()).throw(Cancelled("stopped")))
            assert told(cli).code == 130
        assert names() == ["turn-01.png"]
    else:
        execute = engine_session.Runner.execute
        with monkeypatch.context() as patched:

            def stopped(self: Any, request: Any, *rest: Any, **more: Any) -> Any:
                if request.prompt == STORY["turns"][stop - 1]["prompt"]:
                    raise Cancelled("stopped")
                return execute(self, request, *rest, **more)

            patched.setattr(engine_session.Runner, "execute", stopped)
            ran = told(cli, "--json")
        assert ran.code == 130
        assert json.loads(ran.out.splitlines()[0])["status"] == "cancelled"
        assert len(names()) == stop - 1
    made = len(calls)
    ran = told(cli)
    assert ran.code == 0, ran.err
    assert len(calls) == 5  # nothing was drawn twice
    assert made > 0
    assert {name: Path("out", name).read_bytes() for name in names()} == whole


CHANGES = {
    "prompt": ({"turns": turns(t2={"prompt": "a cat and a dog asleep"})}, "turn 2", "(prompt)"),
    "seed": ({"turns": turns(t1={"seed": 1})}, "turn 1", "(seed)"),
    "box": ({"turns": turns(t1={"layout": [{"subject": "dog", "box": [0, 0, 1, 1]}]})}, "turn 1", "layout"),
    "picture": ({"subjects": [{"name": "cat", "picture": "in/cat.png"}, DOG, FOX]}, "turn 2", "pictures or looks"),
    "words": ({"subjects": [CAT, {"name": "dog"}, FOX]}, "turn 1", "prompts of subjects"),
    "portrait": ({"subjects": [CAT, DOG, {"name": "fox", "picture": "in/dog.jpg"}]}, "turn 3", "pictures or looks"),
}


def test_changed_turns_are_said_and_made_again_when_asked(
    cli: Cli, story: Callable[..., None], calls: list[str]
) -> None:
    assert told(cli).code == 0
    before = {name: Path("out", name).read_bytes() for name in names()}
    calls.clear()
    for changes, where, what in CHANGES.values():
        story(**changes)
        ran = told(cli)
        assert ran.code == 2, ran.err
        assert f"story.json, {where}: " in ran.err
        assert what in ran.err
        assert "--overwrite" in ran.err
    assert told(cli, "--steps", "2").code == 2
    assert not calls
    assert {name: Path("out", name).read_bytes() for name in names()} == before

    story(turns=turns(t2={"prompt": "a cat and a dog asleep"}))
    ran = told(cli, "--overwrite", "--json")
    assert ran.code == 0, ran.err
    assert [turn["status"] for turn in json.loads(ran.out)["turns"]] == ["skipped", "ok", "skipped", "skipped"]
    assert calls == ["a cat and a dog asleep"]

    calls.clear()
    story(turns=turns(t1={"seed": 1}, t2={"prompt": "a cat and a dog asleep"}))
    assert told(cli, "--overwrite").code == 0
    assert calls == ["a dog runs", "a cat and a dog asleep"]  # the dog looks different now, the fox does not
    assert session()["bank"]["dog"]["turn"] == 1


def test_what_others_did_to_the_folder_is_said(cli: Cli, story: Callable[..., None], calls: list[str]) -> None:
    story(turns=STORY["turns"][:1])
    assert told(cli).code == 0
    calls.clear()
    Image.new("RGB", (40, 24)).save("out/turn-01.png")
    ran = told(cli)
    assert ran.code == 6
    assert "has been changed since" in ran.err
    Path("out", SESSION).write_text("{")
    ran = told(cli)
    assert ran.code == 2
    assert "damaged" in ran.err
    Path("out", SESSION).unlink()
    ran = told(cli)
    assert ran.code == 6
    assert "exists already" in ran.err
    assert not [prompt for prompt in calls if prompt != "a dog runs"]
    assert told(cli, "--overwrite").code == 0
    story(turns=[{"prompt": "nobody"}])
    assert cli("customize", "--turns", "story.json", *TINY, "-o", "out2/", "--no-metadata").code == 0


def test_shorter_stories_leave_pictures(cli: Cli, story: Callable[..., None], calls: list[str]) -> None:
    story(turns=STORY["turns"][:2])
    assert told(cli).code == 0
    story(turns=STORY["turns"][:1])
    ran = told(cli)
    assert ran.code == 0
    assert "turn-02.png" in ran.err
    calls.clear()
    story(turns=STORY["turns"][:2])
    assert told(cli).code == 0  # known by what is written in it
    assert not calls


def test_seeds_that_are_left_open_are_kept(cli: Cli, story: Callable[..., None]) -> None:
    Path("story.json").write_text(
        json.dumps({"subjects": [FOX], "turns": [{"prompt": "a fox"}, {"prompt": "it sleeps", "subjects": ["fox"]}]})
    )
    assert told(cli).code == 0
    seeds = [item["seed"] for item in session()["turns"]]
    assert seeds[0] == seeds[1] == session()["seed"]
    ran = told(cli, "--json")
    assert [turn["status"] for turn in json.loads(ran.out)["turns"]] == ["skipped"] * 2


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_sets_and_stories_of_unets(cli: Cli, story: Callable[..., None], calls: list[str], family: str) -> None:
    words = ("-m", tiny_family(family), "--steps", "2", "--size", "24x40")
    story(method="consistory", subjects=[FOX], turns=[{"prompt": f"a fox {where}"} for where in ("at sea", "in snow")])
    ran = cli("customize", "--turns", "story.json", *words, "-o", "out/", "--json")
    assert ran.code == 0, ran.err
    assert [turn["seed"] for turn in json.loads(ran.out)["turns"]] == [7, 8]
    assert calls == ["a fox at sea"]
    # as one command
    prompts = ("-p", "a fox at sea", "-p", "a fox in snow", "-s", "7", "-s", "8")
    given = ("--subject", "fox", "--subject-method", "consistory")
    ran = cli("customize", *prompts, *words, *given, "-o", "set/")
    assert ran.code == 0, ran.err
    for number in (1, 2):
        assert np.array_equal(pixels(f"set/000{number}.png"), pixels(f"out/turn-0{number}.png"))
        assert read_metadata(f"set/000{number}.png")["picture"] == number
    Path("out/turn-02.png").unlink()
    assert cli("customize", "--turns", "story.json", *words, "-o", "out/").code == 0
    assert np.array_equal(pixels("set/0002.png"), pixels("out/turn-02.png"))
    if family == "sdxl":
        return
    # and turn by turn, the second beside the first
    story(subjects=[FOX, CAT], turns=[{"prompt": "a fox"}, {"prompt": "a fox and a cat"}])
    ran = cli(
        "customize", "--turns", "story.json", *words, "-o", "turns/", "--subject-method", "storydiffusion:start=0"
    )
    assert ran.code == 0, ran.err
    assert read_metadata("turns/turn-02.png")["run"]["attention"][0]["subjects"]["names"] == ["fox", "cat", "cat (2)"]


def test_the_story_on_the_page_is_one() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "subjects.md").read_text()
    block = page.split("## Stories")[1].split("```json\n")[1].split("```")[0]
    found = Story.of(json.loads(block))
    assert [turn.subjects for turn in found.turns] == [("dog",), ("cat", "dog"), ("cat", "dog"), ("cat", "fox")]
    assert found.actor("cat").shown[1].box == (0.1, 0.2, 0.9, 1.0)


def changed(**changes: Any) -> dict[str, Any]:
    return {**STORY, **changes}


def test_looks_may_have_masks(story: Callable[..., None]) -> None:
    """From Python: something that finds a subject in its cut-out."""
    story(turns=[{"prompt": "a dog"}, {"prompt": "the dog sleeps"}])

    def left(image: Image.Image, name: str) -> np.ndarray:
        assert name == "dog"
        mask = np.zeros((image.height, image.width), dtype=bool)
        mask[:, : image.width // 2] = True
        return mask

    base = GenerateRequest(model=str(tiny_folder()), steps=1, size="40x24", seed=(1,))
    pictures = []
    for segment in (None, left):
        run = StoryRun(StoryRequest(Story.read(Path("story.json")), base), Path(f"out{segment}"), segment=segment)
        run.check()
        pictures.append([run.turn(number) for number in range(run.count)])
        again = StoryRun(StoryRequest(Story.read(Path("story.json")), base), Path(f"out{segment}"), segment=segment)
        again.check()
        assert [again.turn(number).status for number in range(run.count)] == ["skipped"] * 2
    assert run.bank["dog"].mask is not None
    plain, masked = pictures
    assert plain[0].seed == masked[0].seed == 1  # before the story's
    assert np.array_equal(pixels(str(plain[0].path)), pixels(str(masked[0].path)))
    assert not np.array_equal(pixels(str(plain[1].path)), pixels(str(masked[1].path)))
    with pytest.raises(ConfigError, match="one picture per turn"):
        StoryRequest(Story.read(Path("story.json")), base.replace(num_images=2))


def turn(**keys: Any) -> dict[str, Any]:
    return changed(turns=[{"prompt": "a cat"}, {"prompt": "a cat", **keys}])


def actor(**keys: Any) -> dict[str, Any]:
    return changed(subjects=[{"name": "cat", **keys}], turns=[{"prompt": "a cat"}])


MISTAKES: dict[str, tuple[Any, str]] = {
    "no object": ([1], "story.json: "),
    "unknown key": (changed(turn=[]), "did you mean turns"),
    "no turns": (changed(turns=[]), "turns is []"),
    "too many turns": (changed(turns=[{"prompt": "x"}] * 101), "at most 100"),
    "no subjects": ({"turns": [{"prompt": "x"}]}, "subjects is None"),
    "two of a name": (changed(subjects=[CAT, CAT]), "two subjects are named 'cat'"),
    "method": (changed(method=7), "method is 7"),
    "other method": (changed(method="freecustm"), "did you mean freecustom"),
    "regional": (changed(method="regional"), "keeps no looks"),
    "seed": (changed(seed=-1), "seed is -1"),
    "actor key": (actor(pictur="x"), "subject 1: unknown key"),
    "actor name": (actor(name="a=b"), "subject 1: name"),
    "actor picture": (actor(picture=3), "subject 1 (cat): picture is 3"),
    "actor missing": (actor(picture="none.png"), "none.png"),
    "actor no picture": (actor(picture="story.json"), "subject 1 (cat): "),
    "actor mask": (actor(mask="in/cat_mask.png"), "without a picture"),
    "actor box": (actor(picture="in/cat.png", box=[0, 0, 2, 1]), "subject 1 (cat): the box"),
    "actor box and mask": (actor(picture="in/cat.png", mask="in/cat_mask.png", box=[0, 0, 1, 1]), "one of both"),
    "actor both": (actor(picture="in/cat.png", pictures=["in/cat.png"]), "write all of them into pictures"),
    "actor many": (actor(pictures=["in/cat.png"] * 9), "at most 8"),
    "turn key": (turn(box=[0, 0, 1, 1]), "turn 2: unknown key 'box'"),
    "turn prompt": (turn(prompt=" "), "turn 2: prompt"),
    "turn no prompt": (turn(prompt=None), "turn 2: it has no prompt"),
    "turn subject": (turn(subjects=["cow"]), "turn 2: unknown subject 'cow'"),
    "turn twice": (turn(subjects=["cat", "cat"]), "turn 2: subjects has 'cat' twice"),
    "turn subjects": (turn(subjects="cat"), "turn 2: subjects is 'cat'"),
    "turn layout": (turn(layout={}), "turn 2: layout is {}"),
    "turn box": (turn(layout=[{"subject": "cat", "box": [0, 0, 1.5, 1]}]), "turn 2: the box of 'cat'"),
    "turn place": (turn(subjects=["cat"], layout=[{"subject": "dog", "box": [0, 0, 1, 1]}]), "turn 2: the layout has"),
    "turn seed": (turn(seed="1"), "turn 2: seed is '1'"),
    "turn placeless": (changed(turns=[{"prompt": "a dog and a fox"}]), "turn 1: dog, fox appears for the first time"),
    "turn method": (changed(method="reference_only", turns=turns()[1:]), "turn 1: reference_only takes 1 picture"),
    "set picture": (changed(method="consistory"), "consistory"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_sentence_before_weights(
    cli: Cli, story: Callable[..., None], monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    def loader(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("gensparse.engine.session.load_pipeline", loader)
    data, said = MISTAKES[mistake]
    Path("story.json").write_text(json.dumps(data))
    ran = told(cli)
    assert ran.code == 2, ran.err
    assert said in ran.err
    assert ran.err.startswith("error: ")
    assert not names()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "no JSON (line 1)"),
        ('{"seed": 1, "seed": 2}', "'seed' twice"),
        ('{"seed": NaN}', "NaN is no number"),
        ("\xff", "no JSON"),
        (" " * (1 << 20) + "{}", "more than 1048576 bytes"),
    ],
    ids=["half", "twice", "nan", "bytes", "long"],
)
def test_files_that_are_no_story(cli: Cli, story: Callable[..., None], text: str, said: str) -> None:
    Path("story.json").write_bytes(text.encode("latin-1"))
    ran = told(cli)
    assert ran.code == 2
    assert said in ran.err


def test_flags_that_a_story_has_itself(cli: Cli, story: Callable[..., None]) -> None:
    for words in (
        ("--subject", "cat=in/cat.png"),
        ("--num-images", "2"),
        ("-s", "1", "-s", "2"),
        ("-p", "a cat"),
        ("-n", "bad"),
    ):
        ran = told(cli, *words)
        assert ran.code == 2, words
        assert "story" in ran.err
    assert cli("customize", "--turns", "none.json", *TINY).code == 2
    for place in ("-", "a.png"):
        ran = cli("customize", "--turns", "story.json", *TINY, "-o", place)
        assert ran.code == 2
        assert "folder" in ran.err
    assert not Path("gensparse-out").exists() or not any(Path("gensparse-out").rglob("*.png"))
