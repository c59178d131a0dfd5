"""What diffusers can do to the processors of a picture model after (or before) it was made sparse."""

from collections.abc import Mapping
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import HunyuanDiT2DModel, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from diffusers.models.attention_processor import (
    AttnProcessor,
    IPAdapterAttnProcessor2_0,
    PAGCFGIdentitySelfAttnProcessor2_0,
    PAGCFGJointAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
    XFormersAttnProcessor,
    XFormersJointAttnProcessor,
)
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from families.family_checks import _Calls, _inside, check_report, output, sites_of
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention

import gensparse
from gensparse.errors import LayoutMismatchError, UnsupportedProcessorError
from gensparse.layout import Layout
from gensparse.methods import SlidingWindow
from gensparse.testing.tiny import tiny_denoiser, tiny_inputs, tiny_pipeline, with_noise
from gensparse.testing.tiny.parts import normal, seeded

SMALL, WHOLE = SlidingWindow(radius=1), SlidingWindow(radius=100)
GRID = (7, 5)


@cache
def pristine(name: str) -> nn.Module:
    if name != "hunyuan_dit":
        return tiny_denoiser(name)
    with seeded(0):
        model = HunyuanDiT2DModel(
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            in_channels=4,
            hidden_size=24,
            cross_attention_dim=32,
            cross_attention_dim_t5=32,
            pooled_projection_dim=16,
            text_len=5,
            text_len_t5=5,
            use_style_cond_and_image_meta_size=False,
        )
        return with_noise(model).eval()


def fresh(name: str) -> nn.Module:
    return deepcopy(pristine(name))


def inputs_of(name: str) -> dict[str, Any]:
    if name != "hunyuan_dit":
        return tiny_inputs(name, (1, *GRID))
    draw = normal(0)
    return {
        "hidden_states": draw(2, 4, 14, 10),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_hidden_states": draw(2, 5, 32),
        "text_embedding_mask": torch.ones(2, 5),
        "encoder_hidden_states_t5": draw(2, 5, 32),
        "text_embedding_mask_t5": torch.ones(2, 5),
        "image_rotary_emb": get_2d_rotary_pos_embed(8, ((0, 0), GRID), GRID, output_type="pt"),
    }


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def kinds(model: nn.Module) -> list[str]:
    return [type(processor).__name__ for processor in processors(model)]


def processors(model: nn.Module) -> list[Any]:
    return [module.processor for module in model.modules() if getattr(module, "processor", None) is not None]


FUSABLE = ["sd15", "sdxl", "pixart", "hunyuan_dit", "sd3", "auraflow"]


@pytest.mark.parametrize("name", FUSABLE)
def test_fused_projections_stay_sparse_and_unfusing_restores(name: str) -> None:
    model, inputs = fresh(name), inputs_of(name)
    sites, before, dense = len(sites_of(model)), kinds(model), output(model, inputs)
    handle = gensparse.apply(model, SMALL, strict=True)
    own, sparse = processors(model), output(model, inputs)
    assert (sparse - dense).abs().max() > 1e-3
    model.fuse_qkv_projections()
    close(output(model, inputs), sparse)
    assert len({id(processor) for processor in processors(model)}) == 1
    assert {kind.startswith("SparseFused") for kind in kinds(model)} == {True}
    model.unfuse_qkv_projections()
    assert all(one is other for one, other in zip(processors(model), own, strict=True))
    assert torch.equal(output(model, inputs), sparse)
    check_report(handle.report(), sites, calls=3)
    handle.remove()
    assert kinds(model) == before
    assert torch.equal(output(model, inputs), dense)


