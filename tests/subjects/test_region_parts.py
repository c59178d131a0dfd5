"""Parts of the methods for regions and adapters on their own: phrases, merging, drafts, views of MultiDiffusion."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from gensparse.errors import ConfigError
from gensparse.subjects.areas import Mask, Regions
from gensparse.subjects.boxdiff import box_losses
from gensparse.subjects.calibration import calibration_loss
from gensparse.subjects.drafts import DraftGuide
from gensparse.subjects.drawer import composed, guided_start, layout_weights
from gensparse.subjects.merge import gate, relevance, shares
from gensparse.subjects.multidiffusion import bootstrapped, fused, latent_masks, views_of
from gensparse.subjects.phrases import (
    averaged_values,
    found_in,
    noun_phrases,
    phrases_of_tree,
    piece_offsets,
    token_span,
)


@pytest.mark.parametrize(
    ("prompt", "phrases"),
    [
        ("A red car and a white sheep.", ["a red car", "a white sheep"]),
        ("two brown dogs sitting on an old wooden bench", ["two brown dogs", "an old wooden bench"]),
        ("a cat, a small grey mouse, cheese", ["a cat", "a small grey mouse"]),
        ("his blue hat is behind the tree", ["his blue hat", "the tree"]),
        ("portrait", []),
        ("", []),
    ],
)
def test_noun_phrases_of_captions(prompt: str, phrases: list[str]) -> None:
    assert noun_phrases(prompt) == phrases


def test_phrases_are_found_left_to_right_as_whole_words() -> None:
    text = "a cat and a cat and a catfish"
    assert found_in(text, ["a cat", "a cat", "a catfish"]) == [(0, 5), (10, 15), (20, 29)]
    assert found_in("a red car", ["a red car", "red car"]) == [(0, 9), (2, 9)]
    with pytest.raises(ConfigError, match="does not stand"):
        found_in("a catfish", ["a cat"])


def test_phrases_whose_tokens_were_cut_have_no_span() -> None:
    offsets = [(0, 1), (2, 5), (6, 9), (0, 0)]
    assert token_span(offsets, (2, 9)) == (1, 3)
    assert token_span(offsets, (6, 13)) is None
    assert token_span(offsets, (20, 25)) is None


@pytest.mark.parametrize("tree", ["(NP (DT a)", "(NP (DT a)))", "NP"])
def test_broken_trees_and_pieces_are_refused(tree: str) -> None:
    with pytest.raises(ConfigError, match=r"whole tree|in brackets"):
        phrases_of_tree(tree)
    with pytest.raises(ConfigError, match="own pieces"):
        piece_offsets("a cat", ["a</w>", "dog</w>"])


def test_the_mean_of_values_is_the_mean_of_attentions() -> None:
    """to_v is linear: one attention with averaged values equals the average of k + 1 attentions."""
    generator = torch.Generator().manual_seed(0)
    full, phrases = (torch.randn(n, 9, 6, generator=generator) for n in (1, 2))
    spans = [(0, 3), (2, 5)]
    mean = averaged_values(full, phrases, spans)
    each = [full.clone() for _ in range(3)]
    each[1][:, 1:4], each[2][:, 3:6] = phrases[0, 1:4], phrases[1, 1:4]
    torch.testing.assert_close(mean, torch.stack(each).mean(0))


def test_shares_sum_to_one_and_keep_to_regions() -> None:
    generator = torch.Generator().manual_seed(0)
    q, names = torch.randn(2, 7, 3, 4, generator=generator), torch.randn(2, 3, 6, 3, 4, generator=generator)
    raw = torch.stack([relevance(q, names[:, k], torch.tensor([1 + k, 2])) for k in range(3)], 1)
    torch.testing.assert_close(raw.sum(-1), torch.ones(2, 3))
    torch.testing.assert_close(shares(raw).sum(1), torch.ones(2, 7))
    regions = torch.tensor([[1.0, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1, 0]])
    found = shares(raw, regions)
    assert found[:, 0, 0].tolist() == [1, 1]
    assert found[:, :, 6].abs().max() == 0
    assert not found.isnan().any()
    weights = gate(torch.randn(2, 7, 12, generator=generator), torch.randn(12, generator=generator))
    torch.testing.assert_close(weights.mean(-1), torch.ones(2))


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_a_run_begins_from_its_draft(scheduler: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    draft, noise = (torch.randn(1, 4, 6, 5, generator=generator) for _ in range(2))
    mask = torch.zeros(12, 10)
    mask[3, 4] = 1  # one pixel is enough for its cell
    plan = scheduler()
    plan.set_timesteps(5)
    guide = DraftGuide(draft, mask, noise, steps=3)
    first = guide.first(plan)
    cells = torch.zeros(6, 5)
    cells[1, 2] = 1
    times, sigma = plan.timesteps, float(plan.init_noise_sigma)
    expected = guided_start(noise * sigma, plan.add_noise(draft, noise, times[:1]), cells) / sigma
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(first[..., 0, 0], noise[..., 0, 0])
    pipe = type("Pipe", (), {"scheduler": plan})()
    latents = torch.randn(1, 4, 6, 5, generator=generator)
    for index, time in enumerate(times):
        out = guide(pipe, index, time, {"latents": latents})["latents"]
        assert torch.equal(out, latents) == (index + 1 >= 3)
    for wrong in ((draft[0], mask, noise), (draft, mask[0], noise), (draft, mask, noise, 0)):
        with pytest.raises(ConfigError):
            DraftGuide(*wrong)


def test_drafts_are_cut_out_and_pasted_without_hiding_earlier_ones() -> None:
    red, blue = torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)
    red[0], blue[2] = 1, 1
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:6, 2:4] = True  # 4 rows, 2 columns
    picture, taken = composed(
        [red, blue, blue], [mask, mask, mask & False], [[1, 1, 4, 4], [2, 2, 4, 8], [0, 0, 9, 9]], (10, 12)
    )
    assert picture.shape == (3, 10, 12)
    assert picture[0].nonzero().tolist() == [[y, x] for y in range(1, 5) for x in range(1, 3)]
    assert taken[2:10, 2:6].all()
    assert picture[2, 3, 2] == 0  # red was there first
    assert picture[2, 9, 5] == 1
    assert int(taken.sum()) == int((picture.sum(0) > 0).sum())
    with pytest.raises(ConfigError, match="one of each"):
        composed([red], [], [], (4, 4))


def test_layout_weights_of_overlaps_and_of_a_whole_box() -> None:
    weights = layout_weights([[0, 0, 6, 4], [4, 0, 4, 4]], (4, 8))
    torch.testing.assert_close(weights[0].sum(0), torch.ones(4, 8))
    torch.testing.assert_close(weights[0, 2:, 0, 4], torch.tensor([0.6, 0.6]))
    assert weights[0, 1, 0, 0] == pytest.approx(-0.5)  # negative guidance inside boxes, as published
    whole = layout_weights([[0, 0, 8, 4]], (4, 8), (0.7, 0.0))
    torch.testing.assert_close(whole[0, :, 1, 1], torch.tensor([0.3, 0.0, 0.7]))


def test_views_cover_latents_of_any_size_and_fuse_by_masks() -> None:
    for size in ((64, 80), (65, 70), (40, 100), (64, 64)):
        seen = torch.zeros(size)
        for h0, h1, w0, w1 in views_of(size):
            seen[h0:h1, w0:w1] += 1
        assert seen.min() >= 1
    masks = latent_masks(torch.tensor([[[1.0] * 6 + [0.0] * 6] * 8, [[0.0] * 3 + [0.7] * 6 + [0.2] * 3] * 8]), (4, 6))
    assert masks.shape == (3, 1, 4, 6)
    assert masks[0, 0, 0].tolist() == [0, 0, 0, 0, 0, 1]
    views = views_of((4, 6), window=4, stride=2)
    value, count = fused(lambda view, prompt: torch.full((1, 2, 4, 4), float(prompt)), views, masks)
    assert value[0, 0, 0].tolist() == [1, 1, 1.5, 2, 2, 0]  # pixel 2 * x under each cell
    assert count.min() >= 1
    latents = torch.ones(3, 2, 4, 6)
    out = bootstrapped(latents, masks, torch.zeros(1, 2, 4, 6))
    assert torch.equal(out[0], latents[0])
    assert torch.equal(out[1:], masks[1:].expand(-1, 2, -1, -1))


def test_losses_say_what_they_need() -> None:
    with pytest.raises(ConfigError, match="two or more"):
        calibration_loss(torch.rand(1, 1, 16, 5), [(1, 2)])
    with pytest.raises(ConfigError, match="not square"):
        calibration_loss(torch.rand(1, 1, 15, 5), [(1, 2), (3, 4)])
    with pytest.raises(ConfigError, match="a box per token"):
        box_losses(torch.rand(2, 4, 4), [(0, 0, 1, 1)])
    inner, outer, across, down = box_losses(torch.rand(1, 4, 4), [(2, 1, 2, 3)])  # without area
    assert float(inner) == 1
    assert (outer + across + down).isfinite().all()


def test_masks_of_any_kind_are_the_same() -> None:
    inside = torch.tensor([[True, False, True], [False, True, True]])
    masks = [Mask.of(inside), Mask.of(inside.float().numpy()), Mask.of((inside * 255).to(torch.uint8))]
    assert masks[0] == masks[1] == masks[2] == Mask.from_dict(masks[0].to_dict())
    assert len({hash(mask) for mask in masks}) == 1
    regions = Regions.of([{"prompt": "x", "mask": masks[0].to_dict()}])
    assert regions.masks((4, 6), (2, 3))[0].tolist() == inside.float().tolist()
    for data in (
        {"size": [2, 3], "data": "!"},
        {"size": [2, 2], "data": masks[0].to_dict()["data"]},
        {"size": [1 << 20, 1 << 20], "data": ""},
    ):
        with pytest.raises(ConfigError):
            Mask.from_dict(data)
    for values in (torch.rand(2, 3, 4), torch.tensor([[2.0]]), torch.zeros(0, 3)):
        with pytest.raises(ConfigError):
            Mask.of(values)
