"""HiDiffusion on tiny UNets and pipelines: sizes inside, steps, all kinds of runs, ControlNets, copies, removal."""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLInpaintPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn

import gensparse
from gensparse.attach import Handle
from gensparse.errors import ConfigError
from gensparse.highres import unet_resample as resample
from gensparse.methods import HiDiffusion
from gensparse.methods.raunet import variant_of, why_not
from gensparse.testing.tiny import tiny_call, tiny_denoiser, tiny_inputs, tiny_pipeline

STEPS = 10
Size = tuple[int, int]


@cache
def unet(name: str, native: int = 16) -> nn.Module:
    model = tiny_denoiser(name)
    model.register_to_config(sample_size=native)
    return model


def arguments(name: str, size: Size) -> dict[str, Any]:
    """Arguments of a denoiser for a latent of any size, odd ones too."""
    sample = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(3))
    return {**tiny_inputs(name, (1, 4, 4), batch=1), "sample": sample}


@torch.no_grad()
def run(model: nn.Module, call: dict[str, Any], steps: int = STEPS) -> list[Tensor]:
    """Outputs of a run of denoiser calls whose timesteps fall; copies of the arguments."""
    given = [{**call, "timestep": torch.tensor(900 - 10 * step)} for step in range(steps)]
    return [model(**one).sample for one in given]


@contextmanager
def put(model: nn.Module, method: Any, **settings: Any) -> Iterator[Handle]:
    handle = gensparse.apply(model, method, **settings)
    handle.restart(STEPS)
    try:
        yield handle
    finally:
        handle.remove()


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# name, latent for a training size of 8 x 8, steps with a reduced convolution, steps with a reduced block
SIZES = [
    ("sdxl", (31, 43), [0], [1, 2, 3]),
    ("sdxl", (32, 37), [0, 1, 2], [0, 1, 2, 3, 4, 5, 6]),
    ("sd15", (23, 18), [0, 1, 2, 3], []),
    ("sd15", (35, 32), [0, 1, 2, 3, 4, 5, 6], [0, 1, 2]),
]