@pytest.mark.parametrize("name", FUSABLE)
def test_fused_models_can_be_made_sparse_and_unfused_at_any_time(name: str) -> None:
    model, inputs = fresh(name), inputs_of(name)
    dense = output(model, inputs)
    with gensparse.applied(model, SMALL, strict=True):
        sparse = output(model, inputs)
    model.fuse_qkv_projections()
    fused = output(model, inputs)
    handle = gensparse.apply(model, SMALL, strict=True)
    close(output(model, inputs), sparse)
    handle.remove()
    assert torch.equal(output(model, inputs), fused)
    handle = gensparse.apply(model, SMALL, strict=True)
    model.unfuse_qkv_projections()
    assert torch.equal(output(model, inputs), sparse)
    model.fuse_qkv_projections()
    handle.remove()
    assert torch.equal(output(model, inputs), fused)
    model.unfuse_qkv_projections()
    assert torch.equal(output(model, inputs), dense)
    assert not any(kind.startswith("Sparse") for kind in kinds(model))


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_attention_slicing_is_refused_with_the_reason(name: str) -> None:
    model, inputs = fresh(name), inputs_of(name)
    dense = output(model, inputs)
    handle = gensparse.apply(model, SMALL)
    sparse = output(model, inputs)
    model.set_attention_slice("auto")
    with pytest.raises(UnsupportedProcessorError, match=r"SlicedAttnProcessor .* disable_attention_slicing"):
        output(model, inputs)
    model.set_attention_slice(None)
    assert torch.equal(output(model, inputs), sparse)
    handle.remove()
    assert torch.equal(output(model, inputs), dense)
    model.set_attention_slice("max")
    sliced = kinds(model)
    with pytest.raises(UnsupportedProcessorError, match="SlicedAttnProcessor"):
        gensparse.apply(model, SMALL)
    assert kinds(model) == sliced
    assert not model._forward_pre_hooks


def test_attention_slicing_of_a_pipeline_is_refused_where_it_would_run_dense() -> None:
    pipe = tiny_pipeline("sd15")
    pipe.set_progress_bar_config(disable=True)
    gensparse.apply(pipe, SMALL)
    pipe.enable_attention_slicing()
    call = {"prompt": "a cat", "height": 16, "width": 24, "num_inference_steps": 1, "output_type": "latent"}
    with pytest.raises(UnsupportedProcessorError, match="SlicedAttnProcessor"):
        pipe(**call)
    pipe.disable_attention_slicing()
    assert pipe(**call).images.isfinite().all()


@pytest.mark.parametrize(
    ("name", "processor"),
    [
        ("sd15", XFormersAttnProcessor),
        ("pixart", XFormersAttnProcessor),
        ("sd3", XFormersJointAttnProcessor),
        ("sdxl", AttnProcessor),
    ],
)
def test_processors_of_another_kind_are_refused_with_the_reason(name: str, processor: type) -> None:
    model, inputs = fresh(name), inputs_of(name)
    gensparse.apply(model, SMALL)
    for site in sites_of(model):
        model.get_submodule(site).set_processor(processor())
    with pytest.raises(UnsupportedProcessorError, match=processor.__name__):
        output(model, inputs)
    gensparse.remove(model)
    with pytest.raises(UnsupportedProcessorError, match=processor.__name__):
        gensparse.apply(model, SMALL)


def image_prompt_weights(model: nn.Module) -> dict[str, Any]:
    """Random weights of an image-prompt adapter, in the form in which they are published."""
    draw, cross, layers, number = normal(3), model.config.cross_attention_dim, {}, 1
    for name, module in model.named_modules():
        if name.endswith("attn2"):
            width = module.to_q.out_features
            for part in ("to_k_ip", "to_v_ip"):
                layers[f"{number}.{part}.weight"] = draw(width, cross)
            number += 2
    projection = {"proj.weight": draw(4 * cross, 8), "proj.bias": draw(4 * cross)}
    projection |= {"norm.weight": draw(cross), "norm.bias": draw(cross)}
    return {"image_proj": projection, "ip_adapter": layers}


