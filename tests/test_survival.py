"""What users do to a sparse pipeline: it stays sparse, or says why it cannot; and what they chose stays chosen."""

import copy
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, FluxPipeline, MagCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks import PyramidAttentionBroadcastConfig
from diffusers.models import attention_dispatch
from diffusers.models.attention_processor import AttnProcessor, XFormersAttnProcessor
from peft import LoraConfig, get_peft_model_state_dict

import gensparse
from gensparse.errors import UnsupportedProcessorError
from gensparse.methods import Clear, SlidingWindow
from gensparse.processors import _compat
from gensparse.testing.tiny import tiny_call, tiny_denoiser, tiny_flux_pipeline, tiny_inputs, tiny_pipeline

SMALL, WHOLE = Clear(radius=2), Clear(radius=100)


@torch.no_grad()
def run(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return model(**inputs, return_dict=False)[0]


def latents(pipe: Any, steps: int = 6, **more: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 32, "width": 48, "max_sequence_length": 16, "output_type": "latent", **more}
    return pipe("a cat", num_inference_steps=steps, generator=torch.Generator().manual_seed(0), **call).images


@pytest.mark.parametrize("order", ["cache first", "apply first"])
@pytest.mark.parametrize(
    "config",
    [
        FirstBlockCacheConfig(threshold=100.0),
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 2000),
            current_timestep_callback=lambda: 500,
            spatial_attention_block_identifiers=("transformer_blocks",),
        ),
        MagCacheConfig(mag_ratios=torch.ones(6), num_inference_steps=6, threshold=0.3, retention_ratio=0.1),
        TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
    ],
    ids=lambda config: type(config).__name__,
)
def test_caches_skip_the_same_steps_and_keep_the_window_in_the_others(config: Any, order: str) -> None:
    dense, sparse = tiny_flux_pipeline(), tiny_flux_pipeline()
    whole = latents(dense)
    dense.transformer.enable_cache(copy.deepcopy(config))
    cached = latents(dense)
    if order == "cache first":
        sparse.transformer.enable_cache(copy.deepcopy(config))
    handle = gensparse.apply(sparse, WHOLE, strict=True)
    if order == "apply first":
        sparse.transformer.enable_cache(copy.deepcopy(config))
    torch.testing.assert_close(latents(sparse), cached, atol=1e-5, rtol=0)
    report = handle.report()
    assert report["dense"] == {}
    assert 0 < report["calls"]["sparse"] < 12  # some steps were skipped
    gensparse.apply(sparse, SMALL, strict=True)
    assert (latents(sparse) - cached).abs().max() > 0.01
    gensparse.remove(sparse)
    assert torch.equal(latents(sparse), cached)
    sparse.transformer.disable_cache()
    assert torch.equal(latents(sparse), whole)


def lora_weights(pipe: FluxPipeline) -> dict[str, torch.Tensor]:
    """State dict of a LoRA of random weights, as files hold it."""
    twin = copy.deepcopy(pipe.transformer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        twin.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    return {f"transformer.{name}": weight for name, weight in get_peft_model_state_dict(twin).items()}


def test_lora_is_loaded_fused_unfused_and_unloaded_under_a_window() -> None:
    plain, sparse = tiny_flux_pipeline(), tiny_flux_pipeline()
    weights, dense = lora_weights(plain), latents(plain, 2)
    handle = gensparse.apply(sparse, WHOLE, strict=True)
    for change in (
        lambda pipe: pipe.load_lora_weights(dict(weights)),
        lambda pipe: pipe.fuse_lora(),
        lambda pipe: pipe.unfuse_lora(),
        lambda pipe: pipe.unload_lora_weights(),
    ):
        for pipe in (plain, sparse):
            change(pipe)
        expected = latents(plain, 2)
        torch.testing.assert_close(latents(sparse, 2), expected, atol=1e-5, rtol=0)
    assert handle.report()["calls"] == {"sparse": 16, "dense": {}}
    handle.remove()
    plain.load_lora_weights(dict(weights))
    sparse.load_lora_weights(dict(weights))
    assert torch.equal(latents(sparse, 2), latents(plain, 2))
    assert not torch.equal(latents(plain, 2), dense)


@pytest.mark.parametrize("first", ["apply", "quantise"])
def test_int8_linears_of_torch_ao(first: str) -> None:
    model, inputs = tiny_denoiser("flux"), tiny_inputs("flux", (1, 8, 6))

    def quantise() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated in favour of torchao
            torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, inplace=True)

    twin = copy.deepcopy(model)
    if first == "quantise":
        quantise()
    handle = gensparse.apply(model, WHOLE, strict=True)
    if first == "apply":
        quantise()
    sparse = run(model, inputs)
    assert handle.report()["calls"] == {"sparse": 2, "dense": {}}
    handle.remove()
    dense = run(model, inputs)
    torch.testing.assert_close(sparse, dense, atol=1e-5, rtol=0)
    assert not torch.equal(dense, run(twin, inputs))


