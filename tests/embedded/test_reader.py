"""The reader finds what fresh renderings show, however they were spoiled on the way."""

import importlib.util
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gensparse.embedded.quality import ATTRIBUTES, prompt_fidelity, reading_of, share_right
from gensparse.embedded.reader import WEIGHTS, Network, Reader, as_image, input_size, overlap, settle_colours
from gensparse.embedded.render import render
from gensparse.embedded.scenes import ASPECTS, PALETTE, Request, Scene, SubjectRequest, random_scene
from gensparse.errors import ConfigError

FRESH = 9_700_000  # no training picture has a seed this high


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader.load()


def everything(scene: Scene) -> Request:
    """A prompt that says all there is to say."""
    subjects = tuple(SubjectRequest(s.shape, s.colour, s.fill, s.size) for s in scene.subjects)
    return Request(subjects, scene.relations, scene.background, scene.background_colour)


def pixels_of(aspect: float, area: float) -> tuple[int, int]:
    """(height, width) of that aspect ratio and area."""
    return round((area / aspect) ** 0.5), round((area * aspect) ** 0.5)


def score(reader: Reader, scenes: list[Scene], pictures: list) -> Counter:
    """Share right of every attribute."""
    scores = [prompt_fidelity(r, everything(s)) for s, r in zip(scenes, reader.read_many(pictures), strict=True)]
    present = [name for name in ATTRIBUTES if any(name in s for s in scores)]
    return {name: share_right([{name: s[name]} for s in scores if name in s]) for name in present}


def blur(picture: np.ndarray, sigma: float) -> Image.Image:
    from gensparse.embedded.defects import blurred

    return blurred(picture, sigma)


def rescale(picture: np.ndarray, side: int) -> Image.Image:
    image = Image.fromarray(picture)
    return image.resize((side, side), Image.Resampling.BILINEAR).resize(image.size, Image.Resampling.BICUBIC)


SPOILED = {
    "clean": lambda p, rng: p,
    "blurred": lambda p, rng: blur(p, 2.0),
    "rescaled": lambda p, rng: rescale(p, 90),
    "enlarged": lambda p, rng: Image.fromarray(p).resize((700, 700), Image.Resampling.BICUBIC),
    "noisy": lambda p, rng: np.clip(p + rng.normal(0, 12, p.shape), 0, 255).astype(np.uint8),
    "tinted": lambda p, rng: np.clip(p * [0.97, 1.0, 1.03] + 3, 0, 255).astype(np.uint8),
}


@pytest.mark.parametrize("spoil", SPOILED)
def test_attributes_of_fresh_renderings_are_right(reader, spoil):
    scenes = [random_scene(seed) for seed in range(FRESH, FRESH + 150)]
    rng = np.random.default_rng(0)
    shares = score(reader, scenes, [SPOILED[spoil](render(s, 256, 256), rng) for s in scenes])
    assert set(shares) == set(ATTRIBUTES) - {"place"}
    assert min(shares.values()) >= 0.975, shares
    assert np.mean(list(shares.values())) >= 0.99, shares


@pytest.mark.parametrize("aspect", ASPECTS, ids=lambda a: f"{a:.2f}")
def test_other_aspect_ratios_are_read_as_well(reader, aspect):
    scenes = [random_scene(seed, aspect) for seed in range(FRESH + 1000, FRESH + 1060)]
    shares = score(reader, scenes, [render(s, *pixels_of(aspect, 240 * 240)) for s in scenes])
    assert np.mean(list(shares.values())) >= 0.99, shares


def test_renderings_at_4096_are_read_as_well(reader):
    scenes = [random_scene(seed) for seed in range(FRESH + 2000, FRESH + 2006)]
    shares = {name: [] for name in ATTRIBUTES}
    for scene in scenes:
        for name, share in score(reader, [scene], [render(scene, 4096, 4096)]).items():
            shares[name].append(share)
    assert all(min(values) == 1.0 for values in shares.values() if values), shares


