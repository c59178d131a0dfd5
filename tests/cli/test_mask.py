"""`upscale --mask FILE`: only what is marked is drawn anew."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_model import tiny_family

from gensparse.highres.faithful import keep_to
from gensparse.highres.marked import plain_enlargement, soft_mask
from gensparse.image_io import read_mask, read_metadata

Cli = Callable[..., tuple[int, str, str]]
STRONG = ("--steps", "2", "--strength", "1", "-s", "3")


def save(name: str, height: int, width: int, mode: str = "RGB", seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    Image.fromarray(values, mode).save(name)
    return values


def save_mask(name: str, height: int, width: int) -> np.ndarray:
    """White in the middle third of the width, on the lower half."""
    mask = np.zeros((height, width), np.uint8)
    mask[height // 2 :, width // 3 : -(width // 3)] = 255
    Image.fromarray(mask).save(name)
    return mask


def pixels(name: str) -> np.ndarray:
    return np.asarray(Image.open(name).convert("RGB"))


@pytest.mark.parametrize(("name", "faithful"), [("flux", True), ("sdxl", False)], ids=["flux", "sdxl-free"])
def test_outside_of_the_mask_the_picture_is_enlarged_plainly_to_the_bit(
    cli: Cli, workdir: Path, name: str, faithful: bool
) -> None:
    given = save("in.png", 23, 30, "RGBA")[..., :3]
    mask = save_mask("mask.png", 8, 9)
    more = () if faithful else ("--no-faithful",)
    model = "TINY" if name == "flux" else tiny_family(name)
    where = ("--size", "75x57", "--mask", "mask.png", "-o", "out.png")
    ran = cli("upscale", "in.png", "-m", model, *STRONG, *where, *more)
    assert ran.code == 0, ran.err
    plain = plain_enlargement(given, (57, 75))
    plain = keep_to(plain, given) if faithful else plain
    soft = soft_mask(mask, (57, 75), (23, 30))
    out = pixels("out.png")
    assert Image.open("out.png").mode == "RGBA"
    assert (soft == 0).any()
    assert np.array_equal(out[soft == 0], plain[soft == 0])
    inside = soft > 128
    assert (out[inside] != plain[inside]).any(-1).mean() > 0.5


def test_masks_of_any_kind_are_read_alike(workdir: Path) -> None:
    mask = save_mask("grey.png", 48, 40)
    layer = np.zeros((48, 40, 4), np.uint8)
    layer[..., :3], layer[..., 3] = 255, mask  # painted on a transparent layer
    Image.fromarray(layer).save("layer.png")
    Image.fromarray(mask > 0).save("bits.png")
    Image.fromarray(np.stack([mask] * 3, -1)).save("colours.png")
    Image.fromarray(mask.astype(np.uint16) * 257).save("deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by a quarter
    Image.fromarray(mask.T[::-1].copy()).save("turned.png", exif=exif)
    for name in ("grey", "layer", "bits", "colours", "deep", "turned"):
        assert np.array_equal(np.asarray(read_mask(f"{name}.png").image), mask), name


def test_a_mask_is_no_part_of_the_metadata_and_asked_for_again(cli: Cli, workdir: Path) -> None:
    save("in.png", 16, 16)
    Path("secret").mkdir()
    save_mask("secret/mask.png", 12, 24)
    once = ("upscale", "in.png", "-m", "TINY", *STRONG)
    ran = cli(*once, "--mask", "secret/mask.png", "-o", "out.png")
    assert "mask of 24x12 is stretched over the picture of 16x16" in " ".join(ran.err.split())
    metadata = read_metadata("out.png")
    assert len(metadata["mask_sha256"]) == 64
    assert "secret" not in json.dumps(metadata)
    ran = cli("upscale", "in.png", "-m", "TINY", "--from", "out.png", "-o", "without.png")
    assert "give it again by --mask" in " ".join(ran.err.split())
    assert not np.array_equal(pixels("without.png"), pixels("out.png"))
    cli("upscale", "in.png", "-m", "TINY", "--from", "out.png", "--mask", "secret/mask.png", "-o", "again.png")
    assert np.array_equal(pixels("again.png"), pixels("out.png"))


def test_fault_07_another_mask_is_another_job(cli: Cli, workdir: Path) -> None:
    Path("in").mkdir()
    save("in/a.png", 16, 16)
    save_mask("mask.png", 6, 6)
    folder = ("upscale", "in", "-m", "TINY", *STRONG, "--mask", "mask.png", "-o", "out")
    assert cli(*folder).code == 0
    again = cli(*folder)
    assert again.code == 0
    assert again.err.count("skipped") == 1
    Image.new("L", (6, 6), 255).save("mask.png")
    assert cli(*folder).code == 5


@pytest.mark.parametrize("kind", ["missing", "text", "black", "clear"])
def test_fault_04_masks_that_are_none_are_refused_before_the_model(cli: Cli, workdir: Path, kind: str) -> None:
    save("in.png", 16, 16)
    if kind == "text":
        Path("mask.png").write_text("<html>")
    if kind == "black":
        Image.new("L", (4, 4), 0).save("mask.png")
    if kind == "clear":
        Image.new("RGBA", (4, 4), (255, 255, 255, 0)).save("mask.png")
    ran = cli("upscale", "in.png", "-m", "./nowhere", "--mask", "mask.png", "-o", "out.png")
    assert ran.code == 2
    assert "mask.png" in ran.err
    assert kind in ("missing", "text") or "marks nothing" in ran.err
