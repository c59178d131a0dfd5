"""Scale-DiT: anchors recorded once equal a model that runs text, picture and anchors as three streams."""

import copy
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from families.family_checks import output
from methods.flux_streams import Streams, all_streams, lora, tuned
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._dynamo.utils import counters

import gensparse
from gensparse.errors import ConfigError, LayoutMismatchError, ModelError
from gensparse.layout import Layout
from gensparse.methods import START, Dense, ScaleDiT
from gensparse.processors.bank import Bank
from gensparse.testing.tiny import tiny_denoiser, tiny_flux_pipeline, tiny_inputs

HIGH, LOW, TEXT = (12, 8), (3, 2), 5
SMALL = ScaleDiT(window=4)


@pytest.fixture
def model() -> FluxTransformer2DModel:
    return tiny_denoiser("flux", double_blocks=2, single_blocks=2)


@pytest.fixture
def inputs() -> dict[str, Any]:
    """The high-resolution call."""
    return tiny_inputs("flux", (1, *HIGH), text=TEXT, batch=2)


def low_call(inputs: Mapping[str, Any], low: tuple[int, int] = LOW, seed: int = 3) -> dict[str, Any]:
    """The call to record: another picture, text and pooled text as in the high-resolution call."""
    own = tiny_inputs("flux", (1, *low), text=TEXT, batch=2, seed=seed)
    return {**inputs, "hidden_states": own["hidden_states"], "img_ids": own["img_ids"]}


@pytest.fixture
def weights(model: nn.Module, tmp_path: Path) -> str:
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(lora(model), path)
    return str(path)


METHODS = [
    SMALL,
    ScaleDiT(window=(2, 6), neighbours="3x3"),
    ScaleDiT(window=4, text_sees_anchors=True),
    ScaleDiT(window=4, closure=(16, 8)),
    ScaleDiT(window=100),
]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_recorded_anchors_equal_three_streams_in_every_step(
    model: Any, inputs: dict[str, Any], weights: str, method: ScaleDiT
) -> None:
    if method.closure is not None:  # text and picture fill whole blocks, as at all published sizes
        inputs = tiny_inputs("flux", (1, *HIGH), text=16, batch=2)
    mask = all_streams(method, HIGH, LOW, text=inputs["txt_ids"].shape[0])
    low, streams = low_call(inputs), Streams(copy.deepcopy(model), tuned(model), mask)
    dense = output(model, inputs)
    handle = gensparse.apply(model, replace(method, weights=weights), strict=True)
    handle.record(**low)
    for time in (0.9, 0.3):
        call = {**inputs, "timestep": torch.full((2,), time)}
        expected, _ = streams.run(call, low, 4)
        torch.testing.assert_close(output(model, call), expected, atol=1e-4, rtol=1e-4)
    assert handle.report()["calls"] == {"sparse": 12, "dense": {}}
    handle.remove()
    assert torch.equal(output(model, inputs), dense)


@pytest.mark.parametrize(("high", "low", "ratio"), [((13, 9), (6, 4), 2), ((7, 11), (7, 11), 1), ((5, 1), (1, 1), 5)])
def test_awkward_sizes_equal_three_streams(model: Any, high: Any, low: Any, ratio: int) -> None:
    method = ScaleDiT(window=3, ratio=ratio)
    inputs = tiny_inputs("flux", (1, *high), text=TEXT, batch=2)
    call, streams = low_call(inputs, low), Streams(model, model, all_streams(method, high, low, TEXT))
    expected, _ = streams.run(inputs, call, ratio)
    handle = gensparse.apply(copy.deepcopy(model), method, strict=True)
    if high[1] // low[1] != ratio:  # one column of anchors stands for one column of the picture here, five for rows
        handle.record(**call)
        return
    twin = handle._attachments[0].model
    handle.record(**call)
    torch.testing.assert_close(output(twin, inputs), expected, atol=1e-4, rtol=1e-4)


def kept(handle: Any) -> dict[str, tuple[Tensor, Tensor]]:
    (attachment,) = handle._attachments
    return {name: site.recorded["anchors"] for name, site in attachment.sites.items()}


