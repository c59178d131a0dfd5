"""History and presets of visitors: everybody sees his own, whatever he asks for."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from gensparse.app import history, presets
from gensparse.app.core import App
from gensparse.app.settings import Settings
from gensparse.engine import presets as own_presets
from gensparse.engine.values import Output, OutputOptions, Result
from gensparse.errors import ConfigError
from gensparse.image_io import write_image
from gensparse.request import GenerateRequest


class Painter:
    """An engine that paints one grey picture per request."""

    def execute(self, request, output: OutputOptions, *, on_event=None, cancel=None) -> Result:
        made = []
        for path, seed in zip(output.paths, request.seed, strict=True):
            write_image(Image.linear_gradient("L").resize((96, 64)).convert("RGB"), path)
            made.append(Output(str(path), 96, 64, seed, "0" * 64, None))
        return Result("ok", tuple(made), request.to_dict(portable=True), {}, {}, {}, {})

    def tidy(self) -> None:
        pass


@pytest.fixture(params=["loopback", "shared"])
def app(request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    shared = {"host": "0.0.0.0", "auth": ("me", "secret")} if request.param == "shared" else {}
    made = App(Settings(output_dir=tmp_path / "out", preload=False, **shared), tmp_path / "scratch", Painter())
    yield made
    made.close()


def paint(app: App, owner: str, seeds=(3, 4), prompt: str = "a red circle") -> None:
    request = GenerateRequest(prompt=prompt, seed=seeds, num_images=len(seeds), steps=5, attention="clear:radius=4")
    folder = app.sessions.new_folder(owner)
    output = OutputOptions(paths=tuple(folder / f"{n}.png" for n in range(len(seeds))))
    job = app.jobs.submit(
        owner, lambda engine, on_event, cancel: engine.execute(request, output), kind="generate", request=request
    )
    assert job.wait(10)
    assert job.error is None


def test_the_history_is_a_visitors_own(app: App) -> None:
    paint(app, "cookie-a")
    paint(app, "cookie-b", (9,), "x" * 500)
    mine, theirs = history.entries(app, "cookie-a"), history.entries(app, "cookie-b")
    assert [entry.output.seed for entry in mine] == [3, 4]
    assert [entry.output.seed for entry in theirs] == [9]
    assert mine[0].caption == "96 x 64, seed 3: a red circle"
    assert len(theirs[0].caption) < 100
    assert history.find(app, "cookie-a", mine[1].key) == mine[1]
    for key in (theirs[0].key, "nothing/0", None, f"{mine[0].job.id}/7"):
        with pytest.raises(ConfigError, match="not here any more"):
            history.find(app, "cookie-a", key)
    assert history.entries(app, "cookie-c") == []


def test_thumbnails_are_small_and_made_once(app: App) -> None:
    paint(app, "cookie-a", (3,))
    (entry,) = history.entries(app, "cookie-a")
    path = history.thumbnail(app, "cookie-a", entry.output)
    assert path.is_relative_to(app.sessions.folder("cookie-a", scratch=True))
    assert app.sessions.may_read(path, "cookie-a")
    assert not app.sessions.may_read(path, "cookie-b")
    with Image.open(path) as small:
        assert max(small.size) <= history.THUMBNAIL
    before = path.stat().st_mtime_ns
    assert history.thumbnail(app, "cookie-a", entry.output) == path
    assert path.stat().st_mtime_ns == before


def test_a_picture_that_cannot_be_opened_again_has_a_plain_thumbnail(app: App, tmp_path: Path) -> None:
    broken = Output(str(tmp_path / "gone.png"), 16384, 16384, 1, None, None)
    with Image.open(history.thumbnail(app, "cookie-a", broken)) as small:
        assert small.size == (history.THUMBNAIL,) * 2


def test_deleted_files_leave_the_history(app: App) -> None:
    paint(app, "cookie-a", (3,))
    (entry,) = history.entries(app, "cookie-a")
    Path(entry.output.path).unlink()
    assert history.entries(app, "cookie-a") == []


def test_settings_make_the_same_picture(app: App) -> None:
    paint(app, "cookie-a")
    kind, values = history.settings_of(history.entries(app, "cookie-a")[1])
    assert kind == "generate"
    assert (values["seed"], values["num_images"], values["attention"]) == ([4], 1, "clear:radius=4")
    assert GenerateRequest(**values).prompt == "a red circle"


REQUEST = GenerateRequest(prompt="secret", seed=(5,), size="2048", attention="clear:radius=4", steps=9, device="cpu")


def test_presets_keep_settings_without_prompt_and_seed(app: App) -> None:
    presets.save(app, "cookie-a", "big", REQUEST)
    presets.save(app, "cookie-a", "Another.one-2", REQUEST.replace(steps=3))
    assert presets.names(app, "cookie-a") == ["Another.one-2", "big"]
    kind, values = presets.load(app, "cookie-a", "big")
    assert kind == "generate"
    assert (values["size"], values["attention"], values["steps"]) == ("2048", "clear:radius=4", 9)
    assert not {"prompt", "seed", "device", "token", "trust_remote_code"} & set(values)
    presets.save(app, "cookie-a", "big", REQUEST.replace(steps=11))
    assert presets.load(app, "cookie-a", "big")[1]["steps"] == 11
    presets.delete(app, "cookie-a", "big")
    presets.delete(app, "cookie-a", "big")
    assert presets.names(app, "cookie-a") == ["Another.one-2"]
    with pytest.raises(ConfigError, match="preset"):
        presets.load(app, "cookie-a", "big")


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a" * 65, "a\0b", "C:\\x"])
def test_names_that_are_paths_are_refused(app: App, name: str) -> None:
    for use in (lambda: presets.save(app, "cookie-a", name, REQUEST), lambda: presets.delete(app, "cookie-a", name)):
        with pytest.raises(ConfigError, match="preset name"):
            use()
    with pytest.raises(ConfigError):
        presets.load(app, "cookie-a", name)


def test_on_a_shared_server_presets_belong_to_a_visitor(app: App) -> None:
    presets.save(app, "cookie-a", "mine", REQUEST)
    if app.settings.shared:
        assert presets.names(app, "cookie-b") == []
        assert own_presets.preset_names() == []
        for number in range(presets.MOST - 1):
            presets.save(app, "cookie-a", f"p{number}", REQUEST)
        with pytest.raises(ConfigError, match="delete one"):
            presets.save(app, "cookie-a", "one-more", REQUEST)
    else:
        assert presets.names(app, "cookie-b") == ["mine"]
        assert own_presets.read_preset("mine")["size"] == "2048"


@pytest.mark.parametrize("app", ["loopback"], indirect=True)
def test_presets_of_the_command_line_are_checked(app: App) -> None:
    folder = own_presets.presets_folder()
    folder.mkdir(parents=True)
    (folder / "old.json").write_text(json.dumps({"kind": "generate", "steps": 10**9, "size": "512", "gone": 1}))
    assert presets.load(app, "cookie-a", "old") == ("generate", {"size": "512"})
    (folder / "bad.json").write_text("[")
    with pytest.raises(ConfigError, match="JSON"):
        presets.load(app, "cookie-a", "bad")
    (folder / "video.json").write_text(json.dumps({"kind": "video"}))
    with pytest.raises(ConfigError, match="not for this page"):
        presets.load(app, "cookie-a", "video")


def test_results_of_other_kinds_are_no_pictures(app: App) -> None:
    job = app.jobs.submit("cookie-a", lambda *_: SimpleNamespace(outputs=()), kind="other")
    assert job.wait(10)
    assert history.entries(app, "cookie-a") == []
