"""Window methods on edits: what target, references and text see of each other."""

from typing import ClassVar

import numpy as np
import pytest

from gensparse.layout import Layout
from gensparse.methods import (
    METHODS,
    Clear,
    DoubleWindow,
    FreeSwimWindow,
    LongDistance,
    Method,
    Neighborhood,
    SlidingWindow,
)
from gensparse.methods.auto import _Resolved, _share_of
from gensparse.methods.pictures import over_pictures
from gensparse.methods.profile import GridProfile, LayerProfile, Profile
from gensparse.patterns import Box, Text

GRID, OTHER = (1, 7, 5), (1, 3, 4)
EDIT = Layout.joint(GRID, text=3, references=[GRID, OTHER])
PLAIN = Layout.joint(GRID, text=3)
TEXT, TARGET, SAME, REST = slice(0, 3), slice(3, 38), slice(38, 73), slice(73, 85)

SMALL = [
    Clear(radius=2),
    Neighborhood(window=3),
    SlidingWindow(radius=1),
    DoubleWindow(window=3),
    LongDistance(group=2, interval=2),
    FreeSwimWindow(half=(1, 1)),
]
WHOLE = [Clear(radius=100), Neighborhood(window=100), SlidingWindow(radius=100), FreeSwimWindow(half=(100, 100))]


def mask_of(method: Method, layout: Layout) -> np.ndarray:
    return method.pattern(layout).dense_mask(layout)


@pytest.mark.parametrize("method", SMALL, ids=lambda method: method.name)
def test_references_of_the_targets_grid_share_its_window_and_others_are_seen_wholly(method: Method) -> None:
    assert method.why_not(EDIT) is None
    own = mask_of(method, PLAIN)[:, 3:, 3:]
    assert not own.all(), "nothing is tested"
    for group, mask in zip(own, mask_of(method, EDIT), strict=True):
        for queries in (TARGET, SAME):
            for keys in (TARGET, SAME):
                np.testing.assert_array_equal(mask[queries, keys], group)
            assert mask[queries, REST].all()
        assert mask[REST].all()
        assert mask[TEXT].all()
        assert mask[:, TEXT].all()


@pytest.mark.parametrize("method", WHOLE, ids=lambda method: method.name)
def test_a_window_over_the_grid_is_dense(method: Method) -> None:
    assert mask_of(method, EDIT).all()


@pytest.mark.parametrize("method", SMALL, ids=lambda method: method.name)
def test_without_references_nothing_changes(method: Method) -> None:
    assert "Aligned" not in repr(method.pattern(PLAIN))
    assert over_pictures(Box(2), PLAIN) == Box(2) | Text()


def test_methods_with_a_rule_for_references_are_these() -> None:
    with_rule = {name for name, cls in METHODS.items() if cls.edits}
    named = {method.name for method in SMALL} | {"auto"}
    assert with_rule >= named
    assert all("methods.pictures" in (METHODS[name].__doc__ or "") for name in named)


def test_auto_counts_what_references_cost() -> None:
    grid = (1, 13, 17)
    edit = Layout.joint(grid, text=3, references=[grid, OTHER])
    entry = GridProfile(grid, ((1, 1, 1), (1, 3, 2)), (LayerProfile("layer", ((0.5, 0.7),), ((0.5, 0.1),)),))
    for window, radius in enumerate(((1, 1), (3, 2))):
        for layout in (Layout.joint(grid, text=3), edit, Layout.joint(grid, text=3, references=[grid, grid])):
            pattern = over_pictures(Box(radius), layout)
            assert _share_of(entry, window, layout) == pytest.approx(pattern.dense_mask(layout).mean(), rel=1e-9)
    method = _Resolved(error=0.2, dense_below=0, measured=Profile("tiny", (entry,), {}))
    assert method.share(edit) == pytest.approx(mask_of(method, edit).mean(), rel=1e-9)
    native = _Resolved(dense_below=0, native_tokens=4)
    assert native.share(edit) == pytest.approx(mask_of(SlidingWindow(radius=1), edit).mean(), rel=1e-9)


class Blind(SlidingWindow):
    edits: ClassVar[bool] = False


def test_a_method_without_a_rule_says_so() -> None:
    assert Blind().why_not(EDIT) == "sliding_window has no rule for reference pictures"
    assert Blind().why_not(PLAIN) is None
