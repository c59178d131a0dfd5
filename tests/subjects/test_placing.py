"""Objects on grids: their tokens here and there, borders, boxes."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gensparse.errors import ConfigError
from gensparse.subjects.placing import centre_of, mask_box, placed
from gensparse.subjects.read_masks import box_mask


def blob(height: int, width: int, seed: int = 0) -> Tensor:
    """An object in the middle of a picture that touches the four sides of its box."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    top, left = height // 4, width // 3
    inner = torch.rand(height - 2 * top, width - 2 * left, generator=torch.Generator().manual_seed(seed)) > 0.4
    inner[0, 0] = inner[-1, -1] = True
    mask[top : height - top, left : width - left] = inner
    return mask


def by_hand(mask: Tensor, centre: tuple[float, float], grid: tuple[int, int]) -> list[tuple[int, int]]:
    """Pairs of tokens, from loops over the box as the published code runs them."""
    top, left, bottom, right = mask_box(mask)
    (height, width), (rows, columns) = mask.shape, grid
    first = math.floor(top * rows / height), math.floor(left * columns / width)
    last = math.floor(bottom * rows / height), math.floor(right * columns / width)
    start = [int(centre[axis] * grid[axis]) - math.ceil((last[axis] - first[axis]) / 2) for axis in range(2)]
    found = []
    for i in range(first[0], last[0]):
        for j in range(first[1], last[1]):
            y, x = start[0] + i - first[0], start[1] + j - first[1]
            inside = 0 <= y < rows and 0 <= x < columns
            if mask[i * height // rows, j * width // columns] and inside:
                found.append((i * columns + j, y * columns + x))
    return found


@pytest.mark.parametrize("grid", [(8, 8), (7, 13), (1, 11), (13, 1), (64, 48), (3, 5)], ids=str)
@pytest.mark.parametrize("centre", [(0.5, 0.5), (0.3, 0.71), (0.0, 0.02), (0.99, 0.97)], ids=str)
def test_tokens_move_with_the_box_and_end_at_the_borders(grid: tuple[int, int], centre: tuple[float, float]) -> None:
    mask = blob(61, 47)
    found = placed(mask, mask_box(mask), centre, grid)
    pairs = by_hand(mask, centre, grid)
    assert list(zip(found.source.tolist(), found.target.tolist(), strict=True)) == pairs
    assert len(set(found.target.tolist())) == len(pairs)
    top, left, bottom, right = found.box
    assert 0 <= top <= bottom <= grid[0]
    assert 0 <= left <= right <= grid[1]
    rows, columns = found.target // grid[1], found.target % grid[1]
    assert ((rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)).all()


def test_pasting_and_taking_are_inverse_and_leave_the_rest() -> None:
    mask = blob(31, 29)
    found = placed(mask, mask_box(mask), (0.2, 0.8), (31, 29))
    generator = torch.Generator().manual_seed(1)
    ground, item = torch.rand(2, 3, 31, 29, generator=generator), torch.rand(2, 3, 31, 29, generator=generator)
    both = found.pasted(ground, item)
    inside = torch.zeros(31 * 29, dtype=torch.bool)
    inside[found.target] = True
    assert torch.equal(both.flatten(2)[..., ~inside], ground.flatten(2)[..., ~inside])
    assert torch.equal(both.flatten(2)[..., found.target], item.flatten(2)[..., found.source])
    assert torch.equal(found.taken(item, both), item)
    assert torch.equal(found.pasted(both, item), both)
    assert found.inside(ground).sum() == (found.box[2] - found.box[0]) * (found.box[3] - found.box[1])


def test_boxes_and_centres_of_masks() -> None:
    mask = np.zeros((7, 9), bool)
    mask[2:5, 3] = mask[4, 3:8] = True
    assert mask_box(torch.from_numpy(mask)) == (2, 3, 5, 8)
    assert centre_of(torch.from_numpy(mask)) == (3.5 / 7, 5.5 / 9)
    assert centre_of(box_mask((0.25, 0.5, 0.75, 1), (8, 8))) == (0.75, 0.5)
    with pytest.raises(ConfigError, match="keeps nothing"):
        mask_box(torch.zeros(3, 3))


def test_an_object_outside_of_the_picture_has_no_token() -> None:
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[8:10, 8:10] = True
    assert len(placed(mask, mask_box(mask), (0.5, 0.5), (8, 8)).source) == 1
    assert len(placed(mask, mask_box(mask), (0.5, 0.5), (2, 2)).source) == 0  # smaller than a token
    assert len(placed(mask, mask_box(mask), (2.0, 0.5), (16, 16)).source) == 0
