"""FLUX.2 with a cache of references: the call that fills it, and those that find references among their keys alone."""

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import Flux2KleinKVPipeline, Flux2Transformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor
from families.family_checks import layouts_of, output, sites_of
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode

import gensparse
from gensparse.errors import LayoutMismatchError
from gensparse.families import WithKeys
from gensparse.layout import Layout
from gensparse.methods import Clear, Method, SlidingWindow
from gensparse.methods.base import START, At
from gensparse.patterns import Pattern
from gensparse.processors.operators import OperatorCall
from gensparse.testing.tiny import tiny_denoiser, tiny_inputs, tiny_pipeline

SMALL, WHOLE = SlidingWindow(radius=1), SlidingWindow(radius=100)
ROWS, COLUMNS, TEXT = 7, 5, 5
OWN = Layout.image(ROWS, COLUMNS, text=TEXT)

REFERENCES = [
    ((3, 4),),
    ((7, 5), (2, 3)),
    ((5, 8),),  # as many tokens as text and target together
]
by_references = pytest.mark.parametrize("references", REFERENCES, ids=str)


def with_cache(model: Flux2Transformer2DModel) -> Flux2Transformer2DModel:
    for block in model.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    return model


@cache
def denoiser() -> Flux2Transformer2DModel:
    """Every test leaves the model as it is."""
    return with_cache(tiny_denoiser("flux2"))


def extracting(references: Any) -> dict[str, Any]:
    """The call that fills the cache: references before the target."""
    inputs = tiny_inputs("flux2", (1, ROWS, COLUMNS), text=TEXT, references=references)
    own = ROWS * COLUMNS
    for name in ("hidden_states", "img_ids"):
        inputs[name] = torch.cat([inputs[name][:, own:], inputs[name][:, :own]], 1)
    return {**inputs, "kv_cache_mode": "extract", "num_ref_tokens": inputs["hidden_states"].shape[1] - own}


def cached(kv_cache: Any) -> dict[str, Any]:
    inputs = tiny_inputs("flux2", (1, ROWS, COLUMNS), text=TEXT, seed=1)
    return {**inputs, "kv_cache": kv_cache, "kv_cache_mode": "cached"}


@torch.no_grad()
def both(model: Flux2Transformer2DModel, references: Any) -> list[Tensor]:
    """Outputs of the two kinds of call, and all that was cached between them."""
    first, kv_cache = model(**extracting(references), return_dict=False)
    layers = [*kv_cache.double_block_caches, *kv_cache.single_block_caches]
    return [first, output(model, cached(kv_cache)), *(part for layer in layers for part in layer.get())]


def close(ones: list[Tensor], others: list[Tensor]) -> None:
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


class Windowed(TorchFunctionMode):
    """Text and target see their window of each other and all references; references see themselves."""

    def __init__(self, method: Method, references: int) -> None:
        super().__init__()
        own = torch.from_numpy(method.pattern(OWN).dense_mask(OWN))[0]
        seen = torch.ones(len(own), references, dtype=torch.bool)
        self.mask = torch.cat([own[:, :TEXT], seen, own[:, TEXT:]], 1)
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            query, key = (args[n] if len(args) > n else kwargs[name] for n, name in enumerate(("query", "key")))
            if query.shape[-2] != key.shape[-2]:
                assert kwargs.get("attn_mask") is None
                kwargs["attn_mask"] = self.mask
                self.calls += 1
        return func(*args, **kwargs)


@by_references
def test_layouts_hold_text_and_target_and_say_where_the_references_are(references: Any) -> None:
    tokens = sum(rows * columns for rows, columns in references)
    expected = {"joint": WithKeys(OWN, start=TEXT, keys=tokens)}
    assert layouts_of(denoiser(), extracting(references)) == expected
    with torch.no_grad():
        _, kv_cache = denoiser()(**extracting(references), return_dict=False)
    assert layouts_of(denoiser(), cached(kv_cache)) == expected


@by_references
@pytest.mark.parametrize("method", [WHOLE, Clear(radius=100)], ids=lambda method: method.name)
def test_window_over_the_grid_equals_dense(references: Any, method: Method) -> None:
    dense = both(denoiser(), references)
    with gensparse.applied(denoiser(), method, strict=True) as handle:
        close(both(denoiser(), references), dense)
        assert handle.report()["calls"] == {"sparse": 4, "dense": {}}


@by_references
@pytest.mark.parametrize("method", [SMALL, Clear(radius=2)], ids=lambda method: method.name)
def test_small_window_equals_the_model_with_a_dense_mask(references: Any, method: Method) -> None:
    dense = both(denoiser(), references)
    with Windowed(method, sum(rows * columns for rows, columns in references)) as mode:
        masked = both(denoiser(), references)
    assert mode.calls == 4
    assert all((one - other).abs().max() > 1e-3 for one, other in zip(masked[:2], dense[:2], strict=True))
    with gensparse.applied(denoiser(), method, strict=True) as handle:
        close(both(denoiser(), references), masked)
        report = handle.report()
    assert (report["sparse"], report["dense"]) == (len(sites_of(denoiser())), {})
    for one, other in zip(both(denoiser(), references), dense, strict=True):
        assert torch.equal(one, other)


