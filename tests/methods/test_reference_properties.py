"""What holds of attention to references whatever the method: in whole models, at an odd grid, for every family."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gensparse
from gensparse import Concept, Subjects
from gensparse.methods import FreeCustom, IsolationReposition, ReferenceOnly
from gensparse.testing.tiny import tiny_denoiser, tiny_inputs

GRID = (1, 5, 7)
FIRST = {"sd3": "transformer_blocks.0", "sd35": "transformer_blocks.0", "pixart": "transformer_blocks.0"}

pytestmark = pytest.mark.parametrize("name", FIRST)


@cache
def denoiser(name: str) -> nn.Module:
    return tiny_denoiser(name)


def inputs(name: str, rows: Sequence[int]) -> dict[str, Any]:
    """Arguments for pictures of three kinds, each with a text and latents of its own."""
    given = tiny_inputs(name, GRID, batch=3)
    return {key: x[list(rows)] if isinstance(x, Tensor) else x for key, x in given.items()}


@torch.no_grad()
def made(name: str, rows: Sequence[int] | dict[str, Any], method: Any = None, *masks: Any) -> Tensor:
    """The last picture of a batch, whose first ones are references with masks."""
    net, given = denoiser(name), rows if isinstance(rows, dict) else inputs(name, rows)
    if method is None:
        return net(**given, return_dict=False)[0][-1]
    subjects = Subjects(*(Concept(f"subject {n}", mask=mask) for n, mask in enumerate(masks)))
    with gensparse.applied(net, method, subjects=subjects, strict=True):
        return net(**given, return_dict=False)[0][-1]


def halves() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A mask of tokens that is no box, and two others that are it together."""
    whole = np.random.default_rng(5).random(GRID[1:]) < 0.6
    first = whole & (np.arange(GRID[2]) < 3)
    return whole, first, whole & ~first


def test_references_of_which_nothing_is_kept_are_plain(name: str) -> None:
    nothing = np.zeros(GRID[1:])
    assert torch.equal(made(name, (0, 2), FreeCustom(layers="all"), nothing), made(name, (0, 2)))


def test_the_order_of_references_does_not_matter(name: str) -> None:
    whole, first, _ = halves()
    out = made(name, (0, 1, 2), FreeCustom(weights=(2.0, 0.5), layers="all"), whole, first)
    swapped = made(name, (1, 0, 2), FreeCustom(weights=(0.5, 2.0), layers="all"), first, whole)
    torch.testing.assert_close(swapped, out, rtol=0, atol=1e-5)
    assert not torch.allclose(out, made(name, (0, 1, 2)), atol=1e-3)


def test_a_reference_in_two_parts_is_the_reference(name: str) -> None:
    whole, first, second = halves()
    out = made(name, (0, 2), FreeCustom(weights=1.5, layers="all"), whole)
    parts = made(name, (0, 0, 2), FreeCustom(weights=1.5, layers="all"), first, second)
    torch.testing.assert_close(parts, out, rtol=0, atol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_a_picture_that_sees_itself_twice_is_plain_where_no_text_is_beside_it(name: str, weight: float) -> None:
    """In joint attention a second copy of the picture takes weight from the text."""
    out = made(name, (2, 2), FreeCustom(weights=weight, layers="all"), np.ones(GRID[1:]))
    same = torch.allclose(out, made(name, (2,)), rtol=0, atol=2e-5)
    assert same == (name == "pixart")


def test_regions_read_the_text_of_their_portrait_in_cross_attention(name: str) -> None:
    """With a region of everything the scene is what it is under the portrait's text, padding included.

    Joint attention has the scene's text alone.
    """
    given = tiny_inputs(name, GRID, batch=2, **({"lengths": (3, 5)} if name == "pixart" else {}))
    subjects = Subjects(Concept("cat", region=np.ones(GRID[1:])))
    net, told = denoiser(name), ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections")
    alone = {key: x[:1] if key in told else x[1:] if isinstance(x, Tensor) else x for key, x in given.items()}
    with torch.no_grad():
        expected = net(**alone, return_dict=False)[0][0]
        with gensparse.applied(net, IsolationReposition(cross=1.0, layers="isolated"), subjects=subjects, strict=True):
            out = net(**given, return_dict=False)[0][1]
        plain = net(**given, return_dict=False)[0][1]
    same, other = (expected, plain) if name == "pixart" else (plain, expected)
    torch.testing.assert_close(out, same, rtol=0, atol=1e-5)
    assert not torch.allclose(out, other, atol=1e-3)


METHODS = {"freecustom": FreeCustom(layers="0"), "reference_only": ReferenceOnly(layers="0", adain=False)}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_references_are_seen_through_their_masks_alone(name: str, method: Any) -> None:
    """In the first layer, where tokens have not seen each other yet."""
    whole, *_ = halves()
    given, noise = inputs(name, (0, 2)), torch.randn(4, 10, 14, generator=torch.Generator().manual_seed(9))
    kept = torch.from_numpy(whole).repeat_interleave(2, 0).repeat_interleave(2, 1)
    plain = made(name, given, method, whole)
    for inside in (True, False):
        latents = given["hidden_states"].clone()
        latents[0] = torch.where(kept == inside, noise, latents[0])
        out = made(name, {**given, "hidden_states": latents}, method, whole)
        assert torch.allclose(out, plain, rtol=0, atol=1e-5) != inside