def test_crops_at_full_resolution_show_their_subject(reader):
    right = []
    for seed in range(FRESH + 3000, FRESH + 3060):
        scene = random_scene(seed)
        subject = scene.subjects[-1]
        half = subject.radius * 1.5
        window = tuple(np.clip([subject.y - half, subject.x - half, subject.y + half, subject.x + half], 0, 1))
        size = [round(4096 * (window[i + 2] - window[i]) / 4) for i in (0, 1)]
        seen = reader.read(render(scene, *size, window)).subjects
        wanted = (subject.shape, subject.colour, subject.fill)
        matches = [[a == b for a, b in zip((s.shape, s.colour, s.fill), wanted, strict=True)] for s in seen]
        right += max(matches, key=sum, default=[False] * 3)
    assert np.mean(right) >= 0.98


def test_boxes_lie_on_the_subjects(reader):
    scenes = [random_scene(seed) for seed in range(FRESH + 4000, FRESH + 4040)]
    for scene, reading in zip(scenes, reader.read_many([render(s, 200, 200) for s in scenes]), strict=True):
        for i in range(len(scene.subjects)):
            assert max(overlap(scene.box(i), seen.box) for seen in reading.subjects) > 0.7


def test_colours_that_the_picture_contradicts_are_settled_by_its_pixels():
    scene = next(s for s in map(random_scene, range(FRESH, FRESH + 99)) if len(s.subjects) == 2)
    pixels, truth = render(scene, 128, 128), reading_of(scene)
    claimed = [next(c for c in PALETTE if c not in (s.colour, scene.background_colour)) for s in scene.subjects]
    wrong = tuple(replace(s, colour=c) for s, c in zip(truth.subjects, claimed, strict=True))
    assert settle_colours(replace(truth, subjects=wrong), pixels) == truth
    gray = np.full_like(pixels, 90)  # next to no palette colour: nothing to go by
    assert settle_colours(truth, gray) == truth
    outside = replace(truth.subjects[0], box=(1.2, 1.2, 1.4, 1.4))
    assert settle_colours(replace(truth, subjects=(outside,)), pixels).subjects == (outside,)


def test_a_picture_without_subjects_shows_none(reader):
    for seed in range(FRESH, FRESH + 20):
        scene = replace(random_scene(seed), subjects=(), relations=(), places=())
        reading = reader.read(render(scene, 256, 256))
        assert reading.subjects == ()
        assert reading == replace(reading_of(scene), aspect=1.0)


@pytest.mark.parametrize(
    "convert",
    [
        pytest.param(Image.fromarray, id="pil"),
        pytest.param(lambda p: Image.fromarray(np.dstack([p, np.full(p.shape[:2], 255, np.uint8)])), id="rgba"),
        pytest.param(lambda p: p.astype(np.float64) / 255, id="float-array"),
        pytest.param(lambda p: torch.from_numpy(p).permute(2, 0, 1), id="uint8-tensor"),
        pytest.param(
            lambda p: torch.from_numpy(p).permute(2, 0, 1)[None].float() / 255, id="float-tensor-batch-of-one"
        ),
    ],
)
def test_every_kind_of_picture_reads_alike(reader, convert):
    pixels = render(random_scene(FRESH), 173, 131)
    assert reader.read(convert(pixels)) == reader.read(pixels)


def test_half_precision_pictures_are_taken():
    values = torch.rand(3, 20, 31, dtype=torch.bfloat16)
    assert as_image(values).size == (31, 20)


def test_not_a_number_reads_as_black():
    values = np.full((40, 40, 3), np.nan, np.float32)
    assert not np.asarray(as_image(values)).any()


@pytest.mark.parametrize("shape", [(17, 23), (1024, 40), (129, 127), (16, 16)], ids=str)
def test_awkward_sizes_are_read(reader, shape):
    reading = reader.read(render(random_scene(FRESH), *shape))
    assert reading.aspect == shape[1] / shape[0]
    assert all(np.isfinite(s.box).all() and 0 <= s.confidence <= 1 for s in reading.subjects)


