"""The tiny video families: whole pipelines, and denoisers in which attention and text count."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from gensparse.testing.tiny import PIPELINES, VIDEOS, tiny_call, tiny_denoiser, tiny_inputs, tiny_pipeline

GRIDS = [(3, 4, 5), (1, 5, 7), (2, 1, 3)]

# where latents have their channels; LTX packs the grid into one axis
CHANNELS = {"cogvideox": 2, "kandinsky5": 4, "ltx": 2}

# families that are told which of their text is padding
MASKED = ["hunyuan_video", "hunyuan_video15", "ltx", "mochi"]


@cache
def denoiser(name: str, **options: Any) -> nn.Module:
    return tiny_denoiser(name, **options)


def output(model: nn.Module, arguments: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**arguments).sample


def channels_last(name: str, latents: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    """A view [B, F, H, W, C] of latents."""
    latents = latents.movedim(CHANNELS.get(name, 1), -1)
    return latents.unflatten(1, grid) if latents.ndim == 3 else latents


def with_changed_corner(name: str, arguments: dict[str, Any], grid: tuple[int, int, int]) -> dict[str, Any]:
    """The arguments with other latents in the last cell of the grid."""
    latents = arguments["hidden_states"].clone()
    channels_last(name, latents, grid)[:, -1, -1, -1] += 3.0
    return {**arguments, "hidden_states": latents}


def first_cell(name: str, latents: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    return channels_last(name, latents, grid)[:, 0, 0, 0]


def run(pipe: Any, name: str, **more: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(**{**tiny_call(name), **more}, generator=torch.Generator().manual_seed(0)).frames


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "x".join(map(str, grid)))
@pytest.mark.parametrize("name", VIDEOS)
def test_denoiser_takes_any_grid(name: str, grid: tuple[int, int, int]) -> None:
    arguments = tiny_inputs(name, grid, text=3, batch=3)
    out = channels_last(name, output(denoiser(name), arguments), grid)
    assert out.isfinite().all()
    assert out.shape[:-1] == channels_last(name, arguments["hidden_states"], grid).shape[:-1]


@pytest.mark.parametrize("name", VIDEOS)
def test_tokens_hear_each_other(name: str) -> None:
    # only attention carries anything from one token to another
    grid = (3, 4, 5)
    arguments = tiny_inputs(name, grid)
    one, other = (output(denoiser(name), each) for each in (arguments, with_changed_corner(name, arguments, grid)))
    change = (first_cell(name, one, grid) - first_cell(name, other, grid)).abs().amax(dim=-1)
    assert (change > 1e-3 * one.std()).all()


@pytest.mark.parametrize("name", VIDEOS)
def test_video_hears_the_text(name: str) -> None:
    arguments = tiny_inputs(name, (2, 3, 3))
    reversed_text = {**arguments, "encoder_hidden_states": arguments["encoder_hidden_states"].flip(-1)}
    one, other = (output(denoiser(name), each) for each in (arguments, reversed_text))
    assert ((one - other).abs().flatten(1).amax(dim=1) > 1e-3 * one.std()).all()


@pytest.mark.parametrize("name", MASKED)
def test_padding_of_the_text_is_not_heard(name: str) -> None:
    arguments = tiny_inputs(name, (1, 3, 4))
    text, mask = arguments["encoder_hidden_states"], arguments["encoder_attention_mask"]
    assert mask.sum(dim=1).tolist() == [5, 3]
    chosen = tiny_inputs(name, (1, 1, 1), lengths=(2, 5))["encoder_attention_mask"]
    assert chosen.sum(dim=1).tolist() == [2, 5]
    other_padding = {**arguments, "encoder_hidden_states": torch.where(mask[..., None], text, text + 1.0)}
    outputs = [output(denoiser(name), each) for each in (arguments, other_padding)]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)


def test_inputs_depend_on_their_seed_alone() -> None:
    for name in VIDEOS:
        one, same, other = (tiny_inputs(name, (1, 2, 3), seed=seed)["hidden_states"] for seed in (0, 0, 1))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)


def test_image_is_heard_where_there_is_one() -> None:
    model = denoiser("hunyuan_video15")
    without, with_image = (tiny_inputs("hunyuan_video15", (1, 3, 4), image=image) for image in (False, True))
    assert (output(model, without) - output(model, with_image)).abs().max() > 1e-3

    arguments = tiny_inputs("wan_i2v", (1, 3, 4))
    other = {**arguments, "encoder_hidden_states_image": -arguments["encoder_hidden_states_image"]}
    assert (output(denoiser("wan_i2v"), arguments) - output(denoiser("wan_i2v"), other)).abs().max() > 1e-3


def test_control_is_heard() -> None:
    arguments = tiny_inputs("wan_vace", (1, 3, 4))
    other = {**arguments, "control_hidden_states": -arguments["control_hidden_states"]}
    assert (output(denoiser("wan_vace"), arguments) - output(denoiser("wan_vace"), other)).abs().max() > 1e-3


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "x".join(map(str, grid)))
def test_cogvideox_without_rotary_positions_takes_any_grid(grid: tuple[int, int, int]) -> None:
    arguments = tiny_inputs("cogvideox", grid, text=4, rotary=False)
    assert arguments["image_rotary_emb"] is None
    assert output(denoiser("cogvideox", rotary=False, text=4), arguments).isfinite().all()


def test_skyreels_can_be_causal_over_blocks_of_frames() -> None:
    grid = (4, 2, 3)
    arguments = tiny_inputs("skyreels", grid)
    changed = with_changed_corner("skyreels", arguments, grid)
    one, other = (output(denoiser("skyreels", num_frame_per_block=2), each) for each in (arguments, changed))
    torch.testing.assert_close(one[:, :, :2], other[:, :, :2], atol=1e-6, rtol=0)
    assert (one[:, :, 2] - other[:, :, 2]).abs().max() > 1e-3


@pytest.mark.parametrize("name", sorted(PIPELINES & VIDEOS.keys()))
def test_pipeline_makes_a_video_that_follows_its_text(name: str) -> None:
    pipe, call = tiny_pipeline(name), tiny_call(name)
    video = run(pipe, name, output_type="pt")
    assert video.shape == (1, call["num_frames"], 3, call["height"], call["width"])
    assert video.isfinite().all()
    assert video.std() > 0.01

    latents = run(pipe, name)
    words = {"prompt": "two dogs"} if "prompt" in call else {"prompt_embeds": -call["prompt_embeds"]}
    assert (run(pipe, name, **words) - latents).abs().max() > 1e-3
    torch.testing.assert_close(run(pipe, name), latents, atol=0, rtol=0)


def test_cogvideox_pipeline_without_rotary_positions() -> None:
    latents = run(tiny_pipeline("cogvideox", rotary=False), "cogvideox")
    assert latents.isfinite().all()


def test_wan22_uses_both_denoisers() -> None:
    pipe, calls = tiny_pipeline("wan22"), []
    for part in ("transformer", "transformer_2"):
        getattr(pipe, part).register_forward_pre_hook(lambda module, args, part=part: calls.append(part))
    run(pipe, "wan22")
    assert calls == ["transformer", "transformer", "transformer_2", "transformer_2"]
    assert not torch.equal(pipe.transformer.proj_out.weight, pipe.transformer_2.proj_out.weight)
