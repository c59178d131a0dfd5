"""Every measure praises renderings and fails on its planted defect."""

import csv
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from gensparse.bench.pictures import prompts
from gensparse.bench.quality_report import NAMES
from gensparse.embedded import defects
from gensparse.embedded.quality import (
    KernelBlocks,
    bootstrap,
    difference_of_means,
    duplicates,
    kernel_distance,
    pasted,
    prompt_fidelity,
    reading_of,
    right_count,
    share_right,
    size_word,
)
from gensparse.embedded.reader import Reader, overlap
from gensparse.embedded.render import render
from gensparse.embedded.scenes import ASPECTS, Scene, Subject, caption, parse_caption, random_scene
from gensparse.embedded.sharpness import edge_width, overshoot, seam
from gensparse.errors import ConfigError

FRESH = 9_800_000


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader.load()


def two_subjects(count: int) -> list[Scene]:
    """Fresh scenes of two different subjects, one left of, right of, above or below the other."""
    scenes = (random_scene(seed) for seed in range(FRESH, FRESH + 100_000))
    wanted = (s for s in scenes if len(s.subjects) == 2 and s.relations and s.subjects[0].shape != s.subjects[1].shape)
    return [next(wanted) for _ in range(count)]


def everything(scene: Scene):
    return parse_caption(caption(scene))


# ---------------------------------------------------------------- prompt fidelity


@pytest.mark.parametrize("aspect", ASPECTS, ids=lambda a: f"{a:.2f}")
def test_a_perfect_picture_has_everything_right(aspect):
    for seed in range(FRESH, FRESH + 120):
        scene = random_scene(seed, aspect)
        scores = prompt_fidelity(reading_of(scene), parse_caption(caption(scene, seed)))
        assert all(all(values) for values in scores.values()), (seed, caption(scene, seed), scores)


def test_only_what_the_prompt_says_is_judged():
    reading = reading_of(random_scene(FRESH))
    assert prompt_fidelity(reading, parse_caption("")) == {}
    assert set(prompt_fidelity(reading, parse_caption("a star"))) == {"count", "shape"}
    said = prompt_fidelity(reading, parse_caption("a small red striped star on the left on a blue wavy background"))
    assert set(said) == {"count", "shape", "colour", "fill", "size", "place", "background", "background colour"}


def test_the_order_of_seen_subjects_does_not_matter():
    for scene in two_subjects(20):
        reading = reading_of(scene)
        turned = replace(reading, subjects=reading.subjects[::-1])
        assert share_right([prompt_fidelity(turned, everything(scene))]) == 1


def test_nothing_seen_makes_every_subject_wrong():
    scene = two_subjects(1)[0]
    scores = prompt_fidelity(replace(reading_of(scene), subjects=()), everything(scene))
    assert not any(any(scores[name]) for name in ("count", "shape", "colour", "fill", "relation"))
    assert scores["background"] == [True]


@pytest.mark.parametrize(
    ("plant", "name", "kept"),
    [
        (defects.missing, "count", "background"),
        (defects.missing, "shape", "background colour"),
        (defects.extra, "count", "shape"),
        (defects.wrong_colour, "colour", "shape"),
        (defects.wrong_fill, "fill", "colour"),
        (defects.swapped, "relation", "colour"),
    ],
)
@pytest.mark.parametrize("drawn", [False, True], ids=["ideal", "drawn-and-read"])
def test_a_planted_defect_is_caught(reader, plant, name, kept, drawn):
    for scene in two_subjects(12):
        spoiled = plant(scene)
        reading = reader.read(render(spoiled, 256, 256)) if drawn else reading_of(spoiled)
        scores = prompt_fidelity(reading, everything(scene))
        assert not all(scores[name])
        assert all(scores[kept])


