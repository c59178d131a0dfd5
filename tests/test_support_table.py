"""docs/models.md says what the models really do, and the measuring itself can fail."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from gensparse.families import FAMILIES
from gensparse.layout import Layout
from gensparse.methods import METHODS, START, At, Clear, Loaded, Method, Place, Subject
from gensparse.patterns import Disc, Pattern, Text
from gensparse.processors.operators import OperatorCall
from gensparse.testing import support_table
from gensparse.testing.support_table import COMMAND, Measured, Outcome, outcome
from gensparse.testing.tiny import TINY

DOCS = Path(__file__).resolve().parents[1] / "docs" / "models.md"


@pytest.fixture(scope="module")
def rows() -> list[Measured]:
    return support_table.measure()


def test_the_page_is_what_was_measured(rows: list[Measured]) -> None:
    assert DOCS.read_text(encoding="utf-8") == support_table.page(rows), f"the page is old; make it again: {COMMAND}"


def test_nothing_that_must_never_happen_happened(rows: list[Measured]) -> None:
    found = {(row.name, key): item.faults for row in rows for key, item in row.outcomes.items() if item.faults}
    assert not found


def test_every_model_class_family_and_method_is_on_the_page(rows: list[Measured]) -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert [name for name in FAMILIES if f"`{name}`" not in text] == []
    assert [name for name in METHODS if f"| `{name}` |" not in text] == []
    assert [row.name for row in rows] == list(TINY)
    assert all(set(row.outcomes) == set(METHODS) for row in rows)


def test_every_method_works_on_some_model_and_every_model_takes_some_method_or_says_why(rows: list[Measured]) -> None:
    for name in METHODS:
        assert any(row.outcomes[name].sparse for row in rows), f"{name} is sparse nowhere"
    for row in rows:
        refused = all(item.refused for item in row.outcomes.values())
        assert refused or any(item.sparse for item in row.outcomes.values()), f"{row.name} is sparse with nothing"


def test_known_cells(rows: list[Measured]) -> None:
    cells = {row.name: row.outcomes for row in rows}
    assert cells["flux"]["clear"] == Outcome(sparse=2, sites=2)
    assert "linear" in cells["sana"]["clear"].refused
    assert "UNet" in cells["flux"]["msw_msa"].refused
    assert cells["wan22"]["sliding_window"].sites == 2 * cells["wan"]["sliding_window"].sites


# -------------------------------------------------------------------------------------- what the measuring would notice
@dataclass(frozen=True)
class _Planted(Method):
    """A disc."""

    name: ClassVar[str] = "planted"

    def pattern(self, layout: Layout, at: At = START) -> Pattern:
        return (Disc(2) | Text()).clamped(layout.grid)


@dataclass(frozen=True)
class _Forgets(_Planted):
    """Leaves a weight changed."""

    def load(self, subject: Subject, places: Mapping[str, Place]) -> Loaded:
        weight = next(subject.model.parameters())
        weight.data.add_(0.5)

        class Nothing(Loaded):
            def undo(self) -> None:
                pass

        return Nothing()


@dataclass(frozen=True)
class _Hole:
    """An operator that computes nothing."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: OperatorCall) -> Tensor:
        return torch.full_like(q, float("nan"))

    def key(self) -> str:
        return "hole"


@dataclass(frozen=True)
class _NotFinite(_Planted):
    """No numbers."""

    def pattern(self, layout: Layout, at: At = START) -> _Hole:
        return _Hole()


@dataclass(frozen=True)
class _Breaks(_Planted):
    """Raises what no user should see."""

    def pattern(self, layout: Layout, at: At = START) -> Pattern:
        raise KeyError("lost")


@pytest.mark.parametrize(
    ("method", "fault"),
    [(_Forgets(), "bit for bit"), (_NotFinite(), "not finite"), (_Breaks(), "KeyError"), (_Planted(), None)],
    ids=["forgets", "not-finite", "breaks", "sound"],
)
def test_planted_faults_are_found(method: Method, fault: str | None) -> None:
    found = outcome(support_table.Subject("pixart"), method)
    if fault is None:
        assert found == Outcome(sparse=2, sites=2)
    else:
        assert any(fault in item for item in found.faults)


def test_a_fault_stands_on_the_page() -> None:
    row = Measured("flux", "FluxTransformer2DModel", {}, {"clear": Outcome(faults=("the output is not finite",))})
    text = support_table.page([row])
    assert "FAULT<sup>1</sup>" in text
    assert "1. the output is not finite" in text


def test_the_model_is_left_alone_between_methods() -> None:
    subject = support_table.Subject("pixart")
    for method in (Clear(2), _Planted()):
        outcome(subject, method)
        assert torch.equal(subject.run(), subject.output)
