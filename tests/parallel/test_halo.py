"""Strips of rows: what processes compute with their own and the fetched rows, joined, equals one process.

Here one process plays all of them; `test_two_processes.py` has two that exchange rows.
"""

import pytest
import torch

import gensparse
from gensparse.errors import ConfigError, LayoutMismatchError
from gensparse.kernels.merge import merge_lse
from gensparse.layout import Layout
from gensparse.parallel import Team, halo
from gensparse.patterns import (
    Blocks,
    Box,
    CrissCross,
    Disc,
    Neighborhood,
    Pattern,
    PerHead,
    Pooled,
    Radial,
    Text,
    TopRegions,
)

IMAGE = Layout.image(11, 7, text=5)
CASES = [
    (Disc(3) | Text(), IMAGE),
    (Disc(9) | Text(), Layout.image(9, 4, text=3, text_first=False)),  # a halo taller than a strip
    (Neighborhood(window=(5, 3)) | Text(), IMAGE),  # moved inward at borders
    (Neighborhood(window=(5, 3), dilation=(2, 1), causal=(True, False)), Layout.image(11, 7)),
    (Blocks((4, 3), shift=(1, 0)) | Text(), IMAGE),
    (CrissCross() | Text(), IMAGE),  # needs all rows
    (Radial() | Text(), Layout.video(3, 8, 5, text=4)),
    (Box((1, 1, 2)) | Text(), Layout.video(3, 6, 5, text=4)),
    (PerHead((Disc(2), Box(3))) | Text(), IMAGE),
    (Disc(3) | Text(), Layout.joint((1, 8, 6), text=3, references=[(1, 4, 5)])),
    (Disc(3), Layout.image(4, 5, text=2)),  # text sees nothing
]


def played(x: torch.Tensor, strips: halo.Strips) -> dict[str, torch.Tensor]:
    """The rows that an exchange would fetch, from the whole sequence."""
    frames, height, columns = strips.layout.grid
    start = strips.layout.starts[strips.layout.target]
    picture = x[:, start : start + frames * height * columns].unflatten(1, (frames, height, columns))
    parts = {name: picture[:, :, slice(*rows)] for name, rows in zip(("above", "below"), strips.halos, strict=True)}
    return {name: part.flatten(1, 3) for name, part in parts.items() if part.shape[2]}


@pytest.mark.parametrize("size", [3])
@pytest.mark.parametrize(("pattern", "layout"), CASES, ids=lambda value: repr(value)[:40])
def test_strips_joined_equal_one_process(pattern: Pattern, layout: Layout, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    q, k, v = (torch.randn(2, layout.tokens, 2, 8, generator=generator) for _ in range(3))
    bias = torch.randn(1, 2, layout.tokens, generator=generator)
    plan = gensparse.build_plan(pattern, layout)
    groups = torch.tensor([[1, 0]]) if plan.groups > 1 else None
    expected = gensparse.sparse_attention(q, k, v, plan, key_bias=bias, groups=groups)
    strips = [halo.divide(pattern, layout, Team(None, rank, size), agree=False) for rank in range(size)]
    outs, lses = [], []
    for one in strips:
        keys, values = played(k, one), played(v, one)
        own_bias = torch.cat(
            [
                bias[..., one.tokens],
                *(part[..., 0].transpose(1, 2) for part in played(bias.transpose(1, 2)[..., None], one).values()),
            ],
            -1,
        )
        own = (x[:, one.tokens] for x in (q, k, v))
        out, lse = halo.partial(*own, one, keys, values, key_bias=own_bias, groups=groups)
        outs.append(out)
        lses.append(lse)
    held = [halo.shared_tokens(one) for one in strips]
    joined = merge_lse(*(torch.stack([x[:, h] for x, h in zip(xs, held, strict=True)]) for xs in (outs, lses)))[0]
    seen = torch.zeros(layout.tokens, dtype=torch.long)
    for one, out, places in zip(strips, outs, held, strict=True):
        out[:, places] = joined
        seen[one.tokens] += 1
        torch.testing.assert_close(out, expected[:, one.tokens], atol=2e-6, rtol=1e-5)
    target = slice(layout.starts[layout.target], layout.starts[layout.target] + layout.segments[layout.target].length)
    assert (seen[target] == 1).all()
    assert sum(len(one.tokens) for one in strips) == layout.tokens + (size - 1) * len(held[0])


def test_a_disc_fetches_its_radius_and_no_more() -> None:
    layout = Layout.image(24, 10, text=3)
    middle = halo.divide(Disc(4) | Text(), layout, Team(None, 1, 3), agree=False)
    assert middle.rows == ((0, 8), (8, 16), (16, 24))
    assert middle.needed == ((0, 11), (5, 19), (13, 24))
    assert middle.fetched == 60
    plan = middle.plan()
    whole = gensparse.build_plan(Disc(4) | Text(), layout)
    # no pair is computed twice but those of text, whose parts are joined
    parts = [halo.divide(Disc(4) | Text(), layout, Team(None, r, 3), agree=False).plan().useful[0] for r in range(3)]
    assert sum(parts) == whole.useful[0]
    assert plan.keys == middle.own.tokens + 60


@pytest.mark.parametrize(
    ("pattern", "layout", "size", "message"),
    [
        (Disc(2), Layout.image(3, 9), 4, "3 rows of tokens cannot be divided among 4"),
        (TopRegions((4, 4), 2), Layout.image(8, 8), 2, "chosen at run time"),
        (Disc(2) | Pooled(cells=2, weights="mean"), Layout.image(8, 8), 2, "keys beside the tokens"),
        (Disc(2), Layout.ulysses(Layout.image(8, 8, text=4), 2), 2, "divided already"),
    ],
)
def test_what_cannot_be_divided_is_refused(pattern: Pattern, layout: Layout, size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        halo.divide(pattern, layout, Team(None, 0, size), agree=False)


def test_tensors_of_other_tokens_or_with_gradients_are_refused() -> None:
    strips = halo.divide(Disc(2), Layout.image(8, 8), Team(None, 0, 2), agree=False)
    q = torch.randn(1, 32, 2, 8)
    with pytest.raises(LayoutMismatchError, match="process 0 holds 32 tokens"):
        halo.attend(q[:, :9], q[:, :9], q[:, :9], strips)
    with pytest.raises(ConfigError, match="no gradients"):
        halo.attend(q.requires_grad_(), q, q, strips)
