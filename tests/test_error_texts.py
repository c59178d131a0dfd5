"""What users read when a model, processor, method or layout does not fit: where, got, expected, what to do."""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

import gensparse
from gensparse.errors import ConfigError, LayoutMismatchError, UnsupportedProcessorError
from gensparse.families import FAMILIES
from gensparse.layout import Layout
from gensparse.methods import START, At, Clear, Method
from gensparse.patterns import Disc, Pattern, Text
from gensparse.testing.tiny import tiny_denoiser, tiny_inputs


def message(kind: type[Exception], call: Any, *words: str) -> str:
    """The one sentence of an error; it names all the words."""
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert [word for word in words if word not in text] == []
    assert "\n" not in text
    assert text.endswith(".")
    return text


@pytest.fixture(scope="module")
def sd() -> nn.Module:
    return tiny_denoiser("sd15")


@pytest.fixture(scope="module")
def flux() -> nn.Module:
    return tiny_denoiser("flux")


class Strange(nn.Module):
    """A model of nobody's."""


def test_an_unsupported_model_names_its_class_and_what_is_supported() -> None:
    message(ConfigError, lambda: gensparse.apply(Strange(), "clear"), "Strange", *FAMILIES)


def test_a_thing_without_a_denoiser_names_what_is_looked_for() -> None:
    message(ConfigError, lambda: gensparse.apply(object(), "clear"), "object", "transformer", "unet", "pass")


def test_an_unsupported_processor_names_model_module_class_and_remedy(sd: nn.Module) -> None:
    model = copy.deepcopy(sd)
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    model.get_submodule(name).set_processor(AttnProcessor())
    words = ("UNet2DConditionModel", name, "AttnProcessor", "AttnProcessor2_0", "set a processor")
    message(UnsupportedProcessorError, lambda: gensparse.apply(model, "clear"), *words)
    assert not any(hasattr(module, "_gensparse_site") for module in model.modules()), "half applied"


def test_a_processor_exchanged_for_an_unsupported_one_is_named_at_the_next_call(sd: nn.Module) -> None:
    model, inputs = copy.deepcopy(sd), tiny_inputs("sd15", (1, 8, 6))
    name = "mid_block.attentions.0.transformer_blocks.0.attn1"
    with gensparse.applied(model, "clear"):
        model.get_submodule(name).set_processor(AttnProcessor())
        message(UnsupportedProcessorError, lambda: model(**inputs), "UNet2DConditionModel", name, "AttnProcessor")


def test_a_method_for_other_models_says_which(flux: nn.Module) -> None:
    words = ("msw_msa", "FluxTransformer2DModel", "UNet", "Stable Diffusion")
    message(ConfigError, lambda: gensparse.apply(flux, "msw_msa"), *words)
    assert not hasattr(flux, "_gensparse")


def test_a_method_for_another_number_of_layers_says_how_many(flux: nn.Module) -> None:
    message(ConfigError, lambda: gensparse.apply(flux, "cosmos_sparse"), "28", "2", "Cosmos-Predict2")


def test_layers_that_do_not_exist_are_named_with_the_range(flux: nn.Module) -> None:
    call = lambda: gensparse.apply(flux, "clear", dense_layers=[7])  # noqa: E731
    message(ConfigError, call, "dense_layers", "7", "2 attention layers", "-2", "1")


def test_a_call_that_contradicts_itself_names_model_got_expected_and_remedy(flux: nn.Module) -> None:
    inputs = tiny_inputs("flux", (1, 4, 5))
    inputs["img_ids"] = inputs["img_ids"][:-5]
    with gensparse.applied(flux, Clear(2), strict=True):
        message(LayoutMismatchError, lambda: flux(**inputs), "FluxTransformer2DModel", "20", "15", "strict=False")


def test_a_site_with_other_tokens_names_itself_got_expected_and_remedy(sd: nn.Module) -> None:
    inputs, name = tiny_inputs("sd15", (1, 8, 6)), "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    module = sd.get_submodule(name)
    with gensparse.applied(sd, Clear(2), strict=True), torch.no_grad():
        sd(**inputs)
        other = torch.zeros(1, 35, module.to_q.in_features)
        message(LayoutMismatchError, lambda: module(other), name, "35", "48", "strict=False")


@dataclass(frozen=True)
class Plain(Method):
    """A method without a rule for references."""

    name: ClassVar[str] = "plain"

    def pattern(self, layout: Layout, at: At = START) -> Pattern:
        return (Disc(2) | Text()).clamped(layout.grid)


def test_references_without_a_rule_are_a_reason_that_strict_raises() -> None:
    model, inputs = tiny_denoiser("flux_kontext"), tiny_inputs("flux_kontext", (1, 4, 5))
    with gensparse.applied(model, Plain(), strict=True):
        words = ("FluxTransformer2DModel", "plain", "reference", "strict=False")
        message(LayoutMismatchError, lambda: model(**inputs), *words)


@pytest.mark.parametrize("family", ["pixart", "wan", "mochi", "sd3"])
def test_calls_without_what_tells_their_grid_say_what_is_missing(family: str) -> None:
    grid = (3, 4, 5) if family in ("wan", "mochi") else (1, 4, 5)
    model, inputs = tiny_denoiser(family), tiny_inputs(family, grid)
    inputs["hidden_states"] = None
    with gensparse.applied(model, Clear(2), strict=True):
        message(LayoutMismatchError, lambda: model(**inputs), "hidden_states", "pass", type(model).__name__)
