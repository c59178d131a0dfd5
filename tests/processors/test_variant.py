"""Sparse variants keep everything about a processor except where its attention call goes."""

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_processor as legacy
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0

from gensparse.errors import UnsupportedProcessorError
from gensparse.processors.native import NATIVE, native_call
from gensparse.processors.site import Action, ActionSlot, Site
from gensparse.processors.variant import SITE, is_sparse, make_dense, make_sparse, sparse_variant

CLASSES = [
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
    legacy.AttnProcessor2_0,
    legacy.JointAttnProcessor2_0,
    legacy.FusedAttnProcessor2_0,
    HunyuanVideo15AttnProcessor2_0,
]
UNSUPPORTED = [
    legacy.AttnProcessor,
    legacy.SlicedAttnProcessor,
    legacy.XFormersAttnProcessor,
    legacy.AttnAddedKVProcessor,
]


def made(cls: type) -> Any:
    return cls(hidden_size=8, cross_attention_dim=8) if issubclass(cls, FluxIPAdapterAttnProcessor) else cls()


@pytest.mark.parametrize("cls", CLASSES)
def test_variant_keeps_signature_base_constructor_and_is_made_once(cls: type) -> None:
    variant = sparse_variant(cls)
    assert inspect.signature(variant.__call__) == inspect.signature(cls.__call__)
    assert issubclass(variant, cls)
    assert variant is sparse_variant(cls) is sparse_variant(variant)
    assert inspect.signature(made(variant).__call__) == inspect.signature(made(cls).__call__)


@pytest.mark.parametrize("cls", CLASSES)
def test_swap_keeps_identity_and_is_undone_exactly(cls: type) -> None:
    processor = made(cls)
    state = dict(processor.__dict__)
    make_sparse(processor)
    make_sparse(processor)
    assert is_sparse(processor)
    assert isinstance(processor, cls)
    make_dense(processor)
    make_dense(processor)
    assert type(processor) is cls
    assert processor.__dict__ == state


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies_of_a_sparse_processor_are_sparse_and_keep_its_weights(duplicate: Any) -> None:
    processor = made(FluxIPAdapterAttnProcessor)
    expected = {name: weight.clone() for name, weight in processor.state_dict().items()}
    make_sparse(processor)
    twin = duplicate(processor)
    assert type(twin) is type(processor)
    assert twin.scale == processor.scale
    assert list(twin.state_dict()) == list(expected)
    assert all(torch.equal(twin.state_dict()[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("cls", UNSUPPORTED)
def test_processors_without_a_call_to_redirect_are_refused_by_name(cls: type) -> None:
    with pytest.raises(UnsupportedProcessorError, match=cls.__name__):
        sparse_variant(cls)


def test_a_sparse_processor_in_an_unprepared_module_raises_instead_of_running_dense() -> None:
    attn = legacy.Attention(query_dim=8, heads=2, dim_head=4)
    make_sparse(attn.processor)
    with pytest.raises(UnsupportedProcessorError, match="not prepared"):
        attn(torch.randn(1, 4, 8))


def attention_with_site(call: Action) -> legacy.Attention:
    attn = legacy.Attention(query_dim=8, heads=2, dim_head=4).eval()
    slot = ActionSlot()
    slot.put(call)
    setattr(attn, SITE, Site("attn", slot))
    return attn


@torch.no_grad()
def test_dense_calls_of_a_variant_are_bit_equal_and_say_why() -> None:
    attn, hidden = attention_with_site(Action(reason="dense step")), torch.randn(2, 9, 8)
    expected = attn(hidden)
    make_sparse(attn.processor)
    assert torch.equal(attn(hidden), expected)
    assert getattr(attn, SITE).outcome == "dense step"


@torch.no_grad()
def test_cross_attention_passes_through_and_is_not_counted() -> None:
    attn, hidden, text = attention_with_site(Action(reason="never")), torch.randn(2, 9, 8), torch.randn(2, 5, 8)
    expected = attn(hidden, encoder_hidden_states=text)
    make_sparse(attn.processor)
    assert torch.equal(attn(hidden, encoder_hidden_states=text), expected)
    assert getattr(attn, SITE).outcome is None


@torch.no_grad()
def test_nothing_outside_the_processor_is_patched() -> None:
    sdpa, attn = F.scaled_dot_product_attention, attention_with_site(Action(reason="x"))
    make_sparse(attn.processor)
    attn(torch.randn(1, 4, 8))
    assert F.scaled_dot_product_attention is sdpa is legacy.F.scaled_dot_product_attention


@pytest.mark.parametrize("name", NATIVE)
def test_native_code_has_the_parameters_of_the_processor_it_stands_for(name: str) -> None:
    (cls,) = (cls for cls in CLASSES if cls.__name__ == name)
    native = native_call(cls)
    assert native is not None
    theirs = inspect.signature(cls.__call__).parameters.values()
    own = inspect.signature(native).parameters.values()
    assert [(one.name, one.default) for one in own] == [(one.name, one.default) for one in theirs]


def test_processors_without_native_code_keep_their_own() -> None:
    assert native_call(FluxAttnProcessor) is None
