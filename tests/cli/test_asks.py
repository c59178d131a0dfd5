"""The commands of docs/highres.md, "Ten things people ask for", on tiny models of the same families."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_model import tiny_family, tiny_folder

Cli = Callable[..., tuple[int, str, str]]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "highres.md"
SECTION = PAGE.read_text(encoding="utf-8").split("## Ten things people ask for")[1].split("\n## ")[0]
ASKS = re.findall(r"^(\d+)\. .*\n\s+`gensparse (.*)`$", SECTION, re.MULTILINE)
MODELS = {"flux.1-dev": tiny_folder, "sdxl": lambda: tiny_family("sdxl"), "sd1.5": lambda: tiny_family("sd15")}


def test_all_ten_are_there() -> None:
    assert [int(number) for number, _ in ASKS] == list(range(1, 11))


@pytest.mark.parametrize(("number", "command"), ASKS, ids=lambda value: value[:3])
def test_the_command_does_what_the_page_says(cli: Cli, workdir: Path, number: str, command: str) -> None:
    import shlex

    words = shlex.split(command)
    if words[0] == "app":
        assert cli(*words, "--help").code == 0
        return
    if words[0] in ("plan", "env"):
        ran = cli(*words)
        assert ran.code == 0, ran.err
        return
    values = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(values).save("photo.jpg")
    name = words[words.index("-m") + 1]
    words[words.index("-m") + 1] = str(MODELS[name]())
    size = (48, 80)
    if "--size" in words:
        at = words.index("--size") + 1
        native = 512 if name == "sd1.5" else 1024
        sides = [int(side) * 32 // native for side in words[at].split("x")]
        words[at], size = "x".join(map(str, sides)), (sides[-1], sides[0])
    ran = cli(*words, "--steps", "3", "-s", "1", "-o", "out.png")
    assert ran.code == 0, ran.err
    assert np.asarray(Image.open("out.png")).shape[:2] == size