def test_anchors_do_not_depend_on_text_time_or_picture_bit_for_bit(
    model: Any, inputs: dict[str, Any], weights: str
) -> None:
    low, mask = low_call(inputs), all_streams(SMALL, HIGH, LOW, TEXT)
    handle = gensparse.apply(model, replace(SMALL, weights=weights), strict=True)
    handle.record(**low)
    first = kept(handle)
    other = tiny_inputs("flux", (1, *HIGH), text=TEXT, batch=2, seed=9)
    words = {**low, "encoder_hidden_states": other["encoder_hidden_states"], "timestep": torch.tensor([0.1, 0.7])}
    handle.record(**words)
    assert all(torch.equal(a, b) for name in first for a, b in zip(first[name], kept(handle)[name], strict=True))
    plain = copy.deepcopy(model)
    gensparse.remove(plain)
    streams = Streams(plain, tuned(tiny_denoiser("flux", double_blocks=2, single_blocks=2)), mask)
    changed = {
        **inputs,
        "hidden_states": other["hidden_states"],
        "encoder_hidden_states": other["encoder_hidden_states"],
    }
    runs = [
        streams.run({**call, "timestep": torch.full((2,), time)}, low, 4)[1]
        for call, time in ((inputs, 0.9), (changed, 0.2))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_recording_sees_the_lora_the_picture_and_the_pooled_text(
    model: Any, inputs: dict[str, Any], weights: str
) -> None:
    """What the anchors do depend on, so that the test above could fail."""
    low = low_call(inputs)
    calls = [
        (SMALL, low),
        (replace(SMALL, weights=weights), low),
        (SMALL, low_call(inputs, seed=4)),
        (SMALL, {**low, "pooled_projections": low["pooled_projections"] + 1}),
        (replace(SMALL, ratio=3), low),
    ]
    found = []
    for method, call in calls:
        handle = gensparse.apply(model, method)
        handle.record(**call)
        found.append(kept(handle)["single_transformer_blocks.1.attn"][0])
    assert all((a - b).abs().max() > 1e-3 for n, a in enumerate(found) for b in found[:n])


def test_one_picture_serves_a_batch(model: Any, inputs: dict[str, Any]) -> None:
    low = low_call(inputs)
    low = {name: value[:1] if name not in ("img_ids", "txt_ids") else value for name, value in low.items()}
    same = {
        **inputs,
        **{n: v[:1].expand(2, *v.shape[1:]) for n, v in inputs.items() if n not in ("img_ids", "txt_ids")},
    }
    handle = gensparse.apply(model, SMALL, strict=True)
    handle.record(**low)
    out = output(model, same)
    torch.testing.assert_close(out[0], out[1], atol=1e-6, rtol=0)
    single = {name: value[:1] if name not in ("img_ids", "txt_ids") else value for name, value in inputs.items()}
    torch.testing.assert_close(output(model, single), out[:1], atol=1e-5, rtol=0)


def test_calls_before_recording_and_after_forgetting_run_dense(model: Any, inputs: dict[str, Any]) -> None:
    dense = output(model, inputs)
    handle = gensparse.apply(model, SMALL, strict=True)
    assert torch.equal(output(model, inputs), dense)
    (reason,) = handle.report()["dense"]
    assert "handle.record()" in reason
    handle.record(**low_call(inputs))
    assert not torch.equal(output(model, inputs), dense)
    assert handle.report()["sparse"] == 4
    handle.forget()
    assert torch.equal(output(model, inputs), dense)


def test_anchors_of_another_size_run_dense_with_the_reason(model: Any, inputs: dict[str, Any]) -> None:
    handle = gensparse.apply(model, SMALL)
    handle.record(**low_call(inputs, (4, 2)))
    output(model, inputs)
    (reason,) = handle.report()["dense"]
    assert "4 x 2 tokens are not 1/4 of 12 x 8" in reason
    video = ScaleDiT().pattern(Layout.image(8, 8), START)
    assert isinstance(video, Dense)


def test_layers_and_steps_that_stay_dense_do_not_change_the_anchors(model: Any, inputs: dict[str, Any]) -> None:
    low = low_call(inputs)
    gensparse.apply(model, SMALL).record(**low)
    handle = gensparse.apply(model, SMALL, dense_layers=[0, 2], dense_steps=1)
    handle.record(**low)
    twin = copy.deepcopy(model)
    other = gensparse.apply(twin, SMALL)
    other.record(**low)
    assert all(torch.equal(a, b) for n in kept(other) for a, b in zip(kept(handle)[n], kept(other)[n], strict=True))
    calls = [output(model, {**inputs, "timestep": torch.full((2,), time)}) for time in (0.9, 0.5)]
    report = handle.report()
    assert report["calls"]["dense"] == {"dense step": 4 - 2, "dense layer": 4} or report["calls"]["sparse"] == 4 + 2
    assert len(calls) == 2


def test_recording_leaves_the_clock_alone(model: Any, inputs: dict[str, Any]) -> None:
    handle = gensparse.apply(model, SMALL, dense_steps=1)
    output(model, {**inputs, "timestep": torch.full((2,), 0.9)})
    handle.record(**low_call(inputs))
    output(model, {**inputs, "timestep": torch.full((2,), 0.5)})
    assert handle.report()["calls"]["dense"] == {"dense step": 4}
    assert handle.report()["sparse"] == 4


def test_compiled_blocks_record_and_see_anchors_without_being_compiled_again(
    model: Any, inputs: dict[str, Any]
) -> None:
    handle = gensparse.apply(model, SMALL, strict=True)
    handle.record(**low_call(inputs))
    expected = output(model, inputs)
    try:
        assert gensparse.compile_blocks(model, backend="eager", fullgraph=True) == 4
        torch.testing.assert_close(output(model, inputs), expected, atol=1e-5, rtol=0)
        graphs = counters["stats"]["unique_graphs"]
        handle.record(**low_call(inputs, seed=5))
        assert (output(model, inputs) - expected).abs().max() > 1e-3
        handle.record(**low_call(inputs))
        torch.testing.assert_close(output(model, inputs), expected, atol=1e-5, rtol=0)
        assert counters["stats"]["unique_graphs"] == graphs
    finally:
        torch.compiler.reset()


@contextmanager
def broken(model: nn.Module) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise RuntimeError("stop")

    hook = model.single_transformer_blocks[0].register_forward_pre_hook(stop)
    try:
        yield
    finally:
        hook.remove()


def test_a_recording_that_fails_leaves_nothing_half_recorded(model: Any, inputs: dict[str, Any], weights: str) -> None:
    dense = output(model, inputs)
    handle = gensparse.apply(model, replace(SMALL, weights=weights))
    handle.record(**low_call(inputs))
    with broken(model), pytest.raises(RuntimeError, match="stop"):
        handle.record(**low_call(inputs))
    assert torch.equal(output(model, inputs), dense)  # without anchors, and with the LoRA off
    bad = low_call(inputs)
    with pytest.raises(LayoutMismatchError, match="cannot record"):
        handle.record(**{**bad, "img_ids": bad["img_ids"].flip(0)})
    assert torch.equal(output(model, inputs), dense)


def test_what_cannot_be_recorded_is_said(model: Any, inputs: dict[str, Any]) -> None:
    handle = gensparse.apply(model, SMALL)
    with pytest.raises(ConfigError, match="encoder_hidden_states is missing"):
        handle.record(**{k: v for k, v in low_call(inputs).items() if k != "encoder_hidden_states"})
    other = gensparse.apply(model, "clear:radius=3")
    with pytest.raises(ConfigError, match="scale_dit is not on the model"):
        handle.record(**low_call(inputs))
    with pytest.raises(ConfigError, match="clear records nothing"):
        other.record(**low_call(inputs))


def test_bank_counts_its_memory_and_can_keep_it_elsewhere(model: Any, inputs: dict[str, Any]) -> None:
    handle = gensparse.apply(model, SMALL)
    handle.record(keep_on="cpu", **low_call(inputs))
    (attachment,) = handle._attachments
    assert attachment.bank.bytes == 4 * 2 * (2 * 6 * 32) * 4
    facts = {"tokens": 6, "grid": [3, 2], "bytes": attachment.bank.bytes}
    assert handle.report()["recorded"] == {"anchors": facts}
    handle.remove()
    assert attachment.bank.bytes == 0
    assert "recorded" not in handle.report()
    bank = Bank("meta")
    bank.keep("joint", "a", Layout.image(2, 3).segments[0], torch.ones(1, 6, 2, 4), torch.ones(1, 6, 2, 4))
    assert bank.sources("a")[""][0].device.type == "meta"
    assert bank.sources("b") == {}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_their_anchors(model: Any, inputs: dict[str, Any], weights: str, duplicate: Any) -> None:
    dense = output(model, inputs)
    gensparse.apply(model, replace(SMALL, weights=weights)).record(**low_call(inputs))
    sparse, twin = output(model, inputs), duplicate(model)
    gensparse.remove(model)
    assert torch.equal(output(twin, inputs), sparse)
    gensparse.remove(twin)
    assert torch.equal(output(twin, inputs), dense)


# ---------------------------------------------------------------------------------------------------------- the LoRA
def trace(model: nn.Module) -> Any:
    return list(model.state_dict()), {n: set(m.__dict__) for n, m in model.named_modules()}


def test_lora_is_off_in_other_calls_and_leaves_no_trace(model: Any, inputs: dict[str, Any], weights: str) -> None:
    dense, before = output(model, inputs), trace(model)
    handle = gensparse.apply(model, replace(SMALL, weights=weights))
    assert torch.equal(output(model, inputs), dense)
    handle.record(**low_call(inputs))
    handle.forget()
    assert torch.equal(output(model, inputs), dense)
    handle.remove()
    assert trace(model) == before


def style(model: Any, name: str) -> None:
    torch.manual_seed(2)
    model.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "proj_mlp"]), name)