# ---------------------------------------------------------------------------------------------------------------- model
@pytest.mark.parametrize(("name", "size", "conv", "block"), SIZES)
def test_sizes_inside_are_the_computed_ones_and_other_steps_are_the_plain_model(
    name: str, size: Size, conv: list[int], block: list[int]
) -> None:
    model, call, seen = unet(name, native=8), arguments(name, size), []
    plain = run(model, call)

    def look(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.append([tuple(x.shape[-2:]) for x in kwargs["res_hidden_states_tuple"]])

    watch = [up.register_forward_pre_hook(look, with_kwargs=True) for up in model.up_blocks]
    with put(model, HiDiffusion(windows=False)) as handle:
        outputs, report = run(model, call), handle.report()
    for one in watch:
        one.remove()
    assert report["raunet"] == {"variant": name, "conv": conv, "block": block}
    assert report["sparse"] == 0
    pairs, level = [len(down.resnets) for down in model.down_blocks], 0 if name == "sd15" else 1
    for step, (got, expected) in enumerate(zip(outputs, plain, strict=True)):
        sizes = resample.levels(size, pairs, conv=level if step in conv else None, block=1 if step in block else None)
        ups = seen[3 * step : 3 * step + 3]
        assert [one for up in reversed(ups) for one in up] == list(sizes.skips)
        assert torch.equal(got, expected) == (step not in conv and step not in block)
        assert got.shape == expected.shape
        assert bool(got.isfinite().all())


@pytest.mark.parametrize(
    ("name", "size", "sites"), [("sdxl", (30, 44), 3), ("sdxl", (27, 46), 3), ("sd15", (23, 18), 3)]
)
def test_windows_fit_the_sizes_of_every_step(name: str, size: Size, sites: int) -> None:
    model, call = unet(name), arguments(name, size)
    for draw in ("block", "step"):
        with put(model, HiDiffusion(draw=draw), strict=True) as handle:
            for step, output in enumerate(run(model, call)):
                assert bool(output.isfinite().all()), step
            report = handle.report()
        assert report["sparse"] == sites
        assert list(report["dense"]) == ["hidiffusion leaves this block dense"]
        assert report["density"] == pytest.approx(0.25, abs=0.03)
        assert report["calls"]["sparse"] == sites * STEPS


def test_windows_alone_are_msw_msa_and_seeds_draw_them() -> None:
    model, call = unet("sdxl"), arguments("sdxl", (20, 36))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with put(model, HiDiffusion(raunet=False, seed=4)):
        own = run(model, call, 3)
    with put(model, "msw_msa:seed=4"):
        assert all(torch.equal(a, b) for a, b in zip(own, run(model, call, 3), strict=True))
    results = []
    for seed in (4, 4, 5):
        with put(model, HiDiffusion(seed=seed)):
            results.append(torch.stack(run(model, call, 4)))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_removed_is_as_never_applied() -> None:
    model, call = tiny_denoiser("sdxl"), arguments("sdxl", (18, 26))
    before, keys, classes = run(model, call, 2), list(model.state_dict()), [type(m) for m in model.modules()]
    forwards = [m.forward.__func__ for m in model.modules()]
    for _ in range(2):
        handle = gensparse.apply(model, HiDiffusion())
        handle.restart(2)
        assert hooks(model) == 2 + 2 * 2 + 1
        assert list(model.state_dict()) == keys
        assert [type(m) for m in model.modules()] == classes
        assert [m.forward.__func__ for m in model.modules()] == forwards
        assert not torch.equal(run(model, call, 2)[0], before[0])
    handle.remove()
    assert hooks(model) == 0
    assert all(torch.equal(a, b) for a, b in zip(run(model, call, 2), before, strict=True))


def test_runs_of_other_sizes_follow_each_other() -> None:
    """Nothing sticks: a picture of twice the size, then a smaller one, is what a fresh model makes of it."""
    model = unet("sdxl", native=8)
    sizes = [(16, 24), (33, 32), (16, 24)]
    with put(model, HiDiffusion()) as handle:
        outputs = []
        for size in sizes:
            handle.restart(STEPS)
            outputs.append(torch.stack(run(model, arguments("sdxl", size))))
            assert handle.report()["raunet"]["conv"] == ([0, 1, 2] if size == (33, 32) else [0])
    assert torch.equal(outputs[0], outputs[2])


def test_a_copied_model_has_hooks_of_its_own() -> None:
    model, call = tiny_denoiser("sdxl"), arguments("sdxl", (18, 26))
    plain = run(model, call, 2)
    handle = gensparse.apply(model, HiDiffusion())
    handle.restart(2)
    expected, twin = run(model, call, 2), copy.deepcopy(model)
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(run(model, call, 2), plain, strict=True))
    with pytest.raises(ConfigError, match=r"restart\(steps=...\)"):
        run(twin, call, 1)
    twin.__dict__["_gensparse"].clock.restart(2)
    assert all(torch.equal(a, b) for a, b in zip(run(twin, call, 2), expected, strict=True))
    gensparse.remove(twin)
    assert hooks(twin) == 0
    assert all(torch.equal(a, b) for a, b in zip(run(twin, call, 2), plain, strict=True))


