"""Methods on the cross-attention of UNets: what they must not change, and what they do to pipelines."""

import copy
import io
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

import gensparse
from gensparse.errors import ConfigError, ModelError
from gensparse.methods import (
    LPA,
    AutoStudio,
    BoxDiff,
    DisenDiff,
    Method,
    MipAdapter,
    Regional,
    SlidingWindow,
    Structured,
    Together,
    parse_method,
)
from gensparse.methods.describe import method_text
from gensparse.subjects.areas import Mask, Regions
from gensparse.subjects.calibration import calibration_loss
from gensparse.testing.tiny import tiny_inputs, tiny_pipeline
from gensparse.testing.tiny.adapters import image_adapter, image_embeds, load_image_adapter

PROMPT = "a red car and a white sheep in ink style"
LEFT = {"prompt": "a red car", "box": [0, 0, 0.5, 1]}
RIGHT = {"prompt": "a white sheep", "box": [0.5, 0, 1, 1], "negative": "a dog"}
WHOLE = {"prompt": PROMPT, "box": [0, 0, 1, 1]}


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    found = {name: tiny_pipeline(name) for name in ("sd15", "sdxl")}
    for pipe in found.values():
        pipe.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(params=["sd15", "sdxl"])
def pipe(request: pytest.FixtureRequest, pipes: dict[str, Any]) -> Any:
    found = pipes[request.param]
    yield found
    gensparse.remove(found)


@pytest.fixture(scope="module")
def plains(pipes: dict[str, Any]) -> dict[int, Tensor]:
    """The plain picture of every pipeline."""
    return {id(pipe): picture(pipe) for pipe in pipes.values()}


@pytest.fixture
def sd15(pipes: dict[str, Any]) -> Any:
    yield pipes["sd15"]
    gensparse.remove(pipes["sd15"])


def picture(pipe: Any, prompt: Any = PROMPT, steps: int = 2, **more: Any) -> Tensor:
    call = {"height": 16, "width": 24, "output_type": "latent", "guidance_scale": 4.0, **more}
    return pipe(prompt, num_inference_steps=steps, generator=torch.Generator().manual_seed(0), **call).images


def close(a: Tensor, b: Tensor, ratio: float = 1e-5) -> None:
    """Equal to within a share of the largest value; guidance and steps amplify the rounding of single layers."""
    torch.testing.assert_close(a, b, atol=ratio * max(1.0, float(b.abs().max())), rtol=0)


def differs(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() > 1e-3)


# ------------------------------------------------------------------------------------------------- nothing is changed
@pytest.mark.parametrize(
    "method",
    [
        LPA(PROMPT, window=(0, 0)),
        LPA(PROMPT, route="vanilla", window=(0, 1000)),
        Structured(PROMPT, phrases=()),
        Structured("another prompt, a cat", phrases=("a cat",)),
        Regional(regions=[LEFT], steps=0),
        BoxDiff(PROMPT, regions=[{"prompt": "car", "box": [0, 0, 1, 1]}]),
        MipAdapter(("a cat",)),
    ],
    ids=lambda method: method_text(method.to_dict())[:60],
)
def test_what_is_not_enabled_changes_no_bit(pipe: Any, plains: dict[int, Tensor], method: Method) -> None:
    plain = plains[id(pipe)]
    handle = gensparse.apply(pipe, method)
    assert torch.equal(picture(pipe), plain)
    report = handle.report()
    assert report["sparse"] == 0
    assert all(reason.startswith(method.name) for reason in report["dense"])
    handle.remove()
    assert all(type(processor) is AttnProcessor2_0 for processor in pipe.unet.attn_processors.values())


