"""Pictures in and out: hostile files, colours, alpha, atomic writing, metadata."""

import errno
import json
import os
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from gensparse import image_io
from gensparse.errors import ConfigError, OutputError
from gensparse.request import GenerateRequest

FORMATS = ("png", "webp", "jpg", "tiff")


def picture(height: int = 7, width: int = 13, channels: int = 3) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values)


def metadata(**request: object) -> dict:
    return {
        "gensparse": image_io.METADATA_VERSION,
        "request": GenerateRequest(**{"prompt": "a red circle", "seed": (5,), **request}).to_dict(portable=True),
    }


def png_header(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    data = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", data)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png16(values: np.ndarray) -> bytes:
    """A 16-bit colour PNG; values [H, W, 3] uint16."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return png_header(values.shape[1], values.shape[0], depth=16) + body


# ------------------------------------------------------------------------------------------------------------ reading
@pytest.mark.parametrize("size", [(1, 1), (1, 31), (29, 1), (7, 13)], ids=str)
def test_small_and_odd_sizes_are_read(tmp_path: Path, size: tuple[int, int]) -> None:
    picture(*size).save(tmp_path / "a.png")
    got = image_io.read_image(tmp_path / "a.png")
    assert got.size == size
    assert (got.alpha, got.bits, got.warnings) == (None, 8, ())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path: Path, orientation: int) -> None:
    source = Image.new("RGB", (8, 4))
    source.paste((255, 0, 0), (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = orientation
    source.save(tmp_path / "a.png", exif=exif)
    got = image_io.read_image(tmp_path / "a.png")
    assert got.size == ((4, 8) if orientation < 5 else (8, 4))
    assert "exif" not in got.image.info


def test_header_is_checked_before_decoding(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png_header(13_000, 13_000) + chunk(b"IDAT", b""))  # no pixels at all
    with pytest.raises(ConfigError, match=r"13000x13000.*150 megapixels"):
        image_io.read_image(tmp_path / "bomb.png")


def test_huge_header_is_refused_and_pillows_limit_is_untouched(tmp_path: Path) -> None:
    before = Image.MAX_IMAGE_PIXELS
    (tmp_path / "bomb.png").write_bytes(png_header(30_000, 30_000) + chunk(b"IDAT", b""))
    with pytest.raises(ConfigError, match="too large"):
        image_io.read_image(tmp_path / "bomb.png")
    assert before == Image.MAX_IMAGE_PIXELS


def test_own_limit_is_respected(tmp_path: Path) -> None:
    picture(8, 8).save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="megapixels"):
        image_io.read_image(tmp_path / "a.png", max_pixels=63)
    assert image_io.read_image(tmp_path / "a.png", max_pixels=64).size == (8, 8)


@pytest.mark.parametrize(
    "content",
    [b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\xef\xbb\xbf  <!DOCTYPE html><html>", b"<?xml version='1.0'?>"],
    ids=["svg", "html", "xml"],
)
def test_markup_named_png_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ConfigError, match="SVG or HTML"):
        image_io.read_image(tmp_path / "a.png")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n"], ids=len)
def test_what_is_no_picture_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ConfigError, match="picture"):
        image_io.read_image(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tiff"])
def test_cut_off_file_is_damaged(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    picture(64, 64).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ConfigError, match=r"damaged|not a picture"):
        image_io.read_image(path)


def test_missing_file_and_folder_are_config_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "no.png", tmp_path):
        with pytest.raises(ConfigError, match="cannot read"):
            image_io.read_image(path)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_alpha_is_separated(tmp_path: Path, mode: str) -> None:
    source = Image.new("RGBA", (4, 4), (200, 10, 10, 255))
    source.putpixel((1, 2), (200, 10, 10, 0))
    if mode == "P":
        source = source.convert("RGB").convert("P")
        source.info["transparency"] = 0
    else:
        source = source.convert(mode)
    source.save(tmp_path / "a.png")
    got = image_io.read_image(tmp_path / "a.png")
    assert got.image.mode == "RGB"
    assert got.alpha is not None
    assert got.alpha.mode == "L"
    if mode != "P":
        assert got.alpha.getpixel((1, 2)) == 0
        assert got.alpha.getpixel((0, 0)) == 255


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    got = image_io.read_image(tmp_path / "a.png")
    assert np.asarray(got.image)[0, :, 0].tolist() == [0, 1, 128, 255]
    assert got.bits == 16
    assert any("16-bit" in text for text in got.warnings)


def test_sixteen_bit_colour_is_recognised(tmp_path: Path) -> None:
    values = np.full((3, 5, 3), 0x80FF, dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(png16(values))
    got = image_io.read_image(tmp_path / "a.png")
    assert got.bits == 16
    assert abs(int(np.asarray(got.image)[0, 0, 0]) - 0x81) <= 1


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    got = image_io.read_image(tmp_path / "a.jpg")
    red, green, blue = got.image.getpixel((1, 1))
    assert red > 200
    assert max(green, blue) < 60
    assert got.icc_profile is None


def test_rgb_profile_survives_and_a_foreign_one_is_dropped(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture().save(tmp_path / "a.png", icc_profile=profile)
    assert image_io.read_image(tmp_path / "a.png").icc_profile == profile
    picture().convert("L").save(tmp_path / "g.png", icc_profile=profile)
    assert image_io.read_image(tmp_path / "g.png").icc_profile is None


def test_animation_gives_its_first_frame_and_a_warning(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "green")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    got = image_io.read_image(tmp_path / "a.gif")
    assert got.image.getpixel((0, 0)) == (255, 0, 0)
    assert "3 frames" in got.warnings[0]


# ------------------------------------------------------------------------------------------------------------ writing
@pytest.mark.parametrize("kind", FORMATS)
def test_metadata_both_ways_in_every_format(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    image_io.write_image(picture(), path, metadata=metadata(prompt='a 赤い circle, "quoted"'))
    assert image_io.read_metadata(path) == metadata(prompt='a 赤い circle, "quoted"')
    assert b"digitalsourcetype/trainedAlgorithmicMedia" in path.read_bytes()


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_lossless_formats_keep_every_bit(tmp_path: Path, kind: str) -> None:
    image_io.write_image(picture(), tmp_path / f"a.{kind}", metadata=metadata())
    assert np.array_equal(np.asarray(Image.open(tmp_path / f"a.{kind}")), np.asarray(picture()))


def test_upscaled_pictures_are_marked_as_composite(tmp_path: Path) -> None:
    image_io.write_image(picture(), tmp_path / "a.png", metadata=metadata(), from_picture=True)
    assert b"compositeWithTrainedAlgorithmicMedia" in (tmp_path / "a.png").read_bytes()


def test_parameters_line_for_other_tools(tmp_path: Path) -> None:
    image_io.write_image(picture(), tmp_path / "a.png", metadata=metadata(negative_prompt="blur", size="64x64"))
    lines = Image.open(tmp_path / "a.png").info["parameters"].splitlines()
    assert lines[0] == "a red circle"
    assert lines[1] == "Negative prompt: blur"
    assert "Seed: 5" in lines[2]
    assert "Size: 64x64" in lines[2]


def test_without_metadata_nothing_is_written(tmp_path: Path) -> None:
    image_io.write_image(picture(), tmp_path / "a.png")
    assert not Image.open(tmp_path / "a.png").info
    with pytest.raises(ConfigError, match="no gensparse metadata"):
        image_io.read_metadata(tmp_path / "a.png")


def test_too_long_prompt_is_left_out_and_marked(tmp_path: Path) -> None:
    image_io.write_image(picture(), tmp_path / "a.jpg", metadata=metadata(prompt="x" * 90_000))
    got = image_io.read_metadata(tmp_path / "a.jpg")
    assert got["prompt_omitted"] == "too long"
    assert "prompt" not in got["request"]


def test_same_input_gives_the_same_file(tmp_path: Path) -> None:
    sums = {image_io.write_image(picture(), tmp_path / f"{k}.png", metadata=metadata()) for k in range(2)}
    assert len(sums) == 1


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"gensparse": 9, "request": {}}', '{"request": 5}', "[" * 100_000, '"' + "x" * 2_000_000 + '"'],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_hostile_metadata_is_a_config_error(tmp_path: Path, text: str, zipped: bool) -> None:
    info = PngInfo()
    info.add_itxt("gensparse", text, zip=zipped)
    picture().save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(ConfigError):
        image_io.read_metadata(tmp_path / "a.png")


def test_sidecar_and_bare_request_are_read(tmp_path: Path) -> None:
    image_io.write_json(tmp_path / "a.json", metadata())
    assert image_io.read_metadata(tmp_path / "a.json") == metadata()
    (tmp_path / "b.json").write_text(json.dumps(metadata()["request"]))
    assert image_io.read_metadata(tmp_path / "b.json")["request"] == metadata()["request"]


def test_metadata_of_pictures_beyond_pillows_limit(tmp_path: Path) -> None:
    image_io.write_image(picture(), tmp_path / "a.png", metadata=metadata())
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[16:24] = struct.pack(">II", 16_384, 16_384)
    (tmp_path / "big.png").write_bytes(bytes(data))
    assert image_io.read_metadata(tmp_path / "big.png") == metadata()


@pytest.mark.parametrize(("kind", "limit"), sorted(image_io.SIDE_LIMITS.items()))
def test_side_limits_are_checked_before_work(kind: str, limit: int) -> None:
    image_io.check_side(kind, 10, limit)
    with pytest.raises(ConfigError, match="png or tiff"):
        image_io.check_side(kind, limit + 1, 10)


@pytest.mark.parametrize(
    ("name", "wish", "kind"),
    [("a.png", None, "png"), ("a.JPEG", None, "jpg"), ("a", "webp", "webp"), ("a", None, "png")],
)
def test_format_from_name_or_wish(name: str, wish: str | None, kind: str) -> None:
    assert image_io.format_of(name, wish) == kind


@pytest.mark.parametrize(("name", "wish"), [("a.png", "jpg"), ("a.exe", None), ("a", "gif")])
def test_contradicting_formats_are_refused(name: str, wish: str | None) -> None:
    with pytest.raises(ConfigError):
        image_io.format_of(name, wish)


def test_existing_file_is_never_replaced_silently(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"precious")
    for action in (lambda: image_io.check_output(path), lambda: image_io.write_image(picture(), path)):
        with pytest.raises(OutputError, match="exists already"):
            action()
    assert path.read_bytes() == b"precious"
    image_io.write_image(picture(), path, overwrite=True)
    assert Image.open(path).size == (13, 7)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_missing_folder_and_folder_as_file_are_output_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "no" / "a.png", tmp_path):
        with pytest.raises(OutputError):
            image_io.check_output(path)


@pytest.mark.parametrize("where", ["write", "fsync", "rename"])
def test_failure_midway_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "write":
        monkeypatch.setattr(Image.Image, "save", lambda self, file, *a, **k: (file.write(b"\x89PN"), full()))
    elif where == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(os, "link", full)
        monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        image_io.write_image(picture(), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_written_file_has_the_returned_sum_and_usual_rights(tmp_path: Path) -> None:
    import hashlib

    digest = image_io.write_image(picture(), tmp_path / "a.png")
    assert digest == hashlib.sha256((tmp_path / "a.png").read_bytes()).hexdigest()
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("colour", "problem"), [((0, 0, 0), "black"), ((9, 9, 9), "single colour"), ((255, 0, 0), "single colour")]
)
def test_constant_pictures_are_noticed(colour: tuple[int, int, int], problem: str) -> None:
    image = Image.new("RGB", (8, 8), colour)
    assert problem in str(image_io.picture_problem(image))
    image.putpixel((3, 3), (1, 2, 3))
    assert image_io.picture_problem(image) is None


def test_encoding_to_a_stream_needs_no_file() -> None:
    buffer = BytesIO()
    image_io.encode_image(picture(), buffer, "png", metadata=metadata())
    assert Image.open(BytesIO(buffer.getvalue())).info["gensparse"]
