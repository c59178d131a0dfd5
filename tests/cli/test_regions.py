"""`--regions FILE`: prompts of rectangles for C-Upscale, from the command line into the picture's metadata and back."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_model import tiny_family

from gensparse.engine.plans import way_arguments
from gensparse.engine.resolve import open_model, resolve_request
from gensparse.errors import ConfigError
from gensparse.image_io import read_metadata
from gensparse.request import GenerateRequest, UpscaleRequest
from gensparse.subjects.region_prompts import RegionPrompt

Cli = Callable[..., tuple[int, str, str]]
REGIONS = [
    {"box": [0, 0, 1, 0.5], "prompt": "red roofs"},
    {"box": [0.25, 0.5, 1, 1], "prompt": "boats on dark water"},
]
FLAT = [[0.0, 0.0, 1.0, 0.5, "red roofs"], [0.25, 0.5, 1.0, 1.0, "boats on dark water"]]


@pytest.fixture
def model(workdir: Path) -> Path:
    """Stable Diffusion 1.5, tiny; a picture and a file of regions lie in the folder."""
    values = np.random.default_rng(3).integers(0, 256, (32, 24, 3), dtype=np.uint8)
    Image.fromarray(values).save("in.png")
    Path("regions.json").write_text(json.dumps(REGIONS))
    return tiny_family("sd15")


def pixels(name: str) -> np.ndarray:
    return np.asarray(Image.open(name))


def test_regions_of_a_file_are_read_kept_and_repeated_without_the_file(cli: Cli, model: Path) -> None:
    once = ("upscale", "in.png", "-m", model, "--steps", "2", "--strength", "1", "-p", "a harbour", "-s", "5")
    for more in (("-o", "plain.png", "--highres", "c_upscale"), ("--regions", "regions.json", "-o", "out.png")):
        ran = cli(*once, *more)
        assert ran.code == 0, ran.err
    assert not np.array_equal(pixels("plain.png"), pixels("out.png"))
    request = read_metadata("out.png")["request"]
    assert request["highres"] == "c_upscale"
    assert request["regions"] == FLAT
    Path("regions.json").unlink()
    ran = cli("upscale", "in.png", "-m", model, "--from", "out.png", "-o", "again.png")
    assert ran.code == 0, ran.err
    assert np.array_equal(pixels("again.png"), pixels("out.png"))
    assert cli(*once, "--highres", "c_upscale", "--no-prompt", "-o", "quiet.png", "--from", "out.png").code == 0
    assert "harbour" not in json.dumps(read_metadata("quiet.png"))
    assert "roofs" not in json.dumps(read_metadata("quiet.png"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "nowhere.json cannot be read"),
        ("{", "is no JSON"),
        ("[]", "holds no region"),
        ('{"box": [0, 0, 1, 1], "prompt": "a"}', "give a JSON list"),
        ('[{"box": [0, 0, 1.5, 1], "prompt": "a"}]', "Region 1: The region [0.0, 0.0, 1.5, 1.0] leaves the picture"),
        ('[{"box": [0, 0, 1, 1], "prompt": " "}]', "give a text"),
        ('[{"box": [0, 0, 1, 1]}]', "Region 1"),
        (json.dumps(REGIONS[:1] * 1025), "at most 1024"),
    ],
    ids=["missing", "no-json", "empty", "no-list", "outside", "no-prompt", "no-prompt-key", "many"],
)
def test_fault_04_files_that_hold_no_regions(cli: Cli, model: Path, text: str | None, words: str) -> None:
    if text is not None:
        Path("nowhere.json").write_text(text)
    ran = cli("upscale", "in.png", "-m", model, "--regions", "nowhere.json", "-o", "out.png")
    assert ran.code == 2
    assert words in " ".join(ran.err.split())
    assert not Path("out.png").exists()


def test_what_reads_no_regions_says_so(cli: Cli, model: Path) -> None:
    with_regions = ("upscale", "in.png", "--regions", "regions.json", "-o", "out.png")
    ran = cli(*with_regions, "-m", "TINY")
    assert ran.code == 2
    assert "does not exist for FLUX.1" in ran.err
    assert "Stable Diffusion XL" in ran.err
    ran = cli(*with_regions, "-m", model, "--highres", "cascade")
    assert ran.code == 2
    assert "--highres cascade is given" in ran.err
    ran = cli("plan", "a harbour", "-m", model, "--regions", "regions.json", "--size", "32")
    assert ran.code == 0, ran.err
    assert "no effect at 32x32" in ran.err
    ran = cli("plan", "a harbour", "-m", model, "--regions", "regions.json", "--size", "64")
    assert ran.code == 0, ran.err
    assert "no effect" not in ran.err


def test_boxes_are_shares_of_the_picture_without_its_padding(model: Path) -> None:
    """25 x 31 pixels are made as 26 x 32: the autoencoder of the tiny model has two pixels per cell."""
    info = open_model(GenerateRequest(model=str(model)), weights=False).info
    request = UpscaleRequest(model=str(model), image="in.png", size="25x31", regions=REGIONS, prompt="a harbour")
    from gensparse.image_io import read_image

    resolved = resolve_request(request, info, read_image("in.png"))
    way = way_arguments(resolved, resolved.request)["highres"]
    assert way.name == "c_upscale"
    assert way.regions == (
        RegionPrompt((0, 0, 1, 0.5 * 31 / 32), "red roofs"),
        RegionPrompt((0.25 * 25 / 26, 0.5 * 31 / 32, 1, 1), "boats on dark water"),
    )


def test_requests_hold_regions_as_data(tmp_path: Path) -> None:
    request = GenerateRequest(prompt="a harbour", regions=REGIONS)
    assert request.regions == tuple(map(tuple, FLAT))
    assert GenerateRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request
    assert request.key() != GenerateRequest(prompt="a harbour", regions=REGIONS[:1]).key()
    for wrong in ("regions.json", {"box": [0, 0, 1, 1]}, [[0, 0, 1, "a"]], 5, [[0, 0, 1, 1, "a\0"]]):
        with pytest.raises(ConfigError):
            GenerateRequest(regions=wrong)
