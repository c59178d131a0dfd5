"""The test kit accepts sound patterns and catches planted defects, each with a sentence that names it."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from gensparse import attention
from gensparse.attention import Backend
from gensparse.errors import BackendError, ConfigError
from gensparse.kernels import reference
from gensparse.layout import Layout
from gensparse.patterns import FULL, NONE, PARTIAL, Blocks, Box, Disc, PerHead, Pooled, Stripes, Text
from gensparse.patterns.base import NO_DATA, Pattern, Rule
from gensparse.patterns.disc import _DiscRule
from gensparse.plan import build_plan
from gensparse.testing import PatternDefectError, check_pattern, default_layouts
from gensparse.testing.pattern_checks import check_plan, spelled_mask

PICTURE = Layout.image(9, 11, text=3)


@pytest.mark.parametrize(
    "pattern",
    [
        Disc(3) | Text(),
        (Blocks(4, shift=1) | Box(1)) & Disc(5),
        PerHead((Stripes(2), Disc(2) | Pooled(2, weights="mean", bias="log_count"))) | Text(),
    ],
    ids=repr,
)
def test_sound_patterns_pass(pattern):
    check_pattern(pattern, [PICTURE, Layout.video(2, 5, 7), Layout.ulysses(PICTURE, 3)])


def test_the_default_layouts_are_awkward():
    layouts = default_layouts()
    assert any(layout.grid == (1, 1, 1) for layout in layouts)
    assert any(1 not in layout.grid for layout in layouts)
    assert any(layout.parts > 1 for layout in layouts)
    assert {"text", "register", "reference", "pad"} <= {s.kind for layout in layouts for s in layout.segments}
    check_pattern(Disc(2))


class Broken(_DiscRule):
    """A disc that has no defect yet."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout, 3)


class TooFull(Broken):
    def tile_relation(self, q, k, group=0):
        return np.where(super().tile_relation(q, k, group) == NONE, NONE, FULL)


class TooEmpty(Broken):
    def tile_relation(self, q, k, group=0):
        said = super().tile_relation(q, k, group)
        return np.where(said == PARTIAL, NONE, said)


class FullOfNothing(Broken):
    """Wrong for empty boxes only."""

    def tile_relation(self, q, k, group=0):
        empty = np.any(q.hi <= q.lo, axis=-1) | np.any(k.hi <= k.lo, axis=-1)
        return np.where(empty, FULL, super().tile_relation(q, k, group))


class FlatRelation(Broken):
    def tile_relation(self, q, k, group=0):
        return super().tile_relation(q, k, group).reshape(-1)


class SmallBox(Broken):
    """One key short, on one side of one axis."""

    def key_box(self, q, segment, group=0):
        lo, hi = super().key_box(q, segment, group)
        return lo, np.where(hi > lo + 1, hi - np.array([0, 0, 1]), hi)


class LyingSignature(Broken):
    """Forgets one axis."""

    def signature(self, q, k, group=0):
        return super().signature(q, k, group)[:-1]


class LyingPartition(Broken):
    def partition(self, segment, group=0):
        return np.zeros(self.layout.segments[segment].length, np.int64)


DEFECTS = {
    TooFull: "tile_relation says FULL",
    TooEmpty: "tile_relation says NONE",
    FullOfNothing: "NONE for an empty box",
    FlatRelation: "has shape",
    SmallBox: "key_box .* misses the visible key",
    LyingSignature: "signature is equal for .* their masks differ",
    LyingPartition: "partition of segment",
}


@dataclass(frozen=True)
class Planted(Pattern):
    kind: type[Broken]

    def bind(self, layout, data=NO_DATA) -> Rule:
        return self.kind(layout)


def test_the_rule_without_a_defect_passes():
    check_pattern(Planted(Broken), [PICTURE])


