"""Golden vectors of HiDiffusion: its resampling, windows and intervals, and a whole UNet through an applied method."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from golden_files import GoldenError, folder_files, golden_params, golden_root, load
from torch import nn

import gensparse
from gensparse.highres import unet_resample as raunet
from gensparse.layout import Layout
from gensparse.methods import At, HiDiffusion
from gensparse.patterns import MSW

Arrays = dict[str, np.ndarray]

STEPS, TIME, DRAWN = 10, 500, 2  # of the stored UNet: steps of the run, timestep of all calls, number of the fixed roll
NATIVE = {"sd15": 64, "sdxl": 128}
TURBO_LATENT = 128
INTERVAL = re.compile(r"(?P<model>[a-z0-9]+?)_n(?P<n>\d+)(_lat(?P<lat>\d+))?_(?P<kind>conv|block)_T(?P<t>[12])")


def t(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array))


def close(name: str, got: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-4, err_msg=name)


def cases(arrays: Arrays) -> dict[str, Arrays]:
    """<case>_<name> -> {case: {name: array}}."""
    found: dict[str, Arrays] = {}
    for name, array in arrays.items():
        found.setdefault(name.split("_", 1)[0], {})[name.split("_", 1)[1]] = array
    return found


def check_resample(arrays: Arrays) -> None:
    for case, own in cases(arrays).items():
        x, weight, bias = (t(own[name]) for name in ("x", "weight", "bias"))
        small, size = raunet.block_rad(x), tuple(x.shape[-2:])
        once, plain = raunet.conv_rad(x, weight, bias), {"stride": 2, "padding": 1}
        up = raunet.conv_rau(once, size, t(own["up_weight"]), t(own["up_bias"]))
        results = {
            "conv_off": nn.functional.conv2d(x, weight, bias, **plain),
            "conv_on": once,
            "up_on": up,
            "avgpool": small,
            "bicubic": raunet.block_rau(small, size),
        }
        for name, got in results.items():
            close(f"{case}_{name}", got, own[name])
        close(f"{case} thinned", nn.functional.conv2d(raunet.thinned(x), weight, bias, **plain), own["conv_on"])
        assert set(own) == {"x", "weight", "bias", "up_weight", "up_bias", *results}


def check_windows(arrays: Arrays) -> None:
    for own in cases(arrays).values():
        rows, columns = own.pop("size")
        for name, windows in own.items():
            expected = np.zeros((rows * columns,) * 2, bool)
            for tokens in windows:
                expected[np.ix_(tokens, tokens)] = True
            mask = MSW(int(name[-1])).dense_mask(Layout.image(int(rows), int(columns)))[0]
            assert sorted(windows.flat) == list(range(rows * columns))
            np.testing.assert_array_equal(np.asarray(mask), expected, err_msg=name)


def check_schedule(arrays: Arrays) -> None:
    for name, expected in arrays.items():
        match = INTERVAL.fullmatch(name)
        model, steps, side = match["model"], int(match["n"]), int(match["lat"] or TURBO_LATENT)
        variant = re.sub(r"sdxl(.)", r"sdxl_\1", model)
        native = NATIVE["sd15" if model == "sd15" else "sdxl"]
        table = raunet.timetable(variant, (side, side), (native, native), steps)
        on = getattr(table, match["kind"])
        np.testing.assert_array_equal([step in on for step in range(steps)], expected, err_msg=name)


@dataclass(frozen=True)
class Drawn(HiDiffusion):
    """Every roll is the stored one."""

    def index(self, at: At) -> int:
        return DRAWN


class Pipe:
    """What a run of a pipeline is to a method: a UNet and a scheduler that is at some step."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet, self.scheduler = unet, EulerDiscreteScheduler()

    def start(self) -> None:
        self.scheduler.set_timesteps(STEPS)

    @torch.no_grad()
    def at(self, step: int, own: Arrays) -> torch.Tensor:
        self.scheduler._step_index = step
        return self.unet(t(own["x"]), TIME, t(own["text"])).sample