def test_one_region_over_everything_with_the_prompt_is_the_plain_picture(pipe: Any, plains: dict[int, Tensor]) -> None:
    plain = plains[id(pipe)]
    for base in (0.0, 0.3, 1.0):
        handle = gensparse.apply(pipe, Regional(regions=[WHOLE], base_weight=base), strict=True)
        close(picture(pipe), plain)
        assert handle.report()["calls"]["dense"] == {}
        assert handle.report()["sparse"] > 0
    handle.remove()
    assert torch.equal(picture(pipe), plain)


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: gensparse.apply(pipe, Regional(regions=[LEFT, RIGHT])),
        lambda pipe: gensparse.apply(pipe, LPA(PROMPT, route="lpa_full", window=(0, 1000))),
        lambda pipe: gensparse.apply(pipe, LPA(PROMPT, route="lpa_full", window=(0, 1000), mode="mask")),
        lambda pipe: gensparse.apply(pipe, Structured(PROMPT)),
        lambda pipe: gensparse.apply(pipe, Structured(PROMPT, mode="keys")),
        lambda pipe: gensparse.apply(pipe, AutoStudio([LEFT, {**RIGHT, "negative": None}], "a field")),
    ],
    ids=["regional", "lpa", "lpa-mask", "structured", "structured-keys", "autostudio"],
)
def test_methods_change_the_picture_and_are_removed_bit_for_bit(
    pipe: Any, plains: dict[int, Tensor], change: Callable[[Any], Any]
) -> None:
    plain = plains[id(pipe)]
    handle = change(pipe)
    changed = picture(pipe)
    assert changed.isfinite().all()
    assert differs(changed, plain)
    handle.remove()
    assert torch.equal(picture(pipe), plain)
    assert not pipe.unet._forward_pre_hooks


# ---------------------------------------------------------------------------------------------------------- regions
def test_the_order_of_regions_does_not_matter(sd15: Any) -> None:
    third = {"prompt": "a blue house", "box": [0.2, 0.3, 0.9, 0.8], "weight": 2.0}
    outs = []
    for regions in ([LEFT, RIGHT, third], [third, RIGHT, LEFT]):
        gensparse.apply(sd15, Regional(regions=regions))
        outs.append(picture(sd15))
    close(*outs)


def test_a_region_without_area_has_no_effect(sd15: Any) -> None:
    empty = {"prompt": "a dragon", "box": [0.4, 0.2, 0.4, 0.9]}
    outs = []
    for regions in ([LEFT, RIGHT], [LEFT, empty, RIGHT]):
        gensparse.apply(sd15, Regional(regions=regions))
        outs.append(picture(sd15))
    close(*outs)


@pytest.mark.parametrize("grid", [(8, 20), (1, 13), (17, 1), (5, 7)])
@torch.no_grad()
def test_five_overlapping_regions_on_grids_of_any_shape(sd15: Any, grid: tuple[int, int]) -> None:
    boxes = [[0, 0, 0.6, 0.6], [0.4, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.3, 0.3, 0.7, 0.7], [0.9, 0.9, 1, 1]]
    inputs = tiny_inputs("sd15", (1, *grid), batch=2, text=77)
    inputs["encoder_hidden_states"] = sd15.encode_prompt(PROMPT, "cpu", 1, False)[0].repeat(2, 1, 1)
    plain = sd15.unet(**inputs).sample
    same = [{"prompt": PROMPT, "box": box} for box in boxes]
    gensparse.apply(sd15, Regional(regions=same, guided=True), strict=True)
    close(sd15.unet(**inputs).sample, plain)  # equal prompts everywhere, however they overlap
    others = [{"prompt": f"thing number {n}", "box": box} for n, box in enumerate(boxes)]
    gensparse.apply(sd15, Regional(regions=others, guided=True), strict=True)
    out = sd15.unet(**inputs).sample
    assert out.isfinite().all()
    close(out[:1], plain[:1])
    assert differs(out[1:], plain[1:])


def test_masks_are_regions_too(sd15: Any) -> None:
    mask = torch.zeros(32, 48)
    mask[:, :24] = 1
    outs = []
    for where in ({"box": [0, 0, 0.5, 1]}, {"mask": Mask.of(mask).to_dict()}):
        gensparse.apply(sd15, Regional(regions=[{"prompt": "a red car", **where}]))
        outs.append(picture(sd15))
    assert torch.equal(*outs)


@torch.no_grad()
def test_a_region_acts_where_it_is_and_on_the_conditional_half(sd15: Any) -> None:
    inputs = tiny_inputs("sd15", (1, 6, 9), batch=4, text=77)
    model, seen = sd15.unet, {}
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    hook = model.get_submodule(name).register_forward_hook(lambda _m, _a, out: seen.update(out=out))
    model(**inputs)
    plain = seen["out"]
    gensparse.apply(sd15, Regional(regions=[LEFT], base_weight=0.0, guided=True))
    model(**inputs)
    regional = seen["out"].unflatten(1, (6, 9))
    hook.remove()
    expected = plain.unflatten(1, (6, 9))
    close(regional[:2], expected[:2], 1e-6)
    close(regional[2:, :, 4:], expected[2:, :, 4:], 1e-6)  # round(0.5 * 18 pixels) are 4.5 cells, and 4 is inside
    assert differs(regional[2:, :, :4], expected[2:, :, :4])


