"""Turns of visitors: the same subjects in one picture after the other, each made once."""

import json
import threading
from pathlib import Path

import pytest
from PIL import Image

from gensparse.app import runs, tales
from gensparse.app.core import App
from gensparse.app.jobs import Job, State
from gensparse.app.settings import Limits, Settings
from gensparse.engine.values import Output, OutputOptions, Result
from gensparse.errors import BusyError, ConfigError
from gensparse.image_io import write_image
from gensparse.subjects.story import Story

ME = "cookie-a"


class Painter:
    """An engine that paints grey pictures, or fails where the prompt says so, or waits until it is told to go on."""

    def __init__(self) -> None:
        self.requests: list = []
        self.go = threading.Event()
        self.go.set()

    def execute(self, request, output: OutputOptions, *, on_event=None, cancel=None) -> Result:
        assert self.go.wait(20)
        if "fails" in request.prompt:
            raise ConfigError("it failed as it was told")
        self.requests.append(request)
        told = request.to_dict(portable=True)
        path, metadata = output.paths[0], {"gensparse": 1, "request": told, "key": output.key}
        digest = write_image(Image.new("RGB", (64, 64), "grey"), path, metadata=metadata, overwrite=output.overwrite)
        return Result("ok", (Output(str(path), 64, 64, request.seed[0], digest, None),), told, {}, {}, {}, {})

    def tidy(self) -> None:
        pass


@pytest.fixture
def engine() -> Painter:
    return Painter()


@pytest.fixture
def app(tmp_path: Path, engine: Painter):
    made = App(Settings(output_dir=tmp_path / "out", preload=False), tmp_path / "scratch", engine)
    yield made
    engine.go.set()
    made.close()


def upload(app: App, name: str) -> dict[str, str]:
    folder = app.sessions.scratch / name
    folder.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(folder / name)
    app.sessions.own_upload(str(folder / name), ME)
    return {"path": str(folder / name)}


def begun(app: App, prompt: str = "a circle and a star", **values) -> Job:
    subjects = [
        {"name": "circle", "image": upload(app, "a.png"), "mask": "0:0:0.5:1", "box": [0, 0, 0.5, 1]},
        {"name": "star", "image": upload(app, "b.jpg"), "mask": upload(app, "m.png"), "prompt": "a blue star"},
    ]
    request, _ = runs.asked(app, "customize", {"prompt": prompt, "size": "64x64", **values}, ME, subjects=subjects)
    return ended(tales.begin(app, ME, request))


def ended(job: Job) -> Job:
    assert job.wait(30)
    return job


def next_of(app: App, job: Job, prompt: str, **more) -> Job:
    return ended(tales.follow(app, ME, job, prompt, **more))


def test_a_tale_is_told_turn_by_turn(app: App, engine: Painter) -> None:
    first = begun(app, seed=5, steps=7)
    assert first.state is State.DONE, first.error
    second = next_of(app, first, "a Star at night", boxes={"star": "0.5, 0, 1, 1", "circle": [0, 0, 1, 0.5]}, seed=9)
    third = next_of(app, second, "all in the snow")
    assert [job.state for job in (second, third)] == [State.DONE] * 2, (second.error, third.error)
    one, two, three = engine.requests
    assert (one.prompt, one.seed, one.steps, one.key()) == ("a circle and a star", (5,), 7, first.request.key())
    assert (two.prompt, two.seed, two.steps) == ("a Star at night", (9,), 7)
    assert list(two.shown) == ["star"]
    assert two.shown["star"] == one.shown["star"]
    assert two.layout == (("star", 0.5, 0.0, 1.0, 1.0),)
    assert two.subject_prompt == ("star=a blue star",)
    assert list(three.shown) == ["circle", "star"], "a prompt without names has all of them"
    assert three.layout == (("star", 0.5, 0.0, 1.0, 1.0),), "places stay"
    assert three.seed != two.seed
    assert [Path(job.result.outputs[0].path).name for job in (first, second, third)] == [
        "turn-01.png",
        "turn-02.png",
        "turn-03.png",
    ]
    assert tales.told(app, second) == [first, second, third]


