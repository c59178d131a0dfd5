"""The score of methods for subjects: a perfect picture has it, and every planted defect costs it; the run around it."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from gensparse.bench import subjects as bench
from gensparse.bench.store import Store
from gensparse.bench.subject_cases import Case, cases
from gensparse.bench.subject_score import Pose, Verdict, another_pose, cut_out, fitted_pose, judge, turned
from gensparse.embedded import defects
from gensparse.embedded.quality import reading_of
from gensparse.embedded.reader import Reader
from gensparse.embedded.render import render, shades
from gensparse.embedded.scenes import COLOURS, Scene, Subject, parse_caption
from gensparse.errors import ConfigError

SIDE = 256
CASES = cases(3)


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader.load()


def drawn(scene: Scene, side: int = SIDE) -> Image.Image:
    return Image.fromarray(render(scene, side, side))


def verdict(reader: Reader, case: Case, picture: Image.Image) -> Verdict:
    return judge(picture, case, reader, [case.portrait(n, SIDE) for n in range(2)])


def looks(case: Case, *changes: dict) -> Image.Image:
    """The scene with other looks or poses of its subjects."""
    pairs = zip(case.scene.subjects, changes, strict=True)
    return drawn(replace(case.scene, subjects=tuple(replace(s, **change) for s, change in pairs)))


# ---------------------------------------------------------------- cases


def test_prompts_name_shapes_and_nothing_of_looks():
    for case in cases(40):
        asked = parse_caption(case.text)
        assert [(s.colour, s.fill, s.size) for s in asked.subjects] == [(None, None, None)] * 2
        assert {s.shape for s in asked.subjects} == {s.shape for s in case.scene.subjects}
        assert len(asked.relations) == 1
        assert asked.background_colour == case.scene.background_colour
        for number, portrait in enumerate(case.portraits):
            own = parse_caption(case.portrait_text(number)).subjects
            assert [(s.shape, s.colour, s.fill) for s in own] == [(portrait.subjects[0].shape, None, None)]


def test_subjects_differ_in_everything_and_stand_otherwise_in_their_pictures():
    for case in cases(40):
        first, second = case.scene.subjects
        assert all(getattr(first, name) != getattr(second, name) for name in ("shape", "colour", "fill"))
        for here, portrait in zip(case.scene.subjects, case.portraits, strict=True):
            (alone,) = portrait.subjects
            assert (alone.shape, alone.colour, alone.fill) == (here.shape, here.colour, here.fill)
            assert alone.size != here.size
            assert abs(alone.rotation) >= 12
            assert portrait.background_colour not in (first.colour, second.colour, case.scene.background_colour)
            assert all(0 < edge < 1 for edge in portrait.box(0))


def test_cases_do_not_depend_on_how_many_there_are():
    assert cases(3) == cases(9)[:3]
    assert cases(3)[1].text == cases(9)[1].text


@pytest.mark.parametrize("side", [256, 97])
def test_masks_are_exact(side):
    for case in CASES:
        for number, portrait in enumerate(case.portraits):
            (alone,) = portrait.subjects
            plain = replace(portrait, subjects=(replace(alone, fill="plain"),), background="plain")
            own, ground = (shades(name, 0)[0] for name in (alone.colour, portrait.background_colour))
            cover = (render(plain, side, side) - ground) @ (own - ground) / np.square(own - ground).sum()
            clear = abs(cover - 0.5) > 0.02  # but for rounding
            assert ((cover > 0.5) == case.mask(number, side))[clear].all()


# ---------------------------------------------------------------- the score


def test_a_perfect_picture_is_good_at_every_size(reader):
    for case in CASES:
        for side in (SIDE, 700):
            found = verdict(reader, case, drawn(case.scene, side))
            assert found == Verdict(True, (True, True), False, False, (True, True), 2, 2, 2)
            assert found.good


def dropped(case: Case) -> Image.Image:
    """References are dropped: the prompt is followed, with looks of its own."""
    first, second = case.scene.subjects
    free = [c for c in COLOURS if c not in (first.colour, second.colour, case.scene.background_colour)]
    return looks(case, {"colour": free[0]}, {"colour": free[5]})


def one_dropped(case: Case) -> Image.Image:
    return drawn(defects.wrong_colour(case.scene))


def missing(case: Case) -> Image.Image:
    return drawn(defects.missing(case.scene))


def third(case: Case) -> Image.Image:
    return drawn(defects.extra(case.scene))


def swapped_colours(case: Case) -> Image.Image:
    first, second = case.scene.subjects
    return looks(case, {"colour": second.colour}, {"colour": first.colour})


def other_fill(case: Case) -> Image.Image:
    return looks(case, {"fill": case.scene.subjects[1].fill}, {})


def portrait_itself(case: Case) -> Image.Image:
    return case.portrait(0, SIDE)


def with_background(case: Case) -> Image.Image:
    """A picture of a subject is pasted into the middle, with some of its background."""
    return defects.pasted_reference(drawn(case.scene), case.portrait(1, SIDE), case.portraits[1].box(0))


def cut_out_in_place(case: Case) -> Image.Image:
    """A subject is cut out of its picture and put where it was."""
    return drawn(replace(case.scene, subjects=case.portraits[0].subjects))


def cut_out_elsewhere(case: Case) -> Image.Image:
    return looks(case, *({"rotation": p.subjects[0].rotation, "radius": p.subjects[0].radius} for p in case.portraits))


PLANTED: dict[Callable[[Case], Image.Image], Callable[[Verdict], bool]] = {
    dropped: lambda v: v.right,
    one_dropped: lambda v: v.right,
    missing: lambda v: v.right,
    third: lambda v: v.right,
    swapped_colours: lambda v: v.right or not v.leak,
    other_fill: lambda v: v.right or not v.leak,
    portrait_itself: lambda v: not v.copied,
    with_background: lambda v: not v.copied,
    cut_out_in_place: lambda v: not v.copied and all(v.posed),
    cut_out_elsewhere: lambda v: not v.copied,
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_defect_costs_the_score(reader, plant):
    for case in CASES:
        found = verdict(reader, case, plant(case))
        assert not found.good
        assert not PLANTED[plant](found), case.text


def test_every_part_of_the_score_can_cost_it_alone():
    good = Verdict(True, (True, True), False, False, (True, True), 2, 2, 2)
    assert good.good
    for change in ({"right": False}, {"leak": True}, {"copied": True}, {"posed": (True, False)}):
        assert not replace(good, **change).good


def test_what_stands_in_its_own_place_size_and_rotation_has_the_same_pose(reader):
    for case in CASES:
        (alone,), picture = case.portraits[0].subjects, case.portrait(0, SIDE)
        reading = reading_of(case.portraits[0])
        pose = fitted_pose(picture, reading.subjects[0], reading)
        assert turned(pose, alone) < 2
        assert pose.radius == pytest.approx(alone.radius, rel=0.04)
        assert not another_pose(pose, alone)
        assert cut_out(pose, alone)


@pytest.mark.parametrize(
    ("change", "another", "copy"),
    [
        ({}, False, True),
        ({"x": 0.1}, True, True),
        ({"radius": 1.2}, True, False),
        ({"rotation": 10.0}, True, False),
        ({"rotation": 72.0}, False, True),
        ({"rotation": 5.0}, False, False),
    ],
    ids=["same", "moved", "resized", "turned", "turned-to-the-same-outline", "within-the-error"],
)
def test_another_pose_is_another_place_size_or_rotation(change, another, copy):
    before = Subject("star", "red", "plain", "medium", 0.4, 0.6, 0.175, 15.0)
    values = {"x": change.get("x", 0), "radius": change.get("radius", 1), "rotation": change.get("rotation", 0)}
    pose = Pose(0.6, 0.4 + values["x"], 0.175 * values["radius"], 15.0 + values["rotation"])
    assert (another_pose(pose, before), cut_out(pose, before)) == (another, copy)


def test_a_rotation_is_not_told_where_no_outline_fits():
    scene = CASES[0].portraits[0]
    reading = reading_of(scene)
    picture = drawn(replace(scene, subjects=()))
    pose = fitted_pose(picture, reading.subjects[0], reading)
    assert pose.rotation is None
    assert not cut_out(pose, scene.subjects[0])


# ---------------------------------------------------------------- contenders


def test_contenders_are_parted_by_commas_and_keep_their_settings():
    text = "plain, isolation:isolation=false,reposition=false,freecustom:weights=2,shared"
    parts = ("plain", "isolation:isolation=false,reposition=false", "freecustom:weights=2", "shared")
    assert bench.split_contenders(text) == parts
    with pytest.raises(ConfigError, match="begins with the setting"):
        bench.split_contenders("weights=2,plain")


@pytest.mark.parametrize("family", ["FLUX.1", "UNet"])
def test_usual_contenders_are_all_methods_for_two_subjects(family):
    usual = bench.usual_contenders(family)
    assert usual[:2] == ("plain", "shared")
    assert ("magicface" in usual) == (family == "UNet")
    assert {"freecustom", "isolation_reposition", "isolation_reposition:isolation=false", "storydiffusion"} < set(usual)
    for name in usual:
        bench.checked_method(name)


@pytest.mark.parametrize("name", ["reference_only", "masactrl", "regional", "isolatoin", "clear:radius=8"])
def test_methods_that_cannot_have_two_subjects_are_refused(tmp_path, name):
    with pytest.raises(ConfigError):
        bench.Options(tmp_path, contenders=(name,))


def test_nobody_is_told_where_subjects_are_to_be():
    for name in ("freecustom", "isolation", "storydiffusion"):
        given = bench.subject_arguments(bench.Item(SIDE, name, CASES[0]))["subjects"]
        assert [item.region for item in given] == [None, None]
        assert all(item.name in CASES[0].text for item in given)
    assert bench.subject_arguments(bench.Item(SIDE, "plain", CASES[0])) == {}


# ---------------------------------------------------------------- the run


def fake_pipeline(calls: list) -> Callable:
    """Follows references where it is given some, and copies both where the method is called freecustom."""

    def pipe(prompt, height, subjects=(), subject_method=None, attention=None, **rest):
        case = next(c for c in cases(6) if c.text == prompt)
        calls.append((case.index, height, attention, getattr(subject_method, "name", None), len(subjects)))
        picture = dropped(case) if not subjects else drawn(case.scene, height)
        if getattr(subject_method, "name", None) == "freecustom":
            picture = cut_out_in_place(case)
        return type("Output", (), {"images": [picture]})()

    return pipe


@pytest.fixture
def calls(monkeypatch) -> list:
    made: list = []
    monkeypatch.setattr(bench, "load_pipeline", lambda options: fake_pipeline(made))
    return made


def test_a_run_resumes_and_reports(tmp_path, calls):
    contenders = ("plain", "isolation", "rendering")
    bench.run_subjects(bench.Options(tmp_path, contenders=contenders[:1], limit=1), [].append)
    assert calls == [(0, 256, "dense", None, 0)]
    options = bench.Options(tmp_path, contenders=contenders, limit=2)
    said: list[str] = []
    text = bench.run_subjects(options, said.append)
    assert len(calls) == 4
    assert len(said) == 5
    assert calls[1:] == [
        (0, 256, "dense", "isolation_reposition", 2),
        (1, 256, "dense", None, 0),
        (1, 256, "dense", "isolation_reposition", 2),
    ]
    bench.run_subjects(options, said.append)
    assert len(calls) == 4
    assert "| plain | 2 | 0 (0..0) | 0 (0..0) |" in text
    assert "| isolation | 2 | 100 (100..100) | 100 (100..100) |" in text
    assert "| isolation | plain | 100 (100..100) |" in text
    rows = list(csv.DictReader((tmp_path / "subjects.csv").open()))
    scores = {(r["contender"], r["against"]): r["value"] for r in rows if r["measure"] == "score %"}
    assert scores[("isolation", "")] == scores[("isolation", "plain")] == scores[("rendering", "")] == "100.0"
    assert scores[("plain", "")] == "0.0"
    assert Image.open(tmp_path / "subjects.png").size == (5 * 128, 28 + 2 * 128)


def test_pasting_and_dropping_both_lose(tmp_path, calls):
    options = bench.Options(tmp_path, contenders=("plain", "freecustom"), limit=1)
    bench.run_subjects(options, [].append)
    rows = list(Store(tmp_path).rows.values())
    assert not any(row["good"] for row in rows)
    assert {row["method"] for row in rows if row["copied"]} == {"freecustom"}


def test_large_pictures_take_the_attention_of_larger_stages(tmp_path, calls):
    options = bench.Options(tmp_path, contenders=("plain",), limit=1, size=1024, attention="clear:radius=4")
    text = bench.run_subjects(options, [].append)
    assert calls == [(0, 1024, "clear:radius=4", None, 0)]
    assert text.startswith("embedded, 1024 x 1024, clear:radius=4 beyond 256\n")


def test_workers_share_cases(tmp_path, calls):
    options = bench.Options(tmp_path, contenders=("rendering",), limit=3, workers=2)
    for number in range(2):
        bench.work(options, number, lambda text: None)
        lines = (tmp_path / f"items-{number}.jsonl").read_text().splitlines()
        assert {json.loads(line)["index"] for line in lines} == ({0, 2} if number == 0 else {1})
    text = bench.run_subjects(options, [].append)
    assert "| rendering | 3 |" in text
    assert not list(tmp_path.glob("items-*"))


def test_pictures_of_other_weights_or_settings_are_not_mixed(tmp_path, calls, monkeypatch):
    options = bench.Options(tmp_path, contenders=("plain",), limit=1)
    bench.run_subjects(options, [].append)
    with pytest.raises(ConfigError, match="another --run"):
        bench.run_subjects(replace(options, guidance=2.0), [].append)
    monkeypatch.setattr(bench, "weights_of", lambda options: "0123456789ab")
    with pytest.raises(ConfigError, match="another --run"):
        bench.run_subjects(options, [].append)


def test_differences_are_those_of_pairs():
    rows = [{"index": n, "good": n > 1} for n in range(4)]
    others = [{"index": n, "good": n > 2} for n in (3, 2, 1)]
    gain = bench.difference(rows, others, "score")
    assert gain.value == pytest.approx(1 / 3)
    assert bench.difference(rows[:1], others, "score") is None


def test_the_embedded_model_makes_pictures_with_subjects(tmp_path):
    options = bench.Options(tmp_path, contenders=("plain", "shared", "isolation"), limit=1, steps=1)
    text = bench.run_subjects(options, [].append)
    assert "| isolation | 1 |" in text
    pictures = [np.asarray(Image.open(path).convert("RGB"), float) for path in (tmp_path / "pictures").iterdir()]
    assert len(pictures) == 3
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(pictures[a] - pictures[b]).mean() > 0.1  # every method does something
