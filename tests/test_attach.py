"""apply, remove, applied and make_processors on tiny FLUX models and pipelines."""

import copy
import io
import json
import logging
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import cpu_offload
from diffusers import FluxControlNetModel, FluxPipeline, FluxTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import SlicedAttnProcessor
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from peft import LoraConfig

import gensparse
from gensparse.errors import ConfigError, LayoutMismatchError, UnsupportedProcessorError
from gensparse.methods import Clear, Method, Neighborhood, SlidingWindow
from gensparse.testing.tiny import tiny_flux_inputs, tiny_flux_pipeline, tiny_flux_transformer, with_noise

SMALL = Clear(radius=2)
WHOLE = [Clear(radius=100), Neighborhood(window=100), SlidingWindow(radius=100)]


@pytest.fixture
def model() -> FluxTransformer2DModel:
    return tiny_flux_transformer(double_blocks=2, single_blocks=2)


@pytest.fixture
def inputs() -> dict[str, Any]:
    return tiny_flux_inputs(8, 6, batch=2)


@torch.no_grad()
def run(model: Any, inputs: dict[str, Any], **more: Any) -> torch.Tensor:
    return model(**{**inputs, **more}).sample


def picture(pipe: FluxPipeline, **more: Any) -> torch.Tensor:
    call = {"height": 32, "width": 48, "num_inference_steps": 2, "max_sequence_length": 16, "output_type": "pt", **more}
    pipe.set_progress_bar_config(disable=True)
    return pipe("a cat", generator=torch.Generator().manual_seed(0), **call).images


