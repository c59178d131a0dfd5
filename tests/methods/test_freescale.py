"""FreeScale: its attention against plain loops, its convolutions against dilated ones, and what it leaves behind."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import gensparse
from gensparse.errors import ConfigError
from gensparse.highres.freescale import dilated_convs, fused, token_windows
from gensparse.highres.views import unpadded
from gensparse.kernels import reference
from gensparse.layout import Layout
from gensparse.methods import At, FreeScale, Neighborhood
from gensparse.patterns import LongDistance
from gensparse.processors.operators import OperatorCall
from gensparse.processors.scale_fusion import ScaleFusion
from gensparse.testing.tiny import tiny_denoiser, tiny_inputs, tiny_pipeline

SIZES = [(7, 13), (16, 16), (1, 11), (19, 5)]


def normal(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def dense(q, k, v, bias=None):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def operator_call(q, k, v, size, *, bias=None, layer=2, step=3):
    own = None if bias is None else bias[:, :, None]
    return OperatorCall(Layout.image(*size), None, None, bias, layer, step, lambda: dense(q, k, v, own))


def local_by_loops(fusion: ScaleFusion, q, k, v, size, layer=2, step=3, bias=None):
    """Every window on its own, cut at the border of the map, and the mean of what its tokens got."""
    total, count = torch.zeros_like(q), torch.zeros(q.shape[1])
    reach = fusion.windows.jitter
    for view in fusion.views(size, layer, step):
        inside = torch.zeros(1, size[0] + 2 * reach[0], size[1] + 2 * reach[1])
        view.of(inside).fill_(1)
        tokens = unpadded(inside, reach).flatten().nonzero().flatten()
        own = None if bias is None else bias[:, :, None, tokens]
        total[:, tokens] += dense(q[:, tokens], k[:, tokens], v[:, tokens], own)
        count[tokens] += 1
    assert count.min() >= 1
    return total / count.view(1, -1, 1, 1)


# --- the attention


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fusion", ["spatial", "reference"])
@pytest.mark.parametrize("jitter", [True, False])
def test_attention_is_windows_and_whole_map_fused(size, fusion, jitter):
    q, k, v = (normal(2, math.prod(size), 2, 8, seed=s) for s in range(3))
    cut = token_windows(size, 5)
    cut = cut._replace(jitter=tuple(min(2, n // 4) if jitter else 0 for n in cut.window))
    method = ScaleFusion(cut, 3, None, fusion, seed=4)
    local = local_by_loops(method, q, k, v, size)
    maps = [x.reshape(2, *size, 16) for x in (local, dense(q, k, v))]
    expected = fused(*maps, 3, fusion).reshape(q.shape)
    out = method.attend(q, k, v, operator_call(q, k, v, size))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_masked_keys_are_masked_in_both_parts():
    size = (7, 9)
    q, k, v = (normal(2, 63, 2, 8, seed=s) for s in range(3))
    bias = torch.zeros(2, 1, 63)
    bias[0, 0, ::3], bias[1, 0, 1::4] = float("-inf"), -1.5
    cut = token_windows(size, 4)._replace(jitter=(1, 1))
    method = ScaleFusion(cut, 2)
    local = local_by_loops(method, q, k, v, size, bias=bias)
    maps = [x.reshape(2, *size, 16) for x in (local, dense(q, k, v, bias[:, :, None]))]
    out = method.attend(q, k, v, operator_call(q, k, v, size, bias=bias))
    torch.testing.assert_close(out, fused(*maps, 2).reshape(q.shape), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("whole", ["fast", "neighborhood:window=3x3"])
def test_the_whole_map_may_be_sparse(size, whole):
    method, layout = FreeScale(whole=whole, native=8), Layout.image(*size)
    fusion = method.pattern(layout, At(coarseness=2))
    assert fusion.windows == token_windows(size, 4)
    if whole == "fast":
        assert isinstance(fusion.whole, LongDistance)
        step = tuple(max(1, math.floor(n / 4 + 0.5)) for n in size)
        rows, columns = torch.meshgrid(*map(torch.arange, size), indexing="ij")
        classes = (rows % step[0] * step[1] + columns % step[1]).flatten()
        assert torch.equal(torch.from_numpy(fusion.whole.dense_mask(layout)[0]), classes[:, None] == classes)
    q, k, v = (normal(1, layout.tokens, 2, 8, seed=s) for s in range(3))
    far = reference.attend(q, k, v, torch.from_numpy(fusion.whole.dense_mask(layout)))[0]
    local = local_by_loops(fusion, q, k, v, size)
    if fusion.scale > 1:
        local = fused(*(x.reshape(1, *size, 16) for x in (local, far)), fusion.scale).reshape(q.shape)
    out = fusion.attend(q, k, v, operator_call(q, k, v, size))
    torch.testing.assert_close(out, local, rtol=0, atol=1e-5)


def test_constant_values_stay_constant():
    q, k = normal(1, 91, 2, 8), normal(1, 91, 2, 8, seed=1)
    v = torch.full((1, 91, 2, 8), 1.75)
    out = ScaleFusion(token_windows((7, 13), 4), 3).attend(q, k, v, operator_call(q, k, v, (7, 13)))
    torch.testing.assert_close(out, v)


def test_jitter_depends_on_seed_layer_and_step_alone():
    cut = token_windows((64, 64), 32)
    views = ScaleFusion(cut, 2).views
    assert views((64, 64), 3, 5) == ScaleFusion(cut, 2).views((64, 64), 3, 5)
    others = [views((64, 64), 4, 5), views((64, 64), 3, 6), ScaleFusion(cut, 2, seed=1).views((64, 64), 3, 5)]
    assert all(other != views((64, 64), 3, 5) for other in others)


def test_density_counts_both_parts():
    layout = Layout.image(16, 16)
    fusion = FreeScale(native=8).pattern(layout)
    assert fusion.density(layout) == 1 + 9 * 64**2 / 256**2
    fast = FreeScale(native=8, whole="fast").pattern(layout)
    assert fast.density(layout) == 0.25 + 9 * 64**2 / 256**2
    assert FreeScale(native=16).pattern(layout).density(layout) == 1


# --- on a UNet


@pytest.fixture(scope="module")
def unet():
    return tiny_denoiser("sdxl")


def state_of(model) -> tuple:
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    plain = [{k: v for k, v in vars(b).items() if isinstance(v, int | float | str)} for b in model.up_blocks]
    processors = [(id(p), type(p)) for p in model.attn_processors.values()]
    convs = [(m.dilation, m.padding) for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    return hooks, plain, processors, convs


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs).sample


def test_at_the_native_size_nothing_changes(unet):
    inputs = tiny_inputs("sdxl", (1, 8, 8))
    expected = run(unet, inputs)
    with gensparse.applied(unet, FreeScale()) as handle:
        torch.testing.assert_close(run(unet, inputs), expected, rtol=0, atol=2e-5)
        assert handle.report()["dense"] == {}


@pytest.mark.parametrize("grid", [(16, 24), (13, 9), (5, 20)])
@pytest.mark.parametrize("method", ["freescale", "freescale:whole=fast", "freescale:whole=neighborhood:window=5x5"])
def test_every_self_attention_is_fused(unet, grid, method):
    inputs = tiny_inputs("sdxl", (1, *grid))
    plain = run(unet, inputs)
    with gensparse.applied(unet, method) as handle:
        out = run(unet, inputs)
        report = handle.report()
    assert report["dense"] == {}
    assert report["sparse"] == len([n for n in unet.attn_processors if ".attn1." in n])
    assert "ScaleFusion" in report["backend"]
    assert torch.isfinite(out).all()
    assert not torch.allclose(out, plain, atol=1e-3)
    assert torch.equal(run(unet, inputs), plain)


def test_convolutions_are_dilated_as_by_their_own_settings(unet):
    """The hooks' result is that of convolutions whose padding and dilation were really changed."""
    inputs = tiny_inputs("sdxl", (1, 25, 18))  # 50 x 36 latent cells: three times the native side
    model = copy.deepcopy(unet)
    for name in dilated_convs(3, 1):
        conv = model.get_submodule(name)
        conv.dilation = conv.padding = (3, 3)
    with gensparse.applied(model, FreeScale(dilated_steps=0)):
        expected = run(model, inputs)
    with gensparse.applied(unet, FreeScale(dilated_steps=1)) as handle:
        torch.testing.assert_close(run(unet, inputs), expected, rtol=0, atol=2e-5)
        later = run(unet, {**inputs, "timestep": inputs["timestep"] - 100})
        handle.restart()
        torch.testing.assert_close(run(unet, inputs), expected, rtol=0, atol=2e-5)
    with gensparse.applied(unet, FreeScale(dilated_steps=0)) as handle:
        run(unet, inputs)
        assert torch.equal(run(unet, {**inputs, "timestep": inputs["timestep"] - 100}), later)
    with gensparse.applied(unet, FreeScale(dilated_steps=0)):
        assert not torch.allclose(run(unet, inputs), expected, atol=1e-3)


