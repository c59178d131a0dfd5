"""Regions on models with text and picture in one sequence: FLUX.1 and Stable Diffusion 3."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_files import golden_params, load
from torch import Tensor

import gensparse
from gensparse.errors import ConfigError
from gensparse.kernels import reference
from gensparse.layout import Layout
from gensparse.methods import Clear, Regional, Together
from gensparse.processors.operators import OperatorCall
from gensparse.processors.regional import RegionalAttention
from gensparse.subjects.areas import Regions
from gensparse.testing.tiny import tiny_pipeline

PROMPT = "a red car and a white sheep"
LEFT = {"prompt": "a red car", "box": [0, 0, 0.5, 1]}
RIGHT = {"prompt": "a white sheep", "box": [0.4, 0, 1, 0.7]}
WHOLE = {"prompt": PROMPT, "box": [0, 0, 1, 1]}


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    found = {name: tiny_pipeline(name) for name in ("flux", "sd3")}
    for pipe in found.values():
        pipe.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(params=["flux", "sd3"])
def pipe(request: pytest.FixtureRequest, pipes: dict[str, Any]) -> Any:
    yield pipes[request.param]
    gensparse.remove(pipes[request.param])


@pytest.fixture
def flux(pipes: dict[str, Any]) -> Any:
    yield pipes["flux"]
    gensparse.remove(pipes["flux"])


def picture(pipe: Any, prompt: Any = PROMPT, steps: int = 2, **more: Any) -> Tensor:
    call = {
        "height": 20,
        "width": 28,
        "output_type": "latent",
        "guidance_scale": 4.0,
        "max_sequence_length": 16,
        **more,
    }
    return pipe(prompt, num_inference_steps=steps, generator=torch.Generator().manual_seed(0), **call).images


def regional(*regions: dict[str, Any], **settings: Any) -> Regional:
    return Regional(regions=list(regions), **{"max_tokens": 16, "steps": 100, **settings})


def close(a: Tensor, b: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def differs(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() > 1e-3)


@pytest.mark.parametrize("base", [0.0, 0.3, 1.0])
def test_one_region_over_everything_with_the_prompt_is_the_plain_picture(pipe: Any, base: float) -> None:
    plain = picture(pipe)
    handle = gensparse.apply(pipe, regional(WHOLE, base_weight=base), strict=True)
    close(picture(pipe), plain, 2e-5)
    assert handle.report()["sparse"] > 0
    handle.remove()
    assert torch.equal(picture(pipe), plain)


def test_without_steps_no_bit_changes_and_after_the_last_one_text_is_the_prompt_alone(pipe: Any) -> None:
    plain = picture(pipe)
    gensparse.apply(pipe, regional(LEFT, RIGHT, steps=0))
    assert torch.equal(picture(pipe), plain)
    handle = gensparse.apply(pipe, regional(LEFT, RIGHT, steps=1))
    assert differs(picture(pipe), plain)
    calls = handle.report()["calls"]
    assert calls["sparse"] == calls["dense"]["regional: no regions in this step"] > 0


@pytest.mark.parametrize("base", [0.0, 0.3])
def test_regions_change_the_picture_in_any_order(pipe: Any, base: float) -> None:
    plain = picture(pipe)
    outs = []
    for regions in ((LEFT, RIGHT), (RIGHT, LEFT)):
        handle = gensparse.apply(pipe, regional(*regions, base_weight=base))
        outs.append(picture(pipe))
        assert handle.report()["density"] > 0
    close(*outs, 2e-5)
    assert differs(outs[0], plain)


def test_a_region_without_area_and_a_background_prompt(flux: Any) -> None:
    empty = {"prompt": "a dragon", "box": [0.2, 0.3, 0.9, 0.3]}
    outs = {}
    for name, method in {
        "two": regional(LEFT, RIGHT),
        "empty": regional(LEFT, empty, RIGHT),
        "same": regional(LEFT, RIGHT, background=PROMPT),
        "other": regional(LEFT, RIGHT, background="the sea"),
    }.items():
        gensparse.apply(flux, method, strict=True)
        outs[name] = picture(flux)
    close(outs["empty"], outs["two"])
    close(outs["same"], outs["two"])
    assert differs(outs["other"], outs["two"])


def test_blocks_without_regions_read_the_whole_prompt(flux: Any) -> None:
    outs = [picture(flux)]
    for double, single in ((1, 1), (1, 2), (2, 1)):
        gensparse.apply(flux, regional(LEFT, RIGHT, double_interval=double, single_interval=single), strict=True)
        outs.append(picture(flux))
    # the only block of a kind has number 0, which is a multiple of every interval
    close(outs[1], outs[2])
    close(outs[1], outs[3])
    from gensparse.methods import Place

    method = regional(LEFT, double_interval=2)
    kinds = [method.kind(Place("joint", n, 4, 2, f"transformer_blocks.{n}.attn")) for n in range(3)]
    assert kinds == [True, False, True]


def test_the_negative_call_of_true_guidance_is_plain(flux: Any) -> None:
    more = {"negative_prompt": "a dog", "true_cfg_scale": 3.0}
    plain = picture(flux, **more)
    handle = gensparse.apply(flux, regional(WHOLE))
    close(picture(flux, **more), plain, 1e-4)
    calls = handle.report()["calls"]
    assert calls["sparse"] == sum(calls["dense"].values()) > 0


def test_a_batch_of_prompts(pipe: Any) -> None:
    prompts = [PROMPT, "an old house"]
    gensparse.apply(pipe, regional(LEFT, RIGHT), strict=True)
    shape = (2, 35, 16) if hasattr(pipe, "text_encoder_2") and not hasattr(pipe, "text_encoder_3") else (2, 4, 10, 14)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    both = picture(pipe, prompts, latents=noise)
    for number, prompt in enumerate(prompts):
        one = slice(number, number + 1)
        close(both[one], picture(pipe, prompt, latents=noise[one]), 1e-4)


def test_a_window_inside_regions(flux: Any) -> None:
    gensparse.apply(flux, regional(LEFT, RIGHT), strict=True)
    whole = picture(flux)
    gensparse.apply(flux, regional(LEFT, RIGHT, window=Clear(radius=100)), strict=True)
    close(picture(flux), whole)
    handle = gensparse.apply(flux, regional(LEFT, RIGHT, window="clear:radius=2"), strict=True)
    assert differs(picture(flux), whole)
    assert handle.report()["density"] < 1


def test_together_on_a_joint_model_regions_are_the_method_of_the_sequence(flux: Any) -> None:
    gensparse.apply(flux, regional(LEFT), strict=True)
    alone = picture(flux)
    gensparse.apply(flux, Together((regional(LEFT),)), strict=True)
    assert torch.equal(picture(flux), alone)
    with pytest.raises(ConfigError, match="act on the same attention"):
        gensparse.apply(flux, Together((regional(LEFT), Clear())))


def test_what_a_model_cannot_do_is_named(pipes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"joint attention of FLUX\.1"):
        gensparse.apply(pipes["sd3"], regional(LEFT, window="clear"))
    with pytest.raises(ConfigError, match="leave 'negative' out"):
        gensparse.apply(pipes["flux"], regional({**LEFT, "negative": "a dog"}))
    with pytest.raises(ConfigError, match="take another method"):
        gensparse.apply(tiny_pipeline("pixart"), regional(LEFT))


@pytest.mark.parametrize("file", golden_params("regional-prompting", kinds=["flux_mask"]))
def test_published_masks_through_the_operator(file: Path) -> None:
    kind, arrays = load(file)
    assert kind == "flux_mask"
    height, width = arrays["image_size"].tolist()
    grid = tuple(arrays["token_grid"].tolist())
    boxes = [(x0 / width, y0 / height, x1 / width, y1 / height) for x0, y0, x1, y1 in arrays["regions_xyxy"].tolist()]
    areas = Regions.of([{"prompt": "x", "box": box} for box in boxes])
    np.testing.assert_array_equal(areas.masks((height, width)), arrays["region_masks"])
    texts = (int(arrays["text_len"]),) * len(areas)
    operator = RegionalAttention(areas, (height, width), texts, False, 0, 0.0)
    layout = Layout.image(*grid, text=sum(texts))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, layout.tokens, 3, 8, generator=generator) for _ in range(3))
    want, _ = reference.attend(q, k, v, torch.from_numpy(arrays["expected_mask"]))
    call = OperatorCall(layout, None, None, None, 0, 0, lambda: q)
    close(operator.attend(q, k, v, call), want)
    share = arrays["expected_mask"].mean()
    assert abs(operator.density(layout) - share) < 1e-6