def joint_mask(height: int, width: int, text: int, sees: Callable[[int, int], bool]) -> torch.Tensor:
    """Text sees and is seen by everything; picture tokens see each other where `sees(dy, dx)`. Made pair by pair."""
    mask = torch.ones(text + height * width, text + height * width, dtype=torch.bool)
    for q in range(height * width):
        for k in range(height * width):
            mask[text + q, text + k] = sees(q // width - k // width, q % width - k % width)
    return mask[None, None]


@pytest.mark.parametrize("method", WHOLE, ids=repr)
@pytest.mark.parametrize("grid", [(8, 6), (7, 5), (1, 11), (1, 1)])
def test_window_over_the_grid_equals_dense(model: Any, method: Method, grid: tuple[int, int]) -> None:
    inputs = tiny_flux_inputs(*grid, batch=2)
    dense = run(model, inputs)
    handle = gensparse.apply(model, method, strict=True)
    torch.testing.assert_close(run(model, inputs), dense, atol=1e-5, rtol=0)
    assert handle.report()["calls"] == {"sparse": 4, "dense": {}}


@pytest.mark.parametrize("grid", [(8, 6), (13, 7)])
@pytest.mark.parametrize(
    ("method", "sees"),
    [
        (Clear(radius=3), lambda dy, dx: dy * dy + dx * dx < 9),
        (SlidingWindow(radius=(1, 2)), lambda dy, dx: abs(dy) <= 1 and abs(dx) <= 2),
    ],
)
def test_small_window_equals_a_dense_masked_model(
    model: Any, method: Method, sees: Callable[[int, int], bool], grid: tuple[int, int]
) -> None:
    inputs = tiny_flux_inputs(*grid, batch=2)
    masked = run(model, inputs, joint_attention_kwargs={"attention_mask": joint_mask(*grid, 5, sees)})
    assert (masked - run(model, inputs)).abs().max() > 0.05
    gensparse.apply(model, method, strict=True)
    torch.testing.assert_close(run(model, inputs), masked, atol=1e-5, rtol=0)


def test_remove_restores_bits_and_leaves_no_trace(model: Any, inputs: dict[str, Any]) -> None:
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    processors, dense = dict(model.attn_processors), run(model, inputs)
    handle = gensparse.apply(model, SMALL)
    assert (run(model, inputs) - dense).abs().max() > 0.05
    handle.remove()
    assert torch.equal(run(model, inputs), dense)
    assert all(model.attn_processors[name] is processor for name, processor in processors.items())
    assert all(type(processor) is FluxAttnProcessor for processor in model.attn_processors.values())
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert not model._forward_pre_hooks


def test_remove_is_idempotent_and_harmless_where_nothing_is_applied(model: Any, inputs: dict[str, Any]) -> None:
    dense = run(model, inputs)
    gensparse.remove(model)
    handle = gensparse.apply(model, SMALL)
    handle.remove()
    handle.remove()
    gensparse.remove(model)
    assert not handle.active
    assert torch.equal(run(model, inputs), dense)


def test_applying_twice_equals_applying_once(model: Any, inputs: dict[str, Any]) -> None:
    gensparse.apply(model, SMALL)
    once = run(model, inputs)
    handle = gensparse.apply(model, SMALL)
    assert torch.equal(run(model, inputs), once)
    assert len(model._forward_pre_hooks) == 1
    assert handle.report()["calls"]["sparse"] == 4


def test_a_second_method_replaces_the_first_whose_handle_then_does_nothing(model: Any, inputs: dict[str, Any]) -> None:
    dense = run(model, inputs)
    second_alone = gensparse.apply(model, SlidingWindow(radius=2))
    expected = run(model, inputs)
    second_alone.remove()
    first = gensparse.apply(model, SMALL)
    second = gensparse.apply(model, SlidingWindow(radius=2))
    assert (first.active, second.active) == (False, True)
    first.remove()
    assert torch.equal(run(model, inputs), expected)
    second.remove()
    assert torch.equal(run(model, inputs), dense)


def fail_inside(model: Any, inputs: dict[str, Any]) -> None:
    with gensparse.applied(model, "sliding_window:radius=2"):
        raise RuntimeError(f"stop after {run(model, inputs).sum()}")


def test_applied_restores_what_was_there_even_after_an_error(model: Any, inputs: dict[str, Any]) -> None:
    dense = run(model, inputs)
    with gensparse.applied(model, SMALL) as outer:
        small = run(model, inputs)
        with gensparse.applied(model, "sliding_window:radius=2") as inner:
            assert not torch.equal(run(model, inputs), small)
            assert (outer.active, inner.active) == (False, True)
        assert (outer.active, inner.active) == (True, False)
        assert torch.equal(run(model, inputs), small)
        with pytest.raises(RuntimeError, match="stop"):
            fail_inside(model, inputs)
        assert torch.equal(run(model, inputs), small)
    assert torch.equal(run(model, inputs), dense)


def test_report_counts_every_site_and_call(model: Any, inputs: dict[str, Any]) -> None:
    handle = gensparse.apply(model, SMALL, dense_layers=[0, -1])
    sites = {"sparse": 2, "dense": {"dense layer": 2}}
    before = handle.report()
    assert {key: before[key] for key in sites} == sites
    assert before["calls"] == {"sparse": 0, "dense": {}}
    assert (before["backend"], before["density"]) == (None, None)
    for _ in range(3):
        run(model, inputs)
    after = handle.report()
    assert {key: after[key] for key in sites} == sites
    assert after["calls"] == {"sparse": 6, "dense": {"dense layer": 6}}
    assert isinstance(after["backend"], str)
    mask = joint_mask(8, 6, 5, lambda dy, dx: dy * dy + dx * dx < 4)
    assert after["density"] == pytest.approx(mask.float().mean().item(), rel=1e-6)
    handle.remove()
    assert handle.report()["calls"] == after["calls"]


def test_all_layers_dense_is_bit_equal_to_dense(model: Any, inputs: dict[str, Any]) -> None:
    dense = run(model, inputs)
    gensparse.apply(model, SMALL, dense_layers=range(4))
    assert torch.equal(run(model, inputs), dense)


def test_tokens_that_are_no_grid_run_dense_with_the_reason_and_strict_raises(
    model: Any, inputs: dict[str, Any]
) -> None:
    inputs = {**inputs, "img_ids": inputs["img_ids"].flip(0)}
    dense = run(model, inputs)
    handle = gensparse.apply(model, SMALL)
    assert torch.equal(run(model, inputs), dense)
    (reason,) = handle.report()["dense"]
    assert "not a rectangle" in reason
    assert handle.report()["calls"] == {"sparse": 0, "dense": {reason: 4}}
    gensparse.apply(model, SMALL, strict=True)
    with pytest.raises(LayoutMismatchError, match="not a rectangle"):
        run(model, inputs)
    gensparse.remove(model)
    assert torch.equal(run(model, inputs), dense)


@torch.no_grad()
def test_a_site_with_other_tokens_than_the_model_runs_dense_with_the_reason(model: Any, inputs: dict[str, Any]) -> None:
    attn, hidden = model.single_transformer_blocks[0].attn, torch.randn(1, 40, 32)
    dense = attn(hidden)
    for strict in (False, True):
        handle = gensparse.apply(model, SMALL, strict=strict)
        run(model, inputs)
        if strict:
            with pytest.raises(LayoutMismatchError, match=r"single_transformer_blocks.0.attn: got 40 tokens.* has 53"):
                attn(hidden)
        else:
            assert torch.equal(attn(hidden), dense)
            assert handle.report()["dense"] == {"got 40 tokens, but the layout of the model's call has 53": 1}


class WithoutEdits(Clear):
    """A method that has no rule for references."""

    edits: ClassVar[bool] = False


def test_reference_pictures_run_dense_with_the_reason_where_a_method_has_no_rule(model: Any) -> None:
    inputs = tiny_flux_inputs(8, 6)
    extra = tiny_flux_inputs(4, 5, seed=1)
    extra["img_ids"][:, 0] = 1
    for name, axis in (("hidden_states", 1), ("img_ids", 0)):
        inputs[name] = torch.cat([inputs[name], extra[name]], axis)
    dense = run(model, inputs)
    handle = gensparse.apply(model, WithoutEdits(radius=2))
    assert torch.equal(run(model, inputs), dense)
    assert handle.report()["dense"] == {"clear has no rule for reference pictures": 4}


def key_mask(kind: str) -> torch.Tensor:
    keep = torch.ones(2, 53, dtype=torch.bool)
    keep[0, 3:5] = keep[1, 1:5] = False
    keep[1, 20:24] = False
    if kind == "batch x keys":
        return keep
    return keep[:, None, None] if kind == "bool" else torch.where(keep, 0.3, -2.0)[:, None, None]


@pytest.mark.parametrize("kind", ["batch x keys", "bool", "float"])
def test_a_mask_over_keys_joins_the_window(model: Any, inputs: dict[str, Any], kind: str) -> None:
    mask, window = key_mask(kind), joint_mask(8, 6, 5, lambda dy, dx: dy * dy + dx * dx < 4)
    if mask.dtype is torch.bool:
        both = window & (mask if mask.ndim == 4 else mask[:, None, None])
    else:
        both = mask.expand(2, 1, 53, 53).masked_fill(~window, float("-inf"))
    expected = run(model, inputs, joint_attention_kwargs={"attention_mask": both})
    gensparse.apply(model, SMALL, strict=True)
    sparse = run(model, inputs, joint_attention_kwargs={"attention_mask": mask})
    torch.testing.assert_close(sparse, expected, atol=1e-5, rtol=0)
    assert (sparse - run(model, inputs)).abs().max() > 0.01


def test_a_mask_per_query_runs_dense_with_the_mask_and_the_reason(model: Any, inputs: dict[str, Any]) -> None:
    mask = {"attention_mask": torch.rand(2, 1, 53, 53) > 0.3}
    dense = run(model, inputs, joint_attention_kwargs=mask)
    handle = gensparse.apply(model, SMALL)
    assert torch.equal(run(model, inputs, joint_attention_kwargs=mask), dense)
    assert handle.report()["dense"] == {"the attention mask differs from query to query": 4}
    gensparse.apply(model, SMALL, strict=True)
    with pytest.raises(LayoutMismatchError, match="mask differs"):
        run(model, inputs, joint_attention_kwargs=mask)


def test_positional_and_keyword_calls_have_the_same_layout(model: Any, inputs: dict[str, Any]) -> None:
    gensparse.apply(model, SMALL, strict=True)
    with torch.no_grad():
        assert torch.equal(model(*inputs.values()).sample, run(model, inputs))


def test_alternating_sizes_with_equal_token_counts_use_their_own_layout(model: Any) -> None:
    sizes = [(6, 8), (8, 6), (4, 12), (6, 8)]
    expected = []
    for size in sizes:
        fresh = copy.deepcopy(model)
        gensparse.apply(fresh, SMALL)
        expected.append(run(fresh, tiny_flux_inputs(*size)))
    gensparse.apply(model, SMALL, strict=True)
    for size, out in zip(sizes, expected, strict=True):
        assert torch.equal(run(model, tiny_flux_inputs(*size)), out)


def test_two_threads_on_one_model_do_not_mix_their_layouts(model: Any) -> None:
    sizes = [(6, 8), (8, 6)]
    gensparse.apply(model, SMALL, strict=True)
    expected = [run(model, tiny_flux_inputs(*size)) for size in sizes]
    differing: list[int] = []

    def work(index: int) -> None:
        for _ in range(20):
            if not torch.equal(run(model, tiny_flux_inputs(*sizes[index])), expected[index]):
                differing.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not differing


def test_two_pipelines_with_two_methods_are_independent(inputs: dict[str, Any]) -> None:
    first, second, plain = (tiny_flux_transformer() for _ in range(3))
    gensparse.apply(first, SMALL)
    gensparse.apply(second, Clear(radius=100))
    dense = run(plain, inputs)
    assert not torch.equal(run(first, inputs), dense)
    torch.testing.assert_close(run(second, inputs), dense, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_are_sparse_on_their_own(model: Any, inputs: dict[str, Any], duplicate: Any) -> None:
    dense = run(model, inputs)
    gensparse.apply(model, SMALL)
    sparse = run(model, inputs)
    twin = duplicate(model)
    assert torch.equal(run(twin, inputs), sparse)
    gensparse.remove(model)
    assert torch.equal(run(model, inputs), dense)
    assert torch.equal(run(twin, inputs), sparse)
    gensparse.remove(twin)
    assert torch.equal(run(twin, inputs), dense)
    assert set(twin.__dict__) == set(model.__dict__)


def test_torch_save_of_a_sparse_model_reloads_sparse(model: Any, inputs: dict[str, Any]) -> None:
    gensparse.apply(model, SMALL)
    sparse, file = run(model, inputs), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(run(torch.load(file, weights_only=False), inputs), sparse)


def test_saved_checkpoint_has_no_trace_and_reloads_dense(model: Any, inputs: dict[str, Any], tmp_path: Path) -> None:
    dense = run(model, inputs)
    model.save_pretrained(tmp_path / "before")
    gensparse.apply(model, SMALL)
    run(model, inputs)
    model.save_pretrained(tmp_path / "after")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("before", "after")]
    assert configs[0] == configs[1]
    weights = [(tmp_path / name / "diffusion_pytorch_model.safetensors").read_bytes() for name in ("before", "after")]
    assert weights[0] == weights[1]
    assert torch.equal(run(FluxTransformer2DModel.from_pretrained(tmp_path / "after"), inputs), dense)


def test_dtype_change_after_apply_keeps_it_sparse(model: Any) -> None:
    handle = gensparse.apply(model, Clear(radius=100), strict=True)
    model.to(torch.bfloat16)
    inputs = {k: v.to(torch.bfloat16) for k, v in tiny_flux_inputs(8, 6).items()}
    sparse = run(model, inputs)
    handle.remove()
    assert handle.report()["calls"] == {"sparse": 4, "dense": {}}
    torch.testing.assert_close(sparse, run(model, inputs), atol=0.1, rtol=0.05)


@pytest.mark.parametrize("order", ["lora first", "lora second"])
def test_lora_stays_active_under_a_window(model: Any, inputs: dict[str, Any], order: str) -> None:
    plain = run(model, inputs)
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    if order == "lora first":
        model.add_adapter(config)
    handle = gensparse.apply(model, Clear(radius=100), strict=True)
    if order == "lora second":
        model.add_adapter(config)
    sparse = run(model, inputs)
    handle.remove()
    dense = run(model, inputs)
    assert (dense - plain).abs().max() > 0.05
    torch.testing.assert_close(sparse, dense, atol=1e-5, rtol=0)
    model.delete_adapters("default")
    assert torch.equal(run(model, inputs), plain)


def sequential(model: Any) -> None:
    cpu_offload(model, execution_device=torch.device("cpu"))


def groups(model: Any) -> None:
    cpu = torch.device("cpu")
    model.enable_group_offload(cpu, cpu, offload_type="block_level", num_blocks_per_group=1)


@pytest.mark.parametrize("offload", [sequential, groups])
@pytest.mark.parametrize("first", ["offload", "apply"])
def test_offload_survives_apply_and_remove(model: Any, inputs: dict[str, Any], offload: Any, first: str) -> None:
    twin = copy.deepcopy(model)
    gensparse.apply(twin, SMALL)
    sparse, dense = run(twin, inputs), run(model, inputs)
    if first == "offload":
        offload(model)
    handle = gensparse.apply(model, SMALL, strict=True)
    if first == "apply":
        offload(model)
    assert torch.equal(run(model, inputs), sparse)
    handle.remove()
    assert torch.equal(run(model, inputs), dense)


@pytest.mark.parametrize("first", ["casting", "apply"])
def test_layerwise_casting_survives(model: Any, inputs: dict[str, Any], first: str) -> None:
    twin = copy.deepcopy(model)
    if first == "apply":
        gensparse.apply(model, Clear(radius=100), strict=True)
    for one in (model, twin):
        one.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    dense = run(twin, inputs)
    handle = gensparse.apply(model, Clear(radius=100), strict=True) if first == "casting" else None
    torch.testing.assert_close(run(model, inputs), dense, atol=1e-5, rtol=0)
    assert handle is None or handle.report()["calls"]["sparse"] == 4
    gensparse.remove(model)
    assert torch.equal(run(model, inputs), dense)


def gradients(model: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    model.zero_grad()
    model(**inputs).sample.square().mean().backward()
    return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


def test_gradient_checkpointing_gives_the_gradients_of_a_plain_sparse_model(model: Any, inputs: dict[str, Any]) -> None:
    dense = gradients(model, inputs)
    handle = gensparse.apply(model, SMALL, strict=True)
    plain = gradients(model, inputs)
    model.enable_gradient_checkpointing()
    checkpointed = gradients(model, inputs)
    assert len(dense) == len(plain) == len(checkpointed)
    for one, other in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(one, other)
    assert any((one - other).abs().max() > 1e-4 for one, other in zip(dense, plain, strict=True))
    assert handle.report()["dense"] == {}


def test_checkpointed_blocks_recomputed_in_another_thread_keep_their_window(model: Any, inputs: dict[str, Any]) -> None:
    gensparse.apply(model, SMALL, strict=True)
    plain = gradients(model, inputs)
    model.enable_gradient_checkpointing()
    model.zero_grad()
    loss = model(**inputs).sample.square().mean()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    recomputed = [weight.grad for weight in model.parameters() if weight.grad is not None]
    for one, other in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_under_a_whole_window_equal_dense_ones(model: Any, inputs: dict[str, Any]) -> None:
    dense = gradients(model, inputs)
    gensparse.apply(model, Clear(radius=100), strict=True)
    for one, other in zip(gradients(model, inputs), dense, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_compiled_block_gives_the_eager_picture_and_is_counted(inputs: dict[str, Any]) -> None:
    model = tiny_flux_transformer()
    handle = gensparse.apply(model, SMALL, strict=True)
    sparse = run(model, inputs)
    model.single_transformer_blocks[0].compile(backend="eager")
    try:
        for _ in range(2):
            torch.testing.assert_close(run(model, inputs), sparse, atol=1e-5, rtol=0)
        assert handle.report()["calls"] == {"sparse": 6, "dense": {}}
    finally:
        torch.compiler.reset()


def test_a_compiled_model_is_reached_through_its_wrapper(model: Any, inputs: dict[str, Any]) -> None:
    dense, wrapper = run(model, inputs), torch.compile(model, backend="eager")
    handle = gensparse.apply(wrapper, SMALL)
    assert not torch.equal(run(model, inputs), dense)
    assert handle.report()["calls"]["sparse"] == 4
    gensparse.remove(wrapper)
    assert torch.equal(run(model, inputs), dense)


def test_fused_projections_stay_sparse(model: Any, inputs: dict[str, Any]) -> None:
    handle = gensparse.apply(model, SMALL, strict=True)
    sparse = run(model, inputs)
    model.fuse_qkv_projections()
    torch.testing.assert_close(run(model, inputs), sparse, atol=1e-5, rtol=0)
    model.unfuse_qkv_projections()
    torch.testing.assert_close(run(model, inputs), sparse, atol=1e-5, rtol=0)
    assert handle.report()["calls"] == {"sparse": 12, "dense": {}}


def test_attention_backend_chosen_later_stays_sparse(model: Any, inputs: dict[str, Any]) -> None:
    handle = gensparse.apply(model, SMALL, strict=True)
    sparse = run(model, inputs)
    model.set_attention_backend("_native_math")
    try:
        assert torch.equal(run(model, inputs), sparse)
        handle.remove()
        assert all(p._attention_backend is not None for p in model.attn_processors.values())
    finally:
        model.reset_attention_backend()
        _AttentionBackendRegistry.set_active_backend(
            AttentionBackendName.NATIVE
        )  # of the process, which the reset leaves


def test_exchanged_processors_are_made_sparse_again_with_one_warning(
    model: Any, inputs: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    handle = gensparse.apply(model, SMALL, strict=True)
    sparse = run(model, inputs)
    with caplog.at_level(logging.WARNING, "gensparse.attach"):
        for _ in range(2):
            model.set_attn_processor(FluxAttnProcessor())
            assert torch.equal(run(model, inputs), sparse)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert handle.report()["calls"] == {"sparse": 12, "dense": {}}


def test_processors_that_cannot_be_sparse_raise_before_and_after_apply(model: Any, inputs: dict[str, Any]) -> None:
    gensparse.apply(model, SMALL)
    model.transformer_blocks[1].attn.set_processor(SlicedAttnProcessor(2))
    with pytest.raises(UnsupportedProcessorError, match="SlicedAttnProcessor"):
        run(model, inputs)
    gensparse.remove(model)
    with pytest.raises(UnsupportedProcessorError, match="SlicedAttnProcessor"):
        gensparse.apply(model, SMALL)
    assert type(model.transformer_blocks[0].attn.processor) is FluxAttnProcessor
    assert not model._forward_pre_hooks


def load_image_prompt(model: Any) -> dict[str, Any]:
    """Load an image-prompt adapter of random weights as diffusers does; the extra arguments that use it."""
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    layers = {}
    for index in range(len(model.transformer_blocks)):
        for name in ("to_k_ip", "to_v_ip"):
            layers |= {f"{index}.{name}.weight": noise(32, 32), f"{index}.{name}.bias": noise(32)}
    projection = {"proj.weight": noise(4 * 32, 8), "proj.bias": noise(4 * 32)}
    projection |= {"norm.weight": noise(32), "norm.bias": noise(32)}
    model._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}], low_cpu_mem_usage=False)
    return {"ip_adapter_image_embeds": [noise(2, 1, 8)]}


def unload_image_prompt(model: Any) -> None:
    pipe = tiny_flux_pipeline()
    pipe.transformer = model
    pipe.unload_ip_adapter()


@pytest.mark.parametrize("first", ["adapter", "apply"])
def test_image_prompts_work_and_their_loading_and_unloading_stays_sparse(
    model: Any, inputs: dict[str, Any], first: str
) -> None:
    twin = copy.deepcopy(model)
    prompt = load_image_prompt(twin)
    dense = run(twin, inputs, joint_attention_kwargs=dict(prompt))
    plain = run(model, inputs)
    if first == "adapter":
        load_image_prompt(model)
    handle = gensparse.apply(model, Clear(radius=100), strict=True)
    if first == "apply":
        load_image_prompt(model)
    sparse = run(model, inputs, joint_attention_kwargs=dict(prompt))
    torch.testing.assert_close(sparse, dense, atol=1e-5, rtol=0)
    assert (dense - plain).abs().max() > 0.05
    assert isinstance(model.transformer_blocks[0].attn.processor, FluxIPAdapterAttnProcessor)
    unload_image_prompt(model)
    torch.testing.assert_close(run(model, inputs), plain, atol=1e-5, rtol=0)
    assert handle.report()["calls"] == {"sparse": 8, "dense": {}}


def test_image_prompt_weights_keep_their_names_in_the_state_dict(model: Any) -> None:
    load_image_prompt(model)
    names = list(model.state_dict())
    gensparse.apply(model, SMALL)
    assert list(model.state_dict()) == names


def test_made_processors_act_once_they_are_set_and_remove_undoes_them(model: Any, inputs: dict[str, Any]) -> None:
    dense = run(model, inputs)
    handle = gensparse.apply(model, SMALL)
    sparse = run(model, inputs)
    handle.remove()
    processors = gensparse.make_processors(model, "clear:radius=2")
    assert list(processors) == list(model.attn_processors)
    assert torch.equal(run(model, inputs), dense)
    model.set_attn_processor(processors)
    assert torch.equal(run(model, inputs), sparse)
    gensparse.remove(model)
    assert torch.equal(run(model, inputs), dense)


def test_sites_whose_made_processor_was_not_set_stay_dense_and_are_reported(model: Any, inputs: dict[str, Any]) -> None:
    handle = gensparse.apply(model, SMALL, dense_layers=[2, 3])
    expected = run(model, inputs)
    handle.remove()
    processors = gensparse.make_processors(model, SMALL)
    own = dict(model.attn_processors)
    model.set_attn_processor({n: own[n] if n.startswith("single") else p for n, p in processors.items()})
    assert torch.equal(run(model, inputs), expected)
    assert run(model, inputs).isfinite().all()
    gensparse.remove(model)
    assert all(type(processor) is FluxAttnProcessor for processor in model.attn_processors.values())


def test_processor_of_a_module_that_was_not_prepared_is_an_error(model: Any, inputs: dict[str, Any]) -> None:
    other = tiny_flux_transformer(double_blocks=2, single_blocks=2)
    other.set_attn_processor(gensparse.make_processors(model, SMALL))
    with pytest.raises(UnsupportedProcessorError, match="not prepared"):
        run(other, inputs)


def test_control_nets_are_models_of_the_family(inputs: dict[str, Any]) -> None:
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    widths = {"in_channels": 16, "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8)}
    net = with_noise(FluxControlNetModel(patch_size=1, **sizes, **widths)).eval()
    arguments = {**inputs, "controlnet_cond": torch.randn(2, 48, 16)}
    with torch.no_grad():
        dense = net(**arguments).controlnet_single_block_samples[0]
        handle = gensparse.apply(net, Clear(radius=100), strict=True)
        torch.testing.assert_close(net(**arguments).controlnet_single_block_samples[0], dense, atol=1e-5, rtol=0)
    assert handle.report()["calls"] == {"sparse": 2, "dense": {}}


def test_pipeline_runs_sparse_counts_steps_and_is_restored() -> None:
    pipe = tiny_flux_pipeline()
    dense = picture(pipe)
    handle = gensparse.apply(pipe, "clear:radius=3", strict=True)
    assert (picture(pipe) - dense).abs().max() > 1e-3
    assert handle.report()["calls"] == {"sparse": 4, "dense": {}}
    assert handle.report()["sparse"] == 2
    gensparse.remove(pipe)
    assert torch.equal(picture(pipe), dense)


def test_dense_first_steps_are_counted_per_run() -> None:
    pipe = tiny_flux_pipeline()
    dense = picture(pipe)
    handle = gensparse.apply(pipe, SMALL, dense_steps=1)
    for runs in (1, 2):
        assert not torch.equal(picture(pipe), dense)
        assert handle.report()["calls"] == {"sparse": 2 * runs, "dense": {"dense step": 2 * runs}}
    gensparse.apply(pipe, SMALL, dense_steps=2)
    assert torch.equal(picture(pipe), dense)


def test_both_halves_of_guidance_share_a_step() -> None:
    pipe = tiny_flux_pipeline()
    handle = gensparse.apply(pipe, SMALL, dense_steps=1)
    picture(pipe, negative_prompt="a dog", true_cfg_scale=2.0)
    assert handle.report()["calls"] == {"sparse": 4, "dense": {"dense step": 4}}


def test_restart_counts_a_run_that_begins_below_the_last_timestep(model: Any, inputs: dict[str, Any]) -> None:
    handle = gensparse.apply(model, SMALL, dense_steps=1)
    for restart, timestep in ((False, 1.0), (False, 0.5), (True, 0.3), (False, 0.2)):
        if restart:
            handle.restart()
        run(model, inputs, timestep=torch.full((2,), timestep))
    assert handle.report()["calls"] == {"sparse": 8, "dense": {"dense step": 8}}


def test_proportional_scale_reads_the_training_size_from_the_pipeline() -> None:
    pipe = tiny_flux_pipeline()
    gensparse.apply(pipe, Clear(radius=3))
    plain = picture(pipe, output_type="latent")
    gensparse.apply(pipe, Clear(radius=3, proportional=True))
    assert not torch.equal(picture(pipe, output_type="latent"), plain)
    gensparse.apply(pipe.transformer, Clear(radius=3, proportional=True))
    with pytest.raises(ConfigError, match="training size"):
        picture(pipe)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dense_steps": -1}, "dense_steps=-1"),
        ({"dense_steps": 1.5}, "dense_steps=1.5"),
        ({"dense_layers": [4]}, "4 attention layers"),
        ({"dense_layers": [-5]}, "4 attention layers"),
        ({"dense_layers": [True]}, "dense_layers"),
        ({"dense_layers": ["a"]}, "dense_layers"),
        ({"dense_layers": 3}, "dense_layers=3"),
        ({"dense_layers": "0,1"}, "dense_layers"),
    ],
)
def test_bad_settings_are_refused_and_change_nothing(model: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        gensparse.apply(model, SMALL, **settings)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("thing", [object(), None, "model", torch.nn.Linear(1, 1)])
def test_other_things_than_pipelines_and_models_are_refused(thing: Any) -> None:
    with pytest.raises(ConfigError):
        gensparse.apply(thing, SMALL)
