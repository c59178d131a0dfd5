"""Attention maps without a matrix of all pairs, thresholds, similar tokens, moved subjects."""

import numpy as np
import pytest
import torch
from skimage.filters import threshold_otsu
from torch import Tensor

from gensparse.errors import ConfigError
from gensparse.subjects import attention_maps
from gensparse.subjects.attention_maps import cross_maps, otsu, self_rows, self_times, token_map
from gensparse.subjects.reposition import reposition
from gensparse.subjects.segmentation import segment, spread_maps
from gensparse.subjects.similarity import OWN, inject, nearest_tokens, subject_masks


def tensors(*sizes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator) for size in sizes]


@pytest.fixture(params=[1 << 26, 1 << 11], ids=["one block", "many blocks"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(attention_maps, "BLOCK_BYTES", request.param)
    return request.param


def test_maps_equal_those_of_the_whole_matrix(block: int) -> None:
    q, k, text, maps = tensors((2, 35, 3, 8), (2, 35, 3, 8), (2, 11, 3, 8), (2, 35, 5))
    whole = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(8**-0.5).softmax(-1).mean(1)
    words = torch.einsum("bqhd,bkhd->bhqk", q, text).mul(0.2).softmax(-1).mean(1)
    torch.testing.assert_close(self_times(q, k, maps), whole @ maps)
    torch.testing.assert_close(cross_maps(q, text, scale=0.2), words)
    torch.testing.assert_close(cross_maps(q, text, [4, 1], scale=0.2), words[..., [4, 1]])
    groups = torch.zeros(3, 35, dtype=torch.bool)
    groups[0, 3:9], groups[1, 20:] = True, True
    rows = self_rows(q, k, groups)
    torch.testing.assert_close(rows[:, 0], whole[:, 3:9].mean(1))
    torch.testing.assert_close(rows[:, 1], whole[:, 20:].mean(1))
    assert not rows[:, 2].any()
    spread = spread_maps(lambda x: self_times(q, k, x), words)
    torch.testing.assert_close(spread, (whole + 3 * whole @ whole) / 4 @ words)


def test_no_matrix_of_all_pairs_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_maps, "BLOCK_BYTES", 1 << 14)
    q, k, maps = tensors((1, 96, 2, 4), (1, 96, 2, 4), (1, 96, 3))
    largest = []
    softmax = Tensor.softmax
    monkeypatch.setattr(Tensor, "softmax", lambda x, dim: largest.append(x.numel()) or softmax(x, dim))
    self_times(q, k, maps)
    assert max(largest) <= (1 << 14) / 4
    assert sum(largest) == 2 * 96 * 96


def test_otsu_is_that_of_scikit_image() -> None:
    (values,) = tensors((4, 500))
    values[0] = values[0].abs()
    values[1, 250:] += 6
    values[2] = 0.7
    found = otsu(values)
    for row in (0, 1, 3):
        assert float(found[row]) == pytest.approx(float(threshold_otsu(values[row].numpy())), abs=1e-3)
    assert float(found[2]) == pytest.approx(0.7)
    assert not (values[2] > found[2]).any(), "what is constant shows nothing"


def test_words_become_maps_between_0_and_1() -> None:
    maps = torch.tensor([[[0.1, 0.2, 0.0], [0.3, 0.4, 0.0], [0.1, 0.6, 0.0]]])
    torch.testing.assert_close(token_map(maps, [0, 1]), torch.tensor([[0.0, 1.0, 1.0]]))
    assert not token_map(maps, [2]).any()


def test_an_absent_word_has_no_mask_and_several_words_join() -> None:
    maps = torch.zeros(1, 2, 6, 3)
    maps[:, :, :2, 1], maps[:, :, 4:, 2] = 1.0, 1.0
    (first,) = subject_masks(maps, [[1, -1], [2, 2]], (2, 3), [(2, 3)])
    assert first.tolist() == [[True, True, False, False, True, True], [False, False, False, False, True, True]]


def test_the_nearest_token_is_one_of_the_subject(block: int) -> None:
    (features,) = tensors((3, 4, 2, 5))
    masks = torch.zeros(3, 10, dtype=torch.bool)
    masks[:, 3:7] = True
    mapping = torch.ones(3, 3, dtype=torch.bool)
    mapping[1, 2] = False
    index, distance = nearest_tokens(features, masks, mapping, (2, 5))
    flat = features.flatten(2).transpose(1, 2)
    apart = 1 - torch.cosine_similarity(flat[0][:, None], flat[1][None, 3:7], dim=-1)
    assert torch.equal(index[0, 1], apart.argmin(1) + 3)
    torch.testing.assert_close(distance[0, 1], apart.amin(1))
    assert (distance[1, 2] == OWN).all()
    assert (distance[range(3), range(3)] == OWN).all()


def test_a_picture_alone_takes_from_nobody() -> None:
    out, features = tensors((1, 10, 3), (1, 4, 2, 5))
    masks, mapping = torch.ones(1, 10, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool)
    assert torch.equal(inject(out, *nearest_tokens(features, masks, mapping, (2, 5)), masks, 0.8), out)


def test_ties_and_the_background_of_a_segmentation() -> None:
    told = torch.tensor([0.2, 0.9, 0.5]).view(3, 1, 1).repeat(1, 1, 2)
    told[2, 0, 1] = 0.9
    front = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    found, shown = segment(told, front, [1, 2], 0.5)
    assert shown.tolist() == [[False, True]]
    assert found[:, 0].tolist() == [[False, False], [False, True], [False, True]]
    assert segment(told, front, [1], 0.9)[0][:, 0, 0].tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("source", "target"), [((0, 0, 1, 1), (2, 3, 3, 4)), ((1, 1, 4, 3), (0, 0, 6, 7)), ((0, 0, 6, 7), (2, 2, 3, 6))]
)
def test_a_box_moves_onto_its_place(source: tuple[int, ...], target: tuple[int, ...]) -> None:
    grid = (6, 7)
    masks = []
    for top, left, bottom, right in (source, target):
        mask = torch.zeros(grid, dtype=torch.bool)
        mask[top:bottom, left:right] = True
        masks.append(mask)
    move = reposition(*masks)
    values = torch.arange(42.0) + 1
    moved = move.of(values).view(grid)
    assert torch.equal(moved > 0, masks[1])
    part = values.view(grid)[source[0] : source[2], source[1] : source[3]]
    size = (target[2] - target[0], target[3] - target[1])
    expected = torch.nn.functional.interpolate(part[None, None], size=size, mode="nearest")[0, 0]
    assert torch.equal(moved[target[0] : target[2], target[1] : target[3]], expected)
    same = reposition(masks[0], masks[0])
    assert torch.equal(same.source, same.place)


def test_empty_masks_move_nothing_and_other_grids_are_refused() -> None:
    none, some = torch.zeros(3, 4, dtype=torch.bool), torch.zeros(3, 4, dtype=torch.bool)
    some[1, 1:3] = True
    assert len(reposition(none, some).source) == 0
    kept = reposition(some, none)
    assert torch.equal(kept.source, kept.place)
    assert np.array_equal(kept.source, [5, 6])
    with pytest.raises(ConfigError, match="different grids"):
        reposition(none, some.T)