@pytest.mark.parametrize("first", ["style", "apply"])
def test_the_users_lora_stays_on_in_all_calls(model: Any, inputs: dict[str, Any], weights: str, first: str) -> None:
    plain = copy.deepcopy(model)
    style(plain, "style")
    styled, low = output(plain, inputs), low_call(inputs)
    flags = {name: weight.requires_grad for name, weight in plain.named_parameters()}
    if first == "style":
        style(model, "style")
    handle = gensparse.apply(model, replace(SMALL, weights=weights), strict=True)
    if first == "apply":
        style(model, "style")
    assert torch.equal(output(model, inputs), styled)
    handle.record(**low)
    both = kept(handle)["single_transformer_blocks.1.attn"][0]
    handle.forget()
    assert torch.equal(output(model, inputs), styled)
    handle.remove()
    assert torch.equal(output(model, inputs), styled)
    assert list(model.state_dict()) == list(plain.state_dict())
    if first == "style":
        assert {name: weight.requires_grad for name, weight in model.named_parameters()} == flags
    model.delete_adapters("style")
    handle = gensparse.apply(model, replace(SMALL, weights=weights), strict=True)
    handle.record(**low)
    assert (kept(handle)["single_transformer_blocks.1.attn"][0] - both).abs().max() > 1e-3