def test_right_count_fails_on_missing_and_extra(reader):
    for scene in two_subjects(12):
        pictures = [render(s, 256, 256) for s in (scene, defects.missing(scene), defects.extra(scene))]
        answers = [right_count(reading, everything(scene)) for reading in reader.read_many(pictures)]
        assert answers == [True, False, False]


def test_a_wrong_background_is_caught(reader):
    scene = two_subjects(1)[0]
    request = parse_caption("a star on a teal checkered background")
    for kind, colour, right in (("checkered", "teal", [True]), ("wavy", "pink", [False])):
        picture = render(replace(scene, background=kind, background_colour=colour), 256, 256)
        scores = prompt_fidelity(reader.read(picture), request)
        assert (scores["background"], scores["background colour"]) == (right, right)


@pytest.mark.parametrize(("radius", "word"), [(0.01, "small"), (0.14, "small"), (0.16, "medium"), (0.9, "large")])
def test_sizes_are_told_by_ratio(radius, word):
    assert size_word(radius) == word


def test_share_right_of_nothing_is_nan():
    assert math.isnan(share_right([{}]))


# ---------------------------------------------------------------- duplicates


def test_a_tiny_duplicate_is_found_on_full_resolution_crops(reader):
    found = []
    for seed, scene in enumerate(two_subjects(4)):
        spoiled = defects.tiny_duplicate(scene, seed)
        box = spoiled.box(len(spoiled.subjects) - 1)
        picture = render(spoiled, 1024, 1024)
        assert right_count(reader.read(picture), everything(scene))  # the whole picture's reading overlooks it
        found.append(any(overlap(box, copy.box) > 0.3 for copy in duplicates(picture, reader)))
    assert all(found)


@pytest.mark.parametrize(("height", "width"), [(256, 256), (300, 533), (130, 90)])
def test_duplicates_are_looked_for_at_any_size(reader, height, width):
    scene = defects.tiny_duplicate(random_scene(FRESH, width / height), radius=0.04)
    picture = render(scene, height, width)
    assert len(reader.read(picture).subjects) + len(duplicates(picture, reader)) == len(scene.subjects)


def test_a_right_picture_has_no_duplicates(reader):
    wrong = [len(duplicates(render(scene, 1024, 1024), reader)) > 0 for scene in two_subjects(4)]
    assert not any(wrong)


# ---------------------------------------------------------------- sharpness


def scene_of(shape: str, background: str = "plain", rotation: float = 0.0) -> Scene:
    subject = Subject(shape, "red", "plain", "large", 0.5, 0.5, 0.24, rotation)
    return Scene((subject,), background, "white")