def test_dense_steps_and_layers_are_the_models_own() -> None:
    dense = both(denoiser(), REFERENCES[0])
    for settings in ({"dense_steps": 1}, {"dense_layers": [0, 1]}):
        with gensparse.applied(denoiser(), SMALL, strict=True, **settings) as handle:
            for one, other in zip(both(denoiser(), REFERENCES[0]), dense, strict=True):
                assert torch.equal(one, other)
            (reason,) = handle.report()["calls"]["dense"]
            assert handle.report()["calls"] == {"sparse": 0, "dense": {reason: 4}}


def test_a_model_that_gets_its_cache_after_apply_stays_sparse() -> None:
    expected_model = tiny_denoiser("flux2")
    with gensparse.applied(with_cache(expected_model), SMALL, strict=True):
        expected = both(expected_model, REFERENCES[1])
    model = tiny_denoiser("flux2")
    handle = gensparse.apply(model, SMALL, strict=True)
    close(both(with_cache(model), REFERENCES[1]), expected)
    assert handle.report()["calls"] == {"sparse": 4, "dense": {}}


def test_the_pipeline_with_a_cache_runs_sparse_in_all_its_steps() -> None:
    parts = tiny_pipeline("flux2").components
    pipe = Flux2KleinKVPipeline(**{**parts, "text_encoder": None, "tokenizer": None})
    pipe.set_progress_bar_config(disable=True)
    text = torch.randn(1, 7, 96, generator=torch.Generator().manual_seed(1))

    def edit() -> Tensor:
        call = {"prompt_embeds": text, "height": 32, "width": 48, "num_inference_steps": 3, "output_type": "latent"}
        return pipe(image=Image.new("RGB", (64, 96), "red"), generator=torch.Generator().manual_seed(0), **call).images

    dense = edit()
    with gensparse.applied(pipe, WHOLE, strict=True) as handle:
        torch.testing.assert_close(edit(), dense, atol=1e-5, rtol=0)
        assert handle.report()["calls"] == {"sparse": 3 * 2, "dense": {}}
    with gensparse.applied(pipe, SMALL, strict=True, dense_steps=1) as handle:
        assert (edit() - dense).abs().max() > 1e-3
        assert handle.report()["calls"] == {"sparse": 2 * 2, "dense": {"dense step": 2}}


def test_blocks_compile_in_one_graph() -> None:
    model = with_cache(tiny_denoiser("flux2"))
    gensparse.apply(model, SMALL, strict=True)
    eager = both(model, REFERENCES[0])
    gensparse.compile_blocks(model, fullgraph=True, backend="eager")
    try:
        close(both(model, REFERENCES[0]), eager)
    finally:
        torch.compiler.reset()


def test_processors_without_a_cache_run_dense_with_the_reason() -> None:
    model, inputs = tiny_denoiser("flux2"), extracting(((5, 8),))
    dense = model(**inputs, return_dict=False)[0]
    handle = gensparse.apply(model, SMALL)
    assert torch.equal(model(**inputs, return_dict=False)[0], dense)
    assert handle.report()["dense"] == {"got 80 tokens, but the layout of the model's call has 40": 2}
    gensparse.apply(model, SMALL, strict=True)
    with pytest.raises(LayoutMismatchError, match="got 80 tokens"):
        model(**inputs, return_dict=False)


def test_keys_that_lack_the_references_are_refused() -> None:
    model, hidden = with_cache(tiny_denoiser("flux2")), torch.randn(1, TEXT + ROWS * COLUMNS, 32)
    gensparse.apply(model, SMALL, strict=True)
    with torch.no_grad():
        model(**extracting(((3, 4),)), return_dict=False)
        with pytest.raises(LayoutMismatchError, match="no keys beside those of the 40 queries, but there are 12"):
            model.single_transformer_blocks[0].attn(hidden)


def test_a_number_of_references_that_contradicts_the_ids_is_refused() -> None:
    inputs = extracting(((3, 4), (2, 3)))
    for wrong in (12, 19):
        with pytest.raises(LayoutMismatchError, match=f"num_ref_tokens={wrong}, but .* have 18 tokens"):
            layouts_of(denoiser(), {**inputs, "num_ref_tokens": wrong})


def test_a_cache_of_nothing_is_a_plain_call() -> None:
    plain = tiny_inputs("flux2", (1, ROWS, COLUMNS), text=TEXT)
    for more in ({"kv_cache_mode": "extract"}, {"kv_cache_mode": "cached"}, {}):
        assert layouts_of(denoiser(), {**plain, **more}) == {"joint": OWN}


class Own:
    """An operator that calls the model's own attention."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: OperatorCall) -> Tensor:
        return call.dense()

    def key(self) -> str:
        return "own"


class Operating(SlidingWindow):
    def pattern(self, layout: Layout, at: At = START) -> Pattern:
        return Own()  # type: ignore[return-value]


def test_operators_have_no_rule_for_cached_references_and_say_so() -> None:
    dense = both(denoiser(), REFERENCES[0])
    with gensparse.applied(denoiser(), Operating()) as handle:
        for one, other in zip(both(denoiser(), REFERENCES[0]), dense, strict=True):
            assert torch.equal(one, other)
        assert handle.report()["dense"] == {"sliding_window has no rule for cached references": 2}