def test_negative_prompts_of_regions_change_the_other_half(sd15: Any) -> None:
    without = {name: value for name, value in RIGHT.items() if name != "negative"}
    outs = []
    for regions in ([LEFT, without], [LEFT, RIGHT], [LEFT, {**without, "negative": "blurred"}]):
        gensparse.apply(sd15, Regional(regions=regions))
        outs.append(picture(sd15, negative_prompt="blurred"))
    assert differs(outs[0], outs[1])
    close(outs[0], outs[2])  # the same text as everywhere


def test_without_guidance_there_is_no_other_half(sd15: Any) -> None:
    plain = picture(sd15, guidance_scale=1.0)
    gensparse.apply(sd15, Regional(regions=[WHOLE]), strict=True)
    close(picture(sd15, guidance_scale=1.0), plain)


def test_regions_of_some_steps_only(sd15: Any) -> None:
    handle = gensparse.apply(sd15, Regional(regions=[LEFT], steps=0.5))
    picture(sd15, steps=4)
    calls = handle.report()["calls"]
    assert calls["sparse"] == sum(calls["dense"].values()) > 0


def test_two_threads_at_alternating_sizes_do_not_mix_their_regions(sd15: Any) -> None:
    grids, expected = [(8, 12), (5, 7)], []
    inputs = [tiny_inputs("sd15", (1, *grid), text=77) for grid in grids]
    gensparse.apply(sd15, Regional(regions=[LEFT, RIGHT], guided=False), strict=True)
    with torch.no_grad():
        expected = [sd15.unet(**own).sample for own in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        with torch.no_grad():
            wrong.extend(index for _ in range(4) if not torch.equal(sd15.unet(**inputs[index]).sample, expected[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -------------------------------------------------------------------------------------------------- several prompts
def test_a_batch_of_several_prompts(sd15: Any) -> None:
    prompts = ("a red car and a white sheep", "one tall tree near the old house in oil style")
    for method in (
        Regional(regions=[LEFT, RIGHT]),
        Structured(prompts),
        LPA(prompts, route="lpa_full", window=(0, 1000), style_words="white, oil"),
    ):
        gensparse.apply(sd15, method, strict=True)
        both = picture(sd15, list(prompts), latents=torch.ones(2, 4, 8, 12))
        for number, prompt in enumerate(prompts):
            own = method
            if not isinstance(method, Regional):
                own = type(method).from_dict({**method.to_dict(), "prompt": prompt})
            gensparse.apply(sd15, own, strict=True)
            single = picture(sd15, prompt, latents=torch.ones(1, 4, 8, 12))
            close(both[number : number + 1], single, 1e-4)
            gensparse.apply(sd15, method, strict=True)
    handle = gensparse.apply(sd15, Structured(prompts, guided=False))
    with torch.no_grad():
        sd15.unet(**tiny_inputs("sd15", (1, 4, 6), batch=3, text=77))
    (reason,) = handle.report()["dense"]
    assert reason == "structured: it was made for 2 prompts, and the call has 3 pictures"


def test_several_pictures_per_prompt(sd15: Any) -> None:
    gensparse.apply(sd15, Structured(PROMPT), strict=True)
    noise = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    both = picture(sd15, num_images_per_prompt=2, latents=noise)
    close(both[1:], picture(sd15, latents=noise[1:]), 1e-4)


# ---------------------------------------------------------------------------------------------------- image prompts
def load(pipe: Any) -> None:
    load_image_adapter(pipe.unet)


@pytest.fixture
def prompted(sd15: Any) -> Any:
    """A copy that may keep an adapter."""
    return copy.deepcopy(sd15)


def images(count: int, rows: int = 2) -> list[Tensor]:
    (noise,) = image_embeds(count, rows)
    noise[0] = 0  # the unconditional half
    return [noise]


@pytest.mark.parametrize(("first", "masked"), [("adapter", True), ("apply", False)])
def test_image_prompts_keep_their_weights_scales_and_masks(prompted: Any, first: str, masked: bool) -> None:
    twin = copy.deepcopy(prompted)
    load(twin)
    more: dict[str, Any] = {"ip_adapter_image_embeds": images(2)}
    if masked:
        masks = torch.zeros(1, 2, 16, 24)
        masks[0, 0, :, :12], masks[0, 1, :, 12:] = 1, 1
        more["cross_attention_kwargs"] = {"ip_adapter_masks": [masks]}
    scale = [[0.4, 0.9]] if masked else 0.4
    twin.set_ip_adapter_scale(scale)
    plain = picture(twin, **more)
    method = Regional(regions=[WHOLE])
    if first == "adapter":
        load(prompted)
    handle = gensparse.apply(prompted, method)
    if first == "apply":
        load(prompted)
    prompted.set_ip_adapter_scale(scale)
    close(picture(prompted, **more), plain)
    names = list(prompted.unet.state_dict())
    assert names == list(twin.unet.state_dict())
    crossed = [p for name, p in prompted.unet.attn_processors.items() if name.endswith("attn2.processor")]
    assert all(isinstance(processor, IPAdapterAttnProcessor2_0) for processor in crossed)
    assert handle.report()["sparse"] == len(crossed)
    handle.remove()
    assert torch.equal(picture(prompted, **more), plain)
    assert all(type(processor) is IPAdapterAttnProcessor2_0 for processor in crossed)
    gensparse.apply(prompted, method)
    prompted.unload_ip_adapter()
    unprompted = picture(prompted)
    gensparse.remove(prompted)
    close(picture(prompted), unprompted)
    assert all(type(processor) is AttnProcessor2_0 for processor in prompted.unet.attn_processors.values())


def test_mip_adapter_reads_the_weight_that_diffusers_drops(prompted: Any, tmp_path: Path) -> None:
    weights = image_adapter(prompted.unet)
    flat = {f"{part}.{name}": value for part, values in weights.items() for name, value in values.items()}
    file = tmp_path / "model_sdxl.safetensors"
    save_file(flat, file)
    prompted.load_ip_adapter(str(tmp_path), subfolder="", weight_name=file.name, image_encoder_folder=None)
    prompted.set_ip_adapter_scale(0.75)
    more = {"ip_adapter_image_embeds": images(2)}
    plain = picture(prompted, **more)
    outs = {}
    for name, settings in {"tuned": {"weights": str(file)}, "free": {}}.items():
        handle = gensparse.apply(prompted, MipAdapter(("cat", "dog"), **settings), strict=True)
        outs[name] = picture(prompted, **more)
        assert handle.report()["calls"]["dense"] == {}
    assert differs(outs["tuned"], outs["free"])
    assert differs(outs["free"], plain)
    gensparse.apply(prompted, MipAdapter(("cat",)))
    one = picture(prompted, ip_adapter_image_embeds=images(1))
    gensparse.remove(prompted)
    close(one, picture(prompted, ip_adapter_image_embeds=images(1)))  # of one object nothing is left to weigh
    same = images(1)[0].expand(-1, 3, -1)
    gensparse.apply(prompted, MipAdapter(("cat", "cat", "cat")))
    close(picture(prompted, ip_adapter_image_embeds=[same]), one)
    gensparse.apply(prompted, MipAdapter(("cat",), pictures=(3,)))
    close(picture(prompted, ip_adapter_image_embeds=[same]), one)  # three equal pictures of one object
    two = {"regions": [{"prompt": "cat", "box": [0, 0, 0.5, 1]}, {"prompt": "dog", "box": [0.5, 0, 1, 1]}]}
    gensparse.apply(prompted, MipAdapter(("cat", "dog"), **two))
    assert differs(picture(prompted, **more), outs["free"])
    with pytest.raises(ConfigError, match="2 objects"):
        picture(prompted, ip_adapter_image_embeds=images(3))


def test_mip_adapter_refuses_other_checkpoints(prompted: Any, tmp_path: Path) -> None:
    plain, wrong = tmp_path / "plain.safetensors", tmp_path / "wrong.safetensors"
    save_file({"ip_adapter.1.to_k_ip.weight": torch.zeros(2, 2)}, plain)
    save_file({"ip_adapter.1.text_to_weight.weight": torch.zeros(1, 3)}, wrong)
    with pytest.raises(ModelError, match="no text_to_weight"):
        gensparse.apply(prompted, MipAdapter(("cat",), weights=str(plain)))
    with pytest.raises(ConfigError, match="fits no layer"):
        gensparse.apply(prompted, MipAdapter(("cat",), weights=str(wrong)))
    assert not prompted.unet._forward_pre_hooks
    with pytest.raises(ModelError, match=r"no \.safetensors file"):
        gensparse.apply(prompted, MipAdapter(("cat",), weights="./model_sdxl.bin"))


def test_autostudio_with_image_prompts(prompted: Any) -> None:
    objects = [{"prompt": "a cat", "box": [0, 0, 0.5, 1], "subject": "1"}]
    objects += [{"prompt": "a dog", "box": [0.5, 0.2, 1, 1], "subject": "2"}]
    method = AutoStudio(objects, "a field", parallel_steps=1)
    assert method.prompt == "a field with a cat, a dog,"
    plain = picture(prompted, method.prompt)
    load(prompted)
    more = {"ip_adapter_image_embeds": images(2)}
    handle = gensparse.apply(prompted, method, strict=True)
    drawn = picture(prompted, method.prompt, **more)
    assert handle.report()["calls"]["dense"] == {}
    gensparse.apply(prompted, AutoStudio(objects, "a field", parallel_steps=0), strict=True)
    close(picture(prompted, method.prompt, **more), plain)  # switched off: no image prompt either
    gensparse.apply(prompted, AutoStudio(objects, "a field", (False, False), parallel_steps=1), strict=True)
    without = picture(prompted, method.prompt, **more)
    assert differs(drawn, without)
    twice = [{**item, "subject": "1"} for item in objects] + [
        {"prompt": "a hat", "box": [0, 0, 1, 1], "subject": "1-1"}
    ]
    assert AutoStudio(twice, "a field").prompt == "a field with 2a cat,"


# --------------------------------------------------------------------------------------------------------- survival
def test_what_users_do_to_the_model(prompted: Any) -> None:
    method = Regional(regions=[LEFT, RIGHT])
    gensparse.apply(prompted, method, strict=True)
    regional = picture(prompted)
    clone, grouped, compiled = (copy.deepcopy(prompted.unet) for _ in range(3))
    buffer = io.BytesIO()
    pickle.dump(prompted.unet, buffer)
    prompted.unet.fuse_qkv_projections()
    close(picture(prompted), regional, 1e-4)
    prompted.unet.unfuse_qkv_projections()
    close(picture(prompted), regional)
    cpu_offload(prompted.unet, execution_device="cpu")
    close(picture(prompted), regional)
    with torch.no_grad():
        inputs = tiny_inputs("sd15", (1, 4, 6), text=77)
        expected = clone(**inputs).sample
        apply_group_offloading(grouped, onload_device=torch.device("cpu"), offload_type="leaf_level")
        assert torch.equal(grouped(**inputs).sample, expected)
        assert gensparse.compile_blocks(compiled, backend="eager") > 0
        close(compiled(**inputs).sample, expected)
        torch.compiler.reset()
    gensparse.remove(prompted)
    gensparse.remove(clone)
    assert all(type(processor) is AttnProcessor2_0 for processor in clone.attn_processors.values())
    buffer.seek(0)
    gensparse.remove(pickle.load(buffer))


def test_a_lora_acts_on_the_texts_of_regions_too(prompted: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        prompted.unet.add_adapter(
            LoraConfig(r=4, init_lora_weights=False, target_modules=["to_k", "to_v", "to_q"]), adapter_name="one"
        )
    plain = picture(prompted)
    gensparse.apply(prompted, Regional(regions=[WHOLE]), strict=True)
    close(picture(prompted), plain, 1e-4)
    prompted.unet.disable_adapters()
    assert differs(picture(prompted), plain)


def test_masks_over_the_text_are_kept(sd15: Any) -> None:
    inputs = tiny_inputs("sd15", (1, 5, 7), text=77)
    inputs["encoder_attention_mask"] = (torch.arange(77) < 9).float().expand(2, -1)
    with torch.no_grad():
        masked = sd15.unet(**inputs).sample
        words = LPA(PROMPT, route="lpa_full", window=(0, 1000), style_words=(), content_words=())
        gensparse.apply(sd15, words)
        assert torch.equal(sd15.unet(**inputs).sample, masked)
        gensparse.apply(sd15, Regional(regions=[{"prompt": "x", "box": [0, 0, 0, 0]}], base_weight=0.0))
        close(sd15.unet(**inputs).sample, masked)


def test_together_with_a_window_and_with_each_other(sd15: Any) -> None:
    parts = (
        SlidingWindow(radius=2),
        LPA(PROMPT, route="lpa_full", window=(0, 1000)),
        Structured(PROMPT),
        Regional(regions=[LEFT, RIGHT]),
    )
    whole = Together(parts)
    assert parse_method(method_text(whole.to_dict())) == whole == Method.from_dict(whole.to_dict())
    assert parse_method("together:sliding_window:radius=2;disendiff") == Together((parts[0], DisenDiff()))
    handle = gensparse.apply(sd15, whole, strict=True)
    everything = picture(sd15)
    report = handle.report()
    assert report["sparse"] == len(sd15.unet.attn_processors)
    assert report["density"] < 1
    for left_out in parts:
        gensparse.apply(sd15, Together(tuple(part for part in parts if part is not left_out)), strict=True)
        assert differs(picture(sd15), everything), left_out
    gensparse.apply(sd15, Together((parts[0], Regional(regions=[WHOLE]))), strict=True)
    both = picture(sd15)
    gensparse.apply(sd15, parts[0], strict=True)
    close(picture(sd15), both)
    with pytest.raises(ConfigError, match="act on the same attention"):
        gensparse.apply(sd15, Together((parts[0], SlidingWindow(radius=1))))
    gensparse.apply(sd15, Together((Regional(regions=[LEFT]), AutoStudio([LEFT]))))
    with pytest.raises(ConfigError, match="couple"):
        picture(sd15)


# ------------------------------------------------------------------------------------------------------ maps and moves
def test_boxdiff_moves_latents_towards_smaller_losses(sd15: Any) -> None:
    regions = [{"prompt": "car", "box": [0, 0, 0.5, 0.5]}, {"prompt": "white sheep", "box": [0.5, 0.5, 1, 1]}]
    plain = picture(sd15, height=32, width=32)
    handle = gensparse.apply(sd15, BoxDiff(PROMPT, regions=regions, refine=1))
    moved = picture(sd15, height=32, width=32, callback_on_step_end=handle.on_step_end)
    assert moved.isfinite().all()
    assert differs(moved, plain)
    assert torch.equal(picture(sd15, height=32, width=32), plain)  # nothing without the callback
    sd15.scheduler.set_timesteps(2)
    text = sd15.encode_prompt(PROMPT, "cpu", 1, False)[0]
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    guiding = handle._attachments[0].loaded
    before = guiding._move(sd15, noise, 0, {"encoder_hidden_states": text}, 0.0)
    assert torch.equal(before[0], noise)
    started = handle.start(sd15, noise, encoder_hidden_states=text)
    assert differs(started, noise)
    gensparse.apply(sd15, BoxDiff(PROMPT, regions=regions, coarseness=16))
    with pytest.raises(ConfigError, match="No cross-attention layer"):
        gensparse.apply(sd15, BoxDiff(PROMPT, regions=regions, coarseness=16)).start(
            sd15, noise, encoder_hidden_states=text
        )
    with pytest.raises(ConfigError, match="does not stand in the prompt"):
        gensparse.apply(sd15, BoxDiff(PROMPT, regions=[{"prompt": "cow", "box": [0, 0, 1, 1]}]))


def test_disendiff_keeps_maps_with_gradients_and_the_output(prompted: Any) -> None:
    model = prompted.unet
    inputs = tiny_inputs("sd15", (1, 16, 16), text=9)
    with torch.no_grad():
        plain = model(**inputs).sample
    handle = gensparse.apply(model, DisenDiff(), strict=True)
    out = model(**inputs).sample
    close(out, plain)
    maps = handle.maps()
    assert maps.shape[1:] == (2, 2, 16, 9)
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))
    bind, separate = calibration_loss(maps[:, 0], [(2, 3), (5, 6)])
    (bind + separate).backward()
    key = model.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.to_k").weight
    assert key.grad is not None
    assert key.grad.abs().max() > 0
    with pytest.raises(ConfigError, match="No cross-attention layer"):
        handle.maps()


# ---------------------------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize(
    "method",
    [
        Structured(PROMPT, ("a red car", "a white sheep"), "keys"),
        Structured(("a cat on a mat", "a dog"), (("a cat", "a mat"), ())),
        LPA(PROMPT, "lpa_full", (200, 700), "ink", ("car", "sheep"), "naive", "mask", True, guided=False),
        Regional([LEFT, RIGHT], 0.5, 4, "a field, green", 2, 3, 64, "clear:radius=4"),
        Regional([{"prompt": "x", "mask": Mask.of(torch.eye(3)).to_dict(), "weight": 2}]),
        MipAdapter("cat, dog", "owner/name", (1, 2), [LEFT, RIGHT]),
        AutoStudio([LEFT], "a field", (True,), (1.0, 0.5), 5),
        BoxDiff(PROMPT, [LEFT], 3, 5.0, 0.1, 2, False, 0, 2),
        DisenDiff(2, False),
    ],
    ids=lambda method: method.name,
)
def test_settings_are_written_and_read(method: Method) -> None:
    assert Method.from_dict(method.to_dict()) == method
    assert parse_method(method_text(method.to_dict())) == method
    assert hash(Method.from_dict(method.to_dict())) == hash(method)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Structured(PROMPT, ("a blue car",)), "does not stand in the prompt"),
        (lambda: Structured(5), "pass the prompt"),
        (lambda: LPA(window=(5, 1)), "first and last timestep"),
        (lambda: LPA(route="late"), "lpa_late_only"),
        (lambda: Regional(regions=[{"prompt": "x"}]), "a box or a mask"),
        (lambda: Regional(regions=[{"promt": "x"}]), "did you mean prompt"),
        (lambda: Regional(regions=[{"prompt": "x", "box": [0.5, 0, 0.4, 1]}]), "x0 <= x1"),
        (lambda: Regional(regions=[{"prompt": "x", "mask": "/etc/passwd"}]), "only a layout file may name pictures"),
        (lambda: Regional(base_weight=1.5), "from 0 to 1"),
        (lambda: Regional(window="regional"), "is not allowed"),
        (lambda: MipAdapter("cat", pictures=(1, 2)), "1 objects"),
        (lambda: AutoStudio([LEFT], present=(True, False)), "per object"),
        (lambda: BoxDiff(scale=0), "above 0"),
        (lambda: DisenDiff(coarseness=0), "at least 1"),
        (lambda: Together(()), "list of methods"),
        (lambda: Together(("schedule",)), "cannot act beside"),
        (lambda: parse_method('regional:{"regions": ['), "no JSON"),
        (lambda: gensparse.apply(None, "customcontrast"), "customcontrast is not available"),
    ],
)
def test_what_is_not_allowed_is_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_what_a_model_cannot_do_is_named(sd15: Any) -> None:
    for method, message in (
        (Regional(regions=[LEFT]), "whole pipeline"),
        (Structured(PROMPT), "whole pipeline"),
        (Structured(), "pass prompt="),
        (Regional(), "has no regions"),
    ):
        with pytest.raises(ConfigError, match=message):
            gensparse.apply(sd15.unet, method)
    assert not sd15.unet._forward_pre_hooks
    kolors = copy.deepcopy(sd15)
    kolors.unet.register_to_config(encoder_hid_dim_type="text_proj")
    for method in (LPA(PROMPT), Regional(regions=[LEFT])):
        with pytest.raises(ConfigError, match="as Kolors and Kandinsky do"):
            gensparse.apply(kolors, method)
    flux = tiny_pipeline("flux")
    with pytest.raises(ConfigError, match=r"knows UNets such as SDXL, not FLUX\.1"):
        gensparse.apply(flux, LPA(PROMPT))


def test_layout_files(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("L", (6, 4), 255).save(tmp_path / "all.png")
    file = tmp_path / "scene.json"
    file.write_text('[{"subject": "cat", "box": [0, 0, 0.5, 1]}, {"prompt": "a dog", "mask": "all.png", "weight": 2}]')
    regions = Regions.of(str(file))
    assert [item.prompt for item in regions] == ["cat", "a dog"]
    masks = regions.masks((3, 5))
    assert masks[0].tolist() == [[1, 1, 0, 0, 0]] * 3  # round(2.5) is 2
    assert (masks[1] == 2).all()
    assert Regions.of(regions.to_list()) == regions
    for text, message in (
        ('[{"subject": "cat", "mask": "../all.png"}]', "only a layout file may name pictures, those beside"),
        ('[{"subject": "cat", "mask": "none.png"}]', "cannot be read"),
        ("{", "no JSON"),
        ('{"subject": "cat"}', "pass a list"),
        ("[5]", "Region 1"),
        ("[]", "1 to 64"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            Regions.of(file)
