"""Code on the pages of docs/ runs as it stands there."""

import re
from pathlib import Path

import numpy as np
import pytest

from gensparse.layout import Layout
from gensparse.patterns import Pattern, Text
from gensparse.plan import build_plan
from gensparse.testing import PatternDefectError, check_pattern

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "patterns.md").read_text()


def own_pattern() -> str:
    """The example of the section on writing patterns."""
    section = PAGE.split("## Write your own pattern")[1]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


def run(code: str) -> type[Pattern]:
    names: dict = {"__name__": "page"}
    exec(compile(code, "docs/patterns.md", "exec"), names)
    return names["Diamond"]


def test_the_pattern_on_the_page_is_proved_and_does_what_it_says():
    diamond = run(own_pattern())
    y, x = np.indices((9, 7)).reshape(2, -1)
    distance = np.abs(y[:, None] - y) + np.abs(x[:, None] - x)
    np.testing.assert_array_equal(diamond(3).dense_mask(Layout.image(9, 7))[0], distance <= 3)
    plan = build_plan(diamond(12) | Text(), Layout.image(64, 64, text=7))
    assert plan.halo() is not None


def test_its_code_without_imports_and_blank_lines_is_about_twenty_lines():
    body = own_pattern().split("@dataclass")[1].split("check_pattern")[0]
    assert len([line for line in body.splitlines() if line.strip()]) <= 20


def test_the_kit_catches_slips_in_it():
    for good, bad in [("far <= self.radius", "near <= self.radius"), ("q.hi + self.radius", "q.hi + self.radius - 1")]:
        code = own_pattern()
        assert good in code
        with pytest.raises(PatternDefectError, match=r"tile_relation|key_box"):
            run(code.replace(good, bad))


def test_the_signature_the_page_names_is_honest():
    diamond = run(own_pattern())
    rule_of = diamond.bind

    def bind(self, layout, data=None):
        rule = rule_of(self, layout, data)

        def signature(q, k, group=0):
            inside = (q.segment == rule.target) & (k.segment == rule.target)
            return [inside.astype(int), *(k.lo - q.lo).T]

        rule.signature = signature
        return rule

    check_pattern(type("Signed", (diamond,), {"bind": bind})(4))


def test_the_formula_of_the_semantics_page_is_what_a_call_computes():
    page = (Path(__file__).resolve().parent.parent / "docs" / "semantics.md").read_text()
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(code, "docs/semantics.md", "exec"), {"__name__": "page"})
    assert "```python" in page


def test_pictures_on_the_page_exist():
    for name in re.findall(r"\((images/[^)]+)\)", PAGE):
        assert (Path(__file__).resolve().parent.parent / "docs" / name).stat().st_size > 0
