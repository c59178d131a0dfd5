"""The grammar: every scene is drawable, every sentence reads back as what it says."""

import pytest

from gensparse.embedded.scenes import (
    ASPECTS,
    COLOURS,
    FILLS,
    PLACES,
    SHAPES,
    Request,
    SubjectRequest,
    caption,
    parse_caption,
    random_scene,
    vocabulary,
)
from gensparse.errors import ConfigError

SEEDS = range(400)


@pytest.mark.parametrize("aspect", ASPECTS, ids=lambda a: f"aspect{a:.2f}")
def test_subjects_stay_inside_and_apart(aspect):
    for seed in SEEDS:
        scene = random_scene(seed, aspect)
        boxes = [scene.box(i) for i in range(len(scene.subjects))]
        for i, (y0, x0, y1, x1) in enumerate(boxes):
            assert min(y0, x0) >= 0
            assert max(y1, x1) <= 1
            for b0, a0, b1, a1 in boxes[:i]:
                assert y1 <= b0 or b1 <= y0 or x1 <= a0 or a1 <= x0


def test_a_seed_always_gives_the_same_scene_and_caption():
    assert random_scene(7) == random_scene(7)
    assert caption(random_scene(7), 3) == caption(random_scene(7), 3)
    assert len({caption(random_scene(7), s) for s in range(50)}) > 10


def test_no_subject_has_the_colour_of_the_background():
    assert all(s.colour != scene.background_colour for scene in map(random_scene, SEEDS) for s in scene.subjects)


def test_every_shape_colour_fill_and_place_occurs():
    scenes = [random_scene(seed) for seed in range(1500)]
    subjects = [s for scene in scenes for s in scene.subjects]
    assert {s.shape for s in subjects} == set(SHAPES)
    assert {s.colour for s in subjects} == set(COLOURS)
    assert {s.fill for s in subjects} == set(FILLS)
    assert {p for scene in scenes for p in scene.places} >= set(PLACES)
    assert {len(scene.subjects) for scene in scenes} == {1, 2, 3}


@pytest.mark.parametrize("aspect", ASPECTS, ids=lambda a: f"aspect{a:.2f}")
def test_full_captions_read_back_exactly(aspect):
    for seed in SEEDS:
        scene = random_scene(seed, aspect)
        request = parse_caption(caption(scene))
        assert [(s.shape, s.colour, s.fill) for s in request.subjects] == [
            (s.shape, s.colour, s.fill) for s in scene.subjects
        ]
        assert tuple(s.place for s in request.subjects) == scene.places
        assert set(request.relations) == set(scene.relations)
        assert (request.background, request.background_colour) == (scene.background, scene.background_colour)


def test_varied_captions_never_say_what_the_picture_does_not_show():
    for seed in SEEDS:
        scene = random_scene(seed)
        request = parse_caption(caption(scene, seed))
        shown = list(scene.subjects)
        for said in request.subjects:
            match = [
                s
                for s in shown
                if s.shape == said.shape
                and said.colour in (None, s.colour)
                and said.fill in (None, s.fill)
                and said.size in (None, s.size)
            ]
            assert match, (caption(scene, seed), scene)
        for first, relation, second in request.relations:
            assert relation_holds(scene, request, first, relation, second)
        assert request.background in (None, scene.background)
        assert request.background_colour in (None, scene.background_colour)


def relation_holds(scene, request, first, relation, second):
    """Some pair of subjects that fits the two descriptions stands in the relation."""

    def fitting(said):
        return [s for s in scene.subjects if s.shape == said.shape and said.colour in (None, s.colour)]

    holds = {
        "left of": lambda a, b: a.x < b.x,
        "right of": lambda a, b: a.x > b.x,
        "above": lambda a, b: a.y < b.y,
        "below": lambda a, b: a.y > b.y,
    }[relation]
    return any(holds(a, b) for a in fitting(request.subjects[first]) for b in fitting(request.subjects[second]))


def test_some_captions_are_empty_and_some_leave_words_out():
    captions = [caption(random_scene(seed), seed) for seed in range(1000)]
    assert 60 < captions.count("") < 140
    said = [s for text in captions for s in parse_caption(text).subjects]
    assert 0.08 < sum(s.colour is None for s in said) / len(said) < 0.25


def test_captions_use_only_the_vocabulary():
    known = set(vocabulary())
    used = {w for s in range(1000) for w in caption(random_scene(s), s).replace(",", "").split()}
    assert used <= known
    assert known - used == set()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Request(())),
        ("A Red CIRCLE", Request((SubjectRequest("circle", "red"),))),
        (
            "a red circle left of a blue star on a green striped background",
            Request(
                (SubjectRequest("circle", "red"), SubjectRequest("star", "blue")),
                ((0, "left of", 1),),
                "striped",
                "green",
            ),
        ),
        (
            "a red circle to the right of a star and above a small dotted ring",
            Request(
                (
                    SubjectRequest("circle", "red"),
                    SubjectRequest("star"),
                    SubjectRequest("ring", None, "dotted", "small"),
                ),
                ((0, "right of", 1), (0, "above", 2)),
            ),
        ),
        (
            "a moon on the left and a heart in the bottom right corner, on a wavy background",
            Request(
                (
                    SubjectRequest("moon", place="on the left"),
                    SubjectRequest("heart", place="in the bottom right corner"),
                ),
                background="wavy",
            ),
        ),
    ],
)
def test_prompts_read_as_meant(text, expected):
    assert parse_caption(text) == expected


def test_a_colour_without_a_noun_is_an_error():
    with pytest.raises(ConfigError, match="red striped"):
        parse_caption("a circle on red striped")