def with_image_prompt(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **inputs,
        "added_cond_kwargs": {**inputs.get("added_cond_kwargs", {}), "image_embeds": [normal(4)(2, 1, 8)]},
    }


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize("first", ["adapter", "apply"])
@pytest.mark.parametrize("method", [WHOLE, SMALL], ids=["whole", "small"])
def test_image_prompts_work_and_their_loading_and_unloading_stays_sparse(name: str, first: str, method: Any) -> None:
    pipe: StableDiffusionPipeline | StableDiffusionXLPipeline = tiny_pipeline(name)
    model, inputs = pipe.unet, inputs_of(name)
    weights, prompted = image_prompt_weights(model), with_image_prompt(inputs)
    sites, dense = len(sites_of(model)), output(model, inputs)
    with gensparse.applied(model, method, strict=True):
        sparse = output(model, inputs)
    if first == "adapter":
        model._load_ip_adapter_weights([weights], low_cpu_mem_usage=False)
    handle = gensparse.apply(model, method, strict=True)
    if first == "apply":
        model._load_ip_adapter_weights([weights], low_cpu_mem_usage=False)
    both = output(model, prompted)
    check_report(handle.report(), sites)
    assert (both - sparse).abs().max() > 1e-3
    assert sum(isinstance(processor, IPAdapterAttnProcessor2_0) for processor in processors(model)) == sites
    pipe.unload_ip_adapter()
    assert torch.equal(output(model, inputs), sparse)
    check_report(handle.report(), sites, calls=2)
    handle.remove()
    assert torch.equal(output(model, inputs), dense)
    model._load_ip_adapter_weights([weights], low_cpu_mem_usage=False)
    dense_prompted = output(model, prompted)
    if method is WHOLE:
        close(both, dense_prompted)
    else:
        assert (both - dense_prompted).abs().max() > 1e-3


class _PromptedWindow(_Calls):
    """The window as a dense mask on both calls of a joint block: with text, and of the picture with its prompt."""

    def attend(self, module: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kw: Any) -> Any:
        tokens, extra = GRID[0] * GRID[1], key.shape[-2] - query.shape[-2]
        layout = Layout.image(*GRID, text=query.shape[-2] - tokens, text_first=False)
        mask = torch.from_numpy(SMALL.pattern(layout).dense_mask(layout)[0])
        return scaled_dot_product_attention(query, key, value, F.pad(mask, (0, extra), value=True), **kw)