@pytest.mark.parametrize("sigma", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("shape", ["circle", "square"])
def test_edge_width_of_a_known_blur_is_its_10_90_distance(shape, sigma):
    picture = defects.blurred(render(scene_of(shape, rotation=7.0), 511, 509), sigma)
    assert edge_width(picture) == pytest.approx(2.563 * math.hypot(sigma, 0.4), rel=0.08)


@pytest.mark.parametrize("background", ["plain", "striped", "checkered", "dotted", "wavy"])
@pytest.mark.parametrize("side", [256, 1023])
def test_renderings_have_edges_of_a_pixel(background, side):
    picture = render(scene_of("star", background), side, side)
    assert 0.8 < edge_width(picture) < 2
    assert overshoot(picture) < 5


def test_bicubic_enlargement_is_told_from_a_rendering():
    scene = scene_of("flower", "wavy")
    small = Image.fromarray(render(scene, 128, 128))
    sharp, soft = render(scene, 1024, 1024), small.resize((1024, 1024), Image.Resampling.BICUBIC)
    assert edge_width(soft) > 4 * edge_width(sharp)
    assert overshoot(soft) > 2 > overshoot(sharp)


def test_ringing_is_caught():
    picture = render(scene_of("heart"), 600, 600)
    assert overshoot(defects.ringing(picture)) > 5 > overshoot(picture)


def test_a_picture_without_edges_has_no_width():
    flat = np.full((90, 70, 3), 77, np.uint8)
    assert edge_width(flat) == math.inf
    assert overshoot(flat) == 0
    assert seam(flat) == 0


@pytest.mark.parametrize("turn", [False, True], ids=["column", "row"])
def test_a_seam_is_caught_whatever_the_texture(turn):
    for seed in range(FRESH, FRESH + 12):
        picture = render(random_scene(seed), 500, 502)
        spoiled = np.asarray(defects.seamed(picture))
        pair = [p.transpose(1, 0, 2) if turn else p for p in (picture, spoiled)]
        assert seam(pair[0]) < 1
        assert seam(pair[1]) > 3


# ---------------------------------------------------------------- pasted references


def test_a_pasted_reference_is_caught_and_a_redrawn_one_is_not():
    for reference, scene in zip(two_subjects(12)[:6], two_subjects(12)[6:], strict=True):
        original, box = render(reference, 256, 256), reference.box(0)
        redrawn = replace(scene, subjects=(replace(reference.subjects[0], x=0.3, y=0.6, rotation=25.0),))
        honest = pasted(render(redrawn, 256, 256), original, box)
        copied = defects.pasted_reference(render(redrawn, 256, 256), original, box)
        assert pasted(copied, original, box) > 0.9
        assert honest < 0.85


# ---------------------------------------------------------------- distances and intervals


def close_ups(scenes: int, crops: int, seed: int, zoom: int = 16) -> list[list[np.ndarray]]:
    """64-px crops of the renderings `zoom` times the native size; the same scenes for every seed, other places."""
    rng, found, side = np.random.default_rng(seed), [], 64 / zoom / 256
    for scene in map(random_scene, range(FRESH, FRESH + scenes)):
        corners = rng.uniform(0, 1 - side, (crops, 2))
        found.append([render(scene, 64, 64, (y, x, y + side, x + side)) for y, x in corners])
    return found


def test_kernel_distance_grows_with_blur(reader):
    crops = [c for scene in close_ups(10, 3, seed=0) for c in scene]
    distances = [kernel_distance([defects.blurred(c, s) for c in crops], crops, reader) for s in (0.5, 1.5, 6.0)]
    assert abs(kernel_distance(crops, crops, reader)) < 1e-9
    assert 0 < distances[0] < distances[1] < distances[2]


def test_kernel_distance_puts_sharper_crops_nearer_to_renderings(reader):
    def features(sigma: float) -> torch.Tensor:
        return torch.stack([reader.features([defects.blurred(c, sigma) for c in scene]) for scene in crops])

    crops = close_ups(16, 4, seed=1)
    sharper, softer = (KernelBlocks.of(features(s), features(0.0)) for s in (1.0, 6.0))
    gap = bootstrap(range(16), lambda picked: softer.distance(picked) - sharper.distance(picked), rounds=200)
    assert gap.low > 0


def test_kernel_distance_of_equal_distributions_averages_zero():
    generator = torch.Generator().manual_seed(0)
    values = [KernelBlocks.of(*torch.randn(2, 30, 4, 20, generator=generator)).distance() for _ in range(40)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 40**0.5
    shifted = KernelBlocks.of(torch.randn(30, 4, 20, generator=generator) + 0.3, torch.randn(30, 4, 20)).distance()
    assert shifted > max(values)


def test_kernel_distance_of_repeated_pictures_ignores_their_own_pairs():
    blocks = KernelBlocks.of(torch.randn(5, 3, 8), torch.randn(5, 3, 8))
    assert math.isnan(blocks.distance([2, 2, 2, 2, 2]))
    assert math.isfinite(blocks.distance([0, 0, 1, 2, 3]))


def test_kernel_distance_needs_pairs(reader):
    with pytest.raises(ConfigError, match="pictures"):
        kernel_distance([np.zeros((32, 32, 3), np.uint8)], [np.zeros((32, 32, 3), np.uint8)], reader)


def test_bootstrap_intervals_cover_the_mean_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        interval = bootstrap(list(rng.normal(3, 2, 40)), lambda v: float(np.mean(v)), rounds=200, seed=trial)
        covered += interval.low <= 3 <= interval.high
    assert 0.89 <= covered / 200 <= 0.985


def test_paired_intervals_are_narrower_than_unpaired_noise():
    rng = np.random.default_rng(1)
    hard = rng.normal(0, 10, 50)
    interval = bootstrap(list(zip(hard + 1 + rng.normal(0, 0.1, 50), hard, strict=True)), difference_of_means)
    assert interval.low > 0.9
    assert interval.high < 1.1


def test_bootstrap_needs_items():
    with pytest.raises(ConfigError, match="at least one"):
        bootstrap([], lambda v: 0.0)


# ---------------------------------------------------------------- the evaluation run


@pytest.fixture(scope="module")
def harness():
    from gensparse.bench import quality

    return quality


def fake_pipeline(calls: list):
    """Draws the scene its prompt was said of; larger sizes with a blurred edge, as a cascade leaves it."""

    def pipe(prompt, height, attention, **rest):
        calls.append((len(prompt), height, attention))
        scenes = {p.text: p.scene for p in prompts(4)}
        pictures = [defects.blurred(render(scenes[text], height, height), 1.0) for text in prompt]
        return type("Output", (), {"images": pictures})()

    return pipe


def test_the_run_resumes_and_reports(harness, tmp_path, monkeypatch):
    calls: list = []
    monkeypatch.setattr(harness, "COUNTS", {"native": 3, "320": 2})
    monkeypatch.setattr("gensparse.bench.pictures.load_pipeline", lambda options: fake_pipeline(calls))
    monkeypatch.setattr(harness, "METHODS", {"native": ("dense",), "320": ("dense", "clear:radius=8")})
    monkeypatch.setattr(harness, "CROPS", 3)
    arguments = ["--run", str(tmp_path), "--batch", "2"]
    harness.main([*arguments, "--only", "native"])
    assert calls == [(2, 256, "dense"), (1, 256, "dense")]
    with (tmp_path / "items.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"key": "320/dense/0')  # an interrupted write
    harness.main(arguments)
    made = len(calls)
    assert sorted(calls[2:]) == [(1, 320, "clear:radius=8")] * 2 + [(1, 320, "dense")] * 2
    harness.main(arguments)
    assert len(calls) == made
    report = (tmp_path / "quality.md").read_text(encoding="utf-8")
    assert "| 320 | clear:radius=8 | 2 | 100.0 (100.0..100.0)" in report
    assert "times narrower edges" in report
    with (tmp_path / "quality.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["contender"] == "clear:radius=8"]
    told = {row["measure"]: float(row["value"]) for row in rows}
    assert told["right attributes %"] == 100
    assert told["edge width px"] > 1
    assert {row["pictures"] for row in rows} == {"2"}
    assert Image.open(tmp_path / "quality.png").size[0] == NAMES + 6 * 256


def test_a_run_is_not_continued_with_other_settings(harness, tmp_path):
    harness.Store(tmp_path).check_settings({"steps": 30})
    with pytest.raises(ConfigError, match="another --run"):
        harness.Store(tmp_path).check_settings({"steps": 8})


def test_methods_share_prompts_and_seeds(harness):
    options = harness.read_options(["--run", "unused", "--limit", "3"])
    keys = [(i.size, i.method, i.prompt.index, i.prompt.seed) for i in harness.items(options)]
    assert len(set(keys)) == len(keys)
    for size in ("native", "2048", "4096"):
        seeds = {m: [k[3] for k in keys if k[:2] == (size, m)] for m in {k[1] for k in keys if k[0] == size}}
        assert len({tuple(s) for s in seeds.values()}) == 1