@pytest.mark.parametrize(("kind", "sentence"), DEFECTS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_defects_of_rules_are_caught(kind, sentence):
    with pytest.raises(PatternDefectError, match=sentence) as caught:
        check_pattern(Planted(kind))
    assert "Planted" in str(caught.value)
    assert "grid" in str(caught.value)


@dataclass
class Mutable(Pattern):
    radius: int = 3

    def bind(self, layout, data=NO_DATA) -> Rule:
        return _DiscRule(layout, self.radius)


@dataclass(frozen=True)
class Moody(Pattern):
    """Another mask at every call."""

    def bind(self, layout, data=NO_DATA) -> Rule:
        return _DiscRule(layout, int(np.random.default_rng().integers(1, 1 << 40)) % 6 + 1)

    def dense_mask(self, layout, data=NO_DATA):
        mask = super().dense_mask(layout, data)
        return mask ^ (np.random.default_rng().random(mask.shape) < 0.5)


def test_patterns_that_are_no_values_are_caught():
    with pytest.raises(PatternDefectError, match="frozen dataclass"):
        check_pattern(Mutable(), [PICTURE])
    with pytest.raises(PatternDefectError):
        check_pattern(Moody(), [PICTURE])


def wrong_mask(call):
    """A mask that shows one key too many."""
    mask = call.plan.dense_mask.clone()
    mask[:, 50, 60] = ~mask[:, 50, 60]
    return reference.attend(call.q, call.k, call.v, mask)


def nan_without_keys(call):
    out, lse = reference.attend(call.q, call.k, call.v, call.plan.dense_mask)
    return out.masked_fill(torch.isneginf(lse)[..., None], float("nan")), lse


def wrong_lse(call):
    out, lse = reference.attend(call.q, call.k, call.v, call.plan.dense_mask)
    return out, lse * 1.01


@pytest.mark.parametrize(
    ("run", "sentence"),
    [(wrong_mask, "output is off"), (nan_without_keys, "queries without a key"), (wrong_lse, "log-sum-exp is off")],
)
def test_defects_of_backends_are_caught(run, sentence, monkeypatch):
    monkeypatch.setitem(attention.BACKENDS, "planted", Backend(lambda need: None, run))
    with pytest.raises(PatternDefectError, match=f"planted in torch.float32 on cpu: .*{sentence}"):
        check_pattern(Disc(3), [PICTURE])
    check_pattern(Disc(3), [PICTURE], backends=["halo", "plan_loop"])


def test_backends_that_must_run_are_not_skipped():
    with pytest.raises(BackendError, match="Can't run partition"):
        check_pattern(Disc(3), [PICTURE], backends=["partition"])


def test_tampered_lists_are_caught():
    plan = build_plan(Disc(4), Layout.image(24, 24), q_tile=32, k_tile=32)
    mask = plan.pattern.dense_mask(plan.layout)
    check_plan(plan, mask)
    with pytest.raises(PatternDefectError, match="lacks a pair"):
        check_plan(plan, mask | True)
    with pytest.raises(PatternDefectError, match="lists a pair that the mask hides"):
        check_plan(plan, mask & False)
    lists = plan.lists
    doubled = lists._replace(key_tile=lists.key_tile[:1].expand_as(lists.key_tile))
    with pytest.raises(PatternDefectError, match="times"):
        spelled_mask(replace(plan, lists=doubled))
    wide = build_plan(Box(9), Layout.image(24, 24), q_tile=32, k_tile=32)
    turned = wide.lists._replace(key_tile=wide.lists.key_tile.flip(0), mask_id=wide.lists.mask_id.flip(0))
    with pytest.raises(PatternDefectError, match="full key tile after a partial one"):
        spelled_mask(replace(wide, lists=turned))


@dataclass(frozen=True)
class Named(Pattern):
    """Discs whose radius is an array of the data."""

    name: str

    def bind(self, layout, data=NO_DATA) -> Rule:
        if self.name not in data:
            raise ConfigError(f"Named: no array {self.name!r}.")
        return _DiscRule(layout, int(data[self.name].max()))


def test_data_may_be_made_for_every_layout():
    asked = []

    def make(layout):
        asked.append(layout)
        return {"r": np.array([len(layout.segments)])}

    check_pattern(Named("r"), [PICTURE, Layout.image(3, 4)], make)
    check_pattern(Named("r"), [PICTURE], {"r": np.array([2])})
    assert len(asked) == 2


def test_patterns_that_fit_nowhere_are_not_passed():
    with pytest.raises(ConfigError, match="none of the default layouts"):
        check_pattern(Named("r"))
    with pytest.raises(ConfigError, match="no array"):
        check_pattern(Named("r"), [PICTURE])