def test_the_story_can_be_told_again_on_the_command_line(app: App, tmp_path: Path) -> None:
    job = next_of(app, begun(app, seed=5, steps=7), "a star", seed=3)
    tale = job.facts["tale"]
    assert str(tmp_path) not in tale.text + tale.command
    read = Story.of(json.loads(tale.text))
    assert read.turns == tale.story.turns
    assert read.method == "auto"
    assert [actor.prompt for actor in read.actors] == ["", "a blue star"]
    assert [one.box for actor in read.actors for one in actor.shown] == [(0, 0, 0.5, 1), None]
    assert tale.command == "gensparse customize --turns story.json --steps 7 --size 64x64"


def test_only_the_newest_picture_is_continued(app: App, engine: Painter) -> None:
    first = begun(app)
    second = next_of(app, first, "a star")
    with pytest.raises(ConfigError, match="continued already"):
        tales.follow(app, ME, first, "a circle")
    failed = next_of(app, second, "a star that fails")
    assert failed.error is not None
    assert failed.error.endswith("it failed as it was told")
    after = next_of(app, failed, "a star again")
    assert after.state is State.DONE
    assert [turn.prompt for turn in after.facts["tale"].story.turns] == [
        "a circle and a star",
        "a star",
        "a star again",
    ]
    engine.go.clear()
    running = tales.follow(app, ME, after, "a circle")
    with pytest.raises(ConfigError, match="not done yet"):
        tales.follow(app, ME, after, "a star")
    app.jobs.cancel(running)
    engine.go.set()
    assert ended(running).state in (State.CANCELLED, State.DONE)


@pytest.mark.parametrize(
    ("values", "words"),
    [({"num_images": 2}, "cannot be continued"), ({"prompt": "it fails, circle and star"}, "nothing of it is done")],
    ids=["two pictures", "failed"],
)
def test_what_is_no_turn_cannot_be_continued(app: App, values: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tales.follow(app, ME, begun(app, **values), "a star")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"prompt": "x" * 2001}, "prompt has 2001"),
        ({"prompt": 5}, "give text"),
        ({"prompt": " "}, "picture is empty"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**53}, "seed is"),
        ({"boxes": {"tree": [0, 0, 1, 1]}}, "circle, star"),
        ({"boxes": [0, 0, 1, 1]}, "circle, star"),
        ({"boxes": {"star": [0, 0, 2, 1]}}, "0 <= left"),
    ],
    ids=str,
)
def test_fault_29_turns_meet_the_limits_of_requests(app: App, values: dict, words: str) -> None:
    job = begun(app)
    folders = set(app.sessions.folder(ME).iterdir())
    with pytest.raises(ConfigError, match=words):
        tales.follow(app, ME, job, **{"prompt": "a star", **values})
    assert set(app.sessions.folder(ME).iterdir()) == folders, "nothing is left behind"


def test_fault_29_a_full_queue_leaves_no_folder(tmp_path: Path) -> None:
    settings = Settings(output_dir=tmp_path / "out", preload=False, limits=Limits(queue=1, per_session=1))
    engine = Painter()
    app = App(settings, tmp_path / "scratch", engine)
    try:
        job = begun(app)
        engine.go.clear()
        running = tales.follow(app, ME, job, "a star")
        folders = set(app.sessions.folder(ME).iterdir())
        with pytest.raises(ConfigError, match="not done yet"):
            tales.follow(app, ME, job, "a star")
        request, _ = runs.asked(
            app, "customize", {"prompt": "a"}, ME, subjects=[{"name": "c", "image": upload(app, "c.png")}]
        )
        with pytest.raises(BusyError, match="which is the limit"):
            tales.begin(app, ME, request)
        assert set(app.sessions.folder(ME).iterdir()) == folders
        engine.go.set()
        ended(running)
    finally:
        engine.go.set()
        app.close()
