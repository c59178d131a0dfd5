"""Golden vectors of DemoFusion and FreeScale: folders demofusion and freescale; every array is compared."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_files import GoldenError, folder_files, golden_params, golden_root, load

from gensparse.highres import demofusion, freescale, views

FOLDERS = ("demofusion", "freescale")
TIMES = ("timesteps", "cosine_factor", "c1", "c2", "c3")


def close(name: str, got: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-5, err_msg=name)


def numbers(pattern: str, name: str) -> list[float]:
    found = re.fullmatch(pattern, name)
    assert found, name
    return [float(number) for number in found.groups()]


def cases(arrays: Iterable[str], pattern: str) -> list[str]:
    return sorted({found[1] for name in arrays if (found := re.fullmatch(pattern, name))})


class Demofusion:
    """The arrays of a file; `seen` holds the names of those compared or used."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays, self.seen = arrays, set()

    def get(self, name: str) -> torch.Tensor:
        self.seen.add(name)
        return torch.from_numpy(np.asarray(self.arrays[name]))

    def check(self) -> None:
        if self.arrays.keys() & set(TIMES):
            self.check_weights()
        for name in self.arrays:
            if name.startswith("views_"):
                self.check_views(name)
            elif name.startswith("kernel_"):
                size, sigma = numbers(r"kernel_k(\d+)_s([\d.]+)", name)
                close(name, demofusion.gaussian_kernel(int(size), sigma), self.get(name).numpy())
        for scale in cases(self.arrays, r"dil_s(\d+)_\w+"):
            self.check_dilated(int(scale))
        self.check_mixes()
        if self.arrays.keys() & {"anchor_in"}:
            self.check_anchor()
        assert self.seen == set(self.arrays)

    def check_weights(self) -> None:
        for i, t in enumerate(self.get("timesteps").tolist()):
            weights = demofusion.weights(t)
            got = (demofusion.cosine_factor(t), weights.skip, weights.dilated, weights.blur)
            for name, value in zip(TIMES[1:], got, strict=True):
                np.testing.assert_allclose(value, self.get(name)[i], rtol=0, atol=1e-6, err_msg=f"{name}[{i}]")

    def check_views(self, name: str) -> None:
        height, width, window, stride = (int(n) for n in numbers(r"views_(\d+)x(\d+)_win(\d+)_stride(\d+)", name))
        size = (height // 8, width // 8)
        expected = self.get(name).numpy()
        got = np.array(views.windows(size, (window, window), (stride, stride)))
        # a window that is longer than the picture is written uncut in the files
        np.testing.assert_array_equal(got, np.minimum(expected, [size[0], size[0], size[1], size[1]]), err_msg=name)

    def check_dilated(self, scale: int) -> None:
        case, step = f"dil_s{scale}_", (scale, scale)
        x = self.get(f"{case}x")
        whole = views.padded_to(x, step)
        gauss = demofusion.blurred(whole, scale, float(self.get(f"{case}c3")))
        close(f"{case}gauss", gauss, self.get(f"{case}gauss").numpy())
        close(f"{case}views", views.dilated_views(gauss, step), self.get(f"{case}views").numpy())
        back = views.from_dilated(2 * views.dilated_views(whole, step), step)[..., -x.shape[-2] :, -x.shape[-1] :]
        np.testing.assert_array_equal(back.numpy(), self.get(f"{case}recombined_2x").numpy())

    def check_mixes(self) -> None:
        for name in self.arrays:
            if found := re.fullmatch(r"(blend|skip)_(\d+)", name):
                weights = demofusion.weights(float(self.get("timesteps")[int(found[2])]))
                pair = ("L", "G", weights.dilated) if found[1] == "blend" else ("z", "noisy", weights.skip)
                first, second = (self.get(f"{found[1]}_{part}") for part in pair[:2])
                close(name, demofusion.mixed(first, second, pair[2]), self.get(name).numpy())

    def check_anchor(self) -> None:
        wanted = demofusion.Moments(self.get("anchor_mean"), self.get("anchor_std"))
        out = self.get("anchor_out")
        close("anchor_out", demofusion.with_moments(self.get("anchor_in"), wanted), out.numpy())
        for name, got in zip(("anchor_mean", "anchor_std"), demofusion.moments(out), strict=True):
            close(name, got.flatten()[0], self.arrays[name])


def check_freescale(arrays: dict[str, np.ndarray]) -> None:
    seen = set()
    for name, expected in arrays.items():
        if name.startswith("views_"):
            rows, columns, *sub, factor = numbers(r"views_(\d+)x(\d+)_sub(\d+)x(\d+)_sf([\d.]+)", name)
            size = (int(rows), int(columns))
            cut = freescale.windows_of(tuple(int(side / factor) for side in sub))
            plain = views.windows(size, cut.window, cut.stride)
            np.testing.assert_array_equal(views.jittered(plain, size, cut.jitter, None), expected, err_msg=name)
            seen.add(name)
    for case in cases(arrays, r"([a-z]+)_local"):
        local, whole = (torch.from_numpy(arrays[f"{case}_{part}"]) for part in ("local", "global"))
        scale = int(arrays[f"{case}_scale"])
        close(f"{case}_lp", freescale.low_pass(local, scale, "reference"), arrays[f"{case}_lp_local"])
        close(f"{case}_fused", freescale.fused(local, whole, scale, "reference"), arrays[f"{case}_fused"])
        close(f"{case}_2d", freescale.fused(local, whole, scale), arrays[f"{case}_fused_spatial2d"])
        seen |= {f"{case}_{part}" for part in ("local", "global", "scale", "lp_local", "fused", "fused_spatial2d")}
    assert seen == set(arrays)


CHECKS = {"core": lambda arrays: Demofusion(arrays).check(), "fusion": check_freescale}


@pytest.mark.parametrize("path", golden_params(*FOLDERS))
def test_unet_highres_arrays(path):
    kind, arrays = load(path)
    CHECKS[kind](arrays)


@pytest.mark.parametrize(
    ("path", "name"),
    [("demofusion/core.npz", "dil_s3_gauss"), ("demofusion/core.npz", "anchor_out"), ("demofusion/core.npz", "c1"),
     ("freescale/fusion.npz", "b_fused"), ("freescale/fusion.npz", "a_fused_spatial2d")],
)  # fmt: skip
def test_a_changed_value_fails(path, name):
    kind, arrays = load(golden_root() / path)
    arrays[name] = arrays[name] * 1.001
    with pytest.raises(AssertionError):
        CHECKS[kind](arrays)


@pytest.mark.parametrize(("path", "name"), [("demofusion/core.npz", "c3"), ("freescale/fusion.npz", "a_lp_local")])
def test_a_missing_array_fails(path, name):
    kind, arrays = load(golden_root() / path)
    del arrays[name]
    with pytest.raises((AssertionError, KeyError)):
        CHECKS[kind](arrays)


def test_planted_unknown_files_and_arrays_fail(tmp_path):
    root = tmp_path / "golden"
    for folder in FOLDERS:
        shutil.copytree(golden_root() / folder, root / folder)
        planted = root / folder / "planted.npz"
        np.savez(planted, unheard_of=np.zeros(3))
        assert planted in folder_files(folder, root)
        with pytest.raises(GoldenError):
            load(planted)
        (original,) = (file for file in folder_files(folder) if file.suffix == ".npz")
        _, arrays = load(original)
        np.savez(planted, **arrays, unheard_of=np.zeros(3))
        with pytest.raises(GoldenError):
            load(planted)
    run = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-k", "golden and unet_highres_arrays", __file__],
        env={**os.environ, "GENSPARSE_GOLDEN": str(root)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert all(f"golden-{folder}-planted.npz" in run.stdout for folder in FOLDERS)