def test_batches_do_not_change_readings(reader):
    pictures = [
        render(random_scene(seed, a), 160, 160) for seed, a in zip(range(FRESH, FRESH + 5), ASPECTS, strict=True)
    ]
    together = reader.read_many(pictures)
    for picture, reading in zip(pictures, together, strict=True):
        alone = reader.read(picture)
        assert [s.shape for s in alone.subjects] == [s.shape for s in reading.subjects]
        assert alone.background_kind == reading.background_kind


@pytest.mark.parametrize("aspect", [0.2, 9 / 16, 1.0, 1.5, 5.0])
def test_input_sizes_have_the_aspect_and_suit_the_network(aspect):
    height, width = input_size(aspect)
    assert height % 16 == 0
    assert width % 16 == 0
    assert 0.7 < width / height / aspect < 1.4
    assert 0.7 < height * width / 128**2 < 1.3


@pytest.mark.parametrize("picture", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4)), torch.zeros(2, 3, 8, 8)])
def test_what_is_no_picture_is_refused(reader, picture):
    with pytest.raises(ConfigError, match="shape"):
        reader.read(picture)


def test_features_are_finite_and_feel_blur(reader):
    sharp = [render(random_scene(seed), 70, 96) for seed in range(FRESH, FRESH + 4)]
    features = reader.features(sharp)
    assert features.shape[0] == 4
    assert features.isfinite().all()
    soft = reader.features([blur(p, 1.5) for p in sharp])
    assert ((features - soft).norm(dim=1) > 0.05 * features.norm(dim=1)).all()


def test_features_refuse_slivers(reader):
    with pytest.raises(ConfigError, match="32"):
        reader.features([np.zeros((16, 64, 3), np.uint8)])


def test_weights_are_small_and_complete():
    assert WEIGHTS.stat().st_size < 3 * 2**20
    assert sum(p.numel() for p in Network().parameters()) < 1_000_000


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def training():
    path = Path(__file__).resolve().parents[2] / "samples" / "embedded" / "train_reader.py"
    spec = importlib.util.spec_from_file_location("train_reader", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_reader"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["train_reader"]


def test_training_batches_are_reproducible_and_finite(training):
    pixels, wanted = training.batch(96, 8)
    again, _ = training.batch(96, 8)
    assert torch.equal(pixels, again)
    assert pixels.abs().max() <= 1
    assert pixels.shape[0] == 8
    losses = training.loss_of(*Network().eval()(pixels), wanted)
    assert all(loss.isfinite() for loss in losses.values())


def test_labels_leave_out_what_a_window_does_not_show(training):
    scene = random_scene(FRESH + 1)
    subject = scene.subjects[0]
    away = (0.0, 0.0, 0.25, 0.25) if subject.y > 0.5 else (0.75, 0.75, 1.0, 1.0)
    assert len(training.labels(scene, (0.0, 0.0, 1.0, 1.0), 128, 128)) == len(scene.subjects)
    assert training.visible_share(scene, 0, away) < 0.25


def test_targets_mark_one_centre_per_visible_subject(training):
    scenes = [random_scene(seed) for seed in range(FRESH, FRESH + 10)]
    items = [training.labels(s, (0.0, 0.0, 1.0, 1.0), 128, 128) for s in scenes]
    wanted = training.targets(items, [(0, 0)] * 10, 128, 128)
    for b, scene in enumerate(scenes):
        assert int((wanted.heat[b] == 1).sum()) == len(scene.subjects)
        assert abs(float(wanted.own[b].sum()) - len(scene.subjects)) < 1e-5


def test_training_resumes_where_it_stopped(training, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "check", lambda network: {})
    training.train(tmp_path, minutes=0.02, size=2, rate=1e-3)
    first = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["state"]
    training.train(tmp_path, minutes=0.04, size=2, rate=1e-3)
    second = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["state"]
    assert first["step"] >= 1
    assert second["seconds"] > first["seconds"]
    Reader.load(tmp_path / "reader.safetensors")
