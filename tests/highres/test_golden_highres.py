"""Golden vectors of positions, time shift and frequency guidance: folders highres-rope and highres-freq."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_files import GoldenError, folder_files, golden_params, golden_root, read
from golden_files import Schema as FileSchema

from gensparse.highres import frequency, rope, shift

FOLDERS = ("highres-rope", "highres-freq")
DIM, THETA, NATIVE = 56, 10000.0, 64

ROPE_NAME = re.compile(
    r"px(?P<px>\d+)_(?P<rule>base|ntk10|ntk|yarn|dy_ntk|dy_yarn|imax_clip)(_t(?P<t>[\d.]+)|(?P<mscale>_mscale))?"
)
LAYOUT = {"layout_hw", "layout_t", "layout_rows", "layout_cos", "layout_sin"}
SIZE_SIGMAS = re.compile(r"(?P<h>\d+)x(?P<w>\d+)_(?P<rule>stock|capped|dype)_(?P<what>mu|sigmas)")
STATIC_SIGMAS = re.compile(r"static(?P<shift>[\d.]+)_sigmas")
FUSION = re.compile(
    r"(?P<case>\d+)_(?P<array>filter|ratio|x0_high|x0_low|x0_ref|alpha|x0_guided_fft|x0_guided_haar|haar_low|step_x|"
    r"step_v0|step_v1|step_ref0|step_ref1|step_sigmas|step_beta|step_out1|step_out2|imax_guidance|imax_t|"
    r"imax_(?:decay|shift)_\d+of\d+|dh_guidance|dh_db4_swapped)"
)
IMAX = re.compile(r"imax_(?P<mode>decay|shift)_(?P<step>\d+)of(?P<steps>\d+)")

SCHEMAS = {
    "rope": FileSchema(grammar=rf"{ROPE_NAME.pattern}|axis0_base|{'|'.join(sorted(LAYOUT))}"),
    "sigmas": FileSchema(grammar=r"\d+x\d+_(stock|capped|dype)_(mu|sigmas)|static[\d.]+_sigmas"),
    "fusion": FileSchema(grammar=FUSION.pattern),
}


def t(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array))


def close_table(name: str, got: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got.double().numpy(), expected, rtol=1e-6, atol=0, err_msg=name)


def close(name: str, got: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-5, err_msg=name)


def check_rope(arrays: dict[str, np.ndarray]) -> None:
    for name, expected in arrays.items():
        match = ROPE_NAME.fullmatch(name)
        if match is None:
            continue
        tokens = int(match["px"]) // 16
        axis = rope.Axis(DIM, THETA, NATIVE, tokens, tokens**2, NATIVE**2, float(match["t"] or 1))
        frequencies, mscale = rope.axis_frequencies(match["rule"], axis)
        close_table(name, torch.tensor(mscale, dtype=torch.float64) if match["mscale"] else frequencies, expected)
    if "axis0_base" in arrays:
        close_table("axis0_base", rope.base_frequencies(2 * len(arrays["axis0_base"]), THETA), arrays["axis0_base"])
    if arrays.keys() & LAYOUT:
        check_rope_layout(arrays)


def check_rope_layout(arrays: dict[str, np.ndarray]) -> None:
    height, width = (int(n) for n in arrays["layout_hw"])
    ids = torch.zeros(4 + height * width, 3)
    ids[4:, 1] = torch.arange(height).repeat_interleave(width)
    ids[4:, 2] = torch.arange(width).repeat(height)
    table = rope.PositionTable((16, DIM, DIM), THETA, (height, width), NATIVE, rule="dy_yarn")
    table.set_time(float(arrays["layout_t"]))
    for name, wave in zip(("layout_cos", "layout_sin"), table(ids), strict=True):
        close(name, wave[t(arrays["layout_rows"])], arrays[name])


def check_sigmas(arrays: dict[str, np.ndarray]) -> None:
    for name, expected in arrays.items():
        if (match := STATIC_SIGMAS.fullmatch(name)) is not None:
            close_table(name, shift.flow_sigmas(len(expected) - 1, shift=float(match["shift"])), expected)
            continue
        match = SIZE_SIGMAS.fullmatch(name)
        tokens = 4096 if match["rule"] == "dype" else int(match["h"]) // 16 * (int(match["w"]) // 16)
        mu = shift.shift_mu(tokens, capped=match["rule"] != "stock")
        got = (
            torch.tensor(mu, dtype=torch.float64)
            if match["what"] == "mu"
            else shift.flow_sigmas(len(expected) - 1, mu=mu)
        )
        close_table(name, got, expected)


def check_fusion(arrays: dict[str, np.ndarray]) -> None:
    for case in sorted({FUSION.fullmatch(name)["case"] for name in arrays}):
        check_fusion_case({name[len(case) + 1 :]: a for name, a in arrays.items() if name.startswith(f"{case}_")})


def check_fusion_case(a: dict[str, np.ndarray]) -> None:
    ratio, alpha = float(a["ratio"]), float(a["alpha"])
    high, ref = t(a["x0_high"]), t(a["x0_ref"])
    close("filter", torch.fft.fftshift(frequency.butterworth(*a["filter"].shape, ratio)), a["filter"])
    enlarged = torch.nn.functional.interpolate(t(a["x0_low"]), size=high.shape[-2:], mode="bicubic")
    close("x0_ref", enlarged, a["x0_ref"])
    close("x0_guided_fft", frequency.guide_estimate(high, ref, alpha, "fft", ratio), a["x0_guided_fft"])
    close("x0_guided_haar", frequency.guide_estimate(high, ref, alpha, "dwt"), a["x0_guided_haar"])
    close("haar_low", frequency.haar_low_pass(high), a["haar_low"])
    close("dh_db4_swapped", frequency.swap_low_band(high, t(a["dh_guidance"])), a["dh_db4_swapped"])
    check_hiflow_steps(a, alpha, ratio)
    for name in filter(IMAX.fullmatch, a):
        match = IMAX.fullmatch(name)
        progress = int(match["step"]) / int(match["steps"])
        velocity = frequency.imax_velocity(
            t(a["step_v0"]),
            t(a["step_x"]),
            t(a["imax_guidance"]),
            float(a["imax_t"]),
            progress,
            f"cosine_{match['mode']}",
        )
        close(name, velocity, a[name])


def check_hiflow_steps(a: dict[str, np.ndarray], alpha: float, ratio: float) -> None:
    z, motion, sigmas, beta = t(a["step_x"]), None, a["step_sigmas"].tolist(), float(a["step_beta"])
    for i in range(2):
        v, v_ref = t(a[f"step_v{i}"]), t(a[f"step_ref{i}"])
        motion = frequency.guided_velocity(z, v, v_ref, sigmas[i], alpha, beta, motion, "fft", ratio)
        z = z + (sigmas[i + 1] - sigmas[i]) * motion[0]
        close(f"step_out{i + 1}", z, a[f"step_out{i + 1}"])


CHECKS = {"rope": check_rope, "sigmas": check_sigmas, "fusion": check_fusion}


@pytest.mark.parametrize("path", golden_params(*FOLDERS))
def test_highres_arrays(path):
    kind, arrays = read(path, SCHEMAS)
    CHECKS[kind](arrays)


def test_planted_unknown_files_fail(tmp_path):
    root = tmp_path / "golden"
    for folder in FOLDERS:
        shutil.copytree(golden_root() / folder, root / folder)
        planted = root / folder / "planted.npz"
        np.savez(planted, unheard_of=np.zeros(3))
        assert planted in folder_files(folder, root)
        with pytest.raises(GoldenError):
            read(planted, SCHEMAS)
    run = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-k", "golden and highres_arrays", __file__],
        env={**os.environ, "GENSPARSE_GOLDEN": str(root)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert all(f"golden-{folder}-planted.npz" in run.stdout for folder in FOLDERS)


@pytest.mark.parametrize(
    ("folder", "file", "name"),
    [
        ("highres-rope", "flux_rope.npz", "px4096_dy_yarn_t0.25"),
        ("highres-rope", "flux_sigmas.npz", "2048x4096_capped_sigmas"),
        ("highres-freq", "fusion.npz", "1_step_out2"),
    ],
)
def test_a_changed_value_fails(folder, file, name):
    kind, arrays = read(golden_root() / folder / file, SCHEMAS)
    arrays[name] = arrays[name] * 1.001
    with pytest.raises(AssertionError):
        CHECKS[kind](arrays)
