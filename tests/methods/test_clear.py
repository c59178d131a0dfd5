"""CLEAR's distilled layers: loading, results, every refusal, and the way back."""

import copy
import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from diffusers import FluxTransformer2DModel
from fake_hub import make_cache, serve
from families.family_checks import masked_output, output
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import gensparse
from gensparse.errors import ConfigError, LayoutMismatchError, ModelError
from gensparse.layout import Layout
from gensparse.methods import Clear, SlidingWindow
from gensparse.testing.tiny import tiny_denoiser, tiny_inputs

GRID = (8, 6)
LAYOUTS = {"joint": Layout.image(*GRID, text=5)}
VARIANTS = {"local_8": (8, 1), "local_16": (16, 1), "local_32": (32, 1), "local_8_down_4": (8, 4)}
VARIANTS |= {"local_16_down_4": (16, 4)}


@pytest.fixture
def model() -> FluxTransformer2DModel:
    return tiny_denoiser("flux", double_blocks=2, single_blocks=2)


@pytest.fixture
def inputs() -> dict[str, Any]:
    return tiny_inputs("flux", (1, *GRID), text=5)


def tensors(model: nn.Module, factor: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Distilled tensors of random values with the published names and shapes."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in [n for n, m in model.named_modules() if n.endswith(".attn")]:
        parts = ["to_q", "to_k", "to_v"] + ["to_out.0"] * name.startswith("transformer_blocks")
        for key in (f"{name}.{part}.{kind}" for part in parts for kind in ("weight", "bias")):
            shape = model.get_parameter(key).shape
            found[key] = torch.randn(shape, generator=generator) * 0.2
        if factor > 1:
            pool = torch.rand(1, 1, 1, factor, 1, factor, 1, generator=generator)
            found[f"{name}.processor.spatial_weight"] = pool
    return found


def published(folder: Path, model: nn.Module, radius: int = 2, factor: int = 1, **changes: Tensor | None) -> Path:
    """A file as the authors name it; changes replace its tensors or, as None, leave them out."""
    down = f"_down_{factor}" if factor > 1 else ""
    path = folder / f"clear_local_{radius}{down}.safetensors"
    found = {**tensors(model, factor), **changes}
    save_file({key: value.clone() for key, value in found.items() if value is not None}, path)
    return path


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_published_variants_are_presets() -> None:
    assert {name: (Clear.preset(name).radius, Clear.preset(name).down_factor) for name in Clear.presets} == VARIANTS


@pytest.mark.parametrize("by", ["file", "folder"])
def test_weights_are_those_of_the_file_and_remove_restores_bits(
    model: Any, inputs: dict[str, Any], tmp_path: Path, by: str
) -> None:
    path = published(tmp_path, model)
    before, dense, twin = state(model), output(model, inputs), copy.deepcopy(model)
    keys = twin.load_state_dict(load_file(path), strict=False)
    assert not keys.unexpected_keys
    expected = masked_output(twin, inputs, LAYOUTS, Clear(2))
    handle = gensparse.apply(model, Clear(2, weights=str(path if by == "file" else tmp_path)), strict=True)
    torch.testing.assert_close(output(model, inputs), expected, atol=1e-5, rtol=0)
    assert (expected - output(twin, inputs)).abs().max() > 1e-3
    handle.remove()
    assert same(state(model), before)
    assert torch.equal(output(model, inputs), dense)


def test_learned_pooling_weights_belong_to_their_own_layer(model: Any, inputs: dict[str, Any], tmp_path: Path) -> None:
    """Equal weights of 1 / f^2 give means; weights of another layer give another picture."""
    mean = torch.full((1, 1, 1, 2, 1, 2, 1), 0.25)
    pools = [key for key in tensors(model, 2) if key.endswith("spatial_weight")]
    path = published(tmp_path, model, 2, 2, **dict.fromkeys(pools, mean))
    twin = copy.deepcopy(model)
    twin.load_state_dict({k: v for k, v in load_file(path).items() if k not in pools}, strict=False)
    gensparse.apply(twin, Clear(2, 2), strict=True)
    gensparse.apply(model, Clear(2, 2, weights=str(path)), strict=True)
    means = output(model, inputs)
    torch.testing.assert_close(means, output(twin, inputs), atol=1e-5, rtol=0)
    pictures = [means]
    for pool in pools:
        other = torch.arange(4.0).reshape_as(mean)
        weights = str(published(tmp_path, model, 2, 2, **dict.fromkeys(pools, mean) | {pool: other}))
        handle = gensparse.apply(model, Clear(2, 2, weights=weights), strict=True)
        pictures.append(output(model, inputs))
        handle.remove()
    assert all((a - b).abs().max() > 1e-4 for n, a in enumerate(pictures) for b in pictures[:n])


@pytest.mark.parametrize("grid", [(7, 6), (8, 5), (1, 9)])
def test_sides_that_pooling_weights_do_not_divide_run_dense_with_the_reason(
    model: Any, tmp_path: Path, grid: tuple[int, int]
) -> None:
    method = Clear(2, 2, weights=str(published(tmp_path, model, 2, 2)))
    handle = gensparse.apply(model, method)
    output(model, tiny_inputs("flux", (1, *grid)))
    (reason,) = handle.report()["dense"]
    assert "sides that 2 divides" in reason
    gensparse.apply(model, method, strict=True)
    with pytest.raises(LayoutMismatchError, match="sides that 2 divides"):
        output(model, tiny_inputs("flux", (1, *grid)))


def fuse(model: Any) -> None:
    model.fuse_qkv_projections()


def unfuse(model: Any) -> None:
    model.unfuse_qkv_projections()


def nothing(_model: Any) -> None:
    pass


@pytest.mark.parametrize(("before", "meanwhile"), [(fuse, nothing), (nothing, fuse), (fuse, unfuse), (fuse, fuse)])
def test_fused_projections_get_the_weights_too_and_their_own_back(
    model: Any, inputs: dict[str, Any], tmp_path: Path, before: Callable, meanwhile: Callable
) -> None:
    weights, twin = str(published(tmp_path, model)), copy.deepcopy(model)
    gensparse.apply(twin, Clear(2, weights=weights), strict=True)
    expected, dense = output(twin, inputs), output(model, inputs)
    before(model)
    handle = gensparse.apply(model, Clear(2, weights=weights), strict=True)
    torch.testing.assert_close(output(model, inputs), expected, atol=1e-5, rtol=0)
    meanwhile(model)
    torch.testing.assert_close(output(model, inputs), expected, atol=1e-5, rtol=0)
    handle.remove()
    plain = copy.deepcopy(model)
    unfuse(plain)
    assert same(state(plain), state(tiny_denoiser("flux", double_blocks=2, single_blocks=2)))
    torch.testing.assert_close(output(model, inputs), dense, atol=1e-5, rtol=0)
    if meanwhile is not unfuse:
        fuse(plain)
        assert same(state(model), state(plain))


class Int8Linear(nn.Linear):
    """A linear layer that keeps whole numbers, as quantisation libraries make them."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features)
        self.weight = nn.Parameter(layer.weight.data.mul(100).to(torch.int8), requires_grad=False)


def quantised(model: Any) -> None:
    model.transformer_blocks[1].attn.to_k = Int8Linear(model.transformer_blocks[1].attn.to_k)


def dynamic(model: Any) -> None:
    quantized = torch.ao.nn.quantized.dynamic.Linear(32, 32)
    model.transformer_blocks[1].attn.to_k = quantized


def fused_lora(model: Any) -> None:
    model.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_k"]))
    model.fuse_lora()


@pytest.mark.parametrize(
    ("change", "message"), [(quantised, "int8"), (dynamic, "quantised"), (fused_lora, r"unfuse_lora\(\)")]
)
def test_layers_that_cannot_take_weights_are_refused_with_the_remedy(
    model: Any, tmp_path: Path, change: Callable, message: str
) -> None:
    path = published(tmp_path, model)
    change(model)
    before = {name: type(module) for name, module in model.named_modules()}
    weights = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ConfigError, match=rf"attn.to_k.*{message}"):
        gensparse.apply(model, Clear(2, weights=str(path)))
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(torch.equal(old, new) for old, new in zip(weights, model.parameters(), strict=True))


Q = "single_transformer_blocks.1.attn.to_q.weight"
POOL = "transformer_blocks.0.attn.processor.spatial_weight"


@pytest.mark.parametrize(
    ("made", "settings", "message"),
    [
        ({"radius": 3}, {"radius": 2}, "radius=3, down_factor=1"),
        ({"radius": 2, "factor": 2}, {"radius": 2}, "radius=2, down_factor=2"),
        ({Q: None}, {}, f"lacks 1 tensors such as {Q}"),
        ({"x_embedder.weight": torch.ones(1)}, {}, "has 1 others such as x_embedder.weight"),
        ({Q: torch.ones(32, 16)}, {}, rf"{Q} is \(32, 16\), the model has \(32, 32\)"),
        ({POOL: torch.ones(1, 1, 1, 4, 1, 4, 1)}, {}, r"down_factor=1 does not fit .*\(1, 1, 1, 4, 1, 4, 1\)"),
        ({"factor": 2, POOL: torch.ones(2, 2)}, {"down_factor": 2}, r"pooling weights"),
        ({"factor": 2, POOL: None}, {"down_factor": 2}, f"lacks 1 tensors such as {POOL}"),
    ],
)
def test_files_that_do_not_fit_are_refused_and_change_nothing(
    model: Any, inputs: dict[str, Any], tmp_path: Path, made: dict, settings: dict, message: str
) -> None:
    path = published(tmp_path, model, **made)
    first = gensparse.apply(model, SlidingWindow(1))
    before, window = state(model), output(model, inputs)
    with pytest.raises(ConfigError, match=message):
        gensparse.apply(model, Clear(**{"radius": 2, **settings}, weights=str(path)))
    assert same(state(model), before)
    assert first.active
    assert torch.equal(output(model, inputs), window)


def test_pools_are_found_missing_in_a_file_of_another_name(model: Any, tmp_path: Path) -> None:
    path = published(tmp_path, model).rename(tmp_path / "mine.safetensors")
    with pytest.raises(ConfigError, match=r"down_factor=4 does not fit mine\.safetensors, which has no pooling"):
        gensparse.apply(model, Clear(2, 4, weights=str(path)))
    gensparse.apply(model, Clear(5, weights=str(path)), strict=True)  # nothing in it says for which radius it was made


def test_other_models_are_refused(model: Any, tmp_path: Path) -> None:
    weights = str(published(tmp_path, model))
    for other in (tiny_denoiser("flux", double_blocks=2, single_blocks=1), tiny_denoiser("wan")):
        with pytest.raises(ConfigError, match=r"does not fit the model: .*FLUX.1"):
            gensparse.apply(other, Clear(2, weights=weights))


@pytest.mark.parametrize("value", [3, True, "", "  ", ("a", "b")])
def test_bad_places_of_weights_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="weights="):
        Clear(weights=value)


def test_files_that_are_missing_damaged_or_pickled_are_named(model: Any, tmp_path: Path) -> None:
    damaged = tmp_path / "clear_local_2.safetensors"
    damaged.write_bytes(published(tmp_path, model).read_bytes()[:999])
    pickled = tmp_path / "layers.bin"
    torch.save(tensors(model), pickled)
    (tmp_path / "empty").mkdir()
    for weights, message in (
        (damaged, "clear_local_2.safetensors cannot be read"),
        (pickled, "layers.bin is no .safetensors file"),
        (tmp_path / "none.safetensors", "there is no file"),
        (tmp_path / "empty", "has no clear_local_2.safetensors"),
        ("no folder", "neither a file nor owner/name"),
    ):
        with pytest.raises(ModelError, match=message):
            gensparse.apply(model, Clear(2, weights=str(weights)))
    assert not model._forward_pre_hooks


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """An empty cache and no token; called with an address, that hub is asked."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return lambda endpoint: monkeypatch.setenv("HF_ENDPOINT", endpoint)


def test_weights_come_from_the_hub_as_one_file(
    model: Any, inputs: dict[str, Any], tmp_path: Path, hub: Callable[[str], None]
) -> None:
    (tmp_path / "repo").mkdir()
    path = published(tmp_path / "repo", model, 8)
    published(tmp_path / "repo", model, 16)
    with serve(tmp_path / "repo") as (endpoint, log):
        hub(endpoint)
        gensparse.apply(model, "clear:preset=local_8,weights=Huage001/CLEAR")
    held = state(model)
    assert all(torch.equal(held[name], value) for name, value in load_file(path).items())
    assert log
    assert all("clear_local_8.safetensors" in line for line in log)


@pytest.mark.parametrize(
    ("refuse", "message"),
    [
        ((403, "GatedRepo"), "Huage001/CLEAR is gated; accept its terms"),
        ((404, "RepoNotFound"), "Huage001/CLEAR was not found"),
        ((404, "RevisionNotFound"), "has no revision 'v9'"),
        ((404, "EntryNotFound"), "has no file clear_local_7.safetensors"),
    ],
)
def test_refusals_of_the_hub_are_one_sentence(
    model: Any, hub: Callable[[str], None], refuse: tuple[int, str], message: str
) -> None:
    with serve(None, refuse=refuse) as (endpoint, _):
        hub(endpoint)
        with pytest.raises(ModelError, match=message) as caught:
            gensparse.apply(model, Clear(7, weights="Huage001/CLEAR@v9"))
    assert "\n" not in str(caught.value)
    assert "http" not in str(caught.value).replace("https://huggingface.co/Huage001/CLEAR", "")


def test_other_failures_of_the_network_are_one_sentence(
    model: Any, hub: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("https://hub.example?token=secret\nrefused")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(ModelError, match=r"could not be fetched \(ConnectionError\)") as caught:
        gensparse.apply(model, Clear(7, weights="Huage001/CLEAR"))
    assert "secret" not in str(caught.value)


def test_without_network_only_the_cache_is_asked(
    model: Any, tmp_path: Path, hub: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    method = Clear(2, weights="Huage001/CLEAR")
    with pytest.raises(ModelError, match="not in the local cache and the network is switched off"):
        gensparse.apply(model, method)
    (tmp_path / "repo").mkdir()
    published(tmp_path / "repo", model)
    make_cache(tmp_path / "cache", tmp_path / "repo", "Huage001/CLEAR")
    assert gensparse.apply(model, method).active


def adapter(model: Any) -> None:
    torch.manual_seed(5)
    model.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_v", "to_out.0"]))


@pytest.mark.parametrize("first", ["lora", "apply"])
def test_lora_adds_to_the_distilled_weights(model: Any, inputs: dict[str, Any], tmp_path: Path, first: str) -> None:
    path, twin = published(tmp_path, model), copy.deepcopy(model)
    twin.load_state_dict(load_file(path), strict=False)
    adapter(twin)
    expected = masked_output(twin, inputs, LAYOUTS, Clear(2))
    if first == "lora":
        adapter(model)
    handle = gensparse.apply(model, Clear(2, weights=str(path)), strict=True)
    if first == "apply":
        adapter(model)
    torch.testing.assert_close(output(model, inputs), expected, atol=1e-5, rtol=0)
    handle.remove()
    plain = tiny_denoiser("flux", double_blocks=2, single_blocks=2)
    adapter(plain)
    assert torch.equal(output(model, inputs), output(plain, inputs))


def test_a_lora_that_is_fused_meanwhile_stays_fused_into_the_models_own_weights(
    model: Any, inputs: dict[str, Any], tmp_path: Path
) -> None:
    plain, path = copy.deepcopy(model), published(tmp_path, model)
    adapter(plain)
    plain.fuse_lora()
    handle = gensparse.apply(model, Clear(2, weights=str(path)), strict=True)
    adapter(model)
    model.fuse_lora()
    handle.remove()
    assert same(state(model), state(plain))


@pytest.mark.parametrize("first", ["offload", "apply"])
def test_offloaded_weights_are_exchanged_where_they_are_kept(
    model: Any, inputs: dict[str, Any], tmp_path: Path, first: str
) -> None:
    weights, dense, twin = str(published(tmp_path, model)), output(model, inputs), copy.deepcopy(model)
    gensparse.apply(twin, Clear(2, weights=weights))
    expected = output(twin, inputs)
    if first == "offload":
        cpu_offload(model, execution_device=torch.device("cpu"))
    handle = gensparse.apply(model, Clear(2, weights=weights), strict=True)
    if first == "apply":
        cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(output(model, inputs), expected)
    handle.remove()
    assert torch.equal(output(model, inputs), dense)


def test_weights_on_disk_are_refused(model: Any, tmp_path: Path) -> None:
    weights = str(published(tmp_path, model))
    disk_offload(model, str(tmp_path / "disk"), execution_device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="disk offload"):
        gensparse.apply(model, Clear(2, weights=weights))


def test_a_model_that_changed_its_dtype_gets_its_weights_back_in_it(model: Any, tmp_path: Path) -> None:
    expected = state(copy.deepcopy(model).to(torch.bfloat16))
    handle = gensparse.apply(model, Clear(2, weights=str(published(tmp_path, model))))
    model.to(torch.bfloat16)
    handle.remove()
    assert same(state(model), expected)


def reloaded(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), reloaded])
def test_copies_carry_the_weights_and_their_own_way_back(
    model: Any, inputs: dict[str, Any], tmp_path: Path, duplicate: Callable
) -> None:
    dense, pooled = output(model, inputs), Clear(2, 2, weights=str(published(tmp_path, model, 2, 2)))
    gensparse.apply(model, pooled, strict=True)
    sparse, twin = output(model, inputs), duplicate(model)
    gensparse.remove(model)
    assert torch.equal(output(twin, inputs), sparse)
    gensparse.remove(twin)
    assert torch.equal(output(twin, inputs), dense)


def test_replacing_the_method_first_brings_the_own_weights_back(
    model: Any, inputs: dict[str, Any], tmp_path: Path
) -> None:
    before, weights = state(model), str(published(tmp_path, model))
    gensparse.apply(model, Clear(2, weights=weights))
    with gensparse.applied(model, SlidingWindow(1)):
        assert same(state(model), before)
    assert not same(state(model), before)
    gensparse.remove(model)
    assert same(state(model), before)