def stored_unet(weights: Arrays) -> UNet2DConditionModel:
    """The model whose weights are stored, its widths from their shapes."""
    down = {int(name.split(".")[1]) for name in weights if name.startswith("down_blocks.")}
    widths = tuple(len(weights[f"down_blocks.{level}.resnets.0.conv1.bias"]) for level in sorted(down))
    model = UNet2DConditionModel(
        sample_size=32,
        in_channels=weights["conv_in.weight"].shape[1],
        out_channels=weights["conv_out.weight"].shape[0],
        layers_per_block=2,
        block_out_channels=widths,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=2,
        transformer_layers_per_block=(1, 2, 2),
        use_linear_projection=True,
    )
    model.load_state_dict({name: t(array) for name, array in weights.items()})
    return model.eval()


def near(name: str, got: torch.Tensor, expected: np.ndarray) -> None:
    """Within a thousandth of the largest stored value."""
    error = np.abs(got.numpy() - expected).max() / np.abs(expected).max()
    assert error <= 1e-3, f"{name}: {error}"


def check_unet(arrays: Arrays) -> None:
    weights = {name[2:]: array for name, array in arrays.items() if name.startswith("w:")}
    model = stored_unet(weights)
    pipe, rest = Pipe(model), {name: array for name, array in arrays.items() if not name.startswith("w:")}
    for case in sorted({re.sub(r"_(x|text|out_plain|out_steps)$", "", name) for name in rest}):
        own = {name: rest.pop(f"{case}_{name}") for name in ("x", "text", "out_plain", "out_steps")}
        pipe.start()
        plain = pipe.at(0, own)
        near(f"{case} plain", plain, own["out_plain"])
        handle = gensparse.apply(pipe, Drawn(windows=case == "both"))
        outputs = [pipe.at(step, own) for step in range(len(own["out_steps"]))]
        for step, (got, expected) in enumerate(zip(outputs, own["out_steps"], strict=True)):
            near(f"{case} step {step}", got, expected)
        report = handle.report()
        assert report["raunet"] == {"variant": "sdxl", "conv": [0], "block": [1, 2, 3]}
        # two layers in each of the two pairs down and the three up, of width 2 here
        assert report["sparse"] == (10 if case == "both" else 0)
        if case != "both":
            assert torch.equal(outputs[4], plain)
        handle.remove()
        assert torch.equal(pipe.at(0, own), plain)
    assert not rest


CHECKS = {"resample": check_resample, "windows": check_windows, "schedule": check_schedule, "unet": check_unet}


@pytest.mark.parametrize("path", golden_params("hidiffusion"))
def test_golden(path: Path) -> None:
    kind, arrays = load(path)
    CHECKS[kind](arrays)


def test_golden_has_every_kind() -> None:
    assert {load(path)[0] for path in folder_files("hidiffusion")} == set(CHECKS)


def test_unknown_arrays_are_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "hidiffusion"
    shutil.copytree(golden_root() / "hidiffusion", folder)
    np.savez(folder / "planted.npz", a_mystery=np.zeros(3))
    (path,) = [path for path in folder_files("hidiffusion", tmp_path) if path.name == "planted.npz"]
    with pytest.raises(GoldenError, match="a_mystery"):
        load(path)


def test_changed_values_are_noticed() -> None:
    """A table that was shifted by a step, and a picture that was moved by a cell, fail."""
    tables = {load(path)[0]: load(path)[1] for path in folder_files("hidiffusion")}
    with pytest.raises(AssertionError):
        check_schedule({name: np.roll(array, 1) for name, array in tables["schedule"].items()})
    with pytest.raises(AssertionError):
        check_resample(
            {name: np.roll(x, 1, -1) if name.endswith("_x") else x for name, x in tables["resample"].items()}
        )