@pytest.mark.parametrize("first", ["offload", "apply"])
def test_offload_hooks_and_ours_do_not_mind_their_order(first: str) -> None:
    model, call = tiny_denoiser("sdxl"), arguments("sdxl", (18, 26))
    with put(model, HiDiffusion()):
        expected = run(model, call, 4)
    if first == "offload":
        add_hook_to_module(model, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    handle = gensparse.apply(model, HiDiffusion())
    handle.restart(STEPS)
    if first == "apply":
        add_hook_to_module(model, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    assert all(torch.equal(a, b) for a, b in zip(run(model, call, 4), expected, strict=True))


def test_an_adapter_is_fitted_to_the_features_of_the_step() -> None:
    model, size = unet("sdxl"), (36, 28)
    call, widths, draw = arguments("sdxl", size), (16, 32, 32), torch.Generator().manual_seed(1)
    plain = resample.levels(size, [1, 1, 1])
    # the first level has no attention: its residual joins behind it, the others' inside; the last is for the middle
    places = (plain.exit[0], plain.pairs[1][-1], plain.pairs[2][-1], plain.exit[-1])
    given = [
        torch.randn(1, width, *at, generator=draw) for width, at in zip((*widths, widths[-1]), places, strict=True)
    ]
    bare = run_adapted(model, call, given)
    with put(model, HiDiffusion(windows=False)):
        outputs = run_adapted(model, call, given)
    with put(model, HiDiffusion(windows=False)):
        without = run(model, call)
    assert all(bool(x.isfinite().all()) for x in outputs)
    assert [torch.equal(a, b) for a, b in zip(outputs, bare, strict=True)] == [False] * 4 + [True] * 6
    assert not any(torch.equal(a, b) for a, b in zip(outputs, without, strict=True))


@torch.no_grad()
def run_adapted(model: nn.Module, call: dict[str, Any], given: list[Tensor]) -> list[Tensor]:
    """A run in which each call takes the residuals out of a list of its own."""
    outputs = []
    for step in range(STEPS):
        own = [x.clone() for x in given]
        outputs.append(
            model(
                **{**call, "timestep": torch.tensor(900 - 10 * step)}, down_intrablock_additional_residuals=own
            ).sample
        )
    return outputs


# ------------------------------------------------------------------------------------------------------------ pipelines
def picture(pipe: Any, **call: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    settings = {"prompt": "a cat", "output_type": "pt", "generator": torch.Generator().manual_seed(0), **call}
    return pipe(**settings).images


def test_text_to_image_knows_its_steps_and_repeats_exactly() -> None:
    pipe = tiny_pipeline("sdxl")
    call = {**tiny_call("sdxl"), "height": 40, "width": 56, "num_inference_steps": 13}
    plain = picture(pipe, **call)
    with gensparse.applied(pipe, "hidiffusion", strict=True) as handle:
        first = picture(pipe, **call)
        assert handle.report()["raunet"] == {"variant": "sdxl", "conv": [0, 1], "block": [2, 3, 4]}
        short = picture(pipe, **{**call, "num_inference_steps": 4, "guidance_scale": 0.0})
        assert handle.report()["raunet"] == {"variant": "sdxl_turbo", "conv": [], "block": [0, 1]}
        assert torch.equal(picture(pipe, **call), first)
        twin = copy.deepcopy(pipe)
    assert bool(torch.cat([first, short]).isfinite().all())
    assert not torch.equal(first, plain)
    assert torch.equal(picture(pipe, **call), plain)
    assert torch.equal(picture(twin, **call), first)
    gensparse.remove(twin)
    assert torch.equal(picture(twin, **call), plain)


@pytest.mark.parametrize("scheduler", ["its own", "one that cannot tell where a run begins"])
def test_image_to_image_counts_the_steps_that_run_also_after_an_interruption(scheduler: str) -> None:
    pipe = tiny_pipeline("sd15")
    if scheduler == "its own":
        pipe.scheduler = tiny_pipeline("sdxl").scheduler
    else:
        assert not hasattr(DDIMScheduler(), "begin_index")
    change = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    given = torch.rand(1, 3, 46, 70, generator=torch.Generator().manual_seed(2))

    def stop(_pipe: Any, step: int, _time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            raise KeyboardInterrupt
        return kwargs

    with gensparse.applied(change, "hidiffusion", strict=True) as handle:
        expected = picture(change, image=given, strength=0.5, num_inference_steps=20)
        assert handle.report()["raunet"] == {"variant": "sd15", "conv": [0, 1, 2, 3], "block": []}
        with pytest.raises(KeyboardInterrupt):
            picture(change, image=given, strength=0.9, num_inference_steps=20, callback_on_step_end=stop)
        again = picture(change, image=given, strength=0.5, num_inference_steps=20)
        assert handle.report()["raunet"]["conv"] == [0, 1, 2, 3]
    assert torch.equal(again, expected)


def test_inpainting_runs_and_checkpoints_for_it_are_told_by_their_channels() -> None:
    pipe = StableDiffusionXLInpaintPipeline(**tiny_pipeline("sdxl").components)
    given = torch.rand(1, 3, 48, 72, generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(72) > 30).float().expand(1, 1, 48, 72)
    call = {"image": given, "mask_image": mask, "height": 48, "width": 72, "strength": 0.8, "num_inference_steps": 15}
    plain = picture(pipe, **call)
    with gensparse.applied(pipe, "hidiffusion", strict=True) as handle:
        assert picture(pipe, **call).isfinite().all()
        assert handle.report()["raunet"] == {"variant": "sdxl", "conv": [0], "block": [1, 2, 3]}
    with gensparse.applied(pipe, HiDiffusion(variant="sdxl_inpaint")) as handle:
        picture(pipe, **call)
        assert handle.report()["raunet"] == {"variant": "sdxl_inpaint", "conv": [], "block": [0, 1, 2, 3]}
    assert torch.equal(picture(pipe, **call), plain)


@pytest.mark.parametrize(
    ("changes", "variant"),
    [({}, "sdxl"), ({"in_channels": 9}, "sdxl_inpaint"), ({"sample_size": 64}, "sdxl_turbo")],
)
def test_checkpoints_are_told_by_their_config(changes: dict[str, Any], variant: str) -> None:
    assert variant_of(SimpleNamespace(config={**unet("sdxl").config, **changes})) == variant
    assert variant_of(SimpleNamespace(config={**unet("sd15").config, **changes})) == "sd15"


# ----------------------------------------------------------------------------------------------------------- ControlNet
def controlled(count: int) -> StableDiffusionXLControlNetPipeline:
    pipe = tiny_pipeline("sdxl")
    with torch.random.fork_rng(devices=[]):
        nets = []
        for seed in range(count):
            torch.manual_seed(seed)
            net = ControlNetModel.from_unet(pipe.unet, conditioning_channels=3, load_weights_from_unet=True)
            net.controlnet_cond_embedding = type(net.controlnet_cond_embedding)(16, 3, (8, 16))  # 2 pixels per cell
            for weight in net.parameters():
                weight.data.add_(0.05 * torch.randn_like(weight))
            nets.append(net.eval())
    parts = {**pipe.components, "controlnet": nets if count > 1 else nets[0]}
    return StableDiffusionXLControlNetPipeline(**parts)


@pytest.mark.parametrize("count", [1, 2])
def test_a_controlnet_runs_small_and_early(count: int) -> None:
    pipe, steps = controlled(count), 10
    nets = list(pipe.controlnet.nets) if count > 1 else [pipe.controlnet]
    hint = torch.rand(1, 3, 50, 82, generator=torch.Generator().manual_seed(2))
    call = {
        "image": [hint] * count if count > 1 else hint,
        "height": 50,
        "width": 82,
        "guidance_scale": 0.0,
        "num_inference_steps": steps,
        "controlnet_conditioning_scale": [0.7] * count if count > 1 else 0.7,
    }
    plain = picture(pipe, **call)
    with gensparse.applied(pipe, "hidiffusion", strict=True) as handle:
        seen: list[Size] = []
        used: list[bool] = []

        def look(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            call = inspect.signature(ControlNetModel.forward).bind(_module, *args, **kwargs).arguments
            seen.append(tuple(call["sample"].shape[-2:]))
            assert tuple(call["controlnet_cond"].shape[-2:]) == tuple(2 * length for length in seen[-1])

        def residuals(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            call = inspect.signature(UNet2DConditionModel.forward).bind(_module, *args, **kwargs).arguments
            used.append(call["mid_block_additional_residual"] is not None)
            assert (call["down_block_additional_residuals"] is not None) == used[-1]

        watch = [net.register_forward_pre_hook(look, with_kwargs=True) for net in nets]
        watch.append(pipe.unet.register_forward_pre_hook(residuals, with_kwargs=True))
        with_net = picture(pipe, **call)
        for one in watch:
            one.remove()
        # 25 x 41 cells at a training size of 16 x 16: a factor of 2.56, whole multiples of 8 and at least 8
        assert seen == [(8, 16)] * 6 * count + [(8, 8)] * 4 * count
        assert used == [True] * 6 + [False] * 4
        assert handle.report()["raunet"] == {"variant": "sdxl_controlnet", "conv": [0], "block": [1, 2, 3, 4]}
    assert bool(with_net.isfinite().all())
    assert not torch.equal(with_net, plain)
    assert sum(map(hooks, nets)) == hooks(pipe.unet) == 0
    assert torch.equal(picture(pipe, **call), plain)


def test_a_copied_pipeline_has_its_controlnet_and_a_copied_controlnet_is_free() -> None:
    pipe, hint = controlled(1), torch.rand(1, 3, 40, 72, generator=torch.Generator().manual_seed(2))
    call = {"image": hint, "height": 40, "width": 72, "num_inference_steps": 3, "guidance_scale": 0.0}
    with gensparse.applied(pipe, "hidiffusion"):
        expected, twin, alone = picture(pipe, **call), copy.deepcopy(pipe), copy.deepcopy(pipe.controlnet)
    assert torch.equal(picture(twin, **call), expected)
    assert not torch.equal(picture(pipe, **call), expected)
    gensparse.remove(twin)
    assert hooks(twin.controlnet) == hooks(twin.unet) == 0
    assert torch.equal(picture(twin, **call), picture(pipe, **call))
    sample = torch.randn(1, 4, 20, 36, generator=torch.Generator().manual_seed(4))
    given = {**tiny_inputs("sdxl", (1, 4, 4), batch=1), "sample": sample, "controlnet_cond": hint}
    with torch.no_grad():
        assert torch.equal(alone(**given).mid_block_res_sample, pipe.controlnet(**given).mid_block_res_sample)


def test_a_picture_within_the_training_size_keeps_its_controlnet() -> None:
    assert resample.controlled_size((128, 96), (128, 128)) == (128, 96)
    assert resample.controlled_size((256, 192), (128, 128)) == (128, 96)
    assert resample.controlled_size((304, 208), (128, 128)) == (128, 80)
    assert resample.controlled_size((17, 500), (16, 16)) == (8, 16)


# --------------------------------------------------------------------------------------------------------------- errors
def test_settings_that_do_nothing_or_are_unknown_are_refused() -> None:
    with pytest.raises(ConfigError, match="leave nothing to do"):
        HiDiffusion(raunet=False, windows=False)
    with pytest.raises(ConfigError, match="variant='sdxl2'"):
        HiDiffusion(variant="sdxl2")
    with pytest.raises(ConfigError, match="hidiffusion raunet=1 is not allowed"):
        HiDiffusion(raunet=1)
    with pytest.raises(ConfigError, match="hidiffusion blocks='mid_block'"):
        HiDiffusion(blocks="mid_block")


def test_models_of_other_kinds_are_refused_and_left_alone() -> None:
    flux = tiny_denoiser("flux", double_blocks=1, single_blocks=1)
    with pytest.raises(ConfigError, match="hidiffusion windows the largest attention blocks of a UNet"):
        gensparse.apply(flux, "hidiffusion")
    net = ControlNetModel.from_unet(unet("sdxl"))
    with pytest.raises(ConfigError, match="no way up"):
        gensparse.apply(net, "hidiffusion")
    for name, variant in (("sdxl", "sd15"), ("sd15", "sdxl")):
        with pytest.raises(ConfigError, match=f"so it is no {variant}"):
            gensparse.apply(unet(name), HiDiffusion(variant=variant))
        assert hooks(unet(name)) == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}, "fewer than three levels"),
        ({"down_block_types": ("DownBlock2D",) * 3}, "second level has no attention"),
        ({"down_block_types": ("DownBlock2D", "CrossAttnDownBlockMotion", "DownBlock2D")}, "CrossAttnDownBlockMotion"),
        ({"downsample_padding": 0}, "downsample_padding=0"),
        ({"sample_size": None}, "no sample_size"),
    ],
)
def test_unets_that_lack_something_are_told_what(changes: dict[str, Any], reason: str) -> None:
    model = SimpleNamespace(config={**unet("sdxl").config, **changes})
    assert reason in (why_not(model, "auto") or "")
    assert why_not(unet("sdxl"), "auto") is None


def test_a_model_that_does_not_know_its_steps_says_so() -> None:
    with gensparse.applied(unet("sdxl"), "hidiffusion"), pytest.raises(ConfigError, match="raunet=False"):
        run(unet("sdxl"), arguments("sdxl", (16, 16)), 1)
