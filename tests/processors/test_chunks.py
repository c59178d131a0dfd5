"""Feed-forwards in chunks: the same numbers, a smaller peak, nothing left behind."""

import copy
from contextlib import nullcontext

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.hooks import HookRegistry

from gensparse.errors import ConfigError
from gensparse.processors.chunks import chunk, chunked
from gensparse.testing.live_bytes import FusedAttention, LiveBytes
from gensparse.testing.tiny import tiny_denoiser, tiny_inputs

GIB = 1 << 30
# parallel blocks, feed-forwards
FAMILIES = {
    "flux": (True, True),
    "chroma": (True, True),
    "sd3": (False, True),
    "sdxl": (False, True),
    "hidream": (False, True),
}


def output(model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**{**inputs, "return_dict": False})[0]


def apart(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error (of the norms); products of other shapes round the last bits differently."""
    return float((result.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("tokens", [7, 1])
@pytest.mark.parametrize("name", FAMILIES)
def test_chunks_change_no_number(name: str, tokens: int) -> None:
    model, inputs = tiny_denoiser(name), tiny_inputs(name, (1, 10, 6))
    whole, keys = output(model, inputs), list(model.state_dict())
    with chunked(model, tokens) as made:
        assert (made.parallel_blocks > 0, made.feed_forwards > 0) == FAMILIES[name]
        assert list(model.state_dict()) == keys
        assert apart(output(model, inputs), whole) <= 1e-6
    assert not any(hasattr(m, "_diffusers_hook") or "forward" in m.__dict__ for m in model.modules())
    assert torch.equal(output(model, inputs), whole)


def test_every_piece_is_as_small_as_asked() -> None:
    model, seen = tiny_denoiser("flux"), []
    with chunked(model, 7):
        for name, module in model.named_modules():
            if name.endswith(("net.2", "act_mlp")):
                module.register_forward_hook(lambda m, i, o: seen.append(o.shape[1]))
        output(model, tiny_inputs("flux", (1, 10, 6)))
    assert set(seen) - {0} >= {7}
    assert max(n for n in seen if n <= 60) <= 7


def test_calls_below_the_size_run_as_before() -> None:
    model, inputs = tiny_denoiser("flux"), tiny_inputs("flux", (1, 4, 5))
    whole = output(model, inputs)
    with chunked(model, 4096):
        assert torch.equal(output(model, inputs), whole)


def test_half_precision_weights_and_hooks_of_others_stay() -> None:
    """fp8 storage casts every layer around its call, on hooks of its own."""
    model, inputs = tiny_denoiser("flux"), tiny_inputs("flux", (1, 4, 5))
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    whole = output(model, inputs)
    with chunked(model, 7):
        assert apart(output(model, inputs), whole) <= 1e-6
    block = model.single_transformer_blocks[0]
    assert list(block.proj_mlp._diffusers_hook.hooks) == ["layerwise_casting"]
    assert block.proj_mlp.weight.dtype == torch.float8_e4m3fn
    assert torch.equal(output(model, inputs), whole)


def test_hooks_that_come_later_survive_the_removal() -> None:
    from diffusers.hooks import ModelHook

    model, calls = tiny_denoiser("flux"), []

    class Count(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    made, target = chunk(model, 7), model.transformer_blocks[0].ff
    HookRegistry.check_if_exists_or_initialize(target).register_hook(Count(), "count")
    made.remove()
    made.remove()
    output(model, tiny_inputs("flux", (1, 4, 5)))
    assert calls == [target]


def test_an_error_inside_leaves_nothing_waiting() -> None:
    model, inputs = tiny_denoiser("flux"), tiny_inputs("flux", (1, 4, 5))
    whole = output(model, inputs)
    with chunked(model, 7):
        hook = model.single_transformer_blocks[0].attn.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            output(model, inputs)
        hook.remove()
        assert apart(output(model, inputs), whole) <= 1e-6


def test_a_copy_computes_with_its_own_weights() -> None:
    model, inputs = tiny_denoiser("flux"), tiny_inputs("flux", (1, 4, 5))
    with chunked(model, 7):
        pass
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(0.5)
    assert not torch.allclose(output(other, inputs), output(model, inputs))


@pytest.mark.parametrize("tokens", [0, -1, True, 1.5, "8"])
def test_impossible_chunks_are_refused(tokens) -> None:
    with pytest.raises(ConfigError, match="tokens"):
        chunk(tiny_denoiser("flux"), tokens)


def test_models_without_feed_forward_and_second_chunks_are_refused() -> None:
    with pytest.raises(ConfigError, match="Linear"):
        chunk(torch.nn.Linear(2, 2), 8)
    model = tiny_denoiser("flux")
    with chunked(model, 8), pytest.raises(ConfigError, match="already"):
        chunk(model, 8)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, device="meta", dtype=dtype)


def peak(model: torch.nn.Module, tokens: int, inputs: dict) -> float:
    """GiB of one call with the real shapes, without weights."""
    with FusedAttention(), chunked(model, tokens) if tokens else nullcontext(), LiveBytes() as count:
        output(model, inputs)
    return count.peak["meta"] / GIB


@pytest.mark.parametrize(("size", "whole", "pieces"), [(1024, 0.46, 0.35), (4096, 6.5, 5.0)])
def test_flux_needs_less_by_the_allocation_trace(size: int, whole: float, pieces: float) -> None:
    """One block of each kind: the others need the same again. The rotation of keys in fp32 is what remains."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True).to(torch.bfloat16)
    n = (size // 16) ** 2
    inputs = {
        "hidden_states": empty(1, n, 64),
        "encoder_hidden_states": empty(1, 512, 4096),
        "pooled_projections": empty(1, 768),
        "timestep": empty(1),
        "guidance": empty(1, dtype=torch.float32),
        "img_ids": empty(n, 3),
        "txt_ids": empty(512, 3),
    }
    assert peak(model, 0, inputs) == pytest.approx(whole, rel=0.03)
    assert peak(model, 4096, inputs) == pytest.approx(pieces, rel=0.03)


def test_sd3_needs_less_by_the_allocation_trace() -> None:
    with torch.device("meta"):
        model = SD3Transformer2DModel(
            num_layers=2,
            num_attention_heads=38,
            caption_projection_dim=2432,
            pos_embed_max_size=192,
            qk_norm="rms_norm",
        ).to(torch.bfloat16)
    inputs = {
        "hidden_states": empty(1, 16, 256, 256),
        "encoder_hidden_states": empty(1, 333, 4096),
        "pooled_projections": empty(1, 2048),
        "timestep": empty(1),
    }
    assert peak(model, 4096, inputs) < 0.75 * peak(model, 0, inputs)
