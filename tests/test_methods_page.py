"""docs/methods.md is what the classes say, and every class says enough."""

from dataclasses import fields
from pathlib import Path

import pytest

from gensparse.errors import ConfigError
from gensparse.methods import METHODS, Clear, parse_method
from gensparse.methods.describe import describe, method_text
from gensparse.testing import methods_page
from gensparse.testing.methods_page import COLUMNS, COMMAND, QUALITY, page, read_quality

DOCS = Path(__file__).resolve().parents[1] / "docs" / "methods.md"


def test_the_page_is_what_the_classes_say() -> None:
    assert DOCS.read_text(encoding="utf-8") == page(), f"the page is old; make it again: {COMMAND}"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_is_where_from_on_what_terms_and_when(name: str) -> None:
    cls = METHODS[name]
    facts = describe(cls)
    assert cls.__doc__
    assert len(facts["about"]) > 40
    for fact in ("paper", "licence", "use"):
        assert facts[fact].strip(), f"{cls.__name__}.{fact} is empty"
        assert "\n" not in facts[fact]
    assert "arXiv" in facts["paper"] or "ours" in facts["paper"] or any(c.isdigit() for c in facts["paper"])


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_is_described(name: str) -> None:
    cls = METHODS[name]
    assert set(describe(cls)["settings"]) == {item.name for item in fields(cls) if item.init}


@pytest.mark.parametrize("name", METHODS)
def test_the_text_on_the_page_is_read_back(name: str) -> None:
    facts = describe(METHODS[name])
    assert parse_method(facts["text"]) == METHODS[name]()
    for model, text in facts["presets"].items():
        assert parse_method(text) == parse_method(f"{name}:preset={model}") == METHODS[name].preset(model)


def test_text_of_all_kinds_of_values() -> None:
    data = {"method": "neighborhood", "window": [None, 4, 16], "causal": [True, False, False], "base": None}
    assert method_text(data) == "neighborhood:window=nonex4x16,causal=truexfalsexfalse,base=none"
    assert method_text(Clear(8).to_dict() | {"weights": None}).startswith("clear:radius=8,")
    assert method_text({"method": "x"}) == "x"


def test_nothing_is_said_of_quality_that_was_not_measured(tmp_path: Path) -> None:
    text = page(tmp_path / "none.csv")
    assert text.count("**Measured quality:** not measured.") == len(METHODS)


def test_measured_numbers_stand_at_their_method(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_text(",".join(COLUMNS) + "\nclear:radius=8,2048,12,all attributes,61.5,55.0,68.1,abc1234\n")
    section = page(path).split("## clear\n")[1].split("\n## ")[0]
    assert "| `clear:radius=8` | 2048 | 12 | all attributes | 61.5 (55.0..68.1) | abc1234 |" in section
    assert page(path).count("not measured.") == len(METHODS) - 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("claer,2048,12,x,1,1,1,abc", "did you mean clear"),
        ("clear:raduis=8,2048,12,x,1,1,1,abc", "raduis"),
        ("clear,2048,12,x,good,1,1,abc", "line 2 has value='good'"),
        ("clear,2048,12,x,1", "line 2"),
        ("clear,2048,12,x,1,1,1,abc,more", "line 2"),
    ],
)
def test_a_bad_table_is_refused(tmp_path: Path, row: str, message: str) -> None:
    path = tmp_path / "q.csv"
    path.write_text(",".join(COLUMNS) + f"\n{row}\n")
    with pytest.raises(ConfigError, match=message):
        read_quality(path)


def test_other_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_text("attention,value\nclear,1\n")
    with pytest.raises(ConfigError, match="columns"):
        read_quality(path)


def test_the_committed_table_is_read() -> None:
    assert QUALITY.is_file()
    assert isinstance(read_quality(QUALITY), dict)
    assert methods_page.COMMAND in page()