def test_freeu_acts_and_is_undone(unet):
    inputs = tiny_inputs("sdxl", (1, 8, 8))
    before, plain = state_of(unet), run(unet, inputs)
    model = copy.deepcopy(unet)
    model.enable_freeu(s1=0.6, s2=0.4, b1=1.1, b2=1.2)
    expected = run(model, inputs)
    handle = gensparse.apply(unet, FreeScale(freeu=(1.1, 1.2, 0.6, 0.4)))
    torch.testing.assert_close(run(unet, inputs), expected, rtol=0, atol=2e-5)
    handle.remove()
    assert state_of(unet) == before
    assert torch.equal(run(unet, inputs), plain)
    own = state_of(model)
    gensparse.apply(model, FreeScale(freeu=(1.3, 1.4, 0.9, 0.2))).remove()
    assert state_of(model) == own
    assert torch.equal(run(model, inputs), expected)


@pytest.mark.parametrize("where", ["mid_block.resnets.0", "down_blocks.2.attentions.0", "up_blocks.1"])
def test_an_interrupted_call_leaves_nothing(unet, where):
    inputs = tiny_inputs("sdxl", (1, 16, 24))
    before, plain = state_of(unet), run(unet, inputs)
    handle = gensparse.apply(unet, "freescale")
    expected = run(unet, inputs)

    def stop(*_):
        raise RuntimeError("stop here")

    hook = unet.get_submodule(where).register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="stop here"):
        run(unet, inputs)
    hook.remove()
    handle.restart()
    assert torch.equal(run(unet, inputs), expected)
    handle.remove()
    assert state_of(unet) == before
    assert torch.equal(run(unet, inputs), plain)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_pipeline_runs_it_at_any_size(family):
    pipe = tiny_pipeline(family)
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a cat", "height": 88, "width": 56, "num_inference_steps": 3, "output_type": "pt"}
    with gensparse.applied(pipe, "freescale:dilated_steps=0.6") as handle:
        images = [pipe(**call, generator=torch.Generator().manual_seed(2)).images for _ in range(2)]
        assert handle.report()["calls"]["dense"] == {}
    assert torch.equal(*images)
    assert torch.isfinite(images[0]).all()


