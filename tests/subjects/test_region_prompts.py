"""Regions from files and data, and the pixels they cover."""

import json
from pathlib import Path

import numpy as np
import pytest

from gensparse.errors import ConfigError
from gensparse.subjects.captions import VisionCaptioner
from gensparse.subjects.region_prompts import RegionPrompt, as_region_prompts, read_region_prompts, region_masks

GOOD = [{"box": [0, 0, 0.5, 1], "prompt": "a harbour"}, {"box": [0.25, 0.5, 1, 1], "prompt": "moss"}]


def test_a_file_is_read_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "regions.json"
    path.write_text("\ufeff" + json.dumps(GOOD), encoding="utf-8")
    found = read_region_prompts(path)
    assert found == (RegionPrompt((0.0, 0.0, 0.5, 1.0), "a harbour"), RegionPrompt((0.25, 0.5, 1.0, 1.0), "moss"))
    assert as_region_prompts([*GOOD[:1], found[1]]) == found
    assert as_region_prompts([]) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{", "no JSON"),
        ("{}", "Regions are {}"),
        ('"a"', "Regions are 'a'"),
        ("[3]", "Region 1 is 3"),
        ('[{"box": [0, 0, 1, 1]}]', "Region 1"),
        ('[{"box": [0, 0, 1, 1], "prompt": "x", "weight": 2}]', "Region 1"),
        ('[{"box": [0, 0, 1], "prompt": "x"}]', "box is"),
        ('[{"box": [0, 0, 1, "1"], "prompt": "x"}]', "box is"),
        ('[{"box": [0, 0, 1, true], "prompt": "x"}]', "box is"),
        ('[{"box": [0, 0, 1, NaN], "prompt": "x"}]', "box is"),
        ('[{"box": [0, 0, 1.5, 1], "prompt": "x"}]', "leaves the picture"),
        ('[{"box": [-0.1, 0, 1, 1], "prompt": "x"}]', "leaves the picture"),
        ('[{"box": [0.5, 0, 0.5, 1], "prompt": "x"}]', "leaves the picture or is empty"),
        ('[{"box": [0, 0, 1, 1], "prompt": " "}]', "give a text"),
        ('[{"box": [0, 0, 1, 1], "prompt": 3}]', "give a text"),
    ],
)
def test_bad_files_get_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "regions.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_region_prompts(path)
    assert "regions.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json"):
        read_region_prompts(tmp_path / "nowhere.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_region_prompts(tmp_path)
    (tmp_path / "picture.json").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_region_prompts(tmp_path / "picture.json")


@pytest.mark.parametrize("size", [(1, 1), (7, 13), (64, 40)])
def test_masks_hold_the_cells_from_the_first_rounded_edge_to_the_second(size: tuple[int, int]) -> None:
    boxes = [(0.0, 0.0, 1.0, 1.0), (0.1, 0.3, 0.62, 0.9), (0.0, 0.0, 0.01, 1.0)]
    masks = region_masks(boxes, size)
    assert masks.shape == (3, *size)
    for (left, top, right, bottom), mask in zip(boxes, masks, strict=True):
        for row in range(size[0]):
            for column in range(size[1]):
                inside = np.floor(top * size[0] + 0.5) <= row < np.floor(bottom * size[0] + 0.5)
                inside &= np.floor(left * size[1] + 0.5) <= column < np.floor(right * size[1] + 0.5)
                assert mask[row, column] == inside
    assert masks[0].all()
    assert region_masks([], size).shape == (0, *size)


def test_halves_share_no_cell() -> None:
    masks = region_masks([(0, 0, 0.5, 1), (0.5, 0, 1, 1)], (3, 7))
    assert (masks.sum(0) == 1).all()


def test_a_missing_vision_language_model_is_said_at_once(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path, "someone/some-model"):
        with pytest.raises(ConfigError, match=r"no folder with a config\.json.*download one yourself"):
            VisionCaptioner(path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="max_new_tokens"):
        VisionCaptioner(tmp_path, max_new_tokens=0)
