"""Where a model has put its subjects: found from what its answers owe to their words."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from gensparse.subjects.rehearsal import (
    DRAWS,
    SHARES,
    box_of,
    changes,
    comparisons,
    grown,
    missing_in,
    seeded,
    without,
)


@pytest.mark.parametrize(
    ("prompt", "name", "left"),
    [
        ("a cat and a dog on a lawn", "dog", "a cat and on a lawn"),
        ("a cat and a small white dog, photograph", "dog", "a cat and , photograph"),
        ("Cat on a mat", "cat", "on a mat"),
        ("cats and dogs", "cat", None),
        ("a caterpillar and a cat", "cat", "a caterpillar and"),
        ("two red cars", "red cars", ""),
        ("a (cat+dog)", "cat+dog", "a ()"),
        ("", "cat", None),
    ],
)
def test_a_prompt_without_a_subject(prompt, name, left) -> None:
    assert without(prompt, name) == left


def test_names_that_a_prompt_does_not_say() -> None:
    assert missing_in(["a cat and a dog", "a dog"], ["cat", "dog"]) == ["cat"]
    assert missing_in(["a cat"], []) == []


@pytest.mark.parametrize("size", [(12, 20), (7, 13), (1, 1), (2, 5)])
def test_changes_are_where_answers_differ(size) -> None:
    """Planted: the second prompt changes the left column of cells, the third one the right one, under noise."""

    def answer(noisy):
        generator = torch.Generator().manual_seed(noisy.seed + int(100 * noisy.share))
        base = torch.randn(1, 3, *size, generator=generator)
        answers = base + 0.01 * torch.randn(3, 3, *size, generator=generator)
        answers[1, :, :, 0] += 1.0
        answers[2, :, :, -1] += 1.0
        return answers

    maps = changes(answer)
    assert maps.shape == (2, -(-size[0] // 2), -(-size[1] // 2))
    torch.testing.assert_close(maps.mean((1, 2)), torch.ones(2))
    assert bool((maps[0].amax(1) == maps[0, :, 0]).all())
    assert bool((maps[1].amax(1) == maps[1, :, -1]).all())
    assert len(list(comparisons(0))) == len(SHARES) * DRAWS == len(set(comparisons(5)))


def test_answers_that_do_not_differ_are_no_error() -> None:
    maps = changes(lambda noisy: torch.ones(3, 2, 6, 6))
    assert torch.equal(maps, torch.zeros(2, 3, 3))
    assert grown(maps, np.zeros((48, 48, 3), np.uint8)).shape == (2, 48, 48)


def drawn(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A picture with a red disc at the left and a blue square at the right, and where they are, bool [2, H, W]."""
    height, width = size
    image, masks = Image.new("RGB", (width, height), (240, 200, 60)), []
    left = (0.1 * width, 0.3 * height, 0.1 * width + 0.4 * height, 0.7 * height)
    right = (0.7 * width, 0.35 * height, 0.7 * width + 0.3 * height, 0.65 * height)
    for kind, box, colour in (("ellipse", left, (214, 40, 40)), ("rectangle", right, (30, 100, 220))):
        mask = Image.new("1", (width, height))
        for target, fill in ((image, colour), (mask, 1)):
            getattr(ImageDraw.Draw(target), kind)(box, fill=fill)
        masks.append(np.asarray(mask))
    return np.asarray(image), np.stack(masks)


@pytest.mark.parametrize("size", [(96, 96), (101, 157), (512, 384)])
def test_areas_grow_to_the_edges_of_the_picture(size) -> None:
    """From maps on a coarse grid that know no edge, and where the subjects are weak in each other's."""
    picture, masks = drawn(size)
    rows, columns = size[0] // 8, size[1] // 8
    coarse = np.stack([np.asarray(Image.fromarray(m).resize((columns, rows), Image.Resampling.BOX)) for m in masks])
    coarse = torch.from_numpy(coarse.astype(np.float32))
    maps = 0.1 + coarse + 0.3 * coarse.flip(0) + 0.05 * torch.rand(coarse.shape, generator=torch.manual_seed(0))
    found = grown(maps, picture)
    assert max(found.shape[1:]) <= 128
    assert not bool((found[0] & found[1]).any())
    whole = np.stack([np.asarray(Image.fromarray(m.numpy()).resize(size[::-1])) for m in found])
    for one, mask in zip(whole, masks, strict=True):
        assert (one & mask).sum() / (one | mask).sum() > 0.85


def test_everybody_has_a_token() -> None:
    strong = torch.tensor([[[1.0, 0.3], [0.1, 0.1]], [[0.9, 0.2], [0.1, 0.5]]])
    assert seeded(strong).tolist() == [[1, 0], [3, 0]]
    weak = torch.tensor([[[0.9, 0.1, 0.1]], [[0.1, 0.1, 0.4]]])
    assert seeded(weak).tolist() == [[1, 3, 2]]
    assert seeded(torch.ones(1, 1, 1)).tolist() == [[1]]


def test_one_subject_alone_on_one_token() -> None:
    found = grown(torch.ones(1, 1, 1), np.zeros((16, 16, 3), np.uint8))
    assert found.shape == (1, 16, 16)
    assert bool(found.all())


def test_boxes() -> None:
    mask = torch.zeros(10, 20, dtype=torch.bool)
    assert box_of(mask) is None
    mask[2:5, 4:10] = True
    assert box_of(mask) == (0.2, 0.2, 0.5, 0.5)


def test_answers_that_run_wild_at_the_border_hide_nobody() -> None:
    """Planted: at the lower border everything changes ten times as much as at the subjects."""
    picture, masks = drawn((96, 160))
    coarse = np.stack([np.asarray(Image.fromarray(m).resize((20, 12), Image.Resampling.BOX)) for m in masks])
    maps = 0.1 + torch.from_numpy(coarse.astype(np.float32))
    maps[:, -1] = 10.0
    for one, mask in zip(grown(maps, picture), masks, strict=True):
        whole = np.asarray(Image.fromarray(one.numpy()).resize((160, 96)))
        assert (whole & mask).sum() / (whole | mask).sum() > 0.7