def test_a_lora_the_user_has_taken_off_is_no_obstacle(model: Any, inputs: dict[str, Any], weights: str) -> None:
    dense = output(model, inputs)
    handle = gensparse.apply(model, replace(SMALL, weights=weights))
    model.unload_lora()
    handle.remove()
    assert torch.equal(output(model, inputs), dense)


Q = "transformer.single_transformer_blocks.1.attn.to_q.lora_A.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({Q: None}, "only one half of single_transformer_blocks.1.attn.to_q"),
        ({Q: torch.ones(3, 31)}, "from 31 to 32 features, the model from 32 to 32"),
        ({Q: torch.ones(2, 32)}, "from 32 to 32 features"),
        ({"transformer.proj_out.alpha": torch.ones(1)}, "holds proj_out.alpha"),
        ({f"transformer.blocks.9.lora_{end}.weight": torch.ones(3, 3) for end in "AB"}, "no linear layer blocks.9"),
        (None, "holds no tensors"),
    ],
)
def test_loras_that_do_not_fit_are_refused_and_change_nothing(
    model: Any, inputs: dict[str, Any], tmp_path: Path, changes: dict[str, Any] | None, message: str
) -> None:
    found = {} if changes is None else {**lora(model), **changes}
    save_file({key: value for key, value in found.items() if value is not None}, tmp_path / "mine.safetensors")
    before = trace(model)
    with pytest.raises(ConfigError, match=f"mine.safetensors.*{message}"):
        gensparse.apply(model, ScaleDiT(weights=str(tmp_path / "mine.safetensors")))
    assert trace(model) == before