@pytest.mark.parametrize("first", ["apply", "quantise"])
def test_linears_of_torchao(first: str) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, inputs = tiny_denoiser("flux"), tiny_inputs("flux", (1, 8, 6))
    twin = copy.deepcopy(model)
    if first == "quantise":
        quantize_(model, Int8WeightOnlyConfig())
    handle = gensparse.apply(model, WHOLE, strict=True)
    if first == "apply":
        quantize_(model, Int8WeightOnlyConfig())
    sparse = run(model, inputs)
    assert handle.report()["calls"] == {"sparse": 2, "dense": {}}
    handle.remove()
    dense = run(model, inputs)
    torch.testing.assert_close(sparse, dense, atol=1e-5, rtol=0)
    assert not torch.equal(dense, run(twin, inputs))


@pytest.mark.parametrize("name", ["wan", "sdxl"])
@pytest.mark.parametrize("change", [lambda m: m.half(), lambda m: m.to(torch.float64)], ids=["half", "float64"])
def test_weights_of_another_dtype(name: str, change: Callable[[Any], Any]) -> None:
    grid = (2, 5, 4) if name == "wan" else (1, 8, 6)
    model = tiny_denoiser(name)
    handle = gensparse.apply(model, WHOLE, strict=True)
    change(model)
    dtype = next(model.parameters()).dtype
    inputs = {
        key: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in tiny_inputs(name, grid).items()
    }
    if "added_cond_kwargs" in inputs:
        inputs["added_cond_kwargs"] = {key: value.to(dtype) for key, value in inputs["added_cond_kwargs"].items()}
    sparse = run(model, inputs)
    assert handle.report()["dense"] == {}
    handle.remove()
    dense = run(model, inputs)
    assert (sparse - dense).abs().max() <= (0.02 if dtype is torch.float16 else 1e-6) * dense.abs().max()


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """Calls of one of diffusers' attention backends, one entry each."""
    registry, calls = attention_dispatch._AttentionBackendRegistry, []
    member = attention_dispatch.AttentionBackendName(name)
    original = registry._backends[member]

    def counting(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setitem(registry._backends, member, counting)
    return calls


@pytest.fixture
def reset_backend() -> Iterator[None]:
    yield
    set_native()


def set_native() -> None:
    native = attention_dispatch.AttentionBackendName.NATIVE
    attention_dispatch._AttentionBackendRegistry.set_active_backend(native)


@pytest.mark.parametrize("chosen", ["before apply", "after apply"])
def test_the_backend_a_user_chose_computes_the_dense_sites(
    monkeypatch: pytest.MonkeyPatch, reset_backend: None, chosen: str
) -> None:
    model, inputs = tiny_denoiser("flux", double_blocks=1, single_blocks=3), tiny_inputs("flux", (1, 8, 6))
    calls = counted(monkeypatch, "_native_math")
    if chosen == "before apply":
        model.set_attention_backend("_native_math")
    handle = gensparse.apply(model, SMALL, strict=True, dense_layers=[0, 2])
    expected = run(model, inputs)
    if chosen == "after apply":
        assert calls == []
        model.set_attention_backend("_native_math")
        torch.testing.assert_close(run(model, inputs), expected, atol=1e-5, rtol=0)
    assert len(calls) == 2
    assert handle.report()["sparse"] == 2
    model.reset_attention_backend()
    set_native()  # of the process, which the reset leaves
    torch.testing.assert_close(run(model, inputs), expected, atol=1e-5, rtol=0)
    assert len(calls) == 2
    with attention_dispatch.attention_backend("_native_math"):  # of the whole process
        torch.testing.assert_close(run(model, inputs), expected, atol=1e-5, rtol=0)
    assert len(calls) == 4
    assert handle.report()["sparse"] == 2


@pytest.fixture
def unet() -> Any:
    return tiny_pipeline("sdxl")


def test_attention_slicing_after_apply_is_an_error_with_its_remedy(unet: Any) -> None:
    call = tiny_call("sdxl")
    unet.set_progress_bar_config(disable=True)
    handle = gensparse.apply(unet, SlidingWindow(radius=1), strict=True)
    unet(**call)
    before = handle.report()["calls"]
    unet.enable_attention_slicing()
    with pytest.raises(UnsupportedProcessorError, match=r"attn1: SlicedAttnProcessor.*disable_attention_slicing\(\)"):
        unet(**call)
    assert handle.report()["calls"] == before
    unet.disable_attention_slicing()
    unet(**call)
    assert handle.report()["calls"] == {"sparse": 2 * before["sparse"], "dense": {}}
    handle.remove()
    unet.enable_attention_slicing()
    unet(**call)


@pytest.mark.parametrize(
    ("processor", "remedy"),
    [
        (XFormersAttnProcessor, r"disable_xformers_memory_efficient_attention\(\)"),
        (AttnProcessor, "AttnProcessor2_0"),
    ],
)
def test_other_processors_of_old_are_errors_with_their_remedies(processor: Any, remedy: str) -> None:
    model, inputs = tiny_denoiser("sd15"), tiny_inputs("sd15", (1, 8, 6))
    gensparse.apply(model, SMALL)
    model.set_attn_processor(processor())
    with pytest.raises(UnsupportedProcessorError, match=f"{processor.__name__} .*{remedy}"):
        run(model, inputs)


def test_two_pipelines_in_two_threads_at_alternating_sizes_share_nothing() -> None:
    models = [tiny_denoiser("flux"), tiny_denoiser("flux", seed=1)]
    methods, grids = [SMALL, SlidingWindow(radius=1)], [(1, 8, 6), (1, 5, 7), (1, 6, 8)]
    expected = []
    for model, method in zip(models, methods, strict=True):
        gensparse.apply(model, method, strict=True, dense_steps=1)
        run(model, timed(grids[0], 0.9))
        expected.append([run(model, timed(grid, 0.5)) for grid in grids])
    wrong: list[int] = []

    def work(index: int) -> None:
        run(models[index], timed(grids[0], 0.9))  # the first step is dense
        for _ in range(4):
            for grid, want in zip(grids, expected[index], strict=True):
                if not torch.equal(run(models[index], timed(grid, 0.5)), want):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def timed(grid: tuple[int, int, int], time: float) -> dict[str, Any]:
    return {**tiny_inputs("flux", grid), "timestep": torch.full((2,), time)}


def test_threads_on_one_model_count_the_steps_of_their_own_runs() -> None:
    model, seen = tiny_denoiser("flux"), []
    handle = gensparse.apply(model, SMALL, dense_steps=1)
    run(model, timed((1, 8, 6), 0.9))
    thread = threading.Thread(target=lambda: seen.append(run(model, timed((1, 8, 6), 0.5))))
    thread.start()
    thread.join()
    assert handle.report()["calls"] == {"sparse": 0, "dense": {"dense step": 4}}
    assert not torch.equal(run(model, timed((1, 8, 6), 0.5)), seen[0])


def test_textual_inversion_and_longer_prompts() -> None:
    dense, sparse = tiny_pipeline("sd15"), tiny_pipeline("sd15")
    call = {**tiny_call("sd15"), "prompt": "a <thing>"}
    handle = gensparse.apply(sparse, SlidingWindow(radius=100), strict=True)
    pictures = []
    for pipe in (dense, sparse):
        pipe.set_progress_bar_config(disable=True)
        width = pipe.text_encoder.config.hidden_size
        pipe.load_textual_inversion({"<thing>": torch.full((2, width), 0.3)})
        pictures.append(
            torch.as_tensor(pipe(**{**call, "output_type": "pt", "generator": torch.manual_seed(0)}).images)
        )
    torch.testing.assert_close(pictures[1], pictures[0], atol=1e-4, rtol=0)
    assert handle.report()["dense"] == {}


def test_an_untested_diffusers_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    _compat.warn_of_other_versions.cache_clear()
    with caplog.at_level(logging.WARNING, _compat.__name__):
        for version in ("0.42.9", "0.43.0", "0.43.0", "0.99.0.dev0"):
            _compat.warn_of_other_versions(version)
        assert [record.args[1] for record in caplog.records] == ["0.43.0", "0.99.0.dev0"]
        caplog.clear()
        gensparse.apply(tiny_denoiser("flux"), SMALL)
    assert caplog.records == []


def test_dense_last_steps_need_the_number_of_steps() -> None:
    pipe = tiny_flux_pipeline()
    dense = latents(pipe, 4)
    handle = gensparse.apply(pipe, SMALL, strict=True, dense_steps=1, dense_last_steps=1)
    for runs in (1, 2):
        assert not torch.equal(latents(pipe, 4), dense)
        assert handle.report()["calls"] == {"sparse": 4 * runs, "dense": {"dense step": 4 * runs}}
    gensparse.apply(pipe, SMALL, dense_last_steps=9)
    assert torch.equal(latents(pipe, 4), dense)
    handle = gensparse.apply(pipe.transformer, SMALL, dense_last_steps=1)
    with pytest.raises(gensparse.ConfigError, match=r"dense_last_steps=1 needs .*restart\(steps="):
        run(pipe.transformer, timed((1, 8, 6), 0.9))
    handle.restart(steps=2)
    for time in (0.9, 0.5):
        run(pipe.transformer, timed((1, 8, 6), time))
    assert handle.report()["calls"] == {"sparse": 2, "dense": {"dense step": 2}}


def test_density_is_the_mean_of_what_all_sites_did_last() -> None:
    model, inputs = tiny_denoiser("sdxl"), tiny_inputs("sdxl", (1, 8, 6))
    handle = gensparse.apply(model, SlidingWindow(radius=1), strict=True)
    run(model, inputs)
    method = SlidingWindow(radius=1)
    shares = {}
    for role, (height, width) in {"level1": (8, 6), "level2": (4, 3)}.items():
        layout = gensparse.Layout.image(height, width)
        shares[role] = gensparse.build_plan(method.pattern(layout), layout).density
    roles = [place.role for place in model._gensparse.places.values()]
    assert set(roles) == set(shares)
    assert handle.report()["density"] == pytest.approx(sum(shares[role] for role in roles) / len(roles))
    assert handle.report()["method"] == method.to_dict()
    assert handle.report()["family"] == "UNet"
