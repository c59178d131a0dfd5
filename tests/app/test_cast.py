"""Subjects of visitors: only their own uploads, every value checked, masks painted on the page, copies with the job."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gensparse.app import cast, forms, render, runs, widgets
from gensparse.app.core import App, widget_values
from gensparse.app.customize_tab import _parted, _places
from gensparse.app.reload import reload
from gensparse.app.settings import Limits, Settings
from gensparse.engine.values import Output, OutputOptions, Result
from gensparse.errors import ConfigError, GensparseError
from gensparse.image_io import write_image
from gensparse.request import CustomizeRequest
from gensparse.subjects.naming import MAX_SUBJECTS
from gensparse.subjects.read_masks import read_mask

ME, OTHER = "cookie-a", "cookie-b"


class Painter:
    """An engine that paints a grey picture and remembers what it was asked for."""

    request: CustomizeRequest | None = None

    def execute(self, request, output: OutputOptions, *, on_event=None, cancel=None) -> Result:
        self.request = request
        write_image(Image.new("RGB", (64, 64), "grey"), output.paths[0])
        made = (Output(str(output.paths[0]), 64, 64, 3, "0" * 64, None),)
        stages = [{"stage": 0, "sparse": 3, "subjects": {"method": {"method": "freecustom"}}}]
        return Result("ok", made, request.to_dict(portable=True), {}, {}, {"stages": stages}, {})

    def tidy(self) -> None:
        pass


@pytest.fixture(params=["loopback", "shared"])
def app(request, tmp_path: Path):
    shared = {"host": "0.0.0.0", "auth": ("me", "secret")} if request.param == "shared" else {}
    limits = Limits(upload_pixels=10_000)
    folder = tmp_path / "out@home, a=b"  # characters that part names, pictures and masks
    made = App(Settings(output_dir=folder, preload=False, limits=limits, **shared), tmp_path / "scratch", Painter())
    yield made
    made.close()


def upload(app: App, name: str = "cat.png", size: tuple[int, int] = (40, 30), owner: str = ME, **options) -> str:
    folder = app.sessions.scratch / f"{len(list(app.sessions.scratch.glob('*')))}-{owner}"
    folder.mkdir(parents=True)
    Image.linear_gradient("L").resize(size).convert("RGB").save(folder / name, **options)
    app.sessions.own_upload(str(folder / name), owner)
    return str(folder / name)


def runs_of(mask: np.ndarray) -> str:
    """A mask as the page sends it."""
    flat = mask.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return f"{mask.shape[1]}x{mask.shape[0]}:{','.join(map(str, ([0] if flat[0] else []) + lengths))}"


def asked(app: App, subjects, **values) -> CustomizeRequest:
    request, _ = runs.asked(app, "customize", {"prompt": "a cat and a dog", **values}, ME, subjects=subjects)
    return request


def test_subjects_become_the_request_of_the_command_line(app: App) -> None:
    mask = upload(app, "mask.png")
    subjects = [
        {"name": " cat ", "image": {"path": upload(app)}, "mask": {"path": mask}, "box": [0, 0.25, 0.5, 1]},
        {"name": "", "image": None, "mask": "", "box": " "},
        {
            "name": "dog",
            "image": upload(app, "dog.jpg"),
            "mask": "0.1:0.2:0.5:1",
            "box": "0.5, 0 1;1",
            "prompt": "grey",
        },
        {"name": "tree"},
    ]
    request = asked(app, subjects, subject_method="isolation:start=2")
    assert list(request.shown) == ["cat", "dog", "tree"]
    assert request.shown["cat"][0].mask == mask
    assert request.shown["dog"][0].box == (0.1, 0.2, 0.5, 1.0)
    assert request.shown["tree"] == ()
    assert request.layout == (("cat", 0.0, 0.25, 0.5, 1.0), ("dog", 0.5, 0.0, 1.0, 1.0))
    assert request.subject_prompt == ("dog=grey",)
    assert (request.subject_method, request.local_files_only) == ("isolation:start=2", True)


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (13, 1), (1, 31)])
def test_what_is_painted_is_the_mask(app: App, shape: tuple[int, int]) -> None:
    mask = np.random.default_rng(3).integers(0, 2, shape).astype(bool)
    mask.flat[-1] = True
    request = asked(app, [{"name": "cat", "image": upload(app), "mask": runs_of(mask)}])
    file = Path(str(request.shown["cat"][0].mask))
    assert np.array_equal(read_mask(file).numpy(), mask)
    assert app.sessions.may_read(file, ME)
    assert not app.sessions.may_read(file, OTHER)
    empty = asked(app, [{"name": "cat", "image": upload(app), "mask": runs_of(np.zeros(shape, bool))}])
    assert empty.shown["cat"][0].mask is None


BAD = {
    "no list": (5, "give a list"),
    "no subject": ([5], "a subject is 5"),
    "unknown key": ([{"name": "cat", "file": "x"}], "field of a subject"),
    "picture without name": ([{"image": "PICTURE"}], "subject 1 has a picture and no name"),
    "second without name": ([{"name": "cat"}, {"box": "0,0,1,1", "image": "PICTURE"}], "subject 2 has a picture and a"),
    "mask without picture": ([{"name": "cat", "mask": "0:0:1:1"}], "a mask and no picture"),
    "name that is no text": ([{"name": ["cat"]}], "give text"),
    "long name": ([{"name": "x" * 61}], "61 characters"),
    "name with =": ([{"name": "a=b"}], "character that names cannot have"),
    "name with a line": ([{"name": "a\nb"}], "character that names cannot have"),
    "twice": ([{"name": "cat"}, {"name": "cat "}], "two subjects are named 'cat'"),
    "too many": ([{"name": str(k)} for k in range(6)], "at most 5"),
    "box outside": ([{"name": "cat", "box": [0, 0, 1.5, 1]}], "0 <= left < right <= 1"),
    "box turned": ([{"name": "cat", "box": "0.5, 0, 0.2, 1"}], "0 <= left < right <= 1"),
    "box of three": ([{"name": "cat", "box": "0, 0, 1"}], "give .left, top, right, bottom"),
    "box of words": ([{"name": "cat", "box": "left"}], "give .left, top, right, bottom"),
    "box of nan": ([{"name": "cat", "box": [0, 0, math.nan, 1]}], "0 <= left < right <= 1"),
    "box of truths": ([{"name": "cat", "box": [0, 0, True, True]}], "give .left, top, right, bottom"),
    "box that is a number": ([{"name": "cat", "box": 5}], "give .left, top, right, bottom"),
    "mask outside": ([{"name": "cat", "image": "PICTURE", "mask": "0:0:1:2"}], "0 <= left < right <= 1"),
    "mask of a path": ([{"name": "cat", "image": "PICTURE", "mask": "/etc/passwd"}], "upload a file, or paint"),
    "mask of few pixels": ([{"name": "cat", "image": "PICTURE", "mask": "4x4:3,5"}], "8 pixels instead of 4 x 4"),
    "mask of huge runs": ([{"name": "cat", "image": "PICTURE", "mask": "9x9:99999999,99999999"}], "instead of 9 x 9"),
    "mask without end": ([{"name": "cat", "image": "PICTURE", "mask": "9x9:" + "1," * 200_000 + "1"}], "upload a file"),
    "mask too wide": ([{"name": "cat", "image": "PICTURE", "mask": "99999x1:99999"}], "upload a file, or paint"),
    "picture of a path": ([{"name": "cat", "image": "/etc/passwd"}], "upload it again"),
    "picture of an address": ([{"name": "cat", "image": "http://169.254.169.254/"}], "not fetched"),
    "prompt too long": ([{"name": "cat", "prompt": "x" * 2001}], "2001 characters"),
    "prompt of numbers": ([{"name": "cat", "prompt": [1]}], "give text"),
}


@pytest.mark.parametrize("case", BAD)
def test_fault_29_wrong_subjects_are_refused_with_a_sentence(app: App, case: str) -> None:
    subjects, words = BAD[case]
    if isinstance(subjects, list):
        picture = upload(app)
        subjects = [
            {k: picture if v == "PICTURE" else v for k, v in item.items()} if isinstance(item, dict) else item
            for item in subjects
        ]
    with pytest.raises(ConfigError, match=words) as caught:
        asked(app, subjects)
    assert 10 < len(str(caught.value)) < 400
    assert str(app.sessions.scratch) not in str(caught.value)


def test_fault_29_pictures_of_others_are_no_subjects(app: App) -> None:
    for key in ("image", "mask"):
        given = {"name": "cat", "image": upload(app), key: {"path": upload(app, owner=OTHER)}}
        with pytest.raises(ConfigError, match="not uploaded here"):
            asked(app, [given])


def test_fault_29_all_pictures_together_have_a_limit(app: App) -> None:
    subjects = [{"name": str(k), "image": upload(app, size=(50, 50))} for k in range(MAX_SUBJECTS)]
    assert len(asked(app, subjects[:4]).shown) == 4
    with pytest.raises(ConfigError, match="megapixels"):
        asked(app, subjects)


@pytest.mark.parametrize("name", ["subject", "layout", "subject_prompt", "more_prompts", "image", "strength"])
def test_fault_29_subjects_come_by_uploads_only(app: App, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        asked(app, [{"name": "cat"}], **{name: ["cat=/etc/passwd"]})


def test_fault_29_methods_for_subjects_name_no_files_on_a_shared_server(app: App) -> None:
    text = "freecustom:mask=/etc/passwd"
    if app.settings.shared:
        with pytest.raises(ConfigError, match="names a file"):
            asked(app, [{"name": "cat"}], subject_method=text)
    assert asked(app, [{"name": "cat"}], subject_method="isolation").subject_method == "isolation"
    for wrong in (5, "x" * 300):
        with pytest.raises(ConfigError, match="subject_method"):
            asked(app, [{"name": "cat"}], subject_method=wrong)
    with pytest.raises(GensparseError, match="subject method"):
        runs.plan(asked(app, [{"name": "cat", "image": upload(app)}], subject_method="nonsense"), None)


def test_the_sizes_of_a_server_hold(app: App) -> None:
    with pytest.raises(ConfigError, match="at most 8192 pixels"):
        asked(app, [{"name": "cat"}], size="9000x64")


def test_a_job_keeps_copies_and_tells_names_only(app: App) -> None:
    mask = np.zeros((30, 40), bool)
    mask[3:20, 5:17] = True
    picture = upload(app, "my cat.PNG")
    subjects = [
        {"name": "the cat/", "image": picture, "mask": runs_of(mask), "box": [0, 0, 0.5, 1]},
        {"name": "dog", "image": upload(app, "dog.jpg"), "mask": "0.1:0.2:0.5:1"},
    ]
    job = runs.submit(app, ME, asked(app, subjects, seed=3))
    assert job.wait(30)
    assert job.error is None, job.error
    Path(picture).unlink()
    request = job.request
    assert [path.name for path in cast.files(request)] == ["1-the-cat.png", "1-the-cat-mask.png", "2-dog.jpg"]
    assert all(path.is_file() and path.parent == job.folder for path in cast.files(request))
    assert all(
        app.sessions.may_read(path, ME) and not app.sessions.may_read(path, OTHER) for path in cast.files(request)
    )
    command, python = render.again(job.result)
    assert "the cat/=1-the-cat.png@1-the-cat-mask.png" in command
    assert "dog=2-dog.jpg@0.1:0.2:0.5:1" in command
    assert "LAYOUT.json" in command
    assert str(app.sessions.root) not in command + python
    assert "already" in str(runs.why_no_twin(app, job)), "what subjects do is the same with dense attention"
    again = cast.keep(request, app.sessions.new_folder(ME))
    assert [path.read_bytes() for path in cast.files(again)] == [path.read_bytes() for path in cast.files(request)]


# ------------------------------------------------------------------------------------------------------------ the form
def test_forms_and_requests_are_each_other_backwards(app: App) -> None:
    subjects = [{"name": "cat", "box": "0, 0.25, 0.5, 1"}, {"name": "dog", "prompt": "a grey dog"}]
    request = asked(app, subjects, seed=3, steps=4, subject_method="consistory", size="512x256")
    shown = widget_values(json.loads(json.dumps(request.to_dict())))
    assert (shown["name_1"], shown["box_1"], shown["words_2"], shown["name_3"]) == (
        "cat",
        "0, 0.25, 0.5, 1",
        "a grey dog",
        "",
    )
    given, fields = _parted(widgets.request_values(shown))
    known = forms.FIELDS["customize"]
    assert asked(app, given, **{k: v for k, v in fields.items() if k in known}) == request


def test_fault_30_pictures_give_names_and_places_back_but_no_files(tmp_path: Path) -> None:
    request = CustomizeRequest(
        prompt="a cat", subject=("cat=/home/me/a.png@m.png", "<b>=x.png"), layout=[["cat", 0, 0, 0.5, 1]], steps=5
    )
    path = tmp_path / "x.png"
    write_image(Image.new("RGB", (8, 8)), path, metadata={"gensparse": 1, "request": request.to_dict(portable=True)})
    found = reload(path, models=["embedded"], fields=forms.FILLED)
    assert found.kind == "customize"
    assert found.values["subject"] == ["cat", "<b>"]
    assert "upload them again" in found.message
    shown = widget_values(found.values)
    assert (shown["name_1"], shown["box_1"], shown["name_2"], shown["box_2"]) == ("cat", "0, 0, 0.5, 1", "<b>", "")
    assert not {"picture_1", "mask_1"} & set(shown)


@pytest.mark.parametrize("subject", [5, None, "x", [5], ["=x"], [], ["cat=a.png"] * 9, {"a": 1}], ids=str)
def test_fault_30_subjects_that_are_none_fill_nothing(tmp_path: Path, subject) -> None:
    path = tmp_path / "x.png"
    data = {"kind": "customize", "version": 1, "prompt": "a cat", "subject": subject, "layout": 7, "steps": 5}
    write_image(Image.new("RGB", (8, 8)), path, metadata={"gensparse": 1, "request": data})
    found = reload(path, models=["embedded"], fields=forms.FILLED)
    assert found.values["steps"] == 5
    assert "layout" not in found.values
    widget_values(found.values)


def test_places_are_drawn_in_the_shape_of_the_picture_and_wrong_ones_named() -> None:
    page = _places({"model": "embedded", "size": "512x256", "name_1": "<cat>", "box_1": "0, 0, 0.5, 1", "box_3": "9"})
    assert 'data-width="512" data-height="256"' in page
    assert "<cat>" not in page
    assert "subject 3" in page
    assert "0 &lt;= left" in page
    assert 'data-width="1"' in _places({"size": "nonsense"})