def windowed(model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    with _inside(model, list(sites_of(model)), _PromptedWindow()):
        return output(model, inputs)


@pytest.mark.parametrize("first", ["adapter", "apply"])
def test_image_prompts_of_stable_diffusion_3_work(first: str) -> None:
    model, draw = fresh("sd3"), normal(5)
    inputs = inputs_of("sd3")
    prompt = {"ip_hidden_states": draw(2, 4, 16), "temb": draw(2, 12)}
    inputs = {**inputs, "joint_attention_kwargs": prompt}

    def load() -> None:
        with seeded(1):
            for block in model.transformer_blocks:
                block.attn.set_processor(SD3IPAdapterJointAttnProcessor2_0(32, 16, 8, timesteps_emb_dim=12))

    load()
    dense = output(model, inputs)
    model = fresh("sd3")
    assert (output(model, inputs_of("sd3")) - dense).abs().max() > 1e-3
    if first == "adapter":
        load()
    with gensparse.applied(model, SMALL, strict=True) as handle:
        if first == "apply":
            load()
        small = output(model, inputs)
        check_report(handle.report(), 2)
    close(small, windowed(model, inputs))
    assert (small - dense).abs().max() > 1e-3
    with gensparse.applied(model, WHOLE, strict=True) as handle:
        close(output(model, inputs), dense)
        check_report(handle.report(), 2)
    with gensparse.applied(model, SMALL, strict=True):
        assert (output(model, inputs) - dense).abs().max() > 1e-3
    assert torch.equal(output(model, inputs), dense)


@pytest.mark.parametrize("name", ["sd15", "sd35", "pixart", "auraflow", "hunyuanimage"])
def test_guidance_in_one_batch_equals_two_calls(name: str) -> None:
    model, inputs = fresh(name), inputs_of(name)
    gensparse.apply(model, SMALL, strict=True)
    both = output(model, inputs)
    for half in (0, 1):
        close(output(model, {key: part(value, half) for key, value in inputs.items()}), both[half : half + 1])


def part(value: Any, sample: int) -> Any:
    return value[sample : sample + 1] if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("name", ["sd15", "sd35", "auraflow"])
def test_a_copy_is_sparse_on_its_own(name: str) -> None:
    model, inputs = fresh(name), inputs_of(name)
    dense = output(model, inputs)
    gensparse.apply(model, SMALL, strict=True)
    twin, sparse = deepcopy(model), output(model, inputs)
    gensparse.remove(model)
    assert torch.equal(output(model, inputs), dense)
    assert torch.equal(output(twin, inputs), sparse)
    gensparse.remove(twin)
    assert torch.equal(output(twin, inputs), dense)


LAYERS = {
    # of diffusers' layer-skip hooks: what they leave out -> the calls of sites that remain sparse, of 2
    "scores": ({"skip_attention": False, "skip_attention_scores": True, "skip_ff": False}, 1),
    "attention": ({"skip_ff": False}, 1),
    "block": ({}, 1),
    "feed-forward": ({"skip_attention": False}, 2),
}


SKIPPING = [(name, what) for name in ("pixart", "hunyuanimage", "cogview4") for what in LAYERS]
SKIPPING.remove(("hunyuanimage", "attention"))  # fails in diffusers, whose hook returns text and picture exchanged


@pytest.mark.parametrize(("name", "what"), SKIPPING)
@pytest.mark.parametrize("first", ["hook", "apply"])
def test_guiders_that_skip_layers_or_attention_scores_are_obeyed(name: str, what: str, first: str) -> None:
    model, inputs = fresh(name), inputs_of(name)
    settings, calls = LAYERS[what]
    config = LayerSkipConfig([0], fqn="transformer_blocks", **settings)

    def hook(model: nn.Module) -> None:
        apply_layer_skip(model, deepcopy(config))

    plain = fresh(name)
    hook(plain)
    dense = output(plain, inputs)
    assert (dense - output(model, inputs)).abs().max() > 1e-3
    if first == "hook":
        hook(model)
    handle = gensparse.apply(model, WHOLE, strict=True)
    if first == "apply":
        hook(model)
    close(output(model, inputs), dense)
    assert handle.report()["calls"] == {"sparse": calls, "dense": {}}
    handle.remove()
    assert torch.equal(output(model, inputs), dense)


def three_parts(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The first sample three times, as perturbed guidance batches it: unconditional, conditional, perturbed."""
    return {
        name: value[:1].repeat(3, *(1,) * (value.ndim - 1)) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }


def test_perturbed_guidance_of_unets_is_sparse_where_it_attends() -> None:
    model, inputs = fresh("sd15"), three_parts(inputs_of("sd15"))
    plain = output(model, inputs)
    model.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(PAGCFGIdentitySelfAttnProcessor2_0())
    dense = output(model, inputs)
    assert (dense - plain)[2].abs().max() > 1e-3
    for method, same in ((WHOLE, True), (SMALL, False)):
        with gensparse.applied(model, method, strict=True) as handle:
            sparse = output(model, inputs)
            check_report(handle.report(), len(sites_of(model)))
        assert bool((sparse - dense).abs().max() <= 1e-5) is same
    assert torch.equal(output(model, inputs), dense)


def test_perturbed_guidance_of_joint_blocks_runs_dense_with_the_reason() -> None:
    # its perturbed part has a mask of all pairs of tokens
    model, inputs = fresh("sd3"), three_parts(inputs_of("sd3"))
    model.transformer_blocks[1].attn.set_processor(PAGCFGJointAttnProcessor2_0())
    dense = output(model, inputs)
    with gensparse.applied(model, WHOLE) as handle:
        close(output(model, inputs), dense)
        assert handle.report()["dense"] == {"the attention mask differs from query to query": 1}
    with gensparse.applied(model, SMALL, strict=True), pytest.raises(LayoutMismatchError, match="mask differs"):
        output(model, inputs)
