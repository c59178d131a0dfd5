"""Chroma's mask, which every block multiplies with itself: taken over by the sites, without a matrix of all pairs."""

from functools import cache
from typing import Any

import pytest
import torch
from families.family_checks import check_small_window_equals_masked_dense, masked_output, output, sites_of
from torch import Tensor, nn

import gensparse
from gensparse.layout import Layout
from gensparse.methods import Clear, Method, SlidingWindow
from gensparse.methods.base import START, At
from gensparse.patterns import Pattern
from gensparse.processors.operators import OperatorCall
from gensparse.processors.pairs import ProductMask
from gensparse.testing.tiny import tiny_denoiser, tiny_inputs

SMALL, WHOLE = SlidingWindow(radius=1), SlidingWindow(radius=100)
GRID, TEXT = (7, 5), 5
LAYOUTS = {"joint": Layout.image(*GRID, text=TEXT)}


@cache
def denoiser() -> nn.Module:
    """Every test leaves the model as it is."""
    return tiny_denoiser("chroma")


def inputs(mask: Tensor | None) -> dict[str, Any]:
    return {**tiny_inputs("chroma", (1, *GRID), text=TEXT), "attention_mask": mask}


def token_mask(dtype: torch.dtype = torch.float32, *, picture: bool = False) -> Tensor:
    """Captions of 5 and 2 tokens in one batch; `picture` leaves out some picture tokens too."""
    mask = torch.ones(2, TEXT + 35)
    mask[1, 2:TEXT] = 0
    if picture:
        mask[0, 20:24] = mask[1, 30] = 0
    return mask.to(dtype)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_the_mask_changes_what_the_model_paints(dtype: torch.dtype) -> None:
    # otherwise nothing below would test anything
    with_mask, without = output(denoiser(), inputs(token_mask(dtype))), output(denoiser(), inputs(None))
    assert (with_mask - without).abs().max() > 1e-3


def test_numbers_are_added_to_the_logits_not_masked() -> None:
    assert (output(denoiser(), inputs(token_mask())) - output(denoiser(), inputs(token_mask(torch.bool)))).any()
    ones = torch.ones(2, TEXT + 35)
    close(output(denoiser(), inputs(ones)), output(denoiser(), inputs(None)))


@pytest.mark.parametrize("method", [SMALL, Clear(radius=3)], ids=lambda method: method.name)
@pytest.mark.parametrize(
    "mask",
    [token_mask(), token_mask(torch.bool), token_mask(torch.bool, picture=True), torch.ones(2, TEXT + 35), None],
    ids=["numbers", "bools", "bools of the picture", "ones", "none"],
)
def test_small_windows_keep_to_the_mask(method: Method, mask: Tensor | None) -> None:
    check_small_window_equals_masked_dense(denoiser(), inputs(mask), LAYOUTS, method)


def test_no_matrix_of_all_pairs_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: ProductMask) -> Tensor:
        raise AssertionError("made a matrix of all pairs")

    monkeypatch.setattr(ProductMask, "whole", refuse)
    seen: list[Any] = []
    blocks = [*denoiser().transformer_blocks, *denoiser().single_transformer_blocks]
    hooks = [
        block.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True)
        for block in blocks
    ]
    with gensparse.applied(denoiser(), SMALL, strict=True):
        output(denoiser(), inputs(token_mask()))
    assert seen == [None] * len(blocks)
    output(denoiser(), inputs(token_mask()))
    assert all(mask is not None for mask in seen[len(blocks) :])
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("mask", [token_mask(), token_mask(torch.bool, picture=True)], ids=["numbers", "bools"])
@pytest.mark.parametrize("dense", [0, 1])
def test_layers_that_stay_dense_keep_the_mask(mask: Tensor, dense: int) -> None:
    names = [name for number, name in enumerate(sites_of(denoiser())) if number != dense]
    expected = masked_output(denoiser(), inputs(mask), LAYOUTS, SMALL, names=names)
    with gensparse.applied(denoiser(), SMALL, strict=True, dense_layers=[dense]) as handle:
        close(output(denoiser(), inputs(mask)), expected)
        assert handle.report()["calls"] == {"sparse": 1, "dense": {"dense layer": 1}}


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (token_mask(picture=True), "the attention mask differs from query to query"),
        (token_mask() * 0.5, "the attention mask differs from query to query"),
        (torch.where(token_mask() == 0, -1e4, 0.0), "the attention mask differs from query to query"),
    ],
    ids=["numbers of the picture", "halves", "large negative numbers"],
)
def test_other_masks_run_dense_with_the_reason(mask: Tensor, reason: str) -> None:
    dense = output(denoiser(), inputs(mask))
    with gensparse.applied(denoiser(), SMALL) as handle:
        assert torch.equal(output(denoiser(), inputs(mask)), dense)
        assert handle.report()["dense"] == {reason: 2}


def test_calls_without_a_layout_keep_the_mask() -> None:
    arguments = inputs(token_mask())
    arguments["img_ids"] = arguments["img_ids"].flip(0)
    dense = output(denoiser(), arguments)
    with gensparse.applied(denoiser(), SMALL) as handle:
        assert torch.equal(output(denoiser(), arguments), dense)
        assert handle.report()["calls"]["sparse"] == 0


def test_dense_steps_keep_the_mask() -> None:
    dense = output(denoiser(), inputs(token_mask()))
    with gensparse.applied(denoiser(), SMALL, dense_steps=1):
        assert torch.equal(output(denoiser(), inputs(token_mask())), dense)


def test_processors_that_are_not_set_keep_the_mask() -> None:
    model, mask = tiny_denoiser("chroma"), token_mask()
    dense = output(model, inputs(mask))
    processors = gensparse.make_processors(model, SMALL)
    assert torch.equal(output(model, inputs(mask)), dense)
    model.set_attn_processor(processors)
    close(output(model, inputs(mask)), masked_output(denoiser(), inputs(mask), LAYOUTS, SMALL))


class Twice:
    """An operator that calls the model's own attention."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: OperatorCall) -> Tensor:
        return 2 * call.dense()

    def key(self) -> str:
        return "twice"


class Doubling(SlidingWindow):
    def pattern(self, layout: Layout, at: At = START) -> Pattern:
        return Twice()  # type: ignore[return-value]


def test_operators_cannot_keep_to_the_mask_and_say_so() -> None:
    mask = token_mask()
    dense = output(denoiser(), inputs(mask))
    with gensparse.applied(denoiser(), Doubling()) as handle:
        assert torch.equal(output(denoiser(), inputs(mask)), dense)
        assert handle.report()["dense"] == {"the attention mask differs from query to query": 2}
        assert not torch.equal(output(denoiser(), inputs(None)), dense)


def test_pooled_keys_and_the_mask_go_together() -> None:
    outs = []
    for mask in (token_mask(), torch.ones(2, TEXT + 35)):
        with gensparse.applied(denoiser(), Clear(radius=2, down_factor=2), strict=True) as handle:
            outs.append(output(denoiser(), inputs(mask)))
            assert handle.report()["calls"] == {"sparse": 2, "dense": {}}
    close(outs[0][0], outs[1][0])  # the first sample has nothing to hide
    assert (outs[0][1] - outs[1][1]).abs().max() > 1e-4


def test_the_callers_arguments_are_left_alone() -> None:
    arguments = inputs(token_mask())
    before = dict(arguments)
    with gensparse.applied(denoiser(), SMALL, strict=True):
        output(denoiser(), arguments)
    assert arguments.keys() == before.keys()
    assert all(arguments[name] is value for name, value in before.items())