def test_a_folder_holds_the_lora_under_its_published_name(model: Any, tmp_path: Path, weights: str) -> None:
    assert gensparse.apply(model, ScaleDiT(weights=str(Path(weights).parent))).active
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"has no pytorch_lora_weights\.safetensors"):
        gensparse.apply(model, ScaleDiT(weights=str(tmp_path / "empty")))


def test_an_adapter_of_the_same_name_is_refused(model: Any, weights: str) -> None:
    style(model, "scale_dit")
    with pytest.raises(ConfigError, match="called 'scale_dit' already"):
        gensparse.apply(model, ScaleDiT(weights=weights))


# ---------------------------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "window=0"),
        ({"window": (4, 4, 4)}, "window="),
        ({"ratio": 0}, "ratio=0"),
        ({"ratio": 2.5}, "ratio=2.5"),
        ({"neighbours": "5x5"}, "neighbours='5x5'"),
        ({"text_sees_anchors": 1}, "text_sees_anchors=1"),
        ({"closure": 128}, "closure=128"),
        ({"closure": (128, 0)}, "closure"),
        ({"weights": 3}, "weights=3"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScaleDiT(**settings)


@pytest.mark.parametrize("name", ["sdxl", "wan", "sd3"])
def test_other_families_are_refused_with_what_to_take_instead(name: str) -> None:
    model = tiny_denoiser(name)
    with pytest.raises(ConfigError, match=r"FLUX.1 or FLUX.2 family.*take clear"):
        gensparse.apply(model, ScaleDiT())


def test_flux2_records_and_sees_its_anchors() -> None:
    model = tiny_denoiser("flux2")
    inputs = tiny_inputs("flux2", (1, 8, 12), text=TEXT)
    own = tiny_inputs("flux2", (1, 2, 3), text=TEXT, seed=4)
    dense = output(model, inputs)
    handle = gensparse.apply(model, SMALL, strict=True)
    handle.record(**{**inputs, "hidden_states": own["hidden_states"], "img_ids": own["img_ids"]})
    anchored = output(model, inputs)
    handle.record(**{**inputs, "hidden_states": own["hidden_states"] + 1, "img_ids": own["img_ids"]})
    assert (output(model, inputs) - anchored).abs().max() > 1e-3
    assert (anchored - dense).abs().max() > 1e-3
    assert handle.report()["dense"] == {}


def test_the_pipeline_makes_the_low_picture_dense_and_the_high_one_with_its_anchors() -> None:
    """All of it with diffusers' own calls: a picture, its packed latents, the recording, a picture of four times."""
    pipe = tiny_flux_pipeline()
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a cat", "num_inference_steps": 2, "max_sequence_length": 16, "output_type": "latent"}
    handle = gensparse.apply(pipe, SMALL, strict=True)
    low = pipe(height=8, width=12, generator=torch.Generator().manual_seed(0), **call).images
    assert handle.report()["sparse"] == 0
    prompt, pooled, words = pipe.encode_prompt("a cat", "a cat", max_sequence_length=16)
    ids = pipe._prepare_latent_image_ids(1, 2, 3, torch.device("cpu"), torch.float32)
    handle.record(
        hidden_states=low, img_ids=ids, encoder_hidden_states=prompt, txt_ids=words, pooled_projections=pooled
    )
    high = pipe(height=32, width=48, generator=torch.Generator().manual_seed(0), **call).images
    report = handle.report()
    assert report["dense"] == {}
    assert report["calls"]["sparse"] == 2 + 2 * 2
    assert np.isfinite(high.numpy()).all()