# --- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fusion": "3d"}, "fusion='3d'"),
        ({"whole": "freescale"}, "whole='freescale'"),
        ({"whole": "auto"}, "whole='auto'"),
        ({"whole": "nothing"}, "unknown method"),
        ({"jitter": 1}, "jitter=1"),
        ({"dilated_steps": 1.5}, "dilated_steps=1.5"),
        ({"freeu": (1.0, 2.0)}, "freeu="),
        ({"freeu": 3}, "freeu=3"),
        ({"native": 0}, "native=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        FreeScale(**settings)


def test_models_that_do_not_fit_are_refused(unet):
    with pytest.raises(ConfigError, match="UNet"):
        gensparse.apply(tiny_denoiser("flux"), "freescale")
    for whole in ("hilo", "double_window", "psa"):
        with pytest.raises(ConfigError, match="one mask"):
            FreeScale(whole=whole, native=8).pattern(Layout.image(16, 16))
    assert "gensparse.apply" in FreeScale().pattern(Layout.image(4, 4)).reason
    odd = copy.deepcopy(unet)
    odd.mid_block.resnets[0].conv1 = torch.nn.Conv2d(32, 32, 5, padding=2)
    before = state_of(odd)
    with pytest.raises(ConfigError, match=r"mid_block\.resnets\.0\.conv1"):
        gensparse.apply(odd, "freescale")
    assert state_of(odd) == before
    gensparse.apply(odd, "freescale:dilated_steps=0").remove()


def test_a_method_as_value_becomes_text():
    method = FreeScale(whole=Neighborhood(window=(5, 3), stride=2))
    assert isinstance(method.whole, str)
    assert method == FreeScale(whole=method.whole)
