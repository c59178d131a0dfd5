"""When two pairs of boxes have the same mask.

`signature(rule, q, k)` gives integer columns such that two pairs of boxes with equal token counts, steps and columns
allow the same pairs of slots. It lets a plan evaluate one mask per kind of pair instead of one per pair; a rule without
a signature costs time, never correctness.
"""

from functools import singledispatch

import numpy as np

from gensparse.layout import Boxes, Ints
from gensparse.patterns.axes import Axis, SeparableRule
from gensparse.patterns.base import Rehomed, Rule, UnionRule, _IntersectionRule, _MenuRule
from gensparse.patterns.disc import _DiscRule
from gensparse.patterns.pooled import _PooledRule
from gensparse.patterns.segments import _TextRule

Columns = list[Ints]


@singledispatch
def signature(rule: Rule, q: Boxes, k: Boxes, group: int = 0) -> Columns | None:
    """Integer columns [n] of pairs of boxes [n], or None when the rule offers none."""
    return None


@signature.register
def _(rule: _TextRule | _PooledRule, q: Boxes, k: Boxes, group: int = 0) -> Columns | None:
    return [rule.tile_relation(q, k, group).astype(np.int64)]


@signature.register
def _(rule: _DiscRule, q: Boxes, k: Boxes, group: int = 0) -> Columns | None:
    inside = (q.segment == rule.target) & (k.segment == rule.target)
    return [inside.astype(np.int64), *(np.where(inside, k.lo[:, axis] - q.lo[:, axis], 0) for axis in range(3))]


@signature.register
def _(rule: SeparableRule, q: Boxes, k: Boxes, group: int = 0) -> Columns | None:
    inside = (q.segment == rule.target) & (k.segment == rule.target)
    columns = [inside.astype(np.int64)]
    for number, axis in enumerate(rule.axes):
        column = np.zeros(len(inside), np.int64)
        if not axis.whole:
            column[inside] = _axis_masks(axis, _ranges(q, number)[inside], _ranges(k, number)[inside])
        columns.append(column)
    return columns


@signature.register
def _(rule: UnionRule | _IntersectionRule, q: Boxes, k: Boxes, group: int = 0) -> Columns | None:
    parts = [signature(part, q, k, group if part.groups > 1 else 0) for part in rule.rules]
    return None if any(part is None for part in parts) else [column for part in parts for column in part]


@signature.register
def _(rule: _MenuRule, q: Boxes, k: Boxes, group: int = 0) -> Columns | None:
    return signature(rule.rules[group], q, k)


@signature.register
def _(rule: Rehomed, q: Boxes, k: Boxes, group: int = 0) -> Columns | None:
    own = len(rule.layout.segments)
    columns = signature(rule.rule, q, k._replace(segment=np.where(k.segment < own, k.segment, -1)), group)
    if columns is None or not rule.rule.sources:
        return columns
    return [*columns, rule.tile_relation(q, k, group).astype(np.int64)]


def combine(columns: Columns) -> Ints:
    """One code [n] per row of integer columns, equal exactly for equal rows."""
    code, span = np.zeros(len(columns[0]), np.int64), 1
    for column in columns:
        low = int(column.min(initial=0))
        width = int(column.max(initial=0)) - low + 1
        if span * width >= 1 << 62:
            code = np.unique(code, return_inverse=True)[1].reshape(-1)
            span = int(code.max(initial=0)) + 1
        code = code * width + (column - low)
        span *= width
    return code


def _ranges(box: Boxes, axis: int) -> Ints:
    """(start, stop, step) [n, 3] of one axis."""
    step = np.broadcast_to(box.step, box.lo.shape)
    return np.stack([box.lo[:, axis], box.hi[:, axis], step[:, axis]], -1)


def _axis_masks(axis: Axis, q: Ints, k: Ints) -> Ints:
    """Number of the distinct 1-D mask of every pair of token ranges [n, 3]."""
    q_code, k_code = (combine(list(ranges.T)) for ranges in (q, k))
    _, first, index = np.unique(combine([q_code, k_code]), return_index=True, return_inverse=True)
    known: dict[bytes, int] = {}
    labels = [known.setdefault(_mask_bytes(axis, q[i], k[i]), len(known)) for i in first]
    return np.array(labels, np.int64)[index.reshape(-1)]


def _mask_bytes(axis: Axis, q: Ints, k: Ints) -> bytes:
    return np.packbits(axis.pairs(np.arange(*q)[:, None], np.arange(*k))).tobytes()
