"""Masks of the published patterns, exact: golden folders natten, clear, classic_windows, msw_msa."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from golden_files import GoldenError, folder_files, golden_params, golden_root, load, unpack_mask

from gensparse.layout import Layout
from gensparse.patterns import (
    MSW,
    Blocks,
    CrissCross,
    Disc,
    Grid,
    Halo,
    LongDistance,
    Neighborhood,
    Pattern,
    Pooled,
    Stripes,
    Text,
)

FOLDERS = ("natten", "clear", "classic_windows", "msw_msa")

CLASSIC = {
    "swin": lambda w, s: Blocks(w, shift=s),
    "swin_masked": lambda w, s: Blocks(w, shift=s),
    "swin_wrap": lambda w, s: Blocks(w, shift=s, wrap=True),
    "halo": Halo,
    "maxvit_grid": Grid,
    "cswin_h": lambda width: Stripes(width, "horizontal"),
    "cswin_v": lambda width: Stripes(width, "vertical"),
    "ccnet": CrissCross,
    "crossformer_sda": Blocks,
    "crossformer_lda": LongDistance,
}


def classic_case(name: str) -> tuple[Pattern, Layout]:
    kind, numbers, height, width = re.fullmatch(r"([a-z]+(?:_[a-z]+)?)((?:_[a-zA-Z]+\d+)*)_(\d+)x(\d+)", name).groups()
    return CLASSIC[kind](*map(int, re.findall(r"\d+", numbers))), Layout.image(int(height), int(width))


def natten_case(arrays: dict) -> tuple[Pattern, Layout]:
    grid = arrays["q"].shape[1:-2]
    settings = (tuple(arrays[name].tolist()) for name in ("kernel_size", "stride", "dilation", "is_causal"))
    return Neighborhood(*settings), Layout.joint((1,) * (3 - len(grid)) + grid)


def clear_case(arrays: dict) -> tuple[Pattern, Layout]:
    layout = Layout.image(int(arrays["height"]), int(arrays["width"]), text=int(arrays["text_length"]))
    factor = int(arrays["down_factor"])
    pattern = Disc(int(arrays["window_size"])) | Text()
    return (pattern | Pooled(factor) if factor > 1 else pattern), layout


def assert_mask(pattern: Pattern, layout: Layout, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(pattern.dense_mask(layout), expected[None])


def check(path: Path) -> None:
    kind, arrays = load(path)
    match path.parent.name, kind:
        case "natten", "attention" | "attention_extra_keys":
            assert_mask(*natten_case(arrays), arrays["mask"])
        case "clear", _:
            assert_mask(*clear_case(arrays), arrays["mask"])
        case "classic_windows", _:
            for name, bits in arrays.items():
                pattern, layout = classic_case(name)
                assert_mask(pattern, layout, unpack_mask(bits, layout.tokens))
        case "msw_msa", "even":
            check_msw(arrays)
        case ("natten", "token_permute" | "merge") | ("msw_msa", "odd_bicubic"):
            pass  # no mask inside: tests/testing and tests/kernels compare their arrays
        case _:
            raise GoldenError(f"{path}: no check for kind {kind}")


def check_msw(arrays: dict) -> None:
    layout = Layout.image(int(arrays["height"]), int(arrays["width"]))
    pattern = MSW(int(arrays["shift_index"]))
    assert_mask(pattern, layout, arrays["mask"])
    labels = pattern.bind(layout).partition(0)
    np.testing.assert_array_equal(labels, arrays["window_id"])


@pytest.mark.parametrize("path", golden_params(*FOLDERS))
def test_mask_is_exact(path):
    check(path)


def plant_unknown_files(root: Path) -> list[str]:
    """One fault per owned folder: foreign arrays, an extra array, a foreign file type, a name outside the grammar."""
    np.savez(root / "natten" / "planted.npz", mystery=np.zeros(3))
    victim = folder_files("clear", root)[0]
    arrays = dict(np.load(victim)) | {"mystery": np.zeros(1)}
    np.savez(victim, **arrays)
    (root / "msw_msa" / "planted.json").write_text("{}")
    np.savez(root / "classic_windows" / "planted.npz", swin_w4_12x16=np.zeros((192, 24), np.uint8))
    return ["natten-planted.npz", f"clear-{victim.name}", "msw_msa-planted.json", "classic_windows-planted.npz"]


def test_unknown_files_and_arrays_fail_the_suite(tmp_path):
    for path in (path for folder in FOLDERS for path in folder_files(folder)):
        copy = tmp_path / path.relative_to(golden_root())
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    planted = plant_unknown_files(tmp_path)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "golden and not suite", str(Path(__file__))],
        env=os.environ | {"GENSPARSE_GOLDEN": str(tmp_path)},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
    )
    failed = {line.split("golden-")[1].split("]")[0] for line in run.stdout.splitlines() if line.startswith("FAILED")}
    assert run.returncode == 1
    assert failed == set(planted)
