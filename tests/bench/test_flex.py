"""FlexAttention's block lists and mask functions against the patterns they stand for; nothing is compiled here."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from gensparse.bench import flex
from gensparse.bench.cases import RandomTiles, cases
from gensparse.errors import BackendError
from gensparse.layout import Layout, Segment
from gensparse.patterns import Disc, Neighborhood, Radial, Stripes, Text

GRID = Layout.image(16, 32, text=64)
CLIP = Layout.video(3, 8, 16)
RUN = Layout((Segment("target", 641, (1, 1, 641)),))


def check(pattern, layout, block, tiles):
    """Masks are exact where blocks are partial, full blocks are full, and no visible pair lies outside the lists."""
    case = flex.flex_case(pattern, layout, block=block, tiles=tiles)
    order = torch.arange(layout.tokens) if case.order is None else case.order
    count = -(-len(order) // block) * block
    padded = torch.cat([order, order.new_full((count - len(order),), -1)])
    want = torch.from_numpy(pattern.dense_mask(layout))[0]
    alive = padded >= 0
    index = padded.clamp_min(0)
    seen = want[index][:, index] & alive[:, None] & alive
    blocks = seen.unflatten(0, (-1, block)).unflatten(2, (-1, block)).transpose(1, 2)
    valid = (alive[:, None] & alive).unflatten(0, (-1, block)).unflatten(2, (-1, block)).transpose(1, 2)
    mask = case.block_mask
    partial, full = (listed(x, y) for x, y in ((mask.kv_num_blocks, mask.kv_indices),
                                               (mask.full_kv_num_blocks, mask.full_kv_indices)))  # fmt: skip
    assert not (partial & full).any()
    assert torch.equal(partial | full, blocks.any(-1).any(-1))
    assert (blocks | ~valid)[full].all()
    assert case.visited == int((partial | full).sum()) * block * block
    if partial.any():
        function = create_mask(mask.mask_mod, None, None, count, count, device="cpu")[0, 0]
        function = function.unflatten(0, (-1, block)).unflatten(2, (-1, block)).transpose(1, 2)
        assert torch.equal((function & valid)[partial], blocks[partial])
        alive_keys = valid.any(2)[partial]
        assert not (function[partial].any(1) & ~alive_keys).any(), "empty places are seen"


def listed(counts, indices):
    out = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for row, count in enumerate(counts[0, 0].tolist()):
        out[row, indices[0, 0, row, :count].long()] = True
    return out


@pytest.mark.parametrize(
    ("pattern", "layout", "block", "tiles"),
    [
        (Disc(5) | Text(), GRID, 64, False),
        (Disc(5) | Text(), GRID, 64, True),
        (Disc(5) | Text(), Layout.image(13, 11, text=7), 64, True),
        (Disc(4), Layout.image(24, 128), 128, False),
        (Neighborhood((6, 9)), Layout.image(16, 64), 64, False),
        (Neighborhood((6, 9)), Layout.image(19, 23), 64, True),
        (Neighborhood((2, 4, 5)), CLIP, 64, False),
        (Neighborhood((2, 4, 5)), Layout.video(3, 9, 11), 128, True),
        (RandomTiles(0.4, (64, 64)), RUN, 64, False),
        (Radial(block=64), Layout.video(5, 13, 11), 64, False),
    ],
    ids=repr,
)
def test_blocks_and_masks_are_those_of_the_pattern(pattern, layout, block, tiles):
    check(pattern, layout, block, tiles)


def test_the_check_itself_can_fail(monkeypatch):
    monkeypatch.setattr(flex, "_disc", lambda pattern: 4)
    with pytest.raises(AssertionError):
        check(Disc(5) | Text(), GRID, 64, True)


@pytest.mark.parametrize(
    ("pattern", "layout", "tiles", "reason"),
    [
        (Disc(3), Layout.image(9, 45), False, "runs of 64 tokens are no boxes of the grid"),
        (Disc(3) | Text(), Layout.image(8, 64, text=5), False, "do not divide the segments"),
        (Stripes(2), Layout.image(8, 64), False, "no mask function for Stripes"),
        (RandomTiles(0.4, (64, 64)), RUN, True, "runs in raster order, permuted or not"),
    ],
    ids=repr,
)
def test_what_cannot_be_made_says_why(pattern, layout, tiles, reason):
    with pytest.raises(BackendError, match=reason):
        flex.flex_case(pattern, layout, block=64, tiles=tiles)


def test_every_case_has_a_mask_function():
    for suite in ("kernels", "cpu"):
        for case in cases(suite):
            flex.mask_function(case.small_pattern, case.small, None, "cpu")
